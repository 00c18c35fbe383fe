"""Every data format, with all faults: what is built of it are the rows that were written."""

import json
import sys

import fsspec
import pytest
import tensorflow_datasets as tfds
from conftest import ROOT

from jaxpref import base_config
from jaxpref.data import commands, remote
from jaxpref.data import rows as rows_lib
from jaxpref.errors import UserError

sys.path.insert(0, str(ROOT / "benchmarks"))

import formats  # noqa: E402
import fuzz_rows  # noqa: E402


def build(name, root, out, **flags):
  """Builds a sample; returns its report, and its rows as tensorflow_datasets reads them."""
  kind = formats.FORMATS[name]
  given = {"source": kind.source, "path": root / kind.file, "out": out, "table": kind.table}
  given |= {"split": kind.split, "processes": 1, "max-bad-share": 1.0, "rows-per-shard": 9}
  assert commands.main(["build", *(f"--{k}={v}" for k, v in (given | flags).items())]) == 0
  facts = json.loads((out / "complete.json").read_text())
  return facts["report"], list(tfds.builder_from_directory(out).as_data_source("train"))


@pytest.mark.parametrize("name", formats.FORMATS)
def test_what_is_built_is_what_was_written(name, tmp_path):
  items = formats.make(name, tmp_path / "in", seed=1, count=40)
  report, rows = build(name, tmp_path / "in", tmp_path / "out")
  good = formats.expected(name, items)
  assert len(rows) == report["stored"] == len(good) > 10
  for row, item in zip(rows, good, strict=True):
    formats.check_row(name, row, item)
  assert report["rows"] == report["stored"] + sum(report["left_out"].values())
  if name != "prompts":
    assert {item.fault for item in items} > {""}
    # A folder's images without a caption, and the other way round, are files, but no rows.
    assert report["rows"] <= len(items) <= report["rows"] + sum(report["files"].values())
    assert not report["files"] or "folder" in name or name == "metadata"


@pytest.mark.parametrize("name", ["metadata", "webdataset", "prompts"])
def test_remote_files_are_copied_first(name, tmp_path, capsys, monkeypatch):
  """From any file system of fsspec; here one in memory."""
  formats.make(name, tmp_path / "in", seed=3, count=12)
  memory = fsspec.filesystem("memory")
  url = f"memory://{name}"
  memory.put(str(tmp_path / "in"), f"/{name}", recursive=True)
  kind = formats.FORMATS[name]
  local, _ = build(name, tmp_path / "in", tmp_path / "local")
  given = ["build", f"--source={kind.source}", f"--out={tmp_path / 'out'}", "--processes=1"]
  given += [f"--table={kind.table}", "--rows-per-shard=9", "--max-bad-share=1"]
  given.append(f"--path={url}/{kind.file}".rstrip("/"))
  copied = []

  def copy(system, source, path, url, of=remote._copy):
    if len(copied) == 1:
      copied.append(None)
      raise KeyboardInterrupt
    copied.append(of(system, source, path, url))

  monkeypatch.setattr(remote, "_copy", copy)
  if kind.file:
    copied += [None, None]
  else:
    assert commands.main(given) == 130
  assert commands.main(given) == 0
  facts = json.loads((tmp_path / "out" / "complete.json").read_text())
  assert facts["report"] == local and facts["plan"]["origin"].startswith(url)
  assert not (tmp_path / "out" / ".source").exists()
  memory.rm("/", recursive=True)
  capsys.readouterr()
  given[2] = f"--out={tmp_path / 'none'}"
  assert commands.main(given) == 2
  assert f"{url}" in capsys.readouterr().err


def test_runs_read_local_files():
  data = base_config.base("x", "tiny").data
  data.path = "gs://bucket/set"
  with pytest.raises(UserError, match=r"a run reads local files; copy a built data set"):
    rows_lib.load_rows("pairs", data, image_size=8, seed=0)


def test_faults_and_damage_of_every_format(tmp_path, monkeypatch, capsys):
  """A part of the campaign in docs/data.md."""
  out = tmp_path / "rows.json"
  monkeypatch.setattr(sys, "argv", ["fuzz_rows.py", "--rows=250", "--seed=7", f"--out={out}"])
  fuzz_rows.main()
  found = json.loads(out.read_text())
  assert found["samples"] >= len(formats.FORMATS)
  assert sum(found["rows with a fault"].values()) >= 250
