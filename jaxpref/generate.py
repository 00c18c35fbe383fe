"""`python -m jaxpref.generate --model=DIR --prompts="a prompt" --out=DIR`: pictures.

Of any pipeline in diffusers' layout, of a hub id, or of a run's workdir. A picture depends
on its prompt, its seed and the settings alone, not on the batch or the devices; each is a
PNG that carries them. Started again, the same command draws what is missing.
"""

import argparse
import io
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from jaxpref import cli
from jaxpref.errors import UserError
from jaxpref.paths import user_path

SOLVERS = {"dpm_solver": "DPM++ 2M", "ddim": "DDIM", "ddpm": "DDPM"}
_SETTINGS, _A1111 = "jaxpref", "parameters"  # the PNG's texts


def main(argv: list[str]) -> int:
  """Draws as the flags say; returns the exit status."""
  return cli.exit_status(_run, argv)


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser("Draws pictures of a pipeline, or of what a run has made of one.")
  add = parser.add_argument
  add("--model", required=True, help="pipeline directory, hub id, 'shapes', or a run's workdir")
  add("--prompts", required=True, help="a text file with a prompt a line, or a prompt")
  add("--out", required=True, type=Path, help="directory for <prompt>-<image>.png")
  add("--images-per-prompt", type=_count, default=1, metavar="N")
  add("--seed", type=int, default=0, help="of the first picture; each next one's is one more")
  add("--negative", default="", help="a prompt to be guided away from")
  add("--guidance", type=float, default=7.5, help="classifier-free guidance scale; 1: none")
  add("--steps", type=_count, default=30, help="of the solver")
  add("--solver", choices=tuple(SOLVERS), default="dpm_solver")
  add("--order", type=int, choices=(1, 2, 3), default=2, help="of the DPM-Solver")
  add("--size", type=_size, metavar="HxW", help="in pixels; what the model was trained for")
  add("--batch-size", type=_count, default=4, help="pictures at once")
  add("--decode", choices=("whole", "sliced", "tiled"), default="whole", help="saves memory")
  add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
  add("--variant", default="", help="of the pipeline's weights, such as fp16")
  parser.add_run_flags()
  return parser


def _count(text: str) -> int:
  if (number := int(text)) < 1:
    raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
  return number


def _size(text: str) -> tuple[int, int]:
  match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
  if match is None:
    raise argparse.ArgumentTypeError(f"must be like 512 or 512x768, got {text}")
  return int(match[1]), int(match[2] or match[1])


def _run(argv: list[str]) -> None:
  flags = _parser().parse_args(argv)
  prompts = read_prompts(flags.prompts)
  total = len(prompts) * flags.images_per_prompt
  if not 0 <= flags.seed < 2**32 - total:
    raise UserError(f"--seed must be at least 0 and below 2^32 less {total} pictures")
  if not 0 <= flags.guidance < math.inf:
    raise UserError(f"--guidance must be finite and at least 0, got {flags.guidance}")
  out = user_path(flags.out)
  if out.exists() and not out.is_dir():
    raise UserError(f"{out} is a file, not a directory")
  # Late: errors on the command line should not wait for JAX.
  import jax  # noqa: PLC0415
  import jax.numpy as jnp  # noqa: PLC0415

  from jaxpref import progress, runtime, sharding, tuned, workdir  # noqa: PLC0415
  from jaxpref.data import encode  # noqa: PLC0415
  from jaxpref.evaluation import generate  # noqa: PLC0415

  runtime.cache_programs()
  mesh = sharding.make_mesh()
  pipeline = tuned.load(
    flags.model,
    ema=flags.ema,
    step=flags.step,
    dtype=jnp.dtype(flags.dtype),
    mesh=mesh,
    variant=flags.variant,
  )
  # What the model was told of its good pictures, it is told again.
  prompts = [tuned.prompt_prefix(flags.model) + prompt for prompt in prompts]
  height, width = flags.size or (pipeline.image_size, pipeline.image_size)
  shared = {
    "model": flags.model,
    "weights": pipeline.digest,
    "negative": flags.negative,
    "guidance": flags.guidance,
    "steps": flags.steps,
    "solver": flags.solver,
    "order": flags.order,
    "size": [height, width],
    "decode": flags.decode,
    "dtype": flags.dtype,
  }
  missing = []  # (file, index of its prompt, settings)
  seeds = generate.seeds_of(len(prompts), flags.images_per_prompt, seed=flags.seed)
  for i, seed in enumerate(seeds):
    prompt, image = divmod(i, flags.images_per_prompt)
    settings = {**shared, "prompt": prompts[prompt], "seed": int(seed)}
    file = out / f"{prompt:05d}-{image:02d}.png"
    if not is_drawn(file, settings):
      missing.append((file, prompt, settings))
  if not missing:
    print(f"{total} pictures in {out}, 0 of them new")
    return
  generator = generate.make_generator(
    pipeline,
    mesh,
    num_steps=flags.steps,
    guidance=flags.guidance,
    batch_size=min(flags.batch_size, total),
    solver=flags.solver,
    order=flags.order,
    size=flags.size,
    negative=flags.negative,
    decode=flags.decode,
  )
  wanted = sorted({prompt for _, prompt, _ in missing})
  row_of = {prompt: row for row, prompt in enumerate(wanted)}
  cond = encode.encode_prompts(
    pipeline, mesh, [prompts[i] for i in wanted], size=(height, width)
  )
  step = sharding.round_up(min(flags.batch_size, total), mesh)
  with progress.progress_bar(
    total=total, initial=total - len(missing), desc="pictures", unit="image"
  ) as bar:
    for start in range(0, len(missing), step):
      part = missing[start : start + step]
      rows = [row_of[prompt] for _, prompt, _ in part]
      images = generator(
        pipeline.params["unet"],
        jax.tree.map(lambda x, r=rows: x[r], cond),
        [settings["seed"] for _, _, settings in part],
      )
      for image, (file, _, settings) in zip(images, part, strict=True):
        workdir.write_bytes(file, to_png(image, settings))
      bar.update(len(part))
  print(f"{total} pictures in {out}, {len(missing)} of them new")


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
  except (OSError, RuntimeError):  # longer than a name can be, or a ~ that is no home
    return [text]
  if not is_file and path.suffix != ".txt":
    return [text]
  try:
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--prompts: cannot read {text!r}: {error}") from error
  if not (prompts := [line for line in lines if line]):
    raise UserError(f"--prompts: {text} holds no prompt")
  return prompts


def is_drawn(file: Path, settings: Mapping[str, Any]) -> bool:
  """Whether the file is the picture of these settings.

  Raises:
    UserError: it is something else, which is not to be overwritten.
  """
  if not file.exists():
    return False
  try:
    with Image.open(file) as image:
      found = dict(json.loads(image.info[_SETTINGS]))
  except (OSError, ValueError, KeyError, TypeError, UnidentifiedImageError) as error:
    raise UserError(f"{file} is not a picture of this program; choose another --out") from error
  for name in settings.keys() - {"model"}:  # its weights tell, wherever it lies
    if found.get(name) != settings[name]:
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
  sys.exit(main(sys.argv[1:]))
