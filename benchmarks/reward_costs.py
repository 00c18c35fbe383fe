"""Work of online training by a scorer on a published model, counted from shapes.

  python benchmarks/reward_costs.py --out=docs/rewards

No weights are needed. The script writes `costs.json` into the folder and the table of
`docs/rewards.md`: FLOPs of each configuration for an image that it samples, or, of methods that
sample nothing, for an image of its data. A scorer's own work is in docs/scorers.md.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import campaign
import jax

from jaxpref import base_config, sharding
from jaxpref import config as config_lib
from jaxpref.data import rows as rows_lib
from jaxpref.models import pipeline as pipeline_lib
from jaxpref.models import vae as vae_lib
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.training import flops, setup

SUSTAINED = 1e14  # FLOP/s, for hours
_FAST = "ppo:sd15 rollout.num_steps=20 rollout.guidance=1"
CONFIGS = (
  *("ppo:sd15", "ppo:sd15 lora.rank=0", "ppo:sd15 steps.trained=5 train.batch_size=320"),
  *(f"{_FAST} train.batch_size=1280", f"{_FAST} steps.window=4 train.batch_size=256"),
  *("ppo:sd15_dpok", "ppo:sd15_dance", "d3po:sd15"),
  *("spo:sd15", "lpo:sd15", "prdp:sd15"),
  *("awm:sd15", "nft:sd15", "dgpo:sd15", "rwr:sd15", "best_of:sd15", "online_dpo:sd15"),
  *("draft:sd15", "draft:sd15 pathwise.last=5", "draft:sd15 pathwise.last=50"),
  *("draft_lv:sd15", "alignprop:sd15", "refl:sd15"),
  *("ppo:sd35m", "ppo:sd35m_fast", "ppo:sd35m_mix"),
  *("sft:sd15", "dpo:sd15", "dro:sd15"),
)


def main(argv: list[str]) -> None:
  """Counts, then writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--out", type=Path, default=Path("docs/rewards"), help="folder for costs.json")
  text = "METHOD:PRESET, perhaps with FIELD=VALUE after spaces"
  add("--configs", nargs="+", default=list(CONFIGS), metavar="CONFIG", help=text)
  options = parser.parse_args(argv)
  found = {name: cost_of(name) for name in options.configs}
  workdir_lib.write_json(options.out / "costs.json", found)
  text = _table(found)
  campaign.write_into(campaign.document_of(options.out), text, part="costs")
  print(text)


def cost_of(name: str) -> dict[str, Any]:
  """Counts the FLOPs of a configuration.

  Args:
    name: `method:preset`, and changed fields, as "field=value", after spaces.

  Returns:
    FLOPs of an update by phase, 'decode' of its samples among them; 'images' that an update
    samples or, if it samples none, reads; 'updates' of the whole run.
  """
  preset, *fields = name.split()
  flags = [f"--config={preset}", *(f"--config.{field}" for field in fields)]
  config, _ = config_lib.parse_args(flags, flags={})
  config.train.accumulate = 1  # micro-batches are the same work
  for section in ("pathwise", "rounds"):
    if section in config:
      # A scorer whose weights are here. Its work, a thousandth of the decoder's, stays in where
      # updates go through it.
      config[section].scorers = ("shapes.preference",)
  checked = setup.check(config, mesh=sharding.abstract_mesh(config.mesh, 1))
  cost = flops.of_update(checked, flops.of_forward(checked.pipeline))
  images = config.train.batch_size * config.rollout.states
  if rounds := config.get("rounds"):
    images = rounds.num_prompts * rounds.images_per_prompt / rounds.updates
    judged = 0
    if base_config.have_candidates(config) and not config.steps.judge:
      judged = config.steps.candidates * base_config.comparisons(config)
    cost["decode"] = images * (1 + judged) * of_decoder(checked.pipeline)
  elif "pathwise" not in config:
    images *= len(rows_lib.arms_of(checked.loss.needs.rows, config.data.list_size))
  return {**cost, "images": images, "updates": config.train.num_updates}


def of_decoder(pipeline: pipeline_lib.Pipeline) -> float:
  """Counts the FLOPs of decoding an image."""
  module = pipeline.modules["vae"]
  latents = jax.ShapeDtypeStruct((1, *pipeline.latent_shape), "float32")
  params = pipeline_lib.abstract_params(module)
  return flops.count(jax.make_jaxpr(lambda p, z: vae_lib.decode(module, p, z))(params, latents))


def _table(found: dict[str, dict[str, Any]]) -> str:
  command = "python benchmarks/reward_costs.py"
  lines = [
    f"{campaign.made_by(command)}. TFLOPs of an image that the policy samples (of `sft`, "
    "`dpo` and `dro`, of an image of the data), the work of the whole run of "
    f"`train.num_updates`, and its hours at {SUSTAINED / 1e12:.0f} TFLOP/s. Judging is "
    "decoding, and the latent reward model of `lpo`; scorers are left out. Of updates through "
    "the sampler, it has its backward pass and what is computed again.",
    "",
    "| configuration | images an update | sampling | judging | policy | reference, average | "
    "together | PFLOPs of the run | hours |",
    "|---" * 9 + "|",
  ]
  for name, of in found.items():
    phases = [
      of.get("rollout", 0.0),
      of.get("decode", 0.0) + of.get("judge", 0.0),
      of["policy"],
      of.get("reference", 0.0) + of.get("old", 0.0),
    ]
    each = " | ".join(f"{x / of['images'] / 1e12:.2f}" for x in (*phases, sum(phases)))
    run = sum(phases) * of["updates"]
    lines.append(
      f"| `{name}` | {of['images']:g} | {each} | {run / 1e15:,.0f} "
      f"| {run / SUSTAINED / 3600:,.1f} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  main(sys.argv[1:])
