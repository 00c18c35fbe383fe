"""JSON files of a pipeline: read safely, kept within bounds, compared with known fields."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxpref.errors import UserError, listed

_log = logging.getLogger(__name__)
_MAX_BYTES = 64 << 20  # a tokenizer.json of 50,000 words takes 4 MB
_MAX_VALUES = 100  # of a list: one value for each block of a network
_MAX_INTEGER = 2**31 - 1
# The largest numbers that something could be built of; real models have a tenth of them.
_MOST = {
  "layers_per_block": 50,
  "num_hidden_layers": 200,
  "num_train_timesteps": 100_000,
  "reverse_transformer_layers_per_block": 100,
  "sample_size": 16_384,
  "transformer_layers_per_block": 100,
}
_LONG_LISTS = ("trained_betas",)  # one value for each timestep

# Fields without which a network or a schedule is another one than was trained. Others have
# defaults that the published files of old models rely on.
_NEEDED = {
  "unet": (
    *("attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types"),
    *("in_channels", "layers_per_block", "out_channels", "sample_size", "up_block_types"),
  ),
  "vae": (
    *("block_out_channels", "down_block_types", "in_channels", "latent_channels"),
    *("layers_per_block", "out_channels", "up_block_types"),
  ),
  "text_encoder": (
    *("hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings"),
    *("num_attention_heads", "num_hidden_layers", "vocab_size"),
  ),
  "scheduler": ("beta_end", "beta_schedule", "beta_start", "num_train_timesteps"),
}
# Fields of diffusers' schedulers for models of this kind; other files' fields are their
# modules' own.
SCHEDULER_FIELDS = frozenset(
  (
    *("algorithm_type", "beta_end", "beta_schedule", "beta_start", "clip_sample"),
    *(
      "clip_sample_range",
      "corrector_order",
      "disable_corrector",
      "dynamic_thresholding_ratio",
    ),
    *("eta", "euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type"),
    *("invert_sigmas", "lambda_min_clipped", "lower_order_final", "num_train_timesteps"),
    *("original_inference_steps", "predict_x0", "prediction_type", "predictor_order"),
    *("rescale_betas_zero_snr", "rho", "s_noise", "sample_max_value", "scaler"),
    *(
      "set_alpha_to_one",
      "shift_terminal",
      "sigma_data",
      "sigma_max",
      "sigma_min",
      "skip_prk_steps",
    ),
    *("snr_shift_scale", "solver_order", "solver_p", "solver_type", "steps_offset"),
    *("stochastic_sampling", "tau_func", "thresholding", "time_shift_type", "timestep_scaling"),
    *("timestep_spacing", "timestep_type", "trained_betas", "use_beta_sigmas"),
    *("use_dynamic_shifting", "use_exponential_sigmas", "use_flow_sigmas", "use_karras_sigmas"),
    *("use_lu_lambdas", "variance_type"),
  )
)


def read_json(path: Path) -> dict[str, Any]:
  """Reads a file that holds a JSON object.

  Raises:
    UserError: it is missing, not a regular file, too large, nested too deeply, or not JSON.
  """
  check_regular(path)
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise UserError(f"no {path}: not a complete pipeline in diffusers' layout") from error
  except RecursionError as error:
    raise UserError(f"cannot read {path}: it is nested too deeply") from error
  except (OSError, ValueError) as error:
    raise UserError(f"cannot read {path}: {error}") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} holds no JSON object")
  return value


def check_regular(path: Path) -> None:
  """Refuses what would be read for ever: pipes, devices, and huge files.

  Args:
    path: a file to be read whole; it may be missing.

  Raises:
    UserError: it is not a regular file, or is larger than any configuration.
  """
  if not path.exists():
    return
  if not path.is_file():
    raise UserError(f"{path} is not a regular file")
  if (size := path.stat().st_size) > _MAX_BYTES:
    raise UserError(f"{path} has {size >> 20} MB, more than a pipeline's JSON can have")


def check_bounds(config: Mapping[str, Any], where: Path) -> None:
  """Refuses numbers of which nothing could be built, before anything is built.

  Args:
    config: the contents of a configuration file.
    where: that file, for errors.

  Raises:
    UserError: a number or a list is larger than any model's; names the field.
  """
  for field, value in config.items():
    most = _MOST.get(field, _MAX_INTEGER)
    if isinstance(value, list) and len(value) > _MAX_VALUES and field not in _LONG_LISTS:
      raise UserError(
        f"{where}: {field} has {len(value)} values, at most {_MAX_VALUES} are read"
      )
    for number in _numbers(value):
      # Floats may be infinite where they are no sizes.
      if abs(number) > most and (isinstance(number, int) or field in _MOST):
        raise UserError(f"{where}: {field} is {brief(number)}, at most {most} is read")


def _numbers(value: Any) -> Iterator[float]:
  rest = [value]
  while rest:
    if isinstance(item := rest.pop(), list):
      rest += item
    elif isinstance(item, int | float):
      yield item


def brief(value: Any) -> str:
  """A value for an error message, cut where it is long."""
  try:
    text = repr(value)
  except ValueError:  # Python writes no integers of more than 4,300 digits
    return "an integer of thousands of digits"
  return text if len(text) <= 60 else f"{text[:57]}..."


def warn_of_fields(
  part: str, config: Mapping[str, Any], known: Iterable[str], where: Path
) -> None:
  """Logs fields that are unknown, and missing ones that every published file states.

  Either may be a misspelling, with which a default is taken that the model was not trained
  with, and images come out as nonsense.

  Args:
    part: 'unet', 'vae', 'text_encoder', 'text_encoder_2' or 'scheduler'.
    config: the contents of its configuration file.
    known: names of all its fields; those that begin with an underscore are always known.
    where: that file.
  """
  unknown = sorted(k for k in config.keys() - set(known) if not k.startswith("_"))
  missing = [k for k in _NEEDED[part.removesuffix("_2")] if k not in config]
  said = []
  if unknown:
    said.append(f"ignores fields it does not know: {listed(unknown, 5)}")
  if missing:
    said.append(f"takes defaults for missing fields: {listed(missing, 5)}")
  if said:
    _log.warning("%s: jaxpref %s", where, "; and ".join(said))
