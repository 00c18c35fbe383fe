"""Conversion of published scorers: `python -m jaxpref.scorers.convert NAME FILE [--out=DIR]`.

Reads a pickle with PyTorch, which must be installed, without running what is in it; or a
safetensors file by open_clip's names. Writes `model.safetensors` and `config.json`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxpref.errors import UserError, first_line
from jaxpref.runtime import cli
from jaxpref.runtime.paths import user_path
from jaxpref.scorers import aesthetic, clip, hpsv2, imagereward, pickscore
from jaxpref.scorers.base import Published

_COSINES = (clip.H14, clip.L14, hpsv2.V2_0, hpsv2.V2_1, pickscore.V1)
COSINES = {scorer.published.name: scorer for scorer in _COSINES}
OTHERS = {p.name: p for p in (aesthetic.V1, aesthetic.V2, imagereward.V1)}


def main(argv: list[str]) -> int:
  """Converts a file as the flags say; returns the exit status."""
  return cli.exit_status(_run, argv, resumable=False)


def _parser() -> cli.Parser:
  parser = cli.Parser("Turns a scorer's published weights into safetensors.")
  parser.add_argument("name", metavar="NAME", help=", ".join([*COSINES, *OTHERS]))
  parser.add_argument("file", metavar="FILE", type=Path, help="the published file")
  parser.add_argument(
    "--out", type=Path, help="a directory; default: where scorers look for their weights"
  )
  return parser


def _run(argv: list[str]) -> None:
  flags = _parser().parse_args(argv)
  if (name := flags.name) not in COSINES | OTHERS:
    known = ", ".join([*COSINES, *OTHERS])
    raise UserError(f"unknown scorer {name!r}: known are {known}")
  file = user_path(flags.file)
  if not file.is_file():
    raise UserError(f"{file} is missing or not a file")
  # Late, so that errors on the command line do not wait for JAX.
  from jaxpref.models import save, torch_layout  # noqa: PLC0415
  from jaxpref.runtime import workdir  # noqa: PLC0415
  from jaxpref.scorers.base import store  # noqa: PLC0415

  out = user_path(flags.out) if flags.out else store.directory_of(name)
  target = out / "model.safetensors"
  if target.exists():
    raise UserError(f"{target} exists: choose another --out, or delete it")
  published = COSINES[name].published if name in COSINES else OTHERS[name]
  sha256 = _sha256(file, published)
  abstract, config, rename = _expected(name)
  read = _read_safetensors if file.suffix == ".safetensors" else read_pickle
  tensors = rename(read(file))
  shapes = {tensor: tuple(array.shape) for tensor, array in tensors.items()}
  torch_layout.check_tensors(shapes, abstract, where=str(file))
  if config:
    data = json.dumps(config, indent=2, sort_keys=True) + "\n"
    workdir.write_bytes(out / "config.json", data.encode())
  about = {"scorer": name, "source": file.name, "sha256": sha256}
  save.save_tensors(target, tensors, about)
  print(f"the weights of {name} are in {target}\nsha256 of {file.name}: {sha256}")


def _expected(name: str) -> tuple[Any, Any, Callable[[Mapping[str, Any]], Mapping[str, Any]]]:
  """Returns a scorer's shapes, its configuration (or None), and a function that renames."""
  import numpy as np  # noqa: PLC0415

  from jaxpref.models import blip, clip_towers, open_clip_names  # noqa: PLC0415
  from jaxpref.scorers.base import aesthetic_scores  # noqa: PLC0415

  def without(unused: Callable[[str], bool]):
    return lambda tensors: {n: array for n, array in tensors.items() if not unused(n)}

  if name in COSINES:
    config = getattr(clip_towers, COSINES[name].towers)
    module = clip_towers.build_clip(config, dtype=np.float32)

    def rename(tensors):
      if open_clip_names.is_open_clip(tensors):
        return open_clip_names.to_transformers(tensors)
      return without(lambda n: n.endswith("position_ids"))(tensors)

    return clip_towers.abstract_clip(module), config, rename
  if name == imagereward.V1.name:
    reward = blip.build_image_reward(blip.IMAGE_REWARD, dtype=np.float32)
    unused = without(lambda n: n.startswith(blip.UNUSED))
    return blip.abstract_params(reward), blip.IMAGE_REWARD, unused
  width = clip_towers.L14["projection_dim"]
  return aesthetic_scores.abstract_head(name, width), None, lambda tensors: tensors


def _sha256(file: Path, published: Published) -> str:
  """Returns a file's sha256.

  Raises:
    UserError: it is a pickle, and not the published one.
  """
  with file.open("rb") as stream:
    found = hashlib.file_digest(stream, "sha256").hexdigest()
  if published.sha256 and file.suffix != ".safetensors" and found != published.sha256:
    raise UserError(
      f"{file} is not {published.file} of {published.where}: its sha256 is {found}, the "
      f"published file's {published.sha256}"
    )
  return found


def _read_safetensors(file: Path) -> dict[str, Any]:
  from jaxpref.models import weights  # noqa: PLC0415

  return {name: tensor.read() for name, tensor in weights.open_file(file).items()}


def read_pickle(file: Path) -> dict[str, Any]:
  """Reads the tensors of a pickled state dictionary as numpy arrays, without running it.

  A dictionary under 'state_dict' counts, as in training checkpoints.

  Raises:
    UserError: PyTorch is missing, or the file holds anything else.
  """
  try:
    import torch  # noqa: PLC0415
  except ImportError as error:
    raise UserError(
      f"{file} is pickled, and reading it needs PyTorch: run this once where it is installed "
      "(pip install torch)"
    ) from error
  import pickle  # noqa: PLC0415, TID251  # only its error; torch reads with weights_only

  try:
    found = torch.load(file, map_location="cpu", weights_only=True)
  except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
    raise UserError(
      f"{file} cannot be read as tensors only: it is damaged, or holds objects that could run "
      f"programs: {first_line(error)}"
    ) from error
  if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
    found = found["state_dict"]
  values = found.values() if isinstance(found, dict) else [None]
  if not all(isinstance(value, torch.Tensor) for value in values):
    raise UserError(f"{file} does not hold a dictionary of tensors by name")
  narrow = torch.bfloat16  # numpy does not have it
  return {n: (t.float() if t.dtype == narrow else t).numpy() for n, t in found.items()}


if __name__ == "__main__":
  cli.run(main)
