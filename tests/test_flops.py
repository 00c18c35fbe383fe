"""What is counted, against what is known: published counts, and programs done by hand."""

import conftest
import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import config as config_lib
from jaxpref import sharding
from jaxpref.models import pipeline as pipeline_lib
from jaxpref.models import vae as vae_lib
from jaxpref.training import flops, programs, setup

SHAPE = jax.ShapeDtypeStruct


def count(fun, *shapes):
  return flops.count(jax.make_jaxpr(fun)(*(SHAPE(s, jnp.float32) for s in shapes)))


def test_products_and_convolutions():
  assert count(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 840
  assert count(lambda a, b: a + b, (3,), (3,)) == 0

  def conv(x, kernel, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )

  shapes = (2, 8, 8, 6), (3, 3, 6, 4)
  assert count(conv, *shapes) == 2 * (2 * 8 * 8 * 4) * 9 * 6
  assert count(lambda x, k: conv(x, k, groups=2), (2, 8, 8, 6), (3, 3, 3, 4)) == 27648
  for stride in (1, 2):  # a backward pass is two forward passes
    forward = count(lambda x, k, s=stride: conv(x, k, s), *shapes)
    both = count(
      jax.grad(lambda x, k, s=stride: jnp.square(conv(x, k, s)).sum(), (0, 1)), *shapes
    )
    assert both == 3 * forward


def test_what_holds_other_programs():
  product = lambda a, b: a @ b  # noqa: E731
  shapes, once = ((5, 5), (5, 5)), 2 * 125
  scanned = lambda a, b: jax.lax.scan(lambda c, _: (c @ b, None), a, length=7)[0]  # noqa: E731
  assert count(scanned, *shapes) == 7 * once
  either = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a @ b @ b)  # noqa: E731
  assert count(either, *shapes) == 2 * once
  loop = lambda a, b: jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ b, a)  # noqa: E731
  assert count(loop, *shapes) == once
  assert count(jax.jit(jax.checkpoint(product)), *shapes) == once
  mesh = sharding.make_mesh()
  spec = jax.sharding.PartitionSpec("data")
  split = jax.shard_map(
    product, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=spec
  )
  assert count(split, (8, 5), (5, 5)) == 2 * 8 * 25


@pytest.mark.long
@pytest.mark.parametrize(("name", "tera"), [("sd15", 0.8033), ("sdxl", 6.761)])
def test_forward_passes_of_the_real_models(name, tera, tmp_path):
  pipeline = families.describe(name, tmp_path)
  assert flops.of_forward(pipeline) / 1e12 == pytest.approx(tera, rel=2e-3)
  if name == "sd15":
    improver = pipeline_lib.widen(pipeline)
    assert flops.of_forward(improver) / 1e12 == pytest.approx(0.8034, rel=2e-3)


# Forward passes of SD 1.5 per row, by hand: what the method does with a row's images.
PASSES = {
  "sft": 3,
  "csft": 3,
  "kto": 4,
  "mapo": 6,
  "simpo": 6,
  "dpo": 8,
  "dspo": 8,
  "sdpo": 8,
  "spin": 8,
  "listwise": 3 * 4,
  "dro": 3 + 2,
  "improver": 3,
  "rwr": 3,
  "awm": 3 + 1 + 1,
  "nft": 3 + 1 + 1,
  "dgpo": 4 * (3 + 1 + 1),
  "ppo": 3,
  "d3po": 2 * (3 + 1),
  "spo": 3 + 1,  # both steps of a pair begin at one state
  "prdp": 2 * 1 * (1 + 3 + 1),  # two trajectories of one noisy step, in two passes
}
OPTIONS = {
  "dro": [("rollout.batch_size=4", 3 + 2), ("rollout.refresh_every=2", 6 + 2)],
  "ppo": [
    ("rollout.guidance=3.0", 2 * 3),
    ("loss.weight_reference=0.1", 3 + 1),
    ("rounds.updates=2", 3 + 1),
  ],
  "spo": [("steps.apart=2", 2 * (3 + 1))],  # the steps of a pair begin at two states
  "prdp": [("rounds.updates=2", 2 * 1 * (1 + 3 + 1 + 1))],
  "dpo": [("data.noise_draws=2", 6), ("lora.rank=2", 2 * 2 + 2)],
}
CASES = [(name, "", passes) for name, passes in PASSES.items()]
CASES += [(name, *option) for name, options in OPTIONS.items() for option in options]


@pytest.mark.long
@pytest.mark.parametrize(("name", "option", "passes"), CASES)
def test_a_step_costs_what_its_method_says(name, option, passes, monkeypatch):
  """The step as it is traced, the published count, and the one that runs report."""
  monkeypatch.chdir(conftest.ROOT)
  fields = [f"--config=configs/{name}.py:tiny", "--config.model.path=shapes"]
  fields += [f"--config.{field}" for field in [option] if field]
  config, _ = config_lib.parse_args(fields, flags={})
  checked = setup.check(config, mesh=sharding.make_mesh())
  if name == "listwise":
    passes *= config.data.list_size / 3
  forward = flops.of_forward(checked.pipeline)
  rows = config.train.batch_size
  cost = flops.of_update(checked, forward)
  assert sum(cost.values()) - cost.get("rollout", 0.0) == passes * rows * forward
  program, arguments = programs.abstract_programs(checked)
  traced = flops.count(jax.make_jaxpr(program.train_step)(*arguments))
  # Gradients end at the first addition, which is not in the first layer.
  within = 0.06 if config.lora.rank else 0.02
  assert traced == pytest.approx(passes * rows * forward, rel=within)
  if program.rollout:
    state = arguments.state
    one_step = flops.count(
      jax.make_jaxpr(program.rollout)(
        *(state.params, state.seed, state.update, arguments.batch["cond"], arguments.uncond)
      )
    )
    assert one_step == pytest.approx(rows * forward, rel=0.001)


@pytest.mark.long
def test_a_round_costs_its_samplers_calls(monkeypatch):
  """The sampler that keeps steps as it is traced, without the decoder, and what is counted."""
  monkeypatch.chdir(conftest.ROOT)
  fields = ["--config=configs/ppo.py:tiny", "--config.model.path=shapes"]
  fields += ["--config.rollout.guidance=3.0"]
  config, _ = config_lib.parse_args(fields, flags={})
  checked = setup.check(config, mesh=sharding.make_mesh())
  pipeline, images = checked.pipeline, 8
  program, arguments = programs.abstract_programs(checked)
  vae = pipeline_lib.abstract_params(pipeline.modules["vae"])
  numbers = lambda *shape: SHAPE(shape, jnp.uint32)  # noqa: E731
  chosen = (SHAPE((4,), jnp.float32), SHAPE((images, 3), jnp.int32), numbers(images))
  traced = flops.count(
    jax.make_jaxpr(program.sample)(
      *(arguments.state.params, vae, pipeline.abstract_cond(images), arguments.uncond),
      *(numbers(images), chosen),
    )
  )
  decode = jax.make_jaxpr(lambda *a: vae_lib.decode(pipeline.modules["vae"], *a))
  traced -= flops.count(decode(vae, SHAPE((images, *pipeline.latent_shape), jnp.float32)))
  cost = flops.of_update(checked, flops.of_forward(pipeline))
  assert traced == pytest.approx(cost["rollout"], rel=0.02)


# Predictions that an update makes for a prompt: 3 steps, guided or not;
# a step that learns is done twice, and once backwards. The loop of ReFL counts as one step.
PATHWISE = {
  "draft": (["pathwise.last=2"], 2 * (1 + 2 * 4)),
  "draft_lv": (["pathwise.repeats=3"], 2 * (3 + 3 * 4)),
  "refl": (["pathwise.first=1", "pathwise.end=3"], 2 + 0.5 + 3),
  "alignprop": (["lora.rank=4", "pathwise.last=2"], 2 * (1 + 2 * 3)),
}


@pytest.mark.parametrize(
  "name", [n if n == "draft" else pytest.param(n, marks=pytest.mark.long) for n in PATHWISE]
)
def test_updates_that_sample_cost_what_is_counted(name, monkeypatch):
  monkeypatch.chdir(conftest.ROOT)
  options, evaluations = PATHWISE[name]
  options = [*options, "rollout.num_steps=3", "model.path=shapes"]
  fields = [f"--config=configs/{name}.py:tiny", *(f"--config.{o}" for o in options)]
  config, _ = config_lib.parse_args(fields, flags={})
  checked = setup.check(config, mesh=sharding.make_mesh())
  forward, rows = flops.of_forward(checked.pipeline), config.train.batch_size
  cost = flops.of_update(checked, forward)
  assert cost["policy"] + cost["rollout"] == evaluations * rows * forward
  program, arguments = programs.abstract_programs(checked)
  traced = flops.count(jax.make_jaxpr(program.train_step)(*arguments))
  looped = 1.5 * rows * forward if name == "refl" else 0.0
  within = 0.06 if config.lora.rank else 0.02
  assert traced == pytest.approx(sum(cost.values()) - looped, rel=within)
  assert cost["judge"] > 0.02 * traced  # or an error of it would not show


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("chunk", [8, 2])
def test_expected_steps_are_the_mean_of_those_taken(states, chunk):
  rng = np.random.default_rng(0)
  first = rng.integers(20, size=(20_000, 8, 1))
  last = ((first + 20 // states * np.arange(states)) % 20).max(-1)
  taken = 1 + np.sort(last).reshape(20_000, -1, chunk).max(-1)
  expected = flops.expected_steps(8, 20, states=states, chunk=chunk)
  assert taken.mean() == pytest.approx(expected, rel=0.003)
