"""The improvement model: its tasks row by row, and pictures improved from the command line."""

import functools
import json

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from jaxpref import generate, losses, main
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.losses import improver
from jaxpref.training import batch as batch_lib

ROWS, SHAPE = 3000, (1, 2, 2)
WEIGHTS = {"weight_winning": 3.0, "weight_reconstruction": 2.0, "weight_unconditional": 1.0}


def batch():
  """Images and prompts that tell by their numbers which they are."""
  number = np.arange(1, ROWS + 1, dtype=np.float32)[:, None, None, None]
  latents = np.stack([np.broadcast_to(s * number, (ROWS, *SHAPE)) for s in (1, -1)], axis=1)
  cond = {"text": np.broadcast_to(number[..., 0], (ROWS, 1, 1))}
  return latents, cond, {"text": np.zeros((1, 1, 1), np.float32)}


def test_tasks_row_by_row():
  latents, cond, empty = batch()
  arranged = improver.arrange(latents, cond, empty, jax.random.key(3), **WEIGHTS)
  task = np.asarray(arranged.labels["task"])
  target, image = np.asarray(arranged.x0)[:, 0], np.asarray(arranged.image)
  told = np.asarray(arranged.cond["text"])
  for i in range(ROWS):
    winner, loser = latents[i]
    if task[i] == 0:
      want = (winner, loser, cond["text"][i])
    else:
      own = target[i]
      assert (own == winner).all() or (own == loser).all()
      want = (own, own if task[i] == 1 else np.zeros(SHAPE), np.zeros((1, 1)))
    for got, expected in zip((target[i], image[i], told[i]), want, strict=True):
      np.testing.assert_array_equal(got, expected)
  # As often as asked, and winners as often as losers: five sigma.
  shares = np.bincount(task, minlength=3) / ROWS
  assert np.abs(shares - np.array([3, 2, 1]) / 6).max() < 5 * 0.5 / np.sqrt(ROWS)
  for kind in (1, 2):
    of_winners = (target[task == kind, 0, 0, 0] > 0).mean()
    assert abs(of_winners - 0.5) < 5 * 0.5 / np.sqrt((task == kind).sum())


@pytest.mark.parametrize("task", range(3))
def test_a_task_of_weight_zero_is_not_drawn(task):
  weights = dict(zip(WEIGHTS, np.eye(3)[task].tolist(), strict=True))
  arranged = improver.arrange(*batch(), jax.random.key(0), **weights)
  assert (np.asarray(arranged.labels["task"]) == task).all()


def test_a_step_noises_the_target_and_shows_the_image_clean():
  latents, cond, empty = batch()
  arrange = functools.partial(improver.arrange, **WEIGHTS)
  arms = batch_lib.make_arms(
    schedule_lib.make_schedule(),
    improver.NEEDS,
    {"latents": latents, "cond": cond},
    None,
    empty,
    seed=0,
    update=7,
    prompt_dropout=0.0,
    arrange=arrange,
  )
  assert arms.x_t.shape == (ROWS, 1, *SHAPE)
  alpha_bar = np.asarray(schedule_lib.make_schedule().alpha_bar)[arms.t][:, None, None, None]
  noise = np.asarray(arms.target)[:, 0]
  clean = (np.asarray(arms.x_t)[:, 0] - np.sqrt(1 - alpha_bar) * noise) / np.sqrt(alpha_bar)
  task = np.asarray(arms.labels["task"])
  image = np.asarray(arms.cond["image"])
  number = np.abs(latents[:, 0])
  early = np.asarray(arms.t) < 500  # where what is left of the image is not rounded away
  winning, rest = (task == 0) & early, (task == 1) & early
  np.testing.assert_allclose(clean[winning], number[winning], rtol=1e-3, atol=1e-2)
  np.testing.assert_array_equal(image[winning], -number[winning])
  np.testing.assert_allclose(clean[rest], image[rest], rtol=1e-3, atol=1e-2)
  assert not image[task == 2].any()


def test_errors_by_task_are_means_over_their_rows():
  err, task = np.array([1.0, 2.0, 3.0, 6.0]), np.array([0, 1, 0, 0])
  terms = losses.Terms({"x": jnp.asarray(err)}, {}, {"task": jnp.asarray(task)}, jnp.mean)
  loss, metrics = improver.objective(terms)
  np.testing.assert_array_equal(loss, err)
  means = {name: float(value.mean()) for name, value in metrics.items()}
  assert means == pytest.approx(
    {"err/winning": 10 / 3, "err/reconstruction": 2.0, "err/unconditional": 0.0}
  )


@pytest.fixture(scope="module")
def improving(tiny_pipeline, tmp_path_factory):
  return families.write_improver(tiny_pipeline, tmp_path_factory.mktemp("x") / "pipeline")


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(1)
  (tmp_path / "mine" / "deeper").mkdir(parents=True)
  for name in ("a", "deeper/b"):
    pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mine" / f"{name}.png")
  (tmp_path / "mine" / "a.txt").write_text("a red circle")
  return tmp_path / "mine"


def draw(capsys, *flags):
  assert generate.main([*flags, "--steps=2"]) == 0, capsys.readouterr().err
  return capsys.readouterr().out


@pytest.mark.long
def test_a_folder_of_pictures_is_improved(improving, folder, tmp_path, capsys):
  flags = (f"--improver={improving}", f"--images={folder}")
  out = tmp_path / "out"
  said = draw(capsys, *flags, f"--out={out}", "--prompts=two stars")
  assert "2 images" in said and "2 of them new" in said
  assert sorted(p.name for p in out.iterdir()) == ["a-00.png", "deeper-b-00.png"]
  settings = json.loads(Image.open(out / "a-00.png").info["jaxpref"])
  assert settings["prompt"] == "two stars" and settings["image_guidance"] == 3.0
  # What is drawn stays, and only another picture under the name is refused.
  assert "0 of them new" in draw(capsys, *flags, f"--out={out}", "--prompts=two stars")
  # The caption beside a picture is its prompt, and pictures without are named.
  said = draw(capsys, *flags, f"--out={tmp_path / 'told'}")
  assert "1 image in" in said and f"1 of 2 in {folder} left out" in said
  assert [p.name for p in (tmp_path / "told").iterdir()] == ["a-00.png"]
  told = json.loads(Image.open(tmp_path / "told" / "a-00.png").info["jaxpref"])
  assert told["prompt"] == "a red circle" and told["seed"] == settings["seed"]
  picture = lambda where: np.asarray(Image.open(tmp_path / where / "a-00.png"), int)  # noqa: E731
  draw(capsys, *flags, f"--out={tmp_path / 'far'}", "--image-guidance=60")
  assert np.abs(picture("far") - picture("told")).max() > 1
  (folder / "a.txt").rename(tmp_path / "a.txt")
  assert generate.main([*flags, f"--out={tmp_path / 'told'}"]) == 2
  assert 'set one prompt for all with --prompts="..."' in capsys.readouterr().err
  (tmp_path / "a.txt").rename(folder / "a.txt")
  Image.new("RGB", (24, 20)).save(folder / "a.png")
  again = [*flags, f"--out={tmp_path / 'told'}", "--steps=2"]
  assert generate.main(again) == 2
  assert "a-00.png has other settings: improved was" in capsys.readouterr().err


@pytest.mark.long
def test_what_is_improved_depends_on_picture_and_seed_alone(
  improving, folder, tmp_path, capsys
):
  flags = (f"--improver={improving}", f"--images={folder}", "--prompts=a ring")
  draw(capsys, *flags, f"--out={tmp_path / 'one'}", "--batch-size=1")
  draw(capsys, *flags, f"--out={tmp_path / 'two'}", "--batch-size=2")
  for file in (tmp_path / "one").iterdir():
    assert json.loads(Image.open(file).info["jaxpref"])["guidance"] == 3.5
    a, b = (np.asarray(Image.open(p), int) for p in (file, tmp_path / "two" / file.name))
    assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--improver={improver}", "--prompts=a"], "--improver and --images go together"),
    (["--model={base}", "--images={folder}"], "--improver and --images go together"),
    (["--model={base}", "--improver={improver}"], "set either --model or --improver"),
    (["--prompts=a"], "set either --model or --improver"),
    (["--improver={base}", "--images={folder}"], "is not an improver"),
    (["--model={improver}", "--prompts=a"], "is an improver: use --improver"),
    (["--model={base}", "--prompts=a", "--image-guidance=2"], "needs --improver"),
    (["--improver={improver}", "--images={folder}", "--size=32"], "--size does not go with"),
    (["--improver={improver}", "--images=/nowhere"], "--images '/nowhere' is not a folder"),
    (["--improver={improver}", "--images={folder}", "--image-guidance=-1"], "at least 0"),
    (["--improver={improver}", "--images={folder}", "--out={folder}/x"], "is inside --images"),
    (["--improver={improver}", "--images={folder}", "--prompts=setup.py.txt"], "cannot read"),
  ],
)
def test_what_cannot_be_improved(
  flags, message, improving, tiny_pipeline, folder, tmp_path, capsys
):
  names = {"improver": improving, "base": tiny_pipeline, "folder": folder}
  given = [flag.format(**names) for flag in flags]
  assert generate.main([f"--out={tmp_path / 'x'}", *given]) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "x").exists()


def test_an_improver_is_not_trained_as_a_model(improving, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  flags = [f"--config.model.path={improving}", f"--workdir={tmp_path / 'run'}"]
  assert main.main(["--config=configs/sft.py:tiny", *flags]) == 2
  assert "is an improver: only --config=improver" in capsys.readouterr().err
