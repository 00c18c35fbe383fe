"""SD3's and Flux' transformers and VAE: published configurations, reduced ones, random weights.

Weights are drawn by numpy, so that PyTorch's modules and jaxpref's have the same.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import families
import flax
import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.models import lora, pipeline, save, text, torch_layout, vae
from jaxpref.models.dit.flux_transformer import build_flux_transformer
from jaxpref.models.dit.sd3_transformer import build_sd3_transformer

_SD3: dict[str, Any] = {
  "_class_name": "SD3Transformer2DModel",
  "sample_size": 128,
  "patch_size": 2,
  "in_channels": 16,
  "num_layers": 24,
  "attention_head_dim": 64,
  "num_attention_heads": 24,
  "joint_attention_dim": 4096,
  "caption_projection_dim": 1536,
  "pooled_projection_dim": 2048,
  "out_channels": 16,
  "pos_embed_max_size": 192,
}
_FLUX: dict[str, Any] = {
  "_class_name": "FluxTransformer2DModel",
  "patch_size": 1,
  "in_channels": 64,
  "out_channels": None,
  "num_layers": 19,
  "num_single_layers": 38,
  "attention_head_dim": 128,
  "num_attention_heads": 24,
  "joint_attention_dim": 4096,
  "pooled_projection_dim": 768,
  "axes_dims_rope": [16, 56, 56],
}
_VAE: dict[str, Any] = {
  "_class_name": "AutoencoderKL",
  "in_channels": 3,
  "out_channels": 3,
  "down_block_types": ["DownEncoderBlock2D"] * 4,
  "up_block_types": ["UpDecoderBlock2D"] * 4,
  "block_out_channels": [128, 256, 512, 512],
  "layers_per_block": 2,
  "act_fn": "silu",
  "latent_channels": 16,
  "norm_num_groups": 32,
  "sample_size": 1024,
  "latents_mean": None,
  "latents_std": None,
  "force_upcast": True,
  "use_quant_conv": False,
  "use_post_quant_conv": False,
  "mid_block_add_attention": True,
}
PUBLISHED = {
  "sd3-medium": _SD3 | {"dual_attention_layers": [], "qk_norm": None},
  "sd3.5-medium": _SD3
  | {"pos_embed_max_size": 384, "dual_attention_layers": [*range(13)], "qk_norm": "rms_norm"},
  "sd3.5-large": _SD3
  | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "dual_attention_layers": [],
    "qk_norm": "rms_norm",
  },
  "flux.1-dev": _FLUX | {"guidance_embeds": True},
  "flux.1-schnell": _FLUX | {"guidance_embeds": False},
  "sd3-vae": _VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
  "flux-vae": _VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
}
COUNTS = {  # parameters without the table of positions
  "sd3-medium": 2_028_328_000,
  "sd3.5-medium": 2_243_171_520,
  "sd3.5-large": 8_056_627_520,
  "flux.1-dev": 11_901_408_320,
  "flux.1-schnell": 11_891_178_560,
  "sd3-vae": 83_819_683,
  "flux-vae": 83_819_683,
}
_TOKENIZERS = Path(__file__).parent / "golden" / "tokenizers"
_BUILD = {
  "SD3Transformer2DModel": build_sd3_transformer,
  "FluxTransformer2DModel": build_flux_transformer,
  "AutoencoderKL": vae.build_vae,
}


def reduced(name: str, layers: int = 2) -> dict[str, Any]:
  """A published configuration with narrow layers and few of them; all switches stay."""
  config = PUBLISHED[name]
  if "vae" in name:
    levels = {f"{way}_block_types": config[f"{way}_block_types"][:2] for way in ("down", "up")}
    return (
      config
      | levels
      | {"block_out_channels": [32, 64], "layers_per_block": 1, "sample_size": 32}
    )
  small = {"joint_attention_dim": 24, "pooled_projection_dim": 20, "num_layers": layers}
  if "flux" in name:
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": [4, 6, 6]}
    return config | small | heads | {"in_channels": 16, "num_single_layers": layers}
  return (
    config
    | small
    | {
      "sample_size": 16,
      "in_channels": 4,
      "out_channels": 4,
      "attention_head_dim": 8,
      "num_attention_heads": 4,
      "caption_projection_dim": 32,
      "pos_embed_max_size": 12,
      "dual_attention_layers": config["dual_attention_layers"][: layers - 1],
    }
  )


def build(config: dict[str, Any], dtype: Any = jnp.float32) -> Any:
  """jaxpref's module of a configuration."""
  return _BUILD[config["_class_name"]](config, dtype=dtype)


def random_params(module: Any) -> Any:
  """Random parameters; initial ones and zeros would hide mistakes."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    x = rng.standard_normal(leaf.shape)
    if path[-1] == "kernel":
      x /= np.sqrt(np.prod(leaf.shape[:-1]))
    elif path[-1] in ("scale", "bias"):
      x = 0.2 * x + (path[-1] == "scale")
    return x.astype(np.float32)

  flat = flax.traverse_util.flatten_dict(pipeline.abstract_params(module))
  return flax.traverse_util.unflatten_dict({path: draw(path, flat[path]) for path in flat})


def inputs(config: dict[str, Any], size=(16, 12), tokens=7) -> dict[str, np.ndarray]:
  """Latents that are not square, two timesteps, prompts of an odd length."""
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  channels = config["in_channels"] // (4 if "Flux" in config["_class_name"] else 1)
  given = {
    "x": draw(2, channels, *size),
    "t": np.array([937.5, 3.90625], np.float32),  # exact after a division by 1000 and back
    "text": draw(2, tokens, config["joint_attention_dim"]),
    "pooled": draw(2, config["pooled_projection_dim"]),
  }
  if config.get("guidance_embeds"):
    given["guidance"] = np.array([3.5, 1.25], np.float32)
  return given


def vae_inputs() -> tuple[np.ndarray, np.ndarray]:
  """Images that are not square, and latents as wide as they have channels."""
  rng = np.random.default_rng(1)
  images = rng.uniform(-1, 1, (2, 3, 12, 32)).astype(np.float32)
  return images, rng.standard_normal((2, 16, 6, 16)).astype(np.float32)


def torch_module(config: dict[str, Any], params: Any = None) -> Any:
  """PyTorch's module of a configuration, with these parameters."""
  import diffusers
  import torch

  module = getattr(diffusers, config["_class_name"]).from_config(config)
  if params is not None:
    tensors = torch_layout.export_tensors(params, np.float32)
    module.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()})
  return module.eval()


def torch_output(module: Any, given: dict[str, np.ndarray]) -> Any:
  """PyTorch's prediction, [B, C, H, W]."""
  import torch
  from diffusers import FluxPipeline

  x, t, text, pooled, *guidance = (torch.tensor(value) for value in given.values())
  kwargs = {"encoder_hidden_states": text, "pooled_projections": pooled}
  if "Flux" not in type(module).__name__:
    return module(x, timestep=t, **kwargs).sample
  batch, channels, rows, columns = x.shape
  out = module(
    FluxPipeline._pack_latents(x, batch, channels, rows, columns),
    timestep=t / 1000,
    img_ids=FluxPipeline._prepare_latent_image_ids(
      batch, rows // 2, columns // 2, "cpu", torch.float32
    ),
    txt_ids=torch.zeros(text.shape[1], 3),
    guidance=guidance[0] if guidance else None,
    **kwargs,
  ).sample
  return FluxPipeline._unpack_latents(out, 8 * rows, 8 * columns, 8)


def torch_vae(module: Any) -> dict[str, Any]:
  """PyTorch's posterior of images, and images of latents."""
  import torch

  images, latents = (torch.tensor(value) for value in vae_inputs())
  with torch.no_grad():
    posterior = module.encode(images).latent_dist
    out = {"mean": posterior.mean, "logvar": posterior.logvar}
    out["pixels"] = module.decode(latents).sample
  return {name: value.numpy() for name, value in out.items()}


def sd3_configs(vocab_size: int, *, t5: bool) -> dict[str, Any]:
  """Configurations of a narrow SD3.5-medium pipeline, by part."""
  encoders = families.reduced_configs("sdxl", vocab_size=vocab_size)
  configs = {
    "transformer": reduced("sd3.5-medium", 3)
    | {
      "in_channels": 16,
      "out_channels": 16,
      "joint_attention_dim": 96,
      "pooled_projection_dim": sum(families.WIDTHS),
    },
    "vae": reduced("sd3-vae"),
    "text_encoder": encoders["text_encoder"]
    | {"architectures": ["CLIPTextModelWithProjection"]},
    "text_encoder_2": encoders["text_encoder_2"],
    "scheduler": {
      "_class_name": "FlowMatchEulerDiscreteScheduler",
      "num_train_timesteps": 1000,
      "shift": 3.0,
    },
  }
  if t5:
    configs["text_encoder_3"] = _T5
  return configs


_T5 = {
  **{"architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": 1000},
  **{"d_model": 96, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
  **{"feed_forward_proj": "gated-gelu", "eos_token_id": 1, "pad_token_id": 0},
}


def flux_configs(name: str, vocab_size: int) -> dict[str, Any]:
  """Configurations of a narrow pipeline of 'flux.1-dev' or 'flux.1-schnell', by part."""
  encoder = families.reduced_configs("sdxl", vocab_size=vocab_size)["text_encoder"]
  published = families.real_configs("flux" if name == "flux.1-dev" else "flux_schnell")
  inputs = {"in_channels": 64, "pooled_projection_dim": families.WIDTHS[0], "sample_size": 16}
  return {
    "transformer": reduced(name) | inputs,
    "vae": reduced("flux-vae"),
    "text_encoder": encoder,
    "text_encoder_2": _T5 | {"d_model": 24},
    "scheduler": published["scheduler"],
  }


def write_flux(directory: Path, name: str) -> Path:
  """Writes a narrow pipeline of 'flux.1-dev' or 'flux.1-schnell'; returns its path."""
  text.train_tokenizer(families.PROMPTS, directory / "tokenizer", vocab_size=560, max_length=77)
  vocab_size = len(text.load_tokenizer(directory / "tokenizer"))
  shutil.copytree(_TOKENIZERS / "t5", directory / "tokenizer_2")
  return _write(directory, name, flux_configs(name, vocab_size))


def write_sd3(directory: Path, *, t5: bool) -> Path:
  """Writes a narrow SD3.5-medium pipeline with random weights; returns its path."""
  for name in ("tokenizer", "tokenizer_2"):
    text.train_tokenizer(families.PROMPTS, directory / name, vocab_size=560, max_length=77)
  file = directory / "tokenizer_2" / "tokenizer_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "!"}))
  vocab_size = len(text.load_tokenizer(directory / "tokenizer"))
  if t5:
    shutil.copytree(_TOKENIZERS / "t5", directory / "tokenizer_3")
  return _write(directory, "sd3", sd3_configs(vocab_size, t5=t5))


def _write(directory: Path, name: str, configs: dict[str, Any]) -> Path:
  """Writes a pipeline with random weights, and tokenizers that are in the directory."""
  modules = pipeline.build_modules(configs)
  save.save_pipeline(
    directory / name,
    {part: random_params(module) for part, module in modules.items()},
    configs=configs,
    tokenizers_from=directory,
    dtype=np.float32,
  )
  return directory / name


def with_lora(loaded):
  """Returns a model's parameters with a random LoRA of rank 2 that changes the output."""
  base = loaded.denoiser_params
  added = lora.init_lora(
    base, rank=2, targets=loaded.family.lora_targets, key=jax.random.key(0)
  )
  added = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), added)
  return lora.Adapted(base, added, scale=0.5)
