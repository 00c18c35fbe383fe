"""Text-to-image pipelines in diffusers' directory layout, read without PyTorch.

Stable Diffusion 1.x and 2.x, and SDXL, which has a second text encoder. `load_pipeline`
takes the name of a bundled pipeline, a directory, or an id of the Hugging Face hub.
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
from jaxpref.diffusion import timesteps as timesteps_lib
from jaxpref.errors import UserError
from jaxpref.models import config_files, convert, corrections, hub, text, weights
from jaxpref.models import unet as unet_lib
from jaxpref.models import vae as vae_lib


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Modules without parameters, parameters apart, and what belongs to both.

  Attributes:
    path: the directory it was read from.
    configs: contents of its configuration files: 'model_index', 'scheduler', and one for
      each module.
    modules: 'unet', 'vae', 'text_encoder', for SDXL also 'text_encoder_2'; Flax linen.
    params: float32 trees under the same names, on the mesh's devices or numpy.
    tokenizers: of transformers, one for each text encoder, in their order.
    schedule: the noise schedule it was trained with.
    digest: changes with any name or stored value of the weights.
    clip_skip: how many of the text encoders' last layers are left out for prompts, see
      `text.encode_text`.
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
    """Channels, height and width of a latent at the size the UNet was trained for."""
    size = self.modules["unet"].sample_size
    return self.modules["vae"].latent_channels, size, size

  @property
  def is_improver(self) -> bool:
    """Whether the UNet is shown an image beside the noised latents, see `widen`."""
    return self.modules["unet"].in_channels == 2 * self.latent_shape[0]

  @property
  def vae_factor(self) -> int:
    """Pixels along an axis for each latent."""
    return 2 ** (len(self.modules["vae"].block_out_channels) - 1)

  @property
  def image_size(self) -> int:
    """Pixels, both ways, of an image at the size the UNet was trained for."""
    return self.modules["unet"].sample_size * self.vae_factor

  @property
  def is_xl(self) -> bool:
    """Whether the UNet takes SDXL's conditioning: two encoders, pooled text, sizes."""
    return "text_encoder_2" in self.modules

  @property
  def zeroes_uncond(self) -> bool:
    """Whether no prompt means zeros, as SDXL was trained, rather than the empty prompt."""
    return self.is_xl and self.configs["model_index"].get("force_zeros_for_empty_prompt", True)

  def spacing(self, solver: str = "dpm_solver") -> dict[str, Any]:
    """How the scheduler's configuration wants timesteps spaced, for `grid.uniform_grid`.

    What it leaves open is filled as diffusers' scheduler of that solver does, whichever
    scheduler wrote the file. An offset that is left open is 0 there, and 1 where the file is
    that scheduler's own: its pipeline then keeps and corrects it.

    Args:
      solver: 'dpm_solver', 'ddim' or 'ddpm'.
    """
    config = self.configs["scheduler"]
    multistep = solver == "dpm_solver"
    ends_clean = solver != "ddim" or config.get("set_alpha_to_one", True)
    own_final = "zero" if ends_clean else "sigma_min"
    kept = config.get("_class_name") == _SCHEDULERS[solver]
    unsaid = int(kept and corrections.are_made(self.configs.get("model_index", {})))
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
# Ways to space timesteps that the samplers lack; and the choices among those they have.
_OTHER_SPACINGS = ("use_beta_sigmas", "use_exponential_sigmas", "use_lu_lambdas")
_SPACING = {
  "timestep_spacing": timesteps_lib.SPACINGS,
  "final_sigmas_type": timesteps_lib.FINALS,
}
_CLASSES = ("StableDiffusionPipeline", "StableDiffusionImg2Img", "StableDiffusionXL")
_OTHER_TASKS = ("Inpaint", "Upscale", "ControlNet", "Adapter", "InstructPix2Pix")
# What the libraries raise of configurations that describe nothing.
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
_FIELDS = {
  "unet": unet_lib.FIELDS,
  "vae": vae_lib.FIELDS,
  "text_encoder": text.FIELDS,
  "text_encoder_2": text.FIELDS,
  "scheduler": config_files.SCHEDULER_FIELDS,
}


def build_modules(
  configs: Mapping[str, Mapping[str, Any]], *, dtype: Any = jnp.float32
) -> dict[str, nn.Module]:
  """The modules of these configurations, by part.

  Args:
    configs: as `save_pipeline` takes them.
    dtype: of the computation, but for the VAE's.
  """
  return {
    part: make(configs[part], dtype=_dtype_of(part, dtype))
    for part, make in _BUILD.items()
    if part in configs
  }


def _dtype_of(part: str, dtype: Any) -> Any:
  # The VAE runs once a picture, its errors are seen, and SDXL's overflows in float16.
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
      Hugging Face hub, perhaps with `@revision`.
    dtype: of the UNet's and text encoders' computation; parameters are float32.
    mesh: each tensor goes to its devices as soon as it is read, placed as by
      `sharding.params_sharding`; without one parameters are numpy arrays.
    variant: of the weights, such as 'fp16', for parts that have it; with '' the full ones if
      there are any.
    unet: another UNet than the pipeline's, see `hub.find_part`.
    vae: another VAE.
    clip_skip: see `Pipeline`.
    without: parts whose parameters are read for the digest alone and not kept.

  Raises:
    UserError: a file is missing or damaged, is not what it should be, or does not fit its
      configuration.
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
    return jax.block_until_ready(placed)  # else several tensors wait on the host

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
  """A pipeline without its parameters and tokenizers, from its configuration files.

  Args:
    name: as `load_pipeline` takes it.
    dtype: of the UNet's and text encoders' computation.
    variant: of the weights, of which none are downloaded.
    unet: as there.
    vae: as there.
    clip_skip: as there.

  Raises:
    UserError: a file is missing, or is not what it should be.
  """
  path, places = _find(name, variant, unet, vae, configs_only=True)
  return _describe(path, places, dtype, clip_skip)[0]


def source_of(model: Any) -> dict[str, Any]:
  """What `load_pipeline` takes besides the name, from a configuration's section `model`."""
  texts = {name: str(model.get(name) or "") for name in ("variant", "unet", "vae")}
  return {**texts, "clip_skip": model.get("clip_skip") or 0}


def _find(
  name: str, variant: str, unet: str, vae: str, *, configs_only: bool = False
) -> tuple[Path, dict[str, Path]]:
  """The pipeline's directory, and those of its parts, some of which may lie elsewhere."""
  others = {"unet": unet, "vae": vae}
  found = {
    part: hub.find_part(source, part, variant=variant, configs_only=configs_only)
    for part, source in others.items()
    if source
  }
  path = hub.find_pipeline(name, variant=variant, configs_only=configs_only, without=found)
  return path, {part: found.get(part, path / part) for part in _BUILD}


def _check_variant(places: Mapping[str, Path], variant: str) -> None:
  """Refuses a variant that no part has, and says which parts are read without it."""
  if not variant:
    return
  chosen = {
    part: found[0]
    for part, place in places.items()
    if (found := weights.choose(weights.files_in(place), part, variant))
  }
  if variant not in chosen.values():
    file = f"{weights.stem_of('unet')}.{variant}.safetensors"
    raise UserError(f"no weights at {places['unet']}/{file}, and no other part has {variant}")
  if plain := [part for part, kind in chosen.items() if not kind]:
    _log.warning("variant %s: read without it, from plain files: %s", variant, ", ".join(plain))


def _describe(
  path: Path, places: Mapping[str, Path], dtype: Any, clip_skip: int
) -> tuple[Pipeline, dict[str, Any]]:
  """The pipeline without parameters, and their shapes by part."""
  configs = _read_configs(path, places)
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
        raise UserError(f"{file} describes no {part} that can be built: {reason}") from error
  schedule = _schedule(path / "scheduler" / "scheduler_config.json", configs["scheduler"])
  _check_fit(places, modules)
  encoders = [m for part, m in modules.items() if part.startswith("text_encoder")]
  layers = min(e.config.num_hidden_layers for e in encoders)
  if not 0 <= clip_skip < layers:
    raise UserError(f"clip_skip is {clip_skip}, the text encoder has {layers} layers")
  return Pipeline(path, configs, modules, {}, (), schedule, "", clip_skip), shapes


def _read_configs(path: Path, places: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
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
      # As in diffusers the index says the class, whatever the file was saved of.
      if part == "text_encoder_2":
        config["architectures"] = ["CLIPTextModelWithProjection"]
      elif "CLIPTextModel" in index["text_encoder"]:
        config["architectures"] = ["CLIPTextModel"]
    config_files.check_bounds(config, file)
    config_files.warn_of_fields(part, config, _FIELDS[part], file)
    configs[part] = config
  return corrections.correct_configs(configs, where=str(path))


def _schedule(file: Path, config: Mapping[str, Any]) -> schedule_lib.NoiseSchedule:
  try:
    schedule = schedule_lib.schedule_from_config(config)
  except UserError as error:
    raise UserError(f"{file}: {error}") from error
  if odd := [f for f in _OTHER_SPACINGS if config.get(f)]:
    raise UserError(f"{file}: {odd[0]} = {config[odd[0]]!r} is not supported")
  for field, known in _SPACING.items():
    if (value := config.get(field)) is not None and value not in known:
      raise UserError(f"{file}: {field} is {value!r}, not one of {', '.join(known)}")
  offset = config.get("steps_offset")
  if offset is not None and (type(offset) is not int or not 0 <= offset < 1000):
    raise UserError(f"{file}: steps_offset is {offset!r}, not a number of steps")
  return schedule


def _load_tokenizer(pipeline: Pipeline, name: str, encoder: Any) -> Any:
  path, named = pipeline.path, pipeline.configs["model_index"][name]
  tokenizer = text.load_tokenizer(path / name, fast="CLIPTokenizerFast" in named)
  config = encoder.config
  # Further rows are never looked up: some programs round their number up.
  if len(tokenizer) > config.vocab_size:
    raise UserError(
      f"{path}/{name} has {len(tokenizer)} tokens, its text encoder {config.vocab_size}: "
      "they do not belong together"
    )
  if tokenizer.model_max_length > config.max_position_embeddings:
    raise UserError(
      f"{path}/{name} makes {tokenizer.model_max_length} tokens, its text encoder takes "
      f"{config.max_position_embeddings}: they do not belong together"
    )
  return tokenizer


def _check_fit(places: Mapping[str, Path], modules: Mapping[str, Any]) -> None:
  """Whether the parts belong to one model."""
  unet, vae = modules["unet"], modules["vae"]
  factor, shift = vae.scaling_factor, vae.shift_factor
  if not isinstance(factor, int | float) or not factor > 0:
    raise UserError(f"{places['vae']}/config.json: scaling_factor is {factor}, not positive")
  if not isinstance(shift, int | float):
    raise UserError(f"{places['vae']}/config.json: shift_factor is {shift}, not a number")
  encoders = [m.config for part, m in modules.items() if part.startswith("text_encoder")]
  xl = unet.addition_embed_type == "text_time"
  if xl != (len(encoders) == 2):
    raise UserError(
      f"{places['unet']} takes {'two texts' if xl else 'one text'}, the pipeline has "
      f"{len(encoders)} text encoder(s): they do not belong together"
    )
  taken = unet.cross_attention_dim, unet.in_channels
  given = sum(c.hidden_size for c in encoders), vae.latent_channels
  # Twice as many where an improver is shown an image, too.
  if taken[0] != given[0] or taken[1] not in (given[1], 2 * given[1]):
    raise UserError(
      f"{places['unet']} takes texts of width {taken[0]} and latents of {taken[1]} channels, "
      f"its text encoder and VAE make {given[0]} and {given[1]}: they do not belong together"
    )
  if xl:
    width = 6 * unet.addition_time_embed_dim + encoders[1].projection_dim
    if (wanted := unet.projection_class_embeddings_input_dim) != width:
      raise UserError(
        f"{places['unet']} takes {wanted} numbers beside the text, its second text encoder and "
        f"six sizes make {width}: they do not belong together"
      )


def widen(pipeline: Pipeline) -> Pipeline:
  """The pipeline as an improver, whose UNet is also shown a clean image; or one as it is.

  So far it makes nothing of the image, see `unet.widen_input`. Parameters may have been
  left out.
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
  """Changes with any name or value in a tree of arrays, and with `of`.

  On several processes a collective, of one array after the other.
  """
  digest = hashlib.sha256(of.encode())
  for path, leaf in jax.tree.leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(sharding.to_host(leaf)).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()[:16]


def abstract_params(module: nn.Module) -> Any:
  """Shapes of a module's parameters, without computing any."""
  if hasattr(module, "init_weights"):
    return jax.tree.map(lambda shape: shape, _abstract_weights(module))  # its own containers
  return jax.eval_shape(lambda k: text.init_text_encoder(module, k), jax.random.key(0))


@functools.lru_cache(maxsize=8)
def _abstract_weights(module: nn.Module) -> Any:
  """Those of diffusers' modules, which are traced in seconds and asked for again and again."""
  return jax.eval_shape(module.init_weights, jax.random.key(0))
