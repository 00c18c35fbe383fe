"""Losses against float64 numpy from the equations, gradients by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses
from jaxpref.errors import UserError

RNG = np.random.default_rng(7)
ERR_E, ERR_P, REF_E, REF_P = RNG.uniform(0.0, 1.0, (4, 64))
MARGIN = 1e-3


def _dro64(err_e, err_p, ref_e, ref_p, margin):
  return np.maximum((err_e - ref_e) - (err_p - ref_p) + margin, 0.0)


def test_dro_matches_the_equation():
  got = losses.dro_loss(ERR_E, ERR_P, REF_E, REF_P, margin=MARGIN)
  want = _dro64(ERR_E, ERR_P, REF_E, REF_P, MARGIN)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
  assert (want == 0).any() and (want > 0).any()  # both sides of the hinge are there


def test_dro_by_hand():
  # (0.5 - 0.4) - (0.3 - 0.25) + 0.01 = 0.06; (0.1 - 0.4) - 0 + 0.01 < 0.
  got = losses.dro_loss(
    *(jnp.array(v) for v in ([0.5, 0.1], [0.3, 0.2], [0.4, 0.4], [0.25, 0.2])), margin=0.01
  )
  np.testing.assert_allclose(got, [0.06, 0.0], atol=1e-7)


def test_dro_is_its_margin_where_policy_is_reference():
  got = losses.dro_loss(ERR_E, ERR_P, ERR_E, ERR_P, margin=MARGIN)
  np.testing.assert_allclose(got, MARGIN, rtol=1e-5)


def test_dro_gradient_is_that_of_the_error_difference_where_active():
  gradient = jax.grad(
    lambda e, p: losses.dro_loss(e, p, REF_E, REF_P, margin=MARGIN).sum(), argnums=(0, 1)
  )(jnp.asarray(ERR_E), jnp.asarray(ERR_P))
  active = _dro64(ERR_E, ERR_P, REF_E, REF_P, MARGIN) > 0
  np.testing.assert_array_equal(gradient[0], active.astype(np.float32))
  np.testing.assert_array_equal(gradient[1], -active.astype(np.float32))


def test_dro_is_finite_at_extremes():
  big = jnp.full((2,), 1e30, jnp.float32)
  got = losses.dro_loss(big, 0 * big, 0 * big, big, margin=1.0)
  assert np.isfinite(np.asarray(got)).all()


def test_dro_metrics():
  module = losses.load_loss("dro")
  err = {"e": jnp.array([0.5, 0.1]), "p": jnp.array([0.3, 0.2])}
  ref = {"e": jnp.array([0.4, 0.4]), "p": jnp.array([0.25, 0.2])}
  loss, metrics = module.objective(err, ref, margin=0.01)
  np.testing.assert_allclose(loss, [0.06, 0.0], atol=1e-7)
  np.testing.assert_allclose(metrics["rewards/margin"], [-0.05, 0.3], atol=1e-6)
  np.testing.assert_allclose(metrics["rewards/accuracy"], [0.0, 1.0])
  np.testing.assert_allclose(metrics["dro/active"], [1.0, 0.0])


def test_sft_is_the_error():
  np.testing.assert_array_equal(losses.sft_loss(jnp.asarray(ERR_E)), np.float32(ERR_E))
  loss, metrics = losses.load_loss("sft").objective({"e": jnp.asarray(ERR_E)}, {})
  np.testing.assert_array_equal(loss, np.float32(ERR_E))
  assert metrics == {}


@pytest.mark.parametrize("name", ["dor", "jaxpref.losses.nothing", "no.such.module"])
def test_unknown_loss_is_one_line_and_names_what_there_is(name):
  with pytest.raises(UserError, match="dro, sft") as error:
    losses.load_loss(name)
  assert "\n" not in str(error.value)


def test_arms_that_no_step_feeds_are_refused(monkeypatch):
  monkeypatch.setattr(losses.load_loss("dro"), "ARMS", ("w", "l", "p"))
  with pytest.raises(UserError, match="ARMS"):
    losses.load_loss("dro")


def test_a_loss_from_elsewhere_loads_by_its_dotted_path():
  assert losses.load_loss("jaxpref.losses.dro").dro_loss is losses.dro_loss
