"""The campaigns under benchmarks/, in small."""

import dataclasses
import importlib.util
import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

from jaxpref import config as config_lib
from jaxpref.evaluate import program as evaluate_program
from jaxpref.evaluation import score_rows
from jaxpref.models import pipeline

sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts there share campaign.py

import campaign  # noqa: E402
import comparison  # noqa: E402
import scoring  # noqa: E402


def _program(name):
  spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def finished(tiny_pipeline, tfds_dir, tmp_path_factory):
  """A run of one update, compared on two pictures."""
  workdir = tmp_path_factory.mktemp("runs") / "dro"
  fields = [f"model.path={tiny_pipeline}", "train.num_updates=1", "evaluate.num_prompts=2"]
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)
    patch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    flags = [f"--config.{field}" for field in fields]
    given = ["--config=configs/dro.py:tiny", f"--workdir={workdir}", *flags]
    assert campaign.main.main(given) == 0
  return workdir


@pytest.fixture
def runs_are_copies(finished, monkeypatch):
  """Every run of a campaign is that one; returns the arguments of each."""
  asked = []

  def copy(arguments):
    (workdir,) = (a.partition("=")[2] for a in arguments if a.startswith("--workdir="))
    shutil.copytree(finished, workdir)
    asked.append(arguments)
    return 0

  monkeypatch.setattr(campaign.main, "main", copy)
  return asked


def _judge_all_alike(runs, name, model, improves):
  """Gives every model the same scores of four images of two prompts, which do not exist."""
  rng = np.random.default_rng(0)
  texts = scoring.prompt_sets.load_prompts("shapes:2", seed=runs.judged["seed"])
  rows = [
    (name, i // 2, 3000 + i, texts[i // 2].text, texts[i // 2].category, scorer, version)
    for scorer, version in runs.judged["scorers"].items()
    for i in range(4)
  ]
  rows += [(name, i, 0, texts[i].text, texts[i].category, scoring.VENDI, "1") for i in (0, 1)]
  scored = [(*row, rng.random()) for row in rows]
  return pd.DataFrame(), pd.DataFrame(scored, columns=list(score_rows.COLUMNS))


@pytest.fixture
def scores_are_equal(monkeypatch):
  monkeypatch.setattr(campaign, "_judge", _judge_all_alike)
  monkeypatch.setattr(comparison, "RESAMPLES", 100)


@pytest.mark.long
def test_dro_against_sft(surroundings, tmp_path, runs_are_copies, scores_are_equal):
  program = _program("dro_vs_sft")
  arguments = [*surroundings, "--seeds", "0"]
  program.main(arguments)
  configs = [given[1] for given in runs_are_copies]
  assert configs == [f"--config=configs/{name}.py:tiny" for name in ("dro", "sft")]
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  assert results["over runs"]["dro"]["shapes.quality"]["runs"] == 1
  assert results["dro against sft"]["shapes.quality"]["tie"] == 1.0  # equal scores
  table = (tmp_path / "out" / "dro_vs_sft.md").read_text()
  assert "seeds 0." in table and "| quality |" in table
  # What is finished is not run again, not even without its workdir ...
  shutil.rmtree(tmp_path / "runs")
  program.main(arguments)
  assert len(runs_are_copies) == 2
  assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
  # ... and records of another base are not mistaken for these.
  for record in (tmp_path / "runs" / "records").glob("*.json"):
    record.write_text(json.dumps(json.loads(record.read_text()) | {"base": "another"}))
  with pytest.raises(SystemExit, match="is not finished yet"):
    program.main([*arguments, "--report"])


@pytest.fixture
def surroundings(tiny_pipeline, tfds_dir, tmp_path, monkeypatch):
  """Arguments of a campaign cut down to single updates on two pictures."""
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
  fields = [f"model.path={tiny_pipeline}", "train.num_updates=1", "evaluate.num_prompts=2"]
  folders = [f"--out={tmp_path / 'out'}", f"--runs={tmp_path / 'runs'}"]
  return [*folders, "--preset=tiny", "--set", *fields]


@pytest.mark.long
def test_methods(surroundings, tmp_path, monkeypatch):
  program = _program("methods")
  monkeypatch.setattr(program, "SIX_RATES", (1e-4,))  # in the place of six
  monkeypatch.setattr(program, "IMAGES", 4)
  monkeypatch.setattr(campaign, "VALIDATION_PROMPTS", 3)
  monkeypatch.setattr(comparison, "RESAMPLES", 100)
  arguments = [*surroundings, "evaluate.images_per_prompt=2", "--seeds", "0"]
  with pytest.raises(SystemExit, match="no method is finished"):
    program.main([*arguments, "--methods=sft", "--report"])
  program.main([*arguments, "--methods=sft"])
  out, runs = tmp_path / "out", tmp_path / "runs"
  results = json.loads((out / "results.json").read_text())
  assert len(results["methods"]["sft"]["tuned over"]) == 1 and not results["missing"]
  table = (tmp_path / "out.md").read_text()
  assert "| sft | " in table and "| base | " in table and "seeds 0." in table
  assert (out / "grid.png").stat().st_size > 1000
  # No test prompt was validated on.
  tested = set(pd.read_parquet(runs / "records" / "sft-0.parquet").prompt)
  validated = {_prompt_of(file) for file in runs.glob("grid/*/*/validation/images/*/*.png")}
  assert len(validated) == 3 and len(tested) == 2 and not validated & tested
  _compare_by_the_program(runs, results)
  # What is finished is reported beside what is not, also elsewhere, and nothing runs again.
  shutil.rmtree(runs)
  monkeypatch.setattr(campaign.main, "main", lambda _: pytest.fail("ran again"))
  monkeypatch.setattr(campaign.scoring, "generate", lambda *_: pytest.fail("generated again"))
  program.main([*arguments, "--methods", "sft", "dpo", "--report"])
  assert json.loads((out / "results.json").read_text()) == results | {"missing": {"dpo": [0]}}
  table = (tmp_path / "out.md").read_text()
  assert "Not finished, and not in the tables: dpo (seeds 0)." in table and "| sft | " in table


def _prompt_of(file):
  with Image.open(file) as image:
    return json.loads(image.info["jaxpref"])["prompt"]


def _compare_by_the_program(runs, results):
  """Compares a campaign's numbers with those of `jaxpref.evaluate` for the same images."""
  settings, model = results["judged"], _settings_of(runs / "sft-0")["model"]["path"]
  out = runs / "comparison"
  given = [f"--models=base={model},sft/seed0={runs / 'sft-0'}", f"--out={out}"]
  given += [f"--prompts=shapes:{settings['prompts']}", f"--seed={settings['seed']}"]
  given += [f"--images-per-prompt={settings['images per prompt']}"]
  given += [f"--steps={settings['steps']}", f"--guidance={settings['guidance']}"]
  given += [f"--scorers={','.join(settings['scorers'])}", "--resamples=100"]
  before = {file: file.stat().st_mtime_ns for file in out.rglob("*.p*")}
  assert len(before) == 2 * (2 * 2 + 3) and evaluate_program.main(given) == 0
  assert all(file.stat().st_mtime_ns == time for file, time in before.items())  # none anew
  found = json.loads((out / "results.json").read_text())
  entries = [found["comparisons"][0], found["diversity"]["by_prompt"]["comparisons"][0]]
  theirs = {key.rpartition("-")[0]: e for one in entries for key, e in one["scorers"].items()}
  for scorer, ours in results["against base"]["sft"].items():
    same = ours.keys() - {"holm"}  # which is over other comparisons
    assert {name: theirs[scorer][name] for name in same} == {name: ours[name] for name in same}


def _settings_of(workdir):
  return json.loads((workdir / "config.json").read_text())


@pytest.mark.long
def test_dro_ablations(surroundings, tmp_path, runs_are_copies, scores_are_equal, monkeypatch):
  program = _program("dro_ablations")
  # The other ablations take the same way, at the price of a run for each variant.
  few = {name: program.ABLATIONS[name] for name in ("margin", "experts", "sampler", "states")}
  margins = {m: few["margin"].variants[m] for m in ("1e-2", "5e-2", "1")}
  few["margin"] = dataclasses.replace(few["margin"], variants=margins)
  monkeypatch.setattr(program, "ABLATIONS", few)
  arguments = [*surroundings, "--seeds", "0"]
  program.main(arguments)
  given = [" ".join(one) for one in runs_are_copies]
  # The default is run once, whatever it stands beside.
  others = sum(len(a.variants) - 1 for a in program.ABLATIONS.values())
  assert len(set(given)) == len(given) == others + 1
  assert sum("--config.rollout.states=2 --config.train.batch_size=16" in g for g in given) == 1
  table = (tmp_path / "out.md").read_text()
  assert "| 5e-2 (default) | " in table and "| DDPM, 50 | " in table
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  assert sum(len(of["runs"]) for of in results.values()) == others + len(program.ABLATIONS)
  assert results["margin"]["against default"]["1"]["shapes.quality"]["win_rate"] == 0.5
  # Tables are written anew, and what stands around them stays.
  document = tmp_path / "out.md"
  document.write_text(f"# By hand\n\n{document.read_text()}\nThe end.\n")
  (tmp_path / "out" / "records.parquet").unlink()
  (tmp_path / "runs" / "records" / "margin-1-0.json").unlink()
  program.main([*arguments, "--report"])
  assert len(runs_are_copies) == others + 1
  text = document.read_text()
  assert text.startswith("# By hand\n") and text.endswith("\nThe end.\n")
  assert "### Experts K" in text and "### Margin" not in text  # of which a run is missing
  document.write_text("Something else")
  with pytest.raises(SystemExit, match="has no lines"):
    program.main([*arguments, "--report"])


@pytest.mark.long
def test_online(surroundings, finished, tiny_pipeline, tmp_path, monkeypatch):
  program = _program("online")
  kinds = {"iterative-4": program.Kind("iterative_dpo", 4), "dpo": program.KINDS["dpo"]}
  monkeypatch.setattr(program, "KINDS", kinds)
  tried = {"iterative-4, again": program.Kind("iterative_dpo", 4)}
  monkeypatch.setattr(program, "TRIED", tried)
  monkeypatch.setattr(program, "LARGEST", "iterative-4")
  monkeypatch.setattr(program, "GRID", [("optim.lr=1e-3", "loss.beta=20")])
  monkeypatch.setattr(program, "UPDATES", 1)
  monkeypatch.setattr(program, "ITERATIONS", 1)
  monkeypatch.setattr(program, "SCALES", {"s_I": [(3.5, 3.0)]})
  monkeypatch.setattr(program, "PICTURES", 8)
  monkeypatch.setattr(comparison, "RESAMPLES", 100)
  monkeypatch.setattr(campaign, "VALIDATION_PROMPTS", 3)
  fields = ["data.min_change=0"]  # random weights draw all alike
  arguments = ["--seeds", "0", "--improver-updates=1", "--only", *kinds]
  kept = [f for f in surroundings if not f.startswith("train.")]
  kept.append("evaluate.images_per_prompt=2")
  monkeypatch.setattr(
    program, "_arguments", _with_fields(program._arguments, "iterative_dpo", fields)
  )
  really_run = campaign.main.main

  def run(arguments):  # only the improver and the policy it teaches
    (workdir,) = (a.partition("=")[2] for a in arguments if a.startswith("--workdir="))
    if not any(part in workdir for part in ("grid", "dpo-0", "again", "without")):
      return really_run(arguments)
    shutil.copytree(finished, workdir)
    return 0

  monkeypatch.setattr(campaign.main, "main", run)
  really_judge = campaign._judge

  def judge(runs, name, *rest):  # only those that they are compared with
    real = name in ("base", "improver/seed0")
    return (really_judge if real else _judge_all_alike)(runs, name, *rest)

  monkeypatch.setattr(campaign, "_judge", judge)
  monkeypatch.setattr(campaign, "_validation_score", lambda *_: 0.5)
  drawn = []

  def draw(model, prompts, seeds, **options):  # but for the last, which says that it works
    drawn.append((model, prompts, seeds, options))
    pictures = np.random.default_rng(len(drawn)).integers(0, 256, (len(seeds), 16, 16, 3))
    return pipeline.load_pipeline(str(tiny_pipeline)), pictures.astype(np.uint8)

  really_draw = program._draw
  monkeypatch.setattr(program, "_draw", draw)
  with pytest.raises(
    SystemExit,
    match="not finished yet: base, improver 0, without reconstruction 0, iterative-4 0, dpo 0",
  ):
    program.main([*arguments, *kept, "--report"])
  program.main([*arguments, *kept])
  improved = [call for call in drawn if "shown" in call[-1]][0]
  assert really_draw(*improved[:-1], **improved[-1])[1].shape == (8, 16, 16, 3)
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  means = results["means"]
  assert {"improver", "iterative-4", "dpo", "without reconstruction"} == set(means)
  assert list(results["duels"]) == ["iterative-4 against dpo"]
  assert len(results["tuned over"]) == 1
  assert all(of["vendi.pixels"] >= 1 for of in (results["base"],))
  assert len(means["iterative-4"]["vendi.pixels"]) == 1
  table = (tmp_path / "out.md").read_text()
  assert "| iterative-4 | " in table and "| without: 3.5 | 3 | " in table
  assert "| iterative-4, again | " in table and "| without reconstruction | " in table
  assert (tmp_path / "out" / "improver.png").stat().st_size > 500
  shutil.rmtree(tmp_path / "runs")
  program.main([*arguments, *kept, "--report"])
  assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
  assert len(set(program.train_prompts(40))) == 40


def test_what_online_compares_is_sound(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  program = _program("online")
  options = campaign.make_parser("Online.", "online").parse_args([f"--runs={tmp_path}"])
  monkeypatch.setattr(campaign, "choose", lambda runs, name, given, settings: settings[-1])
  updates = set()
  for name in program.KINDS:
    arguments = program.arguments_of(name, None, options, 1)
    config, _ = config_lib.parse_args(arguments, flags={})
    config_lib.validate(config)
    assert config.seed == 1
    without = name.endswith("without reconstruction")
    if name.startswith("iterative"):
      assert (config.optim.lr, config.loss.beta) == (3e-4, 2000.0)  # the last of the grid
      of = "improver-without-reconstruction" if without else "improver"
      assert config.iterate.improver == str(tmp_path / f"{of}-1")
      assert config.iterate.num_pairs == int(re.search(r"iterative-(\d+)", name)[1])
    assert config.model.start.endswith("spin-1") == name.startswith("spin, then")
    times = config.iterate.num_iterations if "iterate" in config else 1
    updates.add((config.train.num_updates * times, config.train.batch_size))
  assert len(program.KINDS) == 9 and len(updates) == 1  # as many updates, of as many pairs
  for name in program.TRIED:
    config, _ = config_lib.parse_args(program.arguments_of(name, None, options, 0), flags={})
    config_lib.validate(config)
    assert config.iterate.improver.endswith("improver-0") and config.train.num_updates == 200


def _with_fields(function, config, fields):
  return lambda c, *rest: function(c, *rest, *(fields if c == config else []))


def test_every_ablation_is_a_sound_configuration():
  program = _program("dro_ablations")
  for ablation in program.ABLATIONS.values():
    assert sum(not fields for fields in ablation.variants.values()) == 1  # the default
    for fields in ablation.variants.values():
      flags = [f"--config.{field}" for field in fields]
      config, _ = config_lib.parse_args([f"--config={ROOT}/configs/dro.py", *flags], flags={})
      config_lib.validate(config)
    scores = {name: float(i) for i, name in enumerate(ablation.variants)}
    assert ablation.agrees is None or isinstance(ablation.agrees(scores), bool)


def test_every_grid_has_six_settings():
  program = _program("methods")
  for name, method in program.METHODS.items():
    assert len(set(program.grid_of(name))) == 6
    for setting in program.grid_of(name):
      flags = [f"--config.{field}" for field in (*method.fixed, *setting)]
      path = f"--config={ROOT}/configs/{method.config}.py"
      config, _ = config_lib.parse_args([path, *flags], flags={})
      config_lib.validate(config)
    assert program.IMAGES % method.images == 0


def test_the_fault_campaign_reports_what_it_has_found(tmp_path):
  program = _program("faults")
  assert sum(count for _, _, count in program.FAULTS.values()) >= 100
  options = types.SimpleNamespace(seed=0, out=tmp_path / "out")
  good = {"setting": "one process", "starts": 2, "said": "", "problem": ""}
  bad = good | {"problem": "it ended with other numbers"}
  found = [
    {"fault": "full disk", "number": 0, **good, "said": "jaxpref: error: no space left"},
    {"fault": "full disk", "number": 1, **bad},
    {"fault": "kill -9 at any time", "number": 0, **good},
  ]
  program.write_report(found, options)
  table = (tmp_path / "out.md").read_text()
  assert "| full disk | one process | 2 | 1 | 2.0 |" in table
  assert "| kill -9 at any time | one process | 1 | 1 | 2.0 |" in table
  assert "`jaxpref: error: no space left`" in table
  assert "- full disk 1: it ended with other numbers" in table


@pytest.mark.long
def test_saves_are_timed(tmp_path):
  out = tmp_path / "saves.json"
  _program("checkpoints").main(
    ["--megabytes=32", "--width=64", "--saves=1", f"--directory={tmp_path}", f"--out={out}"]
  )
  numbers = json.loads(out.read_text())
  assert numbers["stall synchronous"] > 0 and numbers["ratio"] > 0


@pytest.mark.long
def test_rewards(surroundings, tmp_path, monkeypatch, scores_are_equal):
  """One online method by both rewards, of which one run is real, beside a method on data."""
  program = _program("rewards")
  monkeypatch.setattr(program, "IMAGES", 16)
  monkeypatch.setattr(program, "LOOKED", 2)
  tuned = tmp_path / "tuned.json"
  tuned.write_text(json.dumps({"methods": {"sft": {"setting": ["optim.lr=2e-4"]}}}))
  really_run, asked = campaign.main.main, {}

  def run(arguments):
    (workdir,) = (a.partition("=")[2] for a in arguments if a.startswith("--workdir="))
    asked[Path(workdir).name] = arguments
    if len(asked) == 1:
      return really_run(arguments)
    shutil.copytree(tmp_path / "runs" / "awm-0", workdir)
    return 0

  monkeypatch.setattr(campaign.main, "main", run)
  given = [f for f in surroundings if f != "train.num_updates=1" and "num_prompts" not in f]
  arguments = [*given, "--seeds", "0", "1", f"--tuned={tuned}", "--only", "awm", "lpo", "sft"]
  program.main(arguments)
  of_lpo = [f"{name}-{seed}" for seed in (0, 1) for name in ("latent_reward", "lpo")]
  of_first = ["awm-0", *of_lpo[:2], "sft-0", "awm-exact-0"]
  assert list(asked) == [*of_first, "awm-1", *of_lpo[2:], "sft-1"]
  judge = tmp_path / "runs" / "latent_reward-1"
  assert f"--config.steps.judge={judge}" in asked["lpo-1"] and judge.exists()
  assert "--config.rounds.scorers=('shapes.preference',)" in asked["awm-1"]
  assert "--config.rounds.scorers=('shapes.correct',)" in asked["awm-exact-0"]
  # Two rounds of eight images, an update and a look at each.
  assert "--config.train.num_updates=2" in asked["awm-0"]
  assert {"--config.optim.lr=2e-4", "--config.seed=1"} < set(asked["sft-1"])
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  assert results["runs"]["awm, exact 0"]["KL"] > 0 and "KL" not in results["runs"]["sft 0"]
  looks = json.loads((tmp_path / "runs" / "records" / "awm-0.json").read_text())["looks"]
  assert [look["update"] for look in looks] == [0, 1, 2] and looks[0]["kl"] == 0
  assert {program.LEARNED, *program.comparison.SHOWN[:2]} < looks[2].keys()
  text = (tmp_path / "out.md").read_text()
  assert "| awm | " in text and "By the truth, seeds 0:" in text and "curves.png" in text
  assert (tmp_path / "out" / "curves.png").stat().st_size > 1000


def test_every_online_method_samples_as_many_images():
  program = _program("rewards")
  for name in (*program.ROUNDS, *program.THROUGH):
    config = config_lib.load_config(f"{name}:shapes")
    updates = program.updates_of(config)
    images = config.train.batch_size
    if "rounds" in config:
      images = config.rounds.num_prompts * config.rounds.images_per_prompt
      updates //= config.rounds.updates
    assert updates * images == program.IMAGES, name
