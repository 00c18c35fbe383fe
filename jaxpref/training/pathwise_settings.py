"""Checks of the section `pathwise`, before a run writes anything."""

from ml_collections import ConfigDict

from jaxpref.errors import UserError
from jaxpref.losses import Needs
from jaxpref.models.pipeline import Pipeline
from jaxpref.training import rounds_settings


def check(config: ConfigDict, needs: Needs) -> None:
  """Refuses settings of updates that sample which do not fit each other.

  Args:
    config: of the run.
    needs: of its loss.

  Raises:
    UserError: they do not fit.
  """
  if ("pathwise" in config) != (needs.rows == "prompts"):
    raise UserError(
      f"loss {config.loss.name!r} learns from {needs.rows}: the section pathwise is for losses "
      "of rewards with a gradient, whose config files call base_config.pathwise(c)"
    )
  if "pathwise" not in config:
    return
  settings, steps = config.pathwise, config.rollout.num_steps
  rounds_settings.check_weights(settings, "pathwise")
  if settings.method == "last" and settings.last > steps:
    raise UserError(
      f"pathwise.last = {settings.last} must be at most rollout.num_steps = {steps}"
    )
  if settings.mean > settings.last:
    raise UserError(
      f"pathwise.mean = {settings.mean:g} must be at most pathwise.last = {settings.last}, the "
      "largest number of steps with a gradient"
    )
  if settings.method == "predicted" and not settings.first < settings.end <= steps:
    raise UserError(
      f"pathwise.first = {settings.first} and pathwise.end = {settings.end} must be a range "
      f"within rollout.num_steps = {steps} steps"
    )
  if settings.method == "renoised" and steps < 2:
    raise UserError("pathwise.method = 'renoised' needs at least rollout.num_steps = 2")
  if settings.eta and settings.method != "last":
    raise UserError(
      f"pathwise.eta applies to pathwise.method = 'last', not {settings.method!r}"
    )
  if config.rollout.solver != "ddim":
    raise UserError(
      f"rollout.solver = {config.rollout.solver!r}: gradients go through ddim's steps"
    )
  if config.data.prompt_dropout:
    raise UserError("data.prompt_dropout must be 0: an update samples for its prompts")
  rounds_settings.check_unused(config, "updates that sample")


def check_model(config: ConfigDict, pipeline: Pipeline) -> None:
  """Refuses models that the updates cannot sample from.

  Raises:
    UserError: it is a flow-matching model, which DDIM does not sample from.
  """
  if pipeline.schedule.prediction_type == "flow_prediction":
    raise UserError(
      f"{config.model.path} is trained with flow matching, and the section pathwise samples "
      "with ddim, which is for other models"
    )
