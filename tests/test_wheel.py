"""What is installed from a wheel or a source distribution, away from the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT, WITHOUT_TORCH

SHIPPED = ("jaxpref", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys, setuptools.build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"


def build(kind, source, out):
  command = [sys.executable, "-c", BUILD, f"build_{kind}", str(out)]
  subprocess.run(command, cwd=source, check=True, capture_output=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """A directory with a wheel of the checkout, and `again`, with one of its sdist."""
  root = tmp_path_factory.mktemp("dist")
  source = root / "source"
  source.mkdir()
  skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
  for name in SHIPPED:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, source / name, ignore=skip)
    else:
      shutil.copy(ROOT / name, source)
  build("wheel", source, root)
  shutil.rmtree(source / "build")
  build("sdist", source, root)
  with tarfile.open(next(root.glob("*.tar.gz"))) as archive:
    archive.extractall(root / "unpacked", filter="data")
  build("wheel", next((root / "unpacked").iterdir()), root / "again")
  return root


def names(directory):
  with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
    return {n for n in wheel.namelist() if not n.endswith("/RECORD")}


def test_wheel_and_sdist_have_everything(built):
  wheel = names(built)
  for folder, inside in (("jaxpref", "jaxpref"), ("configs", "jaxpref/configs")):
    for file in (ROOT / folder).rglob("*"):
      if file.is_file() and "__pycache__" not in file.parts:
        assert f"{inside}/{file.relative_to(ROOT / folder).as_posix()}" in wheel
  assert any(name.endswith("licenses/LICENSE") for name in wheel)
  assert not any(name.startswith("configs/") for name in wheel)
  assert names(built / "again") == wheel


def test_configs_are_found_from_any_directory(built, tmp_path):
  with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
    wheel.extractall(tmp_path / "site")
  place = tmp_path / "place"  # with a package `configs` of something else
  (place / "configs").mkdir(parents=True)
  (place / "configs" / "__init__.py").write_text("raise RuntimeError")
  shutil.copy(ROOT / "configs" / "dro.py", place / "mine.py")
  env = os.environ | WITHOUT_TORCH
  env["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), env["PYTHONPATH"]])

  def help_of(config):
    command = [sys.executable, "-m", "jaxpref.main", f"--config={config}", "--help"]
    done = subprocess.run(
      command, cwd=place, env=env, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr

  status, text = help_of("dro:tiny")
  assert status == 0
  assert "--config.train.num_updates=4" in text
  assert "peak learning rate" in text  # what the fields mean
  assert help_of("mine.py:tiny") == (0, text)
  status, text = help_of("configs/dro.py")
  assert status == 2
  assert text == "jaxpref: error: no config file 'configs/dro.py'; did you mean 'dro'?\n"
