"""Rounds of online training: rows, order, settings, whole runs that end with the same bits."""

import json

import numpy as np
import pytest
import runs
from conftest import ROOT, start_cluster

from jaxpref import config as config_lib
from jaxpref import losses, main, sharding
from jaxpref.data import encode
from jaxpref.errors import UserError
from jaxpref.evaluation import sampling
from jaxpref.models import load_pipeline
from jaxpref.shapes import prompts
from jaxpref.training import policy_sampler, rounds, rounds_settings, step_rows

LATENTS = np.arange(6.0).reshape(6, 1, 1, 1)
GROUP, REWARD = np.array([0, 0, 0, 1, 1, 1]), np.array([0.1, 0.9, 0.5, 0.3, 0.3, 0.3])


def rows_of(kind):
  labels = {"advantage": np.arange(6) / 10}
  made = rounds.make_rows(kind, LATENTS, labels, GROUP, REWARD)
  return made["latents"][:, :, 0, 0, 0].tolist(), made["group"].tolist(), made["labels"]


def test_rows_of_each_kind():
  latents, group, labels = rows_of("scored")
  assert latents == [[0], [1], [2], [3], [4], [5]] and group == GROUP.tolist()
  np.testing.assert_allclose(labels["advantage"], np.arange(6) / 10)
  latents, group, labels = rows_of("groups")
  assert latents == [[0, 1, 2], [3, 4, 5]] and group == [0, 1]
  assert labels["advantage"].shape == (2, 3) and labels["advantage"][1, 0] == np.float32(0.3)
  # The second prompt has no pair: its rewards are equal.
  assert rows_of("pairs") == ([[1, 0]], [0], {})
  assert rows_of("experts") == ([[1], [3]], [0, 1], {})


def test_an_order_has_whole_passes():
  order = rounds.shuffle(5, 12, [0, 1])
  assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and len(order) == 12
  assert order[:5].tolist() != order[5:10].tolist()
  assert rounds.shuffle(5, 12, [0, 1]).tolist() == order.tolist()
  assert rounds.shuffle(5, 12, [0, 2]).tolist() != order.tolist()


def test_the_cursor_alone_says_which_prompts_follow():
  whole = rounds.take_prompts(0, 14, 5, seed=3)
  assert sorted(whole[:5]) == sorted(whole[5:10]) == list(range(5))
  assert rounds.take_prompts(4, 6, 5, seed=3).tolist() == whole[4:10].tolist()


@pytest.mark.parametrize(
  ("method", "changes", "message"),
  [
    ("awm", {"rounds.weights": (1.0, 2.0)}, "one entry for each scorer (got 1 and 2)"),
    ("awm", {"rounds.num_prompts": 3}, "a round has 12 rows, and its rounds.updates x"),
    ("awm", {"rounds.updates": 3}, "must be a multiple of rounds.updates = 3"),
    (
      "awm",
      {"evaluate.every": 1, "rounds.updates": 4},
      "train.updates_per_iteration = 2 must be a multiple of rounds.updates = 4",
    ),
    ("awm", {"data.latents": "sample"}, "data.latents = 'sample' does not apply to rounds"),
    ("best_of", {"rounds.sampler": "old"}, "loss 'sft' keeps no average of the policy"),
    ("nft", {"rounds.images_per_prompt": 1}, "a prompt's image nothing to be compared with"),
    ("awm", {"rounds.window": 8}, "rounds.window compares a reward with the last ones"),
    (
      "ppo",
      {"rounds.window": 8, "rounds.scorers": ("a.b", "a.c"), "rounds.weights": (1.0, 1.0)},
      "rounds.window compares a reward with the last ones",
    ),
  ],
)
def test_settings_that_do_not_fit_are_refused(method, changes, message):
  config = runs.config(method, **changes)
  with pytest.raises(UserError) as error:
    rounds_settings.check(config, losses.make_loss(config.loss, updates=config.rounds.updates))
  assert message in str(error.value)


def test_rounds_make_no_rows_of_other_kinds():
  config = config_lib.load_config("awm:tiny")
  loss = losses.make_loss(config_lib.load_config("kto:tiny").loss)
  with pytest.raises(UserError, match="rounds make rows of the kinds .* learns from singles"):
    rounds_settings.check(config, loss)


def test_a_loss_on_scored_rows_needs_rounds():
  config = config_lib.load_config("dpo:tiny")
  loss = losses.make_loss(config_lib.load_config("awm:tiny").loss)
  with pytest.raises(UserError, match="its config file must call base_config.rounds"):
    rounds_settings.check(config, loss)


def test_all_prompts_must_be_the_scorers():
  settings = config_lib.load_config("awm:tiny").rounds
  known = prompts.held_out(1)[0]
  rounds_settings.check_scorers(settings, [known])
  with pytest.raises(UserError, match="shapes scorers cannot judge it"):
    rounds_settings.check_scorers(settings, [known, "anything"])


@pytest.mark.long
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_seed_is_the_generators(tiny_pipeline, guidance):
  pipeline, mesh = load_pipeline(str(tiny_pipeline)), sharding.make_mesh()
  denoise = pipeline.make_denoise(mesh=mesh)
  settings = {"num_steps": 3, "guidance": guidance}
  sample = policy_sampler.make_policy_sampler(
    denoise, pipeline, solver="dpm_solver", order=2, **settings
  )
  captions, seeds = ["a red circle", "two blue squares"], np.array([2**31, 5], np.uint32)
  cond = encode.encode_prompts(pipeline, mesh, captions)
  uncond = encode.encode_no_prompt(pipeline, mesh)
  params = pipeline.params
  latents, decoded, steps = sample(params["unet"], params["vae"], cond, uncond, seeds)
  generate = sampling.make_generator(pipeline, mesh, batch_size=2, **settings)
  want = generate(params["unet"], cond, seeds)
  np.testing.assert_array_equal(decoded.pixels, want)
  assert decoded.finite.all() and latents.shape == (2, *pipeline.latent_shape)
  assert steps is None


# -------------------------------------------------------------------------- whole runs


@pytest.fixture
def surroundings(monkeypatch, tfds_dir):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))


FIELDS = {"rounds.updates": 2, "rounds.window": 8, "rounds.window_least": 2, "lora.rank": 2}
FIELDS["rounds.scale"] = "group"


@pytest.mark.long
def test_a_run_in_two_parts_ends_with_the_bits_of_a_whole_one(
  surroundings, tiny_pipeline, tmp_path
):
  """Cut where a checkpoint would fall inside of a round, with windows, old weights and LoRA."""
  fields = {**FIELDS, "train.updates_per_iteration": 1, "rounds.num_prompts": 4}
  whole, parts = runs.check_resumed(tiny_pipeline, tmp_path, "nft", updates=(18, 20), **fields)
  files = sorted(path.name for path in (whole / "rounds").iterdir())
  assert files == sorted(f"{k}.json" for k in range(10))
  for name in files:
    ours, theirs = (json.loads((at / "rounds" / name).read_text()) for at in (parts, whole))
    assert ours == theirs
  assert len(theirs["prompts"]) == 4 and len(theirs["seeds"]) == len(theirs["shapes.quality"])
  assert np.std(theirs["shapes.quality"]) > 0 and min(theirs["seeds"]) >= 2**31
  # Only whole rounds are saved: the state between them is small.
  steps = sorted(int(p.name) for p in (whole / "checkpoints").iterdir() if p.name.isdigit())
  assert steps == [18, 20]
  _, state = runs.parameters(whole)
  assert any(
    (state[path] != state[path.replace("/policy_copy", "/params")]).any()
    for path in state
    if path.startswith("/policy_copy")
  )
  line = runs.lines(whole)[-1]
  assert line["reward/mean"] == pytest.approx(np.mean(theirs["shapes.quality"]))
  assert line["reward/shapes.quality"] == line["reward/mean"]


def test_rows_of_trajectories():
  count = np.arange(6.0)
  steps = step_rows.Steps(
    np.broadcast_to(count[:, None, None, None, None, None], (6, 3, 2, 1, 1, 1)),
    {"std": np.broadcast_to(count[:, None], (6, 3))},
  )
  group = np.array([0, 0, 1, 1, 2, 2])
  made = {
    kind: rounds.make_rows(kind, LATENTS, {"advantage": count}, group, REWARD, steps)
    for kind in ("steps", "paths")
  }
  single, paths = made["steps"], made["paths"]
  assert single["latents"].shape == (18, 2, 1, 1, 1)
  by_row = single["latents"][:, 0, 0, 0, 0]
  np.testing.assert_array_equal(by_row, np.repeat(count, 3))
  np.testing.assert_array_equal(single["labels"]["advantage"], by_row)
  np.testing.assert_array_equal(single["labels"]["std"], by_row)
  np.testing.assert_array_equal(single["group"], np.repeat(group, 3))
  assert paths["latents"].shape == (3, 2, 3, 2, 1, 1, 1) and paths["group"].tolist() == [
    0,
    1,
    2,
  ]
  assert paths["labels"]["advantage"].tolist() == [[0, 1], [2, 3], [4, 5]]
  np.testing.assert_array_equal(paths["labels"]["std"][:, 1, 2], [1, 3, 5])


def test_the_better_image_is_first_in_each_of_its_pairs_of_steps():
  """Element ijk of the latents is image i, step j, input or output k."""
  image, step, side = np.meshgrid(np.arange(4.0), np.arange(3.0), np.arange(2.0), indexing="ij")
  steps = step_rows.Steps(
    (100 * image + 10 * step + side)[..., None, None, None],
    {"std": 10 * image[..., 0] + step[..., 0]},
  )
  reward = np.array([0.2, 0.9, 0.4, 0.4])  # the second pair is equal
  made = rounds.make_rows(
    "step_pairs", LATENTS[:4], {"reward": reward}, np.array([0, 0, 1, 1]), reward, steps
  )
  assert made["latents"].shape == (6, 4, 1, 1, 1)  # both inputs, then both outputs
  assert made["group"].tolist() == [0] * 3 + [1] * 3
  latents = made["latents"][..., 0, 0, 0]
  assert latents[:3].tolist() == [[100 + k, k, 101 + k, 1 + k] for k in (0, 10, 20)]
  assert latents[4].tolist() == [210, 310, 211, 311]
  assert made["labels"]["std"].tolist() == [
    *([10 + k, k] for k in range(3)),
    *([20 + k, 30 + k] for k in range(3)),
  ]
  np.testing.assert_allclose(made["labels"]["reward"], [[0.9, 0.2]] * 3 + [[0.4, 0.4]] * 3)


@pytest.mark.long
def test_steps_resumed_between_rounds_end_with_the_same_bits(
  surroundings, tiny_pipeline, tmp_path
):
  """With a moving window, guidance, the policy that has sampled, a reference, and LoRA."""
  fields = {
    "lora.rank": 2,
    "optim.lr": 0.01,
    "loss.weight_reference": 0.1,
    "rollout.guidance": 2.0,
    "rounds.updates": 2,
    "steps.window": 2,
    "steps.hold": 1,
    "train.batch_size": 8,
    "evaluate.num_prompts": 1,
  }
  whole, _ = runs.check_resumed(tiny_pipeline, tmp_path, "ppo", updates=(4, 6), **fields)
  lines = runs.lines(whole)
  assert [line["ratio/mean"] for line in lines[::2]] == [1.0] * 3  # new samples
  assert all(line["ratio/approx_kl"] > 0 for line in lines[1::2])
  assert lines[0]["distance/steps"] < 1e-12 < lines[-1]["distance/steps"]
  assert lines[-1]["err/old_x"] != lines[-1]["err/policy_x"]
  # Killed inside of a round, it begins that round again.
  fields["train.num_updates"] = 6
  killed = tmp_path / "killed"
  given = runs.arguments(tiny_pipeline, killed, "ppo", **fields)
  runs.kill(given, killed, tmp_path / "log", saved=4, logged=5)
  assert not (killed / "checkpoints" / "6").exists()
  assert main.main(given) == 0
  runs.check_same(killed, whole)
  assert [line["loss"] for line in runs.lines(killed)] == [line["loss"] for line in lines]


@pytest.mark.long
def test_pairs_of_trajectories_resume_to_the_same_bits(surroundings, tiny_pipeline, tmp_path):
  fields = {"rounds.updates": 2, "evaluate.num_prompts": 1, "optim.lr": 0.01}
  whole, _ = runs.check_resumed(tiny_pipeline, tmp_path, "prdp", updates=(18, 20), **fields)
  lines = runs.lines(whole)
  assert abs(lines[0]["prdp/log_ratio"]) < 1e-3 < abs(lines[-1]["prdp/log_ratio"])
  # Of the second update on the same trajectories, not of the first one.
  assert lines[0]["prdp/far"] == 0 < lines[1]["prdp/far"]


@pytest.mark.long
def test_pairs_of_candidates_resume_to_the_same_bits(surroundings, tiny_pipeline, tmp_path):
  fields = {"evaluate.num_prompts": 1, "optim.lr": 0.01, "train.updates_per_iteration": 1}
  fields["steps.apart"] = 2  # pairs of a prompt's candidates have inputs of their own
  whole, _ = runs.check_resumed(tiny_pipeline, tmp_path, "spo", updates=(19, 20), **fields)
  first, *_, last = runs.lines(whole)
  assert first["rewards/margin"] == pytest.approx(0.0, abs=1e-3)
  assert 0 < first["step_pairs/decided"] <= 1 and first["optim/grad_norm"] > 0
  assert last["err/policy_w"] != last["err/reference_w"]


@pytest.mark.long
def test_two_processes_equal_one(surroundings, tiny_pipeline, tmp_path):
  def arguments(at):
    return runs.arguments(tiny_pipeline, at, "ppo", **{"evaluate.num_prompts": 1})

  assert main.main(arguments(tmp_path / "one")) == 0
  log = tmp_path / "log"
  cluster = start_cluster(2, 1, arguments(tmp_path / "two"), log)
  assert cluster.wait(timeout=600) == 0, log.read_text()
  for name in ("0.json", "3.json"):
    one, two = (
      json.loads((tmp_path / at / "rounds" / name).read_text()) for at in ("one", "two")
    )
    assert one["prompts"] == two["prompts"] and one["seeds"] == two["seeds"]
    np.testing.assert_allclose(one["shapes.quality"], two["shapes.quality"], atol=0.02)
    np.testing.assert_allclose(one["advantage"], two["advantage"], atol=0.1)
  ours, theirs = (runs.lines(tmp_path / at)[-1] for at in ("two", "one"))
  assert ours["err/policy_x"] == pytest.approx(theirs["err/policy_x"], rel=1e-3)
