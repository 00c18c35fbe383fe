"""`python -m jaxpref.export --workdir=W --out=DIR`: what a run has tuned, for other programs.

Writes a directory that PyTorch's diffusers loads, or with --single-file one safetensors file
that ComfyUI and A1111's web UI load. Of a LoRA run both have the additions merged into the
weights; --lora writes the additions alone, which diffusers' `load_lora_weights` puts onto
the base. Nothing that exists is overwritten.
"""

import argparse
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxpref import cli
from jaxpref.errors import UserError
from jaxpref.paths import user_path

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def main(argv: list[str]) -> int:
  """Exports as the flags say; returns the exit status."""
  return cli.exit_status(_run, argv, continues=False)


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser("Writes the model that a run has tuned for other programs.")
  add = parser.add_argument
  add("--workdir", required=True, help="of the run, or a pipeline to be rewritten")
  add(
    "--out",
    required=True,
    type=Path,
    help="directory, or file with --single-file or --lora; new",
  )
  add("--dtype", default="float16", choices=tuple(DTYPES), help="of the weights written")
  parser.add_run_flags()
  form = parser.add_mutually_exclusive_group()
  form.add_argument(
    "--single-file",
    action="store_true",
    help="one file by the names that ComfyUI and A1111's web UI read",
  )
  form.add_argument(
    "--lora", action="store_true", help="of a LoRA run, the additions alone, one file"
  )
  return parser


def _run(argv: list[str]) -> None:
  flags = _parser().parse_args(argv)
  out = user_path(flags.out)
  if there := next((p for p in out.parents if p.exists() and not p.is_dir()), None):
    raise UserError(f"{there} is a file, not a directory")
  if out.exists() or out.is_symlink():
    raise UserError(f"{out} exists; choose another --out")
  if (flags.single_file or flags.lora) and out.suffix != ".safetensors":
    option = "--lora" if flags.lora else "--single-file"
    raise UserError(f"{option} writes a file: --out={out}.safetensors")
  # Late: errors on the command line should not wait for JAX.
  from jaxpref import tuned  # noqa: PLC0415
  from jaxpref.models import lora, save  # noqa: PLC0415

  pipeline = tuned.load(flags.workdir, ema=flags.ema, step=flags.step, merged=not flags.lora)
  dtype = DTYPES[flags.dtype]
  if flags.lora:
    unet = pipeline.params["unet"]
    if not isinstance(unet, lora.Adapted):
      raise UserError(f"{flags.workdir} is no LoRA run; leave out --lora")
    save.save_tensors(out, lora.export_tensors(unet, dtype))
    print(f"the LoRA is {out}")
    return
  if flags.single_file:
    save.save_single_file(out, pipeline.params, modules=pipeline.modules, dtype=dtype)
  else:
    save.save_pipeline(
      out,
      pipeline.params,
      configs=pipeline.configs,
      tokenizers_from=pipeline.path,
      dtype=dtype,
    )
  print(f"the pipeline is in {out}")


if __name__ == "__main__":
  cli.run(main)
