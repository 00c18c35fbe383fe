"""SD3's and Flux' transformers against PyTorch's: outputs, gradients, names, costs."""

import functools
import gzip
import json
from pathlib import Path

import flax
import flow_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import live

from jaxpref.errors import UserError
from jaxpref.models import lora, pipeline, torch_layout, vae
from jaxpref.models.dit import embeddings, forward
from jaxpref.training import flops

GOLDEN = Path(__file__).parent / "golden"
TRANSFORMERS = [name for name in flow_networks.PUBLISHED if "vae" not in name]
QUICK = ("sd3.5-medium", "flux.1-dev")  # they have every switch


@functools.cache
def network(name):
  """A reduced network: module, parameters, inputs and compiled forward pass."""
  config = flow_networks.reduced(name)
  module = flow_networks.build(config)
  params = flow_networks.random_params(module)
  predict = jax.jit(lambda params, given: module.apply({"params": params}, **given))
  return module, params, flow_networks.inputs(config), predict


@functools.cache
def golden(name):
  with np.load(GOLDEN / "flow_networks.npz") as numbers:
    return numbers[name]


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=[] if n in QUICK else pytest.mark.long) for n in TRANSFORMERS],
)
def test_outputs_are_pytorchs(name):
  _, params, given, predict = network(name)
  want = golden(name)
  assert want.std() > 0.3
  np.testing.assert_allclose(predict(params, given), want, atol=1e-5)


def changed(params, path, change):
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  assert path in flat
  return flax.traverse_util.unflatten_dict({**flat, path: change(flat[path])}, sep="/")


def swap_halves(axis, start=0, stop=None):
  def change(x):
    x = np.moveaxis(x.copy(), axis, 0)
    x[start:stop] = np.concatenate(np.split(x[start:stop], 2)[::-1])
    return np.moveaxis(x, 0, axis)

  return change


@pytest.mark.parametrize(
  "path, change",
  {
    "sines before cosines": (
      "time_text_embed/timestep_embedder/linear_1/kernel",
      swap_halves(0),
    ),
    "shift, scale at the end": ("norm_out/linear/kernel", swap_halves(1)),
    "shift, scale of the last text": (
      "transformer_blocks_1/norm1_context/linear/kernel",
      swap_halves(1),
    ),
    "scale, shift of attention": (
      "transformer_blocks_0/norm1/linear/kernel",
      swap_halves(1, 0, 64),
    ),
    "scale, shift of the other attention": (
      "transformer_blocks_0/norm1/linear/kernel",
      swap_halves(1, 192, 256),
    ),
    "a crop one row lower": ("pos_embed/pos_embed", lambda x: np.roll(x, -12, axis=1)),
    "a crop one column further": ("pos_embed/pos_embed", lambda x: np.roll(x, -1, axis=1)),
    "rows for columns in patches": (
      "pos_embed/proj/kernel",
      lambda x: np.swapaxes(x, 0, 1),
    ),
  }.values(),
)
def test_mistakes_are_seen(path, change):
  """Each mistake is made by changing weights, so that one compiled program serves all."""
  _, params, given, predict = network("sd3.5-medium")
  out = predict(changed(params, path, change), given)
  assert np.abs(out - golden("sd3.5-medium")).max() > 1e-2


def test_a_vae_of_16_channels_without_quant_convolutions():
  """Also of latents 16 wide, which diffusers' Flax class would take for channels-last."""
  module = flow_networks.build(flow_networks.reduced("sd3-vae"))
  params = flow_networks.random_params(module)
  images, latents = flow_networks.vae_inputs()

  @jax.jit
  def both(params):
    mean, logvar = vae.encode_moments(module, params, images)
    pixels = module.apply({"params": params}, latents, method="pixels")
    return {"mean": mean, "logvar": logvar, "pixels": pixels}

  for key, value in both(params).items():
    want = golden(f"sd3-vae/{key}")
    assert want.std() > 0.2
    np.testing.assert_allclose(value, want, atol=1e-5, err_msg=key)
  assert (module.scaling_factor, module.shift_factor) == (1.5305, 0.0609)


def test_sizes_and_lengths():
  """Latents of one row of patches, and of the whole table; a text of one token."""
  module, params, _, _ = network("sd3-medium")
  config = flow_networks.reduced("sd3-medium")
  for size, tokens in (((2, 14), 1), ((24, 24), 3)):
    given = flow_networks.inputs(config, size, tokens)
    shape = jax.eval_shape(lambda x: module.apply({"params": params}, **x), given).shape  # noqa: B023
    assert shape == (2, 4, *size)


@pytest.mark.parametrize(
  ("name", "size"),
  # Flux has no table of positions, which limits the size.
  [("sd3-medium", (26, 4)), ("sd3-medium", (4, 5)), ("flux.1-dev", (4, 5))],
)
def test_latents_that_do_not_fit_are_refused(name, size):
  module, params, _, _ = network(name)
  given = flow_networks.inputs(flow_networks.reduced(name), size)
  with pytest.raises(UserError, match=f"{size[0]} x {size[1]} do not fit the transformer"):
    jax.eval_shape(lambda x: module.apply({"params": params}, **x), given)


def test_guidance_is_where_it_is_an_input():
  module, params, given, _ = network("flux.1-dev")
  given = {name: value for name, value in given.items() if name != "guidance"}
  with pytest.raises(ValueError, match="guidance_embeds is True, guidance is None"):
    jax.eval_shape(lambda x: module.apply({"params": params}, **x), given)


def test_the_table_of_positions_is_not_trained():
  module, params, given, _ = network("sd3-medium")

  def loss(params):
    return jnp.sum(jnp.square(module.apply({"params": params}, **given)))

  program = jax.make_jaxpr(jax.grad(loss))(params)  # its last lines make the gradients
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  index = sorted(flat).index("pos_embed/pos_embed")
  made = {str(v): e.primitive.name for e in program.jaxpr.eqns for v in e.outvars}
  assert made[str(program.jaxpr.outvars[index])] == "broadcast_in_dim"  # zeros


@pytest.mark.long
def test_bfloat16_is_close():
  name = "sd3.5-medium"
  module, params, given, _ = network(name)
  half = module.clone(dtype=jnp.bfloat16)
  out = jax.jit(lambda params, given: half.apply({"params": params}, **given))(params, given)
  assert out.dtype == jnp.bfloat16
  error = np.float32(out) - golden(name)
  assert 1e-4 < np.sqrt(np.mean(error**2)) / golden(name).std() < 0.03


@pytest.mark.long
@live
def test_gradients_are_pytorchs_with_recomputation():
  import torch

  module, params, given, _ = network("sd3.5-medium")
  config = flow_networks.reduced("sd3.5-medium")
  target = np.random.default_rng(2).standard_normal((2, 4, 16, 12)).astype(np.float32)
  theirs = flow_networks.torch_module(config, params)
  loss = (flow_networks.torch_output(theirs, given) - torch.tensor(target)).square().mean()
  loss.backward()
  want = {key: p.grad.numpy() for key, p in theirs.named_parameters()}
  remade = module.clone(remat=True)

  @jax.jit
  @jax.grad
  def gradient(params):
    return jnp.mean(jnp.square(remade.apply({"params": params}, **given) - target))

  grads = torch_layout.export_tensors(gradient(params), np.float32)
  assert not grads.pop("pos_embed.pos_embed").any()
  assert grads.keys() == want.keys()
  scale = max(np.abs(x).max() for x in want.values())
  far = {key: np.abs(grads[key] - want[key]).max() / scale for key in want}
  assert max(far.values()) < 1e-5, max(far, key=far.get)


@pytest.mark.long
@live
@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium", "flux.1-schnell"])
def test_three_layers_and_odd_lengths_are_pytorchs(name):
  """Live; SD3.5-medium's middle layer is not dual, and its first is."""
  import torch

  config = flow_networks.reduced(name, layers=3)
  if name == "sd3.5-medium":
    config |= {"dual_attention_layers": [0]}
  module = flow_networks.build(config)
  params = flow_networks.random_params(module)
  given = flow_networks.inputs(config, size=(6, 10), tokens=3)
  with torch.no_grad():
    want = flow_networks.torch_output(flow_networks.torch_module(config, params), given)
  ours = jax.jit(lambda params: module.apply({"params": params}, **given))(params)
  np.testing.assert_allclose(ours, want.numpy(), atol=1e-5)


@pytest.mark.long
@live
def test_the_beginning_is_pytorchs():
  """Tables are equal; weights have the same spread, and nothing is zero or one by chance."""
  config = flow_networks.reduced("sd3.5-medium")
  theirs = {k: x.numpy() for k, x in flow_networks.torch_module(config).state_dict().items()}
  module = flow_networks.build(config)
  ours = torch_layout.export_tensors(module.init_weights(jax.random.key(0)), np.float32)
  np.testing.assert_array_equal(ours["pos_embed.pos_embed"], theirs["pos_embed.pos_embed"])
  for key, x in theirs.items():
    if x.ndim > 1 and x.size > 500:
      np.testing.assert_allclose(ours[key].std(), x.std(), rtol=0.15, err_msg=key)
      np.testing.assert_allclose(np.abs(ours[key]).max(), np.abs(x).max(), rtol=0.1)
    assert (ours[key].std() == 0) == (x.std() == 0), key


def test_positions_in_float64():
  """Half of the channels of the column, half of the row; sines before cosines."""
  table = embeddings.position_table(16, 6, 6, 3)
  for row, column in ((0, 0), (2, 5), (5, 1)):
    want = []
    for place in (column, row):
      angles = place / 2 * 10_000.0 ** -(np.arange(4) / 4)
      want += [*np.sin(angles), *np.cos(angles)]
    np.testing.assert_allclose(table[row, column], want, atol=1e-7)


def adapted(name):
  """Parameters with random additions to the joint attention, of rank 3."""
  _, params, _, _ = network(name)
  key = jax.random.key(0)
  additions = lora.init_lora(params, rank=3, targets=forward.JOINT_LAYERS, key=key)
  rng = np.random.default_rng(3)
  additions = jax.tree.map(
    lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32), additions
  )
  return lora.Adapted(params, additions, scale=0.5)


def test_additions_are_to_the_joint_attention():
  params = adapted("sd3.5-medium")
  tensors = lora.export_peft_tensors(params, np.float32, part="transformer")
  first = "transformer.transformer_blocks.0.attn.to_q"
  assert tensors[f"{first}.lora_A.weight"].shape == (3, 32)
  down, up = (params.lora["transformer_blocks_0"]["attn"]["to_q"][x] for x in ("down", "up"))
  whole = tensors[f"{first}.lora_B.weight"] @ tensors[f"{first}.lora_A.weight"]
  np.testing.assert_allclose(whole, 0.5 * (down @ up).T, atol=1e-6)
  assert len(tensors) == 2 * 15  # the last block's text has no output
  assert not any("attn2" in key for key in tensors)


@pytest.mark.long
@live
@pytest.mark.parametrize("name", QUICK)
def test_diffusers_applies_the_additions(name):
  import torch

  module, base, given, _ = network(name)
  params = adapted(name)
  tensors = lora.export_peft_tensors(params, np.float32, part="transformer")
  theirs = flow_networks.torch_module(flow_networks.reduced(name), base)
  theirs.load_lora_adapter({k: torch.tensor(x) for k, x in tensors.items()})
  with torch.no_grad():
    want = flow_networks.torch_output(theirs, given).numpy()
  assert np.abs(want - golden(name)).max() > 0.1
  x, t, *_ = given.values()
  denoise = jax.jit(forward.make_denoise(module, remat="blocks"))
  np.testing.assert_allclose(denoise(params, x, t, given), want, atol=1e-5)


@functools.cache
def layouts():
  return json.loads(gzip.decompress((GOLDEN / "flow_layouts.json.gz").read_bytes()))


@pytest.mark.long
@pytest.mark.parametrize("name", flow_networks.PUBLISHED)
def test_every_tensor_has_its_place(name):
  """At full width, by names and shapes, both ways."""
  abstract = pipeline.abstract_params(flow_networks.build(flow_networks.PUBLISHED[name]))
  layout = {key: tuple(shape) for key, shape in layouts()[name].items()}
  torch_layout.check_tensors(layout, abstract, where=name)
  flat = flax.traverse_util.flatten_dict(abstract)
  written = {
    torch_layout.torch_name(p): torch_layout.torch_shape(p, a.shape) for p, a in flat.items()
  }
  assert len(written) == len(flat) and written == layout
  trained = {key: shape for key, shape in layout.items() if key != "pos_embed.pos_embed"}
  assert sum(int(np.prod(s)) for s in trained.values()) == flow_networks.COUNTS[name]
  if name == "sd3.5-medium":
    additions = jax.eval_shape(
      lambda key: lora.init_lora(abstract, rank=32, targets=forward.JOINT_LAYERS, key=key),
      jax.random.key(0),
    )
    sizes = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(additions)]
    assert (len(sizes) // 2, sum(sizes)) == (191, 191 * 32 * 2 * 1536)


@pytest.mark.long
@live
@pytest.mark.parametrize("name", flow_networks.PUBLISHED)
def test_layouts_are_pytorchs(name):
  from golden import make_flow_networks

  assert make_flow_networks.layout(name) == layouts()[name]


@pytest.mark.long
@pytest.mark.parametrize(
  "name, side, tokens, want",
  [
    ("sd3.5-medium", 64, 205, 2.22),
    ("sd3.5-medium", 128, 205, 10.9),
    ("sd3.5-large", 64, 205, 7.18),
    ("flux.1-dev", 64, 512, 21.5),
    ("flux.1-schnell", 128, 512, 74.4),
    ("sd3-medium", 128, 205, 8.57),
  ],
)
def test_a_prediction_costs_what_pytorch_counts(name, side, tokens, want):
  """TFLOP of one latent, as PyTorch's counter has them."""
  config = flow_networks.PUBLISHED[name]
  module = flow_networks.build(config)
  given = {
    key: jax.ShapeDtypeStruct((1, *x.shape[1:]), jnp.float32)
    for key, x in flow_networks.inputs(config, (side, side), tokens).items()
  }
  program = jax.make_jaxpr(lambda params, given: module.apply({"params": params}, **given))
  count = flops.count(program(pipeline.abstract_params(module), given))
  assert count / 1e12 == pytest.approx(want, rel=0.02)


@pytest.mark.long
def test_the_vae_costs_what_pytorch_counts():
  """TFLOP of an image of 512 pixels."""
  module = flow_networks.build(flow_networks.PUBLISHED["flux-vae"])
  params = pipeline.abstract_params(module)
  for shape, method, want in (
    ((1, 3, 512, 512), "moments", 1.12),
    ((1, 16, 64, 64), "pixels", 2.52),
  ):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    apply = lambda params, x: module.apply({"params": params}, x, method=method)  # noqa: B023, E731
    assert flops.count(jax.make_jaxpr(apply)(params, x)) / 1e12 == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize(
  "name, field, value, message",
  [
    ("sd3-medium", "qk_norm", "layer_norm", "qk_norm must be null or 'rms_norm'"),
    ("sd3-medium", "num_layers", 0, "num_layers must be a positive integer"),
    ("sd3-medium", "num_layers", True, "num_layers must be a positive integer"),
    (
      "sd3-medium",
      "caption_projection_dim",
      48,
      "caption_projection_dim must be 32, the width",
    ),
    ("sd3-medium", "dual_attention_layers", [2], "must be indices of 2 layers"),
    ("sd3-medium", "dual_attention_layers", "all", "must be a list of integers from 0"),
    ("sd3-medium", "out_channels", 8, "out_channels must be in_channels, 4"),
    ("sd3-medium", "sample_size", 15, "sample_size must be a multiple of 2"),
    ("sd3-medium", "pos_embed_max_size", None, "pos_embed_max_size must be a positive integer"),
    ("flux.1-dev", "axes_dims_rope", [4, 4, 4], "add up to attention_head_dim, 16"),
    ("flux.1-dev", "axes_dims_rope", [5, 5, 6], "three even numbers"),
    ("flux.1-dev", "guidance_embeds", 1, "guidance_embeds must be true or false"),
    ("flux.1-dev", "patch_size", 2, "patch_size must be 1"),
    ("flux.1-dev", "in_channels", 6, "in_channels must be a multiple of 4"),
  ],
)
def test_fields_that_cannot_be(name, field, value, message):
  with pytest.raises(UserError, match=message) as error:
    flow_networks.build(flow_networks.reduced(name) | {field: value})
  assert f"got {value!r}" in str(error.value)
