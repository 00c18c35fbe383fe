"""Text-to-image pipelines in diffusers' directory layout, read and written without PyTorch.

`load_pipeline("shapes")` is the small pipeline that ships with this package; any other
name is a directory.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.errors import UserError
from jaxpref.models import convert, text
from jaxpref.models import unet as unet_lib
from jaxpref.models import vae as vae_lib

BUNDLED = {"shapes": Path(__file__).parent.parent / "pipelines" / "shapes"}
_WEIGHTS = {
  "unet": "diffusion_pytorch_model.safetensors",
  "vae": "diffusion_pytorch_model.safetensors",
  "text_encoder": "model.safetensors",
}


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Modules without parameters, parameters apart, and what belongs to both.

  Attributes:
    path: the directory it was read from.
    modules: 'unet', 'vae' and 'text_encoder', Flax linen modules.
    params: float32 numpy trees under the same names.
    tokenizer: of transformers.
    schedule: the noise schedule it was trained with.
  """

  path: Path
  modules: Mapping[str, nn.Module]
  params: Mapping[str, Any]
  tokenizer: Any
  schedule: schedule_lib.NoiseSchedule

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """Channels, height and width of a latent at the size the UNet was trained for."""
    unet = self.modules["unet"]
    return unet.in_channels, unet.sample_size, unet.sample_size

  @property
  def image_size(self) -> int:
    """Pixels, both ways, of an image at the size the UNet was trained for."""
    levels = len(self.modules["vae"].block_out_channels)
    return self.modules["unet"].sample_size * 2 ** (levels - 1)


_BUILD: dict[str, Callable] = {
  "unet": unet_lib.build_unet,
  "vae": vae_lib.build_vae,
  "text_encoder": text.build_text_encoder,
}


def build_modules(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, nn.Module]:
  """The modules of these configurations, by part as `save_pipeline` takes them, in float32."""
  return {part: make(configs[part], dtype=jnp.float32) for part, make in _BUILD.items()}


def find_pipeline(name: str) -> Path:
  """The directory that `name` stands for: that of a bundled pipeline, else the path itself."""
  return BUNDLED.get(name, Path(name).expanduser())


def load_pipeline(name: str, *, dtype: Any = jnp.float32) -> Pipeline:
  """Reads a pipeline.

  Args:
    name: 'shapes' for the bundled one, else a directory in diffusers' layout.
    dtype: of the UNet's and text encoder's computation; parameters are float32.

  Raises:
    UserError: a file is missing or damaged, or does not fit its configuration.
  """
  path = find_pipeline(name)
  index = _read_json(path / "model_index.json")
  if missing := {"unet", "vae", "text_encoder", "tokenizer", "scheduler"} - index.keys():
    raise UserError(f"{path}/model_index.json lacks {', '.join(sorted(missing))}")
  modules, params = {}, {}
  for part, make in _BUILD.items():
    file = path / part / "config.json"
    config = _read_json(file)
    try:
      # The VAE runs once a picture and its errors are seen: float32 whatever the rest.
      modules[part] = make(config, dtype=jnp.float32 if part == "vae" else dtype)
      shapes = abstract_params(modules[part])
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of the libraries
      reason = str(error).partition("\n")[0]
      raise UserError(f"{file} describes no {part} that can be built: {reason}") from error
    tensors = _read_tensors(path / part / _WEIGHTS[part])
    params[part] = convert.import_tensors(tensors, shapes, where=str(path / part))
    for keys, tensor in jax.tree.leaves_with_path(params[part]):
      if not np.isfinite(tensor).all():
        where = jax.tree_util.keystr(keys, simple=True, separator="/")
        raise UserError(f"the weights in {path / part} are not all finite: {where}")
  if not isinstance(factor := modules["vae"].scaling_factor, int | float) or factor <= 0:
    raise UserError(f"{path}/vae/config.json: scaling_factor is {factor}, not positive")
  tokenizer = text.load_tokenizer(path / "tokenizer")
  vocabulary = modules["text_encoder"].config.vocab_size
  if len(tokenizer) != vocabulary:
    raise UserError(
      f"{path}/tokenizer has {len(tokenizer)} tokens, its text encoder {vocabulary}: "
      "they do not belong together"
    )
  positions = modules["text_encoder"].config.max_position_embeddings
  if tokenizer.model_max_length > positions:
    raise UserError(
      f"{path}/tokenizer makes {tokenizer.model_max_length} tokens, its text encoder takes "
      f"{positions}: they do not belong together"
    )
  taken = modules["unet"].cross_attention_dim, modules["unet"].in_channels
  given = modules["text_encoder"].config.hidden_size, modules["vae"].latent_channels
  if taken != given:
    raise UserError(
      f"{path}/unet takes texts of width {taken[0]} and latents of {taken[1]} channels, its "
      f"text encoder and VAE make {given[0]} and {given[1]}: they do not belong together"
    )
  schedule = schedule_lib.schedule_from_config(
    _read_json(path / "scheduler" / "scheduler_config.json")
  )
  return Pipeline(path, modules, params, tokenizer, schedule)


def fingerprint(params: Any) -> str:
  """Changes with any name or value in a tree of numpy arrays."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(leaf).data)
  return digest.hexdigest()[:16]


def abstract_params(module: nn.Module) -> Any:
  """Shapes of a module's parameters, without computing any."""
  if hasattr(module, "init_weights"):
    return jax.eval_shape(module.init_weights, jax.random.key(0))
  return jax.eval_shape(lambda k: text.init_text_encoder(module, k), jax.random.key(0))


def save_pipeline(
  target: Path,
  params: Mapping[str, Any],
  *,
  configs: Mapping[str, Mapping[str, Any]],
  tokenizer_dir: Path,
  dtype: Any = np.float16,
) -> None:
  """Writes a pipeline that diffusers loads, whole or not at all.

  Args:
    target: directory; one that exists is replaced once the new one is complete.
    params: trees by part.
    configs: 'unet', 'vae', 'text_encoder' and 'scheduler' configurations.
    tokenizer_dir: copied.
    dtype: of the weights on disk.
  """
  target.parent.mkdir(parents=True, exist_ok=True)
  work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
  for part, name in _WEIGHTS.items():
    (work / part).mkdir()
    _write_json(work / part / "config.json", configs[part])
    tensors = convert.export_tensors(params[part], dtype)
    save_file(tensors, work / part / name, metadata={"format": "pt"})
    (work / part / name).chmod(0o644)  # safetensors keeps its files to their owner
  (work / "scheduler").mkdir()
  _write_json(work / "scheduler" / "scheduler_config.json", configs["scheduler"])
  shutil.copytree(tokenizer_dir, work / "tokenizer")
  _write_json(work / "model_index.json", _INDEX)
  work.chmod(0o755)
  replace_directory(work, target)


def replace_directory(new: Path, target: Path) -> None:
  """Puts `new` in the place of `target`, which is kept until the new one stands."""
  old = target.with_name(f".{target.name}-old")
  shutil.rmtree(old, ignore_errors=True)
  if target.exists():
    target.rename(old)
  new.replace(target)
  shutil.rmtree(old, ignore_errors=True)


_INDEX = {
  "_class_name": "StableDiffusionPipeline",
  "_diffusers_version": "0.39.0",
  "feature_extractor": [None, None],
  "requires_safety_checker": False,
  "safety_checker": [None, None],
  "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
  "text_encoder": ["transformers", "CLIPTextModel"],
  "tokenizer": ["transformers", "CLIPTokenizer"],
  "unet": ["diffusers", "UNet2DConditionModel"],
  "vae": ["diffusers", "AutoencoderKL"],
}


def _read_json(path: Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text())
  except FileNotFoundError as error:
    raise UserError(f"no {path}: not a complete pipeline in diffusers' layout") from error
  except (OSError, ValueError) as error:
    raise UserError(f"cannot read {path}: {error}") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} holds no JSON object")
  return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
  try:
    return load_file(path)
  except FileNotFoundError as error:
    raise UserError(f"no weights at {path}") from error
  except (OSError, SafetensorError) as error:
    raise UserError(f"{path} is damaged or truncated: {error}") from error
