"""`python -m jaxpref.generate --model=DIR --prompts="a prompt" --out=DIR`: pictures.

Of any pipeline in diffusers' layout, of a hub id, or of a run's workdir. With
`--improver=DIR --images=DIR` it draws the better versions of a folder of pictures. A picture
depends on its prompt, its seed and the settings alone, not on the batch or the devices; each
is a PNG that carries them. Started again, the same command draws what is missing. An image
whose pixels are not finite is not written, and the exit status says so.
"""

import argparse
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from jaxpref.data import prompt_files as prompt_files_lib
from jaxpref.errors import DivergedError, UserError, count
from jaxpref.paths import user_path
from jaxpref.runtime import cli
from jaxpref.runtime.workdir import parse_json

SOLVERS = {"dpm_solver": "DPM++ 2M", "ddim": "DDIM", "ddpm": "DDPM"}
_SETTINGS, _A1111 = "jaxpref", "parameters"  # the PNG's texts
_LATER = {"clip_skip": 0}  # settings that older images do not state, and what they were


def main(argv: list[str]) -> int:
  """Draws as the flags say; returns the exit status."""
  return cli.exit_status(_run, argv)


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser("Draws pictures of a pipeline, or of what a run has made of one.")
  add = parser.add_argument
  add("--model", help="pipeline directory, hub id, 'shapes', or a run's workdir")
  add("--improver", metavar="MODEL", help="the same, of --config=improver; needs --images")
  add(
    "--images",
    metavar="DIR",
    help="pictures to improve, scaled and cropped to the model's size",
  )
  add(
    "--prompts",
    help="a text file with a prompt a line, or a prompt; with --images one for all of them, "
    "instead of the captions beside them",
  )
  add("--out", required=True, type=Path, help="directory for <prompt or image>-<number>.png")
  add("--images-per-prompt", type=_count, default=1, metavar="N")
  add("--seed", type=int, default=0, help="of the first picture; each next one's is one more")
  add(
    "--negative", default="", help="a prompt to be guided away from; needs --guidance above 1"
  )
  add(
    "--guidance",
    type=float,
    help="classifier-free guidance scale; at most 1: none, only the prompt's prediction, "
    "as Turbo models want it (0 and 1 give the same); default: the scale that a run was "
    "evaluated with, else 7.5, improvers 3.5; of an improver the prompt's weight in its "
    "formula, where 0 leaves the prompt out",
  )
  add("--image-guidance", type=float, help="of an improver, to its picture; its run's, or 3")
  add("--steps", type=_count, default=30, help="of the solver")
  add("--solver", choices=tuple(SOLVERS), default="dpm_solver")
  add("--order", type=int, choices=(1, 2, 3), default=2, help="of the DPM-Solver")
  add(
    "--size",
    type=_size,
    metavar="WxH",
    help="width x height in pixels, as the PNG's text states it, or one number for both; "
    "default: what the model was trained for",
  )
  add("--batch-size", type=_count, default=4, help="pictures at once")
  add("--decode", choices=("whole", "sliced", "tiled"), default="whole", help="saves memory")
  add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
  add("--variant", default="", help="of the pipeline's weights, such as fp16")
  add("--unet", default="", metavar="DIR", help="another UNet: a directory or hub id")
  add("--vae", default="", metavar="DIR", help="another VAE: a directory or hub id")
  add(
    "--clip-skip",
    type=int,
    default=0,
    metavar="N",
    help="last layers of the text encoder to leave out for prompts, as diffusers counts",
  )
  parser.add_run_flags()
  return parser


def _count(text: str) -> int:
  if (number := int(text)) < 1:
    raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
  return number


def _size(text: str) -> tuple[int, int]:
  """Height and width of a text that states the width first."""
  match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
  if match is None:
    raise argparse.ArgumentTypeError(f"must be like 512 or 512x768, got {text}")
  return int(match[2] or match[1]), int(match[1])


class Picture(NamedTuple):
  """One to be drawn.

  Attributes:
    file: of the PNG.
    settings: all that it depends on.
    image: uint8 [H, W, 3], what is to be improved, or None.
  """

  file: Path
  settings: dict[str, Any]
  image: Any = None


def _run(argv: list[str]) -> None:
  flags = _parser().parse_args(argv)
  _check(flags)
  out = user_path(flags.out)
  # Late: errors on the command line should not wait for JAX.
  import jax.numpy as jnp  # noqa: PLC0415

  from jaxpref import sharding  # noqa: PLC0415
  from jaxpref.data import encode  # noqa: PLC0415
  from jaxpref.evaluation import sampling  # noqa: PLC0415
  from jaxpref.models import hub, text  # noqa: PLC0415
  from jaxpref.runtime import jax_setup, progress, workdir  # noqa: PLC0415
  from jaxpref.training import load_run  # noqa: PLC0415

  jax_setup.cache_programs()
  mesh = sharding.make_mesh()
  option, name = ("--improver", flags.improver) if flags.improver else ("--model", flags.model)
  try:
    pipeline = load_run.load(
      name,
      ema=flags.ema,
      step=flags.step,
      dtype=jnp.dtype(flags.dtype),
      mesh=mesh,
      variant=flags.variant,
      unet=flags.unet,
      vae=flags.vae,
      clip_skip=flags.clip_skip,
    )
  except UserError as error:
    raise UserError(f"{option}: {error}") from error
  if pipeline.is_improver != bool(flags.improver):
    what = "no improver" if flags.improver else "an improver: --improver takes it, and --images"
    raise UserError(f"{name} is {what}")
  # As in the run's evaluation: its scales, and what the model was told of good pictures.
  if flags.guidance is None:
    usual = 2.0 if flags.model in hub.BUNDLED else 7.5
    flags.guidance = (
      load_run.setting(name, "improve", "text_guidance", 3.5)
      if flags.improver
      else load_run.setting(name, "evaluate", "guidance", usual)
    )
  if flags.image_guidance is None:
    flags.image_guidance = load_run.setting(name, "improve", "image_guidance", 3.0)
  prefix = load_run.prompt_prefix(name)
  wanted = _pictures(flags, out, pipeline, prefix)
  of_images = _left_out(flags, len(wanted) // flags.images_per_prompt)
  missing = [picture for picture in wanted if not is_drawn(picture.file, picture.settings)]
  if not missing:
    print(f"{count(len(wanted), 'picture')} in {out}, 0 of them new{of_images}")
    return
  text.warn_of_cut(pipeline.tokenizers, [p.settings["prompt"] for p in wanted])
  generator = sampling.make_generator(
    pipeline,
    mesh,
    num_steps=flags.steps,
    guidance=flags.guidance,
    batch_size=min(flags.batch_size, len(wanted)),
    solver=flags.solver,
    order=flags.order,
    size=flags.size,
    negative=flags.negative,
    decode=flags.decode,
    image_guidance=flags.image_guidance if flags.improver else None,
  )
  workdir.make_writable(out)  # before anything is drawn
  size = tuple(missing[0].settings["size"])
  step = sharding.round_up(min(flags.batch_size, len(wanted)), mesh)
  left_out: list[Picture] = []
  with progress.progress_bar(
    total=len(wanted), initial=len(wanted) - len(missing), desc="pictures", unit="image"
  ) as bar:
    for start in range(0, len(missing), step):
      part = missing[start : start + step]
      prompts = [picture.settings["prompt"] for picture in part]
      cond = encode.encode_prompts(pipeline, mesh, prompts, size=size)
      if flags.improver:
        shown = [picture.image for picture in part]
        cond = {**cond, "image": encode.encode_images(pipeline, mesh, shown)}
      seeds = [picture.settings["seed"] for picture in part]
      finite: Sequence[bool] = [True] * len(part)
      try:
        images = generator(pipeline.params["unet"], cond, seeds)
      except sampling.NonFiniteError as error:
        images, finite = error.images, error.finite.tolist()
      for image, good, picture in zip(images, finite, part, strict=True):
        if good:
          workdir.write_bytes(picture.file, to_png(image, picture.settings))
        else:
          left_out.append(picture)
      bar.update(len(part))
  written, new = len(wanted) - len(left_out), len(missing) - len(left_out)
  print(f"{count(written, 'picture')} in {out}, {new} of them new{of_images}")
  if left_out:
    first = left_out[0]
    raise DivergedError(
      f"not written, for pixels that are not finite: {count(len(left_out), 'picture')} "
      f"of {len(missing)}, the first is {first.file.name} of {first.settings['prompt']!r}: the "
      "network overflows; a smaller --guidance or --dtype=float32 may help"
    )


def _check(flags: argparse.Namespace) -> None:
  """Refuses flags that do not go together, and fills in what depends on the model's kind."""
  if bool(flags.model) == bool(flags.improver):
    raise UserError("give one of --model and --improver")
  _check_images(flags)
  if flags.prompts is None and not flags.images:
    raise UserError("the following arguments are required: --prompts")
  for name in ("guidance", "image_guidance"):
    value = getattr(flags, name)
    if value is not None and not 0 <= value < math.inf:
      option = name.replace("_", "-")
      raise UserError(f"--{option} must be finite and at least 0, got {value}")
  if flags.prompts is not None:
    flags.prompts = read_prompts(flags.prompts)
    if flags.images and len(flags.prompts) > 1:
      raise UserError("with --images, --prompts takes one prompt for all of them")
  out = user_path(flags.out)
  if out.exists() and not out.is_dir():
    raise UserError(f"{out} is a file, not a directory")


def _check_images(flags: argparse.Namespace) -> None:
  """Refuses what does not go together with improving, or with not improving."""
  if bool(flags.images) != bool(flags.improver):
    raise UserError("--improver and --images go together: what to improve with, and what")
  if flags.image_guidance is not None and not flags.improver:
    raise UserError("--image-guidance is an improver's")
  if flags.size and flags.improver:
    raise UserError("--size is not for an improver, which draws what it was trained for")
  out = user_path(flags.out).resolve()
  if flags.images and out.is_relative_to(user_path(flags.images).resolve()):
    raise UserError(f"--out={flags.out} lies in --images, whose pictures would grow in number")


def _pictures(
  flags: argparse.Namespace, out: Path, pipeline: Any, prefix: str
) -> list[Picture]:
  """All that the flags ask for, drawn already or not."""
  height, width = flags.size or (pipeline.image_size, pipeline.image_size)
  shared = {
    "model": flags.improver or flags.model,
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
  # (stem of the file's name, prompt, image to improve and what it changes of the settings)
  subjects: list[tuple[str, str, Any, dict[str, Any]]]
  if flags.images:
    from jaxpref.data import folder  # noqa: PLC0415

    shared["image_guidance"] = flags.image_guidance
    found = folder.load_folder(
      flags.images,
      image_size=pipeline.image_size,
      caption=flags.prompts[0] if flags.prompts else None,
      option="--images",
      hint='; or --prompts="..." is the prompt of all',
    )
    subjects = [
      (
        Path(e.source).with_suffix("").as_posix().replace("/", "-"),
        e.caption,
        e.image,
        {"improved": hashlib.sha256(e.image.tobytes()).hexdigest()[:16]},
      )
      for e in found
    ]
  else:
    subjects = [(f"{i:05d}", prompt, None, {}) for i, prompt in enumerate(flags.prompts)]
  each = flags.images_per_prompt
  total = len(subjects) * each
  if not 0 <= flags.seed < 2**32 - total:
    raise UserError(f"--seed must be at least 0 and below 2^32 less {count(total, 'picture')}")
  names = [stem for stem, *_ in subjects]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise UserError(f"several pictures in --images would become {twice[0]}: rename them")
  pictures = []
  for i, (stem, prompt, image, more) in enumerate(subjects):
    # Pictures to improve differ by themselves; so they keep their seeds among others.
    first = flags.seed + (0 if flags.images else i * each)
    for number in range(each):
      settings = {**shared, **more, "prompt": prefix + prompt, "seed": first + number}
      pictures.append(Picture(out / f"{stem}-{number:02d}.png", settings, image))
  return pictures


def _left_out(flags: argparse.Namespace, used: int) -> str:
  """What the last line says of pictures that could not be improved."""
  if not flags.images:
    return ""
  from jaxpref.data import folder  # noqa: PLC0415

  total = folder.count_images(flags.images)
  if not (rest := total - used):
    return ""
  return f"; {rest} of {total} in {flags.images} left out, see the warning"


def read_prompts(text: str) -> list[str]:
  """The prompts in a file, one a line, or the one that is given itself.

  Raises:
    UserError: the file is missing, unreadable or empty.
  """
  if not (text := text.strip()):
    raise UserError("--prompts is empty")
  try:
    path = Path(text).expanduser()
    is_file = path.is_file()
  except (OSError, RuntimeError, ValueError):  # no name that a file can have, or no home
    is_file, path = False, Path()
  if not is_file and path.suffix != ".txt":
    try:
      # Where the locale is C, Python keeps other characters of an argument as bytes.
      return [text.encode(errors="surrogateescape").decode()]
    except UnicodeError as error:
      raise UserError(f"--prompts is not UTF-8: {text!r}") from error
  try:
    return prompt_files_lib.read_file(path, shown=repr(text))
  except UserError as error:
    raise UserError(f"--prompts: {error}") from error


def is_drawn(file: Path, settings: Mapping[str, Any]) -> bool:
  """Whether the file is the picture of these settings.

  Raises:
    UserError: it is something else, which is not to be overwritten.
  """
  if not file.exists():
    return False
  foreign = f"{file} is not a picture of this program; choose another --out"
  if not file.is_file():  # a pipe would wait for a writer
    raise UserError(foreign)
  try:
    with Image.open(file) as image:
      found = dict(parse_json(image.info[_SETTINGS].encode()))
  except (
    *(OSError, ValueError, KeyError, TypeError, AttributeError),
    *(UnidentifiedImageError, Image.DecompressionBombError),
  ) as error:
    raise UserError(foreign) from error
  for name in settings.keys() - {"model"}:  # its weights tell, wherever it lies
    if found.get(name, _LATER.get(name)) != settings[name]:
      raise UserError(
        f"{file} is of other settings: {name} was {found.get(name)!r}, now {settings[name]!r}; "
        "choose another --out"
      )
  return True


def to_png(image: Any, settings: Mapping[str, Any]) -> bytes:
  """A PNG with its settings, as JSON and in the form that A1111's web UI shows."""
  texts = PngImagePlugin.PngInfo()
  texts.add_itxt(_SETTINGS, json.dumps(settings, ensure_ascii=False))
  height, width = settings["size"]
  lines = [settings["prompt"]]
  if settings["negative"]:
    lines.append(f"Negative prompt: {settings['negative']}")
  lines.append(
    f"Steps: {settings['steps']}, Sampler: {SOLVERS[settings['solver']]}, "
    f"CFG scale: {settings['guidance']:g}, Seed: {settings['seed']}, "
    f"Size: {width}x{height}, Model: {Path(settings['model']).name}"
  )
  texts.add_itxt(_A1111, "\n".join(lines))
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG", pnginfo=texts)
  return buffer.getvalue()


if __name__ == "__main__":
  cli.run(main)
