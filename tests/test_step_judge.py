"""Runs that train a step-aware preference model, and runs of SPO whose candidates it judges."""

import functools
import json
import shutil

import candidates_main
import conftest
import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import scorer_models
import step_reward_main
from built_sets import built, prepare
from safetensors.numpy import load_file

from jaxpref import config as config_lib
from jaxpref import export, main, scorers, sharding
from jaxpref.errors import UserError
from jaxpref.models import save, step_reward
from jaxpref.scorers.base import store
from jaxpref.training import flops, inputs, load_run, programs, run_state, setup
from jaxpref.training.step_judge import StepJudge


@pytest.fixture(scope="module", autouse=True)
def surroundings(tfds_dir):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    yield


@pytest.fixture(scope="module")
def trained(tiny_pipeline, tmp_path_factory):
  """A run of 24 updates of a reward model, resumed after 12."""
  fields = {"optim.lr": 1e-4, "train.updates_per_iteration": 12, "train.batch_size": 16}
  whole, _ = runs.check_resumed(
    *(tiny_pipeline, tmp_path_factory.mktemp("judge"), "step_reward"),
    updates=(12, 24),
    **fields,
  )
  return whole


@pytest.mark.long
def test_what_a_run_leaves(trained):
  lines = runs.lines(trained)
  loss = [line["loss"] for line in lines]
  assert np.mean(loss[-6:]) < np.mean(loss[:6])  # it learns
  assert all(line["optim/grad_norm"] > 0 for line in lines)
  tested = json.loads((trained / "evaluation" / "24" / "accuracy.json").read_text())
  assert [of["level"] for of in tested] == [100, 300, 500, 700, 900]
  page = (trained / "report.html").read_text()
  assert "Accuracy by noise level" in page and "judge/accuracy" in page
  found = load_run.load_reward_model(str(trained))
  assert isinstance(found, load_run.StepReward)
  wanted = step_reward.abstract_params(found.scorer)
  assert jax.tree.map(jnp.shape, found.params) == jax.tree.map(jnp.shape, wanted)
  ema = runs.parameters(trained)[1]
  np.testing.assert_array_equal(
    found.params["time"]["in"]["kernel"], ema["/ema/time/in/kernel"]
  )
  start = scorers.load_reward("shapes.preference").params
  begin = step_reward.init_params(found.scorer, start, jax.random.key(0))
  for path in ("image", "text"):  # both towers have been trained, and the levels
    moved = jax.tree.map(
      lambda a, b: np.abs(a - b).max(), found.params["model"][path], begin["model"][path]
    )
    assert max(jax.tree.leaves(moved)) > 0
  assert np.abs(found.params["time"]["blocks"]["tower"]["kernel"]).max() > 0


@pytest.mark.long
def test_it_is_no_model_of_images(trained, tmp_path, capsys):
  with pytest.raises(UserError, match="has trained a step-aware reward model"):
    load_run.load(str(trained))
  assert export.main([f"--workdir={trained}", f"--out={tmp_path / 'x'}"]) == 2
  assert "to a run of configs/spo.py" in capsys.readouterr().err


@pytest.mark.long
def test_spo_with_the_judge_resumes_to_the_same_bits(trained, tiny_pipeline, tmp_path, capsys):
  judge = shutil.copytree(trained, tmp_path / "judge")
  fields = {"evaluate.num_prompts": 1, "optim.lr": 0.01, "train.updates_per_iteration": 1}
  fields["steps.judge"] = judge
  whole, _ = runs.check_resumed(tiny_pipeline, tmp_path, "spo", updates=(1, 2), **fields)
  first, last = runs.lines(whole)
  assert 0 < first["step_pairs/decided"] <= 1 and first["optim/grad_norm"] > 0
  assert last["err/policy_w"] != last["err/reference_w"]
  assert load_run.deciding_scorers(str(whole)) == ("shapes.preference",)
  shutil.rmtree(judge / "checkpoints" / "24")  # leaves another model
  fields["train.num_updates"] = 3
  assert main.main(runs.arguments(tiny_pipeline, whole, "spo", **fields)) == 2
  assert "reward model in steps.judge" in capsys.readouterr().err
  shutil.rmtree(judge)  # what it began as still counts
  assert load_run.deciding_scorers(str(whole)) == ("shapes.preference",)


@pytest.mark.long
def test_what_judge_and_policy_must_share(trained, tiny_pipeline, tmp_path):
  """The VAE and the scheduler; the judge has a text encoder of its own."""
  config = config_lib.load_config("spo:tiny")
  config.steps.judge = str(trained)

  def changed(name, file, change):
    base = shutil.copytree(tiny_pipeline, tmp_path / name)
    change(base / file)
    config.model.path = str(base)

  def add_one(weights):
    tensors = load_file(weights)
    name = min(tensors)
    save.save_tensors(weights, tensors | {name: tensors[name] + 1})

  def widen(file):
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.013}))

  changed("vae", "vae/diffusion_pytorch_model.safetensors", add_one)
  with pytest.raises(UserError, match="was trained with another vae"):
    setup.check(config)
  changed("scheduler", "scheduler/scheduler_config.json", widen)
  with pytest.raises(UserError, match="was trained with another scheduler"):
    setup.check(config)
  changed("text", "text_encoder/model.safetensors", add_one)
  assert isinstance(setup.check(config).judge, StepJudge)


@pytest.mark.long
@pytest.mark.parametrize("scorer", ["shapes.preference", "pickscore.v1"])
def test_flops_of_an_update(scorer, tiny_pipeline, tmp_path, monkeypatch):
  monkeypatch.setenv(store.ROOT, str(tmp_path))
  scorer_models.write_clip(tmp_path / "pickscore.v1", "gelu", 7)
  config = config_lib.load_config("step_reward:tiny")
  config.model.path, config.judge.scorer = str(tiny_pipeline), scorer
  checked = setup.check(config)
  forward = flops.of_forward(checked.pipeline)
  work = flops.of_update(checked, forward)
  program, arguments = programs.abstract_programs(checked)
  traced = flops.count(jax.make_jaxpr(program.train_step)(*arguments))
  assert traced == pytest.approx(sum(work.values()), rel=0.02)
  assert min(work.values()) > 0.04 * traced  # or an error of one would not show


@pytest.mark.long
def test_flops_of_candidates(trained, tiny_pipeline):
  config = config_lib.load_config("spo:tiny")
  # The judge has been trained on images of twice this size.
  config.model.path, config.model.image_size = str(tiny_pipeline), 32
  checked = setup.check(config)
  forward = flops.of_forward(checked.pipeline)
  plain = flops.of_update(checked, forward)
  config.steps.judge = str(trained)
  checked = setup.check(config)
  judged = flops.of_update(checked, forward)
  assert judged["rollout"] == plain["rollout"] and "judge" not in plain
  images = config.rounds.num_prompts * config.steps.candidates * config.rollout.num_steps
  judge, reward = checked.judge, checked.judge.reward
  x0 = np.zeros((1, *checked.pipeline.latent_shape), np.float32)
  params = {"vae": checked.pipeline.params["vae"], "model": reward.params}
  given = params, x0, np.zeros(1, np.int32), reward.scorer.tokenize([""])
  one = flops.count(jax.make_jaxpr(judge.score)(*given))
  assert judged["judge"] == pytest.approx(images * one, rel=1e-6)
  traced = candidates_main.sampled_flops(checked)
  assert traced == pytest.approx(judged["rollout"] + judged["judge"], rel=0.02)
  assert min(judged["rollout"], judged["judge"]) > 0.04 * traced


@pytest.mark.parametrize(
  ("method", "changes", "message"),
  [
    ("spo", {"steps.judge": "runs/missing"}, "is not the workdir of a reward model"),
    ("step_reward", {"judge.scorer": "toy_scorers.red"}, "the image tower of CLIP"),
    ("step_reward", {"judge.scorer": "shapes.correct"}, "is not a differentiable scorer"),
    ("step_reward", {"lora.rank": 2}, "lora.rank and model.start do not apply"),
    ("step_reward", {"loss.name": "sft"}, "the section judge do not fit"),
    ("step_reward", {"loss.space": "eps"}, "has no errors"),
    ("step_reward", {"data.prompt_dropout": 0.1}, "data.prompt_dropout must be 0"),
  ],
)
def test_settings_that_do_not_fit_are_refused(method, changes, message, tiny_pipeline):
  config = runs.config(method, **changes)
  config.model.path = str(tiny_pipeline)
  with pytest.raises(UserError) as error:
    setup.check(config)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_a_plan_needs_the_run_of_its_judge(tiny_pipeline):
  config = runs.config("spo", **{"steps.judge": "runs/missing"})
  config.model.path = str(tiny_pipeline)
  with pytest.raises(UserError, match="is not the workdir of a reward model"):
    setup.check(config, mesh=sharding.abstract_mesh(config.mesh, 8))


def test_it_resumes_with_the_same_scorer_only(tiny_pipeline):
  config = runs.config("step_reward")
  config.model.path = str(tiny_pipeline)
  stored = {"scorer": "a", "num_updates": 2}
  run_state.check_resumes(stored, stored, 1, config)
  with pytest.raises(UserError, match=r"weights of judge.scorer \(shapes.preference\) have"):
    run_state.check_resumes(stored, stored | {"scorer": "b"}, 1, config)


def test_a_scorer_of_several_arrays_is_refused(tiny_pipeline, monkeypatch):
  found = scorers.load_reward("shapes.preference")
  several = found._replace(tokenize=lambda prompts: {"ids": found.tokenize(prompts)})
  monkeypatch.setattr(scorers, "load_reward", lambda name, **options: several)
  config = runs.config("step_reward")
  config.model.path = str(tiny_pipeline)
  with pytest.raises(UserError, match="must read a prompt as one array"):
    setup.check(config)


def test_flow_matching_models_are_refused(flux_directory):
  config = runs.config("step_reward")
  config.model.path = str(flux_directory)
  with pytest.raises(UserError, match="is a flow-matching model"):
    setup.check(config)


@pytest.mark.long
def test_tokens_are_equal_wherever_rows_are_encoded(tiny_pipeline, tmp_path):
  path = built("random_rows", "pairs", tmp_path / "set")
  found = {}
  for where in ("memory", "ahead", "disk"):
    fields = {"data.cache": where, "judge.held_out": 2, "data.flip": True}
    prepared = prepare(tiny_pipeline, path, "step_reward", **fields)
    opened = inputs.open_rows(prepared)
    (part,) = opened.parts
    index = np.arange(inputs.part_length(part))
    batch = sharding.place_batch(part.rows, prepared.mesh, index)
    found[where] = jax.device_get(opened.encode(batch))
    rows = prepared.rows
    want = prepared.pipeline.scorer.tokenize([rows.caption_of(i) for i in range(len(rows))])
    np.testing.assert_array_equal(found[where]["cond"]["tokens"], np.concatenate([want] * 2))
  compare = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=2**-9)
  for where in ("ahead", "disk"):
    jax.tree.map(compare, found[where], found["memory"])


@pytest.mark.long
def test_eight_devices_train_as_one(tiny_pipeline):
  ours = step_reward_main.train(str(tiny_pipeline), data=1, fsdp=1)
  program = conftest.ROOT / "tests" / "step_reward_main.py"
  for data, fsdp in ((8, 1), (2, 4), (1, 8)):
    found = conftest.on_eight_devices(program, str(tiny_pipeline), str(data), str(fsdp))
    assert found["devices"] == 8
    for one, other in zip(found["history"], ours["history"], strict=True):
      for name, want in other.items():
        assert one[name] == pytest.approx(want, rel=2e-3, abs=2e-4), name
    for name, want in ours["squares"].items():
      # The gradient of a key's bias is 0 but for rounding, which Adam scales up.
      if not name.endswith(("['key']['bias']", "['k_proj']['bias']")):
        assert found["squares"][name] == pytest.approx(want, rel=1e-3, abs=1e-6), name


@pytest.mark.long
@pytest.mark.parametrize("preset", ["sd15", "sdxl"])
def test_presets_train_models_of_reduced_width(preset, tmp_path, capsys, monkeypatch):
  base = families.write_pipeline(preset, tmp_path, shallow=True)
  monkeypatch.setenv(store.ROOT, str(tmp_path / "scorers"))
  scorer_models.write_clip(tmp_path / "scorers" / "pickscore.v1", "gelu", 7)
  small = {
    "model.path": base,
    "model.image_size": 0,
    "data.source": "shapes",
    "data.num_rows": 20,
    "judge.held_out": 4,
    "train.batch_size": 4,
    "train.accumulate": 2,
    "train.num_updates": 1,
  }
  workdir = tmp_path / "run"
  assert len(runs.train_published(f"step_reward:{preset}", workdir, small, capsys)) == 1
  if preset == "sdxl":
    return
  del small["judge.held_out"]
  small |= {"steps.judge": workdir, "rounds.num_prompts": 2, "rounds.updates": 1}
  small |= {"train.batch_size": 4, "rollout.num_steps": 2, "lora.rank": 2}
  small |= {"data.num_experts": 2, "data.num_rows": 0, "steps.gap": 0, "steps.first": 0}
  small |= {"evaluate.num_steps": 2, "evaluate.images_per_prompt": 1, "evaluate.num_prompts": 2}
  small |= {"rounds.scorers": "('toy_scorers.red',)", "alarms.every": 0}
  logged = runs.train_published(f"spo:{preset}", tmp_path / "spo", small, capsys)
  assert len(logged) == 1


def test_presets_have_the_published_constants():
  for preset, lr, updates in (("sd15", 3e-6, 8000), ("sdxl", 1e-6, 7000)):
    c = config_lib.load_config(f"step_reward:{preset}")
    assert (c.optim.lr, c.train.num_updates, c.optim.warmup_updates) == (lr, updates, 500)
    assert c.train.batch_size == 16 * 4
    assert (c.optim.weight_decay, c.optim.schedule) == (0.3, "linear")
    assert (c.judge.scorer, c.judge.guidance) == ("pickscore.v1", 5.0)
    assert c.data.num_rows == 0 and c.data.latents == "sample"
