"""CLIP text encoders and their tokenizers.

Token ids are the ones that diffusers computes if ftfy is installed: those of transformers'
`CLIPTokenizer`. It repairs a text with ftfy (curly quotes, HTML entities, ligatures, full-width
letters, mojibake), normalizes whitespace and lower-cases it before byte-pair encoding.
"""

import contextlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import ftfy  # noqa: F401  # without it CLIPTokenizer would clean texts differently
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers import models as bpe_models
from transformers import CLIPTextConfig, CLIPTokenizer, CLIPTokenizerFast
from transformers.models.clip.modeling_flax_clip import (
  FlaxCLIPTextModelWithProjectionModule,
  FlaxCLIPTextModule,
)

from jaxpref.errors import UserError, first_line, listed
from jaxpref.models import config_files

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's split before byte-pair encoding: contractions, words, single digits, other characters.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


_PROJECTED = "CLIPTextModelWithProjection"
# Known fields of a configuration; others cause a warning.
FIELDS = frozenset(CLIPTextConfig().to_dict())
FIELDS |= {"gradient_checkpointing", "torch_dtype", "use_cache"}
# Fields without which the defaults build another network than was trained.
NEEDED = (
  *("hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings"),
  *("num_attention_heads", "num_hidden_layers", "vocab_size"),
)


def text_config(config: Mapping[str, Any], entry: Any, *, projects: bool) -> dict[str, Any]:
  """Returns a text encoder's fields, also from the configuration of a whole CLIP model.

  As in diffusers, the index determines the class, not the file's own `architectures`.

  Args:
    config: the contents of `config.json`.
    entry: of the encoder in `model_index.json`.
    projects: whether it has a projection, whatever the index says.
  """
  inner, fields = config.get("text_config"), dict(config)
  if isinstance(inner, dict) and config.get("model_type") == "clip":
    fields = {**inner, "architectures": [_PROJECTED]} if _is_projected(config) else dict(inner)
  if projects:
    fields["architectures"] = [_PROJECTED]
  elif "CLIPTextModel" in entry:
    fields["architectures"] = ["CLIPTextModel"]
  return fields


def _is_projected(config: Mapping[str, Any]) -> bool:
  return _PROJECTED in (config.get("architectures") or ())


def build_text_encoder(config: Mapping[str, Any], *, dtype: Any) -> nn.Module:
  """Builds the text encoder of a `text_encoder/config.json`, without parameters.

  It has a projection of the pooled text if `architectures` says so, as in SDXL's second.
  """
  projected = _is_projected(config)
  module = FlaxCLIPTextModelWithProjectionModule if projected else FlaxCLIPTextModule
  return module(CLIPTextConfig(**config), dtype=dtype)


def init_text_encoder(encoder: nn.Module, key: jax.Array) -> Any:
  """Initializes random parameters."""
  ids = jnp.zeros((1, encoder.config.max_position_embeddings), jnp.int32)
  return encoder.init(key, ids, jnp.ones_like(ids), _positions(ids))["params"]


def abstract_params(encoder: Any) -> Any:
  """Returns the shapes of a frozen encoder's parameters.

  Kernels are in the dtype of the computation, to which layers would cast them, so that outputs
  are the same bit for bit. Embeddings, norms and biases stay float32: layers do not cast them.
  """
  shapes = jax.eval_shape(lambda key: init_text_encoder(encoder, key), jax.random.key(0))

  def stored(path, leaf):
    is_kernel = path[-1].key == "kernel"
    return jax.ShapeDtypeStruct(leaf.shape, encoder.dtype if is_kernel else leaf.dtype)

  return jax.tree_util.tree_map_with_path(stored, shapes)


def encode_text(encoder: Any, params: Any, ids: jax.Array, *, clip_skip: int = 0) -> jax.Array:
  """Computes the last hidden state [B, L, D] of token ids [B, L].

  As in Stable Diffusion, padding is not masked: it is encoded like any token.

  Args:
    encoder: the text encoder.
    params: its parameters.
    ids: token ids.
    clip_skip: number of last layers to skip, as diffusers counts; the final normalization is
      still applied.
  """
  if not clip_skip:
    return _apply(encoder, params, ids).last_hidden_state
  hidden = _apply(encoder, params, ids, output_hidden_states=True).hidden_states
  norm = nn.LayerNorm(epsilon=encoder.config.layer_norm_eps, dtype=encoder.dtype)
  weights = params["text_model"]["final_layer_norm"]
  normalized: Any = norm.apply({"params": weights}, hidden[-1 - clip_skip])
  return normalized


def encode_text_xl(
  encoders: Sequence[nn.Module],
  params: Sequence[Any],
  ids: Sequence[jax.Array],
  *,
  clip_skip: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Computes SDXL's conditioning of a text, from its two encoders (arXiv 2307.01952).

  Args:
    encoders: the first, and the second, which has a projection.
    params: parameters of each encoder.
    ids: token ids [B, L] of each encoder's tokenizer.
    clip_skip: number of layers to skip before the penultimate one; as in diffusers, the
      projected text is always that of all layers.

  Returns:
    The penultimate hidden states of both encoders, concatenated, without the final
    normalization, [B, L, D1 + D2]; and the projected text of the second encoder, [B, P].
  """
  hidden, out = _penultimate(encoders, params, ids, clip_skip)
  return hidden, out[1].text_embeds


def encode_text_pair(
  encoders: Sequence[nn.Module],
  params: Sequence[Any],
  ids: Sequence[jax.Array],
  *,
  clip_skip: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Computes SD3's conditioning of a text from its two CLIP encoders (arXiv 2403.03206).

  Args:
    encoders: both with a projection.
    params: parameters of each encoder.
    ids: token ids [B, L] of each encoder's tokenizer.
    clip_skip: as for `encode_text_xl`.

  Returns:
    The penultimate hidden states of both encoders, concatenated, without the final
    normalization, [B, L, D1 + D2]; and the projected texts of both, concatenated, [B, P1 + P2].
  """
  hidden, out = _penultimate(encoders, params, ids, clip_skip)
  return hidden, jnp.concatenate([o.text_embeds for o in out], axis=-1)


def join_texts(clip: jax.Array, t5: jax.Array) -> jax.Array:
  """Joins SD3's two texts along the tokens, CLIP's first.

  Args:
    clip: hidden states of `encode_text_pair`, [B, L1, D1]; zeros widen them to D2.
    t5: hidden states of T5, [B, L2, D2]; zeros where a pipeline is without T5.

  Returns:
    [B, L1 + L2, D2].
  """
  wide = jnp.pad(clip, ((0, 0), (0, 0), (0, t5.shape[-1] - clip.shape[-1])))
  return jnp.concatenate([wide, t5.astype(clip.dtype)], axis=1)


def encode_pooled(encoder: nn.Module, params: Any, ids: jax.Array) -> jax.Array:
  """Computes Flux.1's pooled text [B, D] of an encoder without a projection.

  It is the last hidden state, normalized, at the end token: the first token whose id is the
  configuration's `eos_token_id`. In files where that is 2, which is wrong, transformers takes
  the largest id of a text instead.
  """
  return _apply(encoder, params, ids).pooler_output


def _penultimate(
  encoders: Sequence[nn.Module], params: Sequence[Any], ids: Sequence[jax.Array], clip_skip: int
) -> tuple[jax.Array, list[Any]]:
  """Returns the encoders' penultimate hidden states, concatenated, and all their outputs."""
  out = [
    _apply(e, p, i, output_hidden_states=True)
    for e, p, i in zip(encoders, params, ids, strict=True)
  ]
  return jnp.concatenate([o.hidden_states[-2 - clip_skip] for o in out], axis=-1), out


def _apply(encoder: nn.Module, params: Any, ids: jax.Array, **kwargs) -> Any:
  mask = jnp.ones_like(ids)
  return encoder.apply({"params": params}, ids, mask, _positions(ids), **kwargs)


def _positions(ids: jax.Array) -> jax.Array:
  return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)


# Characters of a text that are tokenized. The tokens that are kept come from far fewer, and the
# byte-pair encoding of an endless word would take minutes.
_LONGEST = 20_000


def shortened(texts: Iterable[str]) -> list[str]:
  """Cuts texts to a length that is tokenized in bounded time, far above any tokenizer's."""
  return [text[:_LONGEST] for text in texts]


def tokenize(tokenizers: Sequence[Any], texts: Sequence[str]) -> list[np.ndarray]:
  """Tokenizes texts with each tokenizer: int32 [B, L], cut and padded to its length."""
  texts = shortened(texts)
  ids = []
  for tokenizer in tokenizers:
    length = tokenizer.model_max_length
    fitted = tokenizer(texts, truncation=True, padding="max_length", max_length=length)
    ids.append(np.asarray(fitted["input_ids"], np.int32))
  return ids


def warn_of_cut(tokenizers: Sequence[Any], texts: Sequence[str], what: str = "prompts") -> None:
  """Warns, once for all texts, how many distinct ones are longer than a tokenizer's length.

  Args:
    tokenizers: of a pipeline.
    texts: any texts.
    what: a noun for the texts, for the message.
  """
  unique = list(dict.fromkeys(shortened(texts)))
  cut = np.zeros(len(unique), bool)
  # transformers would warn once per text.
  with _quiet("transformers.tokenization_utils_base"):
    for tokenizer in tokenizers:
      length = tokenizer.model_max_length
      full = tokenizer(unique, truncation=False, padding=False)["input_ids"]
      cut |= np.array([len(row) > length for row in full])
  if cut.any():
    logging.warning("%d of %d %s cut to %d tokens", cut.sum(), len(unique), what, length)


@contextlib.contextmanager
def _quiet(name: str):
  logger = logging.getLogger(name)
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)


def load_tokenizer(directory: Path, *, fast: bool = False) -> Any:
  """Reads the CLIP tokenizer in `directory`.

  Args:
    directory: with `vocab.json` and `merges.txt`, or with `tokenizer.json`.
    fast: whether the pipeline's index names `CLIPTokenizerFast`, which diffusers then uses; it
      does not repair texts. That class is always used if there is only a `tokenizer.json`.

  Raises:
    UserError: it is missing, damaged, or not CLIP's.
  """
  if directory.is_dir():
    for file in sorted(directory.iterdir()):
      if not file.is_dir():
        config_files.check_regular(file)
  fast = fast or ((directory / "tokenizer.json").exists() and not _has_vocabulary(directory))
  try:
    if not fast:
      # For a damaged or missing vocabulary, the library's message only says "not a path".
      json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
      (directory / "merges.txt").read_text(encoding="utf-8")
    kind = CLIPTokenizerFast if fast else CLIPTokenizer
    tokenizer = kind.from_pretrained(str(directory), local_files_only=True)
  except Exception as error:  # the tokenizers library raises plain Exceptions
    raise UserError(
      f"{directory} does not hold a CLIP tokenizer: {first_line(error)}"
    ) from error
  _check_merges(tokenizer, directory)
  length = tokenizer.model_max_length
  if not isinstance(length, int) or not 2 < length < 10_000:  # larger: "not stated"
    raise UserError(
      f"{directory}/tokenizer_config.json: model_max_length must be between 3 and 9,999 (got "
      f"{length})"
    )
  if tokenizer.pad_token is None:
    raise UserError(f"{directory}/tokenizer_config.json lacks pad_token")
  return tokenizer


def _has_vocabulary(directory: Path) -> bool:
  return (directory / "vocab.json").exists() and (directory / "merges.txt").exists()


def _check_merges(tokenizer: Any, directory: Path) -> None:
  """Refuses merges that do not belong to the vocabulary, which would give other token ids.

  Every token must be a byte, with or without the end of a word, a special token, or the result
  of a merge.
  """
  if isinstance(tokenizer, CLIPTokenizer):
    vocabulary, merges = tokenizer.encoder, list(tokenizer.bpe_ranks)
  else:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary, merges = model["vocab"], [_pair_of(merge) for merge in model["merges"]]
  if odd := [" ".join(m) for m in merges if len(m) != 2 or "".join(m) not in vocabulary]:
    raise UserError(
      f"{directory} does not hold a CLIP tokenizer: the results of {len(odd)} of {len(merges)} "
      f"merges are missing in the vocabulary: {listed([config_files.brief(m) for m in odd])}"
    )
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  known = {*alphabet, *(a + "</w>" for a in alphabet), *map("".join, merges)}
  if not merges and len(vocabulary) > len(known) + 2:
    raise UserError(f"{directory} has words but no merges: its merges.txt is empty")
  known |= {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), START, END}
  if unmade := [t for t in vocabulary if t not in known]:
    raise UserError(
      f"{directory}: {len(unmade)} of {len(vocabulary)} tokens are not the result of a merge "
      f"({listed([config_files.brief(t) for t in unmade])}): vocabulary and merges do not "
      "belong together, or merges.txt is cut"
    )


def _pair_of(merge: Any) -> tuple[str, ...]:
  """Splits a merge of `tokenizer.json`; older versions of the library wrote one string."""
  return tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)


def train_tokenizer(
  texts: Iterable[str], directory: Path, *, vocab_size: int, max_length: int
) -> None:
  """Trains a byte-pair encoding on `texts` and writes it in CLIP's format.

  Args:
    texts: texts that the vocabulary is optimized for; any other text can still be encoded.
    directory: gets vocab.json, merges.txt and tokenizer_config.json.
    vocab_size: at least 514: the bytes with and without the end of a word, and START and END.
    max_length: in tokens, with START and END.
  """
  bpe = Tokenizer(bpe_models.BPE(end_of_word_suffix="</w>"))
  bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size - 256 - 2,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    end_of_word_suffix="</w>",
    show_progress=False,
  )
  bpe.train_from_iterator(texts, trainer)
  merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
  tokens = [*dict.fromkeys(tokens), START, END]
  directory.mkdir(parents=True, exist_ok=True)
  (directory / "vocab.json").write_text(
    json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False), "utf-8"
  )
  lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
  (directory / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
  settings = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": max_length,
    "bos_token": START,
    "eos_token": END,
    "pad_token": END,
    "unk_token": END,
    "do_lower_case": True,
    "errors": "replace",
  }
  (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
