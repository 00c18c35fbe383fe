"""The run that trains the shapes world's preference model: pairs, updates, model and card."""

import dataclasses
import hashlib
import io
import json
import math
import platform
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from jaxpref import __version__, sharding
from jaxpref import config as config_lib
from jaxpref.models import pipeline as pipeline_lib
from jaxpref.models import preference_towers, save, text, torch_layout
from jaxpref.pretrain import fit, train_preference
from jaxpref.runtime import jax_setup
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.scorers.base import batches, pixels, preference_scores
from jaxpref.shapes import builder, render, verifier

RULES: config_lib.Rules = {
  **dict.fromkeys(
    (
      *("pairs.num_train", "pairs.num_test", "preference.batch_size", "log_every"),
      "save_every",
    ),
    (lambda value: value >= 1, "at least 1"),
  ),
  **dict.fromkeys(
    ("preference.num_updates", "preference.warmup_updates"),
    (lambda value: value >= 0, "at least 0"),
  ),
  **dict.fromkeys(
    ("preference.contrast", "preference.lr", "preference.weight_decay"),
    (lambda value: 0 <= value < math.inf, "at least 0 and finite"),
  ),
  **dict.fromkeys(
    ("preference.decay", "preference.ema_decay"),
    (lambda value: 0 <= value <= 1, "between 0 and 1"),
  ),
  "model.channels": (
    lambda values: values and all(8 <= n <= 1024 and n % 8 == 0 for n in values),
    "multiples of 8 up to 1024",
  ),
  "model.width": (lambda value: 1 <= value <= 4096, "between 1 and 4096"),
  "preference.clip_norm": (lambda value: value > 0, "positive"),
  "seed": (lambda value: 0 <= value < 2**31, "at least 0 and below 2^31"),
  "pairs.image_size": (lambda value: value in (16, 32, 64), "16, 32 or 64"),
}


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A run's configuration, its mesh, and the pipeline whose text encoder it begins with."""

  config: ConfigDict
  mesh: Mesh
  pipeline: pipeline_lib.Pipeline


@dataclasses.dataclass(frozen=True)
class Pairs:
  """The annotator's pairs, without ties.

  Attributes:
    preferred: images, uint8 [N, S, S, 3].
    other: uint8 [N, S, S, 3].
    captions: N.
  """

  preferred: np.ndarray
  other: np.ndarray
  captions: list[str]


def prepare(config: ConfigDict) -> Prepared:
  """Reads the input of a run. Nothing is written yet.

  Raises:
    UserError: the pipeline is missing, or the number of devices does not divide a batch.
  """
  jax_setup.cache_programs()
  mesh = sharding.make_mesh()
  sharding.check_batch(config.preference.batch_size, mesh, section="preference")
  return Prepared(config, mesh, pipeline_lib.load_pipeline(config.model.path))


def run(prepared: Prepared, workdir: Path) -> Path:
  """Trains what is not trained yet; returns the model's directory.

  Raises:
    UserError: the checkpoints in the workdir were trained on other pairs or from other weights.
  """
  config, mesh, pipeline = prepared.config, prepared.mesh, prepared.pipeline
  settings, size = config.preference, config.pairs.image_size
  pairs = read_pairs("train", config.pairs, config.seed, size=size)
  (tokenizer,) = pipeline.tokenizers
  (encoder,) = pipeline.family.tokenizers(pipeline.family.parts)
  model = {
    "image_size": size,
    "channels": list(config.model.channels),
    "width": config.model.width,
    "text_config": pipeline.configs[encoder],
  }
  towers = preference_towers.build_towers(model)
  begins = train_preference.init_params(
    towers, jax.random.key(config.seed), encoder=pipeline.params[encoder]
  )
  tx = fit.make_optimizer(
    settings, weight_decay=settings.weight_decay, clip_norm=settings.clip_norm
  )
  state = fit.init_state(begins, tx, mesh)
  step = train_preference.make_preference_step(
    towers, tx, contrast=settings.contrast, ema_decay=settings.ema_decay
  )
  ids = text.tokenize([tokenizer], pairs.captions)[0]
  identity = {"pairs": _fingerprint(pairs), "first": pipeline_lib.fingerprint(begins)}

  def update(state, rows):
    return step(
      state, *sharding.place_batch((pairs.preferred[rows], pairs.other[rows], ids[rows]), mesh)
    )

  rows = len(ids)
  state = fit.run_updates(
    config, settings, workdir / "preference", state, update, rows, identity, purpose=3
  )
  target = workdir / "model"
  _export(target, state.ema["towers"], model, pipeline.path / "tokenizer")
  _write_card(target, config, rows)
  return target


def read_pairs(
  split: str, settings: ConfigDict, seed: int, *, size: int = render.SIZE
) -> Pairs:
  """Reads the pairs of a split that are not ties; generates them on first use.

  Args:
    split: 'train' or 'test'.
    settings: the configuration's section `pairs`.
    seed: of the pairs.
    size: to which the images are resized as the scorer does, in pixels.
  """
  table = builder.load_preferences(
    split, num_train=settings.num_train, num_test=settings.num_test, seed=seed
  )
  preferred, other, captions = [], [], []
  for i in range(len(table)):
    row = table[i]
    if row["label_0"] == 0.5:
      continue
    files = (io.BytesIO(row[f"jpg_{k}"]) for k in (0, 1))
    first, second = (
      pixels.prepare(np.asarray(Image.open(file)), preference_scores.VARIANT, size)
      for file in files
    )
    good, bad = (first, second) if row["label_0"] == 1.0 else (second, first)
    preferred.append(good)
    other.append(bad)
    captions.append(row["caption"].decode())
  return Pairs(np.stack(preferred), np.stack(other), captions)


def _fingerprint(pairs: Pairs) -> str:
  digest = hashlib.sha256("\n".join(pairs.captions).encode())
  for images in (pairs.preferred, pairs.other):
    digest.update(np.ascontiguousarray(images).data)
  return digest.hexdigest()[:16]


def _export(target: Path, params: Any, model: Any, tokenizer: Path) -> None:
  """Writes configuration, weights in float16 and the tokenizer's files."""
  shutil.copytree(tokenizer, target, dirs_exist_ok=True)
  save.save_tensors(
    target / "model.safetensors", torch_layout.export_tensors(params, np.float16)
  )
  text_of = json.dumps(model, indent=2, sort_keys=True) + "\n"
  (target / "config.json").write_text(text_of, encoding="utf-8")


def accuracies(
  model: preference_scores.Preference, pairs: Pairs
) -> dict[str, tuple[float, int]]:
  """Computes how often a model ranks held-out pairs as others do.

  Args:
    model: with parameters on the devices.
    pairs: of held-out prompts.

  Returns:
    By judge, the accuracy and the number of pairs: the 'annotator' and, on the pairs of which
    exactly one image shows what the prompt asks for, the 'verifier'.
  """
  good, bad = (
    preference_scores.score(model, images, pairs.captions)
    for images in (pairs.preferred, pairs.other)
  )
  right = [
    np.array([verifier.is_correct(x, c) for x, c in zip(of, pairs.captions, strict=True)])
    for of in (pairs.preferred, pairs.other)
  ]
  differ = right[0] != right[1]
  agrees = (good > bad) == right[0]
  return {
    "annotator": (float((good > bad).mean()), len(good)),
    "verifier": (float(agrees[differ].mean()), int(differ.sum())),
  }


def _write_card(target: Path, config: ConfigDict, rows: int) -> None:
  """Writes README.md, with the accuracy on held-out pairs."""
  pairs = read_pairs("test", config.pairs, config.seed)
  model = batches.on_devices(preference_scores.read_preference(target))
  found = accuracies(model, pairs)
  by_annotator, by_verifier = (found[judge] for judge in ("annotator", "verifier"))
  settings = config.preference
  size = (target / "model.safetensors").stat().st_size / 1e6
  made = f"jaxpref {__version__}, jax {jax.__version__}, {platform.machine()} "
  made += jax.default_backend()
  card = f"""# The shapes world's preference model

The scorer `shapes.preference`: an image tower and a text tower, {size:.1f} MB in float16. Their
cosine, scaled, rates an image for a caption of `jaxpref.shapes.prompts`. The difference of two
scores is the logit of the probability that the simulated annotator prefers the first image.

It is a learned reward, with the flaws of one: it can be exploited, and `shapes.correct`, the
exact verifier, shows by how much.

| judge | pairs of held-out prompts | agreement |
|---|---|---|
| the annotator's choice, without ties | {by_annotator[1]} | {100 * by_annotator[0]:.1f} % |
| the verifier, where one image is right | {by_verifier[1]} | {100 * by_verifier[0]:.1f} % |

The annotator's choices are random; see `jaxpref.shapes.annotator`.

How it was made:

    python -m jaxpref.pretrain --config=configs/shapes_preference.py:{config.preset} \\
      --config.seed={config.seed} --config.preference.num_updates={settings.num_updates}

| | |
|---|---|
| pairs | {rows} of the annotator's, of {config.pairs.num_train} with ties |
| loss | pairwise log-sigmoid, and {settings.contrast:g} times CLIP's on the preferred images |
| training | {settings.num_updates} updates of {settings.batch_size} pairs |
| text tower | begins as the text encoder of `{config.model.path}` |
| made with | {made} |

It contains no person, photograph or text of others; the weights may be used freely.
"""
  workdir_lib.write_text(target / "README.md", card)
