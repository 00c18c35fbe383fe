"""`python -m jaxpref.evaluate`: any number of models on the same prompts and noise."""

import json
import re
import shutil

import counting_scorers
import families
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from jaxpref.data import images
from jaxpref.evaluate import program
from jaxpref.evaluation import image_files, sampling, score_rows, statistics


@pytest.fixture(scope="module")
def noisy(tiny_pipeline, tmp_path_factory):
  """A model with the same parts, and noise added to the UNet's weights."""
  copy = tmp_path_factory.mktemp("noisy") / "pipeline"
  shutil.copytree(tiny_pipeline, copy)
  file = copy / "unet" / "diffusion_pytorch_model.safetensors"
  rng = np.random.default_rng(0)
  noise = {
    name: (x + 0.3 * rng.normal(size=x.shape).astype(x.dtype) if x.ndim > 1 else x)
    for name, x in load_file(file).items()
  }
  save_file(noise, file)
  return copy


@pytest.fixture(scope="module")
def arguments(tiny_pipeline, noisy, tmp_path_factory):
  """Arguments without --out: three models, four prompts of which two are equal, two images."""
  prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
  prompts.write_text("a ring\ntwo stars\na red circle\na ring\n")
  models = f"base={tiny_pipeline},same={tiny_pipeline},noisy={noisy}"
  return [
    *(f"--models={models}", f"--prompts={prompts}", "--steps=2", "--images-per-prompt=2"),
    *("--scorers=counting_scorers.brightness,counting_scorers.contrast", "--resamples=200"),
    *("--batch-size=8", "--guidance=4"),
  ]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
  out = tmp_path_factory.mktemp("evaluate") / "out"
  assert program.main([*arguments, f"--out={out}"]) == 0
  return out


def _results(out):
  return json.loads((out / "results.json").read_text())


def _of(results, model, key, baseline="base"):
  (found,) = (
    one["scorers"][key]
    for one in results["comparisons"]
    if (one["model"], one["baseline"]) == (model, baseline)
  )
  return found


def test_the_tables_are_those_of_the_images(finished):
  """Every image is scored for its prompt, and the results are `compare`'s on these rows."""
  rows = pd.read_parquet(finished / "scores.parquet")
  assert list(rows.columns) == list(score_rows.COLUMNS) and len(rows) == 3 * 2 * 4 * 2
  for row in rows[rows["scorer"] == "counting_scorers.brightness"].itertuples():
    file = finished / f"images/{row.model}/{row.prompt_id:05d}-{row.seed % 2:02d}.png"
    with Image.open(file) as image:
      settings = json.loads(image.info["jaxpref"])
    assert (settings["prompt"], settings["seed"]) == (row.prompt, row.seed)
    assert row.seed == 2 * row.prompt_id + row.seed % 2
    assert row.score == pytest.approx(images.decode(file).mean() / 255, abs=1e-12)
  results = _results(finished)
  again = statistics.compare(rows, model="noisy", unit="mean", resamples=200)
  for key, entry in again.items():
    assert _of(results, "noisy", key) == entry
  assert (results["prompts"], results["merged_prompts"], results["unit"]) == (3, 1, "mean")
  assert len(results["comparisons"]) == 3  # two with the baseline, and the others' own


def test_the_same_weights_win_half_and_other_weights_differ(finished):
  results = _results(finished)
  for key in ("counting_scorers.brightness-1", "counting_scorers.contrast-3"):
    same = _of(results, "same", key)
    assert (same["win_rate"], same["tie"], same["p_value"]) == (0.5, 1.0, 1.0)
    assert same["interval"][0] <= 0.5 <= same["interval"][1]
    assert _of(results, "noisy", key)["difference"] != 0
  verdicts = {one["model"]: one["verdict"]["result"] for one in results["comparisons"][:2]}
  assert verdicts["same"] == "undecided"


def test_it_continues_where_it_stopped(arguments, finished, tmp_path, monkeypatch):
  """Missing images and scores are made again, and nothing else; the results are the same.

  Models that differ in their UNet's weights share one sampler.
  """
  made = []
  make = sampling.make_generator

  def count(*args, **options):
    made.append(1)
    return make(*args, **options)

  monkeypatch.setattr(sampling, "make_generator", count)
  out = tmp_path / "out"
  shutil.copytree(finished, out)
  kept = {p: p.stat().st_mtime_ns for p in out.glob("images/*/*.png")}
  for name in ("base/00001-01", "noisy/00003-00"):
    (out / f"images/{name}.png").unlink()
    del kept[out / f"images/{name}.png"]
  file = out / "scores/noisy/counting_scorers.contrast-3.parquet"
  pd.read_parquet(file).iloc[:5].to_parquet(file)
  for name in ("results.json", "report.html"):
    (out / name).unlink()
  counting_scorers.SCORED.clear()
  assert program.main([*arguments, f"--out={out}"]) == 0
  assert sum(counting_scorers.SCORED) == 3 and len(made) == 1
  assert {p: p.stat().st_mtime_ns for p in kept} == kept
  for name in ("results.json", "scores.parquet"):
    assert (out / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.long
def test_shares_of_several_processes_are_the_whole(arguments, finished, tmp_path, capsys):
  out = tmp_path / "out"
  for i in range(3):
    assert program.main([*arguments, f"--out={out}", f"--shard={i}/3"]) == 0
  assert not (out / "results.json").exists()
  assert "share 2 of 3 is done" in capsys.readouterr().out
  counting_scorers.SCORED.clear()
  assert program.main([*arguments, f"--out={out}"]) == 0
  assert counting_scorers.SCORED == []
  for name in ("results.json", "scores.parquet"):
    assert (out / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.long
def test_a_changed_image_is_scored_again_and_a_foreign_one_refused(
  arguments, finished, tmp_path, capsys
):
  out = tmp_path / "out"
  shutil.copytree(finished, out)
  file = out / "images/noisy/00002-00.png"
  with Image.open(file) as image:
    settings = json.loads(image.info["jaxpref"])
  white = np.full((16, 16, 3), 255, np.uint8)
  file.write_bytes(image_files.to_png(white, settings))
  assert program.main([*arguments, f"--out={out}"]) == 0
  rows = pd.read_parquet(out / "scores.parquet").query("model == 'noisy' and prompt_id == 2")
  rows = rows.query("seed == 4 and scorer == 'counting_scorers.brightness'")
  assert rows["score"].item() == 1
  capsys.readouterr()
  assert program.main([*arguments, f"--out={out}", "--guidance=5"]) == 2
  assert "has other settings: guidance was 4.0, now 5.0" in capsys.readouterr().err
  Image.fromarray(white).save(file)
  assert program.main([*arguments, f"--out={out}"]) == 2
  assert "is not an image of this program" in capsys.readouterr().err


def test_the_report_shows_every_model_scorer_and_filter(finished):
  page = (finished / "report.html").read_text()
  assert "<script" not in page and "default-src 'none'" in page
  for name in ("base", "same", "noisy"):
    assert page.count(f'alt="{name}: a ring"') == 2
  assert 'id="won-2"' in page and 'id="lost-2"' in page and 'id="won-0"' not in page
  assert re.search(r'class="pair (won|lost)-2 random"', page)  # `same` neither wins nor loses
  for words in ("Score against diversity", "Each against each", "1 repeated, merged"):
    assert words in page
  assert page.count("<svg") == 4


@pytest.mark.long
def test_scores_of_other_judges_are_compared_and_marked(arguments, finished, tmp_path, capsys):
  out = tmp_path / "out"
  shutil.copytree(finished, out)
  rows = pd.read_parquet(out / "scores.parquet").query("scorer == 'counting_scorers.contrast'")
  rows = rows.assign(scorer="judge", version="7", score=rows["model"].eq("noisy") * 2.0)
  rows.loc[rows.index[0], "score"] = np.nan
  rows.drop(columns=["prompt", "category"]).to_csv(tmp_path / "judge.csv", index=False)
  flags = [*arguments, f"--out={out}", f"--scores={tmp_path / 'judge.csv'}"]
  flags.append("--features=counting_scorers.color")
  assert program.main([*flags, "--selected-by=judge"]) == 0
  assert _results(out)["diversity"]["features"] == "counting_scorers.color"
  assert "features: counting_scorers.color" in (out / "report.html").read_text()
  found = _of(_results(out), "noisy", "judge-7")
  assert (found["win"], found["dropped"], found["selected_training_data"]) == (1, 1, True)
  assert _results(out)["scorers"]["judge-7"]["imported"]
  assert "had a part in the training: no evidence" in (out / "report.html").read_text()
  # Of two versions, one had a part in the training.
  both = pd.concat([rows, rows.assign(version="8")])
  both.drop(columns=["prompt", "category"]).to_csv(tmp_path / "judge.csv", index=False)
  assert program.main([*flags, "--selected-by=judge-7"]) == 0
  versions = [_of(_results(out), "noisy", f"judge-{i}") for i in (7, 8)]
  assert [of["selected_training_data"] for of in versions] == [True, False]
  (tmp_path / "judge.csv").write_text(
    "model,prompt_id,seed,scorer,version,score\nx,0,0,j,1,1\n"
  )
  capsys.readouterr()
  assert program.main(flags) == 2
  assert "judge.csv, row 1" in capsys.readouterr().err


@pytest.mark.long
def test_images_of_genevals_prompts_lie_as_its_program_reads_them(
  tiny_pipeline, tmp_path, capsys
):
  """And its results come back as scores."""
  flags = [f"--models=base={tiny_pipeline},same={tiny_pipeline}", "--prompts=geneval"]
  flags += [
    "--num-prompts=3",
    "--steps=1",
    "--images-per-prompt=2",
    f"--out={tmp_path / 'out'}",
  ]
  assert program.main([*flags, "--resamples=50"]) == 0
  layout = tmp_path / "out/geneval/same"
  lines = []
  for i in range(3):
    about = json.loads((layout / f"{i:05d}/metadata.jsonl").read_text())
    for number in range(2):
      file = layout / f"{i:05d}/samples/{number:04d}.png"
      with Image.open(file) as image:
        assert json.loads(image.info["jaxpref"])["prompt"] == about["prompt"]
      line = {"filename": str(file), "tag": about["tag"], "prompt": about["prompt"]}
      lines.append(json.dumps(line | {"correct": number == 0, "reason": "", "metadata": ""}))
  (tmp_path / "results.jsonl").write_text("\n".join(lines))
  given = f"--geneval=base={tmp_path / 'results.jsonl'},same={tmp_path / 'results.jsonl'}"
  assert program.main([*flags, given, "--resamples=50"]) == 0
  entry = _of(_results(tmp_path / "out"), "same", "geneval-1")
  assert (entry["tuned"]["mean"], entry["tie"]) == (0.5, 1)
  found = _results(tmp_path / "out")["geneval"]
  assert list(found) == ["base", "same"] and found["same"]["overall"] == 0.5
  assert "GenEval, same\n" in capsys.readouterr().out
  assert 'id="geneval"' in (tmp_path / "out/report.html").read_text()


@pytest.mark.long
def test_an_improver_improves_another_models_images(tiny_pipeline, tmp_path, capsys):
  improver = families.write_improver(tiny_pipeline, tmp_path / "improver")
  flags = [f"--models=base={tiny_pipeline},better={improver}", "--prompts=a ring", "--steps=2"]
  flags += [f"--out={tmp_path / 'out'}", "--images-per-prompt=2", "--guidance=2"]
  assert program.main(flags) == 2
  assert "--improve=better:OTHER says whose images" in capsys.readouterr().err
  assert program.main([*flags, "--improve=better:base"]) == 0
  assert "compare them by eye" in (tmp_path / "out/report.html").read_text()
  with Image.open(tmp_path / "out/images/better/00000-01.png") as image:
    settings = json.loads(image.info["jaxpref"])
  assert settings["seed"] == 1 ^ 2**31 and settings["improved"] == "base"
  assert _results(tmp_path / "out")["comparisons"] == []


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--models=shapes"], "'shapes' is not NAME=MODEL"),
    (["--models=a=shapes,a=shapes"], "names 'a' twice"),
    (["--models=../a=shapes"], "the name '../a' becomes a folder's"),
    (["--models=a=shapes", "--baseline=b"], "--baseline=b is not a name"),
    (["--models=a=shapes", "--improve=b:a"], "'b' is not a name"),
    (["--models=a=shapes", "--improve=a"], "IMPROVER:OTHER"),
    (["--models=a=shapes", "--shard=3/3"], "I from 0 to N-1"),
    (["--models=a=shapes", "--unit=median:x"], "must be mean, single or one of"),
    (["--models=a=shapes", "--scorers=shapes.nothing"], "unknown scorer"),
    (["--models=a=shapes", "--features=clip.x"], "'clip.x' is not a name of features"),
    (["--models=a=nowhere/at/all"], "--models: a: "),
    # Before any image is generated.
    (["--models=a=shapes", "--scorers=hpsv2.v2_0"], "hpsv2.v2_0/model.safetensors is missing"),
    (["--models=a=shapes", "--scores=scores.csv"], "scores.csv"),
    (["--models=a=shapes", "--geneval=a=results.jsonl"], "results.jsonl is not a file"),
    (["--models=a=shapes", "--geneval=b=results.jsonl"], "give it as NAME=results.jsonl"),
    (["--models=a=shapes", "--geneval=a=x,a=y"], "--geneval names 'a' twice"),
    (
      ["--models=a=shapes", "--scorers=shapes.quality", "--selected-by=shapes.quality-9"],
      "--selected-by=shapes.quality-9 is not a scorer of this comparison (shapes.quality)",
    ),
    (
      ["--models=a=shapes", "--scorers=counting_scorers.contrast", "--selected-by=contrast"],
      "--selected-by=contrast is not a scorer of this comparison (counting_scorers.contrast)",
    ),
  ],
)
def test_what_cannot_be_is_one_line(flags, message, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setenv("JAXPREF_SCORERS", str(tmp_path / "scorers"))
  assert program.main([*flags, "--prompts=a ring", "--out=x"]) == 2
  err = capsys.readouterr().err
  assert message in err and err.count("\n") == 1
  assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_noise_in_the_weights_loses_on_every_scorer(tmp_path):
  """Of the bundled model: correctness and quality both fall, significantly."""
  from jaxpref.models import hub

  copy = tmp_path / "noisy"
  shutil.copytree(hub.find_pipeline("shapes"), copy)
  file = copy / "unet" / "diffusion_pytorch_model.safetensors"
  rng = np.random.default_rng(0)
  noise = {
    name: x + (0.5 * x.std() * rng.normal(size=x.shape)).astype(x.dtype)
    for name, x in load_file(file).items()
  }
  save_file(noise, file)
  flags = [f"--models=base=shapes,same=shapes,noisy={copy}", "--prompts=shapes:40"]
  flags += ["--scorers=shapes.correct,shapes.quality", "--images-per-prompt=1", "--steps=10"]
  assert program.main([*flags, f"--out={tmp_path / 'out'}", "--batch-size=40"]) == 0
  results = _results(tmp_path / "out")
  verdicts = {one["model"]: one["verdict"] for one in results["comparisons"][:2]}
  assert set(verdicts["noisy"]["lost"]) == {"shapes.correct-1", "shapes.quality-2"}
  assert verdicts["same"]["result"] == "undecided"
