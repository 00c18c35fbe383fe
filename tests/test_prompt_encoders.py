"""T5, Gemma 2 and CLIP as flow models use them, against transformers."""

import json
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import prompt_encoders as encoders
import pytest
from conftest import live
from safetensors.numpy import save_file

from jaxpref.errors import UserError
from jaxpref.models import gemma, t5, text, torch_layout, weights
from jaxpref.training import flops

GOLDEN = Path(__file__).parent / "golden"


def run(name, module, params):
  if name == "t5":
    return np.asarray(jax.jit(t5.encode, static_argnums=0)(module, params, encoders.t5_ids()))
  ids, mask = encoders.gemma_ids()
  return np.asarray(jax.jit(gemma.encode, static_argnums=0)(module, params, ids, mask))


def clip_outputs() -> dict[str, np.ndarray]:
  ids = encoders.clip_ids()
  modules = [text.build_text_encoder(c, dtype=np.float32) for c in encoders.CLIPS]
  params = [encoders.random_params(m) for m in modules]
  pair = jax.jit(lambda params, ids: text.encode_text_pair(modules, params, [ids, ids]))
  out = dict(zip(("pair", "pair-pooled"), pair(params, ids), strict=True))
  for eos, config in encoders.POOLED.items():
    module = text.build_text_encoder(config, dtype=np.float32)
    pooled = jax.jit(lambda params, ids, m=module: text.encode_pooled(m, params, ids))
    out[f"pooled-{eos}"] = pooled(encoders.random_params(module), ids)
  return {name: np.asarray(value) for name, value in out.items()}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
  with np.load(GOLDEN / "prompt_encoders.npz") as file:
    return dict(file)


def kept(name, value):
  return value[:, ::23] if name == "t5" else value


def scaled(params, name, factor):
  flat = flax.traverse_util.flatten_dict(params)
  return flax.traverse_util.unflatten_dict(
    {path: leaf * factor if name in path else leaf for path, leaf in flat.items()}
  )


@pytest.mark.parametrize("name", ["t5", "gemma", "gemma-capped"])
def test_hidden_states_are_pytorchs(name, golden):
  module = encoders.build(name)
  params = encoders.random_params(module)
  encoders.check(kept(name, run(name, module, params)), golden[name])


@pytest.mark.long
def test_hidden_states_need_every_part(golden):
  """Each trap of these networks would show."""
  module = encoders.build("t5")
  params = encoders.random_params(module)
  for wrong in (
    scaled(params, "q", 8**-0.5),  # logits divided as in other transformers
    scaled(params, "relative_attention_bias", 0.0),
    scaled(params, "final_layer_norm", 1.01),
  ):
    assert np.abs(kept("t5", run("t5", module, wrong)) - golden["t5"]).max() > 0.01
  module = encoders.build("gemma")
  params = encoders.random_params(module)
  flat = flax.traverse_util.flatten_dict(params)
  plain = {p: x - 1 if p[-1] == "weight" else x for p, x in flat.items()}
  no_window = gemma.build_gemma({**encoders.GEMMA, "sliding_window": 99}, dtype=np.float32)
  ids, mask = encoders.gemma_ids()
  for other in (
    run("gemma", module, flax.traverse_util.unflatten_dict(plain)),  # scale w, not 1 + w
    run("gemma", no_window, params),
    run("gemma", encoders.build("gemma-capped"), params),
    np.asarray(gemma.encode(module, params, ids, np.ones_like(mask))),
  ):
    assert np.abs(other - golden["gemma"]).max() > 0.01


def test_clip_outputs_are_pytorchs(golden):
  found = clip_outputs()
  for name, value in found.items():
    encoders.check(value, golden[name])
  # The end token by its id and the largest id are different tokens of the third text.
  assert np.abs(found["pooled-2"] - found["pooled-559"])[2].max() > 0.01


@pytest.mark.long
@live
def test_whole_outputs_are_pytorchs():
  from golden import make_prompt_encoders

  want = make_prompt_encoders.outputs()
  found = clip_outputs()
  for name in ("t5", "gemma", "gemma-capped"):
    module = encoders.build(name)
    found[name] = run(name, module, encoders.random_params(module))
  assert found.keys() == want.keys()
  for name, value in found.items():
    encoders.check(value, want[name])


def test_buckets_of_all_distances():
  """Against the definition in exact integers: the k-th bucket begins at 8 * 16^(k / 8)."""
  found = t5.relative_buckets(300, 32, 128)
  for offset in range(-299, 300):
    distance = abs(offset)
    far = max((k for k in range(9) if distance**8 >= 8**8 * 16**k), default=0)
    bucket = distance if distance < 8 else min(8 + far, 15)
    row = max(-offset, 0)
    assert found[row, row + offset] == bucket + 16 * (offset > 0)


@pytest.mark.parametrize(
  ("name", "dtype", "error"),
  [("t5", "bfloat16", 0.02), ("gemma", "bfloat16", 0.03)],
)
def test_half_precision_is_close(name, dtype, error, golden):
  module = encoders.build(name, jnp.dtype(dtype))
  shapes = encoders.abstract(module)
  params = jax.tree.map(
    lambda x, s: x.astype(s.dtype), encoders.random_params(encoders.build(name)), shapes
  )
  for path, leaf in flax.traverse_util.flatten_dict(shapes).items():
    wide = leaf.ndim == 1 or "relative_attention_bias" in path
    assert leaf.dtype == ("float32" if wide else dtype), path
  found = run(name, module, params)
  assert found.dtype == dtype
  off = kept(name, found).astype(np.float32) - golden[name]
  assert 0 < np.sqrt((off**2).mean()) < error
  # Wider storage does not change a bit, so narrow storage loses nothing.
  wide = jax.tree.map(lambda x: x.astype(np.float32), params)
  assert (run(name, module, wide) == found).all()


def test_float16_keeps_the_last_product_of_t5s_layers_in_float32():
  """With published weights it overflows; CPUs lack the kernels to run the whole encoder."""
  module = encoders.build("t5", jnp.float16)
  flat = flax.traverse_util.flatten_dict(encoders.abstract(module))
  assert {p[-2] for p, leaf in flat.items() if leaf.dtype == np.float32 and leaf.ndim > 1} == {
    *("wo", "relative_attention_bias")
  }
  params = encoders.random_params(encoders.build("t5"))["encoder"]["block_0"]["layer_1"]
  wrapped = t5._FeedForward(module.config, module.dtype)
  x = np.ones((1, 2, 32), np.float16)
  found = wrapped.apply({"params": scaled(params["DenseReluDense"], "wo", 1e6)}, x)
  assert found.dtype == np.float32 and np.isfinite(found).all() and np.abs(found).max() > 65504


@pytest.mark.long
def test_clips_kernels_in_bfloat16_change_no_bit():
  config = encoders.CLIPS[1]
  wide = encoders.random_params(text.build_text_encoder(config, dtype=np.float32))
  module = text.build_text_encoder(config, dtype=jnp.bfloat16)
  shapes = encoders.abstract(module)
  assert {
    p[-1]
    for p, leaf in flax.traverse_util.flatten_dict(shapes).items()
    if leaf.dtype == jnp.bfloat16
  } == {"kernel"}
  narrow = jax.tree.map(lambda x, s: x.astype(s.dtype), wide, shapes)
  pair = jax.jit(lambda p, ids: text.encode_text_pair([module] * 2, [p] * 2, [ids] * 2))
  one, other = (pair(p, encoders.clip_ids()) for p in (wide, narrow))
  jax.tree.map(np.testing.assert_array_equal, one, other)


# Names and files.


def layout(name) -> dict[str, tuple[int, ...]]:
  lines = (GOLDEN / "layouts" / "prompt_encoders.txt").read_text().splitlines()
  config = encoders.PUBLISHED[name][1]
  layers = config.get("num_layers") or config["num_hidden_layers"]
  found = {}
  for part, key, *shape in map(str.split, lines):
    for i in range(layers if "*" in key else 1):
      if part == name:
        found[key.replace("*", str(i))] = tuple(map(int, shape))
  return found


@pytest.mark.parametrize("name", encoders.PUBLISHED)
def test_every_tensor_has_its_place(name):
  make, config, count = encoders.PUBLISHED[name]
  abstract = encoders.abstract(make(config, dtype=jnp.bfloat16))
  want = layout(name)
  if name == "t5-xxl":  # the same tensor as shared.weight, which writers leave out
    del want["encoder.embed_tokens.weight"]
  torch_layout.check_tensors(want, abstract, where=name)
  flat = flax.traverse_util.flatten_dict(abstract)
  written = {
    torch_layout.torch_name(p): torch_layout.torch_shape(p, a.shape) for p, a in flat.items()
  }
  assert len(written) == len(flat) and written == want
  assert sum(int(np.prod(shape)) for shape in want.values()) == count


@pytest.mark.long
@pytest.mark.parametrize(
  ("name", "tokens", "tera"),
  [  # PyTorch's own count of the whole networks; Gemma's by its formula
    ("t5-xxl", 256, 2.40),
    ("t5-xxl", 512, 4.85),
    ("gemma-2-2b", 512, 2.1),
    ("clip-l", 77, 0.013),
    ("clip-g-projected", 77, 0.098),
  ],
)
def test_flops_of_a_text(name, tokens, tera):
  make, config, _ = encoders.PUBLISHED[name]
  module = make(config, dtype=jnp.bfloat16)
  ids = jax.ShapeDtypeStruct((1, tokens), np.int32)
  apply = {
    "t5-xxl": lambda p, ids: t5.encode(module, p, ids),
    "gemma-2-2b": lambda p, ids: gemma.encode(module, p, ids, ids),
  }.get(name, lambda p, ids: text.encode_text(module, p, ids))
  found = flops.count(jax.make_jaxpr(apply)(encoders.abstract(module), ids)) / 1e12
  print(name, tokens, found)
  digits = 3 if tera < 0.1 else 2 if tera > 2.2 else 1  # as published
  assert abs(found - tera) < 0.02 * tera + 0.5 * 10**-digits


@pytest.mark.long
@live
def test_names_are_pytorchs():
  from golden import make_prompt_encoders

  stored = (GOLDEN / "layouts" / "prompt_encoders.txt").read_text()
  assert make_prompt_encoders.layout() == stored


def write_shards(directory, tensors) -> Path:
  """Writes two files and their index."""
  directory.mkdir()
  places = {}
  for i in (0, 1):
    file = f"model-0000{i + 1}-of-00002.safetensors"
    part = {name: tensors[name] for name in sorted(tensors)[i::2]}
    save_file(part, directory / file)
    places |= dict.fromkeys(part, file)
  index = {"metadata": {}, "weight_map": places}
  (directory / "model.safetensors.index.json").write_text(json.dumps(index))
  return directory


def read(directory, module):
  opened = weights.open_part(directory, "model")
  shapes = encoders.abstract(module)
  return torch_layout.import_tensors(opened, shapes, where=str(directory))[0]


def test_shards_and_names_of_t5s_embeddings(tmp_path):
  module = encoders.build("t5")
  params = encoders.random_params(module)
  tensors = torch_layout.export_tensors(params, np.float32)
  table = tensors["shared.weight"]
  copy = {"encoder.embed_tokens.weight": table}
  rest = {name: of for name, of in tensors.items() if name != "shared.weight"}
  whole = {"decoder.final_layer_norm.weight": table[0], "lm_head.weight": table}
  for i, stored in enumerate((tensors, tensors | copy, rest | copy, tensors | whole)):
    found = read(write_shards(tmp_path / str(i), stored), module)
    jax.tree.map(np.testing.assert_array_equal, found, params)
  with pytest.raises(UserError, match=r"shared.weight and encoder.embed_tokens.weight with"):
    read(
      write_shards(tmp_path / "other", {**tensors, **{k: -v for k, v in copy.items()}}), module
    )
  with pytest.raises(UserError, match=r"missing shared.weight"):
    read(write_shards(tmp_path / "none", rest), module)


def test_shards_of_gemma_in_bfloat16(tmp_path):
  module = encoders.build("gemma", jnp.bfloat16)
  params = encoders.random_params(encoders.build("gemma"))
  tensors = torch_layout.export_tensors(params, jnp.bfloat16)
  found = read(write_shards(tmp_path / "gemma", tensors), module)
  assert found["layers_0"]["mlp"]["up_proj"]["kernel"].dtype == jnp.bfloat16
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), found, rounded)


@pytest.mark.parametrize(
  ("make", "changes", "message"),
  [
    (t5.build_t5, {"feed_forward_proj": "relu"}, r"feed_forward_proj must be 'gated-gelu'"),
    (t5.build_t5, {"d_model": None}, r"d_model must be a positive whole number \(got None\)"),
    (t5.build_t5, {"num_layers": 0}, r"num_layers must be a positive whole number \(got 0\)"),
    (t5.build_t5, {"layer_norm_epsilon": "a"}, r"layer_norm_epsilon must be a positive number"),
    (t5.build_t5, {"relative_attention_num_buckets": 3}, r"must be at least 4"),
    (gemma.build_gemma, {"num_key_value_heads": 3}, r"num_attention_heads must be a multiple"),
    (gemma.build_gemma, {"head_dim": 15}, r"head_dim must be even \(got 15\)"),
    (gemma.build_gemma, {"hidden_activation": "silu"}, r"hidden_activation must be"),
    (gemma.build_gemma, {"layer_types": ["full_attention"] * 3}, r"must alternate"),
  ],
)
def test_configurations_that_are_refused(make, changes, message):
  config = encoders.T5 if make is t5.build_t5 else encoders.GEMMA
  with pytest.raises(UserError, match=message):
    make(config | changes, dtype=np.float32)
  field = next(iter(changes))
  if field in ("d_model", "head_dim", "feed_forward_proj"):
    with pytest.raises(UserError, match=f"{field} is missing"):
      make({k: v for k, v in config.items() if k != field}, dtype=np.float32)


def test_gemma_is_refused_in_float16():
  with pytest.raises(UserError, match="overflows in float16: compute in bfloat16 or float32"):
    encoders.build("gemma", np.float16)
