"""Writing of pipelines for other programs, without PyTorch. Writes are atomic."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxpref.errors import UserError
from jaxpref.models import families, torch_layout
from jaxpref.models.pipeline import Pipeline
from jaxpref.runtime import workdir

# Components that do not influence images; the written index has null entries for them.
_LEFT_OUT = ("feature_extractor", "image_encoder", "safety_checker")


def save_pipeline(
  target: Path,
  params: Mapping[str, Any],
  *,
  configs: Mapping[str, Mapping[str, Any]],
  tokenizers_from: Path,
  dtype: Any = np.float16,
) -> None:
  """Writes a pipeline that diffusers loads, atomically.

  Args:
    target: directory; an existing one is replaced once the new one is complete.
    params: parameter trees by part.
    configs: one for each part of `params`, 'scheduler', and perhaps 'model_index'; without it
      the family is the one that has these parts.
    tokenizers_from: the directory with the tokenizers' folders, to copy.
    dtype: of the weights on disk.

  Raises:
    UserError: a weight is too large for `dtype`, or a file cannot be written.
  """
  family = families.of_configs(configs)
  workdir.make_writable(target.parent)
  work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
  try:
    for part, tree in params.items():
      (work / part).mkdir()
      _write_json(work / part / "config.json", configs[part])
      tensors = torch_layout.export_tensors(tree, dtype)
      file = work / part / f"{family.parts[part].stem}.safetensors"
      _save_file(tensors, file)
      if tokenizer := family.parts[part].tokenizer:
        shutil.copytree(tokenizers_from / tokenizer.folder, work / tokenizer.folder)
    (work / "scheduler").mkdir()
    _write_json(work / "scheduler" / "scheduler_config.json", configs["scheduler"])
    index = dict(configs.get("model_index", family.index))
    for part in family.parts.keys() - params.keys():  # one that this pipeline does without
      folders = [tokenizer.folder for tokenizer in family.tokenizers([part]).values()]
      index |= {name: [None, None] for name in (part, *folders) if name in index}
    left_out: dict[str, Any] = {p: [None, None] for p in _LEFT_OUT if p in index}
    if "safety_checker" in index:
      left_out["requires_safety_checker"] = False
    _write_json(work / "model_index.json", index | left_out)
    work.chmod(0o755)
    replace_directory(work, target)
  except BaseException:
    shutil.rmtree(work, ignore_errors=True)
    raise


def save_single_file(target: Path, pipeline: Pipeline, *, dtype: Any = np.float16) -> None:
  """Writes a pipeline's weights as one file, by the names of the original code, atomically.

  Args:
    target: the file.
    pipeline: with all parameters.
    dtype: of the weights on disk.

  Raises:
    UserError: the family does not have such names, a weight is too large for `dtype`, or the
      file cannot be written.
  """
  family = pipeline.family
  if family.to_single_file is None:
    raise UserError(f"{family.name} cannot be written as a single file: write a directory")
  tensors = {
    part: torch_layout.export_tensors(tree, dtype) for part, tree in pipeline.params.items()
  }
  scheduler = pipeline.configs["scheduler"]
  save_tensors(target, family.to_single_file(tensors, pipeline.modules, scheduler))


def save_tensors(
  target: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
  """Writes a safetensors file with `metadata` in its header, atomically.

  Raises:
    UserError: it cannot be written.
  """
  workdir.make_writable(target.parent)
  work = target.with_name(f".{target.name}.tmp")
  try:
    _save_file(tensors, work, metadata)
    work.replace(target)
  finally:
    work.unlink(missing_ok=True)


def _save_file(
  tensors: Mapping[str, np.ndarray], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
  # safetensors would write the memory of a transposed view in its own order.
  plain = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
  try:
    save_file(plain, file, metadata={"format": "pt", **(metadata or {})})
  except SafetensorError as error:  # it wraps the operating system's error
    reason = str(error).removeprefix("Error while serializing: ").removeprefix("I/O error: ")
    raise UserError(f"cannot write to {file.parent}: {reason}") from error
  file.chmod(0o644)  # safetensors makes its files readable by their owner only


def replace_directory(new: Path, target: Path) -> None:
  """Replaces `target` by `new`; the old directory is kept until the new one is in place."""
  old = target.with_name(f".{target.name}-old")
  shutil.rmtree(old, ignore_errors=True)
  if target.exists():
    target.rename(old)
  new.replace(target)
  shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
