"""A narrow SD3.5-medium pipeline: read as diffusers wrote it, it samples the same images."""

import json

import families
import flow_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import live
from safetensors.numpy import load_file

from jaxpref import rng as rng_lib
from jaxpref import sharding
from jaxpref.data import encode
from jaxpref.diffusion import sampler
from jaxpref.errors import UserError
from jaxpref.evaluation import sampling
from jaxpref.models import lora, pipeline, save
from jaxpref.models.dit import original_names
from jaxpref.models.families import sd3

STEPS, GUIDANCE, SIZE = 20, 5.0, (32, 40)
SEEDS = np.array([11, 12], np.uint32)
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers wants that said


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return flow_networks.write_sd3(tmp_path_factory.mktemp("sd3"), t5=False)


def test_the_index_tells_the_family(directory):
  described = pipeline.describe_pipeline(str(directory))
  assert described.family is sd3.FAMILY
  assert described.latent_shape == (16, 16, 16) and described.size_unit == 4
  assert described.attentions() == [(4, 8 * 8 + 77 + 256)]
  cond = described.abstract_cond(2)
  assert {k: x.shape for k, x in cond.items()} == {"text": (2, 333, 96), "pooled": (2, 80)}


@pytest.mark.parametrize(
  "part, fields, message",
  [
    ("transformer", {"pooled_projection_dim": 48}, "both CLIP encoders make 80 and 80"),
    ("transformer", {"joint_attention_dim": 64}, "takes texts of width 64"),
    ("vae", {"latent_channels": 4}, "takes latents of 16 channels, but the VAE makes 4"),
  ],
)
def test_parts_that_do_not_belong_together(directory, part, fields, message, tmp_path):
  copy = tmp_path / "copy"
  flow_networks.shutil.copytree(directory, copy)
  file = copy / part / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))
  with pytest.raises(UserError, match=message):
    pipeline.describe_pipeline(str(copy))


@pytest.mark.long
def test_a_single_file_has_comfyuis_names(directory, tmp_path):
  loaded = pipeline.load_pipeline(str(directory))
  save.save_single_file(tmp_path / "one.safetensors", loaded, dtype=np.float32)
  tensors = load_file(tmp_path / "one.safetensors")
  for name in (
    "model.diffusion_model.joint_blocks.0.x_block.attn2.qkv.weight",
    "first_stage_model.decoder.up.0.block.0.conv1.weight",
    "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight",
    "text_encoders.clip_g.transformer.text_projection.weight",
  ):
    assert name in tensors
  own = {k: x for k, x in tensors.items() if k.startswith(original_names.PREFIX)}
  back = original_names.from_original(own, original_names.SD3)
  written = load_file(directory / "transformer" / "diffusion_pytorch_model.safetensors")
  assert back.keys() == written.keys()
  assert all((back[name] == value).all() for name, value in written.items())


@pytest.mark.long
@live
@pytest.mark.parametrize("t5", [False, True])
def test_diffusers_pipeline_makes_the_same_images(t5, tmp_path):
  """20 steps of Euler, guided, not square; ours reads what diffusers wrote."""
  import torch
  from diffusers import StableDiffusion3Pipeline
  from transformers import T5TokenizerFast

  path = flow_networks.write_sd3(tmp_path, t5=t5)
  parts = WITHOUT_T5
  if t5:  # with add_prefix_space, transformers would need the library sentencepiece
    folder = path / "tokenizer_3"
    tokenizer = T5TokenizerFast.from_pretrained(folder, add_prefix_space=None)
    parts = {"tokenizer_3": tokenizer}
  theirs = StableDiffusion3Pipeline.from_pretrained(path, **parts)
  theirs.set_progress_bar_config(disable=True)
  theirs.save_pretrained(tmp_path / "theirs")
  ours = pipeline.load_pipeline(str(tmp_path / "theirs"))
  mesh = sharding.make_mesh()
  cond = encode.encode_prompts(ours, mesh, families.PROMPTS)
  with torch.no_grad():
    text, _, pooled, _ = theirs.encode_prompt(
      families.PROMPTS, families.PROMPTS, families.PROMPTS
    )
  np.testing.assert_allclose(cond["text"], text.numpy(), atol=2e-5)
  np.testing.assert_allclose(cond["pooled"], pooled.numpy(), atol=2e-5)
  shape = sampling.latent_shape_of(ours, SIZE)
  keys = jax.vmap(lambda s: rng_lib.key_of(0, "generate", s))(jnp.asarray(SEEDS))
  noise = np.array(sampler.initial_noise(keys, shape))
  want = theirs(
    families.PROMPTS,
    latents=torch.tensor(noise),
    height=SIZE[0],
    width=SIZE[1],
    num_inference_steps=STEPS,
    guidance_scale=GUIDANCE,
    output_type="np",
  ).images
  generate = sampling.make_generator(
    *(ours, mesh),
    num_steps=STEPS,
    guidance=GUIDANCE,
    batch_size=2,
    order=1,
    size=SIZE,
  )
  images = generate(ours.denoiser_params, cond, SEEDS)
  assert images.std() > 20
  assert np.abs(images - 255.0 * want).max() < 1.0  # theirs are not rounded


@pytest.mark.long
@live
def test_diffusers_pipeline_loads_the_additions(directory, tmp_path):
  from diffusers import StableDiffusion3Pipeline

  loaded = pipeline.load_pipeline(str(directory))
  additions = lora.init_lora(
    loaded.denoiser_params, rank=2, targets=sd3.FAMILY.lora_targets, key=jax.random.key(0)
  )
  adapted = lora.Adapted(loaded.denoiser_params, additions, 2.0)
  tensors, metadata = sd3.FAMILY.export_lora(adapted, loaded.modules, np.float32)
  save.save_tensors(tmp_path / "lora.safetensors", tensors, metadata)
  theirs = StableDiffusion3Pipeline.from_pretrained(directory, **WITHOUT_T5)
  theirs.load_lora_weights(tmp_path / "lora.safetensors")
  layers = dict(theirs.transformer.named_modules())
  found = layers["transformer_blocks.1.attn.add_k_proj"].lora_A["default_0"].weight
  down = additions["transformer_blocks_1"]["attn"]["add_k_proj"]["down"]
  np.testing.assert_array_equal(found.detach().numpy(), np.asarray(down).T)
