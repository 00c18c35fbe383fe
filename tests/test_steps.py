"""The train step and the rollouts: devices, micro-batches, gradients, the frozen copy."""

import json
import re

import conftest
import devices_main
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref import losses, rng, sharding
from jaxpref.diffusion import sampler as sampler_lib
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.errors import UserError
from jaxpref.training import batch as batch_lib
from jaxpref.training import optimizer, train_step
from jaxpref.training import rollout as rollout_lib

CASES = [
  {"name": "dro", "data": 8, "accumulate": 2, "look": True},
  {"name": "dro", "data": 4, "fsdp": 2, "accumulate": 2, "lots": 8},
  {"name": "dro", "data": 2, "fsdp": 4, "refresh_every": 2, "states": 2, "replay": 2},
  {"name": "sft", "data": 2, "fsdp": 4},
  {"name": "kto", "data": 8},  # its reference point is of the batch of all devices
  {"name": "kto", "data": 4, "fsdp": 2, "accumulate": 2},
  {"name": "kto", "data": 1, "fsdp": 8},
  {"name": "sdpo", "data": 4, "fsdp": 2},  # so is the guard's scale
  {"name": "spin", "data": 8},
  {"name": "listwise", "data": 2, "fsdp": 4, "accumulate": 2},
  {"name": "dspo", "data": 8},
  {"name": "awm", "data": 4, "fsdp": 2, "accumulate": 2, "refresh_every": 2},
  {"name": "dgpo", "data": 8},
  {"name": "prdp", "data": 4, "fsdp": 2, "accumulate": 2},
  {"name": "prdp", "data": 4, "fsdp": 2, "accumulate": 2, "refresh_every": 2},
  {"name": "step_pairs", "data": 4, "fsdp": 2, "accumulate": 2},
  {"name": "ppo", "data": 4, "fsdp": 2, "accumulate": 2, "refresh_every": 2},
  {"name": "dro", "data": 4, "fsdp": 2, "accumulate": 2, "posterior": True},
]
MESH = ("data", "fsdp", "look")


@pytest.fixture(scope="module")
def on_eight():
  """Results of all cases, from one process with eight devices."""
  return conftest.on_eight_devices(devices_main.__file__, json.dumps(CASES))


@pytest.fixture(scope="module")
def alone():
  """Metrics and parameters by method, on one device, in one piece."""
  return {name: devices_main.train(name) for name in ("dro", "sft")}


@pytest.mark.long
@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(c) for c in CASES])
def test_eight_devices_equal_one(on_eight, index):
  result, case = on_eight[index], dict(CASES[index])
  assert result["devices"] == 8
  history, params = devices_main.train(**{k: v for k, v in case.items() if k not in MESH})
  for metrics in (result["history"], history):
    # Before the first update policy and reference are equal but for rounding.
    for name in ("rewards/accuracy", "rewards/margin"):
      metrics[0].pop(name, None)
  assert history[-1].get("kto/kl", 1.0) > 0.0  # or its mean over devices would not count
  for got, want in zip(result["history"], history, strict=True):
    assert got.keys() == want.keys()
    np.testing.assert_allclose(
      [got[k] for k in want], list(want.values()), rtol=1e-4, atol=1e-6
    )
  sums = [np.sum(v.astype(np.float64)) for v in jax.tree.leaves(params)]
  np.testing.assert_allclose(result["sums"], sums, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_a_compiled_update_has_one_message_of_gradients(on_eight, alone):
  """Across eight devices: gradients and means of metrics, after the micro-batches' loop."""
  found = on_eight[0]["collectives"]
  history, params = alone["dro"]
  gradients = sum(leaf.nbytes for leaf in params.values())
  reduced = found.pop("all-reduce")
  assert reduced["in loops"] == 0
  assert gradients <= reduced["MiB"] * 2**20 <= gradients + 4 * len(history[0])
  # Nothing else, but for the few numbers of which prompts are dropped.
  assert all(f["MiB"] * 2**20 < 1024 for f in found.values()), found


@pytest.mark.parametrize("name", [pytest.param("dro", marks=pytest.mark.long), "sft"])
def test_micro_batches_change_nothing(alone, name):
  history, params = devices_main.train(name, accumulate=4)
  np.testing.assert_allclose(
    [h["loss"] for h in history], [h["loss"] for h in alone[name][0]], rtol=1e-5
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    params,
    alone[name][1],
  )


# What each loss is where policy and reference are the same network, by its equation.
START = {
  "dpo": np.log(2),
  "kto": 0.5,
  "listwise": np.log(6),
  "sdpo": np.log(2),
}


@pytest.mark.parametrize("name", START)
def test_where_policy_is_reference(name):
  hyper = {"weight_undesirable": 1.0} if name == "kto" else {}
  history, _ = devices_main.train(name, updates=1, **hyper)
  assert history[0]["loss"] == pytest.approx(START[name], rel=1e-5)


def test_another_seed_gives_other_draws(alone):
  other, _ = devices_main.train("dro", seed=1)
  for ours, theirs in zip(other, alone["dro"][0], strict=True):
    assert ours["err/policy_e"] != theirs["err/policy_e"]


@pytest.mark.long
def test_states_of_a_trajectory_are_rows_of_their_own():
  one, _ = devices_main.train("dro", updates=1)
  two, _ = devices_main.train("dro", updates=1, states=2)
  assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-4)  # m either way
  assert two[0]["err/policy_e"] != one[0]["err/policy_e"]  # but twice the rows
  # Each with its own timestep, prompt and target: the policy answers as it did.
  assert two[0]["err/policy_p"] < 1e-10


def test_replayed_rows_are_those_of_earlier_updates():
  rows = {"x": jnp.arange(6.0), "t": jnp.arange(6)}
  buffer = rollout_lib.init_replay(rows, 2)
  seen = []
  for update in range(5):
    now = {"x": 100.0 * update + jnp.arange(6.0), "t": 100 * update + jnp.arange(6)}
    mixed, buffer = rollout_lib.replay(buffer, now, jnp.int32(update), jax.random.key(update))
    np.testing.assert_array_equal(mixed["x"], mixed["t"])  # rows stay whole
    ages = update - np.asarray(mixed["t"]) // 100
    assert set(ages) <= set(range(min(update, 2) + 1))
    np.testing.assert_array_equal(np.asarray(mixed["t"]) % 100, np.arange(6))
    seen += list(ages)
  assert {0, 1, 2} == set(seen)
  assert {int(v) // 100 for v in np.asarray(buffer.rows["t"]).ravel()} == {3, 4}


@pytest.mark.long
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_known_reference_errors_change_nothing(name):
  live, params = devices_main.train(name, fixed="live")
  known, again = devices_main.train(name, fixed="known")
  for a, b in zip(live, known, strict=True):
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5, atol=1e-7)
  for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)
  # Fixed indeed: the second update sees the first one's noise.
  assert live[1]["err/reference_" + ("w" if name == "dpo" else "x")] == pytest.approx(
    live[0]["err/reference_" + ("w" if name == "dpo" else "x")], rel=1e-6
  )


@pytest.mark.parametrize(
  ("name", "calls", "options"),
  [
    ("sft", [16], {}),
    ("dpo", [32, 32], {}),
    ("listwise", [48, 48], {}),
    ("dro", [32, 32], {}),
    ("dro", [16, 32], {"own": True}),
    ("spin", [32, 32], {}),
    ("dpo", [32], {"fixed": "known"}),
  ],
)
def test_policy_and_reference_see_a_batch_once(name, calls, options, monkeypatch):
  """All arms of the 16 rows in one call each, and no call that is not needed."""
  seen = []
  denoise = devices_main.denoise
  make_step, make_rollout = train_step.make_train_step, rollout_lib.make_rollout

  def counting(params, x_t, t, cond):
    seen.append(x_t.shape[0])
    return denoise(params, x_t, t, cond)

  monkeypatch.setattr(
    train_step, "make_train_step", lambda _, *a, **k: make_step(counting, *a, **k)
  )
  monkeypatch.setattr(
    rollout_lib, "make_rollout", lambda _, *a, **k: make_rollout(denoise, *a, **k)
  )
  devices_main.train(name, updates=1, **options)
  assert seen == calls


@pytest.mark.parametrize("shared", [True, False])
def test_arms_of_a_row_share_timestep_prompt_and_perhaps_noise(shared):
  _, rows, empty = devices_main.initial("pairs")
  schedule = schedule_lib.make_schedule()
  needs = losses.Needs(rows="pairs", shared_noise=shared)
  arms = batch_lib.make_arms(
    schedule, needs, rows, None, empty, seed=0, update=3, prompt_dropout=0.5
  )
  alpha_bar = np.asarray(schedule.alpha_bar)[arms.t][:, None, None, None, None]
  clean = np.sqrt(alpha_bar) * rows["latents"]
  eps = (np.asarray(arms.x_t) - clean) / np.sqrt(1 - alpha_bar)
  np.testing.assert_allclose(eps, arms.target, atol=2e-2)
  same = np.array_equal(arms.target[:, 0], arms.target[:, 1])
  assert same == shared
  lost = (np.asarray(arms.cond) == empty).all((1, 2))
  assert 0 < lost.sum() < len(lost)


def test_dro_starts_at_its_margin(alone):
  # Policy and reference are the same network then, in the same program: exactly.
  first = alone["dro"][0][0]
  assert first["loss"] == pytest.approx(1e-3, rel=1e-4)
  assert first["dro/active"] == 1.0
  assert first["rewards/margin"] == 0.0


def test_a_fresh_copy_leaves_the_policy_half_without_error(alone):
  # The copy's answer is the target, and the copy is the policy itself.
  assert all(h["err/policy_p"] < 1e-10 for h in alone["dro"][0])
  assert alone["dro"][0][-1]["err/reference_p"] > 1e-6


def test_so_it_need_not_be_computed(alone):
  history, params = devices_main.train("dro", own=True)
  for got, want in zip(history, alone["dro"][0], strict=True):
    assert got.keys() == want.keys() and got["err/policy_p"] == 0.0
    np.testing.assert_allclose(
      [got[k] for k in want], list(want.values()), rtol=1e-4, atol=1e-7
    )
  for name, array in alone["dro"][1].items():
    np.testing.assert_allclose(params[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_lagging_copy_pushes_the_policy_half():
  history, _ = devices_main.train("dro", refresh_every=2, updates=4)
  errors = [h["err/policy_p"] for h in history]
  assert errors[0] < 1e-10 and errors[2] < 1e-10  # just renewed
  assert errors[1] > 1e-6 and errors[3] > 1e-6  # one update behind


def test_update_equals_the_formula_by_hand():
  """SFT's first Adam update from a gradient taken here, from the equations."""
  params, rows, empty = devices_main.initial()
  schedule = schedule_lib.make_schedule()
  key = rng.key_of(0, "train", 0)
  t = jax.random.randint(jax.random.fold_in(key, 0), (devices_main.ROWS,), 0, 1000)
  x0 = rows["latents"][:, 0]
  eps = jax.random.normal(jax.random.fold_in(key, 1), x0.shape)
  dropped = rng.sample_dropped_rows(0, 0, devices_main.ROWS, rate=0.2)
  cond = rng.drop_prompts(dropped, rows["cond"], empty)
  alpha_bar = np.asarray(schedule.alpha_bar, np.float64)[t][:, None, None, None]
  x_t = np.sqrt(alpha_bar) * x0 + np.sqrt(1 - alpha_bar) * np.asarray(eps)

  def loss(p):
    out = devices_main.denoise(p, jnp.asarray(x_t, jnp.float32), t, cond)
    return jnp.mean((out - eps) ** 2)

  value, gradient = jax.value_and_grad(loss)(jax.tree.map(jnp.asarray, params))
  norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
  history, after = devices_main.train("sft", updates=1)
  assert history[0]["loss"] == pytest.approx(float(value), rel=1e-5)
  assert history[0]["optim/grad_norm"] == pytest.approx(norm, rel=1e-4)
  for name, g in gradient.items():
    # Adam's first step is lr * g / (|g| + eps), after the decay of weights.
    clipped = np.asarray(g) * min(1.0, 1.0 / norm)
    adam = clipped / (np.abs(clipped) + 1e-8)
    want = params[name] - 1e-2 * (adam + 0.01 * params[name])
    np.testing.assert_allclose(after[name], want, rtol=1e-4, atol=1e-5)


def make_rollout(denoise=devices_main.denoise, **options):
  """A rollout of the toy problem, in 20 steps."""
  defaults = {"solver": "dpm_solver", "order": 2, "guidance": 1.0, "prompt_dropout": 0.0}
  return rollout_lib.make_rollout(
    denoise,
    schedule_lib.make_schedule(),
    mesh=sharding.make_mesh(),
    latent_shape=(devices_main.CHANNELS, 2, 2),
    num_steps=20,
    **defaults | options,
  )


def test_rollout_keeps_states_of_all_timesteps_alike():
  params, _, empty = devices_main.initial()
  rollout = make_rollout(states_per_trajectory=3)
  cond = jnp.zeros((2000, devices_main.TOKENS, devices_main.WIDTH))
  out = rollout(params, 3, 0, cond, empty)
  t = np.asarray(out.t)
  assert t.shape == (2000, 3) and t.min() >= 0 and t.max() <= 999
  assert all(len(set(row)) == 3 for row in t)  # no state twice
  for k in range(3):
    counts = np.histogram(t[:, k], bins=10, range=(0, 1000))[0]
    assert (np.abs(counts - 200) < 5 * np.sqrt(200)).all()  # uniform, five sigma
    again = devices_main.denoise(params, out.x_t[:, k], out.t[:, k], cond)
    np.testing.assert_allclose(out.target[:, k], again, rtol=1e-4, atol=1e-5)
  other = rollout(params, 3, 1, cond, empty)
  assert (np.asarray(other.t) != t).mean() > 0.9


@pytest.mark.parametrize(
  "options",
  [
    pytest.param({"states_per_trajectory": 1}, marks=pytest.mark.long),
    {"states_per_trajectory": 3, "guidance": 2.0},
    pytest.param({"solver": "ddpm", "prompt_dropout": 0.5}, marks=pytest.mark.long),
  ],
)
def test_chunks_that_stop_early_give_the_states_of_whole_trajectories(options, monkeypatch):
  params, rows, empty = devices_main.initial()
  steps_done = []

  def counting(params, x_t, t, cond):
    jax.debug.callback(lambda: steps_done.append(1))
    return devices_main.denoise(params, x_t, t, cond)

  chunked = make_rollout(counting, batch_size=2, **options)(params, 3, 0, rows["cond"], empty)
  jax.effects_barrier()
  count = len(steps_done)

  def whole(*args, **kwargs):
    """Takes every step of every row, with the loop that generates images."""
    *problem, kept = args
    _, seen = sampler_lib.sample(*problem, trajectory=True, **kwargs)
    at = lambda x: jax.vmap(lambda s, k: s[k], in_axes=(1, 1), out_axes=1)(x, kept)  # noqa: E731
    return jax.tree.map(at, seen)

  monkeypatch.setattr(sampler_lib, "sample_until", whole)
  full = make_rollout(**options)(params, 3, 0, rows["cond"], empty)
  np.testing.assert_array_equal(chunked.t, full.t)
  np.testing.assert_allclose(chunked.x_t, full.x_t, rtol=1e-4, atol=2e-5)
  np.testing.assert_allclose(chunked.target, full.target, rtol=1e-4, atol=2e-5)
  # Each chunk of two rows went as far as the further one, and no step beyond.
  levels = 20 - np.asarray(full.t) // 50
  assert count == np.sort(levels.max(axis=1)).reshape(-1, 2).max(axis=1).sum()
  assert count < 20 * 8


def test_chunks_are_equal_on_all_devices():
  size = lambda *a, devices=1: rollout_lib.chunk_size(*a, devices=devices)  # noqa: E731
  assert size(32, 0) == 32 and size(32, 8) == 8 and size(32, 7) == 8
  assert size(32, 8, devices=16) == 16 and size(32, 8, devices=32) == 32
  assert size(24, 5, devices=2) == 6 and size(32, 100) == 32


def test_prompts_are_dropped_at_the_rate():
  cond, empty = jnp.ones((4000, 1, 1)), jnp.zeros((1, 1, 1))
  dropped = rng.sample_dropped_rows(0, jnp.int32(5), 4000, rate=0.2)
  out = rng.drop_prompts(dropped, cond, empty)
  assert abs(float(1 - out.mean()) - 0.2) < 0.03


def test_a_missing_row_of_the_mesh_is_refused():
  with pytest.raises(UserError, match="mesh.data must divide the number of devices, 1"):
    sharding.make_mesh(data=3)
  mesh = sharding.make_mesh()
  with pytest.raises(UserError, match="train.batch_size must be a multiple of 2"):
    sharding.check_batch(9, mesh, accumulate=2)


CONSTANT = optax.constant_schedule(1e-2)


def sft_step(mesh, params, accumulate=1, learning_rate=CONSTANT):
  """The train step of SFT, and a new state for it."""
  tx = optax.sgd(learning_rate)
  make_state = lambda p: train_step.init_state(p, tx, seed=0, lagging_copy=False)  # noqa: E731
  split = sharding.params_sharding(mesh, jax.eval_shape(make_state, params))
  step = train_step.make_train_step(
    devices_main.denoise,
    schedule_lib.make_schedule(),
    losses.make_loss({"name": "sft"}),
    tx,
    mesh=mesh,
    state_sharding=split,
    arms=("e",),
    learning_rate=learning_rate,
    ema_decay=0.9,
    prompt_dropout=0.0,
    accumulate=accumulate,
  )
  return step, jax.jit(make_state, out_shardings=split)(params)


def test_the_step_is_compiled_once_and_its_state_donated():
  mesh = sharding.make_mesh()
  params, rows, empty = devices_main.initial()
  step, state = sft_step(mesh, params)
  batch = sharding.place_batch(rows, mesh)
  empty = jax.device_put(empty, sharding.replicated(mesh))
  old = state.params["in"]
  state, _ = step(state, None, empty, batch, None)
  assert old.is_deleted()
  for _ in range(3):
    state, _ = step(state, None, empty, batch, None)
  assert step._cache_size() == 1


def test_a_schedule_that_ends_early_shows_in_the_metrics():
  """And updates that were skipped do not advance it."""
  params, rows, empty = devices_main.initial()
  schedule = optimizer.make_schedule("linear", lr=1.0, warmup_updates=0, num_updates=2)
  step, state = sft_step(sharding.make_mesh(), params, learning_rate=schedule)
  broken = rows | {"latents": np.full_like(rows["latents"], np.nan)}
  seen = []
  for batch in (rows, broken, rows, rows):
    before = np.asarray(state.params["in"])
    state, metrics = step(state, None, empty, batch, None)
    moved = (np.asarray(state.params["in"]) != before).any()
    seen.append((float(metrics["optim/lr"]), bool(moved)))
  assert seen == [(1.0, True), (0.5, False), (0.5, True), (0.0, False)]


def test_the_update_is_made_in_place():
  """None of parameters, moments and averages is copied because something still reads it."""
  mesh = sharding.make_mesh()
  params, rows, empty = devices_main.initial()
  step, state = sft_step(mesh, params)
  program = step.lower(state, None, empty, rows, None).compile().as_text()
  assert "params" in program  # as arguments are named
  assert not re.search(r"copy\(\S*(params|ema|mu|nu)_", program)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_cross_devices_once_an_update(accumulate):
  params, rows, empty = devices_main.initial()
  step, state = sft_step(sharding.make_mesh(), params, accumulate)
  program = jax.make_jaxpr(step)(state, None, empty, rows, None)
  everywhere = [path for path, name in primitives(program.jaxpr) if name.startswith("psum")]
  assert everywhere  # one for the tree, or one a leaf
  assert not any("scan" in path for path in everywhere)
  assert accumulate == 1 or any(name == "scan" for _, name in primitives(program.jaxpr))


def primitives(jaxpr, path=()):
  """(enclosing primitives, name) of every primitive of a program, however deep."""
  for equation in jaxpr.eqns:
    yield path, equation.primitive.name
    for value in equation.params.values():
      for part in value if isinstance(value, tuple | list) else [value]:
        inner = getattr(part, "jaxpr", part)  # of a closed program
        if hasattr(inner, "eqns"):
          yield from primitives(inner, (*path, equation.primitive.name))
