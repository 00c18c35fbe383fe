"""Image generation: `python -m jaxpref.generate --model=DIR --prompts="a prompt" --out=DIR`.

The model is a pipeline in diffusers' layout, a Hub id, or a run's workdir. With
`--improver=DIR --images=DIR` it generates improved versions of a folder of images. An image
depends only on its prompt, its seed and the settings, not on the batch or the devices; each is
a PNG that holds them. If the same command is started again, it generates the missing images.
Images with non-finite pixels are not written, and the exit status says so.
"""

import argparse
import hashlib
import math
from pathlib import Path
from typing import Any

from jaxpref.base_config import DTYPES, SOLVERS
from jaxpref.data import prompt_files as prompt_files_lib
from jaxpref.errors import DivergedError, UserError, count
from jaxpref.evaluation import image_files
from jaxpref.runtime import cli
from jaxpref.runtime.paths import user_path


def main(argv: list[str]) -> int:
  """Generates images as the flags say; returns the exit status."""
  return cli.exit_status(_run, argv)


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser("Generates images with a pipeline or a run's tuned model.")
  add = parser.add_argument
  add("--model", help="pipeline directory, Hub id, 'shapes', or a run's workdir")
  add("--improver", metavar="MODEL", help="a model of --config=improver; needs --images")
  add(
    "--images",
    metavar="DIR",
    help="images to improve, scaled and cropped to the model's size",
  )
  add(
    "--prompts",
    help="a text file with one prompt per line, or a prompt; with --images, one prompt for all "
    "images, instead of the captions beside them",
  )
  add("--out", required=True, type=Path, help="directory for <prompt or image>-<number>.png")
  add("--images-per-prompt", type=_count, default=1, metavar="N")
  add("--seed", type=int, default=0, help="of the first image; it increases by 1 per image")
  add("--negative", default="", help="a prompt to guide away from; needs --guidance above 1")
  add(
    "--guidance",
    type=float,
    help="classifier-free guidance scale; at most 1 means no guidance, only the prompt's "
    "prediction, as Turbo models need it (0 and 1 are the same); Flux.1-dev is given the scale "
    "instead; default: the scale of the run's evaluation, otherwise the usual one of the "
    "model's family, such as 7.5, and 3.5 for improvers; for an improver it is the weight of "
    "the prompt, where 0 ignores the prompt",
  )
  add(
    "--image-guidance",
    type=float,
    help="an improver's guidance scale for the image; default: its run's, otherwise 3",
  )
  add("--steps", type=_count, default=30, help="number of solver steps")
  add("--solver", choices=SOLVERS, default="dpm_solver")
  add("--order", type=int, choices=(1, 2, 3), default=2, help="order of DPM-Solver++")
  add(
    "--size",
    type=cli.size,
    metavar="WxH",
    help="width x height in pixels, as in the PNG's text, or one number for both; default: "
    "the model's training size",
  )
  add("--batch-size", type=_count, default=4, help="number of images at a time")
  add(
    "--decode",
    choices=("whole", "sliced", "tiled"),
    default="whole",
    help="'sliced' and 'tiled' save memory",
  )
  add("--dtype", choices=DTYPES, default="float32", help="computation dtype")
  add("--variant", default="", help="variant of the pipeline's weights, such as fp16")
  add("--unet", default="", metavar="DIR", help="another denoiser: a directory or Hub id")
  add("--vae", default="", metavar="DIR", help="another VAE: a directory or Hub id")
  add(
    "--clip-skip",
    type=int,
    default=0,
    metavar="N",
    help="number of last layers of the text encoder to skip, as diffusers counts",
  )
  parser.add_run_flags()
  return parser


def _count(text: str) -> int:
  if (number := int(text)) < 1:
    raise argparse.ArgumentTypeError(f"must be at least 1 (got {text})")
  return number


def _run(argv: list[str]) -> None:
  flags = _parser().parse_args(argv)
  _check(flags)
  out = user_path(flags.out)
  # Late, so that errors on the command line do not wait for JAX.
  from jaxpref import sharding  # noqa: PLC0415
  from jaxpref.models import text  # noqa: PLC0415
  from jaxpref.runtime import jax_setup, progress  # noqa: PLC0415
  from jaxpref.training import load_run  # noqa: PLC0415

  jax_setup.cache_programs()
  mesh = sharding.make_mesh()
  pipeline = _load_model(flags, mesh)
  _fill_guidance(flags, pipeline.family.guidance(pipeline.denoiser))
  prefix = load_run.prompt_prefix(flags.improver or flags.model)
  wanted = _list_images(flags, out, pipeline, prefix)
  of_images = _describe_left_out(flags, len(wanted) // flags.images_per_prompt)
  missing = [t for t in wanted if not image_files.is_generated(t.file, t.settings)]
  if not missing:
    print(f"{count(len(wanted), 'image')} in {out}, 0 of them new{of_images}")
    return
  text.warn_of_cut(pipeline.tokenizers, [task.settings["prompt"] for task in wanted])
  done = len(wanted) - len(missing)
  batch_size = min(flags.batch_size, len(wanted))
  sampler = image_files.make_sampler(pipeline, mesh, missing[0].settings, batch_size)
  with progress.progress_bar(
    total=len(wanted), initial=done, desc="images", unit="image"
  ) as bar:
    left_out = image_files.generate_images(
      pipeline, mesh, sampler, missing, batch_size=batch_size, bar=bar
    )
  written, new = len(wanted) - len(left_out), len(missing) - len(left_out)
  print(f"{count(written, 'image')} in {out}, {new} of them new{of_images}")
  if left_out:
    first = left_out[0]
    raise DivergedError(
      f"{len(left_out)} of {count(len(missing), 'image')} not written because of non-finite "
      f"pixels, the first is {first.file.name} of {first.settings['prompt']!r}: the network "
      "overflows; a smaller --guidance may help, and --dtype=float32 if it is not set"
    )


def _load_model(flags: argparse.Namespace, mesh: Any) -> Any:
  """Loads the pipeline of --model or --improver."""
  import jax.numpy as jnp  # noqa: PLC0415

  from jaxpref.training import load_run  # noqa: PLC0415

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
  if flags.improver and not pipeline.is_improver:
    raise UserError(f"{name} is not an improver: use --model")
  if pipeline.is_improver and not flags.improver:
    raise UserError(f"{name} is an improver: use --improver and --images")
  return pipeline


def _fill_guidance(flags: argparse.Namespace, usual: float) -> None:
  """Sets missing guidance scales to those of the run's evaluation, or to the usual ones."""
  from jaxpref.models import hub  # noqa: PLC0415
  from jaxpref.training import load_run  # noqa: PLC0415

  name = flags.improver or flags.model
  if flags.guidance is None:
    usual = 2.0 if flags.model in hub.BUNDLED else usual
    flags.guidance = (
      load_run.setting(name, "improve", "text_guidance", 3.5)
      if flags.improver
      else load_run.setting(name, "evaluate", "guidance", usual)
    )
  if flags.image_guidance is None:
    flags.image_guidance = load_run.setting(name, "improve", "image_guidance", 3.0)


def _check(flags: argparse.Namespace) -> None:
  """Refuses flags that do not go together; reads the prompts."""
  if bool(flags.model) == bool(flags.improver):
    raise UserError("set either --model or --improver")
  _check_images(flags)
  if flags.prompts is None and not flags.images:
    raise UserError("the following arguments are required: --prompts")
  for name in ("guidance", "image_guidance"):
    value = getattr(flags, name)
    if value is not None and not 0 <= value < math.inf:
      option = name.replace("_", "-")
      raise UserError(f"--{option} must be finite and at least 0 (got {value})")
  if flags.negative and flags.guidance is not None and flags.guidance <= 1:
    raise UserError(f"--negative needs --guidance above 1 (got {flags.guidance:g})")
  if flags.prompts is not None:
    flags.prompts = read_prompts(flags.prompts)
    if flags.images and len(flags.prompts) > 1:
      raise UserError("with --images, --prompts takes one prompt for all of them")
  out = user_path(flags.out)
  if out.exists() and not out.is_dir():
    raise UserError(f"{out} is a file, not a directory")


def _check_images(flags: argparse.Namespace) -> None:
  """Refuses flags that do not go together with --improver, or need it."""
  if bool(flags.images) != bool(flags.improver):
    raise UserError("--improver and --images go together: set both, or neither")
  if flags.image_guidance is not None and not flags.improver:
    raise UserError("--image-guidance needs --improver")
  if flags.size and flags.improver:
    raise UserError("--size does not go with --improver, which has its training size")
  out = user_path(flags.out).resolve()
  if flags.images and out.is_relative_to(user_path(flags.images).resolve()):
    raise UserError(
      f"--out={flags.out} is inside --images, so its images would be improved next time: "
      "choose another --out"
    )


def _list_images(
  flags: argparse.Namespace, out: Path, pipeline: Any, prefix: str
) -> list[image_files.ImageTask]:
  """Lists all images that the flags ask for, whether they exist or not."""
  shared = image_files.shared_settings(flags, pipeline, flags.improver or flags.model)
  # (stem of the file's name, prompt, image to improve, additional settings)
  subjects: list[tuple[str, str, Any, dict[str, Any]]]
  if flags.images:
    from jaxpref.data.sources import folder  # noqa: PLC0415

    shared["image_guidance"] = flags.image_guidance
    found = folder.load_folder(
      flags.images,
      image_size=pipeline.image_size,
      caption=flags.prompts[0] if flags.prompts else None,
      option="--images",
      hint='; or set one prompt for all with --prompts="..."',
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
    raise UserError(f"--seed must be at least 0 and below 2^32 minus {count(total, 'image')}")
  names = [stem for stem, *_ in subjects]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise UserError(f"several images in --images would become {twice[0]}: rename them")
  tasks = []
  for i, (stem, prompt, image, more) in enumerate(subjects):
    # Images to improve all have the first seed, so results do not depend on the other images.
    first = flags.seed + (0 if flags.images else i * each)
    for number in range(each):
      settings = {**shared, **more, "prompt": prefix + prompt, "seed": first + number}
      tasks.append(image_files.ImageTask(out / f"{stem}-{number:02d}.png", settings, image))
  return tasks


def _describe_left_out(flags: argparse.Namespace, used: int) -> str:
  """Returns the end of the last line, which says how many images could not be improved."""
  if not flags.images:
    return ""
  from jaxpref.data.sources import folder  # noqa: PLC0415

  total = folder.count_images(flags.images)
  if not (rest := total - used):
    return ""
  return f"; {rest} of {total} in {flags.images} left out, see the warning"


def read_prompts(text: str) -> list[str]:
  """Reads the prompts of --prompts: a file with one per line, or a prompt itself.

  Raises:
    UserError: the file is missing, unreadable or empty.
  """
  if not (text := text.strip()):
    raise UserError("--prompts is empty")
  if (path := prompt_files_lib.path_in(text)) is None:
    try:
      # In the C locale, Python escapes non-ASCII bytes of arguments.
      return [text.encode(errors="surrogateescape").decode()]
    except UnicodeError as error:
      raise UserError(f"--prompts is not UTF-8: {text!r}") from error
  try:
    return prompt_files_lib.read_file(path, shown=repr(text))
  except UserError as error:
    raise UserError(f"--prompts: {error}") from error


if __name__ == "__main__":
  cli.run(main)
