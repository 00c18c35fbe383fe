"""Parts that families share: networks, tokenizers, schedulers and LoRA files."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxpref.errors import UserError
from jaxpref.models import lora, piece_tokenizers, scheduler_config, text, unet, vae
from jaxpref.models.families.family import Modules, Part, Scheduler, Tokenizer

DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"

UNET = Part(build=unet.build_unet, fields=unet.FIELDS, needed=unet.NEEDED, stem=DIFFUSERS_STEM)
KL_VAE = Part(build=vae.build_vae, fields=vae.FIELDS, needed=vae.NEEDED, stem=DIFFUSERS_STEM)


def scheduler(*, corrected: bool = False) -> Scheduler:
  """Returns how the files of diffusers' schedulers are read, those of flow matching, too.

  Args:
    corrected: whether diffusers' pipeline corrects the offset of old files.
  """
  return Scheduler(
    read=scheduler_config.read_schedule,
    spacing=functools.partial(scheduler_config.read_spacing, corrected=corrected),
    fields=scheduler_config.FIELDS,
    needed=scheduler_config.NEEDED,
  )


def export_transformer_lora(
  params: Any,
  modules: Modules,  # noqa: ARG001
  dtype: Any,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Returns tensors of a transformer's LoRA by the names of diffusers, and no metadata."""
  return lora.export_peft_tensors(params, dtype, part="transformer"), {}


def tokenize(tokenizer: Any, texts: Sequence[str], negative: bool) -> np.ndarray:  # noqa: ARG001
  """Returns token ids [N, L], of negative prompts as of others."""
  return text.tokenize([tokenizer], texts)[0]


def clip_encoder(tokenizer: str, *, projects: bool = False) -> Part:
  """Returns CLIP's text encoder.

  Args:
    tokenizer: the folder of its tokenizer.
    projects: whether it has a projection of the pooled text, whatever its files say.
  """
  return Part(
    build=text.build_text_encoder,
    fields=text.FIELDS,
    needed=text.NEEDED,
    stem=TRANSFORMERS_STEM,
    read=lambda config, entry: text.text_config(config, entry, projects=projects),
    tokenizer=Tokenizer(
      folder=tokenizer,
      load=_load_clip_tokenizer,
      tokenize=tokenize,
    ),
  )


def _load_clip_tokenizer(path: Path, entry: Any, encoder: Any, denoiser: Any) -> Any:  # noqa: ARG001
  """Reads the tokenizer of a CLIP text encoder.

  Raises:
    UserError: it is missing, damaged, or another encoder's.
  """
  tokenizer = text.load_tokenizer(path, fast="CLIPTokenizerFast" in entry)
  config = encoder.config
  _check_vocabulary(path, tokenizer, config.vocab_size)
  if tokenizer.model_max_length > config.max_position_embeddings:
    raise UserError(
      f"{path} makes {tokenizer.model_max_length} tokens, but its text encoder takes "
      f"{config.max_position_embeddings}: they do not belong together"
    )
  return tokenizer


def piece_loader(
  kind: Literal["t5", "gemma"], *, max_length: int
) -> Callable[[Path, Any, Any, Any], Any]:
  """Returns `Tokenizer.load` for tokenizers of word pieces.

  Args:
    kind: 't5' or 'gemma'.
    max_length: number of tokens of a text.
  """

  def load(path: Path, entry: Any, encoder: Any, denoiser: Any) -> Any:  # noqa: ARG001
    tokenizer = piece_tokenizers.load_piece_tokenizer(path, kind, max_length=max_length)
    _check_vocabulary(path, tokenizer, encoder.config.vocab_size)
    return tokenizer

  return load


def _check_vocabulary(path: Path, tokenizer: Any, vocab_size: int) -> None:
  # More embeddings than tokens are fine: some programs round their number up.
  if len(tokenizer) > vocab_size:
    raise UserError(
      f"{path} has {len(tokenizer)} tokens, but its text encoder {vocab_size}: "
      "they do not belong together"
    )
