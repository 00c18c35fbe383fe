"""Pictures of a model, the choice of prompts, and pretraining's own promises."""

import jax
import numpy as np
import pytest

from jaxpref import sharding
from jaxpref.data import encode
from jaxpref.errors import UserError
from jaxpref.evaluation import prompt_sets, sampling
from jaxpref.models import pipeline
from jaxpref.scorers import shapes
from jaxpref.shapes import prompts as shapes_prompts


def test_a_picture_depends_on_its_prompt_and_seed_alone(tiny_pipeline):
  loaded = pipeline.load_pipeline(str(tiny_pipeline))
  mesh = sharding.make_mesh()
  prompts = ["a ring", "two stars", "a red circle", "a cross", "a ring"]
  seeds = [7, 8, 9, 10, 8]
  cond = encode.encode_prompts(loaded, mesh, prompts)
  told: list[int] = []
  images = {}
  for size in (2, 5):
    # Guidance that makes a random network's faint answer to a prompt visible.
    run = sampling.make_generator(loaded, mesh, num_steps=2, guidance=30.0, batch_size=size)
    images[size] = run(loaded.params["unet"], cond, seeds, told.append)
  assert told == [2, 4, 5, 5]
  assert images[5].shape == (5, 16, 16, 3) and images[5].dtype == np.uint8
  # Other batch sizes are other programs: at most one step of 255 apart, by rounding.
  assert np.abs(images[2].astype(int) - images[5].astype(int)).max() <= 1
  assert (images[5][0] != images[5][4]).any()  # same prompt, other seed
  assert (images[5][1] != images[5][4]).any()  # same seed, other prompt
  broken = jax.tree.map(lambda x: x * np.float32(3e37), loaded.params["unet"])
  with pytest.raises(
    sampling.NonFiniteError,
    match="5 of 5 images .* first the image of 'a ring'",
  ):
    run(broken, cond, seeds, names=prompts)


@pytest.mark.long
def test_the_bundled_pipeline_draws_what_it_is_asked_for():
  base = pipeline.load_pipeline("shapes")
  mesh = sharding.make_mesh()
  texts = shapes_prompts.held_out(64)
  program = sampling.make_generator(base, mesh, num_steps=12, guidance=4.0, batch_size=64)
  cond = encode.encode_prompts(base, mesh, texts)
  images = program(base.params["unet"], cond, sampling.seeds_of(64, 1, seed=0))
  # Any two prompts agree by chance far less often.
  assert shapes.correct(images, texts).mean() > 0.2
  assert shapes.correct(images, texts[1:] + texts[:1]).mean() < 0.1


def test_seeds_are_all_different():
  seeds = sampling.seeds_of(5, 3, seed=100)
  assert len(set(seeds.tolist())) == 15 and seeds[0] == 100


def test_choose_prompts(tmp_path):
  captions = ["b", "a", "c"]
  assert sorted(prompt_sets.choose_prompts("captions", 9, captions, seed=0)) == ["a", "b", "c"]
  file = tmp_path / "prompts.txt"
  file.write_text("one\n\n two \none\n")
  assert sorted(prompt_sets.choose_prompts(str(file), 9, [], seed=0)) == ["one", "two"]
  assert len(prompt_sets.choose_prompts("shapes", 30, [], seed=0)) == 30
  # Sets by name, and tables: of all categories, each prompt once.
  texts = {prompt.text for prompt in prompt_sets.load_prompts("partiprompts")}
  assert set(prompt_sets.choose_prompts("partiprompts", 10**4, [], seed=0)) == texts
  table = tmp_path / "prompts.tsv"
  table.write_text("Prompt\tCategory\na ring\tx\na star\ty\na ring\tx\n")
  assert sorted(prompt_sets.choose_prompts(str(table), 9, [], seed=0)) == ["a ring", "a star"]
  some, others = (prompt_sets.choose_prompts("shapes:7", 9, [], seed=i) for i in (0, 1))
  assert len(some) == len(others) == 7 and set(some) != set(others)


@pytest.mark.parametrize(
  ("source", "number", "message"),
  [
    ("shapes", 10**6, "test prompts"),
    ("/nowhere.txt", 3, "cannot read /nowhere.txt"),
    ("a ring", 3, "cannot read a ring"),  # not a prompt, which may be a misspelt file
    ("pickapic-validation", 3, "name their file as pickapic-validation:PATH"),
  ],
)
def test_prompts_that_there_are_not(source, number, message):
  with pytest.raises(UserError, match=message):
    prompt_sets.choose_prompts(source, number, [], seed=0)
