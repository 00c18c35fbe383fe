"""What a run has tuned, in other programs' hands; and pictures from the command line."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import families
import jax
import numpy as np
import pytest
from conftest import WITHOUT_TORCH, live, xla_flags
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from jaxpref import export, generate, main
from jaxpref.evaluation import sampling as evaluation
from jaxpref.models import pipeline, save
from jaxpref.training import load_run

PROMPT = "Three small stars, painted!"


def fails(program, arguments, capsys) -> str:
  assert program.main(arguments) == 2
  message = capsys.readouterr().err
  assert message.startswith("jaxpref: error: ") and message.count("\n") == 1
  return message


def tune(model: Path, root: Path) -> Path:
  """A run of two updates on four pictures; returns its workdir."""
  rng = np.random.default_rng(0)
  for i in range(4):
    (root / "pictures").mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(root / "pictures" / f"{i}.png")
    (root / "pictures" / f"{i}.txt").write_text(families.PROMPTS[i % 2])
  settings = {
    "model.path": model,
    "data.source": "folder",
    "data.path": root / "pictures",
    "data.num_experts": 0,
    "train.batch_size": 4,
    "train.num_updates": 2,
    "train.updates_per_iteration": 1,
    "optim.lr": 1e-3,
    "evaluate.num_prompts": 1,
  }
  flags = [f"--config.{name}={value}" for name, value in settings.items()]
  workdir = root / "run"
  assert main.main(["--config=configs/sft.py:tiny", f"--workdir={workdir}", *flags]) == 0
  return workdir


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Path:
  """A reduced SDXL."""
  return families.write_pipeline("sdxl", tmp_path_factory.mktemp("sdxl"), shallow=True)


@pytest.fixture(scope="module")
def tuned_run(tiny_pipeline, tmp_path_factory) -> tuple[Path, Path]:
  """The tiny pipeline, and the workdir of a run that tuned it."""
  return tiny_pipeline, tune(tiny_pipeline, tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def tuned_sdxl(sdxl, tmp_path_factory) -> tuple[Path, Path]:
  """The same of the reduced SDXL."""
  return sdxl, tune(sdxl, tmp_path_factory.mktemp("tuned"))


@pytest.mark.parametrize(
  "tuned", ["tuned_run", pytest.param("tuned_sdxl", marks=pytest.mark.long)]
)
def test_an_export_is_what_was_tuned(tuned, request, tmp_path):
  model, workdir = request.getfixturevalue(tuned)
  flags = [f"--workdir={workdir}", "--dtype=float32"]
  assert export.main([*flags, f"--out={tmp_path / 'ema'}"]) == 0
  assert export.main([*flags, f"--out={tmp_path / 'last'}", "--no-ema"]) == 0
  assert export.main([*flags, f"--out={tmp_path / 'first'}", "--no-ema", "--step=1"]) == 0
  unets = {
    name: load_file(path / "unet" / "diffusion_pytorch_model.safetensors")
    for name, path in {
      "base": model,
      "ema": tmp_path / "ema",
      "last": tmp_path / "last",
      "first": tmp_path / "first",
    }.items()
  }
  for name in ("ema", "last", "first"):
    assert unets[name].keys() == unets["base"].keys()
    assert any((unets[name][k] != unets["base"][k]).any() for k in unets["base"])
  # The first update sets the average to the parameters; the second keeps 2 / 11 of it.
  key = "conv_in.bias"
  gone = (unets["ema"][key] - unets["first"][key]) / (unets["last"][key] - unets["first"][key])
  np.testing.assert_allclose(gone, 9 / 11, rtol=1e-2)
  read = pipeline.load_pipeline(str(tmp_path / "ema"))
  run = load_run.load(str(workdir))
  jax.tree.map(np.testing.assert_array_equal, read.params, jax.device_get(run.params))
  for part in read.params:
    theirs = json.loads((model / part / "config.json").read_text())
    assert json.loads((tmp_path / "ema" / part / "config.json").read_text()) == theirs


@pytest.mark.long
@live
def test_pytorch_draws_the_picture_that_we_draw(tuned_sdxl, tmp_path):
  import test_families
  import torch
  import witness

  _, workdir = tuned_sdxl
  assert (
    export.main([f"--workdir={workdir}", "--dtype=float32", f"--out={tmp_path / 'x'}"]) == 0
  )
  pipe = witness.load(tmp_path / "x")
  size = pipe.unet.config.sample_size
  noise = test_families.noise_of((4, size, size))
  seed, out = test_families.SEEDS[0], tmp_path / "pictures"  # and the next, as there
  flags = [f"--prompts={PROMPT}", f"--seed={seed}", "--images-per-prompt=2", "--steps=10"]
  flags += ["--guidance=4", "--batch-size=1", "--negative=two blue squares"]
  assert generate.main([f"--model={workdir}", f"--out={out}", *flags]) == 0
  ours = [np.asarray(Image.open(out / f"00000-0{i}.png"), float) for i in range(2)]
  theirs = pipe(
    [PROMPT] * 2,
    negative_prompt=["two blue squares"] * 2,
    latents=torch.tensor(noise),
    num_inference_steps=10,
    guidance_scale=4.0,
    output_type="np",
  ).images
  assert np.abs(theirs * 255 - ours).max() <= 1.0
  assert np.abs(ours[0] - ours[1]).max() > 1.0


@pytest.mark.long
@live
@pytest.mark.parametrize("family", families.FAMILIES)
def test_pytorch_reads_the_single_file(family, tmp_path):
  import torch
  from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

  model = families.write_pipeline(family, tmp_path)
  loaded = pipeline.load_pipeline(str(model))
  file = tmp_path / "one.safetensors"
  scheduler = loaded.configs["scheduler"] | {"rescale_betas_zero_snr": True}
  marked = dataclasses.replace(loaded, configs={**loaded.configs, "scheduler": scheduler})
  save.save_single_file(file, marked, dtype=np.float32)
  kind = StableDiffusionXLPipeline if loaded.family.takes_sizes else StableDiffusionPipeline
  read = kind.from_single_file(str(file), config=str(model), local_files_only=True)
  whole = kind.from_pretrained(model)
  for part in loaded.params:
    ours, theirs = getattr(read, part).state_dict(), getattr(whole, part).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), part


@pytest.mark.parametrize(
  ("stated", "markers"),
  [
    ({}, set()),
    ({"prediction_type": "v_prediction"}, {"v_pred"}),
    (
      {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
      {"v_pred", "ztsnr"},
    ),
  ],
)
def test_a_single_file_says_what_the_unet_predicts(stated, markers, sdxl, tmp_path):
  """To ComfyUI and A1111's web UI, which look for two empty tensors beside SDXL's weights."""
  model = shutil.copytree(sdxl, tmp_path / "model")
  file = model / "scheduler" / "scheduler_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | stated))
  out = tmp_path / "one.safetensors"
  assert export.main([f"--workdir={model}", f"--out={out}", "--single-file"]) == 0
  tensors = load_file(out)
  assert {"v_pred", "ztsnr"} & tensors.keys() == markers
  assert all(tensors[name].shape == (0,) for name in markers)


def test_export_refuses(tuned_run, tmp_path, capsys):
  model, workdir = tuned_run
  base = [f"--workdir={workdir}"]
  (tmp_path / "there").mkdir()
  assert "exists" in fails(export, [*base, f"--out={tmp_path / 'there'}"], capsys)
  new = f"--out={tmp_path / 'new'}"
  assert "--out" in fails(export, base, capsys)
  named = [*base, f"--out={tmp_path / 'new.safetensors'}"]
  assert "names a file: add --single-file or --lora" in fails(export, named, capsys)
  assert "--single-file writes a file" in fails(export, [*base, new, "--single-file"], capsys)
  assert "invalid choice" in fails(export, [*base, new, "--dtype=int8"], capsys)
  assert "unrecognized arguments: --ouch" in fails(export, [*base, new, "--ouch"], capsys)
  assert "cannot find a checkpoint of step 7" in fails(export, [*base, new, "--step=7"], capsys)
  assert "model_index.json" in fails(export, [f"--workdir={tmp_path}", new], capsys)
  changed = shutil.copytree(workdir, tmp_path / "changed")
  config = json.loads((changed / "config.json").read_text())
  other = families.write_pipeline("sd15", tmp_path, shallow=True)
  config["model"]["path"] = str(other)
  (changed / "config.json").write_text(json.dumps(config))
  message = fails(export, [f"--workdir={changed}", new], capsys)
  assert "are not those" in message
  assert not (tmp_path / "new").exists()


def test_a_full_disk_and_no_place_at_all_are_one_line(
  tiny_pipeline, tmp_path, capsys, monkeypatch
):
  flags = [f"--workdir={tiny_pipeline}", "--dtype=float32"]
  assert "cannot write to /proc/x" in fails(export, [*flags, "--out=/proc/x/y"], capsys)

  def full(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device")

  monkeypatch.setattr(save, "save_file", full)
  for more in (
    [f"--out={tmp_path / 'd'}"],
    [f"--out={tmp_path}/f.safetensors", "--single-file"],
  ):
    assert "No space left on device" in fails(export, [*flags, *more], capsys)
  assert not list(tmp_path.iterdir())


def test_a_runs_pictures_are_drawn_as_it_was_evaluated(tuned_run, tmp_path, capsys):
  _, workdir = tuned_run
  evaluated = json.loads((workdir / "config.json").read_text())["evaluate"]["guidance"]
  flags = (f"--prompts={PROMPT}", "--steps=1")
  assert generate.main([f"--model={workdir}", f"--out={tmp_path / 'a'}", *flags]) == 0
  shown = Image.open(tmp_path / "a" / "00000-00.png").info
  assert json.loads(shown["jaxpref"])["guidance"] == evaluated != 7.5


def test_weights_too_large_for_float16(tiny_pipeline, tmp_path, capsys):
  model = shutil.copytree(tiny_pipeline, tmp_path / "model")
  file = model / "unet" / "diffusion_pytorch_model.safetensors"
  tensors = load_file(file)
  tensors["conv_in.bias"][0] = 1e6
  save.save_file(tensors, file)
  flags = [f"--workdir={model}", f"--out={tmp_path / 'out'}"]
  assert "conv_in.bias has weights too large for float16" in fails(export, flags, capsys)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]  # nothing half-written
  assert export.main([*flags, "--dtype=bfloat16"]) == 0
  read = pipeline.load_pipeline(str(tmp_path / "out")).params["unet"]["conv_in"]["bias"]
  assert read[0] == pytest.approx(1e6, rel=1e-2)


def draw(out: Path, *flags: str, model: Path | str) -> dict[str, np.ndarray]:
  """Pictures by file name."""
  assert generate.main([f"--model={model}", f"--out={out}", "--steps=2", *flags]) == 0
  return {p.name: np.asarray(Image.open(p), int) for p in sorted(out.glob("*.png"))}


@pytest.fixture
def prompts(tmp_path) -> Path:
  file = tmp_path / "prompts.txt"
  file.write_text("a red circle\n\n two stars \na cross\n", encoding="utf-8")
  return file


@pytest.mark.long
def test_pictures_depend_on_prompt_and_seed_alone(tiny_pipeline, prompts, tmp_path):
  flags = (f"--prompts={prompts}", "--images-per-prompt=2", "--seed=5")
  one = draw(tmp_path / "a", *flags, "--batch-size=4", model=tiny_pipeline)
  assert list(one) == [f"{p:05d}-{i:02d}.png" for p in range(3) for i in range(2)]
  two = draw(tmp_path / "b", *flags, "--batch-size=1", model=tiny_pipeline)
  alone = draw(tmp_path / "c", "--prompts=two stars", "--seed=8", model=tiny_pipeline)
  program = [sys.executable, "-m", "jaxpref.generate", f"--model={tiny_pipeline}", "--steps=2"]
  env = os.environ | WITHOUT_TORCH | {"XLA_FLAGS": xla_flags(devices=8)}
  subprocess.run([*program, *flags, f"--out={tmp_path / 'd'}"], env=env, check=True)
  for name, picture in one.items():
    assert np.abs(two[name] - picture).max() <= 1
    many = np.asarray(Image.open(tmp_path / "d" / name), int)
    assert np.abs(many - picture).max() <= 1
  assert np.abs(alone["00000-00.png"] - one["00001-01.png"]).max() <= 1
  assert np.abs(one["00001-00.png"] - one["00001-01.png"]).max() > 1


def test_it_goes_on_where_it_stopped(tiny_pipeline, prompts, tmp_path, capsys):
  out, flags = tmp_path / "a", [f"--prompts={prompts}", "--guidance=2"]
  draw(out, *flags, model=tiny_pipeline)
  before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir()}
  (out / "00001-00.png").unlink()
  capsys.readouterr()
  draw(out, *flags, model=tiny_pipeline)
  assert "3 images in" in (said := capsys.readouterr().out) and "1 of them new" in said
  for name, (data, changed) in before.items():
    assert (out / name).read_bytes() == data
    assert ((out / name).stat().st_mtime_ns == changed) == (name != "00001-00.png")
  base = [f"--model={tiny_pipeline}", f"--out={out}", f"--prompts={prompts}", "--steps=2"]
  message = fails(generate, [*base, "--guidance=3"], capsys)
  assert "guidance was 2.0, now 3.0; choose another --out" in message
  (out / "00002-00.png").write_bytes(b"mine")
  assert "not an image of this program" in fails(generate, [*base, "--guidance=2"], capsys)
  assert (out / "00002-00.png").read_bytes() == b"mine"


def test_settings_travel_with_the_picture(tiny_pipeline, tmp_path):
  flags = ("--prompts=ein größerer Ring", "--negative=a cross", "--size=64x32", "--seed=3")
  shown = draw(tmp_path, *flags, "--solver=ddim", model=tiny_pipeline)
  assert shown["00000-00.png"].shape == (32, 64, 3)
  info = Image.open(tmp_path / "00000-00.png").info
  settings = json.loads(info["jaxpref"])
  assert settings["prompt"] == "ein größerer Ring" and settings["seed"] == 3
  assert settings["size"] == [32, 64] and settings["solver"] == "ddim"
  assert info["parameters"].splitlines() == [
    "ein größerer Ring",
    "Negative prompt: a cross",
    "Steps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: 3, Size: 64x32, Model: pipeline",
  ]


@pytest.mark.long
def test_a_setting_changes_the_picture(tiny_pipeline, tmp_path):
  flags = ("--prompts=a ring", "--steps=3")
  shown = {
    other: draw(tmp_path / other, *flags, other, model=tiny_pipeline)["00000-00.png"]
    for other in ("--seed=0", "--negative=a cross", "--solver=ddpm", "--order=1")
  }
  plain = shown.pop("--seed=0")
  assert all((plain != picture).any() for picture in shown.values())


@pytest.mark.long
def test_no_guidance_is_the_prompts_own_prediction(tiny_pipeline, tmp_path):
  """At any scale of at most 1, as in diffusers."""
  none, below = (
    draw(tmp_path / flags[0], "--prompts=a ring", *flags, model=tiny_pipeline)
    for flags in (("--guidance=0",), ("--guidance=0.5",))
  )
  assert (none["00000-00.png"] == below["00000-00.png"]).all()


@pytest.mark.parametrize("part", ["unet", pytest.param("vae", marks=pytest.mark.long)])
def test_pixels_that_are_not_finite_are_not_written(part, tiny_pipeline, tmp_path, capsys):
  """Though every weight is: said in one line with the prompt, and tried again."""
  model = shutil.copytree(tiny_pipeline, tmp_path / "model")
  file = model / part / "diffusion_pytorch_model.safetensors"
  tensors = load_file(file)
  name = "conv_out.weight" if part == "unet" else "decoder.conv_out.weight"
  tensors[name] = np.full_like(tensors[name], 3e38)
  save.save_file(tensors, file)
  flags = [f"--model={model}", f"--out={tmp_path / 'out'}", "--prompts=a ring", "--steps=2"]
  for _ in range(2 if part == "vae" else 1):
    assert generate.main([*flags, "--images-per-prompt=2"]) == 3
    message = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 2 images not written because of non-finite pixels" in message
    assert "the first is 00000-00.png of 'a ring'" in message
    assert not list((tmp_path / "out").glob("*"))


def test_pictures_beside_one_that_is_not_finite_are_written(
  tiny_pipeline, prompts, tmp_path, capsys, monkeypatch
):
  def broken(params, cond, seeds):
    images, finite = np.zeros((len(seeds), 16, 16, 3), np.uint8), np.asarray(seeds) != 1
    raise evaluation.NonFiniteError(images, finite, ["x"] * len(seeds))

  monkeypatch.setattr(evaluation, "make_generator", lambda *_, **__: broken)
  out = tmp_path / "out"
  assert (
    generate.main([f"--model={tiny_pipeline}", f"--out={out}", f"--prompts={prompts}"]) == 3
  )
  said = capsys.readouterr()
  assert "2 images in" in said.out and "1 of 3 images not" in said.err
  assert sorted(p.name for p in out.iterdir()) == ["00000-00.png", "00002-00.png"]


@pytest.mark.long
@pytest.mark.parametrize("decode", ["sliced", "tiled"])
def test_ways_to_decode_agree(tiny_pipeline, tmp_path, decode):
  flags = ("--prompts=a ring", "--images-per-prompt=3", "--size=12")  # of one tile
  whole = draw(tmp_path / "whole", *flags, model=tiny_pipeline)
  other = draw(tmp_path / decode, *flags, f"--decode={decode}", model=tiny_pipeline)
  assert whole.keys() == other.keys()
  assert max(np.abs(other[name] - picture).max() for name, picture in whole.items()) <= 1


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--prompts=a"], "required: --out"),
    (["--prompts=nowhere.txt", "--out=x"], "cannot read 'nowhere.txt'"),
    (["--prompts= ", "--out=x"], "--prompts is empty"),
    (["--prompts=a", "--out=x", "--steps=0"], "must be at least 1"),
    (["--prompts=a", "--out=x", "--steps=-3"], "must be at least 1"),
    (["--prompts=a", "--out=x", "--steps=many"], "--steps"),
    (["--prompts=a", "--out=x", "--steps=2000"], "between 1 and 1000"),
    (["--prompts=a", "--out=x", "--size=33"], "multiples of 2 (got 33 x 33 pixels)"),
    (["--prompts=a", "--out=x", "--size=big"], "must be like 512 or 512x768"),
    (["--prompts=a", "--out=x", "--seed=-1"], "--seed must be at least 0"),
    (["--prompts=a", "--out=x", "--guidance=-1"], "--guidance must be finite and at least 0"),
    (["--prompts=a", "--out=x", "--guidance=nan"], "--guidance must be finite"),
    (["--prompts=a", "--out=x", "--negative=b", "--guidance=1"], "above 1 (got 1)"),
    (["--prompts=/tmp", "--out=x"], "it is not a regular file"),
    (["--prompts=nowhere.jsonl", "--out=x"], "cannot read 'nowhere.jsonl'"),
    (
      ["--prompts=a", "--out=x", "--step=3"],
      "--step and --no-ema only apply to a run's workdir",
    ),
    (["--prompts=a", "--out=~nobody-here/x"], "this user has no home directory"),
    (["--prompts=a", "--out=x", "--guidence=1"], "unrecognized arguments"),
    (["--prompts=a", "--out=setup.py"], "is a file, not a directory"),
  ],
)
def test_generate_refuses(tiny_pipeline, capsys, flags, message):
  assert message in fails(generate, [f"--model={tiny_pipeline}", *flags], capsys)
  assert not Path("x").exists()
