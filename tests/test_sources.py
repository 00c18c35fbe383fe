"""Published formats of preference data: small faithful samples, with all kinds of faults."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from jaxpref import base_config
from jaxpref.data import bad_rows, sources
from jaxpref.data import rows as rows_lib
from jaxpref.errors import UserError


def _jpeg(shade):
  Image.new("RGB", (16, 16), (shade,) * 3).save(file := io.BytesIO(), "JPEG", quality=95)
  return file.getvalue()


def _write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _load(kind, source, path, tally=None, **fields):
  data = base_config.base("x", "tiny").data
  data.update({"source": source, "path": str(path), "num_rows": 0, "num_experts": 0} | fields)
  return rows_lib.load_rows(kind, data, image_size=8, seed=0, tally=tally or bad_rows.Tally())


def _shades(row):
  return tuple(int(image[4, 4, 0]) for image in row.images)


# ----------------------------------------------------------------------------- HPDv2


@pytest.fixture
def hpd(tmp_path):
  write_hpd(tmp_path)
  return tmp_path


def write_hpd(tmp_path):
  """A sample with the layout of the archives: pairs to train on, ranked lists to test."""
  train, test = [], []
  for i in range(6):
    names = [f"{2 * i:08d}.jpg", f"{2 * i + 1:08d}.jpg"]
    for k, name in enumerate(names):
      _write(tmp_path / "train" / name, _jpeg(20 * i + 8 * k))
    wins = [1, 0] if i % 2 else [0, 1]
    train.append({"human_preference": wins, "prompt": f"pair {i}", "file_path": names})
  for i in range(3):
    names = [f"{i}{k}.jpg" for k in range(5)]
    for k, name in enumerate(names):
      _write(tmp_path / "test" / name, _jpeg(40 * i + 6 * k))
    ranks = [[3, 1, 2, 5, 4], [1, 2, 2, 3, 4], [2, 2, 1, 1, 1]][i]
    raw = [{"rank": ranks, "user_hash": "0a"}]
    row = {"prompt": f"list {i}", "image_path": names, "rank": ranks, "raw_annotations": raw}
    test.append(row)
  (tmp_path / "train.json").write_text(json.dumps(train))
  (tmp_path / "test.json").write_text(json.dumps(test))


def test_pairs_of_hpd(hpd):
  found = _load("pairs", "hpd", hpd)
  entries = json.loads((hpd / "train.json").read_text())
  assert [row.caption for row in found] == [e["prompt"] for e in entries]
  for row, entry in zip(found, entries, strict=True):
    best = entry["human_preference"].index(1)
    for image, name in zip(row.images, (best, 1 - best), strict=True):
      want = np.asarray(Image.open(hpd / "train" / entry["file_path"][name]))[4, 4, 0]
      assert abs(int(image[4, 4, 0]) - int(want)) <= 1
  liked = {(r.caption, *_shades(r)) for r in _load("singles", "hpd", hpd) if r.desirable}
  assert len(liked) == 6


def test_ranked_lists_of_hpd(hpd):
  tally = bad_rows.Tally()
  found = _load("lists", "hpd", hpd, tally, split="test", list_size=3)
  # Of equal ranks the first; best, middle and worst of what is left.
  assert [r.caption for r in found] == ["list 0", "list 1"]
  shades = [_shades(r) for r in found]  # 40 * list + 6 * image
  np.testing.assert_allclose(shades, [(6, 0, 18), (40, 58, 64)], atol=1)
  assert tally.left_out == {"fewer than 3 different ranks": 1}
  assert len(_load("captions", "hpd", hpd / "test.json")) == 3


def test_faults_of_hpd(hpd):
  entries = json.loads((hpd / "train.json").read_text())
  entries += [
    {"prompt": "x", "file_path": ["../train.json", "00000001.jpg"], "human_preference": [1, 0]},
    {"prompt": "x", "file_path": ["none.jpg", "00000001.jpg"], "human_preference": [1, 0]},
    {"prompt": "", "file_path": ["00000000.jpg", "00000001.jpg"], "human_preference": [1, 0]},
    {"prompt": "x", "file_path": ["00000000.jpg"], "human_preference": [1, 0]},
    {"prompt": "x", "file_path": ["00000000.jpg", "00000001.jpg"]},
    {"prompt": "x", "file_path": [1, 2], "human_preference": [1, 0]},
    {
      "prompt": "x",
      "file_path": ["00000000.jpg", "00000001.jpg"],
      "human_preference": ["a", 0],
    },
    7,
    {"prompt": "t", "file_path": ["00000000.jpg", "00000001.jpg"], "human_preference": [1, 1]},
  ]
  (hpd / "train.json").write_text(json.dumps(entries))
  tally = bad_rows.Tally()
  assert len(_load("pairs", "hpd", hpd, tally)) == 6
  assert tally.ties == 1 and tally.left_out == {
    "file_path leads out of the folder": 1,
    "no such file": 1,
    "empty caption": 1,
    "a pair without two images and two labels": 1,
    "human_preference is not a list": 1,
    "file_path is not a file's name": 1,
    "label_0 is not a number": 1,
    "file_path is not a list": 1,
  }
  for text in ("[{", "nothing", "[]", "{}"):
    (hpd / "train.json").write_text(text)
    with pytest.raises(
      UserError, match=r"train.json (cannot be read as JSON|is not a JSON li)"
    ):
      _load("pairs", "hpd", hpd)


# ------------------------------------------------------------------------- MJHQ-30k


def test_images_of_mjhq(tmp_path):
  meta = {}
  for i in range(4):
    category = ("animals", "fashion")[i % 2]
    meta[f"id{i}"] = {"category": category, "prompt": f"image {i}", "meta_source": "x"}
    _write(tmp_path / category / f"id{i}.jpg", _jpeg(30 * i))
  meta["lost"] = {"category": "animals", "prompt": "lost"}
  meta["out"] = {"category": "../..", "prompt": "out"}
  meta["none"] = {"prompt": "no category"}
  (tmp_path / "meta_data.json").write_text(json.dumps(meta))
  tally = bad_rows.Tally()
  found = _load("experts", "mjhq", tmp_path, tally)
  assert [(r.caption, *_shades(r)) for r in found] == [(f"image {i}", 30 * i) for i in range(4)]
  assert tally.left_out == {
    "no such file": 1,
    "category leads out of the folder": 1,
    "an entry without a category": 1,
  }
  assert len(_load("experts", "mjhq", tmp_path / "meta_data.json", num_experts=2)) == 2


# --------------------------------------------------------------------------- KTO csv


def test_labelled_images_of_diffusion_kto(tmp_path):
  splits = ("exclusive_win", "exclusive_lose", "intersections", "exclusive_win", "other")
  with (tmp_path / "train_processed_v3.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["", "file_name", "caption", "split"])
    for i, split in enumerate(splits):
      writer.writerow([i, f"train/{i}.jpg", f"image {i}, with a comma", split])
      _write(tmp_path / "train" / f"{i}.jpg", _jpeg(30 * i))
    writer.writerow([9, "../secret.jpg", "x", "exclusive_win"])
  tally = bad_rows.Tally()
  found = _load("singles", "kto", tmp_path, tally)
  assert [(*_shades(r), r.desirable) for r in found] == [
    (0, True),
    (30, False),
    (60, True),
    (90, True),
  ]
  assert found[1].caption == "image 1, with a comma"
  assert tally.left_out.total() == 2
  assert [_shades(r) for r in _load("experts", "kto", tmp_path)] == [(0,), (60,), (90,)]
  (tmp_path / "train_processed_v3.csv").write_text("file_name,label\na,b\n")
  with pytest.raises(UserError, match="lacks the columns caption, split"):
    _load("singles", "kto", tmp_path)


# ------------------------------------------------------------------------ WebDataset


def _add(tar, name, content):
  member = tarfile.TarInfo(name)
  member.size = len(content)
  tar.addfile(member, io.BytesIO(content))


def _members(i, label=(1.0, 0.0)):
  return {
    f"{i:05d}.original_prompt.txt": f"pair {i}".encode(),
    f"{i:05d}.jpg_0.jpg": _jpeg(20 * i),
    f"{i:05d}.jpg_1.jpg": _jpeg(20 * i + 9),
    f"{i:05d}.label_0.txt": str(label[0]).encode(),
    f"{i:05d}.label_1.txt": str(label[1]).encode(),
    f"{i:05d}.__key__": b"not read",
  }


def write_tar(path, labels, first=0, without=()):
  with tarfile.open(path, "w") as tar:
    for i, label in enumerate(labels, first):
      for name, content in _members(i, label).items():
        if name not in without:
          _add(tar, name, content)


def test_pairs_of_webdataset(tmp_path):
  labels = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1, 0), ("x", 0)]
  for t in range(2):
    write_tar(tmp_path / f"{t:05d}.tar", labels, 5 * t, without=["00008.jpg_1.jpg"])
  tally = bad_rows.Tally()
  found = _load("pairs", "webdataset", tmp_path, tally)
  assert [(r.caption, *_shades(r)) for r in found] == [
    ("pair 0", 0, 9),
    ("pair 1", 29, 20),
    ("pair 3", 60, 69),
    ("pair 5", 100, 109),
    ("pair 6", 129, 120),
  ]
  assert tally.ties == 2
  assert tally.left_out == {"label_0 is not a number": 2, "no member for jpg_1": 1}
  found = _load("pairs", "webdataset", tmp_path / "00001.tar")
  assert [r.caption for r in found] == ["pair 5", "pair 6"]


def test_tars_that_are_none(tmp_path):
  with pytest.raises(UserError, match="is not a tar file or a folder with tar files"):
    _load("pairs", "webdataset", tmp_path)
  with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
    _add(tar, "0.jpg_0.jpg", b"x")
  with pytest.raises(UserError, match="a.tar cannot be read as an uncompressed tar file"):
    _load("pairs", "webdataset", tmp_path)
  with tarfile.open(tmp_path / "a.tar", "w") as tar:
    _add(tar, "0.png", b"x")
  with pytest.raises(UserError, match="no members like KEY.jpg_0.jpg"):
    _load("pairs", "webdataset", tmp_path)


# --------------------------------------------------------------- prompts, and in general


def test_a_list_of_prompts(tmp_path):
  (tmp_path / "p.txt").write_text("a cat\n\na dog\na cat\n")
  found = _load("captions", "prompts", tmp_path / "p.txt")
  assert [r.caption for r in found] == ["a cat", "a dog"]


def test_a_source_of_another_package(register_plugin):
  register_plugin(
    *("jaxpref.data.sources", "red", "red_source"),
    "import io\nfrom PIL import Image\n"
    "def open_images(data, tally, kind):\n"
    "  Image.new('RGB', (8, 8), data.path).save(file := io.BytesIO(), 'PNG')\n"
    "  return [{'caption': data.path, 'jpg': file.getvalue()}] * 3\n",
  )
  (one, *_), more = _load("experts", "red", "red"), _load("captions", "red", "red")
  assert one.caption == "red" and one.images[0][0, 0].tolist() == [255, 0, 0]
  assert [r.caption for r in more] == ["red"]
  with pytest.raises(UserError, match="data.source=red has no pairs.*; use shapes, pickapic"):
    _load("pairs", "red", "red")


def test_a_module_that_is_no_source_is_refused():
  with pytest.raises(UserError, match="'jaxpref.errors' is not a source: it has none of open_"):
    sources.find_source("jaxpref.errors")


def test_a_source_that_returns_no_sequence_is_named(register_plugin):
  register_plugin(
    *("jaxpref.data.sources", "none", "none_source"),
    "def open_images(data, tally, kind):\n  return None\n",
  )
  with pytest.raises(UserError, match="'none': open_images must return a sequence.*NoneType"):
    _load("experts", "none", "x")
