"""Machines that lack a home, a reader of the output, or UTF-8."""

import ast
import os
import pwd
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

from jaxpref import generate
from jaxpref.runtime import tfds_store


@pytest.mark.parametrize("name", ["main", "generate", "export", "plan"])
def test_every_program_ends_quietly_behind_head(name):
  config = "--config=configs/dro.py" if name == "main" else ""
  line = f'"$0" -m jaxpref.{name} --help {config} | true; exit ${{PIPESTATUS[0]}}'
  done = subprocess.run(
    ["bash", "-c", line, sys.executable],
    check=False,
    capture_output=True,
    cwd=conftest.ROOT,
    env=os.environ | conftest.WITHOUT_TORCH | {"PYTHONIOENCODING": "ascii"},
  )
  assert done.returncode == 0 and not done.stderr, done.stderr


def test_without_a_home_data_are_temporary(monkeypatch, tmp_path):
  def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

  for name in ("HOME", "TFDS_DATA_DIR"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(pwd, "getpwuid", unknown)
  monkeypatch.setattr(tfds_store.tempfile, "gettempdir", lambda: str(tmp_path))
  with pytest.raises(RuntimeError):
    Path.home()
  assert tfds_store._data_dir(None).parent == tmp_path
  monkeypatch.setenv("HOME", "/proc/1")  # a home that cannot be written
  monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to("/proc"))
  assert tfds_store._data_dir(None).parent == tmp_path
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  assert tfds_store._data_dir(None) == tmp_path / "home" / "tensorflow_datasets"
  monkeypatch.setenv("TFDS_DATA_DIR", "/given")
  assert tfds_store._data_dir(None) == Path("/given")


def test_prompts_where_the_locale_is_c(tmp_path):
  assert generate.read_prompts("caf\udcc3\udca9") == ["café"]
  (tmp_path / "a.txt").write_bytes("\ufeffcafé\n".encode())
  assert generate.read_prompts(str(tmp_path / "a.txt")) == ["café"]


@pytest.mark.parametrize("folder", ["jaxpref", "benchmarks"])
def test_text_files_state_their_encoding(folder):
  """By the syntax tree: the locale decides nothing."""
  found = []
  for path in sorted((conftest.ROOT / folder).rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Call) and _depends_on_locale(node):
        found.append(f"{path.name}:{node.lineno} {ast.unparse(node)[:60]}")
  assert not found


def _depends_on_locale(call: ast.Call) -> bool:
  name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
  stated = {keyword.arg for keyword in call.keywords}
  if "text" in stated or "universal_newlines" in stated:
    return "encoding" not in stated
  if "encoding" in stated:
    return False
  literals = [a.value for a in call.args if isinstance(a, ast.Constant)]
  if name == "read_text":
    return "utf-8" not in literals
  if name == "write_text":  # ours takes the path and the text
    return len(call.args) == 1
  if name == "open" and len(call.args) == 1:  # a path's: a mode, and nothing else
    return isinstance(literals[0] if literals else None, str) and "b" not in str(literals[0])
  return False
