"""SANA's networks for tests: published and reduced configurations, random weights, inputs."""

import shutil
import zlib
from pathlib import Path

import flax
import numpy as np

from jaxpref.models import piece_tokenizers, pipeline, save

_TRANSFORMER = {
  "_class_name": "SanaTransformer2DModel",
  "attention_bias": False,
  "attention_head_dim": 32,
  "caption_channels": 2304,
  "cross_attention_dim": 2240,
  "cross_attention_head_dim": 112,
  "dropout": 0.0,
  "guidance_embeds": False,
  "guidance_embeds_scale": 0.1,
  "in_channels": 32,
  "interpolation_scale": None,
  "mlp_ratio": 2.5,
  "norm_elementwise_affine": False,
  "norm_eps": 1e-6,
  "num_attention_heads": 70,
  "num_cross_attention_heads": 20,
  "num_layers": 20,
  "out_channels": 32,
  "patch_size": 1,
  "qk_norm": None,
  "sample_size": 32,
  "timestep_scale": 1.0,
}
_SMALL = {
  "cross_attention_dim": 1152,
  "cross_attention_head_dim": 72,
  "num_attention_heads": 36,
  "num_cross_attention_heads": 16,
  "num_layers": 28,
}
_NORMED = {"qk_norm": "rms_norm_across_heads"}
_WIDTHS = [128, 256, 512, 512, 1024, 1024]
_TYPES = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_SCALES = [[], [], [], [5], [5], [5]]
# As published, at 1024 pixels; at 512 only sample_size differs, and no tensor.
PUBLISHED = {
  "sana-0.6b": _TRANSFORMER | _SMALL,
  "sana-1.6b": _TRANSFORMER,
  "sana1.5-1.6b": _TRANSFORMER | _NORMED,
  "sana1.5-4.8b": _TRANSFORMER | _NORMED | {"num_layers": 60},
  "dc-ae": {
    "_class_name": "AutoencoderDC",
    "attention_head_dim": 32,
    "decoder_act_fns": "silu",
    "decoder_block_out_channels": _WIDTHS,
    "decoder_block_types": _TYPES,
    "decoder_layers_per_block": [3] * 6,
    "decoder_norm_types": "rms_norm",
    "decoder_qkv_multiscales": _SCALES,
    "downsample_block_type": "Conv",
    "encoder_block_out_channels": _WIDTHS,
    "encoder_block_types": _TYPES,
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "encoder_qkv_multiscales": _SCALES,
    "in_channels": 3,
    "latent_channels": 32,
    "scaling_factor": 0.41407,
    "upsample_block_type": "interpolate",
  },
}
_REDUCED = {
  "caption_channels": 24,
  "cross_attention_dim": 32,
  "cross_attention_head_dim": 16,
  "attention_head_dim": 8,
  "in_channels": 4,
  "num_attention_heads": 4,
  "num_cross_attention_heads": 2,
  "num_layers": 2,
  "out_channels": 4,
  "sample_size": 8,
}
_REDUCED_DC_AE = {
  f"{half}_{name}": value
  for half in ("encoder", "decoder")
  for name, value in {
    "block_out_channels": [16, 16, 32],
    "block_types": ["ResBlock"] + ["EfficientViTBlock"] * 2,
    "layers_per_block": [1, 1, 2 if half == "decoder" else 1],
    "qkv_multiscales": [[], [5], [5]],
  }.items()
}
REDUCED = {
  "plain": _TRANSFORMER | _REDUCED,
  "normed": _TRANSFORMER | _REDUCED | _NORMED,
  "placed": _TRANSFORMER | _REDUCED | {"interpolation_scale": 2.0},
}
DC_AE = PUBLISHED["dc-ae"] | _REDUCED_DC_AE | {"attention_head_dim": 8, "latent_channels": 4}
# As published.
SCHEDULER = {
  "algorithm_type": "dpmsolver++",
  "flow_shift": 3.0,
  "prediction_type": "flow_prediction",
  "use_flow_sigmas": True,
}
SIZES = {"wide": (32, 24), "small": (8, 8)}  # pixels; few tokens take another path in PyTorch


def random_params(abstract):
  """Random parameters, a function of names and shapes; norms are near one."""
  flat = {}
  for path, leaf in flax.traverse_util.flatten_dict(abstract).items():
    noise = np.random.default_rng(zlib.crc32("/".join(path).encode())).standard_normal(
      leaf.shape
    )
    fan = np.prod(leaf.shape[:-1]) if path[-1] == "kernel" else 25.0
    flat[path] = (noise / np.sqrt(fan) + (path[-1] == "scale")).astype(np.float32)
  return flax.traverse_util.unflatten_dict(flat)


def transformer_inputs():
  """Latents that are not square, two timesteps, texts with padding, and their mask."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 4, 8, 6)).astype(np.float32)
  text = rng.standard_normal((2, 7, 24)).astype(np.float32)
  mask = np.array([[1] * 7, [1, 1, 1, 0, 0, 0, 0]], np.int32)
  return x, np.array([999.0, 3.5], np.float32), text, mask


def image(size):
  """Images [2, 3, *SIZES[size]] in [-1, 1]."""
  rng = np.random.default_rng(1)
  return rng.uniform(-1, 1, (2, 3, *SIZES[size])).astype(np.float32)


def latent(size):
  """Latents of `image`'s size."""
  rng = np.random.default_rng(2)
  return rng.standard_normal((2, 4, *(n // 4 for n in SIZES[size]))).astype(np.float32)


def narrow_configs(transformer, vocab_size):
  """Configurations of a narrow pipeline of 96 pixels, by part.

  Args:
    transformer: a key of `REDUCED`.
    vocab_size: of Gemma's tokenizer.
  """
  dc = DC_AE | {"encoder_layers_per_block": [1] * 6, "decoder_layers_per_block": [1] * 6}
  for half in ("encoder", "decoder"):
    dc |= {
      f"{half}_block_out_channels": [8, 8, 8, 8, 8, 16],
      f"{half}_block_types": ["ResBlock"] * 4 + ["EfficientViTBlock"] * 2,
      f"{half}_qkv_multiscales": [[], [], [], [], [5], [5]],
    }
  return {
    "transformer": REDUCED[transformer] | {"caption_channels": 16, "sample_size": 3},
    "vae": dc,
    "text_encoder": {
      **{"architectures": ["Gemma2Model"], "model_type": "gemma2", "vocab_size": vocab_size},
      **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8},
      **{"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 8},
      "sliding_window": 4096,
    },
    "scheduler": {"_class_name": "DPMSolverMultistepScheduler", **SCHEDULER},
  }


def write_sana(directory):
  """Writes a narrow pipeline of SANA 1.0 with random weights; returns its directory."""
  golden = Path(__file__).parent / "golden" / "tokenizers" / "gemma"
  shutil.copytree(golden, directory / "tokenizer")
  size = len(piece_tokenizers.load_piece_tokenizer(golden, "gemma", max_length=300))
  configs = narrow_configs("plain", size)
  params = {
    part: random_params(pipeline.abstract_params(module))
    for part, module in pipeline.build_modules(configs).items()
  }
  target = directory / "sana"
  save.save_pipeline(
    target, params, configs=configs, tokenizers_from=directory, dtype=np.float32
  )
  return target


def write_pipeline(directory, tokenizer):
  """Writes a reduced pipeline by diffusers, with random weights; returns its directory.

  Args:
    directory: where to write.
    tokenizer: the directory of a small tokenizer of Gemma.
  """
  from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
  )
  from golden import make_sana
  from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast

  from jaxpref.models import dc_ae, gemma
  from jaxpref.models.dit import sana_transformer

  read = GemmaTokenizerFast.from_pretrained(tokenizer)
  configs = narrow_configs("normed", len(read))
  encoder = Gemma2Config(**configs["text_encoder"])
  build = sana_transformer.build_sana_transformer
  pipe = SanaPipeline(
    tokenizer=read,
    text_encoder=make_sana.load(Gemma2Model, gemma.build_gemma, encoder),
    vae=make_sana.load(AutoencoderDC, dc_ae.build_dc_ae, configs["vae"]),
    transformer=make_sana.load(SanaTransformer2DModel, build, configs["transformer"]),
    scheduler=DPMSolverMultistepScheduler(**SCHEDULER),
  )
  pipe.save_pretrained(directory)
  return directory
