"""The model card of the exported pipeline, with its training curves.

A pipeline whose weights begin from another pipeline copies its history, `history.json`: the
card shows all rounds of training.
"""

import importlib.util
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxpref import __version__
from jaxpref.errors import UserError
from jaxpref.models import hub
from jaxpref.runtime import metrics
from jaxpref.shapes import flaws

HISTORY = "history.json"


def check_plots() -> None:
  """Refuses to start without the library of the curves.

  Raises:
    UserError: matplotlib is not installed.
  """
  if importlib.util.find_spec("matplotlib") is None:
    raise UserError(
      "matplotlib is missing, which plots the training curves: pip install 'jaxpref[pretrain]'"
    )


def write_card(
  pipeline: Path, workdir: Path, config: ConfigDict, *, trained: str, predicts: str, note: str
) -> None:
  """Writes README.md, history.json and the training curves into the pipeline's directory.

  Args:
    pipeline: its directory.
    workdir: of the training run.
    config: the run's configuration.
    trained: what the second stage trains, in words.
    predicts: what the denoiser predicts.
    note: further text, Markdown.
  """
  history = _history(pipeline, config)
  number = len(history) + 1
  stages = [stage for stage in ("vae", "denoiser") if config[stage].num_updates]
  curves = f"training-{number}.png"
  _plot(workdir, stages, pipeline / curves)
  made = f"jaxpref {__version__}, jax {jax.__version__}, {platform.machine()} "
  made += jax.default_backend()
  history.append(
    {
      "command": _command(config),
      "vae": _summary(config.vae, "its decoder trained on for "),
      "trained": trained,
      "denoiser": _summary(config.denoiser, "trained on for ") + _start_of_text(config),
      "corpus": f"{config.corpus.num_images} images, seed {config.seed}",
      "made with": made,
      "curves": curves,
    }
  )
  (pipeline / HISTORY).write_text(json.dumps(history, indent=2) + "\n", encoding="utf-8")
  size = sum(f.stat().st_size for f in pipeline.rglob("*.safetensors")) / 1e6
  rates = "\n".join(f"| {name} | {100 * rate:.0f} % |" for name, rate in flaws.RATES.items())
  rounds = "\n".join(_round(i, entry) for i, entry in enumerate(history, 1))
  (pipeline / "README.md").write_text(
    f"""# The shapes world's base pipeline

A text-to-image latent diffusion pipeline of {size:.1f} MB, in diffusers' layout, for images
of coloured shapes, {config.corpus.image_size} pixels wide and high; predicts
{predicts}.

Its purpose is to be tuned: its corpus is flawed, as data from the web is, and so are its
images. It knows only the captions of `jaxpref.shapes.prompts`. It contains no person,
photograph or text of others; weights and images may be used freely.
{note}
Flaws of the corpus, each added at random where a prompt allows it; an image has at most one
flaw of meaning:

| flaw | rate |
|---|---|
{rates}

How it was made:
{rounds}
""",
    encoding="utf-8",
  )


def _history(pipeline: Path, config: ConfigDict) -> list[dict[str, str]]:
  """Reads the history of the pipeline that training began from, and copies its curves."""
  source = config.denoiser.path
  if not source or not (path := hub.find_pipeline(source) / HISTORY).exists():
    return []
  history = json.loads(path.read_text(encoding="utf-8"))
  for entry in history:
    shutil.copyfile(path.with_name(entry["curves"]), pipeline / entry["curves"])
  return history


def _command(config: ConfigDict) -> str:
  words = [f"python -m jaxpref.pretrain --config=configs/{config.name}.py:{config.preset}"]
  words.append(f"--config.seed={config.seed}")
  for stage in ("vae", "denoiser"):
    words.append(f"--config.{stage}.path={config[stage].path}")
    words.append(f"--config.{stage}.num_updates={config[stage].num_updates}")
  return " \\\n      ".join(words)


def _summary(stage: Any, on: str) -> str:
  trained = f"{stage.num_updates} updates of {stage.batch_size} images"
  if not stage.path:
    return trained
  kept = f"the weights of `{stage.path}`"
  return f"{kept}, {on}{trained}" if stage.num_updates else kept


def _start_of_text(config: ConfigDict) -> str:
  path = "" if config.denoiser.path else config.text.get("path")
  return f"; a text encoder begins as that of `{path}`" if path else ""


def _plot(workdir: Path, stages: list[str], target: Path) -> None:
  import matplotlib  # noqa: PLC0415  # of the extra 'pretrain'; `check_plots` has found it
  from matplotlib.figure import Figure  # noqa: PLC0415

  figure = Figure(figsize=(4.5 * max(len(stages), 1), 3), layout="constrained")
  for i, stage in enumerate(stages):
    axes = figure.add_subplot(1, len(stages), i + 1)
    points = metrics.read_curves(workdir / stage)["loss"]
    axes.plot(*zip(*points, strict=True), linewidth=0.8)
    axes.set(title=stage, xlabel="updates", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
  with matplotlib.rc_context({"svg.hashsalt": "jaxpref"}):
    figure.savefig(target, dpi=110)


def _round(number: int, entry: dict[str, str]) -> str:
  return f"""
### {number}

    {entry["command"]}

| | |
|---|---|
| VAE | {entry["vae"]} |
| {entry["trained"]} | {entry["denoiser"]} |
| corpus | {entry["corpus"]}, of 64 pixels averaged down |
| made with | {entry["made with"]} |

![training curves]({entry["curves"]})"""
