"""Writes scores.json: scores of PyTorch originals on the models of `scorer_models`.

  cd tests && PYTHONPATH=. python golden/make_scorers.py

Needs torch, torchvision and open_clip_torch. Images go through torchvision's own transforms or
transformers' image processor.
"""

import importlib.metadata
import json
import os
import tempfile
from pathlib import Path

import torch

# PyPI's torchvision is built for CUDA. Beside a CPU build of torch it can be imported
# once these operators are declared.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
  _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import scorer_models  # noqa: E402
import scorer_witness  # noqa: E402
import test_scorers  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision import transforms  # noqa: E402
from torchvision.transforms import InterpolationMode  # noqa: E402
from torchvision.transforms.v2 import functional  # noqa: E402

TARGET = Path(__file__).parent / "scorers" / "scores.json"
PACKAGES = ("torch", "torchvision", "transformers", "open_clip_torch")


def resize_and_crop(image, variant):
  """Returns what torchvision's transforms give, float [3, 224, 224]."""
  crop = transforms.CenterCrop(224)
  if variant == "pil":
    resize = transforms.Resize(224, interpolation=InterpolationMode.BICUBIC)
    return transforms.ToTensor()(crop(resize(Image.fromarray(image))))
  pixels = transforms.ToTensor()(Image.fromarray(image))
  antialias = variant == "tensor_aa"
  return crop(
    functional.resize(
      pixels, [224], interpolation=InterpolationMode.BICUBIC, antialias=antialias
    )
  )


def main() -> None:
  """Writes the file."""
  scorer_witness.resize_and_crop = resize_and_crop
  with tempfile.TemporaryDirectory() as directory:
    root = Path(directory)
    os.environ["JAXPREF_SCORERS"] = str(root)
    scorer_models.write_all(root)
    scores = {
      name: test_scorers.witness(name, root, scorer_models.photographs()).tolist()
      for name in test_scorers.SCORERS
    }
    own = root / "open_clip"
    words = scorer_models.write_tokenizer(own)
    values = [scorer_witness.pixel_values(i, "tensor_aa") for i in scorer_models.photographs()]
    ids = scorer_witness.token_ids(own, scorer_models.PROMPTS, "ftfy", padding="max_length")
    found = scorer_witness.open_clip_scores(words, torch.stack(values), ids)
    scores["open_clip"] = found.tolist()
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  rows = [
    f"  {json.dumps(k)}: {json.dumps([round(x, 7) for x in v])}" for k, v in scores.items()
  ]
  text = f'{{\n "versions": {json.dumps(versions)},\n "scores": {{\n' + ",\n".join(rows)
  TARGET.write_text(text + "\n }\n}\n")


if __name__ == "__main__":
  main()
