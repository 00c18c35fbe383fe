"""Valid inputs of jaxpref's readers for the fuzzer, a few small files each."""

import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pyarrow as pa
from fuzz_damage import SIZE, to_parquet
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import CLIPTokenizerFast

from jaxpref import config as config_lib
from jaxpref.data import build, generated_pairs
from jaxpref.evaluation import best_checkpoint, diversity, image_files, score_rows, statistics
from jaxpref.models import pipeline, text
from jaxpref.runtime import checkpoint, metrics
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.training import iterate_report

TEXTS = ["a red circle", "it’s 2 small BLUE squares!", "&amp; ﬁ 東京"]

Files = dict[str, Any]  # name to bytes, or to PIPE or DIRECTORY
PIPE, DIRECTORY = "pipe", "directory"


def _picture(rng: np.random.Generator, kind: str, mode: str = "RGB") -> bytes:
  stream = io.BytesIO()
  pixels = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
  Image.fromarray(pixels).convert(mode).save(stream, kind)
  return stream.getvalue()


def write(directory: Path, files: Files) -> None:
  """Writes files by name; PIPE and DIRECTORY make these."""
  for name, content in files.items():
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content == PIPE:
      os.mkfifo(path)
    elif content == DIRECTORY:
      path.mkdir()
    else:
      path.write_bytes(content)


def read_all(directory: Path) -> Files:
  """Reads all regular files of a directory, by name."""
  return {
    p.relative_to(directory).as_posix(): p.read_bytes()
    for p in sorted(directory.rglob("*"))
    if p.is_file()
  }


def copy(directory: Path, tiny: Path) -> None:
  """Copies a whole pipeline."""
  shutil.copytree(tiny, directory, dirs_exist_ok=True)


def make_weights(directory: Path, tiny: Path) -> None:
  """Copies the VAE."""
  shutil.copytree(tiny / "vae", directory / "vae")


def make_shards(directory: Path, tiny: Path) -> None:
  """Splits the VAE's weights into two files with an index."""
  part = directory / "vae"
  part.mkdir()
  shutil.copy(tiny / "vae" / "config.json", part)
  places: dict[str, str] = {}
  names = sorted(tensors := load_file(tiny / "vae" / "diffusion_pytorch_model.safetensors"))
  for i in range(3):
    file = f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors"
    save_file({name: tensors[name] for name in names[i::3]}, part / file)
    places |= dict.fromkeys(names[i::3], file)
  index = {"metadata": {"total_size": 1}, "weight_map": places}
  file = "diffusion_pytorch_model.safetensors.index.json"
  (part / file).write_text(json.dumps(index), encoding="utf-8")


def make_tokenizer(directory: Path, tiny: Path) -> None:
  """Copies the tokenizer as vocabulary and merges."""
  shutil.copytree(tiny / "tokenizer", directory / "tokenizer")
  marks = {"bos_token": text.START, "eos_token": text.END}
  marks |= {"unk_token": text.END, "pad_token": text.END}
  file = directory / "tokenizer" / "special_tokens_map.json"
  file.write_text(json.dumps(marks), encoding="utf-8")
  (directory / "tokenizer" / "added_tokens.json").write_text("{}", encoding="utf-8")


def make_fast_tokenizer(directory: Path, tiny: Path) -> None:
  """Saves the tokenizer as `tokenizer.json`."""
  fast = CLIPTokenizerFast.from_pretrained(str(tiny / "tokenizer"), local_files_only=True)
  fast.save_pretrained(str(directory / "tokenizer"))
  for name in ("vocab.json", "merges.txt"):
    (directory / "tokenizer" / name).unlink(missing_ok=True)
  Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))


def make_image(kind: str, directory: Path, tiny: Path) -> None:
  """Makes an image of a kind such as 'PNG'."""
  del tiny
  rng = np.random.default_rng(0)
  (directory / "image").write_bytes(_picture(rng, kind))


def make_folder(directory: Path, tiny: Path) -> None:
  """Makes a folder of images with captions and pairs."""
  del tiny
  rng = np.random.default_rng(0)
  files: Files = {}
  for i in range(3):
    files |= {f"{i}.png": _picture(rng, "PNG"), f"{i}.txt": f"image {i}".encode()}
  files |= {"a_w.png": _picture(rng, "PNG"), "a_l.png": _picture(rng, "PNG"), "a.txt": b"an a"}
  files |= {"1/b.jpg": _picture(rng, "JPEG"), "1/caption.txt": "große Fläche\n".encode()}
  write(directory, files)


def make_metadata(ending: str, directory: Path, tiny: Path) -> None:
  """Makes a folder whose captions are in `metadata.<ending>`."""
  del tiny
  rng = np.random.default_rng(0)
  names = [f"{i}.png" for i in range(4)]
  captions = [f"an image, number {i}" for i in range(4)]
  table = pa.table({"file_name": names, "text": captions})
  content = {
    "jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in table.to_pylist()),
    "csv": table.to_pandas().to_csv(index=False).encode(),
    "parquet": to_parquet(table),
  }[ending]
  write(directory, {n: _picture(rng, "PNG") for n in names} | {f"metadata.{ending}": content})


def make_pickapic(directory: Path, tiny: Path) -> None:
  """Makes a parquet file with Pick-a-Pic's columns."""
  del tiny
  rng = np.random.default_rng(0)
  n = 6
  columns: dict[str, Any] = {"caption": [f"prompt {i // 2}" for i in range(n)]}
  for k in (0, 1):
    columns |= {
      f"jpg_{k}": [_picture(rng, "BMP") for _ in range(n)],
      f"label_{k}": [float((i + k) % 2) for i in range(n)],
      f"score_{k}": rng.random(n).tolist(),
      f"image_{k}_uid": [f"{k}-{i}" for i in range(n)],
    }
  columns["ranking_id"] = list(range(n))
  (directory / "rows.parquet").write_bytes(to_parquet(pa.table(columns)))


def make_built(directory: Path, tiny: Path) -> None:
  """Makes a built data set of the rows of `make_pickapic`."""
  with tempfile.TemporaryDirectory() as folder:
    make_pickapic(Path(folder), tiny)
    plan = build.Plan("pickapic", folder, table="pairs", rows_per_shard=3)
    build.build(plan, directory, processes=1)


def make_online(directory: Path, tiny: Path) -> None:
  """Makes the generated pairs of an iteration."""
  del tiny
  rng = np.random.default_rng(0)

  def row(i: int) -> dict[str, Any]:
    values: dict[str, Any] = {"caption": f"prompt {i}", "has_label": True, "ranking_id": i}
    values |= dict.fromkeys(("change", "guidance", "text_guidance", "image_guidance"), 1.0)
    values |= {"num_steps": 2, "improve_steps": 0}
    for k in (0, 1):
      values |= {f"image_{k}_uid": f"{i}-{k}", f"jpg_{k}": _picture(rng, "BMP")}
      values |= {f"label_{k}": float(1 - k), f"model_{k}": "data", f"seed_{k}": -1}
    return values

  generated_pairs.write_shard(directory, 0, 1, [row(i) for i in range(3)])
  generated_pairs.finish(directory, [3], description="Three pairs.")


def tiny_config(tiny: Path) -> Any:
  """Returns the configuration of a tiny run on a pipeline."""
  config = config_lib.load_config("dro:tiny")
  with config.unlocked():
    config.model.path = str(tiny)
  return config


def scores_of_images(rng: np.random.Generator) -> pd.DataFrame:
  """Returns random scores of four images of two models."""
  frame = pd.DataFrame(
    [
      {"model": m, "prompt_id": i, "seed": i, "category": "c", "scorer": "s", "version": "1"}
      | {"score": float(rng.random()), "prompt": f"prompt {i}"}
      for m in ("base", "tuned")
      for i in range(4)
    ]
  )
  return frame.reindex(columns=[*score_rows.COLUMNS])


def make_scores(ending: str, directory: Path, tiny: Path) -> None:
  """Writes scores of another judge as parquet, csv or jsonl."""
  frame = scores_of_images(np.random.default_rng(0)).assign(scorer="judge")
  file = directory / f"scores.{ending}"
  if ending == "parquet":
    frame.to_parquet(file)
  elif ending == "csv":
    frame.to_csv(file, index=False)
  else:
    frame.to_json(file, orient="records", lines=True)


def make_workdir(directory: Path, tiny: Path) -> None:
  """Writes the files of a run's workdir that readers need."""
  config = tiny_config(tiny)
  workdir_lib.write_config(directory, config)
  workdir_lib.add_start(directory, {"after_update": 0})
  with contextlib.closing(metrics.MetricWriter(directory, total_updates=2)) as writer:
    for step in (1, 2):
      writer.write(step, {"loss": 1 / step, "rewards/margin": 0.5})
  made = directory / "evaluation" / "2"
  rng = np.random.default_rng(0)
  frame = scores_of_images(rng)
  score_rows.write_rows(made / "scores.parquet", frame)
  statistics.write_results(made / "results.json", statistics.compare(frame))
  pairs = frame.assign(prompt=(frame["seed"] // 2).astype(str))  # two images of a prompt
  features = np.random.default_rng(1).random((len(frame), 3))
  spread = diversity.compare_diversity(features, pairs, name="pixels", baseline="base")
  workdir_lib.write_json(made / "diversity.json", spread)
  scores = {"s-1": {"base": 0.1, "tuned": 0.2}}
  example = {"prompt": "prompt 0", "category": "c", "seed": 0, "scores": scores}
  workdir_lib.write_json(made / "examples.json", [example])
  for model in ("base", "tuned"):
    workdir_lib.write_bytes(made / "images" / model / "00000000.png", _picture(rng, "PNG"))
  best_checkpoint.write_settings(made, {"scorers": ["s"]})
  best_checkpoint.write(directory, best_checkpoint.Best(2, "s-1", 0.5))
  workdir_lib.write_json(directory / "inputs.json", {"base": "1", "start": "", "data": "2"})
  for name in ("pairs", "iterations"):
    workdir_lib.write_json(directory / name / "1" / iterate_report.PHASES, {"generate": 1.0})


def make_checkpoint(directory: Path, tiny: Path) -> None:
  """Makes a workdir with a checkpoint."""
  loaded = pipeline.load_pipeline(str(tiny))
  workdir_lib.write_config(directory, tiny_config(tiny))
  params = jax.tree.map(jax.numpy.asarray, loaded.params["unet"])
  ckptr = checkpoint.Checkpointer(directory / "checkpoints", keep=2)
  ckptr.save(2, {"params": params, "ema": params}, None, {"pipeline": loaded.digest})
  ckptr.close()


def make_prompts(directory: Path, tiny: Path) -> None:
  """Makes a file of prompts."""
  del tiny
  (directory / "prompts.txt").write_text("\n".join(TEXTS) + "\n\nlast one", "utf-8")


SETTINGS = {
  **{"model": "shapes", "weights": "1", "negative": "", "guidance": 2.0, "steps": 3},
  **{"solver": "ddim", "order": 2, "size": [SIZE, SIZE], "decode": "whole"},
  **{"dtype": "float32", "prompt": "a red circle", "seed": 0},
}


def make_generated(directory: Path, tiny: Path) -> None:
  """Makes a generated image with its settings."""
  del tiny
  pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
  (directory / "image.png").write_bytes(image_files.to_png(pixels, SETTINGS))


def make_arguments(arguments: list[str], directory: Path, tiny: Path) -> None:
  """Makes a command line."""
  del tiny
  (directory / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
