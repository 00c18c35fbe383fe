"""Corrections that diffusers' StableDiffusionPipeline makes to old configuration files."""

import logging
import re
from collections.abc import Mapping
from typing import Any

_log = logging.getLogger(__name__)


def correct_configs(
  configs: Mapping[str, Mapping[str, Any]], *, where: str
) -> dict[str, dict[str, Any]]:
  """Corrects configurations as diffusers' pipeline does when it is built.

  A stated offset of leading spacing becomes 1, predicted images are not clipped, and a UNet
  saved before diffusers 0.9 has a sample size of at least 64. Each correction is logged.

  Args:
    configs: 'scheduler' and 'unet' among others.
    where: the pipeline's directory, for the log.
  """
  corrected = {name: dict(config) for name, config in configs.items()}
  scheduler, unet = corrected["scheduler"], corrected["unet"]
  wanted: list[tuple[dict[str, Any], str, Any]] = []
  offset = scheduler.get("steps_offset", 1)
  if offset is None or type(offset) is int and offset != 1:  # `read_schedule` refuses others
    wanted.append((scheduler, "steps_offset", 1))
  if scheduler.get("clip_sample") is True:
    wanted.append((scheduler, "clip_sample", False))
  size = unet.get("sample_size")
  if _is_before_0_9(unet.get("_diffusers_version")) and type(size) is int and size < 64:
    wanted.append((unet, "sample_size", 64))
  for config, field, value in wanted:
    file = "unet/config.json" if config is unet else "scheduler/scheduler_config.json"
    _log.warning(
      "%s/%s: %s is %s, taken as %s, as diffusers' pipeline does",
      *(where, file, field, config[field], value),
    )
    config[field] = value
  return corrected


def _is_before_0_9(version: Any) -> bool:
  match = re.match(r"(\d+)\.(\d+)", str(version))
  return match is not None and (int(match[1]), int(match[2])) < (0, 9)
