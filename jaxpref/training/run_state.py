"""The model, reference and state with which a run begins or resumes."""

import logging
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxpref import __version__, base_config, sharding
from jaxpref.errors import UserError, count
from jaxpref.runtime.checkpoint import Checkpointer
from jaxpref.training import programs
from jaxpref.training.setup import Checked, Prepared, init_trained

_log = logging.getLogger(__name__)


class RunState(NamedTuple):
  """Programs and arrays of a run.

  Attributes:
    program: the run's programs.
    state: the `TrainState` to train further.
    done: number of updates done.
    base: parameters of `model.path`, in `model.frozen_dtype`; of a step-aware preference
      model, 'denoiser' and 'vae'; None for a latent reward model.
    frozen: what the train step needs of `base`, see `programs.kept_base`.
    start: trained parameters at the start if they are the reference, else None.
  """

  program: programs.Programs
  state: Any
  done: int
  base: Any
  frozen: Any
  start: Any


def make_run_state(
  prepared: Prepared,
  uncond: Any,
  ckptr: Checkpointer,
  loader: Any,
  identity: dict[str, Any],
) -> RunState:
  """Makes a run's programs and its state, new or from the newest checkpoint.

  Takes the parameters of the denoiser, and of a scorer that is trained, out of `prepared`, so
  that they can be freed.

  Args:
    prepared: the run's input.
    uncond: conditioning of the dropped prompt.
    ckptr: the run's checkpoints.
    loader: the run's data loader, which is set to the restored position.
    identity: from `identify`.

  Raises:
    UserError: the checkpoint is of another run or cannot be restored.
  """
  config, pipeline = prepared.config, prepared.pipeline
  base = pipeline.params.pop(pipeline.family.denoiser)
  begin = initial_params(prepared, pipeline.params.pop("scorer", base))
  program = programs.make_programs(prepared, begin, uncond)
  state, done = _restore_or_init(program, begin, ckptr, loader, identity, config)
  base = freeze(prepared, base)
  frozen = programs.kept_base(prepared, base)
  start = None
  if prepared.reference == "start":
    # LoRA matrices are small, and are rounded where they are added to the base's weights.
    start = begin if config.lora.rank else pipeline.freeze(begin, config.model.frozen_dtype)
  return RunState(program, state, done, base, frozen, start)


def identify(prepared: Prepared, encoded: str) -> dict[str, Any]:
  """Returns what a checkpoint records of its run, which a resumed run must match.

  Args:
    prepared: the run's input.
    encoded: where its rows are encoded, see `inputs.Inputs`.
  """
  return {
    "encoded": encoded,
    "jaxpref": __version__,
    "num_updates": prepared.config.train.num_updates,
    **prepared.inputs,
  }


def initial_params(checked: Checked, begins_as: Any) -> Any:
  """Returns the parameters with which training begins, on the devices.

  They are those of the base, LoRA matrices, those of `model.start` or of a reward model.

  Args:
    checked: the run's configuration and models.
    begins_as: parameters of the denoiser, or of the scorer that a reward model begins as.
  """
  if checked.start:
    return checked.start.pop("params")  # taken out, so that they can be freed
  config, pipeline = checked.config, checked.pipeline
  if base_config.judges_images(config):  # a scorer's parameters are on the host
    found = sharding.to_host(init_trained(config, pipeline, begins_as))
    return sharding.place_params(found, checked.mesh)
  if not config.lora.rank:
    return init_trained(config, pipeline, begins_as)
  return jax.jit(lambda params: init_trained(config, pipeline, params))(begins_as)


def freeze(checked: Checked, base: Any) -> Any:
  """Returns the frozen parameters of a run, see `RunState.base`.

  Args:
    checked: the run's configuration and models.
    base: the denoiser's parameters.
  """
  config, pipeline = checked.config, checked.pipeline
  if base_config.judges_images(config):
    vae = sharding.replicate(pipeline.params["vae"], checked.mesh)
    return {"denoiser": pipeline.freeze(base, config.model.frozen_dtype), "vae": vae}
  if checked.loss.needs.judges:  # it is not compared with the denoiser that it begins as
    return None
  return pipeline.freeze(base, config.model.frozen_dtype)


def _restore_or_init(
  program: programs.Programs,
  begin: Any,
  ckptr: Checkpointer,
  loader: Any,
  identity: dict[str, Any],
  config: ConfigDict,
) -> tuple[Any, int]:
  """Returns the state and the number of updates done; sets the loader's position."""
  if ckptr.latest_step() is None:
    return jax.jit(program.make_state, out_shardings=program.placement)(begin), 0
  target = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    jax.eval_shape(program.make_state, begin),
    program.placement,
  )
  restored = ckptr.restore(target)
  check_resumes(restored.metadata, identity, restored.step, config)
  loader.set_state(restored.data_state)
  _log.warning("resuming after update %d of %d", restored.step, identity["num_updates"])
  return restored.state, restored.step


def check_resumes(
  stored: dict[str, Any], identity: dict[str, Any], done: int, config: ConfigDict
) -> None:
  """Refuses to resume from a checkpoint of another run.

  Args:
    stored: what the checkpoint records of its run.
    identity: of this run, from `identify`.
    done: number of updates done.
    config: of this run.

  Raises:
    UserError: data or weights differ, or the number of updates does not fit.
  """
  named = {"data": config.data.path, "pipeline": config.model.path, "start": config.model.start}
  named["judge"] = config.get("steps", {}).get("judge", "")
  named["scorer"] = config.get("judge", {}).get("scorer", "")
  things = {
    "data": "training images",
    "pipeline": "base pipeline's weights",
    "start": "weights in model.start",
    "judge": "weights of the reward model in steps.judge",
    "scorer": "weights of judge.scorer",
  }
  for name, thing in things.items():
    if stored.get(name) != identity.get(name):
      where = f" ({named[name]})" if named[name] else ""
      raise UserError(
        f"the {thing}{where} have changed since this workdir's run began: give the same ones "
        "again, or choose another --workdir"
      )
  wanted, before = identity["num_updates"], stored["num_updates"]
  if done > wanted:
    raise UserError(
      f"this workdir's run has done {count(done, 'update')}, more than "
      f"train.num_updates = {wanted}; choose another --workdir"
    )
  if wanted != before and config.optim.schedule != "constant":
    raise UserError(
      f"train.num_updates was {before}, now {wanted}: that would change the "
      f"{config.optim.schedule} schedule of this workdir's run; choose another --workdir"
    )
