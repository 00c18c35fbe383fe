"""Reading of a pipeline's configuration files, and checks that its parts fit together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.diffusion import timesteps as timesteps_lib
from jaxpref.errors import UserError
from jaxpref.models import config_files, corrections, text
from jaxpref.models import unet as unet_lib
from jaxpref.models import vae as vae_lib

# Spacings of timesteps that the samplers do not support, and the choices that they support.
_OTHER_SPACINGS = ("use_beta_sigmas", "use_exponential_sigmas", "use_lu_lambdas")
_SPACING = {
  "timestep_spacing": timesteps_lib.SPACINGS,
  "final_sigmas_type": timesteps_lib.FINALS,
}
_CLASSES = ("StableDiffusionPipeline", "StableDiffusionImg2Img", "StableDiffusionXL")
_OTHER_TASKS = ("Inpaint", "Upscale", "ControlNet", "Adapter", "InstructPix2Pix")
_FIELDS = {
  "unet": unet_lib.FIELDS,
  "vae": vae_lib.FIELDS,
  "text_encoder": text.FIELDS,
  "text_encoder_2": text.FIELDS,
  "scheduler": config_files.SCHEDULER_FIELDS,
}


def read_configs(path: Path, places: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
  """Reads, checks and corrects a pipeline's configuration files.

  Args:
    path: the pipeline's directory.
    places: directories of the parts.

  Returns:
    Contents by part, with 'model_index' and 'scheduler'.

  Raises:
    UserError: a file is missing or invalid, or the model is of another kind.
  """
  index = config_files.read_json(path / "model_index.json")
  name = index.get("_class_name", "StableDiffusionPipeline")
  if not str(name).startswith(_CLASSES) or any(part in str(name) for part in _OTHER_TASKS):
    raise UserError(f"{path}/model_index.json is of {name}, not of Stable Diffusion 1, 2 or XL")
  there = {name for name, component in index.items() if component != [None, None]}
  parts = ["unet", "vae", "text_encoder"]
  if "text_encoder_2" in there:
    parts.append("text_encoder_2")
  tokenizers = (part.replace("text_encoder", "tokenizer") for part in parts)
  if missing := {*parts, *tokenizers, "scheduler"} - there:
    raise UserError(f"{path}/model_index.json lacks {', '.join(sorted(missing))}")
  files = {part: places[part] / "config.json" for part in parts}
  files["scheduler"] = path / "scheduler" / "scheduler_config.json"
  configs = {"model_index": index}
  for part, file in files.items():
    config = config_files.read_json(file)
    if part.startswith("text_encoder"):
      config = text.text_config(config)
      # As in diffusers, the index determines the class, not the file's own `architectures`.
      if part == "text_encoder_2":
        config["architectures"] = ["CLIPTextModelWithProjection"]
      elif "CLIPTextModel" in index["text_encoder"]:
        config["architectures"] = ["CLIPTextModel"]
    config_files.check_bounds(config, file)
    config_files.warn_of_fields(part, config, _FIELDS[part], file)
    configs[part] = config
  return corrections.correct_configs(configs, where=str(path))


def read_schedule(file: Path, config: Mapping[str, Any]) -> schedule_lib.NoiseSchedule:
  """Makes the noise schedule of a scheduler's configuration.

  Raises:
    UserError: a field of it is not supported.
  """
  try:
    schedule = schedule_lib.schedule_from_config(config)
  except UserError as error:
    raise UserError(f"{file}: {error}") from error
  if odd := [f for f in _OTHER_SPACINGS if config.get(f)]:
    raise UserError(f"{file}: {odd[0]} = {config[odd[0]]!r} is not supported")
  for field, known in _SPACING.items():
    if (value := config.get(field)) is not None and value not in known:
      raise UserError(f"{file}: {field} must be one of {', '.join(known)} (got {value!r})")
  offset = config.get("steps_offset")
  if offset is not None and (type(offset) is not int or not 0 <= offset < 1000):
    raise UserError(f"{file}: steps_offset must be at least 0 and below 1,000 (got {offset!r})")
  return schedule


def check_fit(places: Mapping[str, Path], modules: Mapping[str, Any]) -> None:
  """Checks that the parts belong to one model.

  Raises:
    UserError: the VAE's scale is invalid, or the UNet's inputs do not fit the other parts.
  """
  unet, vae = modules["unet"], modules["vae"]
  factor, shift = vae.scaling_factor, vae.shift_factor
  if not isinstance(factor, int | float) or not factor > 0:
    raise UserError(
      f"{places['vae']}/config.json: scaling_factor must be positive (got {factor})"
    )
  if not isinstance(shift, int | float):
    raise UserError(f"{places['vae']}/config.json: shift_factor must be a number (got {shift})")
  encoders = [m.config for part, m in modules.items() if part.startswith("text_encoder")]
  xl = unet.addition_embed_type == "text_time"
  if xl != (len(encoders) == 2):
    raise UserError(
      f"{places['unet']} takes {'two texts' if xl else 'one text'}, but the pipeline has "
      f"{len(encoders)} text encoder(s): they do not belong together"
    )
  taken = unet.cross_attention_dim, unet.in_channels
  given = sum(c.hidden_size for c in encoders), vae.latent_channels
  # An improver has twice as many channels, for the clean image.
  if taken[0] != given[0] or taken[1] not in (given[1], 2 * given[1]):
    raise UserError(
      f"{places['unet']} takes texts of width {taken[0]} and latents of {taken[1]} channels, "
      f"but text encoder and VAE make {given[0]} and {given[1]}: they do not belong together"
    )
  if xl:
    width = 6 * unet.addition_time_embed_dim + encoders[1].projection_dim
    if (wanted := unet.projection_class_embeddings_input_dim) != width:
      raise UserError(
        f"{places['unet']} takes {wanted} numbers beside the text, but its second text encoder "
        f"and six sizes make {width}: they do not belong together"
      )
