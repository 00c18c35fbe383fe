"""Training on generated pairs, SPIN and iterative DPO, interrupted or not."""

import json
import shutil

import families
import jax
import numpy as np
import pytest
from conftest import ROOT, start_cluster
from ml_collections import ConfigDict
from PIL import Image
from runs import parameters
from safetensors.numpy import load_file

from jaxpref import config as config_lib
from jaxpref import export, generate, losses, main, sharding
from jaxpref.data import encode, generated_pairs, images, row_set
from jaxpref.data import rows as rows_lib
from jaxpref.errors import UserError
from jaxpref.evaluation import evaluate, glossary
from jaxpref.evaluation import sampling as sampling_lib
from jaxpref.models import pipeline, save
from jaxpref.runtime import checkpoint
from jaxpref.training import batch as batch_lib
from jaxpref.training import iterate, load_run, train
from jaxpref.training import setup as setup_lib


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tfds_dir):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))


@pytest.fixture(scope="module")
def improver(tiny_pipeline, tmp_path_factory):
  return families.write_improver(
    tiny_pipeline, tmp_path_factory.mktemp("improver") / "pipeline"
  )


def arguments(base, improver, workdir, method="iterative_dpo", **fields):
  # Random weights generate nearly the same image for every prompt.
  given = {"data.min_change": 0, "evaluate.num_prompts": 3}
  # Steps as long as gradients: Adam's, of one length, would take rounding's sign for theirs
  # where they are near nothing.
  given |= {"optim.lr": 0.1, "optim.eps": 1.0}
  given["model.path"] = base
  if method == "iterative_dpo":
    given["iterate.improver"] = improver
  flags = [f"--config.{name}={value}" for name, value in (given | fields).items()]
  return [f"--config=configs/{method}.py:tiny", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def finished(tiny_pipeline, improver, tmp_path_factory, tfds_dir):
  """An uninterrupted run of iterative DPO: two iterations of 12 pairs and 4 updates."""
  workdir = tmp_path_factory.mktemp("runs") / "iterative"
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)
    patch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    assert main.main(arguments(tiny_pipeline, improver, workdir)) == 0
  return workdir


def lines_of(workdir, k):
  text = (workdir / "iterations" / str(k) / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def apart(line):
  return abs(line["err/policy_w"] - line["err/reference_w"])


@pytest.mark.long  # test_spin has the same loop, with winners from the data
def test_what_an_iterative_run_leaves(finished):
  assert sorted(p.name for p in finished.iterdir() if p.name[0] != ".") == [
    *("config.json", "inputs.json", "iterations", "metrics.jsonl", "pairs", "report.html"),
    "starts.json",
  ]
  text = (finished / "metrics.jsonl").read_text()
  for k, line in enumerate(map(json.loads, text.splitlines()), 1):
    assert line["step"] == k and line["pairs/trained_on"] == line["pairs/pairs"] == 12
    for phase in ("generate", "improve", "write", "train"):
      assert line[f"time/{phase}_seconds"] > 0
    assert not [m for m in line if m not in ("step", "time") and not glossary.find_metric(m)]
  for k in (1, 2):
    assert len(lines_of(finished, k)) == 4
    results = finished / "iterations" / str(k) / "evaluation" / "4" / evaluate.RESULTS
    assert json.loads(results.read_text())["shapes.quality-2"]["tuned"]["n"] == 3
  # The reference is the base throughout: the second iteration begins away from it.
  assert apart(lines_of(finished, 1)[0]) < 1e-6 < apart(lines_of(finished, 2)[0])
  html = (finished / "report.html").read_text()
  assert "Pairs of the last iteration" in html and html.count("winner:") == 12
  assert '<h2 id="iterations">' in html and "12 of 12" in html
  # The model of the first iteration generates the pairs of the second.
  first = load_run.load(str(finished / "iterations" / "1"))
  rows = generated_pairs.open_pairs(finished / "pairs" / "2")
  assert {row["model_1"].decode() for row in rows} == {first.digest}


@pytest.mark.long
def test_two_processes_end_where_one_does(finished, tiny_pipeline, improver, tmp_path):
  workdir, log = tmp_path / "run", tmp_path / "log"
  flags = arguments(tiny_pipeline, improver, workdir)
  assert start_cluster(2, 2, flags, log).wait(600) == 0, log.read_text()[-2000:]
  for k in (1, 2):
    ours, theirs = (
      [d["change"] for d in generated_pairs.open_pairs(at / "pairs" / str(k))]
      for at in (workdir, finished)
    )
    np.testing.assert_allclose(ours, theirs, rtol=0.02)
    for one, other in zip(lines_of(workdir, k), lines_of(finished, k), strict=True):
      assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
  last = "iterations/2"
  ours, theirs = (parameters(at / last)[1] for at in (workdir, finished))
  paths = [path for path in theirs if path.startswith("/params/")]
  apart = np.concatenate([np.abs(ours[path] - theirs[path]).ravel() for path in paths])
  assert apart.max() < 1e-4


@pytest.mark.long
def test_its_model_is_that_of_the_last_iteration(finished, tmp_path):
  last = load_run.load(str(finished / "iterations" / "2"))
  whole = load_run.load(str(finished))
  jax.tree.map(np.testing.assert_array_equal, whole.params, last.params)
  flags = [f"--workdir={finished}", f"--out={tmp_path / 'x'}", "--dtype=float32"]
  assert export.main(flags) == 0
  draw = [f"--model={finished}", "--prompts=a ring", "--steps=2", f"--out={tmp_path / 'y'}"]
  assert generate.main(draw) == 0


@pytest.mark.long
def test_pairs_are_what_policy_and_improver_draw(finished, tiny_pipeline, improver):
  """Generates the pairs again from the fields of their rows; training reads these pairs."""
  mesh = sharding.make_mesh()
  base, better = (pipeline.load_pipeline(str(p)) for p in (tiny_pipeline, improver))
  source = generated_pairs.open_pairs(finished / "pairs" / "1")
  assert len(source) == 12
  rows = [source[i] for i in range(len(source))]
  captions = [row["caption"].decode() for row in rows]
  options = {"num_steps": rows[0]["num_steps"], "batch_size": 12}
  draw = sampling_lib.make_generator(base, mesh, guidance=rows[0]["guidance"], **options)
  cond = encode.encode_prompts(base, mesh, captions)
  losers = draw(base.params["unet"], cond, [row["seed_1"] for row in rows])
  improve = sampling_lib.make_generator(
    *(better, mesh),
    guidance=rows[0]["text_guidance"],
    image_guidance=rows[0]["image_guidance"],
    **options,
  )
  latents = encode.encode_images(base, mesh, list(losers))
  winners = improve(
    better.params["unet"], {**cond, "image": latents}, [row["seed_0"] for row in rows]
  )
  for row, winner, loser in zip(rows, winners, losers, strict=True):
    stored = [images.decode(row[f"jpg_{k}"]).astype(int) for k in (0, 1)]
    assert np.abs(stored[0] - winner).max() <= 1 and np.abs(stored[1] - loser).max() <= 1
    assert (row["label_0"], row["label_1"]) == (1.0, 0.0)
  change = np.sqrt(
    np.mean((encode.encode_images(base, mesh, list(winners)) - latents) ** 2, axis=(1, 2, 3))
  )
  np.testing.assert_allclose([row["change"] for row in rows], change, rtol=2e-2)
  # All images differ: no two losers are equal, and no loser equals its winner.
  assert len({row["jpg_1"] for row in rows} | {row["jpg_0"] for row in rows}) == 24
  inner = json.loads((finished / "iterations" / "1" / "config.json").read_text())
  assert inner["data"]["path"] == str(finished / "pairs" / "1")
  config, _ = config_lib.parse_args(
    [
      *("--config=configs/dpo.py:tiny", "--config.data.source=online"),
      *(f"--config.data.path={finished / 'pairs' / '1'}", "--config.data.num_rows=0"),
    ],
    flags={},
  )
  trained_on = rows_lib.load_rows("pairs", config.data, image_size=16, seed=0)
  assert [row.caption for row in trained_on] == captions
  for row, got in zip(rows, trained_on, strict=True):
    for k in (0, 1):
      np.testing.assert_array_equal(got.images[k], images.decode(row[f"jpg_{k}"]))
  # A batch of them, as a step takes it: winner first, one noise and timestep for both.
  batch = jax.tree.map(
    lambda x: x[np.arange(len(rows))],
    encode.encode_rows(base, mesh, row_set.collect(trained_on), flip=False),
  )
  pixels = [[images.decode(row[f"jpg_{k}"]) for row in rows] for k in (0, 1)]
  x0 = np.stack([encode.encode_images(base, mesh, of) for of in pixels], axis=1)
  empty = encode.encode_no_prompt(base, mesh)
  arms = batch_lib.make_arms(
    *(base.schedule, losses.load_loss("dpo").NEEDS, batch, None, empty),
    seed=7,
    update=3,
    prompt_dropout=0.0,
  )
  alpha_bar = np.asarray(base.schedule.alpha_bar)[np.asarray(arms.t)][:, None, None, None, None]
  assert base.schedule.prediction_type == "v_prediction"
  v = np.asarray(arms.target)
  eps = (v + np.sqrt(1 - alpha_bar) * x0) / np.sqrt(alpha_bar)
  np.testing.assert_allclose(eps[:, 0], eps[:, 1], atol=2e-2)  # the last have little x0
  by_hand = np.sqrt(alpha_bar) * x0 + np.sqrt(1 - alpha_bar) * eps
  np.testing.assert_allclose(arms.x_t, by_hand, atol=2e-2)
  np.testing.assert_allclose(arms.cond["text"], cond["text"], rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_stopped_anywhere_it_ends_the_same(
  finished, tiny_pipeline, improver, tmp_path, monkeypatch, capsys
):
  """Stops while it generates pairs, trains and evaluates, and resumes each time."""
  workdir = tmp_path / "run"
  given = arguments(tiny_pipeline, improver, workdir)

  def stop_after(module, name, calls):
    function, left = getattr(module, name), [calls]

    def call(*args, **kwargs):
      out = function(*args, **kwargs)
      left[0] -= 1
      if not left[0]:
        raise KeyboardInterrupt
      return out

    with monkeypatch.context() as patch:
      patch.setattr(module, name, call)
      assert main.main(given) == 130
    shards = workdir.glob("pairs/*/online*")
    return {p: p.stat().st_mtime_ns for p in shards}

  first = stop_after(generated_pairs, "write_shard", 1)  # of the two of the first iteration
  second = stop_after(checkpoint.Checkpointer, "save", 1)  # of two
  third = stop_after(evaluate, "evaluate", 1)
  assert not (workdir / "iterations" / "1" / "report.html").exists()
  fourth = stop_after(generated_pairs, "write_shard", 1)  # of the second iteration's
  assert [len(shards) for shards in (first, second, third, fourth)] == [1, 2, 2, 3]
  assert main.main(given) == 0
  for shards in (first, second, third, fourth):  # each was generated once
    assert {p: p.stat().st_mtime_ns for p in shards} == shards
  for k in ("1", "2"):
    ours, theirs = (parameters(w / "iterations" / k) for w in (workdir, finished))
    assert ours[0] == theirs[0] == 4
    for path, array in theirs[1].items():
      np.testing.assert_array_equal(ours[1][path], array, err_msg=path)
    # All columns, including the digest of the model that generated the pair.
    ours, theirs = (
      list(generated_pairs.open_pairs(w / "pairs" / k)) for w in (workdir, finished)
    )
    assert ours == theirs and len(ours) == 12


@pytest.mark.long
def test_a_finished_run_goes_on_with_more_iterations(
  finished, tiny_pipeline, improver, tmp_path, capsys
):
  workdir = shutil.copytree(finished, tmp_path / "moved")
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("checksums.json")}
  given = arguments(tiny_pipeline, improver, workdir, **{"iterate.num_iterations": 3})
  status, printed = main.main(given), capsys.readouterr().err
  assert status == 0, printed
  # The images of the base for the evaluations exist already.
  assert "images of the tuned model" in printed and "the base model" not in printed
  second, third = (
    {p.name: p.read_bytes() for p in workdir.glob(f"iterations/{k}/evaluation/4/images/base/*")}
    for k in (2, 3)
  )
  assert len(second) == 3 and second == third
  assert {p: p.stat().st_mtime_ns for p in before} == before
  assert len(lines_of(workdir, 3)) == 4
  # More updates of each would bend all iterations after the first.
  assert main.main([*given, "--config.train.num_updates=6"]) == 2
  assert "train.num_updates was 4, now 6" in capsys.readouterr().err
  fewer = arguments(tiny_pipeline, improver, workdir, **{"iterate.num_iterations": 1})
  assert main.main(fewer) == 2
  assert "already has iteration 2, more than" in capsys.readouterr().err
  # The same improver elsewhere is the same.
  elsewhere = shutil.copytree(improver, tmp_path / "elsewhere")
  assert main.main([*given, f"--config.iterate.improver={elsewhere}"]) == 0
  assert main.main(given) == 0
  # Pairs of another improver are not mixed with these.
  weights = improver / "unet" / "diffusion_pytorch_model.safetensors"
  ours = weights.read_bytes()
  try:
    tensors = load_file(weights)
    save.save_tensors(weights, tensors | {"conv_in.bias": tensors["conv_in.bias"] + 1})
    assert main.main(given) == 2
    assert "was begun with another improver" in capsys.readouterr().err
  finally:
    weights.write_bytes(ours)


@pytest.mark.long
def test_spin(tiny_pipeline, tmp_path, capsys):
  """Winners are the data's, and each iteration's reference is the model it begins with."""
  workdir = tmp_path / "run"
  fields = {"model.dtype": "bfloat16", "model.frozen_dtype": "bfloat16", "lora.rank": 2}
  fields["train.num_updates"] = 10  # twenty in two iterations
  fields["optim.schedule"] = "linear"
  given = arguments(
    tiny_pipeline, None, workdir, "spin", **fields, **{"optim.lr": 0.01, "optim.eps": 1e-8}
  )
  assert main.main(given) == 0, capsys.readouterr().err
  for k in (1, 2):
    distances = [apart(line) for line in lines_of(workdir, k)]
    assert distances[0] < 1e-6 < min(distances[1:])
    # The schedule begins again with each iteration.
    rates = [line["optim/lr"] for line in lines_of(workdir, k)]
    np.testing.assert_allclose(rates, 0.01 * (1 - np.arange(10) / 10), rtol=1e-4)
    # Equal but for bfloat16's rounding, which programs for other processors do elsewhere.
    assert lines_of(workdir, k)[0]["loss"] == pytest.approx(np.log(2), abs=0.01)
  rows = list(generated_pairs.open_pairs(workdir / "pairs" / "1"))
  data = {images.decode(file).tobytes() for row in rows for file in [row["jpg_0"]]}
  config = json.loads((workdir / "config.json").read_text())
  assert config["data"]["source"] == "shapes" and {row["seed_0"] for row in rows} == {-1}
  ready = iterate.prepare(_config(given))
  known = {row.images[0].tobytes() for row in ready.rows}
  assert data <= known
  assert {row["model_0"] for row in rows} == {b"data"}
  assert {row["improve_steps"] for row in rows} == {0}
  assert not any("time/improve_seconds" in line for line in (workdir / "metrics.jsonl").open())
  # What the second iteration began with are the first one's additions, averaged.
  start = setup_lib.prepare(_inner(workdir, 2)).start
  first = load_run.load(str(workdir / "iterations" / "1"), merged=False).params["unet"]
  jax.tree.map(np.testing.assert_array_equal, start["params"], first.lora)


def _config(given):
  return config_lib.parse_args([a for a in given if "workdir" not in a], flags={})[0]


def _inner(workdir, k):
  file = workdir / "iterations" / str(k) / "config.json"
  return ConfigDict(json.loads(file.read_text()))


@pytest.mark.long
def test_pairs_that_hardly_differ_are_not_trained_on(
  finished, tiny_pipeline, improver, tmp_path, monkeypatch, capsys
):
  changes = generated_pairs.changes(finished / "pairs" / "1")
  low, middle, high = np.quantile(changes, (0, 0.5, 1))
  workdir = tmp_path / "half"

  def start(**fields):
    """What would be trained on."""
    fields = {f"data.{name}": value for name, value in fields.items()}
    given = arguments(tiny_pipeline, improver, workdir, **fields)
    trained_on = []

    def look(prepared, *_):
      trained_on.extend(row.caption for row in prepared.rows)
      raise KeyboardInterrupt

    with monkeypatch.context() as patch:
      patch.setattr(train, "run", look)
      status = main.main(given)
    assert status == (130 if trained_on else 2)
    return trained_on, capsys.readouterr().err

  # It is said of the first file of pairs, and of all; the pairs stay for another threshold.
  none, said = start(min_change=1e6)
  assert not none and "so far no pair differs by data.min_change = 1e+06" in said
  assert f"differ by {low:.3g} to {high:.3g}, median {middle:.3g}" in said
  drawn = {p: p.stat().st_mtime_ns for p in workdir.glob("pairs/1/*")}
  half, _ = start(min_change=middle)
  rows = list(generated_pairs.open_pairs(workdir / "pairs" / "1"))
  captions = [row["caption"].decode() for row in rows]
  kept = [c for c, change in zip(captions, changes, strict=True) if change >= middle]
  assert half == kept and len(captions) == 12 and len(kept) == 6
  assert {p: p.stat().st_mtime_ns for p in drawn} == drawn
  # Iteration 1 has begun with them.
  none, said = start(min_change=0)
  assert not none and f"data.min_change was {middle}, now 0.0" in said
  shutil.rmtree(workdir / "iterations")
  # data.num_rows is an upper limit: there may be fewer pairs.
  assert start(min_change=middle, num_rows=9)[0] == kept
  shutil.rmtree(workdir / "iterations")
  assert start(min_change=middle, num_rows=4)[0] == kept[:4]
  config = json.loads((workdir / "iterations" / "1" / "config.json").read_text())
  assert config["data"]["num_rows"] == 4
  # The error of another run on these pairs says why there are too few.
  flags = ["--config=configs/dpo.py:tiny", "--config.data.source=online"]
  flags += [f"--config.data.path={workdir / 'pairs' / '1'}", "--config.data.min_change=9"]
  with pytest.raises(UserError, match="0 pairs of data.min_change = 9 or more: data.num_rows"):
    setup_lib.prepare(_config(flags))
  none, said = start(num_rows=13)
  assert not none and "data.num_rows = 13 must be at most iterate.num_pairs = 12" in said


@pytest.mark.long
def test_least_change_is_of_drawn_pairs():
  flags = ["--config=configs/dpo.py:tiny", "--config.data.min_change=0.1"]
  with pytest.raises(UserError, match="min_change needs generated pairs"):
    setup_lib.prepare(_config(flags))
  flags = ["--config=configs/dro.py:tiny", "--config.data.min_change=0.1"]
  with pytest.raises(UserError, match="is for losses that learn from pairs"):
    setup_lib.check(_config(flags))


def test_half_written_data_sets_are_none(tmp_path):
  row = {
    **{"caption": "a", "has_label": True, "ranking_id": 0, "change": 1.0, "guidance": 2.0},
    **{"text_guidance": 0.0, "image_guidance": 0.0, "num_steps": 2, "improve_steps": 0},
    **{f"{name}_{k}": 1 for name in ("label", "seed") for k in (0, 1)},
    **{f"model_{k}": "x" for k in (0, 1)},
    **{"image_0_uid": "x", "image_1_uid": "y", "jpg_0": b"", "jpg_1": b""},
  }
  directory = tmp_path / "pairs"
  generated_pairs.write_shard(directory, 0, 2, [row])
  (directory / ".online_pairs-train.array_record-00001-of-00002.77.tmp").write_bytes(b"half")
  assert generated_pairs.missing(directory, 2) == [1] and len(list(directory.iterdir())) == 1
  generated_pairs.write_shard(directory, 1, 2, [row | {"change": 0.5}])
  with pytest.raises(UserError, match="complete.json is missing"):
    generated_pairs.open_pairs(directory)
  generated_pairs.finish(directory, [1, 1], description="two")
  assert generated_pairs.changes(directory).tolist() == [1.0, 0.5]
  assert [r["caption"] for r in generated_pairs.open_pairs(directory)] == [b"a", b"a"]
  shard = next(directory.glob("*00001-of-00002"))
  whole = shard.read_bytes()
  where = 64 + 40 + 30  # in the row, after the headers of the file's block and chunk
  where = next(i for i in range(where, len(whole)) if whole[i])
  shard.write_bytes(whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :])
  with pytest.raises(UserError, match=f"{shard.name} is damaged: .*; delete the directory"):
    list(generated_pairs.open_pairs(directory))
  shard.write_bytes(whole[:-10])
  with pytest.raises(UserError, match=f"are damaged: {shard.name}"):
    generated_pairs.open_pairs(directory)


@pytest.mark.long
def test_the_papers_recipe_is_accepted(tmp_path):
  """`iterative_dpo.py:sd15` on an SD 1.5 of reduced width with random weights."""
  base = families.write_pipeline("sd15", tmp_path, shallow=True)
  better = families.write_improver(base, tmp_path / "improver")
  folder = tmp_path / "pictures"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for i in range(2):
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / f"{i}.txt").write_text(families.PROMPTS[i])
  small = {
    "model.path": base,
    "iterate.improver": better,
    "data.source": "folder",
    "data.path": folder,
    "iterate.num_iterations": 1,
    "iterate.num_pairs": 2,
    "iterate.num_steps": 2,
    "data.min_change": 0,
    "improve.num_steps": 2,
    "train.batch_size": 2,
    "train.accumulate": 1,
    "train.num_updates": 1,
    "evaluate.num_steps": 2,
    "evaluate.images_per_prompt": 1,
    "evaluate.num_prompts": 1,
  }
  flags = [f"--config.{name}={value}" for name, value in small.items()]
  flags = ["--config=configs/iterative_dpo.py:sd15", *flags]
  config, _ = config_lib.parse_args(flags, flags={})
  config_lib.validate(config)
  prepared = iterate.prepare(config)
  assert config.loss.beta == 2000.0 and config.optim.lr == 1e-4
  assert len(prepared.rows) == 2 and prepared.inputs["improver"] != prepared.inputs["base"]
