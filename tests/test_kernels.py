"""Other kernels in the UNet: the same results, fewer bytes kept, no hidden float32."""

import json
import os
import subprocess
import sys

import families
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import splash_main
from conftest import ROOT, WITHOUT_TORCH, xla_flags
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType

from jaxpref import base_config, sharding
from jaxpref.models import interceptors, kernels, lora, pipeline, unet
from jaxpref.plan import memory

ALTERNATIVES = {
  "attention": {"attention": "xla"},
  "norm": {"norm": "lean"},
  **{f"remat {which}": {"remat": which} for which in interceptors.REMAT if which != "none"},
  "all": {"attention": "xla", "norm": "lean", "remat": "blocks"},
}


@pytest.fixture(scope="module")
def tiny(tiny_pipeline):
  """UNet, parameters and inputs."""
  loaded = pipeline.load_pipeline(str(tiny_pipeline))
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  width = loaded.configs["unet"]["cross_attention_dim"]
  inputs = draw(2, *loaded.latent_shape), jnp.array([5, 700]), {"text": draw(2, 16, width)}
  return loaded, inputs, draw(2, *loaded.latent_shape)


def outputs(module, params, inputs, target, **options):
  denoise = unet.make_denoise(module, **{"attention": "stock", "norm": "stock"} | options)

  def loss(params):
    out = denoise(params, *inputs)
    return jnp.mean(jnp.square(out - target)), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return out, grads


@pytest.fixture(scope="module")
def stock(tiny):
  loaded, inputs, target = tiny
  return outputs(loaded.modules["unet"], loaded.params["unet"], inputs, target)


def relative(a, b):
  return np.linalg.norm(np.float64(a) - b) / max(np.linalg.norm(np.float64(b)), 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", ALTERNATIVES)
def test_outputs_and_gradients_are_the_stock_modules(name, tiny, stock):
  loaded, inputs, target = tiny
  out, grads = outputs(
    loaded.modules["unet"], loaded.params["unet"], inputs, target, **ALTERNATIVES[name]
  )
  assert relative(out, stock[0]) < 1e-5
  # Against the largest of all: some have next to none, as a bias before a norm.
  scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(stock[1]))
  far = jax.tree.map(lambda a, b: float(np.abs(a - b).max()) / scale, grads, stock[1])
  assert max(jax.tree.leaves(far)) < 1e-5, far


@pytest.mark.long
def test_additions_are_seen_by_other_kernels(tiny):
  loaded, inputs, target = tiny
  params = jax.tree.map(jnp.asarray, loaded.params["unet"])
  key = jax.random.key(0)
  additions = lora.init_lora(params, rank=2, targets=r"to_q$|conv1$", key=key)
  additions = jax.tree.map(lambda x: x + 0.1, additions)
  adapted = lora.Adapted(params, additions, 1.0)
  module = loaded.modules["unet"]
  plain = outputs(module, adapted, inputs, target)
  other = outputs(module, adapted, inputs, target, **ALTERNATIVES["all"])
  assert relative(other[0], plain[0]) < 1e-5
  scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(plain[1].lora))
  far = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()) / scale, other[1].lora, plain[1].lora
  )
  assert max(jax.tree.leaves(far)) < 1e-4, far


@pytest.mark.parametrize("silu", [False, True])
def test_the_norm_in_float64(silu):
  rng = np.random.default_rng(1)
  x = 3.0 + rng.standard_normal((2, 4, 5, 12))
  scale, bias, g = (
    rng.standard_normal(12),
    rng.standard_normal(12),
    rng.standard_normal(x.shape),
  )

  def norm(x, scale, bias):
    groups = x.reshape(2, 20, 3, 4)
    mean = groups.mean((1, 3), keepdims=True)
    var = ((groups - mean) ** 2).mean((1, 3), keepdims=True)
    y = ((groups - mean) / np.sqrt(var + 1e-3)).reshape(x.shape) * scale + bias
    return y / (1 + np.exp(-y)) if silu else y

  inputs = [x, scale, bias]
  arrays = [jnp.asarray(a, jnp.float32) for a in inputs]
  call = lambda *a: kernels.group_norm(*a, 3, 1e-3, silu)  # noqa: E731
  np.testing.assert_allclose(call(*arrays), norm(*inputs), rtol=1e-5, atol=1e-5)
  grads = jax.vjp(call, *arrays)[1](jnp.asarray(g, jnp.float32))
  for i, grad in enumerate(grads):
    want = np.zeros_like(inputs[i])
    for index in np.ndindex(want.shape):
      sides = []
      for step in (1e-5, -1e-5):
        moved = [a.copy() for a in inputs]
        moved[i][index] += step
        sides.append(np.sum(norm(*moved) * g))
      want[index] = (sides[0] - sides[1]) / 2e-5
    np.testing.assert_allclose(grad, want, rtol=1e-3, atol=2e-4)


def test_the_norm_is_as_exact_as_flaxs_far_from_zero():
  """Flax's variance is a difference of squares; ours is not."""
  x = (1000.0 + np.random.default_rng(2).standard_normal((1, 8, 8, 32))).astype(np.float32)
  ours = kernels.group_norm(x, jnp.ones(32), jnp.zeros(32), 4, 1e-5, False)
  groups = np.float64(x).reshape(1, 64, 4, 8)
  mean, std = groups.mean((1, 3), keepdims=True), groups.std((1, 3), keepdims=True)
  want = ((groups - mean) / np.sqrt(std**2 + 1e-5)).reshape(x.shape)
  np.testing.assert_allclose(ours, want, atol=2e-3)


def test_the_configuration_takes_them_all():
  for field, values in {
    "model.attention": ("auto", "stock", "xla", "cudnn", "splash"),
    "model.norm": ("auto", "stock", "lean"),
    "model.remat": tuple(interceptors.REMAT),
  }.items():
    assert all(base_config.RULES[field][0](value) for value in values)


def test_attention_is_softmax():
  rng = np.random.default_rng(3)
  q, k, v = (rng.standard_normal((2, n, 3, 8)) for n in (5, 7, 7))
  logits = np.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  want = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
  out = kernels.dot_product_attention(
    *(jnp.asarray(a, jnp.float32) for a in (q, k, v)), scale=0.3, kernel="cudnn"
  )
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)  # too short for cuDNN: XLA's


@pytest.mark.long
@pytest.mark.parametrize(
  "query, key, size", [(1024, 1024, 40), (1152, 1024, 160), (1229, 1229, 64), (1101, 1024, 64)]
)
def test_splash_attention_is_xlas(query, key, size):
  """Outputs and gradients, as Pallas' interpreter computes them; tiles of 512, 128, padded."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  shapes = [(2, n, 1, size) for n in (query, key, key)]
  want = splash_main.results(mesh, "xla", shapes)
  with pltpu.force_tpu_interpret_mode():
    got = splash_main.results(mesh, "splash", shapes)
  assert len(got) == 4 and all(relative(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.long
def test_splash_attention_splits_rows_over_devices():
  """With XLA's attention in the kernel's place: the interpreter is for one device."""
  program = [sys.executable, splash_main.__file__]
  env = os.environ | {"XLA_FLAGS": xla_flags(devices=4)} | WITHOUT_TORCH
  done = subprocess.run(
    program, check=False, env=env, capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr
  errors = json.loads(done.stdout)
  assert len(errors) == 2 and all(max(e) < 1e-6 for e in errors.values()), errors


def test_splash_attention_takes_long_sequences_of_rows_that_divide():
  two = AbstractMesh((2, 1), sharding.BATCH_AXES, axis_types=(AxisType.Auto,) * 2)

  def kernel_used(rows, tokens, told, mesh=two):
    q, k = (jax.ShapeDtypeStruct((rows, n, 2, 40), jnp.float32) for n in (tokens, told))
    attend = lambda q, k: kernels.dot_product_attention(  # noqa: E731
      q, k, k, scale=1.0, kernel="splash", mesh=mesh
    )
    names = {e.primitive.name for e in equations(jax.make_jaxpr(attend)(q, k).jaxpr)}
    return "splash" if "pallas_call" in names else "xla"

  assert kernel_used(2, 4096, 4096) == kernel_used(4, 2304, 1024) == "splash"
  assert kernel_used(2, 1089, 1089) == "splash"  # padded
  # Short, prompts, a row for two devices, no mesh.
  assert kernel_used(2, 256, 256) == kernel_used(2, 4096, 77) == "xla"
  assert kernel_used(1, 1024, 1024) == "xla"
  assert kernel_used(2, 1024, 1024, mesh=None) == "xla"


def test_which_kernel_serves_a_platform(monkeypatch):
  assert [kernels.resolve_attention("auto", p) for p in ("cpu", "gpu", "tpu")] == [
    *("stock", "cudnn", "splash")
  ]
  asked = []
  monkeypatch.setattr(
    jax.nn,
    "dot_product_attention",
    lambda q, *_, implementation, **__: asked.append(implementation),
  )
  for tokens, size, dtype in (
    (4096, 64, "bfloat16"),
    (4096, 40, "bfloat16"),
    (4096, 64, "float32"),
    (4096, 160, "bfloat16"),
    (4096, 36, "bfloat16"),
    (77, 64, "bfloat16"),
  ):
    x = jnp.zeros((1, tokens, 1, size), dtype)
    kernels.dot_product_attention(x, x, x, scale=1.0, kernel="cudnn")
  assert asked == ["cudnn", "cudnn", "xla", "xla", "xla", "xla"]


@pytest.mark.long
def test_what_is_kept_of_sd15_at_full_width(tmp_path):
  """GiB for an image of 512 pixels in bfloat16."""
  described = families.describe("sd15", tmp_path, dtype=jnp.bfloat16)
  lean = {"attention": "xla", "norm": "lean"}
  for options, want in (  # the table of docs/performance.md
    ({"attention": "stock", "norm": "stock"}, 4.69),
    ({"attention": "stock", "norm": "lean"}, 4.04),
    ({**lean, "remat": "blocks"}, 0.148),
    ({**lean, "remat": "full"}, 0.084),
  ):
    assert memory.kept_bytes(described, **options) / 2**30 == pytest.approx(want, rel=0.02), (
      options
    )


def test_bfloat16_is_not_left_on_the_way(tiny_pipeline):
  """No convolution or product with a wide operand, but for what embeds the timestep."""
  loaded = pipeline.load_pipeline(str(tiny_pipeline), dtype=jnp.bfloat16)
  module = loaded.modules["unet"]
  width = loaded.configs["unet"]["cross_attention_dim"]
  x = jnp.zeros((2, *loaded.latent_shape))
  told = {"text": jnp.zeros((2, 16, width))}
  denoise = unet.make_denoise(module, attention="xla", norm="lean")
  program = jax.make_jaxpr(lambda p: denoise(p, x, jnp.zeros(2), told))(loaded.params["unet"])
  wide = [
    equation
    for equation in equations(program.jaxpr)
    if equation.primitive.name in ("conv_general_dilated", "dot_general")
    and any(v.aval.dtype != jnp.bfloat16 for v in equation.invars)
  ]
  # The last convolution is the stock module's; attention weighs in float32, as it must.
  assert not [e for e in wide if e.primitive.name == "conv_general_dilated"]
  out = jax.eval_shape(lambda p: denoise(p, x, jnp.zeros(2), told), loaded.params["unet"])
  assert out.dtype == jnp.bfloat16


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for part in value if isinstance(value, tuple | list) else [value]:
        inner = getattr(part, "jaxpr", part)
        if hasattr(inner, "eqns"):
          yield from equations(inner)


def test_stock_norms_are_found_by_name():
  """Should flax's or diffusers' modules change, the interceptors would miss them."""
  assert {"__call__"} <= set(dir(nn.GroupNorm))
  config = json.loads((ROOT / "jaxpref/pipelines/sd15/unet/config.json").read_text())
  config |= {
    "block_out_channels": [32, 32, 32, 32],
    "cross_attention_dim": 32,
    "sample_size": 8,
  }
  module = unet.build_unet({**config, "attention_head_dim": 4}, dtype=jnp.float32)
  seen = []

  def count(next_fun, args, kwargs, context):
    if context.method_name == "__call__":
      seen.append(type(context.module).__name__)
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(count):
    jax.eval_shape(module.init_weights, jax.random.key(0))
  assert seen.count("FlaxResnetBlock2D") == 22 and seen.count("FlaxAttention") == 32
  assert seen.count("GroupNorm") == 2 * 22 + 16 + 1
