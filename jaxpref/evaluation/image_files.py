"""Images generated into files: each PNG holds its settings, so that a job can be resumed."""

import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from jaxpref.errors import UserError
from jaxpref.runtime.workdir import parse_json

# Names of the solvers in the text that A1111's web UI reads.
_SAMPLERS = {"dpm_solver": "DPM++ 2M", "ddim": "DDIM", "ddpm": "DDPM"}
_SETTINGS, _A1111 = "jaxpref", "parameters"  # keys of the PNG's texts
_BATCHES_ENCODED = 64  # whose prompts are encoded at once
_LATER = {"clip_skip": 0}  # settings that older images lack, and their values


class ImageTask(NamedTuple):
  """An image to generate.

  Attributes:
    file: path of the PNG.
    settings: everything that its pixels depend on.
    image: the image to improve, uint8 [H, W, 3], or None.
  """

  file: Path
  settings: dict[str, Any]
  image: Any = None


def shared_settings(flags: Any, pipeline: Any, model: str) -> dict[str, Any]:
  """Returns the settings that all images of a command have, but for the prompt and the seed.

  Args:
    flags: negative, guidance, steps, solver, order, size, decode and dtype.
    pipeline: the loaded model.
    model: its name, as it was given.
  """
  height, width = flags.size or (pipeline.image_size, pipeline.image_size)
  return {
    "model": model,
    "weights": pipeline.digest,
    "negative": flags.negative,
    "guidance": flags.guidance,
    "steps": flags.steps,
    "solver": flags.solver,
    "order": flags.order,
    "size": [height, width],
    "decode": flags.decode,
    "dtype": flags.dtype,
    "clip_skip": pipeline.clip_skip,
  }


def generate_images(
  pipeline: Any,
  mesh: Any,
  sampler: Callable,
  missing: Sequence[ImageTask],
  *,
  batch_size: int,
  bar: Any,
) -> list[ImageTask]:
  """Generates images and writes each to its file.

  Args:
    pipeline: the model with its parameters.
    mesh: devices that share a batch.
    sampler: from `make_sampler`.
    missing: the images; their settings differ in prompt and seed only.
    batch_size: images at a time, rounded up to a multiple of the device count.
    bar: a progress bar that counts images.

  Returns:
    The images with non-finite pixels, which are not written.

  Raises:
    UserError: a file cannot be written.
  """
  from jaxpref import sharding  # noqa: PLC0415  # JAX takes seconds
  from jaxpref.data import encode  # noqa: PLC0415
  from jaxpref.evaluation import sampling  # noqa: PLC0415
  from jaxpref.runtime import workdir  # noqa: PLC0415

  shared = missing[0].settings
  workdir.make_writable(missing[0].file.parent)  # before anything is generated
  step = sharding.round_up(batch_size, mesh)
  left_out: list[ImageTask] = []
  texts: dict[str, int] = {}
  encoded: Any = {}
  for start in range(0, len(missing), step):
    part = missing[start : start + step]
    prompts = [task.settings["prompt"] for task in part]
    if not texts.keys() >= set(prompts):
      # Many batches' prompts at once, each once: the encoders are compiled for each call.
      ahead = missing[start : start + _BATCHES_ENCODED * step]
      found = dict.fromkeys(task.settings["prompt"] for task in ahead)
      texts = {prompt: i for i, prompt in enumerate(found)}
      encoded = encode.encode_prompts(pipeline, mesh, list(texts), size=tuple(shared["size"]))
    places = [texts[prompt] for prompt in prompts]
    cond = {name: array[places] for name, array in encoded.items()}
    if "image_guidance" in shared:
      inputs = [task.image for task in part]
      cond = {**cond, "image": encode.encode_images(pipeline, mesh, inputs)}
    seeds = [task.settings["seed"] for task in part]
    finite: Sequence[bool] = [True] * len(part)
    try:
      images = sampler(pipeline.denoiser_params, cond, seeds)
    except sampling.NonFiniteError as error:
      images, finite = error.images, error.finite.tolist()
    for image, good, task in zip(images, finite, part, strict=True):
      if good:
        workdir.write_bytes(task.file, to_png(image, task.settings))
      else:
        left_out.append(task)
    bar.update(len(part))
  return left_out


def make_sampler(
  pipeline: Any, mesh: Any, settings: Mapping[str, Any], batch_size: int
) -> Callable:
  """Makes the sampler of a task's settings, which does not hold the denoiser's parameters.

  Args:
    pipeline: the model.
    mesh: devices that share a batch.
    settings: of an image; all but its prompt and seed count.
    batch_size: images at a time.

  Raises:
    UserError: a setting does not suit the model.
  """
  from jaxpref.evaluation import sampling  # noqa: PLC0415

  return sampling.make_generator(
    dataclasses.replace(pipeline, params=pipeline.other_params),
    mesh,
    num_steps=settings["steps"],
    guidance=settings["guidance"],
    batch_size=batch_size,
    solver=settings["solver"],
    order=settings["order"],
    size=tuple(settings["size"]),
    negative=settings["negative"],
    decode=settings["decode"],
    image_guidance=settings.get("image_guidance"),
  )


def is_generated(file: Path, settings: Mapping[str, Any]) -> bool:
  """Returns whether the file is the image of these settings.

  Raises:
    UserError: the file is something else, which must not be overwritten.
  """
  if not file.exists():
    return False
  foreign = f"{file} is not an image of this program: choose another --out"
  if not file.is_file():  # reading a pipe would wait for a writer
    raise UserError(foreign)
  try:
    with Image.open(file) as image:
      found = dict(parse_json(image.info[_SETTINGS].encode()))
  except (
    *(OSError, ValueError, KeyError, TypeError, AttributeError),
    *(UnidentifiedImageError, Image.DecompressionBombError),
  ) as error:
    raise UserError(foreign) from error
  for name in settings.keys() - {"model"}:  # its path may change; its weights are compared
    if found.get(name, _LATER.get(name)) != settings[name]:
      raise UserError(
        f"{file} has other settings: {name} was {found.get(name)!r}, now {settings[name]!r}; "
        "choose another --out"
      )
  return True


def to_png(image: Any, settings: Mapping[str, Any]) -> bytes:
  """Encodes a PNG with its settings, as JSON and in the format of A1111's web UI."""
  texts = PngImagePlugin.PngInfo()
  texts.add_itxt(_SETTINGS, json.dumps(settings, ensure_ascii=False))
  height, width = settings["size"]
  lines = [settings["prompt"]]
  if settings["negative"]:
    lines.append(f"Negative prompt: {settings['negative']}")
  lines.append(
    f"Steps: {settings['steps']}, Sampler: {_SAMPLERS[settings['solver']]}, "
    # There, a scale below 1 mixes in the image without a prompt; here it is the prompt's own.
    f"CFG scale: {max(settings['guidance'], 1):g}, Seed: {settings['seed']}, "
    f"Size: {width}x{height}, Model: {Path(settings['model']).name}"
  )
  texts.add_itxt(_A1111, "\n".join(lines))
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG", pnginfo=texts)
  return buffer.getvalue()
