"""Rows of built data sets: as those of their source; crops, sizes and buckets."""

import functools
import itertools

import jax
import numpy as np
import pytest
import runs
from built_sets import built, prepare
from PIL import Image

from jaxpref import base_config, sharding
from jaxpref.data import (
  buckets,
  built_rows,
  crops,
  encode,
  images,
  loader,
  row_set,
  sources,
)
from jaxpref.data import rows as rows_lib
from jaxpref.training import batch_maker, inputs

CASES = (
  *(("pairs", "pairs", {"num_rows": n}) for n in (0, 9, 30)),
  *(("pairs", "singles", {"num_rows": n}) for n in (0, 9)),
  *(("pairs", "experts", {"num_experts": n, "experts": "top"}) for n in (0, 3, 10)),
  *(("pairs", "experts", {"num_experts": n, "experts": "winners"}) for n in (0, 5)),
  # As in SPIN, whose generated pairs have a change.
  ("pairs", "experts", {"num_experts": 5, "experts": "winners", "min_change": 0.05}),
  *(("pairs", "captions", {"num_experts": n}) for n in (0, 3)),
  *(("lists", "lists", {"num_rows": n, "list_size": 3}) for n in (0, 6)),
  ("lists", "captions", {"num_experts": 4}),
  *(("singles", "singles", {"num_rows": n}) for n in (0, 8)),
  *(("singles", "experts", {"num_experts": n}) for n in (0, 4)),
)


def test_every_kind_of_rows_is_that_of_the_source(tmp_path):
  """The rules for tables in memory and for the index of a built set are the same."""
  sets = {t: built("random_rows", t, tmp_path / t) for t in ("pairs", "lists", "singles")}
  for (table, kind, fields), seed in itertools.product(CASES, (0, 1)):
    data = base_config.base("x", "tiny").data
    data.update({"num_rows": 0, "num_experts": 0, "max_bad_share": 1.0} | fields)
    # Each table by itself, as a built set has only one.
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(sources, "tables_of", lambda *_, t=table: (t,))
      data.source = "random_rows"
      tally = rows_lib.make_tally(data)
      theirs = rows_lib.load_rows(kind, data, image_size=16, seed=seed, tally=tally)
    data.update({"source": "shapes", "path": str(sets[table])})
    ours_tally = rows_lib.make_tally(data)
    ours = rows_lib.load_rows(kind, data, image_size=16, seed=seed, tally=ours_tally)
    case = (table, kind, fields, seed)
    assert len(ours) == len(theirs) > 0, case
    assert row_set.fingerprint(ours) == row_set.fingerprint(theirs), case
    assert list(ours.used_captions()) == list(theirs.used_captions()), case
    assert ours_tally.ties == tally.ties, case
    assert ours_tally.left_out == tally.left_out, case


def test_a_selection_has_a_digest_of_its_own(tmp_path):
  data = base_config.base("x", "tiny").data
  data.update({"num_rows": 5, "path": str(built("random_rows", "pairs", tmp_path / "set"))})
  digests = [rows_lib.load_rows("pairs", data, image_size=16, seed=s).digest for s in (0, 0, 1)]
  assert digests[0] == digests[1] != digests[2]
  (tmp_path / "set").rename(tmp_path / "moved")
  data.path = str(tmp_path / "moved")
  assert rows_lib.load_rows("pairs", data, image_size=16, seed=0).digest == digests[0]


def _stored(tmp_path, crop="center", size=16):
  path = built("random_rows", "pairs", tmp_path / "set")
  data = base_config.base("x", "tiny").data
  data.update({"num_rows": 0, "path": str(path), "crop": crop})
  return rows_lib.load_rows("pairs", data, image_size=size, seed=0)


def test_where_images_are_cropped(tmp_path):
  rows = _stored(tmp_path)  # 16 pixels wide and 20 high
  stored = rows.images
  whole = images.decode(stored.table[0]["jpg_0"])
  assert whole.shape == (20, 16, 3)
  number = int(stored.table.row_index.column("image_0")[0])
  for place, top in ((0.0, 0), (0.5, 2), (1.0, 4)):
    np.testing.assert_array_equal(stored.read(number, place), whole[top : top + 16])
  squeezed = Image.fromarray(whole).resize((16, 16), Image.Resampling.LANCZOS)
  np.testing.assert_array_equal(stored.read(number, None), np.asarray(squeezed))
  np.testing.assert_array_equal(stored[number], whole[2:18])
  none = built_rows.StoredImages(stored.table, (16, 16), "none")
  np.testing.assert_array_equal(none[number], np.asarray(squeezed))


def test_random_crops_are_new_at_each_visit(tiny_pipeline, tmp_path):
  path = built("random_rows", "pairs", tmp_path / "set")
  fields = {"data.crop": "random", "data.flip": True, "seed": 3}
  prepared = prepare(tiny_pipeline, path, **fields)
  opened = inputs.open_rows(prepared)
  assert opened.where == "ahead"
  make, rows = batch_maker.BatchMaker(prepared, opened), prepared.rows
  count, size = 2 * len(rows), prepared.pipeline.image_size
  seen = set()
  for update in range(3):
    index = np.array([1, len(rows) + 1, 2, 1])
    taken, batch = make(update, index)
    again, same = make(update, index)
    np.testing.assert_array_equal(taken.index, again.index)
    jax.tree.map(np.testing.assert_array_equal, batch, same)
    np.testing.assert_array_equal(taken.index % count, index)
    for i, found in zip(taken.index, np.asarray(batch["images"]), strict=True):
      row, place = i % count, (i // count) / 63
      seen.add(place)
      for arm in (0, 1):
        number = rows.image[row % len(rows), arm]
        wanted = rows.images.read(int(number), place)
        wanted = wanted[:, ::-1] if row >= len(rows) else wanted
        np.testing.assert_array_equal(found[arm], wanted)
  assert len(seen) > 6 and 0 <= min(seen) < max(seen) <= 1
  assert batch["images"].shape[2:4] == (size, size)


def test_sizes_are_those_of_the_first_image(tmp_path):
  """As diffusers' trainers of SDXL count them: the crop's corner in the resized image."""
  rows = _stored(tmp_path, size=32)
  found = crops.TimeIds(rows.images, rows.image, mirrored=0)[np.array([0, 5])]
  np.testing.assert_array_equal(found, [[20, 16, 4, 0, 32, 32]] * 2)  # resized to 40 x 32
  squeezed = built_rows.StoredImages(rows.images.table, (32, 32), "none")
  found = crops.TimeIds(squeezed, rows.image, mirrored=0)[np.array([0])]
  np.testing.assert_array_equal(found, [[20, 16, 0, 0, 32, 32]])
  moving = built_rows.StoredImages(rows.images.table, (32, 32), "random")
  found = crops.TimeIds(moving, rows.image, mirrored=0)[np.array([0, 63]) * len(rows)]
  np.testing.assert_array_equal(found, [[20, 16, 0, 0, 32, 32], [20, 16, 8, 0, 32, 32]])


@pytest.fixture
def of_shapes(tmp_path):
  return built("shaped_rows", "pairs", tmp_path / "set")


def test_shapes_of_buckets():
  shapes = buckets.shapes_of(1024, 64)
  found = {tuple(shape) for shape in shapes.tolist()}
  # Of SDXL's own list (arXiv 2307.01952, appendix I).
  assert {(1024, 1024), (1152, 896), (896, 1152), (832, 1216), (768, 1344)} <= found
  assert (shapes % 64 == 0).all() and (shapes.prod(axis=1) <= 1024**2).all()
  assert (shapes.prod(axis=1) > 0.8 * 1024**2).all()
  ratio = shapes[:, 0] / shapes[:, 1]
  assert ratio.min() >= 0.5 and ratio.max() <= 2
  sizes = np.array([[512, 512], [900, 1600], [1600, 900], [3000, 100]])
  chosen = shapes[buckets.assign(sizes, shapes, least=1)]
  assert chosen[0].tolist() == [1024, 1024] and chosen[3].tolist() == shapes[-1].tolist()
  assert chosen[1].tolist() == chosen[2][::-1].tolist() == [768, 1344]
  # A bucket with fewer images than a batch is not used.
  sizes = np.array([[512, 512]] * 5 + [[900, 1600]])
  assert len(set(buckets.assign(sizes, shapes, least=2).tolist())) == 1
  assert len(set(buckets.assign(sizes[:1], shapes, least=2).tolist())) == 1


def test_batches_of_buckets():
  """Each is of one bucket; an epoch has no row twice, and leaves out others each time."""
  sizes, batch = (10, 3, 25), 4
  make = functools.partial(loader.make_bucket_loader, sizes, batch_size=batch, seed=5)
  batches = make()
  starts = np.cumsum([0, *sizes])
  per_epoch = 10 // 4 + 25 // 4
  orders, left_out = [], set()
  for _ in range(6):
    epoch = [next(batches) for _ in range(per_epoch)]
    of = [np.searchsorted(starts, index, side="right") - 1 for index in epoch]
    assert all(len(set(b.tolist())) == 1 for b in of)
    rows = np.concatenate(epoch)
    assert len(set(rows.tolist())) == len(rows) == per_epoch * batch
    orders.append([int(b[0]) for b in of])
    left_out |= set(range(starts[0], starts[1])) - set(rows.tolist())
  assert {tuple(sorted(order)) for order in orders} == {(0,) * 2 + (2,) * 6}
  assert len({tuple(order) for order in orders}) > 1 and len(left_out) > 4
  state, wanted = batches.get_state(), [next(batches).tolist() for _ in range(9)]
  ahead = make(read=lambda i, index: (i, index.tolist()), ahead=3)
  ahead.set_state(state)
  assert [next(ahead) for _ in range(9)] == list(enumerate(wanted, 6 * per_epoch))
  with pytest.raises(ValueError, match="no bucket has 4 rows"):
    loader.make_bucket_loader((3, 2), batch_size=4, seed=0)


@pytest.mark.long
def test_buckets_are_encoded_equally_wherever(of_shapes, tiny_pipeline):
  found = {}
  for where in ("memory", "ahead", "disk"):
    fields = {"data.buckets": True, "data.cache": where, "data.flip": True}
    prepared = prepare(tiny_pipeline, of_shapes, **fields, **{"train.batch_size": 4})
    opened = inputs.open_rows(prepared)
    found[where] = []
    for part in opened.parts:
      index = np.arange(inputs.part_length(part))
      batch = opened.encode(sharding.place_batch(part.rows, prepared.mesh, index))
      found[where].append(jax.device_get(batch))
  factor = prepared.pipeline.vae_factor
  shapes = sorted(tuple(factor * n for n in of["latents"].shape[3:]) for of in found["memory"])
  assert len(shapes) == 3 and sum(len(of["latents"]) for of in found["memory"]) == 68
  assert (
    shapes[0][0] < shapes[0][1]
    and shapes[1][0] == shapes[1][1]
    and shapes[2] == shapes[0][::-1]
  )
  compare = functools.partial(np.testing.assert_allclose, atol=1e-5)
  for where, rtol in (("ahead", 1e-5), ("disk", 2**-9)):
    jax.tree.map(functools.partial(compare, rtol=rtol), found[where], found["memory"])
  # By hand: an image of the first bucket.
  part, encoded = opened.parts[0], found["memory"][0]
  row = part.row_set[2]
  stored = part.row_set.images
  number = int(np.flatnonzero(prepared.rows.caption == part.row_set.caption[2])[0])
  content = stored.table[number]
  image = images.decode(content["jpg_0"], stored.size)
  np.testing.assert_array_equal(row.images[0], image)
  alone = encode.encode_images(prepared.pipeline, prepared.mesh, [image])
  np.testing.assert_allclose(encoded["latents"][2, 0], alone[0], atol=1e-5)


@pytest.mark.long
def test_a_run_on_buckets(of_shapes, tiny_pipeline, tmp_path, capsys):
  """One program a bucket, also for rollouts; it resumes to the same bits."""
  fields = {"data.path": of_shapes, "data.buckets": True, "data.num_rows": 0}
  fields |= {"data.num_experts": 0, "data.experts": "winners", "evaluate.num_prompts": 1}
  whole, _ = runs.check_resumed(tiny_pipeline, tmp_path, "dro", updates=(4, 6), **fields)
  assert capsys.readouterr().out.count("rows by width and height: ") == 2
  assert all(np.isfinite(line["loss"]) for line in runs.lines(whole))
