"""Parts from elsewhere, clip skip, names behind prefixes, and directories of other kinds."""

import json
import os
import shutil
from pathlib import Path

import families
import jax
import numpy as np
import pytest
from conftest import live
from PIL import Image
from safetensors.numpy import load_file, save_file

from jaxpref import generate, sharding
from jaxpref.data import encode
from jaxpref.errors import UserError
from jaxpref.models import hub, pipeline
from jaxpref.training import load_run

UNET = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def loaded(tiny_pipeline):
  return pipeline.load_pipeline(str(tiny_pipeline))


@pytest.fixture
def copy(tiny_pipeline, tmp_path) -> Path:
  return shutil.copytree(tiny_pipeline, tmp_path / "model")


def edit(file: Path, **fields) -> None:
  content = json.loads(file.read_text())
  file.write_text(json.dumps({k: v for k, v in (content | fields).items() if v != "drop"}))


def rename(file: Path, change, **more) -> None:
  save_file({change(k): v for k, v in load_file(file).items()} | more, file)


def same(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def refused(path, match, **kwargs):
  with pytest.raises(UserError, match=match) as error:
    pipeline.load_pipeline(str(path), **kwargs)
  assert "\n" not in str(error.value) and len(str(error.value)) < 900


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "unet.", "a.b."])
def test_a_prefix_of_every_name_is_left_out(copy, loaded, caplog, prefix):
  rename(copy / "unet" / UNET, lambda name: prefix + name)
  rename(copy / "text_encoder" / "model.safetensors", lambda name: prefix + name)
  read = pipeline.load_pipeline(str(copy))
  same(read.params, loaded.params)
  assert read.digest == loaded.digest
  assert "unet: " in caplog.text and "ignored" in caplog.text + "ignored" * ("mod" in prefix)


def test_wrappers_within_names(copy, loaded):
  """As torch.compile leaves them where it compiles blocks."""
  rename(copy / "unet" / UNET, lambda name: name.replace("resnets.0.", "resnets.0._orig_mod."))
  same(pipeline.load_pipeline(str(copy)).params, loaded.params)


def test_names_that_fit_nowhere_are_counted(copy):
  count = len(load_file(copy / "unet" / UNET))
  rename(copy / "unet" / UNET, lambda name: name.replace(".", "_"))
  refused(
    copy, rf"\({count} tensors, {count} wanted\): missing .* and {count - 3} more; surplus"
  )


def test_surplus_that_changes_no_image(copy, loaded, caplog):
  extra = {"num_updates": np.array(7), "decay": np.zeros(1, np.float32)}
  rename(copy / "unet" / UNET, str, **extra)
  text_extra = {
    "logit_scale": np.array(4.6, np.float32),
    "vision_model.x.weight": np.zeros((3, 3), np.float32),
    "text_projection.weight": np.zeros((16, 16), np.float32),
    "text_model.embeddings.position_ids": np.arange(16)[None],
  }
  rename(copy / "text_encoder" / "model.safetensors", str, **text_extra)
  read = pipeline.load_pipeline(str(copy))
  same(read.params, loaded.params)
  assert read.digest == loaded.digest
  assert "2 tensors that the configuration does not have are ignored: decay" in caplog.text
  assert "3 tensors that the configuration does not have" in caplog.text
  rename(copy / "unet" / UNET, str, **{"conv_in2.weight": np.zeros((3, 3), np.float32)})
  refused(copy, "surplus conv_in2.weight")


def test_variants_that_only_some_parts_have(copy, loaded, caplog):
  for part in ("unet", "text_encoder"):
    stem = copy / part / families.PARTS[part].stem
    halves = {k: v.astype(np.float16) for k, v in load_file(f"{stem}.safetensors").items()}
    save_file(halves, f"{stem}.fp16.safetensors")
  params = pipeline.load_pipeline(str(copy), variant="fp16").params
  same(params["vae"], loaded.params["vae"])
  halved = jax.tree.map(
    lambda x: x.astype(np.float16).astype(np.float32), loaded.params["unet"]
  )
  same(params["unet"], halved)
  assert "parts without the variant fp16, read from plain files: vae" in caplog.text
  (copy / "vae" / UNET).rename(copy / "vae" / UNET.replace(".s", ".bf16.s"))
  refused(copy, "vae has only the variants bf16: choose one")


def test_weights_of_other_formats_are_named(copy):
  (copy / "unet" / UNET).unlink()
  for name, kind in (("model.onnx", "ONNX"), ("diffusion_flax_model.msgpack", "Flax")):
    (copy / "unet" / name).write_bytes(b"x")
    refused(copy, rf"unet has only {kind} weights \({name}\), which are not supported")
  files = ["model_index.json", "unet/config.json", "unet/diffusion_flax_model.msgpack"]
  with pytest.raises(UserError, match=r"x/unet has only Flax weights"):
    hub.needed_files(files, where="x")


@pytest.fixture
def other(tiny_pipeline, tmp_path) -> Path:
  """Another pipeline of the same kind."""
  path = shutil.copytree(tiny_pipeline, tmp_path / "other")
  for part in ("unet", "vae"):
    tensors = load_file(path / part / UNET)
    save_file({k: v * np.float32(0.5) for k, v in tensors.items()}, path / part / UNET)
  edit(path / "vae" / "config.json", scaling_factor=0.25)
  return path


def test_parts_from_elsewhere(tiny_pipeline, loaded, other, tmp_path):
  alone = shutil.copytree(other / "vae", tmp_path / "sdxl-vae-fix")  # files at the root
  want = pipeline.load_pipeline(str(other))
  read = pipeline.load_pipeline(str(tiny_pipeline), unet=str(other), vae=str(alone))
  same(read.params["unet"], want.params["unet"])
  same(read.params["vae"], want.params["vae"])
  assert read.modules["vae"].scaling_factor == read.configs["vae"]["scaling_factor"] == 0.25
  digests = {
    pipeline.load_pipeline(str(tiny_pipeline), **{part: str(other / part)}).digest
    for part in ("unet", "vae")
  }
  assert (
    len(digests | {read.digest, loaded.digest, want.digest}) == 4
  )  # text encoders are alike
  described = pipeline.describe_pipeline(str(tiny_pipeline), vae=str(alone))
  assert described.modules["vae"].scaling_factor == 0.25
  refused(tiny_pipeline, "model.unet: .*nowhere", unet=str(tmp_path / "nowhere"))
  refused(tiny_pipeline, "model.vae: .*neither config.json nor vae/", vae=str(tmp_path))
  edit(other / "unet" / "config.json", cross_attention_dim=24)
  refused(tiny_pipeline, "other/unet takes texts of width 24.*do not belong", unet=str(other))
  # The pipeline need not have parts that are taken from elsewhere.
  bare = shutil.copytree(tiny_pipeline, tmp_path / "bare")
  shutil.rmtree(bare / "vae")
  same(pipeline.load_pipeline(str(bare), vae=str(alone)).params["vae"], want.params["vae"])


def test_a_repository_of_a_unet_alone():
  files = ["unet/config.json", f"unet/{UNET}", "README.md"]
  with pytest.raises(UserError, match="name its base as model.path, and this as model.unet"):
    hub.needed_files(files, where="someone/dpo")


@pytest.mark.parametrize("root", [False, True])
def test_parts_of_a_hub_repository(tiny_pipeline, other, monkeypatch, root):
  """Which files are asked for, at which revision; the pipeline's own are not."""
  home = other / "vae" if root else other
  files = (
    ["config.json", UNET, "x.bin"] if root else [f"vae/{n}" for n in ("config.json", UNET)]
  )
  asked = []

  class Api:
    def list_repo_files(self, repo, revision=None):
      return [*files, "README.md", "big.safetensors"]

  def download(repo, revision=None, allow_patterns=None):
    asked.append((repo, revision, allow_patterns))
    return str(home)

  monkeypatch.setattr(hub.huggingface_hub, "HfApi", Api)
  monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
  read = pipeline.load_pipeline(str(tiny_pipeline), vae="org/a-vae@refs/pr/3")
  assert read.modules["vae"].scaling_factor == 0.25
  assert asked == [("org/a-vae", "refs/pr/3", files[:2])]


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("https://huggingface.co/org/name/tree/main", "is a URL: name the id, org/name"),
    ("hf://org/name", "is a URL: name the id, org/name"),
    ("org/name@", "neither a directory nor a Hub id"),
    ("org/name@a b", "neither a directory nor a Hub id"),
  ],
)
def test_names_of_other_kinds(name, message):
  refused(name, message)


def test_directories_of_the_hubs_cache(tiny_pipeline, loaded, tmp_path):
  cache = tmp_path / "hub" / "models--org--name"
  for name in ("abc", "def"):
    shutil.copytree(tiny_pipeline, cache / "snapshots" / name)
  refused(cache, "is a cache of the Hub with 2 snapshots: name one")
  (cache / "refs").mkdir()
  (cache / "refs" / "main").write_text("abc")
  for path in (cache, cache / "snapshots", cache / "snapshots" / "abc"):
    assert hub.find_pipeline(str(path)) == cache / "snapshots" / "abc"
  refused(tmp_path / "hub", "is the Hub's cache: name a model by its id")


def test_directories_of_other_kinds(copy, tmp_path):
  refused(copy / "unet", rf"is one part of a pipeline: name {copy}$")
  with pytest.raises(UserError, match=rf"is one part of a pipeline: name {copy}$"):
    load_run.load(str(copy / "unet"))
  run = copy / "run"
  (run / "checkpoints" / "4").mkdir(parents=True)
  (run / "config.json").write_text("{}")
  for inside in (run / "checkpoints", run / "checkpoints" / "4"):
    refused(inside, rf"is inside the workdir of a run: name {run}$")
  state = tmp_path / "checkpoint-500"
  shutil.copytree(copy / "unet", state / "unet")
  refused(state, "holds unet alone.*name its base as model.path, and this as model.unet")
  (state / "optimizer.bin").write_bytes(b"x")
  refused(state, f"is a training state.*its denoiser is model.unet={state}/unet")
  refused(state / "unet", "is one part of a pipeline: .*and this as model.unet")
  run = tmp_path / "run"
  (run / "checkpoints").mkdir(parents=True)
  (run / "config.json").write_text("{}")
  refused(run, "is a run's workdir: set model.start to it")


def test_files_that_are_not_regular(copy):
  """Which would be waited for, or read, for ever."""
  for name in ("unet/config.json", "tokenizer/special_tokens_map.json", f"unet/{UNET}"):
    file = copy / name
    kept = file.read_bytes() if file.exists() else None
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    refused(copy, "is not a regular file")
    file.unlink()
    file.symlink_to("/dev/zero")
    refused(copy, "is not a regular file")
    file.unlink()
    if kept is not None:
      file.write_bytes(kept)
  (copy / "unet" / "config.json").write_text("[" * 200_000 + "]" * 200_000)
  refused(copy, "cannot read .*nested too deeply")


def test_unknown_and_missing_fields_are_named(copy, caplog):
  pipeline.describe_pipeline(str(copy))
  assert not [r for r in caplog.records if r.name.startswith("jaxpref")]
  edit(copy / "unet/config.json", cross_atention_dim=16, in_channels="drop")
  edit(copy / "vae/config.json", scaling_facter=0.18)
  edit(copy / "scheduler/scheduler_config.json", predictiontype="epsilon", beta_start="drop")
  pipeline.describe_pipeline(str(copy))
  for said in (
    "unet/config.json: jaxpref ignores fields it does not know: cross_atention_dim; and takes "
    "defaults for missing fields: in_channels",
    "vae/config.json: jaxpref ignores fields it does not know: scaling_facter",
    "scheduler_config.json: jaxpref ignores fields it does not know: predictiontype; and takes",
  ):
    assert said in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("family", families.FAMILIES)
def test_published_configurations_are_known(family, tmp_path, caplog):
  pipeline.describe_pipeline(str(families.write_configs(family, tmp_path, vocab_size=560)))
  assert not [r for r in caplog.records if r.name.startswith("jaxpref")]


@live
def test_known_fields_are_pytorchs():
  import inspect

  import diffusers

  from jaxpref.models import scheduler_config, unet, vae

  def fields(kind):
    names = list(inspect.signature(kind.__init__).parameters)[1:]
    return set(names) - {"kwargs", "args"}

  assert fields(diffusers.UNet2DConditionModel) <= unet.FIELDS
  assert fields(diffusers.AutoencoderKL) <= vae.FIELDS
  for name in dir(diffusers):
    if name.endswith("Scheduler") and not name.startswith("Flax"):
      known = fields(getattr(diffusers, name))
      if "beta_schedule" in known and "prediction_type" in known:
        assert known <= scheduler_config.FIELDS, name


def test_lists_and_rows_as_pytorch_reads_them(copy, loaded):
  fields = {"sample_size": [8, 8], "layers_per_block": [1, 1], "cross_attention_dim": [16, 16]}
  edit(copy / "unet/config.json", **fields)
  edit(copy / "text_encoder/config.json", vocab_size=0, architectures="drop")
  file = copy / "text_encoder" / "model.safetensors"
  tensors, name = load_file(file), "text_model.embeddings.token_embedding.weight"
  rows = len(tensors[name])
  save_file({**tensors, name: np.pad(tensors[name], ((0, 7), (0, 0)))}, file)
  edit(copy / "text_encoder/config.json", vocab_size=rows + 7)
  read = pipeline.load_pipeline(str(copy))
  same(read.params["unet"], loaded.params["unet"])
  assert read.image_size == loaded.image_size


@pytest.fixture(scope="module")
def families_of_two(tmp_path_factory):
  return {
    name: families.write_pipeline(name, tmp_path_factory.mktemp(name), shallow=True)
    for name in ("sd15", "sdxl")
  }


@pytest.mark.long
@live
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_is_diffusers(families_of_two, family, skip):
  import torch
  from diffusers import DiffusionPipeline

  path = families_of_two[family]
  ours = pipeline.load_pipeline(str(path), clip_skip=skip)
  mesh = sharding.make_mesh()
  cond = encode.encode_prompts(ours, mesh, families.PROMPTS)
  blank = encode.encode_no_prompt(ours, mesh)
  theirs = DiffusionPipeline.from_pretrained(path)
  arguments = {"device": "cpu", "num_images_per_prompt": 1, "clip_skip": skip}
  with torch.no_grad():
    text, negative, *pooled = theirs.encode_prompt(
      families.PROMPTS, do_classifier_free_guidance=True, **arguments
    )
  np.testing.assert_allclose(cond["text"], text.numpy(), rtol=0, atol=1e-4)
  np.testing.assert_allclose(blank["text"], negative[:1].numpy(), rtol=0, atol=1e-4)
  if pooled:
    np.testing.assert_allclose(cond["pooled"], pooled[0].numpy(), rtol=0, atol=1e-4)
  plain = encode.encode_prompts(pipeline.load_pipeline(str(path)), mesh, families.PROMPTS)
  assert np.abs(plain["text"] - cond["text"]).max() > 0.01


@pytest.mark.long
def test_clip_skip_by_the_configuration(families_of_two, tmp_path, caplog):
  """Fewer layers than the weights have, which for a prompt is the same."""
  copy = shutil.copytree(families_of_two["sd15"], tmp_path / "model")
  mesh = sharding.make_mesh()
  want = encode.encode_prompts(
    pipeline.load_pipeline(str(copy), clip_skip=1), mesh, families.PROMPTS
  )
  edit(copy / "text_encoder/config.json", num_hidden_layers=2)
  read = pipeline.load_pipeline(str(copy))
  cond = encode.encode_prompts(read, mesh, families.PROMPTS)
  np.testing.assert_allclose(cond["text"], want["text"], rtol=0, atol=1e-6)
  assert "text_encoder: 16 tensors that the configuration does not have" in caplog.text
  refused(copy, "clip_skip must be at least 0 and below 2", clip_skip=2)


@pytest.mark.long
def test_the_index_says_a_text_encoders_class(families_of_two, tmp_path):
  copy = shutil.copytree(families_of_two["sdxl"], tmp_path / "model")
  edit(copy / "text_encoder/config.json", architectures=["CLIPTextModelWithProjection"])
  edit(copy / "text_encoder_2/config.json", architectures="drop")
  read = pipeline.load_pipeline(str(copy))
  same(read.params, pipeline.load_pipeline(str(families_of_two["sdxl"])).params)
  # And the file may be that of the whole CLIP model.
  inner = json.loads((copy / "text_encoder/config.json").read_text())
  whole = {"architectures": ["CLIPModel"], "model_type": "clip", "text_config": inner}
  (copy / "text_encoder/config.json").write_text(json.dumps(whole))
  same(pipeline.load_pipeline(str(copy)).params, read.params)


@pytest.mark.long
def test_generate_takes_parts_and_clip_skip(families_of_two, tmp_path, capsys):
  out, model = tmp_path / "out", families_of_two["sd15"]
  other = shutil.copytree(model / "vae", tmp_path / "other")
  rename(other / UNET, str, **{"decoder.conv_out.bias": np.zeros(3, np.float32)})
  flags = [f"--model={model}", "--prompts=a red circle", "--steps=2", f"--out={out}"]
  assert generate.main([*flags, f"--vae={other}", "--clip-skip=1"]) == 0
  settings = Image.open(out / "00000-00.png").info
  assert json.loads(settings["jaxpref"])["clip_skip"] == 1
  assert generate.main([*flags, f"--vae={other}"]) == 2
  assert "clip_skip was 1, now 0" in capsys.readouterr().err
  assert generate.main([*flags, "--clip-skip=1"]) == 2
  assert "has other settings: weights" in capsys.readouterr().err
