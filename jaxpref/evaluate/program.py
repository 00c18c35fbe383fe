"""Compares models: `python -m jaxpref.evaluate --models=base=A,dro=B --prompts=FILE --out=DIR`.

Every model generates images for the same prompts from the same noise; scorers rate them; the
report compares each model with the baseline and with each other. Started again, the command
generates and scores what is missing, so that models and scorers can be added later. With
`--shard=I/N` it does the I-th of N shares; the command without it then finishes the rest and
writes the results.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from jaxpref.errors import UserError
from jaxpref.evaluate import candidates
from jaxpref.evaluate import flags as flags_lib
from jaxpref.runtime import cli
from jaxpref.runtime.paths import user_path


def main(argv: list[str]) -> int:
  """Compares models as the flags say; returns the exit status."""
  return cli.exit_status(_run, argv)


def _run(argv: list[str]) -> None:
  flags = flags_lib.make_parser().parse_args(argv)
  flags.out = user_path(flags.out)
  found = candidates.parse(flags.models, flags.improve)
  names = [candidate.name for candidate in found]
  baseline = flags.baseline or names[0]
  if baseline not in names:
    raise UserError(f"--baseline={baseline} is not a name of --models ({', '.join(names)})")
  if flags.out.exists() and not flags.out.is_dir():
    raise UserError(f"--out: {flags.out} is a file")
  # Late, so that errors on the command line do not wait for JAX.
  from jaxpref import scorers as scorers_lib  # noqa: PLC0415
  from jaxpref import sharding  # noqa: PLC0415
  from jaxpref.evaluate import score_table, summary  # noqa: PLC0415
  from jaxpref.evaluation import evaluate, prompt_sets  # noqa: PLC0415
  from jaxpref.runtime import jax_setup  # noqa: PLC0415

  prompts = _choose(prompt_sets.load_prompts(flags.prompts, seed=flags.seed), flags)
  texts = [prompt.text for prompt in prompts]
  scorers = _names(flags.scorers)
  usable = evaluate.usable_scorers(scorers, texts)
  scorers_lib.find_files(usable)
  _check_unit(flags.unit, usable)
  if flags.features != "pixels":
    scorers_lib.load_features(flags.features)
  jax_setup.cache_programs()
  mesh = sharding.make_mesh()
  _fill_guidance(flags, [candidate.model for candidate in found])
  order = [baseline, *(name for name in names if name != baseline)]
  images = score_table.list_images(order, prompts, flags)
  flags.selected_by = _names(flags.selected_by)
  summary.check(flags, images, usable)
  flags.selected_by += _deciding(found, flags, usable)
  start, step = flags.shard or (0, 1)
  shares = {name: images[images["model"] == name][start::step] for name in order}
  samplers: dict[str, Any] = {}
  # An improver needs the images of another model.
  for candidate in sorted(found, key=lambda c: bool(c.improves)):
    candidates.generate(candidate, shares[candidate.name], flags, mesh, samplers=samplers)
  suffix = "" if flags.shard is None else ".{}-of-{}".format(*flags.shard)
  keys: list[str] = []
  for name in order:
    digested = score_table.add_digests(shares[name])
    keys = [
      score_table.score_images(
        scorer,
        digested,
        flags.out / score_table.SCORES / name,
        share=suffix,
        chunk=max(64, flags.batch_size),
      )
      for scorer in usable
    ]
  if flags.shard is not None:
    print(f"share {flags.shard[0]} of {flags.shard[1]} is done: {flags.out}")
    return
  summary.write(
    flags,
    baseline=baseline,
    images=images,
    prompts=prompts,
    keys=keys,
    models={candidate.name: candidate.model for candidate in found},
  )


def _choose(prompts: Sequence[Any], flags: argparse.Namespace) -> list[Any]:
  """Takes --num-prompts of the prompts, in their order."""
  if flags.num_prompts is None or flags.num_prompts >= len(prompts):
    return list(prompts)
  import numpy as np  # noqa: PLC0415

  chosen = np.random.default_rng(flags.seed).permutation(len(prompts))[: flags.num_prompts]
  return [prompts[i] for i in sorted(chosen)]


def _check_unit(unit: str, scorers: Sequence[str]) -> None:
  kind, colon, scorer = unit.partition(":")
  if unit in ("mean", "single") or (kind == "median" and colon and scorer in scorers):
    return
  known = ", ".join(f"median:{name}" for name in scorers)
  raise UserError(f"--unit={unit}: must be mean, single or one of {known or 'median:SCORER'}")


def _fill_guidance(flags: argparse.Namespace, models: Sequence[str]) -> None:
  """Sets a missing guidance scale: the same for all models, or they could not be compared."""
  from jaxpref.models import hub  # noqa: PLC0415
  from jaxpref.training import load_run  # noqa: PLC0415

  if flags.guidance is not None:
    return
  runs = [model for model in models if load_run.is_run(model)]
  usual = 2.0 if any(model in hub.BUNDLED for model in models) else 7.5
  flags.guidance = usual
  if runs:
    flags.guidance = load_run.setting(runs[0], "evaluate", "guidance", usual)


def _deciding(
  found: Sequence[candidates.Candidate], flags: argparse.Namespace, scorers: Sequence[str]
) -> list[str]:
  """Returns the scorers to which the runs among the models are biased, and says which."""
  from jaxpref import scorers as scorers_lib  # noqa: PLC0415
  from jaxpref.training import load_run  # noqa: PLC0415

  decided: dict[str, list[str]] = {}
  for candidate in found:
    names = load_run.deciding_scorers(candidate.model, best=flags.step == "best")
    for name in scorers_lib.with_weights_of(scorers, names):
      decided.setdefault(name, []).append(candidate.name)
  for name, models in decided.items():
    if name not in flags.selected_by:
      print(f"{name} had a part in the training of {', '.join(models)}: it does not decide")
  return list(decided)


def _names(text: str) -> list[str]:
  return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
