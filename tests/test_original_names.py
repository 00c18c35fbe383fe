"""Names of SD3 and Flux in single files, from and to diffusers'; parts and halves in place."""

import flow_networks
import numpy as np
import pytest
from conftest import live

from jaxpref.errors import UserError
from jaxpref.models import torch_layout
from jaxpref.models.dit import original_names

RULES = {"sd3-medium": original_names.SD3, "sd3.5-medium": original_names.SD3}
RULES |= {"flux.1-dev": original_names.FLUX, "flux.1-schnell": original_names.FLUX}


def tensors_of(name):
  params = flow_networks.random_params(flow_networks.build(flow_networks.reduced(name)))
  return torch_layout.export_tensors(params, np.float32)


def assert_same(ours, theirs):
  assert ours.keys() == theirs.keys()
  for key, value in theirs.items():
    np.testing.assert_array_equal(ours[key], value, err_msg=key)


@pytest.mark.parametrize("name", RULES)
def test_there_and_back(name):
  tensors, rules = tensors_of(name), RULES[name]
  original = original_names.to_original(tensors, rules)
  assert all(key.startswith("model.diffusion_model.") for key in original)
  assert sum(x.size for x in original.values()) == sum(x.size for x in tensors.values())
  beside = {"first_stage_model.decoder.conv_in.weight": np.zeros(1)}
  assert_same(original_names.from_original(original | beside, rules), tensors)
  bare = {k.removeprefix("model.diffusion_model."): x for k, x in original.items()}
  assert_same(original_names.from_original(bare, rules), tensors)


def test_where_sd3s_tensors_go():
  tensors = tensors_of("sd3.5-medium")
  original = original_names.to_original(tensors, original_names.SD3)
  get = lambda key: original[f"model.diffusion_model.{key}"]  # noqa: E731
  qkv = [tensors[f"transformer_blocks.0.attn2.to_{x}.bias"] for x in "qkv"]
  np.testing.assert_array_equal(
    get("joint_blocks.0.x_block.attn2.qkv.bias"), np.concatenate(qkv)
  )
  np.testing.assert_array_equal(
    get("joint_blocks.0.context_block.attn.ln_k.weight"),
    tensors["transformer_blocks.0.attn.norm_added_k.weight"],
  )
  # (scale, shift) in diffusers, (shift, scale) originally: at the end, and of the last text.
  for ours, theirs in (
    ("norm_out.linear", "final_layer.adaLN_modulation.1"),
    (
      "transformer_blocks.1.norm1_context.linear",
      "joint_blocks.1.context_block.adaLN_modulation.1",
    ),
  ):
    swapped = np.roll(tensors[f"{ours}.weight"], 32, axis=0)
    np.testing.assert_array_equal(get(f"{theirs}.weight"), swapped)
  np.testing.assert_array_equal(
    get("joint_blocks.0.context_block.adaLN_modulation.1.weight"),
    tensors["transformer_blocks.0.norm1_context.linear.weight"],
  )


def test_what_has_no_name():
  tensors = tensors_of("flux.1-schnell")
  with pytest.raises(UserError, match=r"extra\.weight does not have a name in a single file"):
    original_names.to_original(tensors | {"extra.weight": np.zeros(1)}, original_names.FLUX)
  lacking = {k: x for k, x in tensors.items() if "0.attn.to_k.bias" not in k}
  with pytest.raises(UserError, match=r"double_blocks\.0\.img_attn\.qkv\.bias"):
    original_names.to_original(lacking, original_names.FLUX)
  with pytest.raises(UserError, match=r"other\.weight is not a tensor of the transformer"):
    original_names.from_original({"other.weight": np.zeros(1)}, original_names.FLUX)


@pytest.mark.long
@live
@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium"])
def test_diffusers_reads_sd3s(name):
  import torch
  from diffusers.loaders import single_file_utils

  tensors = tensors_of(name)
  original = original_names.to_original(tensors, original_names.SD3)
  convert = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers
  read = convert({key: torch.tensor(x) for key, x in original.items()})
  assert_same({key: x.numpy() for key, x in read.items()}, tensors)


@pytest.mark.long
@live
def test_diffusers_reads_fluxs():
  """diffusers' converter knows one width, so tensors have all rows but one column."""
  import torch
  from diffusers.loaders import single_file_utils

  rng = np.random.default_rng(0)
  tensors = {
    key: rng.standard_normal((96 * len(x), *[1] * (x.ndim - 1)), np.float32)
    for key, x in tensors_of("flux.1-dev").items()
  }
  assert tensors["transformer_blocks.0.attn.to_q.weight"].shape == (3072, 1)
  original = original_names.to_original(tensors, original_names.FLUX)
  convert = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
  read = convert({key: torch.tensor(x) for key, x in original.items()})
  assert_same({key: x.numpy() for key, x in read.items()}, tensors)
