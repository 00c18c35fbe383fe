"""Tensor names of SD3 and Flux in single files, which ComfyUI reads, from and to diffusers'.

The names are those of the original code. It has queries, keys and values in one matrix, and its
last layers give (shift, scale) where diffusers' give (scale, shift). Text encoders and VAE are
not converted here.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxpref.errors import UserError, listed

Tensors = dict[str, np.ndarray]
PREFIX = "model.diffusion_model."  # of a single file's names

_BLOCK = re.compile(r"(?<=_blocks\.)\d+(?=\.)")


class Rule(NamedTuple):
  """One tensor of a single file, which may be several in diffusers.

  Attributes:
    original: its name, with {} for the index of a block.
    parts: diffusers' names of its parts, which are concatenated along the first axis.
    shares: relative sizes of the parts.
    swap: whether its halves are in the other order: never, always, or in the last block.
  """

  original: str
  parts: tuple[str, ...]
  shares: tuple[int, ...]
  swap: Literal["never", "always", "last"]


def _layers(
  names: Mapping[str, str | Sequence[str]],
  *,
  within: tuple[str, str] = ("", ""),
  swap: Literal["never", "always", "last"] = "never",
  shares: tuple[int, ...] = (),
) -> list[Rule]:
  """Makes rules for weights and biases of layers, by original names inside of `within`."""
  rules = []
  for (original, parts), leaf in itertools.product(names.items(), ("weight", "bias")):
    stems = (parts,) if isinstance(parts, str) else parts
    own = tuple(f"{within[1]}{stem}.{leaf}" for stem in stems)
    rules.append(Rule(f"{within[0]}{original}.{leaf}", own, shares or (1,) * len(own), swap))
  return rules


def _tensors(names: Mapping[str, str], *, within: tuple[str, str] = ("", "")) -> list[Rule]:
  """Makes rules for single tensors, by original names inside of `within`."""
  return [
    Rule(f"{within[0]}{original}", (f"{within[1]}{name}",), (1,), "never")
    for original, name in names.items()
  ]


_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_MODULATION = "adaLN_modulation.1"


def _sd3_rules() -> list[Rule]:
  image = ("joint_blocks.{}.x_block.", "transformer_blocks.{}.")
  text = ("joint_blocks.{}.context_block.", image[1])
  attention = lambda a, *names: [f"{a}.{name}" for name in names]  # noqa: E731
  return [
    *_tensors({"pos_embed": "pos_embed.pos_embed"}),
    *_layers(
      {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "context_embedder": "context_embedder",
        "final_layer.linear": "proj_out",
      }
    ),
    *_layers({f"final_layer.{_MODULATION}": "norm_out.linear"}, swap="always"),
    *_layers(
      {
        "attn.qkv": attention("attn", *_QKV),
        "attn.proj": "attn.to_out.0",
        "attn2.qkv": attention("attn2", *_QKV),
        "attn2.proj": "attn2.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
        _MODULATION: "norm1.linear",
      },
      within=image,
    ),
    *_tensors(
      {f"{a}.ln_{x}.weight": f"{a}.norm_{x}.weight" for a in ("attn", "attn2") for x in "qk"},
      within=image,
    ),
    *_layers(
      {
        "attn.qkv": attention("attn", *_ADDED),
        "attn.proj": "attn.to_add_out",
        "mlp.fc1": "ff_context.net.0.proj",
        "mlp.fc2": "ff_context.net.2",
      },
      within=text,
    ),
    *_layers({_MODULATION: "norm1_context.linear"}, within=text, swap="last"),
    *_tensors(
      {f"attn.ln_{x}.weight": f"attn.norm_added_{x}.weight" for x in "qk"}, within=text
    ),
  ]


def _flux_rules() -> list[Rule]:
  double = ("double_blocks.{}.", "transformer_blocks.{}.")
  single = ("single_blocks.{}.", "single_transformer_blocks.{}.")
  embedders = {"time_in": "timestep", "vector_in": "text", "guidance_in": "guidance"}
  rules = [
    *_layers(
      {
        f"{original}.{layer}_layer": f"time_text_embed.{name}_embedder.linear_{i}"
        for original, name in embedders.items()
        for i, layer in ((1, "in"), (2, "out"))
      }
    ),
    *_layers(
      {
        "txt_in": "context_embedder",
        "img_in": "x_embedder",
        "final_layer.linear": "proj_out",
      }
    ),
    *_layers({f"final_layer.{_MODULATION}": "norm_out.linear"}, swap="always"),
    *_layers({"modulation.lin": "norm.linear", "linear2": "proj_out"}, within=single),
    *_layers(
      {"linear1": [*(f"attn.{x}" for x in _QKV), "proj_mlp"]},
      within=single,
      shares=(1, 1, 1, 4),
    ),
    *_tensors(
      {
        "norm.query_norm.scale": "attn.norm_q.weight",
        "norm.key_norm.scale": "attn.norm_k.weight",
      },
      within=single,
    ),
  ]
  for stream, qkv, out, added, context in (
    ("img", _QKV, "to_out.0", "", ""),
    ("txt", _ADDED, "to_add_out", "added_", "_context"),
  ):
    rules += _layers(
      {
        f"{stream}_attn.qkv": [f"attn.{x}" for x in qkv],
        f"{stream}_attn.proj": f"attn.{out}",
        f"{stream}_mlp.0": f"ff{context}.net.0.proj",
        f"{stream}_mlp.2": f"ff{context}.net.2",
        f"{stream}_mod.lin": f"norm1{context}.linear",
      },
      within=double,
    )
    rules += _tensors(
      {
        f"{stream}_attn.norm.query_norm.scale": f"attn.norm_{added}q.weight",
        f"{stream}_attn.norm.key_norm.scale": f"attn.norm_{added}k.weight",
      },
      within=double,
    )
  return rules


SD3 = _sd3_rules()
FLUX = _flux_rules()


def to_original(tensors: Mapping[str, np.ndarray], rules: Iterable[Rule]) -> Tensors:
  """Renames a transformer's tensors to those of a single file.

  Args:
    tensors: by diffusers' names.
    rules: `SD3` or `FLUX`.

  Raises:
    UserError: a tensor does not have a name in a single file, or parts of one are missing.
  """
  places = {part: (rule, i) for rule in rules for i, part in enumerate(rule.parts)}
  found: dict[tuple[str, Rule, bool], dict[int, np.ndarray]] = {}
  last = _last_block(tensors)
  for name, tensor in tensors.items():
    pattern, block = _pattern(name)
    if pattern not in places:
      raise UserError(f"the transformer's {name} does not have a name in a single file")
    rule, i = places[pattern]
    key = PREFIX + rule.original.format(block), rule, _is_swapped(rule, block, last)
    found.setdefault(key, {})[i] = tensor
  if lacking := [name for (name, rule, _), of in found.items() if len(of) < len(rule.parts)]:
    raise UserError(f"the transformer lacks tensors for a single file's {listed(lacking)}")
  return {
    name: _swap_halves(of[0]) if swap else np.concatenate([of[i] for i in sorted(of)])
    for (name, _, swap), of in found.items()
  }


def from_original(tensors: Mapping[str, np.ndarray], rules: Iterable[Rule]) -> Tensors:
  """Renames the transformer's tensors of a single file to diffusers' names.

  Args:
    tensors: by the single file's names; those of other parts of a pipeline are left out.
    rules: `SD3` or `FLUX`.

  Raises:
    UserError: the transformer has a tensor that diffusers' lacks.
  """
  whole = any(name.startswith(PREFIX) for name in tensors)
  own = {
    n.removeprefix(PREFIX): x for n, x in tensors.items() if n.startswith(PREFIX) or not whole
  }
  places = {rule.original: rule for rule in rules}
  last, out = _last_block(own), {}
  for name, tensor in own.items():
    pattern, block = _pattern(name)
    if pattern not in places:
      raise UserError(f"{name} is not a tensor of the transformer's single file")
    rule = places[pattern]
    ours = _swap_halves(tensor) if _is_swapped(rule, block, last) else tensor
    cuts = len(tensor) // sum(rule.shares) * np.cumsum(rule.shares)[:-1]
    for part, piece in zip(rule.parts, np.split(ours, cuts), strict=True):
      out[part.format(block)] = piece
  return out


def _pattern(name: str) -> tuple[str, int]:
  """Returns a name with {} instead of its block's index, and the index, -1 without one."""
  match = _BLOCK.search(name)
  return (_BLOCK.sub("{}", name), int(match[0])) if match else (name, -1)


def _last_block(names: Iterable[str]) -> int:
  """Returns the highest index of a block of two streams."""
  joint = [name for name in names if not name.startswith("single")]
  return max((_pattern(name)[1] for name in joint), default=-1)


def _is_swapped(rule: Rule, block: int, last: int) -> bool:
  return rule.swap == "always" or (rule.swap == "last" and block == last)


def _swap_halves(tensor: np.ndarray) -> np.ndarray:
  return np.concatenate(np.split(tensor, 2)[::-1])
