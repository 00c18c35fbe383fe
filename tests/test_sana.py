"""SANA's transformer: numbers and names of PyTorch's diffusers, and its switches."""

import contextlib
import dataclasses
import functools
from pathlib import Path

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sana_models
from conftest import live

from jaxpref.errors import UserError
from jaxpref.models import denoiser, lora, torch_layout
from jaxpref.models.dit import forward, sana_blocks, sana_transformer
from jaxpref.training import flops

GOLDEN = Path(__file__).parent / "golden"
PARAMETERS = {
  "sana-0.6b": 591_747_872,
  "sana-1.6b": 1_604_462_752,
  "sana1.5-1.6b": 1_604_641_952,
  "sana1.5-4.8b": 4_721_825_952,
}
# TFLOP of a prediction for 300 tokens of text, at 512 and 1,024 pixels, as PyTorch counts it.
FLOPS = {
  "sana-0.6b": (0.316, 1.12),
  "sana-1.6b": (0.837, 2.97),
  "sana1.5-1.6b": (0.837, 2.97),
  "sana1.5-4.8b": (2.50, 8.89),
}


@functools.cache
def _load(name, dtype=np.float32):
  module = sana_transformer.build_sana_transformer(sana_models.REDUCED[name], dtype=dtype)
  shapes = jax.eval_shape(module.init_weights, jax.random.key(0))
  return module, sana_models.random_params(shapes)


def _predict(module, params, *inputs):
  return jax.jit(lambda p, *a: module.apply({"params": p}, *a))(params, *inputs)


def _error(out, name):
  want = np.load(GOLDEN / "sana.npz")[name]
  return float(np.abs(np.asarray(out, np.float32) - want).max() / np.abs(want).max())


def _gate(next_fun, args, kwargs, context):
  """Multiplies the attention to the text by the gate of the other attention."""
  out = next_fun(*args, **kwargs)
  if context.module.name == "attn2" and context.method_name == "__call__":
    out = out * context.module.parent.variables["params"]["scale_shift_table"][2]
  return out


@pytest.mark.parametrize(
  "name", ["normed", *(pytest.param(n, marks=pytest.mark.long) for n in ("plain", "placed"))]
)
def test_prediction_is_pytorchs(name):
  module, params = _load(name)
  assert _error(_predict(module, params, *sana_models.transformer_inputs()), name) < 1e-5


@pytest.mark.long
@live
def test_golden_numbers_are_pytorchs():
  from golden import make_sana

  found = make_sana.outputs()
  for name, golden in np.load(GOLDEN / "sana.npz").items():
    np.testing.assert_allclose(found[name], golden, atol=1e-5 * np.abs(golden).max())


def _cut_by_heads(query, key, value):
  """The attention if q, k and v were cut out of runs, as in the autoencoder."""
  b, n, heads, dim = query.shape
  joined = jnp.concatenate([x.reshape(b, n, -1) for x in (query, key, value)], axis=-1)
  parts = jnp.split(joined.reshape(b, n, heads, 3 * dim), 3, axis=-1)
  return sana_blocks.relu_linear_attention(*parts)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["mask", "gate", "heads", "order", "t"])
def test_a_fault_would_be_seen(fault, monkeypatch):
  module, params = _load("plain")
  x, t, text, mask = sana_models.transformer_inputs()
  if fault == "mask":
    mask = np.ones_like(mask)
  elif fault == "heads":
    monkeypatch.setattr(sana_transformer, "relu_linear_attention", _cut_by_heads)
  elif fault == "order":
    first, second = "transformer_blocks_0", "transformer_blocks_1"
    params = {**params, first: params[second], second: params[first]}
  elif fault == "t":
    t = t[::-1].copy()
  with nn.intercept_methods(_gate) if fault == "gate" else contextlib.nullcontext():
    assert _error(_predict(module, params, x, t, text, mask), "plain") > 1e-2


def test_sums_of_attention_are_those_of_all_weights():
  rng = np.random.default_rng(0)
  query, key, value = rng.standard_normal((3, 2, 5, 3, 4))
  weights = np.einsum("bqhd,bkhd->bhqk", query.clip(0), key.clip(0))
  weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-15)
  want = np.einsum("bhqk,bkhd->bqhd", weights, value)
  out = sana_blocks.relu_linear_attention(*map(jnp.float32, (query, key, value)))
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-6)
  nowhere = sana_blocks.relu_linear_attention(*map(jnp.float32, (-np.abs(query), key, value)))
  assert (np.asarray(nowhere) == 0).all()


@pytest.mark.long
def test_bfloat16_is_close():
  module, params = _load("normed", jnp.bfloat16)
  out = _predict(module, params, *sana_models.transformer_inputs())
  want = np.load(GOLDEN / "sana.npz")["normed"]
  error = np.asarray(out, np.float32) - want
  # Relative, of all numbers together; PyTorch's is 0.0122.
  assert (
    out.dtype == jnp.bfloat16 and 1e-3 < np.linalg.norm(error) / np.linalg.norm(want) < 0.02
  )


@pytest.mark.long
def test_lora_adapts_all_but_depthwise_convolutions():
  module, base = _load("normed")
  x, t, text, mask = sana_models.transformer_inputs()
  added = lora.init_lora(base, rank=2, targets="blocks", key=jax.random.key(0))
  layers = {path[-2] for path in flax.traverse_util.flatten_dict(added)}
  assert layers == {"to_q", "to_k", "to_v", "to_out_0", "conv_inverted", "conv_point"}
  added = jax.tree.map(lambda v: v + 0.1 * jax.random.normal(jax.random.key(1), v.shape), added)
  adapted = lora.Adapted(base, added, scale=0.5)
  denoise = jax.jit(forward.make_denoise(module, remat="block"))
  cond = {"text": text, "mask": mask}
  out, merged = (denoise(p, x, t, cond) for p in (adapted, lora.merge(adapted)))
  np.testing.assert_allclose(out, merged, atol=1e-5 * np.abs(merged).max())
  assert _error(out, "normed") > 1e-2
  assert _error(denoise(base, x, t, cond), "normed") < 1e-5


@pytest.mark.long
def test_frozen_weights_predict_the_same_in_bfloat16():
  module, params = _load("normed", jnp.bfloat16)
  x, t, text, mask = sana_models.transformer_inputs()
  denoise = jax.jit(forward.make_denoise(module))
  frozen = denoiser.freeze(params, jnp.bfloat16, forward.UNROUNDED)
  assert frozen["scale_shift_table"].dtype == jnp.float32
  cond = {"text": text, "mask": mask}
  np.testing.assert_array_equal(denoise(frozen, x, t, cond), denoise(params, x, t, cond))


@pytest.mark.long
def test_blocks_computed_again_have_the_same_gradients():
  module, params = _load("normed")
  inputs = sana_models.transformer_inputs()
  found = {}
  for remat in (False, True):
    of = dataclasses.replace(module, remat=remat)
    loss = lambda p, of=of: jnp.square(of.apply({"params": p}, *inputs)).mean()  # noqa: E731
    found[remat] = jax.jit(jax.grad(loss))(params)
    assert (jax.make_jaxpr(jax.grad(loss))(params).pretty_print().count("remat2") > 0) == remat
  for path, gradient in flax.traverse_util.flatten_dict(found[True]).items():
    plain = functools.reduce(lambda tree, key: tree[key], path, found[False])
    np.testing.assert_allclose(gradient, plain, atol=1e-5 * np.abs(plain).max())
    assert np.abs(gradient).max() > 0, path


@pytest.mark.long
@live
def test_gradients_are_pytorchs():
  import torch
  from diffusers import SanaTransformer2DModel
  from golden import make_sana

  module, params = _load("normed")
  x, t, text, mask = sana_models.transformer_inputs()
  loss = lambda p: jnp.square(module.apply({"params": p}, x, t, text, mask)).mean()  # noqa: E731
  ours = torch_layout.export_tensors(jax.jit(jax.grad(loss))(params), np.float32)
  config, build = sana_models.REDUCED["normed"], sana_transformer.build_sana_transformer
  model = make_sana.load(SanaTransformer2DModel, build, config)
  tensors = map(torch.tensor, (x, text, t))
  out = model(*tensors, encoder_attention_mask=torch.tensor(mask)).sample
  out.square().mean().backward()
  theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
  assert ours.keys() == theirs.keys()
  for name, gradient in theirs.items():
    np.testing.assert_allclose(ours[name], gradient, atol=1e-4 * np.abs(gradient).max())


def _layout(name, layers):
  tensors = {}
  for line in (GOLDEN / "layouts" / "sana.txt").read_text().splitlines():
    model, key, *shape = line.split()
    if model == name:
      for i in range(layers) if "*" in key else [0]:
        tensors[key.replace("*", str(i))] = tuple(map(int, shape))
  return tensors


@pytest.mark.long
@pytest.mark.parametrize("name", PARAMETERS)
def test_every_tensor_has_its_place(name):
  config = sana_models.PUBLISHED[name]
  module = sana_transformer.build_sana_transformer(config, dtype=jnp.float32)
  shapes = jax.eval_shape(module.init_weights, jax.random.key(0))
  layout = _layout(name, config["num_layers"])
  torch_layout.check_tensors(layout, shapes, where=name)
  written = {
    torch_layout.torch_name(path): torch_layout.torch_shape(path, leaf.shape)
    for path, leaf in flax.traverse_util.flatten_dict(shapes).items()
  }
  assert written == layout
  assert sum(int(np.prod(shape)) for shape in layout.values()) == PARAMETERS[name]


@pytest.mark.long
@live
def test_layouts_are_pytorchs():
  from golden import make_sana

  assert make_sana.layout() == (GOLDEN / "layouts" / "sana.txt").read_text()


@pytest.mark.long
@pytest.mark.parametrize("name", PARAMETERS)
def test_work_is_what_pytorch_counts(name):
  config = sana_models.PUBLISHED[name]
  module = sana_transformer.build_sana_transformer(config, dtype=jnp.float32)
  shapes = jax.eval_shape(module.init_weights, jax.random.key(0))
  zeros = jax.ShapeDtypeStruct
  for side, want in zip((16, 32), FLOPS[name], strict=True):
    inputs = zeros((1, 32, side, side), jnp.float32), zeros((1,), jnp.float32)
    text = zeros((1, 300, 2304), jnp.float32), zeros((1, 300), jnp.int32)
    program = jax.make_jaxpr(lambda p, *a: module.apply({"params": p}, *a))
    assert flops.count(program(shapes, *inputs, *text)) == pytest.approx(want * 1e12, rel=0.02)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("qk_norm", "layer_norm", "qk_norm must be null or 'rms_norm_across_heads'"),
    ("cross_attention_dim", 31, "cross_attention_dim must be 32"),
    ("guidance_embeds", True, "guidance_embeds = True"),
    ("timestep_scale", 1000.0, "timestep_scale = 1000.0"),
    ("num_layers", 0, "num_layers must be a positive integer"),
    ("mlp_ratio", "2.5", "mlp_ratio must be a positive number"),
    ("interpolation_scale", -1, "interpolation_scale must be a positive number or null"),
  ],
)
def test_other_networks_are_refused(field, value, message):
  with pytest.raises(UserError, match=message):
    sana_transformer.build_sana_transformer(
      {**sana_models.REDUCED["plain"], field: value}, dtype=jnp.float32
    )
