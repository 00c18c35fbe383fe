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
  scale = np.array([1.0, 2.0, 0.0], np.float32)
  guided = guidance.classifier_free(conditional, cond, uncond, scale)(x_t, t)
  np.testing.assert_allclose(
    guided, without + scale[:, None] * (with_cond - without), rtol=1e-6
  )
  one_row = {"c": jnp.asarray(u[:1])}
  guided = guidance.classifier_free(conditional, cond, one_row, 3.0)(x_t, t)
  first = without[0] + 3.0 * (with_cond[0] - without[0])
  np.testing.assert_allclose(guided[0], first, rtol=1e-6)
  assert batches == [6, 6, 6]

  plain = guidance.classifier_free(conditional, cond, uncond, 1.0)(x_t, t)
  np.testing.assert_array_equal(np.float32(plain), with_cond)
  assert batches[-1] == 3
