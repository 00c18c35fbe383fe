"""Text-to-image pipelines in diffusers' directory layout, read without PyTorch.

`families` has those that are supported. `load_pipeline` takes the name of a bundled pipeline, a
directory, or an id of the Hugging Face Hub.
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import sharding
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.errors import UserError
from jaxpref.models import denoiser as denoiser_lib
from jaxpref.models import families, hub, pipeline_configs, text, torch_layout, weights
from jaxpref.models import vae as vae_lib
from jaxpref.models.denoiser import Denoise
from jaxpref.models.families.family import Family


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """A pipeline's modules, parameters, tokenizers and noise schedule.

  Attributes:
    path: the directory it was read from.
    family: what kind of pipeline it is.
    configs: contents of the configuration files: 'model_index', 'scheduler', and one per
      module.
    modules: Flax linen modules by part, without parameters: those of `family.parts` that the
      pipeline has.
    params: trees by part; numpy arrays or on the mesh's devices. They are float32, but for
      matrices of text encoders, which are in the dtype of the computation.
    tokenizers: one per text encoder, in their order.
    schedule: the noise schedule that the denoiser was trained with.
    digest: changes with any name or stored value of the weights.
    clip_skip: number of last layers of the text encoders to skip, see `text.encode_text`.
    image_size: height and width in pixels of the images of training, and by default of others.
    scorer: a `scorers.Reward` whose token ids are the part 'tokens' of conditionings, or None;
      it has its parameters' shapes, and `params` has them as 'scorer'.
  """

  path: Path
  family: Family
  configs: Mapping[str, Mapping[str, Any]]
  modules: Mapping[str, nn.Module]
  params: dict[str, Any]
  tokenizers: tuple[Any, ...]
  schedule: schedule_lib.Schedule
  digest: str
  clip_skip: int
  image_size: int
  scorer: Any = None

  @property
  def denoiser(self) -> Any:
    """The module that is trained."""
    return self.modules[self.family.denoiser]

  @property
  def denoiser_params(self) -> Any:
    """The parameters of `denoiser`; they may be `lora.Adapted`."""
    return self.params[self.family.denoiser]

  def with_denoiser_params(self, params: Any) -> "Pipeline":
    """Returns the pipeline with other parameters of its denoiser."""
    replaced = {**self.params, self.family.denoiser: params}
    return dataclasses.replace(self, params=replaced)

  @property
  def other_params(self) -> dict[str, Any]:
    """The parameters of all parts but the denoiser, by part."""
    return {part: tree for part, tree in self.params.items() if part != self.family.denoiser}

  @property
  def encoders(self) -> list[str]:
    """Names of the text encoders, in the order of their tokenizers."""
    return list(self.family.tokenizers(self.modules))

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """Channels, height and width of a latent of `image_size`."""
    size = self.image_size // self.vae_factor
    vae: Any = self.modules["vae"]
    return vae.latent_channels, size, size

  @property
  def is_improver(self) -> bool:
    """Whether the denoiser has a clean image as a second input, see `widen`."""
    if not self.family.input_layer:
      return False
    return self.denoiser.in_channels == 2 * self.latent_shape[0]

  @property
  def vae_factor(self) -> int:
    """Pixels per latent along an axis."""
    vae: Any = self.modules["vae"]
    return vae.factor

  @property
  def size_unit(self) -> int:
    """Number of pixels of which an image's height and width must be multiples."""
    return self.vae_factor * self.family.latent_unit(self.denoiser)

  @property
  def zeroes_uncond(self) -> bool:
    """Whether the unconditional input is zeros, as in SDXL, and not the empty prompt."""
    return self.family.zeroes_uncond(self.configs["model_index"])

  @functools.cached_property
  def part_digests(self) -> dict[str, str]:
    """Digests of the VAE's and text encoders' weights by part, computed at the first use."""
    return {part: fingerprint(params) for part, params in self.other_params.items()}

  def spacing(self, solver: str = "dpm_solver") -> dict[str, Any]:
    """Returns the scheduler configuration's spacing of timesteps, for `uniform_grid`.

    Args:
      solver: 'dpm_solver', 'ddim' or 'ddpm'.
    """
    return self.family.scheduler.spacing(self.configs["scheduler"], solver)

  @property
  def takes_guidance(self) -> bool:
    """Whether the scale of guidance is an input of the denoiser, see `Family`."""
    return self.family.takes_guidance(self.denoiser)

  def classifier_free_scale(self, guidance: float) -> float:
    """Returns the scale of classifier-free guidance: 1, none, if it is the denoiser's input."""
    return 1.0 if self.takes_guidance else guidance

  def make_denoise(self, *, guidance: float = 1.0, **options: Any) -> Denoise:
    """Makes the denoiser's forward pass.

    Args:
      guidance: the scale that a denoiser is given which was distilled from guidance; others
        do not take one.
      **options: those of `Family.make_denoise`.
    """
    given = {"guidance": guidance} if self.takes_guidance else {}
    return self.family.make_denoise(self.denoiser, **given, **options)

  def attentions(self) -> Sequence[tuple[int, int]]:
    """Returns (heads, tokens) of the self-attentions whose logits XLA would store."""
    return self.family.attentions(self.configs[self.family.denoiser], self.latent_shape)

  def abstract_denoiser(self) -> Any:
    """Returns the shapes of the denoiser's parameters, without computing any."""
    return abstract_params(self.denoiser)

  def abstract_cond(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a conditioning of `rows` prompts, without an improver's image."""
    cond = self.family.abstract_cond(self.modules, rows)
    if self.family.takes_sizes:
      cond["time_ids"] = jax.ShapeDtypeStruct((rows, 6), jnp.float32)
    if self.scorer:
      ids = self.scorer.tokenize([""])
      cond["tokens"] = jax.ShapeDtypeStruct((rows, *ids.shape[1:]), ids.dtype)
    return cond

  def freeze(self, params: Any, dtype: Any) -> Any:
    """Casts parameters of the denoiser that are not trained, see `denoiser.freeze`."""
    return denoiser_lib.freeze(params, dtype, self.family.unrounded)


# What diffusers and transformers raise for invalid configurations.
_LIBRARY_ERRORS = (
  *(AttributeError, TypeError, ValueError, LookupError, ArithmeticError),
  *(AssertionError, NotImplementedError, RecursionError, MemoryError),
)
_log = logging.getLogger(__name__)


def build_modules(
  configs: Mapping[str, Mapping[str, Any]], *, dtype: Any = jnp.float32
) -> dict[str, nn.Module]:
  """Builds the modules of configurations, by part.

  Args:
    configs: as for `save_pipeline`.
    dtype: of the computation; the VAE always computes in float32.
  """
  family = families.of_configs(configs)
  return {
    name: part.build(configs[name], dtype=_dtype_of(name, dtype))
    for name, part in family.parts.items()
    if name in configs
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
  image_size: int = 0,
  without_denoiser: bool = False,
) -> Pipeline:
  """Reads a pipeline.

  Args:
    name: 'shapes' for the bundled one, a directory in diffusers' layout, or an id of the
      Hugging Face Hub, perhaps with `@revision`.
    dtype: of the computation in denoiser and text encoders; see `Pipeline.params`.
    mesh: each tensor is placed on its devices as soon as it is read, sharded as in
      `sharding.params_sharding`; without a mesh, parameters are numpy arrays.
    variant: of the weights, such as 'fp16', for parts that have it; '' prefers the full ones.
    unet: a denoiser to use instead of the pipeline's, see `hub.find_part`.
    vae: a VAE to use instead of the pipeline's.
    clip_skip: see `Pipeline`.
    image_size: see `Pipeline`; 0 for the size that the denoiser was trained for.
    without_denoiser: whether the denoiser's trained parameters are only read for the digest,
      and not kept.

  Raises:
    UserError: a file is missing, damaged or invalid, or does not fit its configuration.
  """
  found = _find(name, variant, unet, vae)
  _check_variant(found, variant)
  described, shapes = _describe(found, dtype, clip_skip, image_size)
  family = described.family
  index = described.configs["model_index"]
  tokenizers = tuple(
    of.load(
      *(described.path / of.folder, index[of.folder]),
      *(described.modules[part], described.denoiser),
    )
    for part, of in family.tokenizers(described.modules).items()
  )

  def place(_, array):
    if mesh is None:
      return array
    where = sharding.params_sharding(mesh, array)
    placed = jax.make_array_from_callback(array.shape, where, lambda index: array[index])
    return jax.block_until_ready(placed)  # otherwise several tensors would stay on the host

  def place_fixed(path, array):
    return place(path, array) if path[-1] in family.fixed else None

  params, digests = {}, []
  for part, directory in found.places.items():
    params[part], digest = torch_layout.import_tensors(
      weights.open_part(directory, family.parts[part].stem, variant=variant),
      shapes[part],
      where=str(directory),
      place=place_fixed if without_denoiser and part == family.denoiser else place,
    )
    digests.append(digest)
  if without_denoiser:
    kept = denoiser_lib.split_fixed(params.pop(family.denoiser), family.fixed)[1]
    params |= {family.denoiser: kept} if kept else {}
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
  image_size: int = 0,
) -> Pipeline:
  """Reads a pipeline without its parameters and tokenizers, from its configuration files.

  Args:
    name: as for `load_pipeline`.
    dtype: of the computation in denoiser and text encoders.
    variant: as for `load_pipeline`; no weights are downloaded.
    unet: as for `load_pipeline`.
    vae: as for `load_pipeline`.
    clip_skip: as for `load_pipeline`.
    image_size: as for `load_pipeline`.

  Raises:
    UserError: a file is missing or invalid.
  """
  found = _find(name, variant, unet, vae, configs_only=True)
  return _describe(found, dtype, clip_skip, image_size)[0]


def source_of(model: ConfigDict) -> dict[str, Any]:
  """Returns arguments of `load_pipeline`, without the name, from the section `model`."""
  texts = {name: str(model.get(name) or "") for name in ("variant", "unet", "vae")}
  return {**texts, **{name: model.get(name) or 0 for name in ("clip_skip", "image_size")}}


class _Found(NamedTuple):
  """A pipeline's directory, index and family, and the directories of its parts."""

  path: Path
  model_index: dict[str, Any]
  family: Family
  places: dict[str, Path]


def _find(
  name: str, variant: str, unet: str, vae: str, *, configs_only: bool = False
) -> _Found:
  """Finds a pipeline and its parts, which may be elsewhere."""
  others = {"unet": unet, "vae": vae}
  elsewhere = {
    field: hub.find_part(source, field, variant=variant, configs_only=configs_only)
    for field, source in others.items()
    if source
  }
  path = hub.find_pipeline(name, variant=variant, configs_only=configs_only, without=elsewhere)
  index, family = pipeline_configs.read_index(path)
  there = families.parts_in(index)
  places = {part: path / part for part in family.parts if part in there}
  fields = {"unet": family.denoiser, "vae": "vae"}
  places |= {fields[field]: place for field, place in elsewhere.items()}
  return _Found(path, index, family, places)


def _check_variant(found: _Found, variant: str) -> None:
  """Refuses a variant that no part has; warns of parts that are read without it."""
  if not variant:
    return
  parts, denoiser = found.family.parts, found.family.denoiser
  chosen = {
    part: files[0]
    for part, place in found.places.items()
    if (files := weights.choose(weights.files_in(place), parts[part].stem, variant))
  }
  if variant not in chosen.values():
    file = f"{parts[denoiser].stem}.{variant}.safetensors"
    raise UserError(
      f"{found.places[denoiser]}/{file} is missing, and no other part has the variant {variant}"
    )
  if plain := [part for part, kind in chosen.items() if not kind]:
    _log.warning(
      "parts without the variant %s, read from plain files: %s", variant, ", ".join(plain)
    )


def _describe(
  found: _Found, dtype: Any, clip_skip: int, image_size: int
) -> tuple[Pipeline, dict[str, Any]]:
  """Returns the pipeline without parameters, and their shapes by part."""
  path, index, family, places = found
  configs = pipeline_configs.read_configs(path, index, family, places)
  modules: dict[str, Any] = {}
  shapes = {}
  for part, place in places.items():
    file = place / "config.json"
    try:
      modules[part] = family.parts[part].build(configs[part], dtype=_dtype_of(part, dtype))
      shapes[part] = abstract_params(modules[part])
    except UserError as error:
      raise UserError(f"{file}: {error}") from error
    except _LIBRARY_ERRORS as error:
      reason = str(error).partition("\n")[0]
      raise UserError(f"{file} does not describe a valid {part}: {reason}") from error
  try:
    schedule = family.scheduler.read(configs["scheduler"])
  except UserError as error:
    raise UserError(f"{path / pipeline_configs.SCHEDULER}: {error}") from error
  vae_lib.check_scale(modules["vae"], places["vae"] / "config.json")
  family.check_fit(places, modules)
  if not 0 <= clip_skip < (layers := family.skippable(modules)):
    raise UserError(
      f"clip_skip must be at least 0 and below {layers}, the text encoder's number of layers "
      f"(got {clip_skip})"
    )
  native = family.sample_size(modules[family.denoiser]) * modules["vae"].factor
  described = Pipeline(
    *(path, family, configs, modules, {}, (), schedule, ""),
    clip_skip=clip_skip,
    image_size=image_size or native,
  )
  unit = described.size_unit
  if image_size < 0 or image_size % unit:
    raise UserError(f"image_size must be a multiple of {unit} for {path} (got {image_size})")
  return described, shapes


def widen(pipeline: Pipeline) -> Pipeline:
  """Adds a clean-image input to the denoiser; returns improvers unchanged.

  The image has no influence until it is trained, see `denoiser.widen_input`. The pipeline may
  be without parameters.

  Raises:
    UserError: the family does not have improvers.
  """
  if pipeline.is_improver:
    return pipeline
  family, channels = pipeline.family, 2 * pipeline.latent_shape[0]
  if not family.input_layer:
    raise UserError(f"{family.name} cannot be an improver: its input cannot be widened")
  part, params = family.denoiser, dict(pipeline.params)
  if part in params:
    params[part] = denoiser_lib.widen_input(params[part], family.input_layer, channels)
  config = {**pipeline.configs[part], "in_channels": channels}
  return dataclasses.replace(
    pipeline,
    configs={**pipeline.configs, part: config},
    modules={**pipeline.modules, part: pipeline.denoiser.clone(in_channels=channels)},
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
  """Returns the shapes and dtypes of a module's parameters, without computing any."""
  if hasattr(module, "init_weights"):
    return jax.tree.map(lambda shape: shape, _abstract_weights(module))  # its own containers
  return text.abstract_params(module)


@functools.lru_cache(maxsize=8)
def _abstract_weights(module: nn.Module) -> Any:
  """Traces the shapes of a diffusers module, which takes seconds; cached for later calls."""
  return jax.eval_shape(module.init_weights, jax.random.key(0))
