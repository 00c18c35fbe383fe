"""Scorers as differentiable functions: values as the scorers', gradients as PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scorer_models
from conftest import live
from test_scorers import of_values

from jaxpref import scorers
from jaxpref.errors import UserError
from jaxpref.scorers import aesthetic, clip, hpsv2, imagereward, pickscore

FAMILIES = (aesthetic, clip, hpsv2, imagereward, pickscore)
REWARDS = [f"{m.__name__.rpartition('.')[2]}.{n}" for m in FAMILIES for n in m.REWARDS]
PROMPTS = scorer_models.PROMPTS[:2]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  with scorer_models.written_all(tmp_path_factory.mktemp("scorers")) as directory:
    yield directory


@pytest.fixture(scope="module")
def images():
  """Two crops that are resized and cropped; float32 [2, 240, 310, 3] in [0, 1]."""
  found = [image[:240, 60:370] for image in scorer_models.photographs()[:2]]
  return np.stack(found) / np.float32(255)


# The other ones are the same programs with other weights.
QUICK, SLOW = ("pickscore.v1", "imagereward.v1"), ("clip.l14", "aesthetic.v2")


@live
@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.long) for n in QUICK + SLOW]
)
def test_scores_and_gradients_are_pytorchs(name, root, images):
  import scorer_witness
  import torch

  pixels = torch.tensor(images).permute(0, 3, 1, 2).requires_grad_()
  values = scorer_witness.normalized(
    scorer_witness.interpolate_and_crop(pixels, antialias=True)
  )
  want = of_values(name, root, values, PROMPTS)
  want.sum().backward()
  want_grad = pixels.grad.permute(0, 2, 3, 1).numpy()
  params, tokenize, score = scorers.load_reward(name)

  @jax.jit
  def both(params, images, tokens):
    found = score(params, images, tokens)
    grad = jax.grad(lambda x: score(params, x, tokens).sum())(images)
    return found, grad

  got, grad = both(params, images, tokenize(PROMPTS))
  assert got.dtype == grad.dtype == jnp.float32
  np.testing.assert_allclose(got, want.detach(), rtol=1e-4, atol=1e-4 * abs(want).max().item())
  scale = np.abs(want_grad).max()
  assert scale > 1e-5
  np.testing.assert_allclose(grad / scale, want_grad / scale, atol=1e-4)
  # Outside of the crop nothing matters.
  assert (np.asarray(grad)[:, :, 0] == 0).all() and (np.asarray(grad)[:, :, 40:270] != 0).any()


@pytest.mark.long
def test_an_image_of_the_right_size_has_the_scorers_score(root):
  squares = np.stack([image[:224, :224] for image in scorer_models.photographs()[:2]])
  for name in ("hpsv2.v2_1", "aesthetic.v1"):
    params, tokenize, score = scorers.load_reward(name)
    tokens = tokenize(PROMPTS)
    assert all(len(leaf) == 2 for leaf in jax.tree.leaves(tokens))
    _, scorer = scorers.load_scorers([name])[name]
    want = scorer(squares, PROMPTS)
    got = jax.jit(score)(params, squares / np.float32(255), tokens)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_a_gradient_is_the_slope(root, images):
  params, tokenize, score = scorers.load_reward("imagereward.v1")
  tokens = tokenize(PROMPTS)
  value = jax.jit(lambda x: score(params, x, tokens).sum())
  grad = np.asarray(jax.jit(jax.grad(value))(images), np.float64)
  step = 1e-2 * grad / np.linalg.norm(grad)
  slope = (float(value(images + step)) - float(value(images - step))) / 2
  np.testing.assert_allclose(slope, np.sum(grad * step), rtol=0.05)


@pytest.mark.long
def test_bfloat16_parameters(root, images):
  wide, narrow = (scorers.load_reward("pickscore.v1", dtype=d) for d in ("float32", "bfloat16"))
  kinds = {leaf.dtype.name for leaf in jax.tree.leaves(narrow.params)}
  assert kinds == {"bfloat16", "float32"}  # the logit scale stays wide
  tokens = wide.tokenize(PROMPTS)
  want, got = (jax.jit(r.score)(r.params, images, tokens) for r in (wide, narrow))
  np.testing.assert_allclose(got, want, atol=1.0)


def test_unknown_rewards_are_refused(root):
  with pytest.raises(UserError, match=r"'clip.h15' is not .*known are aesthetic.v1, aesthetic"):
    scorers.load_reward("clip.h15")
  with pytest.raises(UserError, match="'shapes.correct' is not a differentiable scorer"):
    scorers.load_reward("shapes.correct")
  assert {*QUICK, *SLOW} < {*REWARDS} and len(REWARDS) == 8
