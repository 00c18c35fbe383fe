"""The model card that stands beside the exported pipeline, with its training curves."""

import platform
import shutil
from pathlib import Path
from typing import Any

import jax
import matplotlib
from matplotlib.figure import Figure

from jaxpref import __version__, metrics
from jaxpref.data.shapes import flaws
from jaxpref.models import hub


def write_card(pipeline: Path, workdir: Path, config: Any) -> None:
  """Writes README.md and training.png into the pipeline's directory."""
  stages = ["denoiser"] if config.vae.path else ["vae", "denoiser"]
  figure = Figure(figsize=(4.5 * len(stages), 3), layout="constrained")
  for axes, stage in zip(
    figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True
  ):
    points = metrics.read_curves(workdir / stage)["loss"]
    axes.plot(*zip(*points, strict=True), linewidth=0.8)
    axes.set(title=stage, xlabel="updates", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
  with matplotlib.rc_context({"svg.hashsalt": "jaxpref"}):
    figure.savefig(pipeline / "training.png", dpi=110)
  rates = "\n".join(f"| {name} | {100 * rate:.0f} % |" for name, rate in flaws.RATES.items())
  stages_done = config.vae, config.denoiser
  vae, denoiser = (f"{s.num_updates} updates of {s.batch_size} images" for s in stages_done)
  command = "    python -m jaxpref.pretrain --config=configs/shapes_base.py"
  commands, curves = command, "![training curves](training.png)"
  if config.vae.path:
    vae = f"kept from the pipeline `{config.vae.path}`"
  if config.denoiser.path:
    denoiser += f", from the weights in `{config.denoiser.path}`"
    commands += f"\n{command}:{config.preset}"
    before = hub.find_pipeline(config.denoiser.path) / "training.png"
    if before.exists():
      shutil.copyfile(before, pipeline / "training-before.png")
      curves = "![training curves before](training-before.png)\n\n" + curves
  made = f"jaxpref {__version__}, jax {jax.__version__}, {platform.machine()} "
  made += jax.default_backend()
  size = sum(f.stat().st_size for f in pipeline.rglob("*.safetensors")) / 1e6
  (pipeline / "README.md").write_text(
    f"""# The shapes world's base pipeline

A text-to-image latent diffusion pipeline of {size:.1f} MB, in diffusers' layout, for pictures
of coloured shapes, {config.corpus.image_size} pixels wide and high. Made from scratch by

{commands}

It exists to be tuned: its corpus is flawed, as data from the web is, and so are its
pictures. It knows nothing but the captions of `jaxpref.data.shapes.prompts`.

| | |
|---|---|
| VAE | {vae} |
| UNet and text encoder | {denoiser} |
| corpus | {config.corpus.num_images} images of 64 pixels, averaged down; seed {config.seed} |
| predicts | {config.unet.prediction_type} |
| made with | {made} |

Flaws of the corpus, each drawn where a prompt allows it; of several flaws of meaning only the
first befalls an image:

| flaw | rate |
|---|---|
{rates}

{curves}

No person, photograph or text of others went into it; weights and pictures may be used freely.
""",
    encoding="utf-8",
  )
