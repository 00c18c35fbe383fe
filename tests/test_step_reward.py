"""Step-aware preference models: against PyTorch and the equations, levels by levels."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scorer_models
import toy_scorers
from conftest import live

from jaxpref import scorers, sharding
from jaxpref.data import encode
from jaxpref.errors import UserError
from jaxpref.models import load_pipeline, preference_towers, step_reward
from jaxpref.models import vae as vae_lib
from jaxpref.scorers.base import preference_scores, store

_BUNDLED = preference_scores.BUNDLED
NAMES = {"clip": "pickscore.v1", "convolutions": "shapes.preference"}
PROMPTS = ["a red circle", "two blue squares", "a cat"]
LEVELS = np.array([0, 37, 999])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  root = tmp_path_factory.mktemp("scorers")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv(store.ROOT, str(root))
    scorer_models.write_clip(root / "pickscore.v1", "gelu", 7)
    yield root


@pytest.fixture(scope="module", params=NAMES)
def scorer(request, written):
  return scorers.load_reward(NAMES[request.param])


def images_of(scorer, count=3):
  size = 224 if "vision_model" in scorer.params else 32
  return np.random.default_rng(1).random((count, size, size, 3)).astype(np.float32)


def random_params(scorer, seed=3):
  """Returns parameters whose levels matter in every block."""
  params = step_reward.init_params(scorer, scorer.params, jax.random.key(0))
  rng = np.random.default_rng(seed)
  noise = lambda x: 0.15 * rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
  return {**params, "time": jax.tree.map(lambda x: np.asarray(x) + noise(x), params["time"])}


def test_it_begins_as_the_scorer_at_every_level(scorer):
  images, ids = images_of(scorer), scorer.tokenize(PROMPTS)
  want = jax.jit(scorer.score)(scorer.params, images, ids)
  params = step_reward.init_params(scorer, scorer.params, jax.random.key(0))
  score = jax.jit(step_reward.make_score_images(scorer))
  for t in (0, 1, 250, 500, 999):
    got = score(params, images, np.full(3, t), ids)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(
    jnp.shape, step_reward.abstract_params(scorer)
  )


def test_each_image_has_its_own_level(scorer):
  images, ids = images_of(scorer), scorer.tokenize(PROMPTS)
  params, score = random_params(scorer), jax.jit(step_reward.make_score_images(scorer))
  together = np.asarray(score(params, images, LEVELS, ids))
  for i, t in enumerate(LEVELS):
    alone = score(params, images[i : i + 1], np.array([t]), ids[i : i + 1])
    np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-4)
  other = np.asarray(score(params, images, LEVELS[::-1], ids))
  assert (np.abs(other - together)[[0, 2]] > 1e-2).all()
  assert other[1] == pytest.approx(together[1], rel=1e-5)


def embed_by_hand(time, t):
  """SiLU of the embedding of t, in float64: waves of 128 frequencies, and two layers."""
  rates = 10_000.0 ** (-np.arange(128) / 128)
  angles = np.float64(t)[:, None] * rates
  hidden = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
  silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
  for name in ("in", "out"):
    hidden = silu(hidden @ np.float64(time[name]["kernel"]) + np.float64(time[name]["bias"]))
  return hidden


def vectors_by_hand(time, name, hidden, widths):
  """Returns a block's vectors as PyTorch tensors [B, C]."""
  import torch

  layer = time["blocks"][name]
  values = hidden @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
  assert values.shape[1] == sum(widths)
  return [torch.tensor(x) for x in np.split(values, np.cumsum(widths)[:-1], axis=1)]


@live
def test_levels_of_clip_are_the_equation(written):
  """With transformers' own layers: h + gate attn(LN(h) (1 + scale) + shift), and the MLP."""
  import torch
  from transformers import CLIPModel

  scorer = scorers.load_reward("pickscore.v1")
  params, images = random_params(scorer), images_of(scorer)
  ids = scorer.tokenize(PROMPTS)
  got = jax.jit(step_reward.make_score_images(scorer))(params, images, LEVELS, ids)
  model = CLIPModel.from_pretrained(written / "pickscore.v1").double().eval()
  mean, std = (
    np.array(x).reshape(1, 3, 1, 1)
    for x in (
      (0.48145466, 0.4578275, 0.40821073),
      (0.26862954, 0.26130258, 0.27577711),
    )
  )
  pixels = torch.tensor((np.float64(images).transpose(0, 3, 1, 2) - mean) / std)
  hidden, vision = embed_by_hand(params["time"], LEVELS), model.vision_model
  width = model.config.vision_config.hidden_size
  with torch.no_grad():
    h = vision.pre_layrnorm(vision.embeddings(pixels))
    for i, layer in enumerate(vision.encoder.layers):
      name = f"vision_model_encoder_layers_{i}"
      of = [x[:, None] for x in vectors_by_hand(params["time"], name, hidden, [width] * 6)]
      normal = layer.layer_norm1(h) * (1 + of[1]) + of[0]
      h = h + of[2] * layer.self_attn(normal, attention_mask=None)[0]
      normal = layer.layer_norm2(h) * (1 + of[4]) + of[3]
      h = h + of[5] * layer.mlp(normal)
    name = "vision_model_post_layernorm"
    shift, scale = vectors_by_hand(params["time"], name, hidden, [width] * 2)
    image = model.visual_projection(vision.post_layernorm(h[:, 0]) * (1 + scale) + shift)
    words = model.float().text_model(input_ids=torch.tensor(np.int64(ids))).pooler_output
    text = model.text_projection(words).double()
    cosine = torch.nn.functional.cosine_similarity(image, text)
    want = (model.logit_scale.exp() * cosine).numpy()
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
  plain = scorer.score(scorer.params, images, ids)
  assert np.abs(plain - want).min() > 0.1  # the levels matter


@live
def test_levels_of_the_convolutional_tower_are_the_equation():
  """From the parameters, with PyTorch's functions in float64."""
  import torch
  from torch.nn import functional as F

  scorer = scorers.load_reward("shapes.preference")
  params, images = random_params(scorer), images_of(scorer)
  ids = scorer.tokenize(PROMPTS)
  got = jax.jit(step_reward.make_score_images(scorer))(params, images, LEVELS, ids)
  tower = jax.tree.map(lambda x: torch.tensor(np.float64(x)), params["model"]["image"])
  hidden = embed_by_hand(params["time"], LEVELS)

  def conv(x, layer, stride):
    size = layer["kernel"].shape[0]
    total = size - stride if x.shape[2] % stride == 0 else size - x.shape[2] % stride
    pad = max(total, 0) // 2, max(total, 0) - max(total, 0) // 2
    return F.conv2d(
      F.pad(x, (*pad, *pad)), layer["kernel"].permute(3, 2, 0, 1), layer["bias"], stride
    )

  def change(x, scale, shift):
    one = lambda v: v.reshape(*v.shape, *(1,) * (x.ndim - 2))  # noqa: E731
    return x * (1 + one(scale)) + one(shift)

  def residual(x, name, stride):
    of, out = tower[name], tower[name]["conv_2"]["kernel"].shape[-1]
    widths = [x.shape[1], x.shape[1], out, out, out]
    shift1, scale1, shift2, scale2, gate = vectors_by_hand(params["time"], name, hidden, widths)
    norm = lambda x, layer: F.group_norm(x, 8, layer["scale"], layer["bias"], 1e-6)  # noqa: E731
    y = conv(F.silu(change(norm(x, of["norm_1"]), scale1, shift1)), of["conv_1"], stride)
    y = conv(F.silu(change(norm(y, of["norm_2"]), scale2, shift2)), of["conv_2"], 1)
    y = y * gate[:, :, None, None]
    return y + (conv(x, of["shortcut"], stride) if "shortcut" in of else x)

  x = torch.tensor((np.float64(images).transpose(0, 3, 1, 2) - 0.5) / 0.25)
  x = conv(x, tower["stem"], 1)
  for i in range(sum(name.startswith("down_") for name in tower)):
    x = residual(x, f"down_{i}", 2)
    x = residual(x, f"same_{i}", 1) if i else x
  x = x.flatten(2).transpose(1, 2) + tower["places"]  # [B, L, C]
  width = x.shape[-1]
  of = vectors_by_hand(params["time"], "tower", hidden, [width] * 8)
  shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3 = (v[:, None] for v in of)
  norm = lambda x, layer: F.layer_norm(x, (width,), layer["scale"], layer["bias"], 1e-6)  # noqa: E731
  normal, heads = norm(x, tower["norm_1"]) * (1 + scale1) + shift1, tower["attention"]
  q, k, v = (
    torch.einsum("blc,chd->bhld", normal, heads[n]["kernel"]) + heads[n]["bias"][:, None]
    for n in ("query", "key", "value")
  )
  mixed = F.scaled_dot_product_attention(q, k, v)
  mixed = torch.einsum("bhld,hdc->blc", mixed, heads["out"]["kernel"]) + heads["out"]["bias"]
  x = x + gate1 * mixed
  normal = norm(x, tower["norm_2"]) * (1 + scale2) + shift2
  dense = lambda x, layer: x @ layer["kernel"] + layer["bias"]  # noqa: E731
  wide = F.gelu(dense(normal, tower["fc_1"]), approximate="tanh")
  x = x + gate2 * dense(wide, tower["fc_2"])
  pooled = (norm(x, tower["norm_3"]) * (1 + scale3) + shift3).mean(dim=1)
  image = dense(pooled, tower["projection"]).numpy()
  towers = preference_towers.build_towers(store.read_config(_BUNDLED, {}))
  text = np.float64(preference_towers.text_features(towers, params["model"], ids))
  cosine = (image * text).sum(axis=1) / np.linalg.norm(image, axis=1)
  want = np.exp(np.float64(params["model"]["logit_scale"])) * cosine
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
  plain = scorer.score(scorer.params, images, ids)
  assert np.abs(plain - want).min() > 0.05  # the levels matter


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
  loaded = load_pipeline(str(tiny_pipeline))
  return dataclasses.replace(loaded, scorer=scorers.load_reward("shapes.preference"))


def inputs_of(pipeline):
  mesh, rng = sharding.make_mesh(), np.random.default_rng(3)
  x_t = rng.standard_normal((3, *pipeline.latent_shape)).astype(np.float32)
  cond = encode.encode_prompts(pipeline, mesh, PROMPTS)
  return x_t, LEVELS, cond, encode.encode_no_prompt(pipeline, mesh)


def all_params(pipeline):
  own = pipeline.params
  decoder = own["vae"]["decoder"]
  # So that pixels are clipped.
  wide = {**decoder, "conv_out": jax.tree.map(lambda x: 8 * x, decoder["conv_out"])}
  return {
    "trained": random_params(pipeline.scorer),
    "denoiser": own["unet"],
    "vae": {**own["vae"], "decoder": wide},
  }


def test_conditionings_have_the_scorers_tokens(pipeline):
  _, _, cond, uncond = inputs_of(pipeline)
  np.testing.assert_array_equal(cond["tokens"], pipeline.scorer.tokenize(PROMPTS))
  shapes = pipeline.abstract_cond(3)
  assert {name: (x.shape, x.dtype) for name, x in shapes.items()} == {
    name: (x.shape, x.dtype) for name, x in cond.items()
  }
  assert uncond.keys() == cond.keys()
  ahead = encode.tokens_of(pipeline, PROMPTS)
  np.testing.assert_array_equal(ahead[-1][np.arange(3)], cond["tokens"])
  images = np.zeros((3, 2, 64, 64, 3), np.uint8)
  batch = {"images": images, "ids": [of[np.arange(3)] for of in ahead]}
  mesh = sharding.make_mesh()
  found = encode.make_encoder(pipeline, mesh, latents="mode")(sharding.place_batch(batch, mesh))
  for name, want in cond.items():
    np.testing.assert_allclose(found["cond"][name], want, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_reward_is_a_chain(pipeline, guidance):
  """Predicts, decodes, clips and scores by hand; in chunks that do not divide the rows."""
  x_t, t, cond, uncond = inputs_of(pipeline)
  params = all_params(pipeline)
  denoise = jax.jit(pipeline.make_denoise())
  given, empty = (
    np.float64(denoise(params["denoiser"], x_t, t, {"text": text}))
    for text in (cond["text"], np.repeat(uncond["text"], 3, axis=0))
  )
  predicted = empty + guidance * (given - empty)
  alpha_bar = np.float64(pipeline.schedule.alpha_bar)[t].reshape(-1, 1, 1, 1)
  signal, noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
  if pipeline.schedule.prediction_type == "v_prediction":
    x0 = signal * x_t - noise * predicted
  else:
    x0 = (x_t - noise * predicted) / signal
  decoded = vae_lib.decode_unit(pipeline.modules["vae"], params["vae"], jnp.float32(x0))
  images = np.asarray(decoded).transpose(0, 2, 3, 1) * 0.5 + 0.5
  assert images.max() > 1 or images.min() < 0  # the clip matters
  clipped = np.clip(images, 0, 1)
  score_images = jax.jit(step_reward.make_score_images(pipeline.scorer))
  want = score_images(params["trained"], clipped, t, cond["tokens"])
  score = step_reward.make_score(pipeline, guidance=guidance, at_once=2)
  got = jax.jit(score)(params, x_t, t, cond, uncond)
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
  unclipped = score_images(params["trained"], images, t, cond["tokens"])
  assert np.abs(unclipped - want).max() > 0.01


@pytest.mark.parametrize("kind", NAMES)
def test_only_the_scorer_and_its_levels_are_trained(kind, written, pipeline):  # noqa: ARG001
  scorer = scorers.load_reward(NAMES[kind])
  pipeline = dataclasses.replace(pipeline, scorer=scorer)
  x_t, t, cond, uncond = inputs_of(pipeline)
  score = step_reward.make_score(pipeline, guidance=3.0, at_once=2)
  weight = np.array([1.0, -2.0, 0.5], np.float32)
  loss = lambda p: (weight * score(p, x_t, t, cond, uncond)).sum()  # noqa: E731
  gradients = jax.jit(jax.grad(loss))(all_params(pipeline))
  for part in ("denoiser", "vae"):
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(gradients[part]))
  # A key's bias adds the same to all logits of a query; unused words are not looked up.
  still = [
    name
    for path, of in jax.tree_util.tree_leaves_with_path(gradients["trained"])
    if not np.abs(of).max() > 0
    and not (name := jax.tree_util.keystr(path)).endswith(
      ("['key']['bias']", "['k_proj']['bias']")
    )
  ]
  assert not still, "a parameter has no influence on the reward"


@pytest.mark.parametrize("kind", NAMES)
def test_the_scorers_parameters_can_be_freed(kind, written):  # noqa: ARG001
  loaded = scorers.load_reward(NAMES[kind])
  params = [weakref.ref(x) for x in jax.tree.leaves(loaded.params)]
  bare = step_reward.without_params(loaded)
  shapes = jax.tree.map(jnp.shape, loaded.params)
  del loaded
  gc.collect()
  assert params and not any(ref() is not None for ref in params)
  assert jax.tree.map(jnp.shape, bare.params) == shapes
  assert bare.tokenize(PROMPTS).shape[0] == 3


def test_scorers_without_such_a_tower_are_refused():
  with pytest.raises(UserError, match="must have the image tower of CLIP") as error:
    step_reward.find_blocks(toy_scorers.REWARDS["red"]("float32"))
  assert "\n" not in str(error.value)
