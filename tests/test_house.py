"""The shape of the code: layers, names and lengths."""

import ast
import collections
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "jaxpref").rglob("*.py"))
LENGTHS = {p: p.read_text(encoding="utf-8").count("\n") for p in MODULES}


def test_imports_run_down_and_never_in_a_circle():
  """The layers are in pyproject.toml. In a process of its own: it disables all loggers."""
  program = "from importlinter import cli; raise SystemExit(cli.lint_imports(no_cache=True))"
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout + done.stderr


def test_the_top_level_is_read_at_a_glance():
  assert len([p for p in MODULES if p.parent.name == "jaxpref" and p.stem != "__init__"]) <= 9


def test_no_two_modules_have_one_name():
  names = collections.Counter(p.stem for p in MODULES if not p.stem.startswith("__"))
  assert [name for name, count in names.items() if count > 1] == []


def test_files_are_short():
  assert statistics.median(LENGTHS.values()) <= 130
  assert {p.name: n for p, n in LENGTHS.items() if n > 450} == {}


@pytest.mark.parametrize("folder", ["jaxpref", "configs", "benchmarks", "tests"])
def test_functions_are_short(folder):
  long = {}
  for path in (ROOT / folder).rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.FunctionDef) and (n := node.end_lineno - node.lineno + 1) > 100:
        long[f"{path.relative_to(ROOT)}:{node.name}"] = n
  assert long == {}


def test_configurations_are_typed():
  found = []
  for path in MODULES:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      kind = ast.unparse(node.annotation or node) if isinstance(node, ast.arg) else ""
      if kind == "Any" and node.arg == "config":
        found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
  assert found == []
