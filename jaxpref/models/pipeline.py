"""Text-to-image pipelines in diffusers' directory layout, read without PyTorch.

Supported are Stable Diffusion 1.x, 2.x and XL, which has a second text encoder. `load_pipeline`
takes the name of a bundled pipeline, a directory, or an id of the Hugging Face Hub.
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpref import sharding
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.errors import UserError
from jaxpref.models import convert, corrections, hub, pipeline_configs, text, weights
from jaxpref.models import unet as unet_lib
from jaxpref.models import vae as vae_lib


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """A pipeline's modules, parameters, tokenizers and noise schedule.

  Attributes:
    path: the directory it was read from.
    configs: contents of the configuration files: 'model_index', 'scheduler', and one per
      module.
    modules: 'unet', 'vae', 'text_encoder', for SDXL also 'text_encoder_2'; Flax linen modules,
      without parameters.
    params: float32 trees by module name; numpy arrays or on the mesh's devices.
    tokenizers: transformers' tokenizers, one per text encoder, in their order.
    schedule: the noise schedule that the UNet was trained with.
    digest: changes with any name or stored value of the weights.
    clip_skip: number of last layers of the text encoders to skip, see `text.encode_text`.
  """

  path: Path
  configs: Mapping[str, Mapping[str, Any]]
  modules: Mapping[str, nn.Module]
  params: dict[str, Any]
  tokenizers: tuple[Any, ...]
  schedule: schedule_lib.NoiseSchedule
  digest: str
  clip_skip: int = 0

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """Channels, height and width of a latent at the UNet's training size."""
    size = self.modules["unet"].sample_size
    return self.modules["vae"].latent_channels, size, size

  @property
  def is_improver(self) -> bool:
    """Whether the UNet has a clean image as a second input, see `widen`."""
    return self.modules["unet"].in_channels == 2 * self.latent_shape[0]

  @property
  def vae_factor(self) -> int:
    """Pixels per latent along an axis."""
    return 2 ** (len(self.modules["vae"].block_out_channels) - 1)

  @property
  def image_size(self) -> int:
    """Height and width in pixels of an image at the UNet's training size."""
    return self.modules["unet"].sample_size * self.vae_factor

  @property
  def is_xl(self) -> bool:
    """Whether the UNet takes SDXL's conditioning: two encoders, pooled text, sizes."""
    return "text_encoder_2" in self.modules

  @property
  def zeroes_uncond(self) -> bool:
    """Whether the unconditional input is zeros, as in SDXL, and not the empty prompt."""
    return self.is_xl and self.configs["model_index"].get("force_zeros_for_empty_prompt", True)

  def spacing(self, solver: str = "dpm_solver") -> dict[str, Any]:
    """Returns the scheduler configuration's spacing of timesteps, for `uniform_grid`.

    Missing fields get the defaults of diffusers' scheduler for `solver`, whichever scheduler
    wrote the file. A missing offset is 0, or 1 if `solver`'s own scheduler wrote the file,
    because diffusers' pipeline then corrects it.

    Args:
      solver: 'dpm_solver', 'ddim' or 'ddpm'.
    """
    config = self.configs["scheduler"]
    multistep = solver == "dpm_solver"
    ends_clean = solver != "ddim" or config.get("set_alpha_to_one", True)
    own_final = "zero" if ends_clean else "sigma_min"
    kept = config.get("_class_name") == _SCHEDULERS[solver]
    unsaid = int(kept and corrections.apply_to(self.configs.get("model_index", {})))
    offset = config.get("steps_offset")
    return {
      "spacing": config.get("timestep_spacing") or ("linspace" if multistep else "leading"),
      "steps_offset": unsaid if offset is None else offset,
      "visit_lowest": not multistep,
      "karras": multistep and bool(config.get("use_karras_sigmas")),
      "final": config.get("final_sigmas_type") or "zero" if multistep else own_final,
    }


_SCHEDULERS = {
  "dpm_solver": "DPMSolverMultistepScheduler",
  "ddim": "DDIMScheduler",
  "ddpm": "DDPMScheduler",
}
# What diffusers and transformers raise for invalid configurations.
_LIBRARY_ERRORS = (
  *(AttributeError, TypeError, ValueError, LookupError, ArithmeticError),
  *(AssertionError, NotImplementedError, RecursionError, MemoryError),
)
_log = logging.getLogger(__name__)
_BUILD: dict[str, Callable] = {
  "unet": unet_lib.build_unet,
  "vae": vae_lib.build_vae,
  "text_encoder": text.build_text_encoder,
  "text_encoder_2": text.build_text_encoder,
}


def build_modules(
  configs: Mapping[str, Mapping[str, Any]], *, dtype: Any = jnp.float32
) -> dict[str, nn.Module]:
  """Builds the modules of configurations, by part.

  Args:
    configs: as for `save_pipeline`.
    dtype: of the computation; the VAE always computes in float32.
  """
  return {
    part: make(configs[part], dtype=_dtype_of(part, dtype))
    for part, make in _BUILD.items()
    if part in configs
  }


def _dtype_of(part: str, dtype: Any) -> Any:
  # The VAE runs once per image, its errors are visible, and SDXL's overflows in float16.
  return jnp.float32 if part == "vae" else dtype


def load_pipeline(
  name: str,
  *,
  dtype: Any = jnp.float32,
  mesh: Mesh | None = None,
  variant: str = "",
  unet: str = "",
  vae: str = "",
  clip_skip: int = 0,
  without: Sequence[str] = (),
) -> Pipeline:
  """Reads a pipeline.

  Args:
    name: 'shapes' for the bundled one, a directory in diffusers' layout, or an id of the
      Hugging Face Hub, perhaps with `@revision`.
    dtype: of the computation in UNet and text encoders; parameters are float32.
    mesh: each tensor is placed on its devices as soon as it is read, sharded as in
      `sharding.params_sharding`; without a mesh, parameters are numpy arrays.
    variant: of the weights, such as 'fp16', for parts that have it; '' prefers the full ones.
    unet: a UNet to use instead of the pipeline's, see `hub.find_part`.
    vae: a VAE to use instead of the pipeline's.
    clip_skip: see `Pipeline`.
    without: parts whose parameters are only read for the digest, and not kept.

  Raises:
    UserError: a file is missing, damaged or invalid, or does not fit its configuration.
  """
  path, places = _find(name, variant, unet, vae)
  _check_variant(places, variant)
  described, shapes = _describe(path, places, dtype, clip_skip)
  modules = described.modules
  encoders = [part for part in modules if part.startswith("text_encoder")]
  tokenizers = tuple(
    _load_tokenizer(described, part.replace("text_encoder", "tokenizer"), modules[part])
    for part in encoders
  )

  def place(_, array):
    if mesh is None:
      return array
    where = sharding.params_sharding(mesh, array)
    placed = jax.make_array_from_callback(array.shape, where, lambda index: array[index])
    return jax.block_until_ready(placed)  # otherwise several tensors would stay on the host

  def forget(*_):
    return None

  params, digests = {}, []
  for part in modules:
    params[part], digest = convert.import_tensors(
      weights.open_part(places[part], part, variant=variant),
      shapes[part],
      where=str(places[part]),
      place=forget if part in without else place,
    )
    digests.append(digest)
  for part in without:
    del params[part]
  digest = hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]
  return dataclasses.replace(described, params=params, tokenizers=tokenizers, digest=digest)


def describe_pipeline(
  name: str,
  *,
  dtype: Any = jnp.float32,
  variant: str = "",
  unet: str = "",
  vae: str = "",
  clip_skip: int = 0,
) -> Pipeline:
  """Reads a pipeline without its parameters and tokenizers, from its configuration files.

  Args:
    name: as for `load_pipeline`.
    dtype: of the computation in UNet and text encoders.
    variant: as for `load_pipeline`; no weights are downloaded.
    unet: as for `load_pipeline`.
    vae: as for `load_pipeline`.
    clip_skip: as for `load_pipeline`.

  Raises:
    UserError: a file is missing or invalid.
  """
  path, places = _find(name, variant, unet, vae, configs_only=True)
  return _describe(path, places, dtype, clip_skip)[0]


def source_of(model: Any) -> dict[str, Any]:
  """Returns arguments of `load_pipeline`, without the name, from the section `model`."""
  texts = {name: str(model.get(name) or "") for name in ("variant", "unet", "vae")}
  return {**texts, "clip_skip": model.get("clip_skip") or 0}


def _find(
  name: str, variant: str, unet: str, vae: str, *, configs_only: bool = False
) -> tuple[Path, dict[str, Path]]:
  """Returns the directories of the pipeline and of its parts, which may be elsewhere."""
  others = {"unet": unet, "vae": vae}
  found = {
    part: hub.find_part(source, part, variant=variant, configs_only=configs_only)
    for part, source in others.items()
    if source
  }
  path = hub.find_pipeline(name, variant=variant, configs_only=configs_only, without=found)
  return path, {part: found.get(part, path / part) for part in _BUILD}


def _check_variant(places: Mapping[str, Path], variant: str) -> None:
  """Refuses a variant that no part has; warns of parts that are read without it."""
  if not variant:
    return
  chosen = {
    part: found[0]
    for part, place in places.items()
    if (found := weights.choose(weights.files_in(place), part, variant))
  }
  if variant not in chosen.values():
    file = f"{weights.stem_of('unet')}.{variant}.safetensors"
    raise UserError(
      f"{places['unet']}/{file} is missing, and no other part has the variant {variant}"
    )
  if plain := [part for part, kind in chosen.items() if not kind]:
    _log.warning(
      "parts without the variant %s, read from plain files: %s", variant, ", ".join(plain)
    )


def _describe(
  path: Path, places: Mapping[str, Path], dtype: Any, clip_skip: int
) -> tuple[Pipeline, dict[str, Any]]:
  """Returns the pipeline without parameters, and their shapes by part."""
  configs = pipeline_configs.read_configs(path, places)
  modules, shapes = {}, {}
  for part, make in _BUILD.items():
    if part in configs:
      file = places[part] / "config.json"
      try:
        modules[part] = make(configs[part], dtype=_dtype_of(part, dtype))
        shapes[part] = abstract_params(modules[part])
      except UserError as error:
        raise UserError(f"{file}: {error}") from error
      except _LIBRARY_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file} does not describe a valid {part}: {reason}") from error
  schedule = pipeline_configs.read_schedule(
    path / "scheduler" / "scheduler_config.json", configs["scheduler"]
  )
  pipeline_configs.check_fit(places, modules)
  encoders = [m for part, m in modules.items() if part.startswith("text_encoder")]
  layers = min(e.config.num_hidden_layers for e in encoders)
  if not 0 <= clip_skip < layers:
    raise UserError(
      f"clip_skip must be at least 0 and below {layers}, the text encoder's number of layers "
      f"(got {clip_skip})"
    )
  return Pipeline(path, configs, modules, {}, (), schedule, "", clip_skip), shapes


def _load_tokenizer(pipeline: Pipeline, name: str, encoder: Any) -> Any:
  path, named = pipeline.path, pipeline.configs["model_index"][name]
  tokenizer = text.load_tokenizer(path / name, fast="CLIPTokenizerFast" in named)
  config = encoder.config
  # More embeddings than tokens are fine: some programs round their number up.
  if len(tokenizer) > config.vocab_size:
    raise UserError(
      f"{path}/{name} has {len(tokenizer)} tokens, but its text encoder {config.vocab_size}: "
      "they do not belong together"
    )
  if tokenizer.model_max_length > config.max_position_embeddings:
    raise UserError(
      f"{path}/{name} makes {tokenizer.model_max_length} tokens, but its text encoder takes "
      f"{config.max_position_embeddings}: they do not belong together"
    )
  return tokenizer


def widen(pipeline: Pipeline) -> Pipeline:
  """Adds a clean-image input to the UNet; returns improvers unchanged.

  The image has no influence until it is trained, see `unet.widen_input`. The pipeline may be
  without parameters.
  """
  if pipeline.is_improver:
    return pipeline
  channels = 2 * pipeline.latent_shape[0]
  config = {**pipeline.configs["unet"], "in_channels": channels}
  params = dict(pipeline.params)
  if "unet" in params:
    params["unet"] = unet_lib.widen_input(params["unet"], channels)
  module = pipeline.modules["unet"].clone(in_channels=channels)
  return dataclasses.replace(
    pipeline,
    configs={**pipeline.configs, "unet": config},
    modules={**pipeline.modules, "unet": module},
    params=params,
  )


def fingerprint(params: Any, *, of: str = "") -> str:
  """Computes a digest that changes with any name or value in a tree of arrays, and with `of`.

  With several processes it is a collective, which gathers one array after the other.
  """
  digest = hashlib.sha256(of.encode())
  for path, leaf in jax.tree.leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(sharding.to_host(leaf)).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()[:16]


def abstract_params(module: nn.Module) -> Any:
  """Returns the shapes of a module's parameters, without computing any."""
  if hasattr(module, "init_weights"):
    return jax.tree.map(lambda shape: shape, _abstract_weights(module))  # its own containers
  return jax.eval_shape(lambda k: text.init_text_encoder(module, k), jax.random.key(0))


@functools.lru_cache(maxsize=8)
def _abstract_weights(module: nn.Module) -> Any:
  """Traces the shapes of a diffusers module, which takes seconds; cached for later calls."""
  return jax.eval_shape(module.init_weights, jax.random.key(0))
