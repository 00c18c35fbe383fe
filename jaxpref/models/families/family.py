"""The record of a model family: everything that other code must know of a kind of pipeline."""

import dataclasses
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

Config = Mapping[str, Any]
Modules = Mapping[str, Any]  # by part
Size = tuple[int, int, int]  # channels, height and width of a latent


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """The tokenizer of a text encoder.

  Attributes:
    folder: its name in the pipeline's directory.
    load: (folder, its entry in `model_index.json`, the encoder, the denoiser) -> the tokenizer;
      it has a `len`, `model_max_length`, and, for warnings of long prompts, a call like that of
      transformers' tokenizers.
    tokenize: (tokenizer, texts, negative) -> int32 [N, L]. `negative` tells whether they are
      what guidance moves away from, which some families encode differently.
  """

  folder: str
  load: Callable[[Path, Any, Any, Any], Any]
  tokenize: Callable[[Any, Sequence[str], bool], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """One network of a pipeline, which has a folder of its own.

  The part 'vae' builds a module as `vae.AutoencoderKL` describes it.

  Attributes:
    build: `build(config, *, dtype)` -> the network without parameters, a Flax linen module with
      the field `dtype`. `init_weights(key)` returns its parameters, which it keeps in float32;
      large text encoders, which are never trained, keep matrices in `dtype`.
    fields: known fields of `config.json`; a warning names others.
    needed: fields without which the defaults describe another network than was trained; a
      warning names missing ones.
    stem: name of the weight files, without suffixes.
    read: (contents of `config.json`, the part's entry in `model_index.json`) -> `config`.
    is_optional: whether a pipeline may lack the part.
    tokenizer: of a text encoder; None for other parts.
  """

  build: Callable[..., nn.Module]
  fields: Collection[str]
  needed: Sequence[str]
  stem: str
  read: Callable[[Config, Any], dict[str, Any]] = lambda config, entry: dict(config)
  is_optional: bool = False
  tokenizer: Tokenizer | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Scheduler:
  """How `scheduler_config.json` is read.

  Attributes:
    read: contents -> the process that the denoiser was trained with. Raises a UserError that
      names a field which is not supported.
    spacing: (contents, solver) -> arguments of `timesteps.uniform_grid`.
    fields: as of `Part`.
    needed: as of `Part`.
  """

  read: Callable[[Config], Any]
  spacing: Callable[[Config, str], dict[str, Any]]
  fields: Collection[str]
  needed: Sequence[str]


def keep_configs(configs: Mapping[str, Config], *, where: str) -> Mapping[str, Config]:  # noqa: ARG001
  """Corrects nothing."""
  return configs


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
  """A model family.

  Attributes:
    name: for messages.
    pipelines: how `_class_name` in `model_index.json` begins for pipelines of this family.
    index: `model_index.json` of a pipeline that was not read from files.
    parts: networks by name, the text encoders in the order of their tokenizers.
    denoiser: name of the part that is trained.
    scheduler: how the noise schedule and its timesteps are read.
    check_fit: (folders, modules), by part: raises a UserError if the parts do not belong
      together.
    encode: `encode(modules, params, ids, *, clip_skip)` -> conditioning of prompts, one row
      each. `params` are the text encoders' by part; `ids` are token ids, one array for each
      tokenizer that the pipeline has.
    abstract_cond: (modules, rows) -> the shapes of what `encode` returns.
    make_denoise: `make_denoise(module, *, attention, norm, remat, mesh)` -> `denoise(params,
      x_t, t, cond)`, see `denoiser.make_denoise`. `attention` and `norm` are kernels, and
      `remat` says what the backward pass recomputes, see `base_config`.
    make_encode: as `make_denoise`, of the denoiser's first half, for latent reward models, see
      `unet.make_encode`; None if the family does not have them.
    latent_unit: (denoiser) -> number of which the height and width of latents must be
      multiples.
    attentions: (the denoiser's configuration, a latent's shape) -> (number of heads, number of
      tokens) of each kind of self-attention whose logits XLA would store.
    lora_targets: a regular expression for LoRA, see `lora.init_lora`: layers that published
      work adapts.
    export_lora: `export_lora(params, modules, dtype)` -> tensors and metadata of a file with
      LoRA additions, by the names that other programs read.
    to_single_file: (tensors by part, modules, the scheduler's configuration) -> tensors of one
      file by the names that ComfyUI reads; None if there are none.
    v_note: what to print after writing a single file of a model that predicts v.
    correct: `correct(configs, *, where)` -> configurations as diffusers' pipeline corrects old
      ones.
    takes_sizes: whether the conditioning also has 'time_ids', see `denoiser.Cond`.
    zeroes_uncond: (`model_index.json`) -> whether the unconditional input is zeros and not the
      empty prompt.
    skippable: (modules) -> number of text encoder layers, of which `clip_skip` must be less.
    sample_size: (denoiser) -> height and width of a latent at its training size.
    input_layer: name of the convolution that reads latents, which an improver widens; '' if
      the family does not have improvers.
    fixed: names of parameters that are never trained, such as tables of positions.
    unrounded: names of parameters that stay float32 where frozen weights are rounded, see
      `denoiser.freeze`.
    takes_guidance: (denoiser) -> whether it was distilled from guidance. The scale is then its
      input, and there is not any classifier-free guidance. `make_denoise` takes another
      argument, `guidance`: the scale where the conditioning does not have 'guidance' [B].
    guidance: (denoiser) -> usual scale of guidance; at most 1: without guidance.
  """

  name: str
  pipelines: tuple[str, ...]
  index: Config
  parts: Mapping[str, Part]
  denoiser: str
  scheduler: Scheduler
  check_fit: Callable[[Mapping[str, Path], Modules], None]
  encode: Callable[..., dict[str, Any]]
  abstract_cond: Callable[[Modules, int], dict[str, Any]]
  make_denoise: Callable[..., Callable]
  latent_unit: Callable[[Any], int]
  attentions: Callable[[Config, Size], Sequence[tuple[int, int]]]
  lora_targets: str
  export_lora: Callable[[Any, Modules, Any], tuple[dict[str, np.ndarray], dict[str, str]]]
  to_single_file: Callable[..., dict[str, np.ndarray]] | None = None
  v_note: str = ""
  correct: Callable[..., Mapping[str, Config]] = keep_configs
  takes_sizes: bool = False
  zeroes_uncond: Callable[[Config], bool] = lambda index: False
  skippable: Callable[[Modules], int] = lambda modules: 1
  sample_size: Callable[[Any], int] = operator.attrgetter("sample_size")
  input_layer: str = ""
  make_encode: Callable[..., Callable] | None = None
  fixed: tuple[str, ...] = ()
  unrounded: tuple[str, ...] = ()
  takes_guidance: Callable[[Any], bool] = lambda module: False
  guidance: Callable[[Any], float] = lambda module: 7.5

  def tokenizers(self, parts: Collection[str]) -> dict[str, Tokenizer]:
    """Returns the tokenizers of the text encoders among `parts`, by part."""
    return {
      name: part.tokenizer
      for name, part in self.parts.items()
      if part.tokenizer is not None and name in parts
    }

  @property
  def required(self) -> list[str]:
    """The parts that every pipeline has."""
    return [name for name, part in self.parts.items() if not part.is_optional]
