"""Readers of jaxpref for the fuzzer, each with a valid input and ways to damage it.

See `fuzz_runner`, which damages the inputs and judges what the readers make of them.
"""

import contextlib
import functools
import hashlib
import io
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import fuzz_inputs as inputs
import numpy as np
from fuzz_damage import BYTES, JSON, LINES, edit_arguments, edit_column, flip_in_page
from fuzz_inputs import (
  SIZE,
  copy,
  make_arguments,
  make_built,
  make_checkpoint,
  make_fast_tokenizer,
  make_folder,
  make_generated,
  make_image,
  make_metadata,
  make_online,
  make_pickapic,
  make_prompts,
  make_scores,
  make_shards,
  make_tokenizer,
  make_weights,
  make_workdir,
)
from fuzz_runner import Target, check_line

from jaxpref import config as config_lib
from jaxpref import export, generate, main
from jaxpref.data import images, row_set
from jaxpref.data import rows as rows_lib
from jaxpref.errors import UserError
from jaxpref.evaluation import (
  best_checkpoint,
  evaluate,
  image_files,
  prompt_sets,
  score_files,
)
from jaxpref.models import hub, pipeline, text, torch_layout, weights
from jaxpref.plan import estimate
from jaxpref.pretrain import run as pretrain
from jaxpref.runtime import metrics
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.training import iterate, iterate_report, load_run


def _digest(*values: Any) -> str:
  digest = hashlib.sha256()
  for value in values:
    digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
  return digest.hexdigest()[:16]


def _read_weights(directory: Path) -> str:
  part = directory / "vae"
  shapes = _vae_shapes((part / "config.json").read_text(encoding="utf-8"))
  return torch_layout.import_tensors(
    weights.open_part(part, "diffusion_pytorch_model"), shapes, where=str(part)
  )[1]


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
  return _digest(*text.tokenize([tokenizer], inputs.TEXTS))


def _decode(directory: Path) -> str:
  pixels = images.decode(directory / "image")
  return _digest(pixels, images.decode((directory / "image").read_bytes(), SIZE))


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
      rows = rows_lib.load_rows(kind, data, image_size=SIZE, seed=0)
      found.append(row_set.fingerprint(rows))
    except UserError as error:
      check_line(str(error))
      refusals.append(error)
  if not found:
    raise refusals[0]
  return _digest(*found)


def _read_rows(source: str, *kinds: str) -> Callable[[Path], str]:
  return lambda directory: _rows(directory, source, *kinds)


def _read_built(directory: Path) -> str:
  # Captions are read from the index alone: any kind that is refused refuses the whole.
  kinds = ("pairs", "singles", "experts", "captions")
  return _digest(*(_rows(directory, "built", kind) for kind in kinds))


def _open_workdir(directory: Path) -> str:
  config = config_lib.load_config("dro:tiny")
  said: list[Any] = [load_run.prompt_prefix(str(directory))]
  said.append(load_run.setting(str(directory), "evaluate", "guidance", 1.0))
  with config.unlocked():
    config.model.path = json.loads((directory / "path").read_text(encoding="utf-8"))
  workdir_lib.release(workdir_lib.open_workdir(directory, config))
  return _digest(*said)


def _make_opened(directory: Path, tiny: Path) -> None:
  workdir_lib.write_config(directory, inputs.tiny_config(tiny))
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


def _read_scores(directory: Path) -> str:
  images = inputs.scores_of_images(np.random.default_rng(0))
  [file] = directory.glob("scores.*")
  return _digest(score_files.read_scores(file, images).to_csv())


def _restore(directory: Path) -> str:
  return load_run.load(str(directory)).digest


def _read_prompts(directory: Path) -> str:
  file = str(directory / "prompts.txt")
  return _digest(generate.read_prompts(file), prompt_sets.choose_prompts(file, 9, [], seed=0))


def _read_generated(directory: Path) -> str:
  return _digest(image_files.is_generated(directory / "image.png", inputs.SETTINGS))


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
    Target("safetensors", make_weights, _read_weights, BYTES, ("*.safetensors",), weight=8),
    Target(
      *("safetensors, shards", make_shards, _read_weights, BYTES, ("*.safetensors",)), weight=3
    ),
    Target("safetensors, index", make_shards, _read_weights, JSON, ("*index.json",)),
    Target("safetensors of a pipeline", copy, _load, BYTES, ("*.safetensors",), weight=2),
    Target("model_index.json", copy, _describe, JSON, ("model_index.json",), weight=3),
    *(
      Target(f"{part}/config.json", copy, _describe, JSON, (f"{part}/config.json",), weight=3)
      for part in ("unet", "vae", "text_encoder")
    ),
    Target("scheduler_config.json", copy, _describe, JSON, ("scheduler/*",), weight=3),
    Target("tokenizer, vocab and merges", make_tokenizer, _read_tokenizer, (*JSON, *LINES)),
    Target("tokenizer.json", make_fast_tokenizer, _read_tokenizer, (*JSON, *BYTES)),
    *(
      Target(
        *(f"image, {kind}", functools.partial(make_image, kind), _decode, BYTES),
        exact=kind == "PNG",
        weight=16 if kind == "PNG" else 8,
      )
      for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
    ),
    Target(
      *("folder of images", make_folder, _read_rows("folder", "experts", "pairs", "captions")),
      BYTES,
      weight=6,
    ),
    *(
      Target(
        f"metadata.{ending}",
        functools.partial(make_metadata, ending),
        _read_rows("folder", "experts", "captions"),
        (*LINES, edit_column)[-1:] + BYTES if ending == "parquet" else LINES,
        ("metadata.*",),
        weight=6,
      )
      for ending in ("jsonl", "csv", "parquet")
    ),
    *(
      Target(
        *(name, make_pickapic, _read_rows("pickapic", "experts", "pairs", "singles")),
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
    Target(
      "built data set", make_built, _read_built, BYTES, ("*array_record*", "*.arrow"), True
    ),
    Target("built data set, JSON", make_built, _read_built, JSON, ("complete.json",)),
    Target("generated pairs, records", make_online, pairs, BYTES, online_files, exact=True),
    Target("generated pairs, JSON", make_online, pairs, JSON, ("*.json",)),
    Target("checkpoint", make_checkpoint, _restore, BYTES, ("checkpoints/*",), True, 3),
    Target(
      *("checksums.json", make_checkpoint, _restore, JSON, ("*/checksums.json",)), True, 2
    ),
    Target("config.json of a workdir", _make_opened, _open_workdir, JSON, ("config.json",)),
    Target("metrics.jsonl", make_workdir, _read_metrics, LINES, ("metrics.jsonl",), weight=6),
    Target("starts, best and inputs", make_workdir, _read_records, JSON, ("*.json",), weight=8),
    Target(
      *("evaluation for the report", make_workdir, _read_evaluation, (*JSON, *BYTES)),
      ("evaluation/*",),
      weight=6,
    ),
    *(
      Target(
        f"scores of other judges, {ending}",
        functools.partial(make_scores, ending),
        _read_scores,
        (edit_column, *BYTES) if ending == "parquet" else LINES,
        weight=6,
      )
      for ending in ("parquet", "csv", "jsonl")
    ),
    Target("prompts file", make_prompts, _read_prompts, (*LINES, *BYTES), weight=6),
    Target("image with its settings", make_generated, _read_generated, BYTES, weight=6),
  ]
  for name, (entry, arguments) in _PROGRAMS.items():
    make = functools.partial(make_arguments, arguments)
    call = functools.partial(_call, entry)
    found.append(Target(f"command line, {name}", make, call, (edit_arguments,), weight=8))
  return found
