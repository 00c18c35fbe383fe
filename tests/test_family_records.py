"""The records of the model families: one for each index, and what they agree on."""

import dataclasses
import importlib
from pathlib import Path

import families as reduced
import flax
import flow_networks
import jax
import numpy as np
import pytest
import runs
import sana_models
from conftest import ROOT

from jaxpref import base_config, main
from jaxpref.errors import UserError
from jaxpref.models import denoiser, families, hub, pipeline, save
from jaxpref.models.families import flux, parts, sana, sd3, sdxl, stable_diffusion
from jaxpref.training import load_run

INDEX = Path("model_index.json")


@pytest.mark.parametrize("name", (*reduced.FAMILIES, "sd35m", "sana", "flux", "flux_schnell"))
def test_published_pipelines_have_a_family(name):
  configs = reduced.real_configs(name)
  others = {"sdxl": sdxl.FAMILY, "sd35m": sd3.FAMILY, "sana": sana.FAMILY}
  others |= {"flux": flux.FAMILY, "flux_schnell": flux.FAMILY}
  want = others.get(name, stable_diffusion.FAMILY)
  index = configs.pop("model_index")
  assert families.of_index(index, where=INDEX) is want
  assert families.of_parts(configs) is want  # the parts alone tell it, too
  unnamed = {k: v for k, v in index.items() if k != "_class_name"}
  assert families.of_index(unnamed, where=INDEX) is want


def test_parts_of_one_name_are_told_apart_by_their_class():
  """SD 3 without T5 has parts of the names of Flux'."""
  configs = reduced.real_configs("sd35m")
  del configs["text_encoder_3"], configs["model_index"]
  assert configs.keys() == reduced.real_configs("flux").keys() - {"model_index"}
  assert families.of_configs(configs) is sd3.FAMILY
  index = {k: v for k, v in sd3.FAMILY.index.items() if k != "_class_name"}
  index |= dict.fromkeys(("text_encoder_3", "tokenizer_3"), [None, None])
  assert families.of_index(index, where=INDEX) is sd3.FAMILY


@pytest.mark.parametrize(
  ("name", "part", "tested"),
  [
    ("flux", "transformer", flow_networks.PUBLISHED["flux.1-dev"]),
    ("flux_schnell", "transformer", flow_networks.PUBLISHED["flux.1-schnell"]),
    ("flux", "vae", flow_networks.PUBLISHED["flux-vae"]),
    ("sd35m", "transformer", flow_networks.PUBLISHED["sd3.5-medium"]),
    ("sd35m", "vae", flow_networks.PUBLISHED["sd3-vae"]),
    ("sana", "transformer", sana_models.PUBLISHED["sana-0.6b"] | {"sample_size": 16}),
    ("sana", "vae", sana_models.PUBLISHED["dc-ae"]),
  ],
)
def test_described_networks_are_those_that_pytorch_confirms(name, part, tested):
  config = reduced.real_configs(name)[part]
  assert {field: config[field] for field in tested} == tested


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_records_are_complete(family):
  """The index that a new pipeline is written with is the family's, and has all its parts."""
  assert families.of_index(family.index, where=INDEX) is family
  there = families.parts_in(family.index)
  folders = {tokenizer.folder for tokenizer in family.tokenizers(family.parts).values()}
  assert {*family.required, *folders, "scheduler"} <= there
  assert {family.denoiser, "vae"} <= set(family.required)
  assert list(family.tokenizers(family.parts)) == [p for p in family.parts if "encoder" in p]


@pytest.mark.parametrize(
  "name", ["StableDiffusionInpaintPipeline", "StableDiffusionXLControlNetPipeline", "X"]
)
def test_other_tasks_are_refused(name):
  with pytest.raises(UserError, match=f"model_index.json is of {name}, and jaxpref has only"):
    families.of_index({"_class_name": name}, where=INDEX)


@pytest.mark.parametrize("preset", base_config.PRESETS)
def test_lora_targets_of_the_presets_are_those_of_the_record(preset):
  config = importlib.import_module("configs.dpo").get_config(preset)
  records = {"sd35m": sd3.FAMILY, "sana": sana.FAMILY, "flux": flux.FAMILY}
  assert config.lora.targets == records.get(preset, stable_diffusion.FAMILY).lora_targets


def test_fixed_parameters_are_split_off_and_joined_again():
  table, other = np.ones((2, 3)), np.zeros((2, 3))
  params = {"a": {"table": table, "kernel": other}, "b": {"bias": other[0]}}
  trained, fixed = denoiser.split_fixed(params, ("table",))
  assert fixed == {"a": {"table": table}}
  assert jax.tree.structure(trained) == jax.tree.structure(
    {"a": {"kernel": 0}, "b": {"bias": 0}}
  )
  again = denoiser.join_fixed(trained, {"a": {"table": table, "kernel": None}}, ("table",))
  assert jax.tree.structure(again) == jax.tree.structure(params)
  assert again["a"]["table"] is table and again["a"]["kernel"] is other


def test_frozen_weights_are_rounded_but_for_those_of_the_record():
  params = {"a": {"table": np.ones((2, 3), "f"), "kernel": np.ones((2, 3), "f")}}
  frozen = denoiser.freeze(params, "bfloat16", ("table",))
  assert frozen["a"]["table"].dtype == "float32" and frozen["a"]["kernel"].dtype == "bfloat16"


def test_a_pipeline_may_lack_an_optional_part(tiny_pipeline, tmp_path, monkeypatch):
  """Its new index says so, and neither directories nor repositories must have it."""
  base = stable_diffusion.FAMILY
  part = dataclasses.replace(parts.clip_encoder("tokenizer_3"), is_optional=True)
  entries = dict.fromkeys(("text_encoder_3", "tokenizer_3"), ["transformers", "X"])
  family = dataclasses.replace(
    base, parts={**base.parts, "text_encoder_3": part}, index={**base.index, **entries}
  )
  monkeypatch.setattr(families, "FAMILIES", (family, *families.FAMILIES[1:]))
  loaded = pipeline.load_pipeline(str(tiny_pipeline))
  assert loaded.family is family and loaded.encoders == ["text_encoder"]
  configs = {k: v for k, v in loaded.configs.items() if k != "model_index"}
  save.save_pipeline(
    tmp_path / "new", loaded.params, configs=configs, tokenizers_from=loaded.path, dtype="f"
  )
  again = pipeline.load_pipeline(str(tmp_path / "new"))
  assert again.digest == loaded.digest
  assert again.configs["model_index"]["tokenizer_3"] == [None, None]
  there = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
  files = [name.removeprefix("new/") for name in there]
  assert set(hub.needed_files(files, where="x")) == set(files)
  with pytest.raises(UserError, match="x/text_encoder_3/model.safetensors is missing"):
    hub.needed_files([*files, "text_encoder_3/config.json"], where="x")


@pytest.mark.long
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_fixed_parameters_stay_as_they_are(
  method, tiny_pipeline, tfds_dir, tmp_path, monkeypatch
):
  """Through training, a resumed run, its evaluation and the model that it leaves."""
  family = dataclasses.replace(stable_diffusion.FAMILY, fixed=("bias",))
  monkeypatch.setattr(families, "FAMILIES", (family, *families.FAMILIES[1:]))
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
  workdir = tmp_path / "run"
  for updates in (2, 3):
    fields = {"train.num_updates": updates, "optim.lr": 0.01, "evaluate.num_prompts": 1}
    assert main.main(runs.arguments(tiny_pipeline, workdir, method, **fields)) == 0
  base = pipeline.load_pipeline(str(tiny_pipeline)).denoiser_params
  tuned = load_run.load(str(workdir), ema=False).denoiser_params
  before, after = map(flax.traverse_util.flatten_dict, (base, tuned))
  assert before.keys() == after.keys()
  same = {path for path, x in before.items() if np.array_equal(x, after[path])}
  assert {path for path in before if path[-1] == "bias"} <= same
  assert not {path for path in same if path[-1] == "kernel"}
