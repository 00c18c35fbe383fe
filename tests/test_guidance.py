"""Classifier-free guidance against its formula, and the batches it asks for."""

import jax.numpy as jnp
import numpy as np

from jaxpref.diffusion import guidance


def test_guidance_is_one_doubled_call():
  rng = np.random.default_rng(5)
  x_t, c, u = (rng.standard_normal((3, 4)).astype(np.float32) for _ in range(3))
  t = jnp.array([1, 2, 3])
  batches = []

  def conditional(x_t, t, cond):
    batches.append(x_t.shape[0])
    return (x_t * cond["c"] + t[:, None]).astype(jnp.bfloat16)

  cond, uncond = {"c": jnp.asarray(c)}, {"c": jnp.asarray(u)}
  with_cond, without = (
    np.float32((jnp.asarray(x_t) * z + t[:, None]).astype(jnp.bfloat16)) for z in (c, u)
  )
  guided = guidance.classifier_free(conditional, cond, uncond, 7.5)(x_t, t)
  assert guided.dtype == jnp.float32
  np.testing.assert_allclose(guided, without + 7.5 * (with_cond - without), rtol=1e-6)
  scale = np.array([1.0, 2.0, 0.0], np.float32)  # a scale for each sample; at most 1: none
  guided = guidance.classifier_free(conditional, cond, uncond, scale)(x_t, t)
  pushed = np.array([1.0, 2.0, 1.0])[:, None]
  np.testing.assert_allclose(guided, without + pushed * (with_cond - without), rtol=1e-6)
  one_row = {"c": jnp.asarray(u[:1])}
  guided = guidance.classifier_free(conditional, cond, one_row, 3.0)(x_t, t)
  first = without[0] + 3.0 * (with_cond[0] - without[0])
  np.testing.assert_allclose(guided[0], first, rtol=1e-6)
  assert batches == [6, 6, 6]

  for scale in (0, 0.0, 0.5, 1, 1.0):  # no guidance, as diffusers has it, in one plain call
    plain = guidance.classifier_free(conditional, cond, uncond, scale)(x_t, t)
    np.testing.assert_array_equal(np.float32(plain), with_cond)
    assert batches[-1] == 3


def test_two_guidances_are_one_tripled_call():
  """The formula in float64, on predictions that are random for each way of being told."""
  rng = np.random.default_rng(6)
  told, image, x_t = (rng.standard_normal((3, 2, 2, 2)).astype(np.float32) for _ in range(3))
  t, empty = jnp.array([1, 2, 3]), rng.standard_normal((1, 2, 2, 2)).astype(np.float32)
  weights = rng.standard_normal(4)
  batches = []

  def predict(x_t, t, cond):
    t = np.reshape(t, (-1, 1, 1, 1)) if isinstance(t, np.ndarray) else t[:, None, None, None]
    inputs = (x_t, t, cond["c"], cond["image"] * x_t)
    return sum(w * v for w, v in zip(weights, inputs, strict=True))

  def conditional(x_t, t, cond):
    batches.append(x_t.shape[0])
    return predict(x_t, t, cond)

  def guided(text_scale, image_scale):
    return guidance.by_text_and_image(
      *(conditional, {"c": jnp.asarray(told)}, {"c": jnp.asarray(empty)}, jnp.asarray(image)),
      text_scale=text_scale,
      image_scale=image_scale,
    )(x_t, t)

  wide = lambda a: np.float64(np.broadcast_to(a, x_t.shape))  # noqa: E731
  at = lambda c, x: predict(wide(x_t), np.float64(t), {"c": wide(c), "image": wide(x)})  # noqa: E731
  neither, shown, both = at(empty, 0.0), at(empty, image), at(told, image)
  for s_t, s_i in ((3.5, 3.0), (0.0, 2.0), (1.5, 0.0)):
    want = neither + s_i * (shown - neither) + s_t * (both - shown)
    np.testing.assert_allclose(guided(s_t, s_i), want, rtol=2e-5, atol=1e-5)
  assert batches == [9, 9, 9]
  np.testing.assert_allclose(guided(1.0, 1.0), both, rtol=1e-5, atol=1e-6)
  assert batches[-1] == 3  # the plain prediction with both
  # By the formula as well, where the scales are no Python numbers.
  np.testing.assert_allclose(
    guided(jnp.float32(1.0), jnp.float32(1.0)), both, rtol=1e-5, atol=1e-5
  )
