"""Folders as other tools lay them out: metadata files, .caption, pairs, links, splits."""

import json
import os
import shutil
import unicodedata

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from jaxpref import base_config
from jaxpref.data import bad_rows
from jaxpref.data import rows as rows_lib
from jaxpref.data.sources import folder
from jaxpref.errors import UserError


def _image(path, shade=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (4, 4), (shade,) * 3).save(path)


def _text(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text, encoding="utf-8")


def _read(root, kind="experts", tally=None, seed=0, **fields):
  data = base_config.base("x", "tiny").data
  given = {"source": "folder", "path": str(root), "num_rows": 0, "num_experts": 0}
  data.update(given | fields)
  found = rows_lib.load_rows(kind, data, image_size=4, seed=seed, tally=tally)
  return [(r.caption, *(int(i[0, 0, 0]) for i in r.images)) for r in found]


# ------------------------------------------------------------------------- captions


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_files(tmp_path, kind, column, caplog):
  rows = [{"file_name": f"{i}.png", column: f"image, \n{i}", "other": i} for i in range(3)]
  rows += [{"file_name": "deeper/3.png", column: "image, 3", "other": 3}]
  for i, row in enumerate(rows):
    _image(tmp_path / "sub" / row["file_name"], i)
  table, file = pd.DataFrame(rows), tmp_path / "sub" / f"metadata.{kind}"
  match kind:
    case "jsonl":
      file.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    case "csv":
      table.to_csv(file, index=False, encoding="utf-8-sig")
    case "parquet":
      table.to_parquet(file)
  _image(tmp_path / "plain.png", 9)
  _text(tmp_path / "plain.txt", "plain")
  tally = bad_rows.Tally()
  expected = [("plain", 9), *((f"image, {i}", i) for i in range(4))]
  assert _read(tmp_path, tally=tally) == expected
  assert tally.read == [f"4 captions from sub/metadata.{kind}"]
  assert tally.read[0] in caplog.text and not tally.left_out
  assert _read(tmp_path, "captions") == [(caption,) for caption, _ in expected]


def test_rows_of_metadata_that_are_of_no_use(tmp_path):
  lines = [
    {"file_name": "a.png", "text": "a"},
    {"file_name": "missing.png", "text": "b"},
    {"file_name": "../outside.png", "text": "c"},
    {"file_name": None, "text": "d"},
    {"file_name": ["a.png"], "text": "d"},
    {"file_name": "a.png", "text": None},
    {"file_name": "a.png", "text": 3},
    {"file_name": "a.png"},
    ["a.png"],
  ]
  _image(tmp_path / "in" / "a.png", 1)
  _image(tmp_path / "outside.png")
  text = "\n".join([*map(json.dumps, lines), "[" * 100_000, '{"file_name": "a.png"', ""])
  (tmp_path / "in" / "metadata.jsonl").write_bytes(text.encode() + b'{"text": "caf\xe9"}\n')
  tally = bad_rows.Tally()
  assert _read(tmp_path / "in", tally=tally) == [("a", 1)]
  assert tally.left_out == {
    "no such image": 1,
    "file_name leads out of the folder": 1,
    "file_name is null": 1,
    "file_name is not text": 1,
    "text is null": 1,
    "text is not text": 1,
    "none of the columns text, caption, prompt": 1,
    "not a JSON object in UTF-8": 4,
  }


def test_damaged_metadata_names_its_file(tmp_path):
  _image(tmp_path / "a.png")
  (tmp_path / "metadata.parquet").write_bytes(b"nothing")
  with pytest.raises(UserError, match=r"metadata.parquet cannot be read as parquet"):
    _read(tmp_path)
  (tmp_path / "metadata.parquet").unlink()
  _text(tmp_path / "metadata.csv", 'file_name,text\na.png,"an open quote\nb.png,of b\n')
  with pytest.raises(UserError, match=r"metadata.csv cannot be read as CSV: unexpected end"):
    _read(tmp_path)


def test_rows_of_csv_that_are_not_as_the_header_says(tmp_path):
  for k, name in enumerate("abcd"):
    _image(tmp_path / f"{name}.png", k)
  rows = ["file_name,text", "a.png,of a", "b.png,a red, round ball", "c.png," + "x" * 200_000]
  _text(tmp_path / "metadata.csv", "\n".join([*rows, 'd.png,"of d, quoted"']))
  tally = bad_rows.Tally()
  assert _read(tmp_path, tally=tally) == [("of a", 0), ("of d, quoted", 3)]
  assert tally.left_out == {
    "more fields than the header has": 1,
    "text of more than 100000 bytes": 1,
    "no caption": 2,
  }
  _text(tmp_path / "metadata.csv", "file_name;text\na.png;of a")
  with pytest.raises(UserError, match="no column file_name: columns: file_name;text"):
    _read(tmp_path)


def test_an_image_may_have_several_captions(tmp_path, caplog):
  _captioned(tmp_path, "a", 5)  # a row comes before the file beside the image
  lines = [{"file_name": "a.png", "text": text} for text in ("one", "two", "one")]
  _text(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, lines)))
  assert _read(tmp_path) == [("one", 5), ("two", 5)]
  assert "2 captions from metadata.jsonl" in caplog.text


def test_names_that_other_programs_write(tmp_path):
  _image(tmp_path / "a.jpg", 0)
  _text(tmp_path / "a.jpg.txt", "of a")
  _image(tmp_path / unicodedata.normalize("NFD", "caf\u00e9.png"), 2)
  _text(tmp_path / unicodedata.normalize("NFC", "caf\u00e9.txt"), "of a cafe")
  _image(tmp_path / "images" / "b.png", 3)
  row = {"file_name": "images\\b.png", "text": None, "caption": "of b"}
  _text(tmp_path / "metadata.jsonl", json.dumps(row))
  assert sorted(caption for caption, _ in _read(tmp_path)) == ["of a", "of a cafe", "of b"]


def test_files_that_are_not_read_are_named(tmp_path, caplog):
  _captioned(tmp_path, "a")
  (tmp_path / "b.HEIC").write_bytes(b"x")
  _text(tmp_path / "captions.csv", "x")
  tally = bad_rows.Tally()
  _read(tmp_path, tally=tally)
  assert tally.left_out == {".heic files are not read": 1}
  assert "not read: captions.csv" in caplog.text


def test_bad_files_are_counted_once(tmp_path):
  for k in range(6):
    _captioned(tmp_path, f"{k}", k)
  (tmp_path / "5.txt").rename(tmp_path / "of 5.txt")
  tally = bad_rows.Tally(0.25)  # "no caption" and "without an image" are one of six
  assert len(_read(tmp_path, tally=tally)) == 5
  (tmp_path / "4.txt").write_text("")
  with pytest.raises(UserError, match="2 of 6 rows of the data cannot be used"):
    _read(tmp_path, tally=bad_rows.Tally(0.25))


def test_losers_are_never_experts(tmp_path):
  for k in range(4):
    for side in ("chosen", "rejected"):
      _captioned(tmp_path / side, f"{k}", k + 10 * (side == "rejected"))
      _text(tmp_path / side / f"{k}.txt", f"of {k}")
  _text(tmp_path / "rejected" / "3.txt", "something else")
  _captioned(tmp_path / "rejected", "4", 14)
  tally = bad_rows.Tally()
  assert [c for c, *_ in _read(tmp_path, "pairs", tally=tally)] == ["of 0", "of 1", "of 2"]
  assert tally.left_out == {
    "a name without one winner and one loser": 1,
    "a pair with two captions": 1,
  }
  assert [shade for _, shade in _read(tmp_path)] == [0, 1, 2, 3]


def test_caption_files(tmp_path, caplog):
  _image(tmp_path / "a.png", 1)
  _text(tmp_path / "a.caption", "of a")
  _image(tmp_path / "b.png", 2)
  _text(tmp_path / "b.caption", "not this")
  _text(tmp_path / "b.txt", "of b")
  assert _read(tmp_path) == [("of a", 1), ("of b", 2)]
  assert "1 caption from .caption files" in caplog.text


def test_long_captions_are_not_read(tmp_path):
  for name in ("a", "b", "c", "d"):
    _image(tmp_path / f"{name}.png")
    _text(tmp_path / f"{name}.txt", name)
  with (tmp_path / "c.txt").open("wb") as file:
    file.truncate(10**12)  # a hole: it takes no space
  tally = bad_rows.Tally(0.25)
  assert [caption for caption, _ in _read(tmp_path, tally=tally)] == ["a", "b", "d"]
  assert tally.left_out == {"more than 100000 bytes": 1}


# ---------------------------------------------------------------------------- pairs

SIDES = [("w", "l"), ("winner", "loser"), ("chosen", "rejected"), ("W", "L")]


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("layout", ["{name}_{side}.png", "{side}/{name}.png"])
@pytest.mark.parametrize("told", ["name", "winner", "shared", "metadata"])
def test_pairs(tmp_path, sides, layout, told):
  root = tmp_path / "in"
  for i, name in enumerate(("a", "b")):
    files = [root / name / layout.format(name=name, side=side) for side in sides]
    for k, file in enumerate(files):
      _image(file, 10 * i + k)
    match told:
      case "name":
        _text(root / name / f"{name}.txt", f"of {name}")
      case "winner":
        _text(files[0].with_suffix(".caption"), f"of {name}")
      case "shared":
        _text(root / name / "caption.txt", f"of {name}")
      case "metadata":
        of = str(files[0].relative_to(root / name))
        row = {"file_name": of, "text": f"of {name}"}
        _text(root / name / "metadata.jsonl", json.dumps(row))
  tally = bad_rows.Tally(0.0)
  assert _read(root, "pairs", tally=tally) == [("of a", 0, 1), ("of b", 10, 11)]
  assert "2 pairs; only their winners can be experts" in tally.read
  assert _read(root, tally=tally) == [("of a", 0), ("of b", 10)]
  assert not tally.left_out
  singles = _read(root, "singles")
  assert singles == [("of a", 0), ("of a", 1), ("of b", 10), ("of b", 11)]


def test_images_that_only_look_like_pairs(tmp_path):
  for shade, name in enumerate(("cow_l", "photo_w", "photo_l", "w")):
    _image(tmp_path / f"{name}.png", shade)
    _text(tmp_path / f"{name}.txt", f"of {name}")
  found = [("of cow_l", 0), ("of photo_l", 2), ("of photo_w", 1), ("of w", 3)]
  assert _read(tmp_path) == found
  with pytest.raises(
    UserError, match="no pairs in .*: name the images name_w.png and name_l.png"
  ):
    _read(tmp_path, "pairs")


def test_pairs_of_no_use_are_named(tmp_path, caplog):
  for i in range(5):
    for side in "wl":
      _image(tmp_path / side / f"{i}.png", i)
    _text(tmp_path / f"{i}.txt", f"{i}")
  (tmp_path / "w" / "4.png").write_bytes(b"nothing")
  _image(tmp_path / "l" / "5.png")
  tally = bad_rows.Tally(0.5)
  assert [c for c, *_ in _read(tmp_path, "pairs", tally=tally)] == ["0", "1", "2", "3"]
  assert tally.left_out == {"a name without one winner and one loser": 1, "not an image": 1}
  assert "2 files cannot be used" in caplog.text and "w/4.png (not an image: " in caplog.text


# ---------------------------------------------------------------------------- links


def _captioned(root, name, shade=0):
  _image(root / f"{name}.png", shade)
  _text(root / f"{name}.txt", f"of {name}")


def test_links_out_of_the_folder_are_named_and_not_followed(tmp_path, caplog):
  root = tmp_path / "in"
  for name in ("a", "b", "c"):
    _captioned(root, name)
  _captioned(tmp_path / "elsewhere", "d", 7)
  (root / "sub").symlink_to("../elsewhere")
  tally = bad_rows.Tally()
  assert [c for c, _ in _read(root, tally=tally)] == ["of a", "of b", "of c"]
  assert tally.left_out == {"a link out of the folder": 1}
  advice = "sub (a link out of the folder: copy it there, or set data.follow_links)"
  assert f"1 file cannot be used: {advice}" in caplog.text
  assert len(_read(root, follow_links=True)) == 4
  # A text that is elsewhere does not become a caption, nor is an image read.
  (root / "b.txt").unlink()
  _text(tmp_path / "secret", "a secret")
  (root / "b.txt").symlink_to(tmp_path / "secret")
  (root / "c.png").unlink()
  (root / "c.png").symlink_to(tmp_path / "elsewhere" / "d.png")
  tally = bad_rows.Tally()
  assert _read(root, tally=tally) == [("of a", 0)]
  assert tally.left_out["a link out of the folder"] == 3
  assert ("a secret", 0) in _read(root, follow_links=True)


def test_what_links_lead_to_inside_is_read_once(tmp_path, caplog):
  root = tmp_path / "in"
  _captioned(root / "one", "a")
  _captioned(root, "b")
  (root / "two").symlink_to("one")
  (root / "loop").symlink_to(".")
  (root / "c.png").symlink_to("b.png")
  _text(root / "c.txt", "of c")
  for follow in (False, True):
    assert [c for c, _ in _read(root, follow_links=follow)] == ["of b", "of c", "of a"]
  (tmp_path / "link").symlink_to("in")
  assert len(_read(tmp_path / "link")) == 3
  assert not caplog.records
  # Nor does a link to the folder above it go round in circles.
  (root / "up").symlink_to("..")
  assert len(_read(root, follow_links=True)) == 3


def test_pipes_are_not_opened(tmp_path):
  for name in ("a", "b", "c", "d", "e", "f"):
    _captioned(tmp_path, name)
  (tmp_path / "b.txt").unlink()
  (tmp_path / "c.png").unlink()
  for name in ("b.txt", "c.png", "metadata.jsonl"):
    os.mkfifo(tmp_path / name)
  tally = bad_rows.Tally()
  assert [c for c, _ in _read(tmp_path, tally=tally)] == ["of a", "of d", "of e", "of f"]
  assert tally.left_out == {"no caption": 1, "a caption without an image": 1}


# --------------------------------------------------------------- splits and samples


def test_folders_named_by_split(tmp_path, caplog):
  for split in ("train", "validation", "test"):
    _captioned(tmp_path / split, f"{split}-0")
  _captioned(tmp_path, "train")  # which shows one
  assert _read(tmp_path) == [("of train-0", 0)]
  assert "1 of 4 folders, those of data.split=train (not test, validation)" in caplog.text
  assert _read(tmp_path, split="test") == [("of test-0", 0)]
  assert len(_read(tmp_path, split="all")) == 4
  shutil.rmtree(tmp_path / "validation")
  shutil.rmtree(tmp_path / "test")
  assert len(_read(tmp_path)) == 2


def test_fewer_images_are_a_sample_by_the_seed(tmp_path, caplog):
  for i in range(30):
    _captioned(tmp_path, f"{i:02d}", i)
  (tmp_path / "07.png").write_bytes(b"nothing")
  found = _read(tmp_path, num_experts=8)
  assert len(found) == 8 and found == sorted(found) == _read(tmp_path, num_experts=8)
  assert found != _read(tmp_path, num_experts=8, seed=1)
  assert found[-1][1] > 8 and "8 of 30 images are used, a random sample" in caplog.text
  assert len(_read(tmp_path, num_experts=29)) == 29  # what is bad is replaced
  captions = _read(tmp_path, "captions", num_experts=8)
  assert np.array(captions).shape == (8, 1) and captions == sorted(captions)


def test_a_folder_may_be_of_any_name_within_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  _captioned(tmp_path / "mine", "a")
  assert len(_read("~/mine")) == 1
  assert folder.count_images("~/mine") == 1
