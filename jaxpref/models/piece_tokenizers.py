"""The tokenizers of T5 and Gemma, which cut texts into sentencepiece's pieces.

They are read from `tokenizer.json`, without the library sentencepiece.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import GemmaTokenizerFast, T5TokenizerFast

from jaxpref.errors import UserError, first_line
from jaxpref.models import config_files, text

_KINDS: dict[str, tuple[Any, str, str]] = {  # class, kind of its model, sentencepiece's file
  "t5": (T5TokenizerFast, "Unigram", "spiece.model"),
  "gemma": (GemmaTokenizerFast, "BPE", "tokenizer.model"),
}


def load_piece_tokenizer(
  directory: Path, kind: Literal["t5", "gemma"], *, max_length: int
) -> Any:
  """Reads a tokenizer of T5, which ends a text with a token, or Gemma, which begins with one.

  `text.tokenize` then cuts and pads its texts to `max_length`, on the right.

  Args:
    directory: with `tokenizer.json` and perhaps `tokenizer_config.json`.
    kind: 't5' or 'gemma'.
    max_length: in tokens. diffusers' pipelines take 256 for SD3, 512 for Flux.1 dev, 256 for
      Flux.1 schnell and 300 for SANA; the files say other numbers or none.

  Raises:
    UserError: it is missing, damaged, or of another kind.
  """
  cls, model, spiece = _KINDS[kind]
  if not (file := directory / "tokenizer.json").exists():
    if (directory / spiece).exists():
      raise UserError(
        f"{directory} has only sentencepiece's {spiece}: make a tokenizer.json once, where "
        f"sentencepiece and protobuf are installed: transformers.{cls.__name__}"
        f".from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
      )
    raise UserError(f"{file} is missing")
  for path in sorted(directory.iterdir()):
    if not path.is_dir():
      config_files.check_regular(path)
  # With add_prefix_space, which published files of T5 set, transformers would read
  # sentencepiece's file again; tokenizer.json has that prefix.
  own = {"add_prefix_space": None} if kind == "t5" else {}
  try:
    tokenizer = cls.from_pretrained(
      str(directory), local_files_only=True, padding_side="right", **own
    )
    ids = tokenizer("a")["input_ids"]
  except Exception as error:  # the tokenizers library raises plain Exceptions
    raise UserError(
      f"{directory} does not hold a tokenizer of {kind}: {first_line(error)}"
    ) from error
  if (found := type(tokenizer.backend_tokenizer.model).__name__) != model:
    raise UserError(f"{file} is of kind {found}, but the tokenizer of {kind} is {model}")
  if tokenizer.pad_token is None:
    raise UserError(f"{directory}/tokenizer_config.json lacks pad_token")
  if kind == "t5" and ids[-1] != tokenizer.eos_token_id:
    raise UserError(f"{file} does not add {tokenizer.eos_token!r} to the end of a text")
  tokenizer.model_max_length = max_length
  return tokenizer


def tokenize_masked(
  tokenizer: Any, texts: Sequence[str], *, instruction: str = ""
) -> tuple[np.ndarray, np.ndarray]:
  """Tokenizes texts as SANA does, lower-cased, after an instruction to the language model.

  Args:
    tokenizer: of kind 'gemma'; its `model_max_length` is L.
    texts: N prompts.
    instruction: before each prompt, in its own case. The negative prompt has none.

  Returns:
    Token ids and the mask of tokens that are not padding, both int32 [N, n + L - 2], where n
    is the number of the instruction's tokens; [N, L] without an instruction. Of the hidden
    states and the mask, `gemma.keep_prompt` keeps L.
  """
  length = tokenizer.model_max_length
  if instruction:
    # Quietly: an instruction alone may be longer than a prompt.
    length += len(tokenizer(instruction, verbose=False)["input_ids"]) - 2
  whole = [instruction + text_.lower().strip() for text_ in text.shortened(texts)]
  fitted = tokenizer(whole, truncation=True, padding="max_length", max_length=length)
  ids, mask = fitted["input_ids"], fitted["attention_mask"]
  return np.asarray(ids, np.int32), np.asarray(mask, np.int32)
