"""Reading and checking the JSON files of a pipeline."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxpref.errors import UserError, listed

_log = logging.getLogger(__name__)
_MAX_BYTES = 64 << 20  # a tokenizer.json of 50,000 words takes 4 MB
_MAX_VALUES = 100  # in a list, which has one value per block of a network
_MAX_INTEGER = 2**31 - 1
# The largest values that a module can be built with; real models use about a tenth of them.
_MOST = {
  "layers_per_block": 50,
  "num_hidden_layers": 200,
  "num_train_timesteps": 100_000,
  "reverse_transformer_layers_per_block": 100,
  "sample_size": 16_384,
  "transformer_layers_per_block": 100,
}
_LONG_LISTS = ("trained_betas",)  # one value per timestep

# Fields without which the defaults build another network or schedule than was trained. For all
# other fields, published files of old models rely on the defaults.
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
# Fields of diffusers' schedulers for models of this kind. The known fields of other files are
# those of their modules.
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
    raise UserError(
      f"{path} is missing: not a complete pipeline in diffusers' layout"
    ) from error
  except RecursionError as error:
    raise UserError(f"cannot read {path}: it is nested too deeply") from error
  except (OSError, ValueError) as error:
    raise UserError(f"cannot read {path}: {error}") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} does not hold a JSON object")
  return value


def check_regular(path: Path) -> None:
  """Refuses files that could not be read in bounded time: pipes, devices and huge files.

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
  """Refuses numbers that no module could be built with, before anything is built.

  Args:
    config: the contents of a configuration file.
    where: that file, for errors.

  Raises:
    UserError: a number or a list is larger than in any model; the message names the field.
  """
  for field, value in config.items():
    most = _MOST.get(field, _MAX_INTEGER)
    if isinstance(value, list) and len(value) > _MAX_VALUES and field not in _LONG_LISTS:
      raise UserError(
        f"{where}: {field} must have at most {_MAX_VALUES} values (got {len(value)})"
      )
    for number in _numbers(value):
      # Floats that are not sizes may be infinite.
      if abs(number) > most and (isinstance(number, int) or field in _MOST):
        raise UserError(f"{where}: {field} must be at most {most} (got {brief(number)})")


def _numbers(value: Any) -> Iterator[float]:
  rest = [value]
  while rest:
    if isinstance(item := rest.pop(), list):
      rest += item
    elif isinstance(item, int | float):
      yield item


def brief(value: Any) -> str:
  """Formats a value for an error message, cut to 60 characters."""
  try:
    text = repr(value)
  except ValueError:  # Python does not print integers of more than 4,300 digits
    return "an integer of thousands of digits"
  return text if len(text) <= 60 else f"{text[:57]}..."


def warn_of_fields(
  part: str, config: Mapping[str, Any], known: Iterable[str], where: Path
) -> None:
  """Warns of unknown fields, and of missing fields that every published file has.

  Either may be a misspelling. The default then replaces the value that the model was trained
  with, and its images are nonsense.

  Args:
    part: 'unet', 'vae', 'text_encoder', 'text_encoder_2' or 'scheduler'.
    config: the contents of its configuration file.
    known: names of all its fields; fields that begin with an underscore are always known.
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
