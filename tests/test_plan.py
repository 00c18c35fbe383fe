"""Plans: what is counted, what fits, what is refused; compiled for a TPU where libtpu is."""

import importlib.util
import json
import os
import subprocess
import sys

import conftest
import families
import jax
import pytest

from jaxpref import config as config_lib
from jaxpref import sharding
from jaxpref.errors import UserError
from jaxpref.models import step_reward
from jaxpref.models.pipeline import abstract_params
from jaxpref.plan import estimate, memory, tpu_compiler
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.scorers import load_reward
from jaxpref.training import programs, setup


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
  monkeypatch.chdir(conftest.ROOT)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
  return families.write_configs("sd15", tmp_path_factory.mktemp("sd15"))


def planned(model, topology, *fields, config="configs/dro.py:sd15", **options):
  fields = [f"model.path={model}", *fields]
  arguments = [f"--config={config}", *(f"--config.{field}" for field in fields)]
  return estimate.plan(config_lib.parse_args(arguments, flags={})[0], topology, **options)


def test_diffusion_dro_of_sd15(sd15):
  """Against figures known by other ways: parameters, FLOPs, bytes of the state."""
  numbers = planned(sd15, "v5e:4x4", "mesh.fsdp=4", mfu=0.5, search=False)
  assert numbers["parameters"] == numbers["trained"] == 859_520_964
  assert numbers["devices"] == 16 and numbers["mesh"] == {"data": 4, "fsdp": 4}
  forward = 0.8033e12
  flops = numbers["flops"]
  assert flops["policy"] == pytest.approx(3 * 256 * forward, rel=2e-3)
  assert flops["reference"] == pytest.approx(2 * 256 * forward, rel=2e-3)
  # Four lots, sorted: about the mean of the quarters' largest.
  assert 11.5 < flops["rollout"] / (256 * forward) < 13.5
  assert numbers["seconds"] == pytest.approx(sum(flops.values()) / 16 / (0.5 * 197e12))
  assert numbers["hours"] == pytest.approx(numbers["seconds"] * 1600 / 3600)
  memory = numbers["memory"]
  state = 4 * 4 * 859_520_964 / 4 / 2**30  # parameters, two moments, average; in float32
  # A few small tensors stay whole.
  assert memory["parameters, moments, average"] == pytest.approx(state, rel=0.03)
  assert memory["frozen copies"] == pytest.approx(state / 8, rel=0.15)  # more tensors are small
  assert memory["gradients"] == pytest.approx(2 * state / 4, rel=0.03)  # a sum and its part
  # Policy and reference, gathered in bfloat16.
  assert memory["weights as computed with"] == 2 * 2 * 859_520_964 / 2**30
  kernels = 84.93e6  # of the text encoder, in bfloat16: 12 layers with 12 x 768^2 weights
  assert memory["text encoders, VAE"] == pytest.approx(
    ((123.06e6 + 83.65e6) * 4 - kernels * 2) / 4 / 2**30, rel=0.05
  )
  one = memory["kept for the backward pass"]
  assert one == pytest.approx(0.148, rel=0.02)  # a row a device and micro-batch, remat blocks
  assert numbers["fits"] and memory["total"] == pytest.approx(
    sum(v for k, v in memory.items() if k != "total")
  )
  text = estimate.describe(numbers | {"fits": False})
  assert "does NOT fit into 90 % of 16 GiB" in text and "859,520,964" in text


@pytest.mark.long
def test_other_methods_and_devices():
  lora = planned(
    "shapes", "h200:1", "lora.rank=8", search=False, config="configs/dpo.py:shapes"
  )
  assert lora["trained"] < lora["parameters"] / 10 and lora["fits"]
  assert lora["flops"].keys() == {"policy", "reference"}
  improver = planned("shapes", "h100:8", search=False, config="configs/improver.py:shapes")
  assert improver["parameters"] == 3_984_068 + 4 * 64 * 9
  spin = planned("shapes", "v5p:2x2x2", search=False, config="configs/spin.py:shapes")
  assert spin["fits"] and spin["hours"] == pytest.approx(spin["seconds"] * 3 * 50 / 3600)
  # Its frozen parts are the base, for the evaluation, and the start, its reference.
  dpo = planned("shapes", "v5p:2x2x2", search=False, config="configs/dpo.py:shapes")
  assert spin["memory"]["frozen copies"] == 2 * dpo["memory"]["frozen copies"]


def _bytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_what_judges_samples_is_part_of_the_memory():
  """Decoder and scorers, for each image at once; one step of a path, not all of them."""
  config = config_lib.parse_args(["--config=configs/draft.py:shapes"], flags={})[0]
  checked = setup.check(config, mesh=sharding.abstract_mesh(config.mesh, 1))
  judge, pipeline = checked.judge, checked.pipeline
  whole, _ = memory.judge_shapes(checked)
  tokens = programs.abstract_prompts(checked, 1)["rows"]["tokens"]
  kept = memory.kept_by_judge(judge, pipeline, tokens)
  # XLA's own count for the gradient of one image, which has scratch space too.
  one = jax.ShapeDtypeStruct(pipeline.latent_shape, "float32")
  words = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tokens)
  reward = lambda x, params, words: sum(judge.score_one(params, x, words).values())  # noqa: E731
  compiled = jax.jit(jax.grad(reward)).lower(one, whole, words).compile()
  assert 0.5 < kept / compiled.memory_analysis().temp_size_in_bytes < 1

  def found(*fields):
    return planned("shapes", "h200:1", *fields, config="configs/draft.py:shapes", search=False)

  numbers = found("pathwise.at_once=32")["memory"]
  vae = _bytes(abstract_params(pipeline.modules["vae"]))
  scorer = _bytes(judge.rewards["shapes.preference"].params)
  assert numbers["judge of samples"] == (vae + scorer) / 2**30
  assert numbers["kept for the backward pass"] == 32 * kept / 2**30
  assert numbers["batch"] < 1e-3  # without the judge's weights, which are arguments too
  # With one image at once the denoiser's step keeps more, with and without the prompt.
  step = memory.kept_bytes(pipeline, attention="xla", norm="lean", remat="none")
  few, more = (
    found("pathwise.at_once=1", "model.remat=none", *more)["memory"]
    for more in ([], ["pathwise.last=4", "rollout.num_steps=5"])
  )
  rows = config.train.batch_size // config.train.accumulate
  assert few["kept for the backward pass"] == pytest.approx(2 * rows * step / 2**30, rel=1e-6)
  assert more["kept for the backward pass"] == few["kept for the backward pass"]
  # ReFL does not recompute its prediction. DRaFT-LV judges several images of each prompt.
  refl, several = (
    planned("shapes", "h200:1", *more, config=f"configs/{name}.py:shapes", search=False)
    for name, more in (
      ("refl", []),
      ("draft_lv", ["pathwise.at_once=64", "pathwise.repeats=2"]),
    )
  )
  config = config_lib.load_config("refl:shapes")
  rows = config.train.batch_size // config.train.accumulate
  guided = 2 if config.rollout.guidance > 1 else 1
  both = guided * rows * step + min(rows, config.pathwise.at_once) * kept
  found_kept = refl["memory"]["kept for the backward pass"]
  assert found_kept == pytest.approx(both / 2**30, rel=1e-6)
  config = config_lib.load_config("draft_lv:shapes")
  judged = min(64, 2 * config.train.batch_size // config.train.accumulate)
  assert several["memory"]["kept for the backward pass"] == judged * kept / 2**30


@pytest.mark.long
def test_judges_of_candidates_and_their_training(sd15):
  lpo = planned("shapes", "h200:8", search=False, config="configs/lpo.py:shapes")
  trained = planned("shapes", "h200:1", search=False, config="configs/latent_reward.py:shapes")
  spo = planned("shapes", "h200:1", search=False, config="configs/spo.py:shapes")
  judges = [one["memory"]["judge of samples"] for one in (lpo, trained, spo)]
  assert judges[1] == 0 and judges[2] > 0
  vae = (
    spo["memory"]["judge of samples"] - _bytes(load_reward("shapes.preference").params) / 2**30
  )
  assert judges[0] == pytest.approx(vae + trained["trained"] * 4 / 2**30, rel=1e-6)
  # Half of a denoiser keeps less for an image than a denoiser.
  pair = planned("shapes", "h200:1", search=False, config="configs/dpo.py:shapes")
  one, other = (x["memory"]["kept for the backward pass"] for x in (trained, pair))
  rows = [
    config_lib.load_config(f"{name}:shapes").train.batch_size
    for name in ("latent_reward", "dpo")
  ]
  assert 0.2 < (one / rows[0]) / (other / rows[1]) < 1
  # At full width the latent judge is sharded as the denoiser is.
  fields = ["--config=configs/lpo.py:sd15", f"--config.model.path={sd15}"]
  config, _ = config_lib.parse_args(
    [*fields, "--config.mesh.fsdp=8", "--config.train.accumulate=1"], flags={}
  )
  checked = setup.check(config, mesh=sharding.abstract_mesh(config.mesh, 8))
  whole, split = memory.judge_shapes(checked)
  assert set(whole) == {"vae"} and _bytes(split) > 2**29
  assert memory.bytes_on_device(split, checked.mesh) < _bytes(split) / 6  # but small tensors


def test_step_aware_judges_and_their_training(tmp_path):
  fields = ["--config=configs/step_reward.py:shapes", "--config.judge.at_once=1"]
  config, _ = config_lib.parse_args(fields, flags={})
  checked = setup.check(config, mesh=sharding.abstract_mesh(config.mesh, 1))
  pipeline = checked.pipeline
  image, recomputed = memory.kept_by_step_reward(pipeline)
  assert image == 32 * 32 * 3 * 4 + _bytes(pipeline.abstract_cond(1)["tokens"])
  # XLA's own count for the gradient of one image, which recomputes what is cheap.
  scorer = pipeline.scorer
  params = step_reward.abstract_params(scorer)
  score = step_reward.make_score_images(scorer)
  shape = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
  level, ids = jax.ShapeDtypeStruct((1,), "int32"), scorer.tokenize([""])
  gradient = jax.grad(lambda *given: score(*given).sum())
  compiled = jax.jit(gradient).lower(params, shape, level, ids).compile()
  assert 0.7 < recomputed / compiled.memory_analysis().temp_size_in_bytes < 1.6
  given = {"config": "configs/step_reward.py:shapes", "search": False}
  trained = planned("shapes", "h200:1", "judge.at_once=3", **given)
  kept = 2 * config.train.batch_size * image + 3 * recomputed
  assert trained["memory"]["kept for the backward pass"] == kept / 2**30
  assert trained["trained"] == sum(x.size for x in jax.tree.leaves(params))
  assert trained["memory"]["judge of samples"] == 0
  assert {"policy", "reference"} == trained["flops"].keys()
  remats = {
    s["model.remat"] for s in planned("shapes", "h200:1", config=given["config"])["settings"]
  }
  assert len(remats) == 1  # the denoiser has no backward pass
  # A candidate's judge is the trained model, whole on every device.
  workdir_lib.write_config(tmp_path, config)
  (tmp_path / "checkpoints").mkdir()
  given["config"] = "configs/spo.py:shapes"
  spo = planned("shapes", "h200:8", f"steps.judge={tmp_path}", **given)
  judge = _bytes(abstract_params(pipeline.modules["vae"])) + _bytes(params)
  assert spo["memory"]["judge of samples"] == judge / 2**30
  assert spo["flops"]["judge"] > 0


@pytest.mark.long
def test_settings_that_fit_are_found():
  """On a device that holds the bundled model's state only where it is split."""
  fields = ("train.batch_size=4096", "data.num_experts=500")
  found = planned("shapes", "v5e:4x4", *fields, config="configs/sft.py:shapes")["settings"]
  fitting = {(s["mesh.fsdp"], s["model.remat"]): s for s in found}
  assert len(fitting) == len(found) and {f for f, _ in fitting} == {1, 2, 4, 8, 16}
  assert all(s["memory"] <= 0.9 * 16 for s in found)
  # More recomputation or more splitting never asks for smaller micro-batches.
  for fsdp in (1, 16):
    rows = [
      fitting[fsdp, r]["rows of a device at once"] for r in ("none", "transformer", "full")
    ]
    assert rows == sorted(rows)
  assert "model.remat  train.accumulate" in estimate.describe(
    planned("shapes", "v5e:4x4", search=False, config="configs/sft.py:shapes")
    | {"settings": found}
  )


@pytest.mark.long
def test_low_rank_additions_draw_with_their_base():
  """The arguments that the rollout is compiled for are those it is called with."""
  config = ["--config=configs/dro.py:tiny", "--config.lora.rank=2"]
  checked = setup.check(config_lib.parse_args(config, flags={})[0], mesh=sharding.make_mesh())
  program, arguments = programs.abstract_programs(checked)
  rest = (arguments.state, arguments.base, arguments.batch["cond"], arguments.uncond)
  drawn = jax.eval_shape(program.rollout, *programs.rollout_arguments(program, *rest))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
    lambda x: (x.shape, x.dtype), arguments.rollout
  )


REFUSALS = {
  "no topology": ([], "--topology is missing"),
  "unknown device": (["--topology=tpu9:8"], "'tpu9' is not one of v4, v5e"),
  "no number": (["--topology=h100"], "lacks a number of devices, such as h100:8"),
  "other number": (["--topology=h100:4x"], "lacks a number of devices"),
  "too many": (["--topology=h100:" + "9" * 5000], "more than 65,536 devices"),
  "mfu": (["--topology=h100:8", "--mfu=40"], "--mfu must be above 0"),
  "compile": (["--topology=h100:8", "--compile=maybe"], "'yes' or 'no'"),
  "a GPU": (["--topology=h100:8", "--compile=yes"], "works only for TPUs"),
  "no run": (["--config=configs/shapes_base.py", "--topology=h100:8"], "not train with"),
  "no file": (["--topology=h100:8", "--json="], "--json must be a file to write"),
  "a directory": (["--topology=h100:8", "--json=/tmp"], "--json must be a file to write"),
  "mesh": (
    ["--topology=h100:8", "--config.mesh.fsdp=3"],
    "mesh.fsdp must divide the",
  ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line(case, capsys):
  arguments, words = REFUSALS[case]
  assert estimate.main(["--config=configs/sft.py:shapes", *arguments]) == 2
  error = capsys.readouterr().err
  assert words in error and error.count("\n") == 1


HLO = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

%inner (p: f32[8]) -> f32[8] {
  ROOT %g = f32[8]{0} all-gather(%p), dimensions={0}
}

%body (p: (s32[], f32[4,256])) -> (s32[], f32[4,256]) {
  %f = f32[8] fusion(%q), kind=kLoop, calls=%inner
  ROOT %t = (s32[], f32[4,256]) tuple(%i, %x)
}

ENTRY %main (p: f32[4,256]) -> f32[4,256] {
  %w = (s32[], f32[4,256]) while(%t), condition=%cond, body=%body
  %r = (f32[512,1024]{1,0}, bf16[1024]{0}) all-reduce(%x, %y), to_apply=%add
  %a = (f32[1,256]{1,0}, f32[4,256]{1,0}) all-gather-start(%z), dimensions={0}
  ROOT %s = f32[4,256] all-reduce-start(%z), to_apply=%add
}
"""


def test_messages_are_found_in_a_program():
  found = tpu_compiler.collectives(HLO)
  assert found.keys() == {"all-gather", "all-reduce"}
  assert found["all-gather"] == {"count": 2, "in loops": 1, "MiB": (32 + 4096) / 2**20}
  reduced = found["all-reduce"]
  assert reduced["count"] == 2 and reduced["in loops"] == 0
  assert reduced["MiB"] == 2 + 2048 / 2**20 + 4096 / 2**20


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_the_tpu_compiler_accounts_for_a_step(tmp_path):
  model = families.write_configs("sdxl", tmp_path / "xl", vocab_size=500, shallow=True)
  command = [sys.executable, "-m", "jaxpref.plan", "--config=configs/dro.py:sdxl"]
  fields = {"model.path": model, "train.batch_size": 16, "train.accumulate": 2}
  command += [f"--config.{k}={v}" for k, v in fields.items()]
  command += ["--topology=v5e:2x2", "--compile=yes", f"--json={tmp_path / 'plan.json'}"]
  done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  compiled = json.loads((tmp_path / "plan.json").read_text())["compiled"]
  assert compiled["train step"]["memory"]["total"] < 16
  reduced = compiled["train step"]["collectives"]["all-reduce"]
  assert reduced["in loops"] == 0 and reduced["MiB"] > 0


def test_the_example_of_the_error_is_right():
  chip, count = estimate.parse_topology("v5p:2x2x2")
  assert chip.kind == "TPU v5" and count == 8
  with pytest.raises(UserError, match="is not one of"):
    estimate.parse_topology("8")
