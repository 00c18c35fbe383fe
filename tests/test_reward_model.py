"""Latent reward models: features against PyTorch's, rewards and loss from their equations."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import live

from jaxpref.data import row_set
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.errors import UserError
from jaxpref.losses import latent_reward
from jaxpref.models import load_pipeline, reward_model, unet
from jaxpref.training import judge_evaluator


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
  return load_pipeline(str(tiny_pipeline))


def inputs_of(pipeline, rows=2):
  rng = np.random.default_rng(3)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  cond = {name: draw(*of.shape) for name, of in pipeline.abstract_cond(rows).items()}
  return draw(rows, *pipeline.latent_shape), np.array([3, 981][:rows]), cond


def check_features(directory):
  """Compares the outputs of all blocks with those that PyTorch's blocks return."""
  import torch
  from diffusers import UNet2DConditionModel

  found = load_pipeline(str(directory))
  x_t, t, cond = inputs_of(found)
  encode = jax.jit(unet.make_encode(found.modules["unet"]))
  ours = encode(unet.encoder_params(found.params["unet"]), x_t, t, cond)
  model = UNet2DConditionModel.from_pretrained(directory / "unet").eval()
  seen = []
  for block in (*model.down_blocks, model.mid_block):
    block.register_forward_hook(
      lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
  given = {name: torch.tensor(of) for name, of in cond.items()}
  added = None
  if "pooled" in given:
    added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
  with torch.no_grad():
    model(torch.tensor(x_t), torch.tensor(t), given["text"], added_cond_kwargs=added)
  assert len(ours) == len(seen) == len(model.down_blocks) + 1
  for one, other in zip(ours, seen, strict=True):
    want = other.numpy().transpose(0, 2, 3, 1)
    assert np.linalg.norm(one - want) <= 1e-4 * np.linalg.norm(want)


@live
def test_features_equal_pytorchs(tiny_pipeline):
  check_features(tiny_pipeline)


@live
@pytest.mark.long
def test_features_of_sdxl_equal_pytorchs(tmp_path):
  check_features(families.write_pipeline("sdxl", tmp_path, shallow=True))


def test_the_reward_is_a_scaled_cosine(pipeline):
  """From the features, in float64; only those of the last block are guided."""
  x_t, t, cond = inputs_of(pipeline)
  base = pipeline.params["unet"]
  params = reward_model.init_params(pipeline, base, jax.random.key(1), width=8)
  uncond = jax.tree.map(lambda x: np.flip(x[:1], axis=1), cond)
  encode = jax.jit(unet.make_encode(pipeline.modules["unet"]))
  pooled = [
    [np.float64(of).mean((1, 2)) for of in encode(params["encoder"], x_t, t, given)]
    for given in (jax.tree.map(lambda x: np.repeat(x, 2, axis=0), uncond), cond)
  ]
  text = np.float64(cond["text"]).mean(axis=1) @ np.float64(params["text"])
  for scale in (1.0, 4.0):
    last = pooled[0][-1] + scale * (pooled[1][-1] - pooled[0][-1])
    image = np.concatenate([*pooled[1][:-1], last], axis=1) @ np.float64(params["image"])
    norms = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
    want = (image * text).sum(axis=1) / norms / 0.07
    score = jax.jit(reward_model.make_score(pipeline, guidance=scale))
    np.testing.assert_allclose(score(params, x_t, t, cond, uncond), want, rtol=1e-4, atol=1e-4)


def test_every_parameter_is_trained(pipeline):
  x_t, t, cond = inputs_of(pipeline)
  params = reward_model.init_params(
    pipeline, pipeline.params["unet"], jax.random.key(1), width=8
  )
  score = reward_model.make_score(pipeline, guidance=1.0)
  gradients = jax.jit(jax.grad(lambda p: score(p, x_t, t, cond, None).sum()))(params)
  still = [
    jax.tree_util.keystr(path)
    for path, of in jax.tree_util.tree_leaves_with_path(gradients)
    if not np.abs(of).max() > 0
  ]
  assert not still, "a parameter has no influence on the reward"


def test_pooled_text_is_the_models_own_if_there_is_one():
  text = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
  mean = reward_model.pool_text({"text": text})
  np.testing.assert_allclose(mean, text.mean(axis=1), rtol=1e-6)
  own = reward_model.pool_text({"text": text, "pooled": text[:, 0]})
  np.testing.assert_array_equal(own, text[:, 0])


def test_the_loss_is_that_of_bradley_and_terry():
  rng = np.random.default_rng(0)
  good, bad = rng.normal(scale=3, size=(2, 50))
  want = np.log1p(np.exp(bad - good))
  got = latent_reward.pair_loss(jnp.float32(good), jnp.float32(bad))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  slopes = jax.vmap(jax.grad(latent_reward.pair_loss))(jnp.float32(good), jnp.float32(bad))
  np.testing.assert_allclose(slopes, -1 / (1 + np.exp(good - bad)), rtol=1e-4)
  assert latent_reward.pair_loss(1.0, 1.0) == pytest.approx(np.log(2))
  # Rewards of far apart images neither overflow nor lose the slope.
  assert latent_reward.pair_loss(-500.0, 500.0) == pytest.approx(1000)


def test_margins_have_equal_noise(pipeline):
  """A reward that is linear in the latents does not see the noise that both images share."""
  schedule, rng = pipeline.schedule, np.random.default_rng(0)
  x0 = rng.standard_normal((3, 2, *pipeline.latent_shape)).astype(np.float32)
  batch = {"latents": x0, "cond": {"text": np.zeros((3, 1, 1), np.float32)}}

  def score(params, x_t, t, cond, uncond):
    return params * x_t.sum(axis=(1, 2, 3)) + t  # the level is the same for both

  for level in (0, 700):
    got = judge_evaluator._margins(score, schedule, 5, 2.0, batch, None, jnp.int32(level), 0)
    alpha = np.sqrt(np.float64(schedule.alpha_bar[level]))
    sums = np.float64(x0).sum(axis=(2, 3, 4))
    np.testing.assert_allclose(got, 2 * alpha * (sums[:, 0] - sums[:, 1]), rtol=1e-3, atol=1e-3)
  assert schedule_lib.level_dtype(schedule) == jnp.int32


def _rows(captions):
  image = np.zeros((8, 8, 3), np.uint8)
  return row_set.collect([row_set.Row((image + i, image), c) for i, c in enumerate(captions)])


def test_white_space_makes_no_other_caption():
  rows = _rows([f"caption{' ' * (1 + i % 2)}{i // 2}" for i in range(60)])
  rest, held = row_set.hold_out(rows, 6, seed=0)
  assert len(held) == 6 and not rest.has_caption_in(held.used_captions())


def test_held_out_rows_have_captions_of_their_own():
  rows = _rows([f"caption {i // 3}" for i in range(60)])
  rest, held = row_set.hold_out(rows, 7, seed=4)
  assert len(held) == 9 and len(rest) == 51  # three captions, whole
  ours, theirs = ({of.caption_of(i) for i in range(len(of))} for of in (held, rest))
  assert len(ours) == 3 and not ours & theirs
  again = row_set.hold_out(rows, 7, seed=4)[1]
  np.testing.assert_array_equal(again.image, held.image)
  assert (row_set.hold_out(rows, 7, seed=5)[1].image != held.image).any()
  # A row keeps its images and caption.
  number = int(held.image[0, 0]) // 2
  assert held[0].caption == f"caption {number // 3}" and held[0].images[0].max() == number


@pytest.mark.parametrize("least", [31, 1000])
def test_at_least_half_of_the_rows_are_trained_on(least):
  with pytest.raises(UserError, match=f"judge.held_out = {least} leaves .* of 60"):
    row_set.hold_out(_rows([f"caption {i}" for i in range(60)]), least, seed=0)
