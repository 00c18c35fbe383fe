"""Built data sets: what is stored, what is left out, and interrupted builds."""

import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import tensorflow_datasets as tfds
from conftest import ROOT
from PIL import Image

from jaxpref import base_config
from jaxpref.data import build, build_report, commands, journal, row_index, row_set, shards
from jaxpref.data import rows as rows_lib
from jaxpref.errors import UserError


def _file(shade, size=(16, 12), kind="JPEG", mode="RGB", **options):
  color = shade if mode in ("L", "I;16") else (shade,) * len(mode)
  Image.new(mode, size, color).save(file := io.BytesIO(), kind, **options)
  return file.getvalue()


def _pairs():
  """Rows like Pick-a-Pic's, with all faults; good ones first by number."""
  exif = Image.Exif()
  exif[0x0112] = 6  # turned
  rows = [
    {
      "caption": f"pair {i}",
      "jpg_0": _file(10 * i),
      "jpg_1": _file(10 * i + 5, kind="PNG"),
      "label_0": [1.0, 0.0, 0.5][i % 3],
      "label_1": [0.0, 1.0, 0.5][i % 3],
      "image_0_uid": f"{i}a",
      "image_1_uid": f"{i}b",
      "user_id": 7,
    }
    for i in range(10)
  ]
  faults = [
    {"caption": None},
    {"caption": " "},
    {"jpg_0": b"nothing"},
    {"jpg_1": rows[0]["jpg_1"][:60]},
    {"jpg_0": None},
    {"label_1": None},
    {"label_0": float("nan")},
    {"caption": "small", "jpg_0": _file(1, (16, 7))},
  ]
  rows += [{**rows[3], **fault} for fault in faults]
  rows += [{**rows[4], "image_0_uid": "other"}]  # repeated
  rows += [{**rows[0], "caption": "turned", "jpg_0": _file(1, exif=exif)}]
  rows += [
    {**rows[0], "caption": "grey of 16 bits", "jpg_0": _file(1, kind="PNG", mode="I;16")}
  ]
  rows += [{**rows[0], "caption": "clear", "jpg_1": _file(1, kind="PNG", mode="RGBA")}]
  rows += [{**rows[0], "caption": "cmyk", "jpg_1": _file(1, mode="CMYK")}]
  return rows


@pytest.fixture
def pickapic(tmp_path):
  folder = tmp_path / "parquet"
  folder.mkdir()
  rows = _pairs()
  pd.DataFrame(rows[:12]).to_parquet(folder / "a.parquet", row_group_size=5)
  pd.DataFrame(rows[12:]).to_parquet(folder / "b.parquet")
  return folder


def _build(source, path, out, **fields):
  given = {"table": "pairs", "rows_per_shard": 4, "least_side": 8} | fields
  build.build(build.Plan(source, str(path), **given), out, processes=1, max_bad_share=0.5)
  return json.loads((out / "complete.json").read_text())


def _stored(out):
  """Reads a data set as another program would: with tensorflow_datasets alone."""
  return list(tfds.builder_from_directory(out).as_data_source("train"))


def test_what_is_stored_of_pairs(pickapic, tmp_path):
  facts = _build("pickapic", pickapic, tmp_path / "out")
  report, rows = facts["report"], _pairs()
  good = [*rows[:10], *rows[19:]]
  found = _stored(tmp_path / "out")
  assert [r["caption"].decode() for r in found] == [r["caption"] for r in good]
  for ours, theirs in zip(found, good, strict=True):
    assert ours["label_0"] == theirs["label_0"] and ours["label_1"] == theirs["label_1"]
    assert ours["image_1_uid"].decode() == theirs["image_1_uid"]
    for k in (0, 1):
      image = Image.open(io.BytesIO(ours[f"jpg_{k}"]))
      assert image.size == tuple(ours[f"size_{k}"][::-1])
      if theirs["caption"].startswith("pair"):
        assert ours[f"jpg_{k}"] == theirs[f"jpg_{k}"]  # the very bytes
  turned = Image.open(io.BytesIO(found[10]["jpg_0"]))
  assert turned.size == (12, 16) and turned.format == "PNG"
  assert report["left_out"] == {
    "caption is null": 1,
    "empty caption": 1,
    "not an image": 1,
    "damaged image": 1,
    "jpg_0 is null": 1,
    "label_0 is null": 1,  # pandas writes NaN as null
    "label_1 is null": 1,
    "an image with a side below 8 pixels": 1,
    "a repeated row": 1,
  }
  # The report adds up.
  assert report["rows"] == len(rows) == report["stored"] + sum(report["left_out"].values())
  assert report["labels"] == {"first preferred": 8, "second preferred": 3, "tie": 3}
  assert sum(report["sizes"].values()) == 2 * report["stored"]
  assert sum(report["words"].values()) == report["stored"]
  assert report["converted"] == {
    "rotated by EXIF": 1,
    "I;16 to RGB": 1,
    "RGBA to RGB": 1,
    "CMYK to RGB": 1,
  }
  assert "a.parquet row 10 (caption is null)" in report["named"]


@pytest.mark.parametrize(
  ("counts", "sentence"),
  [
    ({"3": 5}, "captions: 3 words each"),
    ({"1": 2}, "captions: 1 word each"),
    ({"2": 1, "4": 1, "9": 1}, "captions: 2 to 9 words, half have at most 4"),
  ],
)
def test_lengths_of_captions(counts, sentence):
  report = dict.fromkeys(("left_out", "files", "labels", "converted", "sizes", "read"), {})
  report |= {"stored": 5, "rows": 5, "words": counts, "named": []}
  assert build_report.report_lines({"table": "images"}, report)[-1] == sentence


def test_a_built_set_has_the_rows_of_its_source(pickapic, tmp_path):
  _build("pickapic", pickapic, tmp_path / "out", least_side=0)
  data = base_config.base("x", "tiny").data
  data.update({"num_rows": 0, "path": str(tmp_path / "out"), "max_bad_share": 1.0})
  for kind in ("pairs", "singles", "captions"):
    ours = rows_lib.load_rows(kind, data, image_size=8, seed=0)
    other = data.copy_and_resolve_references()
    other.update({"source": "pickapic", "path": str(pickapic), "num_experts": 0})
    data.num_experts = 0
    theirs = rows_lib.load_rows(kind, other, image_size=8, seed=0)
    unique = list({(r.caption, *(i.tobytes() for i in r.images)): r for r in theirs}.values())
    assert row_set.fingerprint(ours) == row_set.fingerprint(unique), kind
  with pytest.raises(UserError, match="is a data set of pairs, and this loss"):
    rows_lib.load_rows("lists", data, image_size=8, seed=0)


@pytest.mark.parametrize("stop", range(0, 12, 2))
def test_interrupted_anywhere_it_ends_with_the_same_files(
  pickapic, tmp_path, monkeypatch, stop
):
  _build("pickapic", pickapic, tmp_path / "whole")
  calls = []

  def interrupted(function):
    def wrapped(*args):
      calls.append(function)
      if len(calls) > stop:
        raise KeyboardInterrupt
      return function(*args)

    return wrapped

  with monkeypatch.context() as patch:
    patch.setattr(journal.Journal, "add", interrupted(journal.Journal.add))
    patch.setattr(shards, "write_shard", interrupted(shards.write_shard))
    with pytest.raises(KeyboardInterrupt):
      _build("pickapic", pickapic, tmp_path / "part")
  _build("pickapic", pickapic, tmp_path / "part")
  _same(tmp_path / "whole", tmp_path / "part")


@pytest.mark.long
@pytest.mark.skipif(
  importlib.util.find_spec("apache_beam") is None and not os.environ.get("CI"),
  reason="Apache Beam is not installed",
)
def test_beam_builds_the_same_rows(pickapic, tmp_path, capsys):
  local, on_beam = tmp_path / "local", tmp_path / "beam"
  given = ["build", "--source=pickapic", f"--path={pickapic}", "--rows-per-shard=4"]
  given += ["--least-side=8", "--max-bad-share=0.5", "--processes=1"]
  assert commands.main([*given, f"--out={local}"]) == 0
  assert commands.main([*given, f"--out={on_beam}", "--beam=DirectRunner"]) == 0
  ours, theirs = _stored(local), _stored(on_beam)
  assert len(ours) == len(theirs) == 14
  for one, other in zip(ours, theirs, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
  for name in row_index.FILES:
    assert (local / name).read_bytes() == (on_beam / name).read_bytes()
  facts, others = (json.loads((d / "complete.json").read_text()) for d in (local, on_beam))
  assert facts["report"] == others["report"] and facts["digest"] == others["digest"]
  capsys.readouterr()
  more = [*given, f"--out={tmp_path / 'bad'}", "--beam=DirectRunner", "--max-bad-share=0.1"]
  assert commands.main(more) == 2
  assert "more than --max-bad-share = 0.1 allows" in capsys.readouterr().err
  assert commands.main([*given, f"--out={tmp_path / 'x'}", "--beam=NoRunner"]) == 2
  assert "the build on NoRunner failed" in capsys.readouterr().err


def _same(one, other):
  names = sorted(p.name for p in one.iterdir())
  assert names == sorted(p.name for p in other.iterdir())
  for name in names:
    assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.long
def test_killed_worker_processes_and_their_number_change_nothing(pickapic, tmp_path):
  _build("pickapic", pickapic, tmp_path / "whole")
  command = [
    *(sys.executable, "-m", "jaxpref.data", "build", "--source=pickapic", "--table=pairs"),
    *(f"--path={pickapic}", "--rows-per-shard=4", "--least-side=8", "--max-bad-share=0.5"),
    *(f"--out={tmp_path / 'out'}", "--processes=2"),
  ]
  first = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
  while first.poll() is None and not list((tmp_path / "out").glob(f"{build.NAME}-*")):
    time.sleep(0.001)
  # Somewhere after the first shard; where exactly, no outcome depends on.
  with contextlib.suppress(ProcessLookupError):
    os.killpg(first.pid, signal.SIGKILL)
  first.wait()
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
  assert "14 of 23 pairs stored, 9 left out" in done.stdout  # also if it was built already
  _same(tmp_path / "whole", tmp_path / "out")


def test_another_plan_is_refused(pickapic, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(journal.Journal, "lengths", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      _build("pickapic", pickapic, tmp_path / "out")
  with pytest.raises(UserError, match="holds a build with another least_side: choose another"):
    _build("pickapic", pickapic, tmp_path / "out", least_side=2)


def test_too_many_bad_rows_stop_the_build(pickapic, tmp_path, capsys):
  flags = [f"--path={pickapic}", f"--out={tmp_path / 'out'}", "--processes=1"]
  assert commands.main(["build", "--source=pickapic", *flags]) == 2
  err = capsys.readouterr().err
  assert "7 of 23 rows of the data cannot be used" in err and "--max-bad-share = 0.25" in err
  # Nothing is lost: with another limit the same command goes on.
  assert commands.main(["build", "--source=pickapic", *flags, "--max-bad-share=0.4"]) == 0
  assert "15 of 23 pairs stored, 8 left out" in capsys.readouterr().out
  assert commands.main(["inspect", str(tmp_path / "out"), "--rows=3"]) == 0
  page = (tmp_path / "out" / "inspect.html").read_text()
  assert page.count("<figure>") == 3 and "15 of 23 pairs stored" in page


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ([], "name a command: build, cache or inspect"),
    (["biuld"], "got 'biuld'"),
    (["build", "--source=folder"], "required: --out"),
    (["build", "--source=foldr", "--out=x"], "did you mean 'folder'"),
    (["build", "--source=folder", "--path=nowhere", "--out=x"], "'nowhere' is not a folder"),
    (["build", "--source=pickapic", "--path=nowhere", "--out=x"], "--path 'nowhere' is not"),
    (["build", "--source=mjhq", "--table=pairs", "--out=x"], "has images, not pairs"),
    (["build", "--source=folder", "--out=x", "--processes=0"], "must be at least 1"),
    (["build", "--source=folder", "--out=x", "--max-bad-share=2"], "between 0 and 1"),
    (["inspect", "nowhere"], "is not a data set of `python -m jaxpref.data build`"),
  ],
)
def test_commands_that_cannot_be(argv, message, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert commands.main(argv) == 2
  err = capsys.readouterr().err
  assert message in err and err.count("\n") == 1
  assert list(tmp_path.iterdir()) == []


def test_a_built_set_is_not_taken_for_another(pickapic, tmp_path, capsys):
  given = ["build", "--source=pickapic", f"--path={pickapic}", "--processes=1"]
  given += ["--max-bad-share=0.5", f"--out={tmp_path / 'out'}"]
  for _ in range(2):
    assert commands.main(given) == 0
  assert "is built already" in capsys.readouterr().out
  for flags, said in (
    (["--least-side=4"], "was built with --least-side=0, not 4: choose another --out"),
    (["--source=folder"], "was built with --source=pickapic, not folder"),
    (["--model=shapes"], "--model is for --cache=latents,text, which is missing"),
    (["--cache=text", "--model=nowhere", f"--out={tmp_path / 'b'}"], "nowhere"),
    ([f"--out={pickapic / 'a.parquet'}"], "a.parquet is a file"),
    ([f"--out={pickapic}"], "is not empty (a.parquet, b.parquet)"),
    (["--path="], "--source=pickapic needs --path"),
  ):
    assert commands.main([*given, *flags]) == 2
    assert said in capsys.readouterr().err
  assert not (tmp_path / "b").exists()
  data = base_config.base("x", "tiny").data
  load = lambda kind, **of: rows_lib.load_rows(kind, _with(data, **of), image_size=8, seed=0)  # noqa: E731
  out = str(tmp_path / "out")
  with pytest.raises(UserError, match="a data set of pairs, and this loss learns from lists"):
    load("lists", path=out)
  with pytest.raises(UserError, match=r"is a built data set: leave out data.source = 'online'"):
    load("pairs", path=out, source="online")
  with pytest.raises(UserError, match="is not a built data set; name what its files are with"):
    load("pairs", path=str(pickapic))


def _with(data, **fields):
  data = data.copy_and_resolve_references()
  data.update(fields)
  return data


def test_every_table_is_built(tmp_path):
  import test_sources

  labels = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
  test_sources.write_tar(tmp_path / "0.tar", labels)
  facts = _build("webdataset", tmp_path / "0.tar", tmp_path / "tars")
  assert facts["report"]["stored"] == 3
  test_sources.write_hpd(tmp_path / "hpd")
  facts = _build("hpd", tmp_path / "hpd" / "test.json", tmp_path / "lists", table="lists")
  (row, *_) = _stored(tmp_path / "lists")
  assert [float(row[f"rank_{k}"]) for k in range(5)] == [3, 1, 2, 5, 4]
  data = base_config.base("x", "tiny").data
  data.update({"num_rows": 0, "path": str(tmp_path / "lists"), "max_bad_share": 1.0})
  assert len(rows_lib.load_rows("lists", data, image_size=8, seed=0)) == 2
  (tmp_path / "p.txt").write_text("a cat\na dog\n")
  facts = _build("prompts", tmp_path / "p.txt", tmp_path / "prompts", table="captions")
  assert facts["report"]["words"] == {"2": 2} and len(_stored(tmp_path / "prompts")) == 2
  for k in range(3):
    (tmp_path / "pics").mkdir(exist_ok=True)
    (tmp_path / "pics" / f"{k}.jpg").write_bytes(_file(50 * k))
    (tmp_path / "pics" / f"{k}.txt").write_text(f"image {k}")
  flags = ["--source=folder", f"--path={tmp_path / 'pics'}", f"--out={tmp_path / 'images'}"]
  assert commands.main(["build", *flags, "--processes=1"]) == 0  # it has no pairs
  data.update({"path": str(tmp_path / "images"), "num_experts": 2})
  found = rows_lib.load_rows("experts", data, image_size=8, seed=0)
  assert len(found) == 2 and np.isin([r.images[0][0, 0, 0] for r in found], [0, 50, 100]).all()
