"""Narrow Flux.1 pipelines: read as diffusers wrote them, they sample the same images."""

import json
import shutil

import families
import flow_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from conftest import live
from PIL import Image
from safetensors.numpy import load_file

from jaxpref import config as config_lib
from jaxpref import export, main, sharding
from jaxpref import generate as generate_program
from jaxpref import rng as rng_lib
from jaxpref.data import encode
from jaxpref.diffusion import sampler, timesteps
from jaxpref.errors import UserError
from jaxpref.evaluation import sampling
from jaxpref.models import pipeline, save
from jaxpref.models.dit import flux_transformer, original_names
from jaxpref.models.families import flux
from jaxpref.training import flops, load_run, programs, setup

SIZE = (32, 40)
SEEDS = np.array([11, 12], np.uint32)


@pytest.fixture(scope="module")
def loaded(flux_directory):
  return pipeline.load_pipeline(str(flux_directory))


def _torch_pipeline(path):
  from diffusers import FluxPipeline
  from transformers import T5TokenizerFast

  # With add_prefix_space, transformers would need the library sentencepiece.
  tokenizer = T5TokenizerFast.from_pretrained(path / "tokenizer_2", add_prefix_space=None)
  pipe = FluxPipeline.from_pretrained(path, tokenizer_2=tokenizer)
  pipe.set_progress_bar_config(disable=True)
  return pipe


@pytest.fixture(scope="module")
def theirs(flux_directory):
  return _torch_pipeline(flux_directory)


def test_the_index_tells_the_family(flux_directory):
  described = pipeline.describe_pipeline(str(flux_directory))
  assert described.family is flux.FAMILY
  assert described.latent_shape == (16, 16, 16) and described.size_unit == 4
  assert described.attentions() == [(2, 8 * 8 + 512)]
  cond = described.abstract_cond(2)
  assert {k: x.shape for k, x in cond.items()} == {"text": (2, 512, 24), "pooled": (2, 32)}
  assert described.spacing() == {"spacing": "trailing"}


@pytest.mark.long
@pytest.mark.parametrize(
  ("name", "length", "told", "usual", "levels"),
  [  # the levels are those of diffusers' scheduler
    ("FLUX.1-dev", 512, True, 3.5, [1, 0.90453, 0.75951, 0.51284]),
    ("FLUX.1-schnell", 256, False, 1.0, [1, 0.75, 0.5, 0.25]),
  ],
)
def test_the_published_models(name, length, told, usual, levels):
  described = pipeline.describe_pipeline(f"black-forest-labs/{name}")
  assert described.image_size == 1024 and described.latent_shape == (16, 128, 128)
  assert described.abstract_cond(1)["text"].shape == (1, length, 4096)
  assert described.takes_guidance is told
  assert described.family.guidance(described.denoiser) == usual
  assert described.classifier_free_scale(3.0) == (1.0 if told else 3.0)
  tokens = timesteps.image_tokens(described.latent_shape)
  grid = timesteps.uniform_grid(described.schedule, 4, 1, **described.spacing(), tokens=tokens)
  np.testing.assert_allclose(grid.timesteps[:, 0], levels, atol=1e-5)


@pytest.mark.parametrize(
  ("part", "fields", "message"),
  [
    ("transformer", {"pooled_projection_dim": 48}, "pooled texts of 48 .* make 24, 32 and 16"),
    ("transformer", {"joint_attention_dim": 64}, "takes texts of width 64"),
    ("vae", {"latent_channels": 4}, "latents of 16 channels, .* make 24, 32 and 4"),
  ],
)
def test_parts_that_do_not_belong_together(flux_directory, part, fields, message, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(flux_directory, copy)
  file = copy / part / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))
  with pytest.raises(UserError, match=message):
    pipeline.describe_pipeline(str(copy))


def test_a_model_that_is_told_guidance_takes_no_negative_prompt(loaded):
  options = {"num_steps": 2, "guidance": 3.5, "batch_size": 1, "negative": "blurred"}
  with pytest.raises(UserError, match="does not take a negative prompt"):
    sampling.make_generator(loaded, sharding.make_mesh(), **options)


def test_only_models_that_are_told_guidance_train_with_it(tiny_pipeline, tmp_path, capsys):
  fields = {"model.guidance": 3.5}
  assert main.main(runs.arguments(tiny_pipeline, tmp_path / "run", "dpo", **fields)) == 2
  assert "model.guidance = 3.5 has no effect" in capsys.readouterr().err


def test_steps_are_trained_with_the_guidance_of_their_sampling(flux_directory):
  config = config_lib.load_config("ppo:tiny")
  config.model.path = str(flux_directory)
  config.rollout.guidance, config.rollout.solver = 3.5, "flow_sde"
  mesh = sharding.make_mesh()
  with pytest.raises(UserError, match=r"model.guidance = rollout.guidance \(got 1.0 and 3.5\)"):
    setup.check(config, mesh=mesh)
  config.model.guidance = 3.5
  checked = setup.check(config, mesh=mesh)
  # The scale is an input: a prediction costs one evaluation in sampling and in training.
  costs = [flops.of_update(checked, 1.0)]
  config.model.guidance = config.rollout.guidance = 1.0
  costs.append(flops.of_update(checked, 1.0))
  assert costs[0] == costs[1]


def test_targets_are_the_policys_own_at_the_guidance_of_training(flux_directory):
  config = config_lib.load_config("dro:tiny")
  config.model.path = str(flux_directory)
  checked = setup.check(config, mesh=sharding.make_mesh())
  assert programs.has_own_targets(checked)
  config.rollout.guidance = 3.5
  assert not programs.has_own_targets(checked)
  config.model.guidance = 3.5
  assert programs.has_own_targets(checked)


@pytest.mark.long
@live
@pytest.mark.parametrize(
  ("name", "steps", "guidance"), [("flux.1-dev", 12, 3.5), ("flux.1-schnell", 4, 1.0)]
)
def test_diffusers_pipeline_makes_the_same_images(name, steps, guidance, tmp_path):
  """The image is not square, so that the shift of its number of tokens counts."""
  import torch

  theirs = _torch_pipeline(flow_networks.write_flux(tmp_path, name))
  theirs.save_pretrained(tmp_path / "theirs")
  ours = pipeline.load_pipeline(str(tmp_path / "theirs"))
  mesh = sharding.make_mesh()
  tokens = 512 if name == "flux.1-dev" else 256
  texts = [families.PROMPTS[0], families.PROMPTS[1] * 90]  # the second is cut
  cond = jax.tree.map(np.asarray, encode.encode_prompts(ours, mesh, texts))
  text, pooled, _ = theirs.encode_prompt(texts, None, max_sequence_length=tokens)
  np.testing.assert_allclose(cond["text"], text.detach().numpy(), atol=1e-4)
  np.testing.assert_allclose(cond["pooled"], pooled.detach().numpy(), atol=2e-5)
  shape = sampling.latent_shape_of(ours, SIZE)
  keys = jax.vmap(lambda s: rng_lib.key_of(0, "generate", s))(jnp.asarray(SEEDS))
  noise = sampler.initial_noise(keys, shape)
  packed = flux_transformer.pack(noise)
  latents = theirs(
    texts,
    latents=torch.tensor(np.array(packed)),
    height=SIZE[0],
    width=SIZE[1],
    num_inference_steps=steps,
    guidance_scale=guidance,
    max_sequence_length=tokens,
    output_type="latent",
  ).images
  denoise = ours.make_denoise(guidance=guidance)

  @jax.jit
  def sample(params, cond):
    return sampling.sample_seeds(
      *(lambda x_t, t: denoise(params, x_t, t, cond), jnp.asarray(SEEDS), ours, shape),
      num_steps=steps,
      solver="dpm_solver",
      order=1,
    )

  found = np.asarray(flux_transformer.pack(sample(ours.denoiser_params, cond)))
  want = latents.numpy()
  assert np.abs(want - packed).mean() > 0.3
  np.testing.assert_allclose(found, want, atol=1e-4)
  with torch.no_grad():
    unpacked = theirs._unpack_latents(latents, *SIZE, theirs.vae_scale_factor)
    vae = theirs.vae.config
    decoded = theirs.vae.decode(unpacked / vae.scaling_factor + vae.shift_factor).sample
    pixels = theirs.image_processor.postprocess(decoded, output_type="np")
  settings = {"num_steps": steps, "batch_size": 2, "order": 1, "size": SIZE}
  generate = sampling.make_generator(ours, mesh, guidance=guidance, **settings)
  images = generate(ours.denoiser_params, cond, SEEDS)
  assert images.std() > 20
  assert np.abs(images - 255.0 * pixels).max() < 1.0  # theirs are not rounded


@pytest.mark.long
@live
def test_a_single_file_is_read_back(loaded, flux_directory, tmp_path):
  """By ComfyUI's names, bit for bit. diffusers' reader of Flux has a width of 3072 only."""
  from diffusers import AutoencoderKL

  file = tmp_path / "one.safetensors"
  save.save_single_file(file, loaded, dtype=np.float32)
  tensors = load_file(file)
  for name in (
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
    "model.diffusion_model.single_blocks.1.linear1.weight",
    "model.diffusion_model.guidance_in.in_layer.weight",
    "vae.decoder.up.0.block.0.conv1.weight",
    "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight",
    "text_encoders.t5xxl.transformer.shared.weight",
  ):
    assert name in tensors
  own = {k: x for k, x in tensors.items() if k.startswith(original_names.PREFIX)}
  vae = AutoencoderKL.from_single_file(str(file), config=str(flux_directory), subfolder="vae")
  back = {
    "transformer": original_names.from_original(own, original_names.FLUX),
    "vae": {name: x.numpy() for name, x in vae.state_dict().items()},
  }
  for part, found in back.items():
    written = load_file(flux_directory / part / "diffusion_pytorch_model.safetensors")
    assert found.keys() == written.keys()
    assert all((found[name] == value).all() for name, value in written.items())


@pytest.mark.long
@live
def test_a_run_trains_generates_and_is_read_by_diffusers(
  flux_directory, theirs, tmp_path, tfds_dir, monkeypatch, capsys
):
  """Supervised, so that the loss is the error at the scale that training has."""
  import torch

  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
  work, images, out = (tmp_path / name for name in ("run", "images", "tuned"))
  fields = {"train.num_updates": 2, "optim.lr": 1e-3, "evaluate.num_prompts": 1}
  fields |= {"model.guidance": 2.0, "evaluate.guidance": 3.5, "model.remat": "blocks"}
  fields |= {"evaluate.scorers": "()", "data.latents": "sample"}
  assert main.main(runs.arguments(flux_directory, work, "sft", **fields)) == 0
  losses = [line["loss"] for line in runs.lines(work) if "loss" in line]
  assert len(losses) == 2 and np.isfinite(losses).all()
  flags = [f"--model={work}", f"--out={images}", "--prompts=a red circle", "--steps=2"]
  assert generate_program.main([*flags, "--size=40x32"]) == 0
  assert [file.name for file in images.iterdir()] == ["00000-00.png"]
  with Image.open(images / "00000-00.png") as image:
    assert image.size == (40, 32) and '"guidance": 3.5' in image.info["jaxpref"]
  assert export.main([f"--workdir={work}", f"--out={out}", "--dtype=float32"]) == 0
  tuned, params = _torch_pipeline(out).transformer, load_run.load(str(work)).denoiser_params
  given = flow_networks.inputs(tuned.config, size=(4, 6))
  with torch.no_grad():
    want, base = (
      flow_networks.torch_output(network, given).numpy()
      for network in (tuned, theirs.transformer)
    )
  cond = {name: given[name] for name in ("text", "pooled", "guidance")}
  denoise = jax.jit(pipeline.describe_pipeline(str(out)).make_denoise())
  ours = denoise(params, given["x"], given["t"], cond)
  np.testing.assert_allclose(ours, want, atol=1e-5 * np.abs(want).max())
  assert np.abs(want - base).max() > 1e-4


@pytest.mark.long
@live
def test_an_exported_lora_is_read_by_diffusers(loaded, theirs):
  pytest.importorskip("peft")
  import torch

  base, params = loaded.denoiser_params, flow_networks.with_lora(loaded)
  tensors, metadata = loaded.family.export_lora(params, loaded.modules, np.float32)
  assert len(tensors) == 2 * (2 * 8 + 2 * 3) and metadata == {}
  assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in tensors
  given = flow_networks.inputs(loaded.configs["transformer"], size=(4, 6))
  theirs.load_lora_weights({name: torch.tensor(array) for name, array in tensors.items()})
  with torch.no_grad():
    want = flow_networks.torch_output(theirs.transformer, given).numpy()
  theirs.unload_lora_weights()
  cond = {name: given[name] for name in ("text", "pooled", "guidance")}
  denoise = jax.jit(loaded.make_denoise())
  out, plain = (denoise(p, given["x"], given["t"], cond) for p in (params, base))
  np.testing.assert_allclose(out, want, atol=1e-5 * np.abs(want).max())
  assert np.abs(out - plain).max() > 1e-2
  # Without a scale in the conditioning, all rows have the same.
  del cond["guidance"]
  told = jax.jit(loaded.make_denoise(guidance=3.5))(base, given["x"], given["t"], cond)
  assert given["guidance"].tolist() == [3.5, 1.25]
  np.testing.assert_allclose(told[0], plain[0], atol=1e-5)
  assert np.abs(told[1] - plain[1]).max() > 1e-2
