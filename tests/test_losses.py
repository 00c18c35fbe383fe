"""Losses against float64 numpy from the equations, values and gradients; and invariances."""

import json
import sys
from pathlib import Path

import equations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from jaxpref import losses
from jaxpref.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

import make_losses  # noqa: E402

RNG = np.random.default_rng(7)
PAIR = tuple(RNG.uniform(0.0, 1.0, (4, 64)).astype(np.float32))  # err_w, err_l, ref_w, ref_l


def _mean_loss(case, desirable, size=1.0):
  """The mean loss as a function of policy and reference residuals by arm."""
  name, _, hyper = make_losses.CASES[case]
  module = losses.load_loss(name)

  def loss(policy, reference):
    pair = policy, reference
    if not module.NEEDS.residuals:
      pair = losses.to_errors(policy), losses.to_errors(reference)
    labels, old = {"desirable": desirable}, {}
    if case in make_losses.SCORED:
      unmoved = make_losses.residuals(make_losses.CASES[case][1])[0]
      labels, old = jax.tree.map(jnp.float32, make_losses.scored(case, unmoved))
      old = {arm: size * of for arm, of in old.items()}
    if module.NEEDS.rows == "paths":
      by_step = lambda tree: {a: jnp.square(x).mean(1).T for a, x in tree.items()}  # noqa: E731
      pair, old = (by_step(policy), {}), by_step(old)
    terms = losses.Terms(*pair, labels, jnp.mean, old)
    per_sample, _ = module.objective(terms, **hyper)
    return per_sample.mean(), per_sample

  return loss


@pytest.mark.parametrize("case", make_losses.CASES)
def test_values_and_gradients_are_the_equations(case):
  policy, reference, desirable = make_losses.residuals(make_losses.CASES[case][1])
  single = jax.tree.map(jnp.float32, (policy, reference))
  gradient, values = jax.jit(jax.grad(_mean_loss(case, desirable), has_aux=True))(*single)
  assert values.dtype == jnp.float32 and values.shape == (make_losses.ROWS,)
  want = make_losses.values_of(case, policy, reference, desirable)
  np.testing.assert_allclose(values, want, rtol=2e-5, atol=1e-6)
  live = make_losses.gradients_of(case, policy, reference, desirable)
  for arm, of in live.items():
    np.testing.assert_allclose(gradient[arm], of, rtol=1e-4, atol=1e-6)
  golden = json.loads((GOLDEN / "losses.json").read_text())[case]
  np.testing.assert_allclose(values, golden["loss"], rtol=2e-5, atol=1e-6)
  for arm, of in golden["gradient"].items():
    np.testing.assert_allclose(gradient[arm][0].ravel(), of, rtol=1e-4, atol=1e-6)
  assert max(np.abs(of).max() for of in live.values()) > 1e-3  # the gradients are not all 0


@pytest.mark.parametrize("case", make_losses.CASES)
@pytest.mark.parametrize("size", [1e-8, 1e4, 1e8])
def test_extremes_stay_finite(case, size):
  policy, reference, desirable = make_losses.residuals(make_losses.CASES[case][1])
  single = jax.tree.map(lambda x: jnp.float32(size * x), (policy, reference))
  gradient, values = jax.grad(_mean_loss(case, desirable, size), has_aux=True)(*single)
  assert np.isfinite(values).all()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


# ------------------------------------------------------------------------------ DPO


def test_dpo_by_hand():
  # margin = (0.5 - 0.4) - (0.1 - 0.2) = 0.2; logit = 10 / 2 * 0.2 = 1
  got = losses.dpo_loss(*(jnp.array([v]) for v in (0.1, 0.5, 0.2, 0.4)), beta=10.0)
  np.testing.assert_allclose(got, [np.log1p(np.exp(-1.0))], rtol=1e-6)


def test_swapping_winner_and_loser_flips_dpos_logit():
  err_w, err_l, ref_w, ref_l = PAIR
  there = losses.dpo_loss(err_w, err_l, ref_w, ref_l, beta=3.0)
  back = losses.dpo_loss(err_l, err_w, ref_l, ref_w, beta=3.0)
  # -log p and -log (1 - p): the probabilities add up to one.
  np.testing.assert_allclose(np.exp(-there) + np.exp(-back), 1.0, rtol=1e-6)


def test_dpo_is_ln_2_at_the_reference_and_sees_margins_alone():
  err_w, err_l, ref_w, ref_l = PAIR
  same = losses.dpo_loss(err_w, err_l, err_w, err_l, beta=5000.0)
  np.testing.assert_allclose(same, np.log(2), rtol=1e-6)
  shifted = losses.dpo_loss(err_w + 0.25, err_l + 0.25, ref_w, ref_l, beta=3.0)
  np.testing.assert_allclose(
    shifted, losses.dpo_loss(err_w, err_l, ref_w, ref_l, beta=3.0), rtol=1e-5
  )


def test_beta_scales_dpos_errors():
  doubled = losses.dpo_loss(*PAIR, beta=6.0)
  scaled = losses.dpo_loss(*(2.0 * x for x in PAIR), beta=3.0)
  np.testing.assert_allclose(doubled, scaled, rtol=1e-6)


def test_ipo_is_least_where_the_margin_is_half_the_inverse_of_beta():
  margins = jnp.linspace(-0.5, 0.5, 1001)
  zero = jnp.zeros_like(margins)
  loss = losses.dpo_loss(zero, margins, zero, zero, beta=2.0, variant="ipo")
  assert float(margins[jnp.argmin(loss)]) == pytest.approx(0.25, abs=1e-3)


def test_hinge_is_dead_beyond_its_margin():
  loss = losses.dpo_loss(
    *(jnp.array(v) for v in ([0.0, 0.0], [0.5, 0.1], [0.0, 0.0], [0.0, 0.0])),
    beta=10.0,
    variant="hinge",
  )
  np.testing.assert_allclose(loss, [0.0, 0.5], atol=1e-6)


# --------------------------------------------------------------------------- the others


def test_dro_by_hand():
  # (0.5 - 0.4) - (0.3 - 0.25) + 0.01 = 0.06; (0.1 - 0.4) - 0 + 0.01 < 0.
  got = losses.dro_loss(
    *(jnp.array(v) for v in ([0.5, 0.1], [0.3, 0.2], [0.4, 0.4], [0.25, 0.2])), margin=0.01
  )
  np.testing.assert_allclose(got, [0.06, 0.0], atol=1e-7)


def test_dro_is_its_margin_where_policy_is_reference():
  got = losses.dro_loss(PAIR[0], PAIR[1], PAIR[0], PAIR[1], margin=1e-3)
  np.testing.assert_allclose(got, 1e-3, rtol=1e-5)


def test_dros_gradient_is_that_of_the_error_difference_where_active():
  gradient = jax.grad(
    lambda e, p: losses.dro_loss(e, p, PAIR[2], PAIR[3], margin=1e-3).sum(), argnums=(0, 1)
  )(*PAIR[:2])
  err_e, err_p, ref_e, ref_p = np.float64(PAIR)
  active = (err_e - ref_e) - (err_p - ref_p) + 1e-3 > 0
  assert 0 < active.sum() < len(active)
  np.testing.assert_array_equal(gradient[0], active.astype(np.float32))
  np.testing.assert_array_equal(gradient[1], -active.astype(np.float32))


def test_kto_is_one_half_at_the_reference():
  desirable = np.arange(64) % 3 > 0
  for beta in (1.0, 5000.0):
    got = losses.kto_loss(PAIR[0], PAIR[0], desirable, beta=beta, kl=0.0)
    np.testing.assert_allclose(got, 0.5)


def test_kto_of_the_other_label_is_the_rest_to_one():
  good = losses.kto_loss(*PAIR[:2], np.ones(64), beta=2.0, kl=0.1)
  bad = losses.kto_loss(*PAIR[:2], np.zeros(64), beta=2.0, kl=0.1)
  np.testing.assert_allclose(good + bad, 1.0, rtol=1e-5)


def test_ktos_reference_point_is_not_below_zero_and_carries_no_gradient():
  from jaxpref.losses import kto

  better, worse = jnp.array([0.1, 0.3]), jnp.array([0.4, 0.6])
  assert float(kto.reference_point(better, worse, jnp.mean)) == pytest.approx(0.3)
  assert float(kto.reference_point(worse, better, jnp.mean)) == 0.0
  gradient = jax.grad(lambda e: kto.reference_point(e, worse, jnp.mean))(better)
  np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("size", [1e-8, 1e4, 1e8])
@pytest.mark.parametrize("guarded", ["dpo", "dspo"])
def test_sdpo_stays_finite(size, guarded):
  policy, reference, _ = make_losses.residuals(("w", "l"))
  policy, reference = jax.tree.map(lambda x: jnp.float32(size * x), (policy, reference))

  def loss(policy):
    terms = losses.Terms(policy, reference, {}, jnp.mean)
    return losses.load_loss("sdpo").objective(terms, beta=7.0, mu=0.2, guarded=guarded)[0].sum()

  value, gradient = jax.value_and_grad(loss)(policy)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_long_lists_keep_their_order():
  names = [str(rank) for rank in range(1, 13)]
  err = {n: jnp.full(2, float(n)) for n in names}
  ref = dict(sorted(err.items()))  # as a tree comes out of jax
  terms = losses.Terms(err, ref, {}, jnp.mean)
  loss, _ = losses.load_loss("listwise").objective(terms, beta=3.0)
  np.testing.assert_allclose(loss, np.log(np.arange(1, 13)).sum(), rtol=1e-5)


def test_a_list_of_two_is_dpo():
  err_w, err_l, ref_w, ref_l = PAIR
  stacked = (jnp.stack(x, 1) for x in ((err_w, err_l), (ref_w, ref_l)))
  np.testing.assert_allclose(
    losses.plackett_luce_loss(*stacked, beta=3.0),
    losses.dpo_loss(*PAIR, beta=3.0),
    rtol=1e-5,
  )


def test_all_orders_of_a_list_are_certain_together():
  import itertools

  err = jnp.asarray(RNG.uniform(size=(5, 4)), jnp.float32)
  likely = [
    np.exp(-losses.plackett_luce_loss(err[:, list(order)], 0 * err, beta=6.0))
    for order in itertools.permutations(range(4))
  ]
  np.testing.assert_allclose(sum(likely), 1.0, rtol=1e-5)


def test_simpo_without_margin_is_dpo_without_reference():
  zero = np.zeros(64, np.float32)
  np.testing.assert_allclose(
    losses.simpo_loss(*PAIR[:2], beta=3.0, target_margin=0.0),
    losses.dpo_loss(*PAIR[:2], zero, zero, beta=3.0),
    rtol=1e-6,
  )


def test_mapos_bonus_is_half_a_bit_of_beta_for_equal_errors():
  got = losses.mapo_loss(PAIR[0], PAIR[0], beta=0.1, snr=0.5)
  np.testing.assert_allclose(got, PAIR[0] + 0.1 * np.log(2), rtol=1e-5)


def test_mapo_at_vanishing_errors():
  gradient = jax.grad(lambda w: losses.mapo_loss(w, 0.0 * w, beta=0.1, snr=0.5).sum())
  # d s / d err = -k / 2 at 0: 1 + 0.1 * 1000 * sigmoid(0) * 0.25
  np.testing.assert_allclose(gradient(jnp.zeros(3)), 1.0 + 0.1 * 1000 * 0.5 * 0.25, rtol=1e-4)


def test_dspo_without_a_winner_that_moved_is_its_error():
  winner = RNG.standard_normal((8, 2, 3)).astype(np.float32)
  got = losses.dspo_loss(winner, winner, PAIR[1][:8], PAIR[3][:8], beta=0.5)
  np.testing.assert_allclose(got, (winner**2).mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tilt", [-1.0, 0.2, 5.0])
def test_the_guard_keeps_the_winners_error_from_rising(mu, tilt):
  rng = np.random.default_rng(3)
  winner = rng.standard_normal((8, 2, 3))
  loser = tilt * winner + 0.3 * rng.standard_normal((8, 2, 3))
  scale = losses.sdpo_scale(jnp.float32(winner), jnp.float32(loser), mu=mu)
  want = equations.sdpo_scale({"w": winner, "l": loser}, mu)
  np.testing.assert_allclose(scale, want, rtol=1e-5)
  # One shared step of -g_w + scale g_l on both predictions, to first order.
  change = ((-winner + float(scale) * loser) * winner).sum()
  assert change <= -mu * (winner**2).sum() + 1e-4
  if tilt < 0:
    assert scale == 1.0  # they point apart: the loser helps


def test_the_guard_changes_gradients_alone():
  guarded = lambda err: losses.safeguard(err, 0.25).sum()  # noqa: E731
  err = jnp.asarray(PAIR[1])
  np.testing.assert_allclose(losses.safeguard(err, 0.25), err, rtol=1e-6)
  np.testing.assert_allclose(jax.grad(guarded)(err), 0.25)


@pytest.mark.parametrize("guarded", ["dpo", "dspo"])
def test_sdpos_gradient_is_the_guarded_losses(guarded):
  rng = np.random.default_rng(5)
  draw = lambda: rng.standard_normal((4, 2, 3))  # noqa: E731
  policy = {"w": draw()}
  policy["l"] = 2.0 * policy["w"] + 0.3 * draw()
  reference = {a: v + 0.2 * draw() for a, v in policy.items()}
  scale = equations.sdpo_scale(policy, 0.2)
  assert 0.0 < scale < 1.0
  module = losses.load_loss("sdpo")

  def loss(policy):
    terms = losses.Terms(policy, jax.tree.map(jnp.float32, reference), {}, jnp.mean)
    per_sample, metrics = module.objective(terms, beta=0.7, mu=0.2, guarded=guarded)
    return per_sample.sum(), metrics

  gradient, metrics = jax.grad(loss, has_aux=True)(jax.tree.map(jnp.float32, policy))
  assert float(metrics["sdpo/scale"]) == pytest.approx(scale, rel=1e-5)

  def plain(p):  # without the guard, float64
    if guarded == "dpo":
      return equations.dpo(p, reference, 0.7, "sigmoid").sum()
    return equations.dspo(p, reference, 0.7).sum()

  for arm, factor in (("w", 1.0), ("l", scale)):
    for index in [(0, 0, 0), (3, 1, 2)]:
      sides = []
      for step in (1e-6, -1e-6):
        moved = {a: v.copy() for a, v in policy.items()}
        moved[arm][index] += step
        sides.append(plain(moved))
      want = factor * (sides[0] - sides[1]) / 2e-6
      np.testing.assert_allclose(gradient[arm][index], want, rtol=1e-3, atol=1e-6)


# ----------------------------------------------------------------------------- metrics


def test_dro_metrics():
  err = {"e": jnp.array([0.5, 0.1]), "p": jnp.array([0.3, 0.2])}
  ref = {"e": jnp.array([0.4, 0.4]), "p": jnp.array([0.25, 0.2])}
  module = losses.load_loss("dro")
  loss, metrics = module.objective(losses.Terms(err, ref, {}, jnp.mean), margin=0.01)
  np.testing.assert_allclose(loss, [0.06, 0.0], atol=1e-7)
  np.testing.assert_allclose(metrics["rewards/margin"], [-0.05, 0.3], atol=1e-6)
  np.testing.assert_allclose(metrics["rewards/accuracy"], [0.0, 1.0])
  np.testing.assert_allclose(metrics["dro/active"], [1.0, 0.0])


def test_dpo_metrics():
  err = {"w": jnp.array([0.5, 0.1]), "l": jnp.array([0.3, 0.2])}
  ref = {"w": jnp.array([0.4, 0.4]), "l": jnp.array([0.25, 0.2])}
  module = losses.load_loss("dpo")
  terms = losses.Terms(err, ref, {}, jnp.mean)
  _, metrics = module.objective(terms, beta=2.0, variant="sigmoid")
  np.testing.assert_allclose(metrics["rewards/winner"], [-0.1, 0.3], atol=1e-6)
  np.testing.assert_allclose(metrics["rewards/margin"], [-0.05, 0.3], atol=1e-6)
  np.testing.assert_allclose(metrics["rewards/accuracy"], [0.0, 1.0])


# ---------------------------------------------------------------------------- the names


def test_all_methods_are_known():
  ours = {p.stem for p in (ROOT / "jaxpref" / "losses").glob("*.py")} - {"__init__", "base"}
  assert len(ours) >= 12 and ours <= set(losses.known_losses())
  for name in ours:
    assert losses.load_loss(name).__doc__


@pytest.mark.parametrize("name", ["dor", "jaxpref.losses.nothing", "no.such.module"])
def test_unknown_loss_is_one_line_and_names_what_there_is(name):
  with pytest.raises(UserError, match="dpo, dro, dspo") as error:
    losses.load_loss(name)
  assert "\n" not in str(error.value)


def test_a_module_that_is_no_loss_is_refused():
  with pytest.raises(UserError, match="lacks NEEDS, objective"):
    losses.load_loss("jaxpref.errors")


def test_a_loss_from_elsewhere_loads_by_its_dotted_path():
  assert losses.load_loss("jaxpref.losses.dro").dro_loss is losses.dro_loss


def test_a_loss_that_a_package_registers_loads_by_its_name(register_plugin):
  register_plugin(
    *("jaxpref.losses", "ours_too", "their_losses"),
    "from jaxpref.losses import Needs\n"
    "NEEDS = Needs(rows='pairs')\n"
    "def objective(terms, *, strength):\n"
    "  return strength * terms.err['w'], {}\n",
  )
  assert "ours_too" in losses.known_losses()
  loss = losses.make_loss({"name": "ours_too", "strength": 2.0})
  terms = losses.Terms({"w": jnp.asarray([1.0, 3.0])}, {}, {}, jnp.mean)
  assert loss.objective(terms)[0].tolist() == [2.0, 6.0]


@pytest.mark.parametrize(
  ("name", "hyper", "message"),
  [
    ("dpo", {"beta": 1.0, "variant": "square"}, "sigmoid, hinge, ipo .got 'square'"),
    ("kto", {"utility": "greedy"}, "kt, loss_averse, risk_seeking .got 'greedy'"),
    ("sdpo", {"guarded": "kto"}, "dpo, dspo .got 'kto'"),
    ("sdpo", {"mu": 1.5}, "loss.mu must be between 0 and 1"),
  ],
)
def test_unknown_variants_are_refused(name, hyper, message):
  base = {
    "kto": {"beta": 1.0, "weight_desirable": 1.0, "weight_undesirable": 1.0},
    "sdpo": {"beta": 1.0, "mu": 0.5, "guarded": "dpo"},
  }.get(name, {})
  module = losses.load_loss(name)
  arms = ("x",) if name == "kto" else ("w", "l")
  shape = (2, 1, 1, 1) if module.NEEDS.residuals else (2,)
  values = {a: jnp.ones(shape) for a in arms}
  terms = losses.Terms(values, values, {"desirable": jnp.ones(2)}, jnp.mean)
  with pytest.raises(UserError, match=message):
    module.objective(terms, **base | hyper)
