"""Losses on steps against closed forms, on a chain of Gaussians and by quadrature.

x_0 ~ N(0, 1), x_{k+1} = a_k x_k + theta_0 b_k + theta_1 c_k x_k + s_k z_k, reward
-(x_3 - 1)^2. Every z is integrated with 20 nodes, so expectations are exact: no seeds and no
statistical tolerances.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses
from jaxpref.rewards import likelihood, policy_gradient, two_pass

A, B, C, S = (
  np.array(of) for of in ((0.9, 0.8, 0.85), (1.0, 0.7, 0.5), (0.3, -0.2, 0.4), (0.5, 0.6, 0.4))
)
OLD, NEW = np.array([0.2, -0.3]), np.array([0.35, -0.1])
# The expected reward's gradients at OLD and NEW and the divergence of the paths, from the
# recursion of the moments with complex steps, in numpy.
GOLDEN = {"old": (2.203333824, -0.49852070592), "new": (1.364462592, -0.56257054944)}
GOLDEN_KL = 0.12986834064


pytestmark = pytest.mark.usefixtures("in_float64")


def expected_reward(theta):
  mean, variance = 0.0, 1.0
  for a, b, c, s in zip(A, B, C, S, strict=True):
    mean = (a + theta[1] * c) * mean + theta[0] * b
    variance = (a + theta[1] * c) ** 2 * variance + s**2
  return -((mean - 1.0) ** 2 + variance)


def means(theta, x, k):
  return A[k] * x + theta[0] * B[k] + theta[1] * C[k] * x


def paths(theta):
  """All nodes' states [4, M, 1] and weights [M] of a chain that is sampled with theta."""
  node, weight = np.polynomial.hermite_e.hermegauss(20)
  grid = np.stack(np.meshgrid(*[node] * 4, indexing="ij")).reshape(4, -1, 1)
  weights = np.prod(np.meshgrid(*[weight / weight.sum()] * 4, indexing="ij"), 0).ravel()
  states = [grid[0]]
  for k in range(3):
    states.append(means(theta, states[-1], k) + S[k] * grid[k + 1])
  return np.stack(states), weights


def log_probs(theta, states):
  """Of each step, [3, M]."""
  std = [jnp.full(states.shape[1], s) for s in S]
  return jnp.stack(
    [
      likelihood.gaussian_log_prob(states[k + 1], means(theta, states[k], k), std[k])
      for k in range(3)
    ]
  )


def rewards(states):
  return -((states[-1, :, 0] - 1.0) ** 2)


STATES, WEIGHTS = paths(OLD)
REWARDS = rewards(STATES)


def gradient(loss_of, at):
  """Of the expected sum over steps of losses [3, M], negated."""
  return -jax.grad(lambda theta: jnp.sum(WEIGHTS * loss_of(theta).sum(0)))(jnp.array(at))


def exact(at):
  return np.asarray(jax.grad(expected_reward)(jnp.array(at)))


def test_quadrature_is_exact():
  np.testing.assert_allclose(WEIGHTS @ REWARDS, expected_reward(OLD), rtol=1e-12)
  np.testing.assert_allclose(exact(OLD), GOLDEN["old"], rtol=1e-9)
  np.testing.assert_allclose(exact(NEW), GOLDEN["new"], rtol=1e-9)


def test_the_score_function_gives_the_policy_gradient():
  plain = lambda a: gradient(  # noqa: E731
    lambda th: policy_gradient.score_function_loss(log_probs(th, STATES), a), OLD
  )
  np.testing.assert_allclose(plain(REWARDS), exact(OLD), rtol=1e-10)
  mean = WEIGHTS @ REWARDS
  std = np.sqrt(WEIGHTS @ (REWARDS - mean) ** 2)
  np.testing.assert_allclose(plain(REWARDS - 7.0), exact(OLD), rtol=1e-9)
  np.testing.assert_allclose(std * plain((REWARDS - mean) / std), exact(OLD), rtol=1e-10)


@pytest.mark.parametrize("clip", [1e-4, 0.2])
def test_clipped_losses_give_it_where_the_policies_are_equal(clip):
  # Equal up to the last bit, or the maximum would choose by rounding.
  def of(loss):
    def both(theta):
      now = log_probs(theta, STATES)
      return loss(now, jax.lax.stop_gradient(now), REWARDS, clip=clip)

    return gradient(both, OLD)

  np.testing.assert_allclose(of(policy_gradient.ppo_loss), exact(OLD), rtol=1e-10)
  np.testing.assert_allclose(of(policy_gradient.dpok_loss), exact(OLD), rtol=1e-10)


def test_away_from_the_old_policy_only_the_ratio_of_paths_is_exact():
  old = log_probs(OLD, STATES)
  joint = gradient(
    lambda th: -REWARDS * jnp.exp((log_probs(th, STATES) - old).sum(0, keepdims=True)), NEW
  )
  np.testing.assert_allclose(joint, exact(NEW), rtol=1e-6)
  by_step = gradient(
    lambda th: policy_gradient.ppo_loss(log_probs(th, STATES), old, REWARDS, clip=1e9), NEW
  )
  assert np.abs(by_step - exact(NEW)).max() > 0.02


def test_the_kl_of_a_path_is_the_sum_over_its_steps():
  states, weights = paths(NEW)
  whole = weights @ (log_probs(NEW, states) - log_probs(OLD, states)).sum(0)
  steps = [
    weights
    @ likelihood.gaussian_kl(
      means(NEW, states[k], k), means(OLD, states[k], k), jnp.full(len(weights), S[k])
    )
    for k in range(3)
  ]
  np.testing.assert_allclose(whole, sum(steps), rtol=1e-10)
  np.testing.assert_allclose(whole, GOLDEN_KL, rtol=1e-8)


def test_the_exact_log_ratio_needs_no_difference_of_log_probabilities():
  z = (STATES[1] - means(OLD, STATES[0], 0)) / S[0]
  d = (means(NEW, STATES[0], 0) - means(OLD, STATES[0], 0)) / S[0]
  found = log_probs(NEW, STATES)[0] - log_probs(OLD, STATES)[0]
  np.testing.assert_allclose(found, (d * z - d**2 / 2).mean(1), atol=1e-11)


def test_steps_without_noise_have_no_log_probability_and_no_gradient():
  x, std = jnp.ones((2, 3)), jnp.array([0.0, 2.0])
  value, slope = jax.vjp(lambda m: likelihood.gaussian_log_prob(x, m, std), jnp.zeros((2, 3)))
  (slope,) = slope(jnp.ones(2))
  assert value[0] == 0 and (slope[0] == 0).all() and np.isfinite(slope).all()
  np.testing.assert_allclose(value[1], -1 / 8 - np.log(2) - np.log(2 * np.pi) / 2)
  kl = jax.grad(lambda m: likelihood.gaussian_kl(m, x, std).sum())(jnp.zeros((2, 3)))
  assert (kl[0] == 0).all() and (kl[1] != 0).all() and np.isfinite(kl).all()


@pytest.mark.parametrize(
  ("loss", "dead"),
  [
    (policy_gradient.ppo_loss, {(1, 0.5), (-1, -0.5)}),
    (policy_gradient.dpok_loss, {(1, 0.5), (-1, -0.5), (1, -0.5), (-1, 0.5)}),
  ],
)
def test_where_a_clipped_loss_has_no_gradient(loss, dead):
  for advantage in (1, -1):
    for log_ratio in (0.5, -0.5):
      slope = jax.grad(lambda lp, a=advantage: loss(lp, 0.0, a, clip=0.2))(log_ratio)
      is_dead = (advantage, log_ratio) in dead
      assert (slope == 0) == is_dead
      if not is_dead:
        np.testing.assert_allclose(slope, -advantage * np.exp(log_ratio))


def test_the_upper_range_can_be_wider():
  loss = policy_gradient.ppo_loss
  assert loss(np.log(1.25), 0.0, 1.0, clip=0.2, clip_high=0.3) == pytest.approx(-1.25)
  assert loss(np.log(1.25), 0.0, 1.0, clip=0.2) == pytest.approx(-1.2)


def test_the_guarded_ratio_has_mean_log_zero_and_equal_spread():
  """Of samples of the old policy: a log-ratio's mean is -d^2/2 and its deviation d."""
  node, weight = np.polynomial.hermite_e.hermegauss(20)
  weight = weight / weight.sum()
  logs = []
  for std in (0.05, 0.8):
    x = std * node[:, None]
    log_prob = [
      likelihood.gaussian_log_prob(x, jnp.full_like(x, m), jnp.full(20, std))
      for m in (0.02, 0.0)
    ]
    found = policy_gradient.guarded_ratio(
      *log_prob, jnp.full_like(x, 0.02), jnp.zeros_like(x), jnp.full(20, std)
    )
    logs.append(np.log(found))
  for of in logs:
    assert weight @ of == pytest.approx(0.0, abs=1e-12)
    assert np.sqrt(weight @ of**2) == pytest.approx(0.02, rel=1e-9)


def test_the_trust_region_leaves_out_steps_that_go_further():
  kl = jnp.array([0.1, 0.1, 0.1, 0.1, 0.01])
  ratio, advantage = jnp.array([1.1, 0.9, 1.1, 0.9, 1.1]), jnp.array([1, 1, -1, -1, 1])
  kept = policy_gradient.keeps(kl, ratio, advantage, threshold=0.05)
  assert kept.tolist() == [False, True, True, False, True]


# -------------------------------------------------------------------------- step pairs


def test_step_pairs_are_ln_2_at_the_reference_with_dpos_gradient():
  lp = [log_probs(OLD, STATES)[k][:4] for k in (0, 1)]
  for clip in (None, 0.1):
    loss = lambda *now, c=clip: losses.step_pair_loss(*now, *lp, beta=10.0, clip=c)  # noqa: E731
    np.testing.assert_allclose(loss(*lp), np.log(2), rtol=1e-12)
    slopes = jax.grad(lambda *now, f=loss: f(*now).sum(), argnums=(0, 1))(*lp)
    np.testing.assert_allclose(slopes[0], -5.0, rtol=1e-12)
    np.testing.assert_allclose(slopes[1], 5.0, rtol=1e-12)


def test_clipped_step_pairs_saturate():
  there = losses.step_pair_loss(3.0, -3.0, 0.0, 0.0, beta=20.0, clip=0.1)
  back = losses.step_pair_loss(-3.0, 3.0, 0.0, 0.0, beta=20.0, clip=0.1)
  bound = 20.0 * np.log(1.1 / 0.9)
  np.testing.assert_allclose(there, np.log1p(np.exp(-bound)), rtol=1e-9)
  np.testing.assert_allclose(np.exp(-there) + np.exp(-back), 1.0, rtol=1e-12)
  outside = jax.grad(lambda lp: losses.step_pair_loss(lp, 0.0, 0.0, 0.0, beta=9, clip=0.1))
  assert outside(-3.0) == 0 and outside(0.0) == -4.5


def test_the_first_step_of_pairs_climbs_the_win_rate_against_the_reference():
  """For a reward that rises with x_3, from a common start: d/dshift of P(x_3 > x_3').

  With D the pair's difference of x_3, the integrand is linear in the noise apart from its sign:
  along D a dense grid of the half-line is enough, and two nodes in each direction across it.
  """
  spread = S * np.array([FACTOR[1] * FACTOR[2], FACTOR[2], 1.0])  # of x_3, by each step's noise
  along = np.concatenate([spread, -spread])
  width = np.linalg.norm(along)  # the deviation of D
  across = np.linalg.svd(along[None] / width)[2][1:]
  half, step = np.linspace(0.0, 12.0, 24_001, retstep=True)
  weight = 2 * np.exp(-(half**2) / 2) / np.sqrt(2 * np.pi) * step
  weight[[0, -1]] /= 2
  signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 5, indexing="ij")).reshape(5, -1)
  found = 0.0
  for corner in signs.T:
    noise = half[:, None] * along / width + corner @ across  # with D > 0: the first side wins

    def loss(shift, noise=noise):
      total = 0.0
      for k in range(3):
        z = [jnp.asarray(S[k] * noise[:, side + k])[:, None] for side in (0, 3)]
        std = jnp.full(len(noise), S[k])
        of = lambda x, m, s=std: likelihood.gaussian_log_prob(x, m * jnp.ones_like(x), s)  # noqa: E731
        now, fixed = ([of(x, at) for x in z] for at in (shift[k], 0.0))
        total += losses.step_pair_loss(*now, *fixed, beta=BETA)
      return jnp.sum(weight * total)

    found -= jax.grad(loss)(jnp.zeros(3)) / len(signs.T)
  # P = Phi(sum of shifts' effects / width), whose slope at 0 is 1 / sqrt(2 pi).
  effects = np.array([FACTOR[1] * FACTOR[2], FACTOR[2], 1.0])
  np.testing.assert_allclose(found, BETA * effects / width * np.sqrt(2 / np.pi), rtol=1e-6)


# -------------------------------------------------------------------------------- PRDP

SLOPE, BETA = 1.3, 0.7  # the reward a x_3, and PRDP's beta
FACTOR = A + OLD[1] * C
SHIFT = np.array([S[k] ** 2 * SLOPE / BETA * np.prod(FACTOR[k + 1 :]) for k in range(3)])


def pair_log_ratios(shift, step):
  """Of policy and reference, for the pairs' steps with number k; both sides at once."""
  x, after, k = step["x"], step["after"], step["k"]
  reference = jnp.array(A)[k] * x + OLD[0] * jnp.array(B)[k] + OLD[1] * jnp.array(C)[k] * x
  std = jnp.full(x.shape[:2], jnp.array(S)[k])
  of = lambda mean: jax.vmap(likelihood.gaussian_log_prob)(after, mean, std)  # noqa: E731
  return of(reference + shift[k]) - of(reference), None


def pairs(count=6):
  rng = np.random.default_rng(5)
  states = rng.normal(size=(4, 2, count, 1))
  states[0, 1] = states[0, 0]  # both begin with one noise
  steps = {"x": states[:3], "after": states[1:], "k": np.arange(3)}
  return jax.tree.map(jnp.asarray, steps), *(SLOPE * states[-1, side, :, 0] for side in (0, 1))


def prdp_of(reward_a, reward_b):
  def loss(ratios, _):
    return losses.prdp_loss(*ratios.sum(0), reward_a, reward_b, beta=BETA), None

  return loss


def test_prdp_is_zero_at_the_optimum_of_the_regularised_reward():
  steps, r_a, r_b = pairs()
  loss, _, slope = two_pass.two_pass_gradient(
    pair_log_ratios, jnp.array(SHIFT), steps, prdp_of(r_a, r_b)
  )
  np.testing.assert_allclose(loss, 0.0, atol=1e-20)
  np.testing.assert_allclose(slope, 0.0, atol=1e-10)
  # The path's shift is what the reward's tilt gives by hand.
  mean = sum(SHIFT[k] * np.prod(FACTOR[k + 1 :]) for k in range(3))
  tilted = SLOPE / BETA * sum((S[k] * np.prod(FACTOR[k + 1 :])) ** 2 for k in range(3))
  np.testing.assert_allclose(mean, tilted, rtol=1e-12)


def test_two_passes_weight_each_step_by_its_own_derivative():
  steps, r_a, r_b = pairs()
  shift, factor = jnp.array(0.9 * SHIFT), jnp.array([1.0, 3.0, -2.0])[:, None, None]

  def log_ratios(shift, step):
    return pair_log_ratios(shift, step)[0], factor[step["k"]]

  def loss(ratios, factors):
    return jnp.square((factors * jnp.sin(ratios)).sum((0, 1)) - r_a + r_b), None

  def naive(shift):
    of = [log_ratios(shift, jax.tree.map(lambda x, k=k: x[k], steps)) for k in range(3)]
    return loss(*map(jnp.stack, zip(*of, strict=True)))[0].mean()

  values, _, slope = two_pass.two_pass_gradient(log_ratios, shift, steps, loss)
  np.testing.assert_allclose(values.mean(), naive(shift), rtol=1e-12)
  np.testing.assert_allclose(slope, jax.grad(naive)(shift), rtol=1e-10)
  assert np.abs(slope).min() > 1e-3


@pytest.mark.parametrize(
  "wrong", [0.9 * SHIFT, pytest.param(0 * SHIFT, marks=pytest.mark.long)]
)
def test_two_passes_give_prdps_gradient(wrong):
  steps, r_a, r_b = pairs()

  def naive(shift):
    u = sum(
      pair_log_ratios(shift, jax.tree.map(lambda x, k=k: x[k], steps))[0] for k in range(3)
    )
    return losses.prdp_loss(*u, r_a, r_b, beta=BETA).mean()

  loss, _, slope = two_pass.two_pass_gradient(
    pair_log_ratios, jnp.array(wrong), steps, prdp_of(r_a, r_b)
  )
  np.testing.assert_allclose(loss.mean(), naive(jnp.array(wrong)), rtol=1e-12)
  np.testing.assert_allclose(slope, jax.grad(naive)(jnp.array(wrong)), rtol=1e-10)
  assert loss.mean() > 1e-3
