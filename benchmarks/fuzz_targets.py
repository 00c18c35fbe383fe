"""Inputs of jaxpref's readers for the fuzzer: small valid ones, and ways to damage them.

A target is a reader with a valid input, a few small files. An input of the fuzzer is the valid
one with one or two damaged files. It depends only on seed, target and number.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import io
import json
import os
import random
import shutil
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import CLIPTokenizerFast

from jaxpref import config as config_lib
from jaxpref import export, generate, main
from jaxpref.data import generated_pairs, images, prompt_files
from jaxpref.data import rows as rows_lib
from jaxpref.data.bad_rows import BadRow
from jaxpref.errors import UserError, one_line
from jaxpref.evaluation import best_checkpoint, evaluate, statistics
from jaxpref.models import convert, hub, pipeline, text, weights
from jaxpref.plan import estimate
from jaxpref.pretrain import run as pretrain
from jaxpref.runtime import checkpoint, cli, metrics
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.training import iterate, iterate_report, load_run

LONGEST = 750  # maximum characters of a refusal, without the program's name
SECONDS = 8.0  # time limit per input
_SIZE = 8  # pixels of images
_TEXTS = ["a red circle", "it’s 2 small BLUE squares!", "&amp; ﬁ 東京"]

Files = dict[str, Any]  # name to bytes, or to PIPE or DIRECTORY
PIPE, DIRECTORY = "pipe", "directory"


@dataclasses.dataclass(frozen=True)
class Target:
  """A reader with a valid input.

  Attributes:
    name: for the table.
    make: writes the valid input; takes an empty directory and a pipeline's directory.
    read: reads a directory and returns a value to compare; raises `UserError`, or `BadRow` for
      a single row.
    damage: ways to damage a file's content; each input uses one of them.
    files: patterns of the names of files to damage.
    exact: whether checksums ensure that the reader returns what was written.
    weight: relative number of inputs.
  """

  name: str
  make: Callable[[Path, Path], None]
  read: Callable[[Path], Any]
  damage: tuple[Callable[[random.Random, bytes], bytes], ...]
  files: tuple[str, ...] = ("*",)
  exact: bool = False
  weight: int = 4


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The outcome of an input: 'equal', 'other', 'refused', 'traceback', 'hang' or 'silent'.

  `text` is the refusal's line, or the error's type and place. 'silent' means that a damaged
  file was read as something else although it has checksums.
  """

  kind: str
  text: str = ""


class _Late(BaseException):
  """Raised in a reader that takes too long; no `except Exception` stops it."""


# Damage to bytes.


def flip(rng: random.Random, data: bytes) -> bytes:
  """Flips one to four bits."""
  out = bytearray(data or b"\0")
  for _ in range(rng.choice((1, 1, 1, 4))):
    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
  return bytes(out)


def flip_early(rng: random.Random, data: bytes) -> bytes:
  """Changes a byte of the first hundred, where headers are."""
  out = bytearray(data or b"\0")
  out[rng.randrange(min(100, len(out)))] = rng.choice((0, 0xFF, 0x7F, 0x80, rng.randrange(256)))
  return bytes(out)


def cut(rng: random.Random, data: bytes) -> bytes:
  """Cuts the end off."""
  return data[: rng.randrange(len(data) + 1)]


def repeat(rng: random.Random, data: bytes) -> bytes:
  """Repeats a part of the data."""
  i, j = sorted(rng.randrange(len(data) + 1) for _ in "ij")
  return data[:j] + data[i:j] * rng.choice((1, 1, 2)) + data[j:]


def splice(rng: random.Random, data: bytes) -> bytes:
  """Overwrites a part with another part."""
  if len(data) < 2:
    return data * 2
  size = rng.randrange(1, len(data))
  i, j = (rng.randrange(len(data) - size + 1) for _ in "ij")
  return data[:j] + data[i : i + size] + data[j + size :]


def insert(rng: random.Random, data: bytes) -> bytes:
  """Inserts a few bytes that are difficult for parsers."""
  i = rng.randrange(len(data) + 1)
  odd = (b"\0", b"\xff\xfe", b"\x1b[2J", "\u202e".encode(), b"\n\n", b"{" * 3000, b"9" * 5000)
  return data[:i] + rng.choice(odd) + data[i:]


BYTES = (flip, flip, flip_early, cut, repeat, splice, insert)

# Damage to values in JSON.


@functools.cache
def _json_values() -> tuple[Any, ...]:
  """Returns JSON values of any shape, the same each time."""
  found: list[Any] = []
  leaves = (
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.text()
  )
  trees = strategies.recursive(
    leaves,
    lambda inner: (
      strategies.lists(inner, max_size=4)
      | strategies.dictionaries(strategies.text(max_size=8), inner, max_size=4)
    ),
  )

  @hypothesis.seed(0)
  @hypothesis.settings(
    max_examples=300,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(trees)
  def collect(value):
    found.append(value)

  collect()
  return tuple(found)


_ABSURD: tuple[Any, ...] = (
  *(0, 1, -1, 3, 10**9, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e-30, 1e308, float("nan")),
  *(float("inf"), "", "\0", "\x1b[31m", "a" * 5000, "../..", "/dev/zero", True, None, [], {}),
  *([[]], [1, [2]], ["x"], [1e9] * 3, [None], {"a": {"b": 1}}, [0] * 2000),
)


def edit_json(rng: random.Random, data: bytes) -> bytes:
  """Replaces, removes, renames or wraps a value anywhere in a JSON tree."""
  try:
    tree = json.loads(data)
  except (ValueError, RecursionError):  # damaged already
    return flip(rng, data)
  places: list[tuple[Any, Any]] = []

  def visit(node: Any) -> None:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
      places.append((node, key))
      if isinstance(value, dict | list):
        visit(value)

  root = [tree]
  visit(root)
  # Most values of a large file are similar, so its upper levels are as likely as all the rest.
  upper = places[: max(1, min(30, len(places)))]
  node, key = rng.choice(rng.choice((places, upper)))
  match rng.choice(("absurd", "absurd", "any", "remove", "wrap", "rename", "swap", "deep")):
    case "absurd":
      node[key] = rng.choice(_ABSURD)
    case "any":
      node[key] = rng.choice(_json_values())
    case "remove":
      if node is not root:
        del node[key]
    case "wrap":
      node[key] = rng.choice(([node[key]], {"x": node[key]}, str(node[key])))
    case "rename":
      if isinstance(node, dict):
        node[rng.choice((str(key) + "_", "", str(key).upper(), "x" * 3000))] = node.pop(key)
    case "swap":
      other, place = rng.choice(places)
      node[key] = json.loads(json.dumps(other[place]))
    case "deep":
      node[key] = "DEEP"
      deep = "[" * 100_000 + "]" * 100_000
      return json.dumps(root[0]).replace('"DEEP"', deep).encode()
  return json.dumps(root[0]).encode() if root else b""


def edit_line(rng: random.Random, data: bytes) -> bytes:
  """Edits, repeats, removes or moves a line."""
  lines = data.splitlines(keepends=True) or [b""]
  i = rng.randrange(len(lines))
  match rng.choice(("edit", "edit", "edit", "repeat", "remove", "move", "join")):
    case "edit":
      ways = (edit_json, flip, insert, cut)
      lines[i] = rng.choice(ways)(rng, lines[i].rstrip(b"\n")) + b"\n"
    case "repeat":
      lines.insert(i, lines[i])
    case "remove":
      del lines[i]
    case "move":
      lines.insert(rng.randrange(len(lines)), lines.pop(i))
    case "join":
      lines[i] = lines[i].rstrip(b"\n")
  return b"".join(lines)


JSON = (*(edit_json,) * 5, flip, cut, insert)
LINES = (*(edit_line,) * 5, flip, cut, insert)

# Damage to columns of parquet.


def _columns(n: int) -> tuple[Callable[[], pa.Array], ...]:
  """Returns makers of columns with n rows, of every kind of type."""
  odd = [b"\xff\xfe", b"", None, b"\x1b[2J"]
  return (
    lambda: pa.nulls(n),
    lambda: pa.array([None] * n, pa.string()),
    lambda: pa.array(["x"] * n),
    lambda: pa.array(["x" * 200_000] * n),
    lambda: pa.array(["1"] * n, pa.string_view()),
    lambda: pa.array([odd[i % 4] for i in range(n)], pa.binary()),
    lambda: pa.array([b"12"] * n, pa.binary(2)),
    lambda: pa.array(range(n), pa.int8()),
    lambda: pa.array([2**64 - 1] * n, pa.uint64()),
    lambda: pa.array([float("nan")] * n),
    lambda: pa.array([float("inf"), -1e308] * n)[:n],
    lambda: pa.array(np.zeros(n, np.float16)),
    lambda: pa.array([True] * n),
    lambda: pa.array([[1, 2]] * n),
    lambda: pa.array([[b"a"]] * n),
    lambda: pa.array([{"bytes": b"a", "path": "../../etc/passwd"}] * n),
    lambda: pa.array([{"bytes": None, "path": "x.png"}] * n),
    lambda: pa.array([{"bytes": None, "path": None}, None] * n)[:n],
    lambda: pa.array([{"a": 1}] * n),
    lambda: pa.array([[("k", 1)]] * n, pa.map_(pa.string(), pa.int64())),
    lambda: pa.array([0] * n, pa.timestamp("ns")),
    lambda: pa.array([0] * n, pa.date32()),
    lambda: pa.array([0] * n, pa.duration("s")),
    lambda: pa.array(["a"] * n).dictionary_encode(),
    lambda: pa.array([None] * n, pa.decimal128(20, 3)),
  )


def edit_column(rng: random.Random, data: bytes) -> bytes:
  """Replaces a column, sets a value to null, or removes, renames or repeats a column."""
  table = pq.read_table(io.BytesIO(data))
  i, n = rng.randrange(table.num_columns), table.num_rows
  name = table.column_names[i]
  match rng.choice(("type", "type", "type", "null", "remove", "rename", "twice", "none")):
    case "type":
      table = table.set_column(i, name, rng.choice(_columns(n))())
    case "null":
      values = table.column(i).to_pylist()
      values[rng.randrange(n)] = None
      table = table.set_column(i, name, pa.array(values, table.schema.field(i).type))
    case "remove":
      table = table.remove_column(i)
    case "rename":
      names = list(table.column_names)
      names[i] = rng.choice((name.upper(), "", "\x1b[31m", names[0], "x" * 3000))
      table = table.rename_columns(names)
    case "twice":
      table = table.append_column(name, table.column(i))
    case "none":
      table = table.slice(0, 0)
  return _parquet(table)


def _parquet(table: pa.Table) -> bytes:
  stream = io.BytesIO()
  pq.write_table(table, stream, write_page_checksum=True, compression="none")
  return stream.getvalue()


def flip_in_page(rng: random.Random, data: bytes) -> bytes:
  """Flips a bit of an image in a page with a checksum."""
  start = rng.choice([i for i in range(len(data)) if data.startswith(b"BM", i)])
  out = bytearray(data)
  out[start + rng.randrange(_SIZE * _SIZE * 3)] ^= 1 << rng.randrange(8)
  return bytes(out)


# Damage to command lines, which are JSON lists of arguments.

_WORDS = (
  *("", "0", "-1", "1e308", "nan", "inf", "9" * 400, "9" * 5000, "[]", "()", "(1,2)", "None"),
  *("true", "\x1b[31m", "\u202e", "é" * 300, "..", "~nobody", "{}", "/dev/null", "--help"),
  *("a" * 5000, "(" * 300, "-" * 9000 + "1", "['a'," * 50, "=", "--", "\ud800", "1_000"),
  *("0x10", "--config", "--config.", "--config.x.y=1", "--config.train=3", "-h", "--seed"),
)


def edit_arguments(rng: random.Random, data: bytes) -> bytes:
  """Changes a value, or removes, repeats, moves, splits or joins arguments."""
  arguments = json.loads(data)
  i = rng.randrange(len(arguments))
  name, equals, value = arguments[i].partition("=")
  match rng.choice(("value", "value", "value", "word", "remove", "name", "split", "edit")):
    case "value":
      arguments[i] = f"{name}={rng.choice(_WORDS)}"
    case "word":
      arguments.insert(i, rng.choice(_WORDS))
    case "remove":
      del arguments[i]
    case "name":
      changed = flip(rng, name.encode())
      arguments[i] = f"{changed.decode(errors='surrogateescape')}{equals}{value}"
    case "split":
      arguments[i : i + 1] = [name, value]
    case "edit":
      changed = rng.choice(BYTES)(rng, arguments[i].encode("utf-8", "replace"))
      arguments[i] = changed.decode(errors="surrogateescape")
  return json.dumps(arguments).encode()


# Valid inputs.


def _picture(rng: np.random.Generator, kind: str, mode: str = "RGB") -> bytes:
  stream = io.BytesIO()
  pixels = rng.integers(0, 256, (_SIZE, _SIZE, 3), np.uint8)
  Image.fromarray(pixels).convert(mode).save(stream, kind)
  return stream.getvalue()


def _write(directory: Path, files: Files) -> None:
  for name, content in files.items():
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content == PIPE:
      os.mkfifo(path)
    elif content == DIRECTORY:
      path.mkdir()
    else:
      path.write_bytes(content)


def _read_all(directory: Path) -> Files:
  return {
    p.relative_to(directory).as_posix(): p.read_bytes()
    for p in sorted(directory.rglob("*"))
    if p.is_file()
  }


def _copy(directory: Path, tiny: Path) -> None:
  shutil.copytree(tiny, directory, dirs_exist_ok=True)


def _make_weights(directory: Path, tiny: Path) -> None:
  shutil.copytree(tiny / "vae", directory / "vae")


def _make_shards(directory: Path, tiny: Path) -> None:
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


def _make_tokenizer(directory: Path, tiny: Path) -> None:
  shutil.copytree(tiny / "tokenizer", directory / "tokenizer")
  marks = {"bos_token": text.START, "eos_token": text.END}
  marks |= {"unk_token": text.END, "pad_token": text.END}
  file = directory / "tokenizer" / "special_tokens_map.json"
  file.write_text(json.dumps(marks), encoding="utf-8")
  (directory / "tokenizer" / "added_tokens.json").write_text("{}", encoding="utf-8")


def _make_fast_tokenizer(directory: Path, tiny: Path) -> None:
  fast = CLIPTokenizerFast.from_pretrained(str(tiny / "tokenizer"), local_files_only=True)
  fast.save_pretrained(str(directory / "tokenizer"))
  for name in ("vocab.json", "merges.txt"):
    (directory / "tokenizer" / name).unlink(missing_ok=True)
  Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))


def _make_image(kind: str, directory: Path, tiny: Path) -> None:
  del tiny
  rng = np.random.default_rng(0)
  (directory / "image").write_bytes(_picture(rng, kind))


def _make_folder(directory: Path, tiny: Path) -> None:
  del tiny
  rng = np.random.default_rng(0)
  files: Files = {}
  for i in range(3):
    files |= {f"{i}.png": _picture(rng, "PNG"), f"{i}.txt": f"image {i}".encode()}
  files |= {"a_w.png": _picture(rng, "PNG"), "a_l.png": _picture(rng, "PNG"), "a.txt": b"an a"}
  files |= {"1/b.jpg": _picture(rng, "JPEG"), "1/caption.txt": "große Fläche\n".encode()}
  _write(directory, files)


def _make_metadata(ending: str, directory: Path, tiny: Path) -> None:
  del tiny
  rng = np.random.default_rng(0)
  names = [f"{i}.png" for i in range(4)]
  captions = [f"an image, number {i}" for i in range(4)]
  table = pa.table({"file_name": names, "text": captions})
  content = {
    "jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in table.to_pylist()),
    "csv": table.to_pandas().to_csv(index=False).encode(),
    "parquet": _parquet(table),
  }[ending]
  _write(directory, {n: _picture(rng, "PNG") for n in names} | {f"metadata.{ending}": content})


def _make_pickapic(directory: Path, tiny: Path) -> None:
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
  (directory / "rows.parquet").write_bytes(_parquet(pa.table(columns)))


def _make_online(directory: Path, tiny: Path) -> None:
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


def _tiny_config(tiny: Path) -> Any:
  config = config_lib.load_config("dro:tiny")
  with config.unlocked():
    config.model.path = str(tiny)
  return config


def _make_workdir(directory: Path, tiny: Path) -> None:
  """Writes the files of a run's workdir that readers need."""
  config = _tiny_config(tiny)
  workdir_lib.write_config(directory, config)
  workdir_lib.add_start(directory, {"after_update": 0})
  with contextlib.closing(metrics.MetricWriter(directory, total_updates=2)) as writer:
    for step in (1, 2):
      writer.write(step, {"loss": 1 / step, "rewards/margin": 0.5})
  made = directory / "evaluation" / "2"
  rng = np.random.default_rng(0)
  frame = pd.DataFrame(
    [
      {"model": m, "prompt_id": i, "seed": i, "category": "c", "scorer": "s", "version": "1"}
      | {"score": float(rng.random()), "prompt": f"prompt {i}"}
      for m in ("base", "tuned")
      for i in range(4)
    ]
  )
  frame = frame.reindex(columns=[*statistics.COLUMNS])
  statistics.write_rows(made / "scores.parquet", frame)
  statistics.write_results(made / "results.json", statistics.compare(frame))
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


def _make_checkpoint(directory: Path, tiny: Path) -> None:
  loaded = pipeline.load_pipeline(str(tiny))
  workdir_lib.write_config(directory, _tiny_config(tiny))
  params = jax.tree.map(jax.numpy.asarray, loaded.params["unet"])
  ckptr = checkpoint.Checkpointer(directory / "checkpoints", keep=2)
  ckptr.save(2, {"params": params, "ema": params}, None, {"pipeline": loaded.digest})
  ckptr.close()


def _make_prompts(directory: Path, tiny: Path) -> None:
  del tiny
  (directory / "prompts.txt").write_text("\n".join(_TEXTS) + "\n\nlast one", "utf-8")


_SETTINGS = {
  **{"model": "shapes", "weights": "1", "negative": "", "guidance": 2.0, "steps": 3},
  **{"solver": "ddim", "order": 2, "size": [_SIZE, _SIZE], "decode": "whole"},
  **{"dtype": "float32", "prompt": "a red circle", "seed": 0},
}


def _make_generated(directory: Path, tiny: Path) -> None:
  del tiny
  pixels = np.zeros((_SIZE, _SIZE, 3), np.uint8)
  (directory / "image.png").write_bytes(generate.to_png(pixels, _SETTINGS))


def _make_arguments(arguments: list[str], directory: Path, tiny: Path) -> None:
  del tiny
  (directory / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")


# Readers; their results can be compared.


def _digest(*values: Any) -> str:
  digest = hashlib.sha256()
  for value in values:
    digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
  return digest.hexdigest()[:16]


def _read_weights(directory: Path) -> str:
  part = directory / "vae"
  shapes = _vae_shapes((part / "config.json").read_text(encoding="utf-8"))
  return convert.import_tensors(weights.open_part(part), shapes, where=str(part))[1]


@functools.cache
def _vae_shapes(config: str) -> Any:
  modules = pipeline.build_modules({"vae": json.loads(config)})
  return pipeline.abstract_params(modules["vae"])


def _describe(directory: Path) -> str:
  found = pipeline.describe_pipeline(str(directory))
  return _digest(found.modules, found.spacing, found.latent_shape, found.schedule)


def _load(directory: Path) -> str:
  return pipeline.load_pipeline(str(directory)).digest


def _read_tokenizer(directory: Path) -> str:
  tokenizer = text.load_tokenizer(directory / "tokenizer")
  return _digest(*text.tokenize([tokenizer], _TEXTS))


def _decode(directory: Path) -> str:
  pixels = images.decode(directory / "image")
  return _digest(pixels, images.decode((directory / "image").read_bytes(), _SIZE))


@functools.cache
def _data_config() -> Any:
  config = config_lib.load_config("dpo:tiny")
  return config.data.copy_and_resolve_references()


def _rows(directory: Path, source: str, *kinds: str) -> str:
  """Loads a data set as each of the kinds; refused if all of them are."""
  data = _data_config().copy_and_resolve_references()
  with data.unlocked():
    data.update(source=source, path=str(directory), num_rows=0, max_bad_share=0.5)
  found, refusals = [], []
  for kind in kinds:
    with data.unlocked():
      data.num_experts = 2 if kind == "experts" and source == "pickapic" else 0
    try:
      rows = rows_lib.load_rows(kind, data, image_size=_SIZE, seed=0)
      found.append(rows_lib.fingerprint(rows))
    except UserError as error:
      check_line(str(error))
      refusals.append(error)
  if not found:
    raise refusals[0]
  return _digest(*found)


def _read_rows(source: str, *kinds: str) -> Callable[[Path], str]:
  return lambda directory: _rows(directory, source, *kinds)


def _open_workdir(directory: Path) -> str:
  config = config_lib.load_config("dro:tiny")
  said: list[Any] = [load_run.prompt_prefix(str(directory))]
  said.append(load_run.setting(str(directory), "evaluate", "guidance", 1.0))
  with config.unlocked():
    config.model.path = json.loads((directory / "path").read_text(encoding="utf-8"))
  workdir_lib.release(workdir_lib.open_workdir(directory, config))
  return _digest(*said)


def _make_opened(directory: Path, tiny: Path) -> None:
  workdir_lib.write_config(directory, _tiny_config(tiny))
  workdir_lib.add_start(directory, {"after_update": 0})
  (directory / "path").write_text(json.dumps(str(tiny)), encoding="utf-8")


def _read_metrics(directory: Path) -> str:
  found = _digest(metrics.read_curves(directory))
  with mock.patch.object(metrics, "_open_tensorboard", return_value=None):
    metrics.MetricWriter(directory, total_updates=4, start_step=2).close()
  return found


def _read_records(directory: Path) -> str:
  """Reads what a resumed run reads of its workdir, except metrics and configuration."""
  workdir_lib.add_start(directory, {"after_update": 2})
  found = best_checkpoint.find(directory, {"scorers": ["s"]}, {2})
  prepared = types.SimpleNamespace(inputs={"base": "1", "start": "", "data": "2"})
  iterate._check_inputs(prepared, directory)
  return _digest(found, best_checkpoint.read(directory), iterate_report._phases(directory, 1))


def _read_evaluation(directory: Path) -> str:
  config = config_lib.load_config("dro:tiny")
  with contextlib.redirect_stdout(io.StringIO()):
    file = evaluate.write_report(
      *(directory, directory / "evaluation" / "2", config, {}), held_out=True
    )
  return _digest(file.read_bytes())


def _restore(directory: Path) -> str:
  return load_run.load(str(directory)).digest


def _read_prompts(directory: Path) -> str:
  file = str(directory / "prompts.txt")
  return _digest(generate.read_prompts(file), prompt_files.choose_prompts(file, 9, [], seed=0))


def _read_generated(directory: Path) -> str:
  return _digest(generate.is_generated(directory / "image.png", _SETTINGS))


def _call(entry: Callable[[list[str]], int], directory: Path) -> str:
  """Runs a program up to the point where it would load a pipeline."""
  arguments = json.loads((directory / "arguments.json").read_bytes())
  arguments = [a.replace("\0", "") for a in arguments]  # arguments cannot hold null bytes
  refusal = UserError("the arguments are taken")
  said = io.StringIO()
  with (
    mock.patch.object(hub, "find_pipeline", side_effect=refusal),
    mock.patch.object(pretrain, "prepare", side_effect=refusal),
    mock.patch("jaxpref.runtime.distributed.initialize"),
    contextlib.redirect_stderr(said),
    contextlib.redirect_stdout(io.StringIO()),
  ):
    try:
      status = entry(arguments)
    except SystemExit as error:
      status = error.code or 0
  lines = said.getvalue().splitlines()
  errors = [line for line in lines if line.startswith("jaxpref: error: ")]
  if status in (0, None):
    return "help"
  if len(errors) != 1 or lines[-1] != errors[0] or status != 2:
    raise AssertionError(f"status {status} with the message {said.getvalue()[:300]!r}")
  if str(refusal) in errors[0]:
    return "taken"
  raise UserError(errors[0].removeprefix("jaxpref: error: "))


_PROGRAMS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
  "main": (
    main.main,
    [
      *("--config=dro:tiny", "--workdir=run", "--config.model.path=x"),
      *("--config.optim.lr=1e-3", "--config.train.num_updates=4", "--config.seed=3"),
      *("--config.evaluate.scorers=('shapes.quality',)", "--config.train.batch_size=8"),
    ],
  ),
  "generate": (
    generate.main,
    [
      *("--model=x", "--prompts=a red circle", "--out=pictures", "--seed=3", "--steps=2"),
      *("--guidance=2", "--size=64x64", "--solver=ddim", "--order=2", "--batch-size=2"),
    ],
  ),
  "export": (export.main, ["--workdir=x", "--out=new", "--dtype=float32"]),
  "plan": (
    estimate.main,
    [
      *("--config=dro:tiny", "--topology=v5e:2x2", "--mfu=0.3", "--compile=no"),
      *("--json=numbers.json", "--config.model.path=x", "--config.train.batch_size=8"),
    ],
  ),
  "pretrain": (
    pretrain.main,
    ["--config=shapes_base:tiny", "--workdir=run", "--config.seed=1", "--config.log_every=2"],
  ),
}


def targets() -> list[Target]:
  """Returns all targets."""
  online_files = ("*array_record*",)
  pairs = _read_rows("online", "pairs")
  found = [
    Target("safetensors", _make_weights, _read_weights, BYTES, ("*.safetensors",), weight=8),
    Target(
      *("safetensors, shards", _make_shards, _read_weights, BYTES, ("*.safetensors",)), weight=3
    ),
    Target("safetensors, index", _make_shards, _read_weights, JSON, ("*index.json",)),
    Target("safetensors of a pipeline", _copy, _load, BYTES, ("*.safetensors",), weight=2),
    Target("model_index.json", _copy, _describe, JSON, ("model_index.json",), weight=3),
    *(
      Target(f"{part}/config.json", _copy, _describe, JSON, (f"{part}/config.json",), weight=3)
      for part in ("unet", "vae", "text_encoder")
    ),
    Target("scheduler_config.json", _copy, _describe, JSON, ("scheduler/*",), weight=3),
    Target("tokenizer, vocab and merges", _make_tokenizer, _read_tokenizer, (*JSON, *LINES)),
    Target("tokenizer.json", _make_fast_tokenizer, _read_tokenizer, (*JSON, *BYTES)),
    *(
      Target(
        *(f"image, {kind}", functools.partial(_make_image, kind), _decode, BYTES),
        exact=kind == "PNG",
        weight=16 if kind == "PNG" else 8,
      )
      for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
    ),
    Target(
      *("folder of images", _make_folder, _read_rows("folder", "experts", "pairs", "captions")),
      BYTES,
      weight=6,
    ),
    *(
      Target(
        f"metadata.{ending}",
        functools.partial(_make_metadata, ending),
        _read_rows("folder", "experts", "captions"),
        (*LINES, edit_column)[-1:] + BYTES if ending == "parquet" else LINES,
        ("metadata.*",),
        weight=6,
      )
      for ending in ("jsonl", "csv", "parquet")
    ),
    *(
      Target(
        *(name, _make_pickapic, _read_rows("pickapic", "experts", "pairs", "singles")),
        damage,
        weight=8,
        exact=exact,
      )
      for name, damage, exact in (
        ("parquet, bytes", BYTES, False),
        ("parquet, columns", (edit_column,), False),
        ("parquet, pages with checksums", (flip_in_page,), True),
      )
    ),
    Target("generated pairs, records", _make_online, pairs, BYTES, online_files, exact=True),
    Target("generated pairs, JSON", _make_online, pairs, JSON, ("*.json",)),
    Target("checkpoint", _make_checkpoint, _restore, BYTES, ("checkpoints/*",), True, 3),
    Target(
      *("checksums.json", _make_checkpoint, _restore, JSON, ("*/checksums.json",)), True, 2
    ),
    Target("config.json of a workdir", _make_opened, _open_workdir, JSON, ("config.json",)),
    Target("metrics.jsonl", _make_workdir, _read_metrics, LINES, ("metrics.jsonl",), weight=6),
    Target(
      "starts, best and inputs", _make_workdir, _read_records, JSON, ("*.json",), weight=8
    ),
    Target(
      *("evaluation for the report", _make_workdir, _read_evaluation, (*JSON, *BYTES)),
      ("evaluation/*",),
      weight=6,
    ),
    Target("prompts file", _make_prompts, _read_prompts, (*LINES, *BYTES), weight=6),
    Target("image with its settings", _make_generated, _read_generated, BYTES, weight=6),
  ]
  for name, (entry, arguments) in _PROGRAMS.items():
    make = functools.partial(_make_arguments, arguments)
    call = functools.partial(_call, entry)
    found.append(Target(f"command line, {name}", make, call, (edit_arguments,), weight=8))
  return found


class Prepared:
  """A target's valid input, and what is read of it."""

  def __init__(self, target: Target, scratch: Path, tiny: Path):
    """Makes and reads it.

    Args:
      target: of which.
      scratch: a directory for inputs.
      tiny: a small pipeline's directory.
    """
    self.target, self._scratch = target, scratch
    directory = scratch / "valid"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    target.make(directory, tiny)
    self.files = _read_all(directory)
    self.original = target.read(directory)

  def damaged(self, seed: int, number: int) -> Files:
    """The files of an input."""
    rng = random.Random(f"{seed}/{self.target.name}/{number}")
    files = dict(self.files)
    names = [name for name in files if any(fnmatch.fnmatch(name, p) for p in self.target.files)]
    program = self.target.damage == (edit_arguments,)
    for _ in range(rng.choice((1, 1, 2))):
      name = rng.choice(names)
      special = 0 if self.target.exact or program else rng.random()
      if special > 0.96:
        files[name] = rng.choice((PIPE, DIRECTORY))
      elif special > 0.92:
        files[name] = files[rng.choice(list(self.files))]
      elif isinstance(files[name], bytes):
        with contextlib.suppress(pa.ArrowException, OSError, ValueError):  # damaged already
          files[name] = rng.choice(self.target.damage)(rng, files[name])
    return files

  def run(self, seed: int, number: int) -> Outcome:
    """Reads an input within its time."""
    directory = self._scratch / "input"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    _write(directory, self.damaged(seed, number))

    def late(*_):
      raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
      found = self.target.read(directory)
    except _Late:
      return Outcome("hang")
    except BaseException as error:
      signal.setitimer(signal.ITIMER_REAL, 0)
      return _failure(error)
    finally:
      signal.setitimer(signal.ITIMER_REAL, 0)
      signal.signal(signal.SIGALRM, before)
    if found == self.original:
      return Outcome("equal")
    return Outcome("silent" if self.target.exact else "other")


def _failure(error: BaseException) -> Outcome:
  refused = isinstance(error, UserError | BadRow)
  if isinstance(error, OSError) and error.errno in cli._REFUSALS:
    refused = True
  if isinstance(error, KeyboardInterrupt):
    raise error
  try:
    if refused:
      line = str(error) if isinstance(error, UserError) else one_line(error)
      if not isinstance(error, BadRow):  # whose text goes into a warning of one line
        check_line(line)
      return Outcome("refused", line)
  except AssertionError as odd:
    error = odd
  frame = error.__traceback__
  where = ""
  while frame is not None:
    file = frame.tb_frame.f_code.co_filename
    if "jaxpref" in file and "benchmarks" not in file:
      where = f" at {Path(file).name}:{frame.tb_lineno}"
    frame = frame.tb_next
  return Outcome("traceback", f"{type(error).__name__}{where}: {str(error)[:200]!r}")


def check_line(line: str) -> None:
  """A refusal is one printable line of bounded length."""
  if not line.isprintable() or not 0 < len(line) <= LONGEST:
    raise AssertionError(f"a refusal of {len(line)} characters: {line[:200]!r}")
