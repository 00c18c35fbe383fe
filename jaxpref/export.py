"""Export of a run's model: `python -m jaxpref.export --workdir=W --out=DIR`.

It writes a directory that PyTorch's diffusers loads, or with --single-file one safetensors file
that ComfyUI and A1111's web UI load. In both, a LoRA run's additions are merged into the
weights. --lora writes only the additions, by kohya's names; ComfyUI, A1111's web UI and
diffusers' `load_lora_weights` apply them to the base. Existing files are never overwritten.
"""

import argparse
from pathlib import Path

import numpy as np

from jaxpref.errors import UserError
from jaxpref.runtime import cli
from jaxpref.runtime.paths import user_path

DTYPES = ("float16", "bfloat16", "float32")


def main(argv: list[str]) -> int:
  """Exports a model as the flags say; returns the exit status."""
  return cli.exit_status(_run, argv, resumable=False)


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser("Writes a run's tuned model for other programs.")
  add = parser.add_argument
  add("--workdir", required=True, help="the run's workdir, or a pipeline to rewrite")
  add(
    "--out",
    required=True,
    type=Path,
    help="a new directory, or with --single-file or --lora a new file",
  )
  add("--dtype", default="float16", choices=DTYPES, help="dtype of the written weights")
  parser.add_run_flags()
  form = parser.add_mutually_exclusive_group()
  form.add_argument(
    "--single-file",
    action="store_true",
    help="write one file, with the tensor names that ComfyUI and A1111's web UI read",
  )
  form.add_argument(
    "--lora",
    action="store_true",
    help="write only the additions of a LoRA run, one file for ComfyUI, A1111 and diffusers",
  )
  return parser


def _run(argv: list[str]) -> None:
  flags = _parser().parse_args(argv)
  if flags.out == Path() or not flags.workdir:
    raise UserError(f"{'--workdir' if flags.workdir == '' else '--out'} is empty")
  out = user_path(flags.out)
  if there := next((p for p in out.parents if p.exists() and not p.is_dir()), None):
    raise UserError(f"{there} is a file, not a directory")
  if out.exists() or out.is_symlink():
    raise UserError(f"{out} exists: choose another --out")
  if (flags.single_file or flags.lora) and out.suffix != ".safetensors":
    option = "--lora" if flags.lora else "--single-file"
    raise UserError(f"{option} writes a file: set --out={out}.safetensors")
  if out.suffix == ".safetensors" and not (flags.single_file or flags.lora):
    raise UserError(f"--out={flags.out} names a file: add --single-file or --lora")
  # Late, so that errors on the command line do not wait for JAX.
  from jaxpref.models import lora, save  # noqa: PLC0415
  from jaxpref.training import load_run  # noqa: PLC0415

  pipeline = load_run.load(flags.workdir, ema=flags.ema, step=flags.step, merged=not flags.lora)
  dtype = np.dtype(flags.dtype)  # JAX has registered bfloat16
  if flags.lora:
    params = pipeline.denoiser_params
    if not isinstance(params, lora.Adapted):
      raise UserError(f"{flags.workdir} is not a LoRA run: leave out --lora")
    save.save_tensors(out, *pipeline.family.export_lora(params, pipeline.modules, dtype))
    print(f"the LoRA is {out}")
    return
  if flags.single_file:
    save.save_single_file(out, pipeline, dtype=dtype)
    if pipeline.schedule.prediction_type == "v_prediction" and pipeline.family.v_note:
      print(pipeline.family.v_note)
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
