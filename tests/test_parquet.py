"""Parquet files as other tools write them, damaged ones, splits, and rows of no use."""

import decimal
import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxpref import base_config
from jaxpref.data import bad_rows, images, row_set, splits
from jaxpref.data import rows as rows_lib
from jaxpref.data.sources import folder, pickapic
from jaxpref.errors import UserError


def _file(shade, format="PNG", **options):
  file = io.BytesIO()
  Image.new("RGB", (4, 4), (shade,) * 3).save(file, format, **options)
  return file.getvalue()


def _rows(count=16):
  return [
    {
      "caption": f"c{i:02d}",
      "jpg_0": _file(i),
      "jpg_1": _file(100 + i),
      "label_0": 1.0,
      "label_1": 0.0,
      "image_0_uid": f"{i}a",
      "image_1_uid": f"{i}b",
      "score_0": float(i),
      "score_1": -1.0 - i,
    }
    for i in range(count)
  ]


def _data(path, **fields):
  data = base_config.base("x", "tiny").data
  given = {"source": "pickapic", "path": str(path), "num_rows": 0, "num_experts": 0}
  data.update(given | fields)
  return data


def _load(path, kind="pairs", tally=None, seed=0, **fields):
  data = _data(path, **fields)
  return rows_lib.load_rows(kind, data, image_size=4, seed=seed, tally=tally)


def _shades(rows):
  return [int(row.images[0][0, 0, 0]) for row in rows]


def _write(path, rows, schema=None, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **options)


# ---------------------------------------------------------------- as others write them


def test_images_as_the_package_datasets_writes_them(tmp_path):
  rows = _rows()
  (tmp_path / "beside").mkdir()
  (tmp_path / "beside" / "x.png").write_bytes(_file(77))
  outside = tmp_path.parent / "outside.png"
  outside.write_bytes(_file(1))
  for row in rows:
    for column in ("jpg_0", "jpg_1"):
      row[column] = {"bytes": row[column], "path": None}
  rows[2]["jpg_0"] = {"bytes": None, "path": "beside/x.png"}
  rows[3]["jpg_0"] = {"bytes": None, "path": "../outside.png"}
  rows[4]["jpg_0"] = {"bytes": None, "path": None}
  rows[5]["jpg_0"] = None
  image = {"_type": "Image"}
  text, number = {"dtype": "string", "_type": "Value"}, {"dtype": "float64", "_type": "Value"}
  struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
  kinds = {"caption": (pa.string(), text), "jpg_0": (struct, image), "jpg_1": (struct, image)}
  kinds |= {
    f"{name}_{k}": (pa.float64(), number) for name in ("label", "score") for k in (0, 1)
  }
  kinds |= {f"image_{k}_uid": (pa.string(), text) for k in (0, 1)}
  features = {name: feature for name, (_, feature) in kinds.items()}
  described = {"huggingface": json.dumps({"info": {"features": features}})}
  schema = pa.schema([(name, kind) for name, (kind, _) in kinds.items()], metadata=described)
  _write(tmp_path / "train-00000-of-00001.parquet", rows, schema)
  tally = bad_rows.Tally()
  found = _load(tmp_path, tally=tally)
  assert _shades(found) == [0, 1, 77, *range(6, 16)]
  assert tally.left_out == {
    "jpg_0 is null": 2,
    "jpg_0 is a path that leads out of the folder": 1,
  }
  best = _load(tmp_path, "experts", num_experts=3)
  assert _shades(best) == [15, 14, 13]


@pytest.mark.parametrize(
  ("column", "kind"),
  [
    ("jpg_0", pa.large_binary()),
    ("jpg_0", pa.dictionary(pa.int32(), pa.binary())),
    ("caption", pa.large_string()),
    ("caption", pa.binary()),
    ("caption", pa.dictionary(pa.int8(), pa.string())),
    ("label_0", pa.int8()),
    ("label_0", pa.bool_()),
    ("label_0", pa.decimal128(5, 2)),
    ("label_0", pa.float16()),
  ],
)
def test_columns_of_other_types_with_the_same_meaning(tmp_path, column, kind):
  _write(tmp_path / "plain" / "a.parquet", _rows(3))
  table = pa.Table.from_pylist(_rows(3))
  values = table[column].to_pylist()
  if pa.types.is_boolean(kind):
    values = [bool(v) for v in values]
  if pa.types.is_integer(kind):
    values = [int(v) for v in values]
  if pa.types.is_decimal(kind):
    values = [decimal.Decimal(v) for v in values]
  if pa.types.is_float16(kind):
    values = [np.float16(v) for v in values]
  if kind == pa.binary():
    values = [v.encode() for v in values]
  if pa.types.is_dictionary(kind):
    array = pa.array(values, kind.value_type).dictionary_encode()
  else:
    array = pa.array(values, kind)
  table = table.set_column(table.schema.get_field_index(column), column, array)
  (tmp_path / "other").mkdir()
  pq.write_table(table, tmp_path / "other" / "a.parquet")
  one, other = (row_set.fingerprint(_load(tmp_path / d)) for d in ("plain", "other"))
  assert one == other


@pytest.mark.parametrize("column", ["caption", "jpg_0", "label_1"])
@pytest.mark.parametrize(
  "values",
  [
    [None, None],
    [["x"], ["y"]],
    [{"a": 1}, {"a": 2}],
    pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int8())),
    pa.array([1, 2], pa.timestamp("s")),
    pa.array([1, 2], pa.time32("s")),
  ],
)
def test_columns_of_other_types_are_refused_with_file_column_and_type(tmp_path, column, values):
  table = pa.Table.from_pylist(_rows(2))
  array = values if isinstance(values, pa.Array) else pa.array(values)
  table = table.set_column(table.schema.get_field_index(column), column, array)
  pq.write_table(table, tmp_path / "a.parquet")
  with pytest.raises(UserError, match=rf"a.parquet: column {column} must be .* \(got \w+"):
    _load(tmp_path)
  if column == "label_1":  # which experts do not use
    assert len(_load(tmp_path, "experts")) == 4


def test_files_that_differ_are_named(tmp_path):
  _write(tmp_path / "a.parquet", _rows(2))
  _write(
    tmp_path / "b.parquet", [{k: v for k, v in r.items() if k != "score_1"} for r in _rows(2)]
  )
  assert len(_load(tmp_path)) == 4
  with pytest.raises(UserError, match=r"b.parquet lacks score_1, which .*a.parquet has"):
    _load(tmp_path, "experts")


def test_captions_alone_take_no_other_column(tmp_path):
  _write(tmp_path / "a.parquet", [{"caption": "one"}, {"caption": "two"}, {"caption": "one"}])
  assert [r.caption for r in _load(tmp_path, "captions")] == ["one", "two"]


# ------------------------------------------------------------------------ rows of no use

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
BAD = {
  "null caption": ({"caption": None}, "caption is null"),
  "empty caption": ({"caption": " "}, "empty caption"),
  "long caption": ({"caption": "x" * 100_001}, "caption of more than 100000 bytes"),
  "null label": ({"label_1": None}, "label_1 is null"),
  "NaN label": ({"label_0": math.nan}, "label_0 is not finite"),
  "infinite label": ({"label_0": math.inf}, "label_0 is not finite"),
  "null image": ({"jpg_1": None}, "jpg_1 is null"),
  "empty image": ({"jpg_1": b""}, "not an image"),
  "truncated image": ({"jpg_1": _file(0, "JPEG")[:-300]}, "damaged image"),
  "postscript": ({"jpg_1": EPS}, "EPS is not read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_rows_of_no_use_are_left_out_counted_and_named(tmp_path, caplog, kind):
  change, reason = BAD[kind]
  rows = _rows()
  if kind == "truncated image":
    photo = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG")
    change = {"jpg_1": file.getvalue()[:-300]}
  rows[11] |= change
  _write(tmp_path / "a.parquet", rows[:8])
  _write(tmp_path / "b.parquet", rows[8:], row_group_size=2)
  tally = bad_rows.Tally()
  found = _load(tmp_path, tally=tally)
  assert [r.caption for r in found] == [f"c{i:02d}" for i in range(16) if i != 11]
  assert tally.left_out == {reason: 1}
  (record,) = caplog.records
  assert f"1 row cannot be used: b.parquet row 3 ({reason}" in record.getMessage()
  # Fewer than all: the next good row stands in for a bad one.
  assert len(_load(tmp_path, num_rows=15)) == 15
  with pytest.raises(UserError, match="the data has 15 pairs: data.num_rows = 16 asks for"):
    _load(tmp_path, num_rows=16)


def test_a_caption_that_is_not_utf8_spoils_its_own_row_alone(tmp_path):
  rows = _rows()
  table = pa.Table.from_pylist(rows)
  texts = [r["caption"].encode() for r in rows]
  texts[5] = b"caf\xe9"
  offsets = np.cumsum([0, *map(len, texts)]).astype(np.int32)
  buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(texts))]
  column = pa.Array.from_buffers(pa.string(), len(texts), buffers)
  table = table.set_column(table.schema.get_field_index("caption"), "caption", column)
  pq.write_table(table, tmp_path / "a.parquet")
  tally = bad_rows.Tally()
  assert len(_load(tmp_path, tally=tally)) == 15
  assert tally.left_out == {"caption is not UTF-8": 1}


def test_ties_are_not_bad_rows(tmp_path, caplog):
  rows = _rows()
  for row in rows[:12]:
    row["label_0"] = row["label_1"] = 0.5
  _write(tmp_path / "a.parquet", rows)
  tally = bad_rows.Tally(max_share=0.0)
  assert len(_load(tmp_path, tally=tally)) == 4
  assert tally.facts() == {"left_out": {}, "ties": 12, "read": []}
  assert tally.words() == {"rows left out": "none", "ties left out": "12"}
  assert not caplog.records


def test_too_many_bad_rows_stop_the_run(tmp_path):
  rows = _rows()
  for row in rows[:5]:
    row["label_0"] = math.nan
  _write(tmp_path / "a.parquet", rows)
  with pytest.raises(UserError) as error:
    _load(tmp_path)
  assert str(error.value) == (
    "5 of 16 rows of the data cannot be used (5 label_0 is not finite), first a.parquet row 0 "
    "(label_0 is not finite): more than data.max_bad_share = 0.25 allows"
  )
  assert len(_load(tmp_path, max_bad_share=0.4)) == 11
  # Nor are many rows of a large file tried one after another.
  with pytest.raises(UserError, match="2 of 4 rows"):
    bad_rows.take(range(1000), _even, bad_rows.Tally(0.25), where=str, limit=4)


def _even(i):
  if i % 2:
    raise bad_rows.BadRow("odd")
  return i


# ---------------------------------------------------------------------------- damage


def test_flipped_bytes_are_one_line_or_change_nothing(tmp_path):
  path = tmp_path / "a.parquet"
  _write(path, _rows(6), write_page_checksum=True, compression="none")
  whole, before = path.read_bytes(), row_set.fingerprint(_load(path))
  rng = np.random.default_rng(0)
  refused = 0
  for place in rng.integers(0, len(whole), 150):
    damaged = bytearray(whole)
    damaged[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(damaged)
    try:
      assert row_set.fingerprint(_load(path)) == before
    except UserError as error:
      assert "a.parquet" in str(error) and "\n" not in str(error) and len(str(error)) < 400
      refused += 1
  assert refused > 50


def test_cut_files_are_named(tmp_path):
  path = tmp_path / "a.parquet"
  _write(path, _rows(3))
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(UserError, match=r"a.parquet cannot be read as parquet"):
    _load(path)


# ---------------------------------------------------------------------------- splits


def _write_split(path, name, first, count=4):
  rows = _rows(16)[first : first + count]
  _write(path / name, rows)
  return [r["caption"] for r in rows]


@pytest.mark.parametrize("where", ["", "data/"])
def test_of_splits_side_by_side_train_is_taken(tmp_path, where, caplog):
  test = _write_split(tmp_path, f"{where}test-00000-of-00001-abc.parquet", 0)
  unique = _write_split(tmp_path, f"{where}test_unique-00000-of-00001-abc.parquet", 4)
  train = _write_split(tmp_path, f"{where}train-00000-of-00002-abc.parquet", 8)
  train += _write_split(tmp_path, f"{where}train-00001-of-00002-abc.parquet", 12)
  captions = lambda **fields: [r.caption for r in _load(tmp_path, **fields)]  # noqa: E731
  tally = bad_rows.Tally()
  assert captions(tally=tally) == train
  said = "2 of 4 files, those of data.split=train (not test, test_unique)"
  assert tally.read == [said] and said in caplog.text
  assert tally.words()["data read"] == said
  assert captions(split="test") == test
  assert captions(split="test_unique") == unique
  assert captions(split="all") == test + unique + train
  with pytest.raises(
    UserError, match="'valid'; data.split must be one of test, test_unique, train, all"
  ):
    captions(split="valid")


def test_files_without_splits_are_all_taken(tmp_path, caplog):
  every = _write_split(tmp_path, "part-00000-of-00002.parquet", 0)
  every += _write_split(tmp_path, "part-00001-of-00002.parquet", 4)
  assert [r.caption for r in _load(tmp_path)] == every
  # Nor is there a choice where one split alone was downloaded.
  one = _write_split(tmp_path / "x", "test-00000-of-00001.parquet", 0)
  assert [r.caption for r in _load(tmp_path / "x")] == one
  (record,) = caplog.records
  assert record.getMessage().endswith("all files are of test, none is of data.split=train")


@pytest.mark.parametrize(
  ("train", "test"),
  [
    ("data.parquet", "test.parquet"),
    ("split=train/0.parquet", "split=test/0.parquet"),
    ("pickapic_train.parquet", "pickapic_test.parquet"),
    ("my-train.parquet", "my-test.parquet"),
  ],
)
def test_rows_of_other_splits_are_not_trained_on(tmp_path, caplog, train, test):
  mine = _write_split(tmp_path, train, 0)
  other = _write_split(tmp_path, test, 4)
  assert [r.caption for r in _load(tmp_path)] == mine
  assert "1 of 2 files, those of data.split=train (not test)" in caplog.text
  assert [r.caption for r in _load(tmp_path, split="test")] == other


@pytest.mark.parametrize(
  ("name", "split"),
  [
    ("train-00000-of-00010.parquet", "train"),
    ("train_prefs-00000-of-00010-0a1b.parquet", "train_prefs"),
    ("set-test.parquet-00000-of-00001", "test"),
    ("my-train.parquet", "train"),
    ("pickapic_test.parquet", "test"),
    ("split=validation/0.parquet", "validation"),
    ("partial-train/0000.parquet", "train"),
    ("steam-train/0000.parquet", ""),
    ("set-test-00000-of-00001.parquet", "test"),
    ("train.parquet", "train"),
    ("train_0.parquet", "train"),
    ("val-3.parquet", "validation"),
    ("validation_unique.parquet", "validation_unique"),
    ("Training.parquet", "train"),
    ("train/0000.parquet", "train"),
    ("default/test/0000.parquet", "test"),
    ("trains/0000.parquet", ""),
    ("test shots/0000.parquet", ""),
    ("training_set.parquet", "train"),
    ("0000.parquet", ""),
    ("devices.parquet", ""),
  ],
)
def test_splits_by_name(name, split):
  assert splits.split_of(name) == split


def test_fewer_rows_are_a_sample_by_the_seed(tmp_path):
  rows = [r | {"caption": f"{i:03d}"} for i, r in enumerate(_rows(4) * 50)]
  _write(tmp_path / "a.parquet", rows, row_group_size=7)
  captions = lambda seed, **f: [r.caption for r in _load(tmp_path, seed=seed, **f)]  # noqa: E731
  found = captions(0, num_rows=20)
  assert found == captions(0, num_rows=20) == sorted(found)
  assert found != captions(1, num_rows=20)
  # As numpy gives it on any machine; its mean and that of the first 20 are far apart.
  assert found[:4] == ["014", "015", "023", "046"]
  assert 60 < np.mean([int(c) for c in found]) < 140
  assert len(captions(0)) == 200
  winners = {"kind": "experts", "experts": "winners", "num_experts": 20}
  assert captions(0, **winners) == found
  assert captions(0, kind="captions", num_experts=20) == found


# ------------------------------------------------------------------- one decoder for all


def _exif():
  exif = Image.Exif()
  exif[0x0112] = 6
  return exif


PIXELS = np.random.default_rng(0).integers(0, 255, (40, 64, 3), np.uint8)
IMAGES = {
  "turned": (Image.fromarray(PIXELS), "JPEG", {"exif": _exif()}),
  "large": (Image.fromarray(np.kron(PIXELS, np.ones((8, 8, 1), np.uint8))), "JPEG", {}),
  "transparent": (Image.fromarray(np.dstack([PIXELS, PIXELS[..., :1]])), "PNG", {}),
  "deep": (Image.fromarray(np.full((40, 64), 255, np.uint16)), "PNG", {}),
  "palette": (Image.fromarray(PIXELS).quantize(8), "GIF", {}),
  "cmyk": (Image.fromarray(PIXELS).convert("CMYK"), "JPEG", {}),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_the_same_in_a_parquet_file_and_in_a_folder(tmp_path, name):
  image, kind, options = IMAGES[name]
  file = io.BytesIO()
  image.save(file, kind, **options)
  row = _rows(1)[0] | {"jpg_0": file.getvalue()}
  _write(tmp_path / "a.parquet", [row])
  (tmp_path / "x.img.png").write_bytes(file.getvalue())
  (tmp_path / "x.img.txt").write_text("x")
  (example,) = folder.load_folder(tmp_path, image_size=16)
  source = pickapic.open_pickapic(str(tmp_path / "a.parquet"))
  (pair,) = rows_lib.from_pairs(source, image_size=16)
  np.testing.assert_array_equal(pair.images[0], example.image)
  best = rows_lib.top_k.top_k(source, 1, image_size=16)
  np.testing.assert_array_equal(best[0].image, example.image)


def test_exif_is_applied_as_pillow_does(tmp_path):
  from PIL import ImageOps

  file = io.BytesIO()
  Image.fromarray(PIXELS).save(file, "PNG", exif=_exif())
  want = np.asarray(ImageOps.exif_transpose(Image.open(file)))
  np.testing.assert_array_equal(images.decode(file.getvalue()), want)


def test_flipped_bits_of_a_png_are_refused():
  file = io.BytesIO()
  Image.fromarray(PIXELS).save(file, "PNG", compress_level=0)  # whose pixels lie bare
  whole = file.getvalue()
  rng = np.random.default_rng(0)
  for place in rng.integers(8, len(whole), 200):
    damaged = bytearray(whole)
    damaged[place] ^= 1 << int(rng.integers(8))
    with pytest.raises(bad_rows.BadRow):
      images.decode(bytes(damaged))


def test_sizes_have_limits(tmp_path, monkeypatch):
  monkeypatch.setattr(images, "MAX_PIXELS", 64 * 40)
  for kind in ("PNG", "WEBP"):
    file = io.BytesIO()
    Image.new("RGB", (80, 40)).save(file, kind)
    with pytest.raises(bad_rows.BadRow, match="too many pixels: 80 x 40, more than 2560"):
      images.decode(file.getvalue(), 16)
  file = io.BytesIO()
  Image.new("RGB", (512, 320)).save(file, "JPEG")
  assert images.decode(file.getvalue(), 16).shape == (16, 16, 3)  # decoded at an eighth
