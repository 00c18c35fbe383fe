"""T5, Gemma 2 and CLIP as flow models use them, against transformers and diffusers."""

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
from jaxpref.models import gemma, piece_tokenizers, t5, text, torch_layout, weights
from jaxpref.training import flops

GOLDEN = Path(__file__).parent / "golden"
TOKENIZERS = GOLDEN / "tokenizers"


def build(name, dtype=np.float32):
  if name == "t5":
    return t5.build_t5(encoders.T5, dtype=dtype)
  return gemma.build_gemma(encoders.GEMMA, dtype=dtype, soft_cap="capped" in name)


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


def check(got, want):
  assert got.dtype == np.float32 and got.shape == want.shape
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def scaled(params, name, factor):
  flat = flax.traverse_util.flatten_dict(params)
  return flax.traverse_util.unflatten_dict(
    {path: leaf * factor if name in path else leaf for path, leaf in flat.items()}
  )


@pytest.mark.parametrize("name", ["t5", "gemma", "gemma-capped"])
def test_hidden_states_are_pytorchs(name, golden):
  module = build(name)
  params = encoders.random_params(module)
  check(kept(name, run(name, module, params)), golden[name])


@pytest.mark.long
def test_hidden_states_need_every_part(golden):
  """Each trap of these networks would show."""
  module = build("t5")
  params = encoders.random_params(module)
  for wrong in (
    scaled(params, "q", 8**-0.5),  # logits divided as in other transformers
    scaled(params, "relative_attention_bias", 0.0),
    scaled(params, "final_layer_norm", 1.01),
  ):
    assert np.abs(kept("t5", run("t5", module, wrong)) - golden["t5"]).max() > 0.01
  module = build("gemma")
  params = encoders.random_params(module)
  flat = flax.traverse_util.flatten_dict(params)
  plain = {p: x - 1 if p[-1] == "weight" else x for p, x in flat.items()}
  no_window = gemma.build_gemma({**encoders.GEMMA, "sliding_window": 99}, dtype=np.float32)
  ids, mask = encoders.gemma_ids()
  for other in (
    run("gemma", module, flax.traverse_util.unflatten_dict(plain)),  # scale w, not 1 + w
    run("gemma", no_window, params),
    run("gemma", build("gemma-capped"), params),
    np.asarray(gemma.encode(module, params, ids, np.ones_like(mask))),
  ):
    assert np.abs(other - golden["gemma"]).max() > 0.01


def test_clip_outputs_are_pytorchs(golden):
  found = clip_outputs()
  for name, value in found.items():
    check(value, golden[name])
  # The end token by its id and the largest id are different tokens of the third text.
  assert np.abs(found["pooled-2"] - found["pooled-559"])[2].max() > 0.01


@pytest.mark.long
@live
def test_whole_outputs_are_pytorchs():
  from golden import make_prompt_encoders

  want = make_prompt_encoders.outputs()
  found = clip_outputs()
  for name in ("t5", "gemma", "gemma-capped"):
    module = build(name)
    found[name] = run(name, module, encoders.random_params(module))
  assert found.keys() == want.keys()
  for name, value in found.items():
    check(value, want[name])


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
  module = build(name, jnp.dtype(dtype))
  shapes = encoders.abstract(module)
  params = jax.tree.map(
    lambda x, s: x.astype(s.dtype), encoders.random_params(build(name)), shapes
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
  module = build("t5", jnp.float16)
  flat = flax.traverse_util.flatten_dict(encoders.abstract(module))
  assert {p[-2] for p, leaf in flat.items() if leaf.dtype == np.float32 and leaf.ndim > 1} == {
    *("wo", "relative_attention_bias")
  }
  params = encoders.random_params(build("t5"))["encoder"]["block_0"]["layer_1"]
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
  module = build("t5")
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
  module = build("gemma", jnp.bfloat16)
  params = encoders.random_params(build("gemma"))
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
    build("gemma", np.float16)


# Tokenizers.


@pytest.fixture(scope="module")
def tokenizers():
  return {
    kind: piece_tokenizers.load_piece_tokenizer(TOKENIZERS / kind, kind, max_length=100)
    for kind in ("t5", "gemma")
  }


@pytest.mark.parametrize("kind", ["t5", "gemma"])
def test_ids_are_sentencepieces(kind, tokenizers):
  witness = json.loads((TOKENIZERS / "ids.json").read_text("utf-8"))[kind]
  (ids,) = text.tokenize([tokenizers[kind]], witness["texts"])
  assert ids.shape == (len(witness["texts"]), 100) and len(ids) > 80
  for row, pieces in zip(ids, witness["ids"], strict=True):
    want = [*pieces, 1] if kind == "t5" else [2, *pieces]
    assert row.tolist() == want + [0] * (100 - len(want))


def test_long_texts_are_cut(tokenizers, caplog):
  long = "a red circle " * 90
  (ids,) = text.tokenize([tokenizers["t5"]], [long])
  assert ids.shape == (1, 100) and ids[0, -1] == 1 and (ids > 0).all()
  text.warn_of_cut([tokenizers["t5"]], [long, "a"])
  assert "1 of 2 prompts cut to 100 tokens" in caplog.text


def test_tokenizers_that_are_refused(tmp_path):
  load = piece_tokenizers.load_piece_tokenizer
  with pytest.raises(UserError, match=r"tokenizer.json is missing"):
    load(tmp_path, "t5", max_length=9)
  (tmp_path / "spiece.model").write_bytes(b"pieces")
  with pytest.raises(UserError, match=r"only sentencepiece's spiece.model: make a tokenizer"):
    load(tmp_path, "t5", max_length=9)
  with pytest.raises(UserError, match=r"is of kind BPE, but the tokenizer of t5 is Unigram"):
    load(TOKENIZERS / "gemma", "t5", max_length=9)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match=r"does not hold a tokenizer of t5"):
    load(tmp_path, "t5", max_length=9)


def test_an_instruction_is_encoded_and_left_out(tokenizers):
  tokenizer = tokenizers["gemma"]
  count = len(tokenizer("Write: ")["input_ids"])
  ids, mask = piece_tokenizers.tokenize_masked(
    tokenizer, [" A red circle "], instruction="Write: "
  )
  assert ids.shape == mask.shape == (1, 100 + count - 2)
  assert mask.sum() == len(tokenizer("Write: a red circle")["input_ids"])
  kept_ids = gemma.keep_prompt(ids, 100)
  assert kept_ids.shape == (1, 100) and kept_ids[0, 0] == 2
  np.testing.assert_array_equal(kept_ids[0, 1:], ids[0, -99:])
  ids, mask = piece_tokenizers.tokenize_masked(tokenizer, [""])
  assert ids.shape == (1, 100) and mask.sum() == 1
  np.testing.assert_array_equal(gemma.keep_prompt(ids, 100), ids)


# diffusers' own pipelines.


def torch_encoder(make, config):
  from golden import make_prompt_encoders

  return make_prompt_encoders.load(make, config)


def clip_tokenizers(tmp_path, count):
  from transformers import CLIPTokenizer

  text.train_tokenizer(["a red circle"], tmp_path, vocab_size=560, max_length=20)
  return [CLIPTokenizer.from_pretrained(tmp_path)] * count


@live
@pytest.mark.long
def test_text_of_diffusers_sd3_pipeline(tmp_path, tokenizers):
  from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

  texts = ["a red circle", "Two blue squares, please! " * 9]
  clip = clip_tokenizers(tmp_path, 2)
  t5_config = {**encoders.T5, "d_model": 96}
  pipe = StableDiffusion3Pipeline(
    **{"scheduler": None, "vae": None},
    transformer=SD3Transformer2DModel(
      **{"joint_attention_dim": 96, "sample_size": 8, "num_layers": 1, "pos_embed_max_size": 4},
      **{"num_attention_heads": 1, "attention_head_dim": 8, "caption_projection_dim": 8},
    ),
    text_encoder=torch_encoder(text.build_text_encoder, encoders.CLIPS[0]),
    text_encoder_2=torch_encoder(text.build_text_encoder, encoders.CLIPS[1]),
    text_encoder_3=torch_encoder(t5.build_t5, t5_config),
    **{"tokenizer": clip[0], "tokenizer_2": clip[1], "tokenizer_3": tokenizers["t5"]},
  )
  hidden, _, pooled, _ = pipe.encode_prompt(
    texts, None, None, do_classifier_free_guidance=False, max_sequence_length=40, device="cpu"
  )
  modules = [text.build_text_encoder(c, dtype=np.float32) for c in encoders.CLIPS]
  ids = text.tokenize(clip, texts)
  params = [encoders.random_params(m) for m in modules]
  both, found_pooled = text.encode_text_pair(modules, params, ids)
  module = t5.build_t5(t5_config, dtype=np.float32)
  loaded = piece_tokenizers.load_piece_tokenizer(TOKENIZERS / "t5", "t5", max_length=40)
  (t5_ids,) = text.tokenize([loaded], texts)
  found = text.join_texts(both, t5.encode(module, encoders.random_params(module), t5_ids))
  check(np.asarray(found), hidden.detach().numpy())
  check(np.asarray(found_pooled), pooled.detach().numpy())


@live
@pytest.mark.long
def test_text_of_diffusers_flux_pipeline(tmp_path, tokenizers):
  from diffusers import FluxPipeline

  texts = ["a red circle", "Two blue squares, please! " * 9]
  clip = clip_tokenizers(tmp_path, 1)
  config = encoders.POOLED[559]
  pipe = FluxPipeline(
    **{"scheduler": None, "vae": None, "transformer": None},
    text_encoder=torch_encoder(text.build_text_encoder, config),
    text_encoder_2=torch_encoder(t5.build_t5, encoders.T5),
    **{"tokenizer": clip[0], "tokenizer_2": tokenizers["t5"]},
  )
  hidden, pooled, _ = pipe.encode_prompt(texts, None, device="cpu", max_sequence_length=40)
  module = text.build_text_encoder(config, dtype=np.float32)
  (ids,) = text.tokenize(clip, texts)
  found = text.encode_pooled(module, encoders.random_params(module), ids)
  check(np.asarray(found), pooled.detach().numpy())
  module = build("t5")
  loaded = piece_tokenizers.load_piece_tokenizer(TOKENIZERS / "t5", "t5", max_length=40)
  (ids,) = text.tokenize([loaded], texts)
  check(
    np.asarray(t5.encode(module, encoders.random_params(module), ids)), hidden.detach().numpy()
  )


@live
@pytest.mark.long
def test_text_of_diffusers_sana_pipeline(tokenizers):
  from diffusers import SanaPipeline

  texts = ["A Red circle ", "Two blue squares, please! " * 9]
  tokenizer = tokenizers["gemma"]
  config = {**encoders.GEMMA, "sliding_window": 200}  # as published, longer than any text
  pipe = SanaPipeline(tokenizer, torch_encoder(gemma.build_gemma, config), None, None, None)
  instruction = ["Write a better prompt.", "User Prompt: "]
  hidden, mask, negative, negative_mask = pipe.encode_prompt(
    texts,
    **{"negative_prompt": "", "device": "cpu", "max_sequence_length": 100},
    complex_human_instruction=instruction,
  )
  module = gemma.build_gemma(config, dtype=np.float32)
  params = encoders.random_params(module)
  for given, prefix, want, want_mask in (
    (texts, "\n".join(instruction), hidden, mask),
    ([""] * 2, "", negative, negative_mask),
  ):
    ids, own = piece_tokenizers.tokenize_masked(tokenizer, given, instruction=prefix)
    found = gemma.keep_prompt(gemma.encode(module, params, ids, own), 100)
    check(np.asarray(found), want.detach().numpy())
    np.testing.assert_array_equal(gemma.keep_prompt(own, 100), want_mask)
