"""Damaged files of a run: set aside, or refused in one line that names the file."""

import json
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict
from PIL import Image

from jaxpref import scorers
from jaxpref.data import generated_pairs
from jaxpref.errors import DamagedError, UserError
from jaxpref.evaluation import best_checkpoint, evaluate, image_files, score_rows, statistics
from jaxpref.runtime import checkpoint, checkpoint_files, metrics
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.training import iterate_report, load_run

DAMAGES = {
  "empty": b"",
  "cut": b'{"optim": ',
  "number": b"7",
  "null": b"null",
  "text": b'"x"',
  "nested": b"[[1], {}]",
  "values": b'{"model": [], "train": 3, "sizes": 5, "update": null, "a-1": [1]}',
  "latin": b'{"caf\xe9": 1}',
  "utf16": '{"a": 1}'.encode("utf-16"),
  "deep": b"[" * 100_000 + b"]" * 100_000,
  "deep objects": b'{"a":' * 900 + b"1" + b"}" * 900,
  "digits": b"1" * 10_000,
}
damaged = pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES.keys())
SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])
CONFIG = ConfigDict({"name": "dro", "train": {"num_updates": 4}})


def refused(job, *named):
  with pytest.raises(UserError) as caught:
    job()
  assert str(caught.value).isprintable()
  for text in named:
    assert str(text) in str(caught.value)


@damaged
def test_a_configuration_is_refused(tmp_path, content):
  file = tmp_path / "config.json"
  file.write_bytes(content)
  (tmp_path / "checkpoints").mkdir()
  refused(lambda: workdir_lib.open_workdir(tmp_path, CONFIG), tmp_path)
  assert file.read_bytes() == content
  refused(lambda: load_run.load(str(tmp_path)), file)


@pytest.mark.parametrize(
  ("section", "value"),
  [
    ("model", {"path": 5}),
    ("model", {"path": "shapes", "variant": None}),
    ("train", {"checkpoints": ["x"]}),
    ("lora", {"rank": "4"}),
    ("lora", {"rank": 10**30, "alpha": 1.0, "targets": "x"}),
    ("lora", {"rank": 4}),
    ("evaluate", {"guidance": "7"}),
    ("evaluate", 3),
    ("data", {"good_prefix": 1}),
    ("data", {"score": 5}),
    ("model", {"path": "shapes", "start": 5}),
    ("rounds", {}),
    ("rounds", {"scorers": "x"}),
    ("pathwise", {"scorers": [1]}),
    ("steps", None),
  ],
)
def test_a_configuration_with_other_types_is_refused(tmp_path, section, value):
  config = {"model": {"path": "shapes"}, "train": {}} | {section: value}
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "starts.json").write_text("[]")
  refused(lambda: load_run.load(str(tmp_path)), tmp_path / "config.json")


@damaged
def test_starts_are_set_aside(tmp_path, content, caplog):
  (tmp_path / "starts.json").write_bytes(content)
  workdir_lib.add_start(tmp_path, {"after_update": 3})
  (start,) = json.loads((tmp_path / "starts.json").read_text())
  assert start["after_update"] == 3
  assert (tmp_path / "starts.json.damaged").read_bytes() == content
  assert str(tmp_path / "starts.json") in caplog.text


def test_files_of_another_kind_are_not_opened(tmp_path, monkeypatch):
  def read(name):
    return lambda: workdir_lib.read_json(tmp_path / name, lambda _: True)

  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "directory").mkdir()
  (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
  for name in ("pipe", "directory", "dangling"):
    refused(read(name), f"{tmp_path / name} is not a regular file")
  refused(read("absent"), f"{tmp_path / 'absent'} is missing")
  (tmp_path / "large").write_text("[" + " " * 100 + "]")
  monkeypatch.setattr(workdir_lib, "_LARGEST_JSON", 50)
  refused(read("large"), tmp_path / "large", "102 bytes")


@damaged
def test_metrics_are_refused(tmp_path, content):
  file = tmp_path / "metrics.jsonl"
  file.write_bytes(b'{"step": 1, "loss": 2.0}\n' + content + b"\n")
  refused(lambda: metrics.read_curves(tmp_path), file, "line 2")


@pytest.mark.parametrize(
  "line",
  [
    *('{"step": 1.5}', '{"step": true}', '{"step": 1, "loss": "x"}', '{"step": 1, "a": NaN}'),
    *('{"step": 1, "loss": 1e999}', '{"step": 1, "loss": 1' + "0" * 400 + "}", " " * (1 << 20)),
  ],
)
def test_lines_with_other_values_are_refused(tmp_path, line):
  (tmp_path / "metrics.jsonl").write_text(line + "\n")
  refused(lambda: metrics.read_curves(tmp_path), "line 1")


def test_metrics_out_of_order_are_sorted_and_other_kinds_of_file_refused(tmp_path):
  file = tmp_path / "metrics.jsonl"
  file.write_text("".join(f'{{"step": {i}, "loss": {i}}}\n' for i in (3, 1, 2)))
  assert metrics.read_curves(tmp_path) == {"loss": [(1, 1), (2, 2), (3, 3)]}
  file.unlink()
  os.mkfifo(file)
  refused(lambda: metrics.read_curves(tmp_path), file)
  file.unlink()
  file.mkdir()
  refused(lambda: metrics.MetricWriter(tmp_path, total_updates=1), file)
  refused(lambda: metrics.MetricWriter(tmp_path, total_updates=1, start_step=1), file)


@pytest.mark.parametrize("name", [".lock", "config.json", "starts.json", "metrics.jsonl"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_do_not_lead_to_other_files(tmp_path, name, link):
  target = tmp_path / "thesis.tex"
  target.write_text("years of work")
  run = tmp_path / "run"
  run.mkdir()
  link(target, run / name)
  if name == ".lock":
    refused(lambda: workdir_lib.open_workdir(run, CONFIG), run, ".lock is a link")
  elif name == "metrics.jsonl":
    writer = metrics.MetricWriter(run, total_updates=1)
    writer.write(1, {"loss": 1.0})
    writer.close()
  else:
    workdir_lib.write_config(run, CONFIG)
    workdir_lib.add_start(run, {})
  assert target.read_text() == "years of work"


def test_a_lock_that_is_a_pipe_and_a_temporary_name_that_is_a_link(tmp_path):
  run = tmp_path / "run"
  run.mkdir()
  os.mkfifo(run / ".lock")
  refused(lambda: workdir_lib.open_workdir(run, CONFIG), run, ".lock")
  target = tmp_path / "thesis.tex"
  target.write_text("years of work")
  (run / f".a.json.{os.getpid()}.tmp").symlink_to(target)
  workdir_lib.write_json(run / "a.json", [])
  assert target.read_text() == "years of work"
  assert not (run / "a.json").is_symlink()


def state_of(step):
  return {"x": jnp.arange(3.0) + step}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  directory = tmp_path_factory.mktemp("saved") / "checkpoints"
  ckptr = checkpoint.Checkpointer(directory, keep=3)
  for step in (5, 6):
    ckptr.save(step, state_of(step), {"next_index": step}, {"a": step})
  ckptr.close()
  return directory


@pytest.fixture
def steps(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "checkpoints")


def restore(directory):
  ckptr = checkpoint.Checkpointer(directory, keep=3)
  target = {"x": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=SHARDING)}
  found = ckptr.restore(target)
  np.testing.assert_array_equal(found.state["x"], state_of(found.step)["x"])
  assert (found.data_state, found.metadata) == ({"next_index": found.step}, {"a": found.step})
  ckptr.close()
  return found.step


@pytest.mark.parametrize(
  "content",
  [*DAMAGES.values(), b"{}", b'{"../6/a": [1, 2]}', b'{"a": [1, 2, 3]}', b'{"a": [null, 2]}'],
  ids=[*DAMAGES.keys(), "nothing", "outside", "three", "no size"],
)
def test_damaged_checksums_lead_to_the_older_checkpoint(steps, content):
  (steps / "6" / "checksums.json").write_bytes(content)
  assert checkpoint_files.find_good(steps).step == 5
  assert restore(steps) == 5
  assert (steps / "6.damaged").is_dir()


def test_checksums_that_are_a_pipe_lead_to_the_older_checkpoint(steps):
  (steps / "6" / "checksums.json").unlink()
  os.mkfifo(steps / "6" / "checksums.json")
  assert restore(steps) == 5


def test_a_step_stands_in_its_record(steps, caplog):
  shutil.copytree(steps / "5", steps / "9")
  (steps / "8").symlink_to("6")
  assert checkpoint_files.find_good(steps).step == 6
  refused(lambda: checkpoint_files.find_good(steps, step=9), "it was saved as step 5")
  assert restore(steps) == 6
  assert "it was saved as step 5" in caplog.text
  assert checkpoint_files.steps(steps) == [5, 6]
  # Its step can be saved.
  ckptr = checkpoint.Checkpointer(steps, keep=3)
  ckptr.save(9, state_of(9), {"next_index": 9}, {"a": 9})
  ckptr.close()
  assert restore(steps) == 9
  (steps / "9").rename(steps / "10")
  assert restore(steps) == 6


def test_other_names_are_passed_over(steps, caplog):
  names = ["007", "+7", "7 (copy)", "7.tmp", "\u0663", "1e3", " 7", "7\x1b[2J"]
  for name in names:
    shutil.copytree(steps / "6", steps / name)
  (steps / "12").write_text("a file")
  assert checkpoint_files.steps(steps) == [5, 6]
  assert restore(steps) == 6
  for name in names:
    assert (steps / name).is_dir() and name in caplog.text


def test_checkpoints_of_older_versions_have_no_step_in_their_record(steps, monkeypatch):
  metadata = checkpoint.ocp.metadata

  def older(path):
    record = dict(metadata(path).custom_metadata)
    del record["step"]
    return SimpleNamespace(custom_metadata=record)

  monkeypatch.setattr(checkpoint.ocp, "metadata", older)
  assert restore(steps) == 6


def scores():
  columns = {
    "model": ["base", "tuned"] * 2,
    "prompt_id": [0, 0, 1, 1],
    "seed": [0, 0, 1, 1],
    "prompt": ["a", "a", "b", "b"],
    "category": "colors",
    "scorer": "s",
    "version": "1-a",
    "score": [0.0, 1.0, 1.0, 0.5],
  }
  return pd.DataFrame(columns)


@damaged
def test_an_evaluation_is_made_again(tmp_path, content):
  directory = tmp_path / "evaluation" / "2"
  directory.mkdir(parents=True)
  settings = {"scorers": [["s", "1-a"]], "num_steps": 2}  # a version may have dashes
  statistics.write_results(
    directory / "results.json", statistics.compare(scores(), resamples=10)
  )
  best_checkpoint.write_settings(directory, settings)
  assert best_checkpoint.is_made(directory, settings)
  assert best_checkpoint.find(tmp_path, settings, [2]) == best_checkpoint.Best(2, "s-1-a", 0.75)
  assert best_checkpoint.find(tmp_path, settings | {"scorers": []}, [2]) is None
  shutil.copytree(directory, directory.with_name("02"))
  for name in ("results.json", "settings.json"):
    before = (directory / name).read_bytes()
    (directory / name).write_bytes(content)
    assert not best_checkpoint.is_made(directory, settings)
    assert best_checkpoint.find(tmp_path, settings, [2]) is None
    (directory / name).write_bytes(before)
  (directory / "results.json").write_bytes(content)
  report = (tmp_path, directory, CONFIG, {})
  refused(lambda: evaluate.write_report(*report, held_out=True), directory / "results.json")


@damaged
def test_the_best_checkpoint_is_refused(tmp_path, content):
  refused(lambda: best_checkpoint.read(tmp_path), "no best checkpoint")
  (tmp_path / "best.json").write_bytes(content)
  refused(lambda: best_checkpoint.read(tmp_path), tmp_path / "best.json")
  (tmp_path / "best.json").write_text('{"update": 2, "scorer": "s-1", "mean": NaN}')
  refused(lambda: best_checkpoint.read(tmp_path), tmp_path / "best.json")
  best_checkpoint.write(tmp_path, best_checkpoint.Best(2, "s-1", 0.5))
  assert best_checkpoint.read(tmp_path).update == 2


@pytest.mark.parametrize("content", [b"", b"PAR1" * 20, b"x" * 1000])
def test_damaged_scores_are_refused(tmp_path, content):
  statistics.write_results(
    tmp_path / "results.json", statistics.compare(scores(), resamples=10)
  )
  file = tmp_path / "scores.parquet"
  file.write_bytes(content)
  job = lambda: evaluate.write_report(tmp_path, tmp_path, CONFIG, {}, held_out=True)  # noqa: E731
  refused(job, file)
  scores().drop(columns="category").to_parquet(file)
  refused(job, file)
  score_rows.write_rows(file, scores())
  for content in DAMAGES.values():
    (tmp_path / "examples.json").write_bytes(content)
    refused(job, tmp_path / "examples.json")
  seen = {"prompt": "a", "category": "colors", "seed": 0}
  for score in ("0.5", [], None):
    wrong = [{**seen, "scores": {"s-1": {"base": 0.5, "tuned": score}}}]
    workdir_lib.write_json(tmp_path / "examples.json", wrong)
    refused(job, tmp_path / "examples.json")
  workdir_lib.write_json(tmp_path / "examples.json", [])
  for content in DAMAGES.values():
    (tmp_path / "diversity.json").write_bytes(content)
    refused(job, tmp_path / "diversity.json")
  (tmp_path / "diversity.json").unlink()  # an earlier version's evaluation has none
  (tmp_path / "examples.json").write_text(json.dumps([{**seen, "scores": {}}]))
  refused(job, "00000000.png is missing or damaged")


def test_damaged_images_are_drawn_again(tmp_path):
  settings = SimpleNamespace(images_per_prompt=1, seed=0)
  seeds = evaluate.sampling.seeds_of(2, 1, seed=0)
  directory = tmp_path / "images" / "base"
  directory.mkdir(parents=True)
  files = [directory / f"{seed:08d}.png" for seed in seeds]
  for file in files:
    Image.new("RGB", (8, 8)).save(file)
  read = lambda: evaluate.read_images(tmp_path, "base", 2, settings)  # noqa: E731
  assert read().shape == (2, 8, 8, 3)
  content = files[0].read_bytes()
  start = content.index(b"IDAT") + 8
  altered = content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :]
  for other in (altered, b"", b"x" * 100, content[:60]):
    files[0].write_bytes(other)
    assert read() is None
  Image.new("RGB", (9, 9)).save(files[0])
  assert read() is None
  files[0].unlink()
  os.mkfifo(files[0])
  assert read() is None


@damaged
def test_records_of_pairs_and_iterations_are_set_aside(tmp_path, content):
  (tmp_path / "complete.json").write_bytes(content)
  refused(lambda: generated_pairs.changes(tmp_path), tmp_path / "complete.json")
  assert not generated_pairs.is_finished(tmp_path)
  refused(lambda: generated_pairs.changes(tmp_path), "has no generated pairs")
  trained = tmp_path / load_run.ITERATIONS / "1"
  trained.mkdir(parents=True)
  (trained / iterate_report.PHASES).write_bytes(content)
  assert not iterate_report.is_finished(tmp_path, CONFIG, 1)
  workdir_lib.write_json(trained / iterate_report.PHASES, {"train": 1.0})
  assert not iterate_report.is_finished(tmp_path, CONFIG, 1)
  workdir_lib.write_json(trained / "evaluation" / "4" / "results.json", {})
  assert iterate_report.is_finished(tmp_path, CONFIG, 1)


@damaged
def test_images_with_damaged_settings_are_not_overwritten(tmp_path, content):
  file = tmp_path / "00000-00.png"
  info = image_files.PngImagePlugin.PngInfo()
  info.add_itxt("jaxpref", content.decode(errors="replace"))
  Image.new("RGB", (8, 8)).save(file, pnginfo=info)
  refused(lambda: image_files.is_generated(file, {"seed": 1}), file)
  file.unlink()
  os.mkfifo(file)
  refused(lambda: image_files.is_generated(file, {"seed": 1}), file)


def test_scorers_that_a_run_learned_from(tmp_path):
  """Those of its reward, its experts, its start and its best checkpoint."""

  def write(name, **sections):
    config = {"model": {"path": "shapes"}, "train": {}} | sections
    workdir_lib.write_json(tmp_path / name / "config.json", config)
    workdir_lib.write_json(tmp_path / name / "starts.json", [])
    return str(tmp_path / name)

  chosen = write("chosen", data={"score": "/scores/hpsv2.v2_0-2.0-tensor_aa.parquet"})
  from_it = {"model": {"path": "shapes", "start": chosen}}
  online = write("online", rounds={"scorers": ["pickscore.v1"]}, **from_it)
  latent = write("latent", rounds={"scorers": ["a.b"]}, steps={"judge": "J"})
  of = load_run.deciding_scorers
  assert of("shapes") == of(write("plain", data={"score": ""})) == of(latent) == ()
  assert of(online) == ("pickscore.v1", "hpsv2.v2_0-2.0-tensor_aa")
  best_checkpoint.write(tmp_path / "chosen", best_checkpoint.Best(2, "clip.h14-1-pil", 0.5))
  assert of(chosen, best=True) == ("hpsv2.v2_0-2.0-tensor_aa", "clip.h14-1-pil")
  # What a run's last start has found counts, because other runs may have been moved since.
  (tmp_path / "chosen").rename(tmp_path / "moved")
  found = ["pickscore.v1", "hpsv2.v2_0-2.0-tensor_aa"]
  assert of(online) == ("pickscore.v1",)
  workdir_lib.add_start(online, {"learned_from": found})
  assert of(online) == tuple(found)
  (tmp_path / "moved").rename(chosen)
  # Variants of a network are no judges of each other.
  names = ["hpsv2.v2_0_pil", "hpsv2.v2_1", "clip.h14_bf16", "pickscore.v1", "shapes.quality"]
  found = scorers.with_weights_of(names, [*of(chosen, best=True), "shapes.quality-2"])
  assert found == ["hpsv2.v2_0_pil", "clip.h14_bf16", "shapes.quality"]
  assert scorers.with_weights_of(["aesthetic.v1_hf", "aesthetic.v2"], ["aesthetic.v1"]) == [
    "aesthetic.v1_hf"
  ]


def test_a_finished_iteration_is_named_by_a_plain_number(tmp_path):
  config = {"model": {"path": "shapes"}, "train": {}, "iterate": {}}
  (tmp_path / "config.json").write_text(json.dumps(config))
  for name in ("1", "2", "007", "\u0663"):
    workdir_lib.write_text(tmp_path / load_run.ITERATIONS / name / "report.html", "")
  assert load_run.trained_in(tmp_path).name == "2"


def test_damage_is_an_error_of_its_own(tmp_path):
  with pytest.raises(DamagedError):
    workdir_lib.read_json(tmp_path / "x.json", lambda _: True)
