"""The base corpus: flawed images with captions, rendered once and stored on disk."""

import hashlib
import inspect
import json
from pathlib import Path

import numpy as np
from PIL import Image

from jaxpref.runtime import progress
from jaxpref.shapes import flaws, palette, prompts, render


def build_corpus(
  directory: Path, *, num_images: int, size: int, seed: int
) -> tuple[np.ndarray, list[str]]:
  """Builds the corpus, or opens it if `directory` has it already.

  Args:
    directory: where the corpus is stored; created if it does not exist.
    num_images: number of images; image i depends only on (seed, i).
    size: height and width in pixels, a divisor of the renderer's 64, which are averaged.
    seed: seed of prompts, scenes and flaws.

  Returns:
    Images, uint8 [N, size, size, 3], memory-mapped, and their training captions.
  """
  stem = directory / f"corpus-{num_images}-{size}-{seed}-{_fingerprint()}"
  pixels, texts = stem.with_suffix(".npy"), stem.with_suffix(".json")
  if not texts.exists():  # written last
    directory.mkdir(parents=True, exist_ok=True)
    partial = stem.with_suffix(".partial.npy")
    images = np.lib.format.open_memmap(partial, "w+", np.uint8, (num_images, size, size, 3))
    captions = []
    for i in progress.progress_bar(range(num_images), desc="render the corpus", unit="image"):
      rng = np.random.default_rng([seed, i])
      spec = prompts.draw_prompt(rng, "train")
      image, _ = flaws.corpus_image(spec, rng)
      images[i] = np.asarray(Image.fromarray(image).reduce(render.SIZE // size))
      captions.append(prompts.caption(spec))
    images.flush()
    partial.replace(pixels)
    temporary = texts.with_suffix(".tmp")
    temporary.write_text(json.dumps(captions), encoding="utf-8")
    temporary.replace(texts)
  return np.load(pixels, mmap_mode="r"), json.loads(texts.read_text(encoding="utf-8"))


def _fingerprint() -> str:
  """Returns a digest of the rendering code, so that a corpus of older code is not reused."""
  source = "".join(inspect.getsource(m) for m in (flaws, palette, prompts, render))
  return hashlib.sha256(source.encode()).hexdigest()[:8]
