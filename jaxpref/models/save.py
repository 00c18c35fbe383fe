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
from jaxpref.models import convert, single_file, weights
from jaxpref.runtime import workdir

# Components that do not influence images; the written index has null entries for them.
_LEFT_OUT = ("feature_extractor", "image_encoder", "safety_checker")
# The index for a pipeline that was not read from files.
_INDEX = {
  "_class_name": "StableDiffusionPipeline",
  "_diffusers_version": "0.39.0",
  "feature_extractor": [None, None],
  "requires_safety_checker": False,
  "safety_checker": [None, None],
  "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
  "text_encoder": ["transformers", "CLIPTextModel"],
  "tokenizer": ["transformers", "CLIPTokenizer"],
  "unet": ["diffusers", "UNet2DConditionModel"],
  "vae": ["diffusers", "AutoencoderKL"],
}
_INDEX_XL = {
  **{k: v for k, v in _INDEX.items() if "safety" not in k},
  "_class_name": "StableDiffusionXLPipeline",
  "force_zeros_for_empty_prompt": True,
  "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
  "tokenizer_2": ["transformers", "CLIPTokenizer"],
}


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
    configs: one for each part of `params`, 'scheduler', and perhaps 'model_index'.
    tokenizers_from: the directory with `tokenizer/`, and `tokenizer_2/` for SDXL, to copy.
    dtype: of the weights on disk.

  Raises:
    UserError: a weight is too large for `dtype`, or a file cannot be written.
  """
  workdir.make_writable(target.parent)
  work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
  try:
    for part, tree in params.items():
      (work / part).mkdir()
      _write_json(work / part / "config.json", configs[part])
      tensors = convert.export_tensors(tree, dtype)
      file = work / part / f"{weights.stem_of(part)}.safetensors"
      _save_file(tensors, file)
      tokenizer = part.replace("text_encoder", "tokenizer")
      if tokenizer != part:
        shutil.copytree(tokenizers_from / tokenizer, work / tokenizer)
    (work / "scheduler").mkdir()
    _write_json(work / "scheduler" / "scheduler_config.json", configs["scheduler"])
    xl = "text_encoder_2" in params
    index = dict(configs.get("model_index", _INDEX_XL if xl else _INDEX))
    left_out: dict[str, Any] = {p: [None, None] for p in _LEFT_OUT if p in index}
    if "safety_checker" in index:
      left_out["requires_safety_checker"] = False
    _write_json(work / "model_index.json", index | left_out)
    work.chmod(0o755)
    replace_directory(work, target)
  except BaseException:
    shutil.rmtree(work, ignore_errors=True)
    raise


def save_single_file(
  target: Path,
  params: Mapping[str, Any],
  *,
  modules: Mapping[str, Any],
  scheduler: Mapping[str, Any],
  dtype: Any = np.float16,
) -> None:
  """Writes a pipeline's weights as one file, by the names of the original code, atomically.

  Args:
    target: the file.
    params: parameter trees by part.
    modules: modules by part.
    scheduler: the scheduler's configuration.
    dtype: of the weights on disk.

  Raises:
    UserError: a weight is too large for `dtype`, or the file cannot be written.
  """
  tensors = {part: convert.export_tensors(tree, dtype) for part, tree in params.items()}
  save_tensors(target, single_file.to_single_file(tensors, modules, scheduler))


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
  try:
    save_file(dict(tensors), file, metadata={"format": "pt", **(metadata or {})})
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
