"""SANA's pipeline, reduced, as diffusers writes it: its text, an image, and what is refused."""

from pathlib import Path

import flow_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import sana_models
from conftest import live

from jaxpref import export, main, rng, sharding
from jaxpref.data import encode
from jaxpref.diffusion import sampler
from jaxpref.errors import UserError
from jaxpref.evaluation import sampling
from jaxpref.models import pipeline
from jaxpref.models.families import sana
from jaxpref.training import load_run

pytestmark = [pytest.mark.long, live]

TOKENIZER = Path(__file__).parent / "golden" / "tokenizers" / "gemma"
PROMPTS = ["Two Red squares ", "a circle, " * 200]  # the second is cut
SIZE = (64, 96)
SEEDS = np.array([3, 4], np.uint32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return sana_models.write_pipeline(tmp_path_factory.mktemp("sana") / "pipeline", TOKENIZER)


@pytest.fixture(scope="module")
def loaded(directory):
  return pipeline.load_pipeline(str(directory))


@pytest.fixture(scope="module")
def theirs(directory):
  from diffusers import SanaPipeline

  pipe = SanaPipeline.from_pretrained(directory)
  pipe.set_progress_bar_config(disable=True)
  return pipe


def test_the_instruction_is_diffusers():
  import inspect

  from diffusers import SanaPipeline

  default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]
  assert "\n".join(default.default) == sana.INSTRUCTION


def test_text_is_diffusers(loaded, theirs):
  lines = sana.INSTRUCTION.split("\n")
  found = theirs.encode_prompt(PROMPTS, complex_human_instruction=lines)
  mesh = sharding.make_mesh()
  ours = encode.encode_prompts(loaded, mesh, PROMPTS), encode.encode_no_prompt(loaded, mesh)
  shapes = loaded.abstract_cond(2)
  for cond, (text, mask) in zip(ours, (found[:2], found[2:]), strict=True):
    rows = len(cond["mask"])
    np.testing.assert_array_equal(cond["mask"], mask[:rows])
    kept = mask[:rows].numpy() == 1
    want = text[:rows].detach().numpy()
    np.testing.assert_allclose(cond["text"][kept], want[kept], atol=1e-5 * np.abs(want).max())
  assert {k: (v.shape, v.dtype) for k, v in ours[0].items()} == {
    k: (v.shape, v.dtype) for k, v in shapes.items()
  }
  assert ours[0]["mask"].sum(axis=1).tolist() != [300, 300]


def test_a_guided_image_is_diffusers(loaded, theirs):
  mesh = sharding.make_mesh()
  keys = jax.vmap(lambda s: rng.key_of(0, "generate", s))(jnp.asarray(SEEDS))
  shape = sampling.latent_shape_of(loaded, SIZE)
  noise = np.array(sampler.initial_noise(keys, shape))
  import torch

  want = theirs(
    PROMPTS,
    latents=torch.tensor(noise),
    height=SIZE[0],
    width=SIZE[1],
    num_inference_steps=20,
    guidance_scale=4.5,
    use_resolution_binning=False,
    output_type="np",
  ).images
  generate = sampling.make_generator(
    loaded, mesh, num_steps=20, guidance=4.5, batch_size=2, size=SIZE
  )
  cond = encode.encode_prompts(loaded, mesh, PROMPTS)
  ours = generate(loaded.denoiser_params, cond, SEEDS)
  assert ours.shape == want.shape == (2, *SIZE, 3)
  assert np.abs(ours.astype(int) - np.round(want * 255).astype(int)).max() <= 1
  assert ours.std() > 10 and np.abs(ours[0].astype(int) - ours[1]).max() > 10


def test_other_sizes_are_refused(loaded):
  assert loaded.image_size == 96
  with pytest.raises(UserError, match="multiples of 32"):
    sampling.latent_shape_of(loaded, (64, 80))


def test_an_exported_lora_is_read_by_diffusers(loaded, theirs):
  pytest.importorskip("peft")
  import torch

  base, params = loaded.denoiser_params, flow_networks.with_lora(loaded)
  tensors, metadata = loaded.family.export_lora(params, loaded.modules, np.float32)
  assert len(tensors) == 2 * 2 * 2 * 3 and metadata == {}
  theirs.load_lora_weights({name: torch.tensor(array) for name, array in tensors.items()})
  x, t, text, mask = sana_models.transformer_inputs()
  text = np.ascontiguousarray(text[:, :, :16])
  with torch.no_grad():
    given = (torch.tensor(v) for v in (x, text, t))
    want = theirs.transformer(*given, encoder_attention_mask=torch.tensor(mask)).sample.numpy()
  theirs.unload_lora_weights()
  denoise = jax.jit(loaded.make_denoise())
  cond = {"text": text, "mask": mask}
  out, plain = denoise(params, x, t, cond), denoise(base, x, t, cond)
  np.testing.assert_allclose(out, want, atol=1e-5 * np.abs(want).max())
  assert np.abs(out - plain).max() > 1e-2


def test_parts_that_do_not_fit_are_refused(directory, tmp_path):
  import json
  import shutil

  other = tmp_path / "other"
  shutil.copytree(directory, other)
  file = other / "transformer" / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"caption_channels": 24}))
  with pytest.raises(UserError, match="takes texts of width 24 .* make 16 and 4"):
    pipeline.describe_pipeline(str(other))


def test_a_run_is_trained_and_its_export_is_read_by_diffusers(
  directory, loaded, theirs, tmp_path, tfds_dir, monkeypatch
):
  import torch
  from diffusers import SanaPipeline

  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
  work, out = tmp_path / "run", tmp_path / "tuned"
  fields = {"train.num_updates": 2, "data.latents": "sample", "model.remat": "blocks"}
  fields |= {"loss.margin": 10.0, "optim.lr": 1e-3, "evaluate.num_prompts": 1}
  assert main.main(runs.arguments(directory, work, **fields)) == 0
  errors = [line["err/policy_e"] for line in runs.lines(work) if "err/policy_e" in line]
  assert len(errors) == 2 and np.isfinite(errors).all()
  assert export.main([f"--workdir={work}", f"--out={out}", "--dtype=float32"]) == 0
  tuned = SanaPipeline.from_pretrained(out)
  x, t, text, mask = sana_models.transformer_inputs()
  text = np.ascontiguousarray(text[:, :, :16])
  with torch.no_grad():
    given = [torch.tensor(v) for v in (x, text, t)]
    found = [
      pipe.transformer(*given, encoder_attention_mask=torch.tensor(mask)).sample.numpy()
      for pipe in (tuned, theirs)
    ]
  assert np.abs(found[0] - found[1]).max() > 1e-4
  params = load_run.load(str(work)).denoiser_params
  ours = jax.jit(loaded.make_denoise())(params, x, t, {"text": text, "mask": mask})
  np.testing.assert_allclose(ours, found[0], atol=1e-5 * np.abs(found[0]).max())
