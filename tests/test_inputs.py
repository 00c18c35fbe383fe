"""How runs read a built data set: in memory, from a cache, ahead; by several processes."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import runs
from built_sets import built, prepare
from conftest import ROOT, WITHOUT_TORCH, start_cluster
from families import write_pipeline

from jaxpref import main, sharding
from jaxpref.data import (
  cache,
  commands,
  encode,
  loader,
)
from jaxpref.errors import UserError
from jaxpref.models import pipeline as pipeline_lib
from jaxpref.training import inputs

sys.path.insert(0, str(ROOT / "benchmarks"))

import formats  # noqa: E402


def _all(opened, mesh):
  """Encodes all rows as training would."""
  (part,) = opened.parts
  index = np.arange(inputs.part_length(part))
  return jax.device_get(opened.encode(sharding.place_batch(part.rows, mesh, index)))


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.long)])
def test_encodings_are_equal_wherever_they_are_made(family, tiny_pipeline, tmp_path):
  pipeline = (
    tiny_pipeline if family == "sd" else write_pipeline("sdxl", tmp_path / "sdxl", shallow=True)
  )
  path = built("random_rows", "pairs", tmp_path / "set")
  fields = {"data.flip": True, "data.latents": "sample"}
  if family == "sdxl":
    fields["data.original_sizes"] = True
  found = {}
  for where in ("memory", "ahead", "disk"):
    prepared = prepare(pipeline, path, **{**fields, "data.cache": where})
    opened = inputs.open_rows(prepared)
    assert opened.where == where
    found[where] = _all(opened, prepared.mesh)
  # The cache is there now, and is found.
  opened = inputs.open_rows(prepare(pipeline, path, **fields))
  assert opened.where == "disk"
  jax.tree.map(np.testing.assert_array_equal, found["disk"], _all(opened, prepared.mesh))
  whole = found["memory"]
  assert whole["latents"].shape[:2] == (2 * len(prepared.rows), 2)
  assert jax.tree.structure(found["disk"]) == jax.tree.structure(whole)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found["ahead"], whole
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=2**-10), found["disk"], whole
  )
  assert all(
    a.dtype == b.dtype
    for a, b in zip(jax.tree.leaves(found["disk"]), jax.tree.leaves(whole), strict=True)
  )
  if family == "sdxl":
    size = prepared.pipeline.image_size
    sizes = whole["cond"]["time_ids"][0]
    np.testing.assert_array_equal(sizes, [20, 16, np.rint(size / 8), 0, size, size])
  # By hand: the second row's loser, mirrored.
  row, count = prepared.rows[1], len(prepared.rows)
  image = row.images[1][:, ::-1]
  alone = encode.encode_images(prepared.pipeline, prepared.mesh, [image])
  np.testing.assert_allclose(whole["latents"][count + 1, 1], alone[0], atol=1e-5)
  text = encode.encode_prompts(prepared.pipeline, prepared.mesh, [row.caption])
  np.testing.assert_allclose(whole["cond"]["text"][1], text["text"][0], atol=1e-5)


def _bytes_in(directory):
  return {p.name: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_an_interrupted_cache_ends_the_same(tiny_pipeline, tmp_path, monkeypatch, stop):
  pipeline = pipeline_lib.load_pipeline(str(tiny_pipeline))
  monkeypatch.setattr(cache, "_AT_ONCE", 1)
  monkeypatch.setattr(encode, "_PIXELS_AT_ONCE", 2 * pipeline.image_size**2)
  whole, part = (built("random_rows", "pairs", tmp_path / name) for name in ("whole", "part"))
  commands.main(["cache", str(whole), f"--model={tiny_pipeline}", "--flip"])
  with monkeypatch.context() as patch:
    recorded = []

    def record(*args, of=cache._record):
      recorded.append(of(*args))
      if len(recorded) == stop:
        raise KeyboardInterrupt

    patch.setattr(cache, "_record", record)
    assert commands.main(["cache", str(part), f"--model={tiny_pipeline}", "--flip"]) == 130
  encoded = []

  def count(*args, of=encode._encode_posterior, **kwargs):
    encoded.append(len(args[-1]))
    return of(*args, **kwargs)

  monkeypatch.setattr(encode, "_encode_posterior", count)
  assert commands.main(["cache", str(part), f"--model={tiny_pipeline}", "--flip"]) == 0
  assert sum(encoded) == 24 - 2 * stop  # twelve images and their mirror images
  assert _bytes_in(whole / "cache") == _bytes_in(part / "cache")


def test_a_cache_is_of_its_models_alone(tiny_pipeline, tmp_path, capsys):
  path = built("random_rows", "pairs", tmp_path / "set")
  assert commands.main(["cache", str(path), f"--model={tiny_pipeline}", "--cache=latents"]) == 0
  (made,) = (path / "cache").iterdir()
  assert str(made) in capsys.readouterr().out
  # Half of what training needs: it encodes as without a cache.
  assert inputs.open_rows(prepare(tiny_pipeline, path)).where == "memory"
  # One with the mirrored images serves without them, too, and is the one that is named.
  more = built("random_rows", "pairs", tmp_path / "more")
  given = ["cache", str(more), f"--model={tiny_pipeline}", "--cache=latents"]
  for flags in (["--flip"], []):
    assert commands.main([*given, *flags]) == 0
    (one,) = (more / "cache").iterdir()
    assert str(one) in capsys.readouterr().out
  other = write_pipeline("sd15", tmp_path / "other", shallow=True)
  prepared = prepare(other, path)
  assert cache.find(prepared.rows.images, "latents", prepared.pipeline) is None
  ours = prepare(tiny_pipeline, path)
  assert cache.find(ours.rows.images, "latents", ours.pipeline) is not None
  assert cache.find(ours.rows.images, "latents", ours.pipeline, flip=True) is None
  # Another model's cache under our name, and damaged files.
  facts = json.loads((made / "complete.json").read_text())
  facts["facts"]["vae"] = "another"
  (made / "complete.json").write_text(json.dumps(facts))
  with pytest.raises(UserError, match="is of other models or data"):
    cache.find(ours.rows.images, "latents", ours.pipeline)
  facts["facts"] = cache.facts_of(ours.rows.images, "latents", ours.pipeline)
  (made / "complete.json").write_text(json.dumps(facts))
  (made / "std.npy").write_bytes((made / "std.npy").read_bytes()[:-1])
  with pytest.raises(UserError, match="is damaged: "):
    cache.find(ours.rows.images, "latents", ours.pipeline)


def test_what_cannot_be_cached_is_said(tiny_pipeline, tmp_path):
  path = built("random_rows", "pairs", tmp_path / "set")
  with pytest.raises(UserError, match="needs a built data set at data.path"):
    inputs.open_rows(prepare(tiny_pipeline, "", **{"data.cache": "disk"}))
  with pytest.raises(UserError, match="data.noise_draws needs encoded rows"):
    inputs.open_rows(
      prepare(tiny_pipeline, path, **{"data.cache": "ahead", "data.noise_draws": 2})
    )
  with pytest.raises(UserError, match=r"data.crop = 'random' is new at each update"):
    more = {"data.cache": "memory", "data.crop": "random"}
    inputs.open_rows(prepare(tiny_pipeline, path, **more))
  with pytest.raises(UserError, match=r"data.crop = 'none' needs a built data set"):
    inputs.open_rows(prepare(tiny_pipeline, "", **{"data.crop": "none"}))
  with pytest.raises(UserError, match=r"at least train.batch_size = 99 rows, and the data has"):
    more = {"data.buckets": True, "train.batch_size": 99}
    inputs.open_rows(prepare(tiny_pipeline, path, **more))
  with pytest.raises(UserError, match="data.buckets is for losses that learn from experts"):
    inputs.open_rows(prepare(tiny_pipeline, path, "kto", **{"data.buckets": True}))
  with pytest.raises(UserError, match=r"data.original_sizes is for SDXL"):
    inputs.open_rows(prepare(tiny_pipeline, path, **{"data.original_sizes": True}))
  with pytest.raises(UserError, match="captions without prefixes"):
    more = {"data.cache": "disk", "data.good_prefix": "good. "}
    inputs.open_rows(prepare(tiny_pipeline, path, "csft", **more))


def test_large_sets_are_encoded_ahead(tiny_pipeline, tmp_path, monkeypatch, caplog):
  prepared = prepare(tiny_pipeline, built("random_rows", "pairs", tmp_path / "set"))
  size = inputs.encoded_bytes(prepared)
  in_memory = inputs.open_rows(prepared)
  leaves = jax.tree.leaves({k: in_memory.parts[0].rows[k] for k in ("latents", "cond")})
  assert size == sum(leaf._values.nbytes for leaf in leaves)
  monkeypatch.setattr(inputs, "_MOST_IN_MEMORY", size - 1)
  assert inputs.open_rows(prepared).where == "ahead"
  assert "data.cache=disk encodes all rows only once" in caplog.text


def test_reading_ahead_changes_nothing():
  """Whatever is under way, the position is that of the last batch that was returned."""
  options = {"batch_size": 4, "seed": 3}
  plain = loader.make_loader(11, **options)
  ahead = loader.make_loader(11, **options, read=lambda i, index: (i, index), ahead=3)
  wanted = [next(plain).tolist() for _ in range(9)]
  got = [next(ahead) for _ in range(4)]
  state = ahead.get_state()
  got += [next(ahead) for _ in range(5)]
  assert [index.tolist() for _, index in got] == wanted
  assert [i for i, _ in got] == list(range(9))
  again = loader.make_loader(11, **options, read=lambda i, index: (i, index), ahead=3)
  again.set_state(state)
  assert [next(again)[1].tolist() for _ in range(5)] == wanted[4:]


@pytest.mark.long
@pytest.mark.parametrize("where", ["disk", "ahead"])
def test_a_run_on_a_built_set_resumes_to_the_same_bits(where, tiny_pipeline, tmp_path, capsys):
  path = built("random_rows", "pairs", tmp_path / "set")
  fields = {
    **{"data.path": path, "data.num_rows": 0, "data.cache": where, "data.flip": True},
    **{"data.latents": "sample", "evaluate.num_prompts": 1},
  }
  _, parts = runs.check_resumed(tiny_pipeline, tmp_path, "dpo", updates=(2, 4), **fields)
  # 'auto' keeps what the run began with, whatever is there now; another choice is refused.
  capsys.readouterr()
  shutil.rmtree(path / "cache", ignore_errors=True)
  fields |= {"data.cache": "auto", "train.num_updates": 5}
  assert main.main(runs.arguments(tiny_pipeline, parts, "dpo", **fields)) == 0
  assert (path / "cache").exists() == (where == "disk")
  fields |= {"data.cache": "memory", "train.num_updates": 6}
  assert main.main(runs.arguments(tiny_pipeline, parts, "dpo", **fields)) == 2
  assert f"rows encoded as by data.cache = '{where}'" in capsys.readouterr().err


@pytest.mark.long
def test_each_process_reads_its_share(tmp_path):
  """Of 24 rows in three batches, two processes open 12 records each, and none twice."""
  path = built("distinct_rows", "pairs", tmp_path / "set")
  program = ROOT / "tests" / "reading_main.py"
  found = {}
  for count in (1, 2):
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = free.getsockname()[1]
    started = [
      subprocess.Popen(
        [sys.executable, program, f"127.0.0.1:{port}", str(count), str(k), path],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=os.environ | WITHOUT_TORCH | {"XLA_FLAGS": ""},
      )
      for k in range(count)
    ]
    said = [process.communicate(timeout=200)[0].splitlines()[-1] for process in started]
    found[count] = [json.loads(line) for line in said]
  whole = found[1][0]["opened"]
  assert len(whole) == len(set(whole)) == 24
  for count, of in found.items():
    assert [len(process["opened"]) for process in of] == [24 // count] * count
    assert sorted(sum((process["opened"] for process in of), [])) == sorted(whole)
    assert {process["digest"] for process in of} == {found[1][0]["digest"]}


@pytest.mark.long
def test_a_cluster_ends_where_one_process_does(tiny_pipeline, tmp_path):
  """It makes the cache, too, whose numbers only differ by float rounding."""
  fields = {"data.num_rows": 0, "data.cache": "disk", "data.latents": "sample"}
  fields |= {"evaluate.num_prompts": 1, "train.batch_size": 4}
  ends = []
  for count in (1, 2):
    path = built("random_rows", "pairs", tmp_path / f"set{count}")
    workdir, log = tmp_path / f"run{count}", tmp_path / f"log{count}"
    arguments = runs.arguments(tiny_pipeline, workdir, "dpo", **fields, **{"data.path": path})
    if count == 1:
      assert main.main(arguments) == 0
    else:
      assert start_cluster(2, 2, arguments, log).wait(400) == 0, log.read_text()[-2000:]
    ends.append(runs.parameters(workdir)[1])
  one, two = (
    {p.relative_to(tmp_path / f"set{count}"): np.load(p) for p in cached}
    for count in (1, 2)
    for cached in [(tmp_path / f"set{count}" / "cache").rglob("*.npy")]
  )
  assert one.keys() == two.keys() and len(one) == 3
  for name, array in one.items():
    np.testing.assert_allclose(two[name], array, atol=1e-3, rtol=2**-9)
  for name, array in ends[0].items():
    if name.startswith("/params"):
      np.testing.assert_allclose(ends[1][name], array, atol=2e-3, err_msg=name)


@pytest.mark.long
def test_killed_in_every_phase_it_ends_with_the_same_files(tiny_pipeline, tmp_path):
  """Build, index, both caches: the same command goes on, and no file differs in the end."""
  formats.make("pickapic", tmp_path / "in", seed=0, count=400, faults=False)
  command = [
    *(sys.executable, "-m", "jaxpref.data", "build", "--source=pickapic", "--flip"),
    *(f"--path={tmp_path / 'in'}", "--rows-per-shard=40", f"--model={tiny_pipeline}"),
    "--cache=latents,text",
  ]
  env, whole = os.environ | WITHOUT_TORCH, f"--out={tmp_path / 'whole'}"
  subprocess.run([*command, whole], check=True, capture_output=True, env=env)
  out = tmp_path / "out"
  killed = 0
  for phase in (
    "*array_record-00002*",
    ".index.sqlite",
    "cache/latents-*/*.npy",
    "cache/text-*",
  ):
    process = subprocess.Popen(
      [*command, f"--out={out}"],
      env=env,
      start_new_session=True,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(out.glob(phase)):
      time.sleep(0.001)
    killed += process.poll() is None
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
  assert killed > 1
  subprocess.run([*command, f"--out={out}"], check=True, capture_output=True, env=env)
  assert _bytes_in(tmp_path / "whole") == _bytes_in(out)
