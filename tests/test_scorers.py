"""Scorers on CLIP against their PyTorch originals, on random weights and photographs."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import flax
import flax.linen as nn
import jax
import numpy as np
import pytest
import scorer_models
from conftest import ROOT, WITHOUT_TORCH, live, xla_flags
from PIL import Image
from safetensors.numpy import load_file
from test_tokenizer import clips_own_vocabulary, needs_vocabulary
from transformers.models.clip import modeling_flax_clip

from jaxpref import scorers
from jaxpref.errors import UserError
from jaxpref.models import blip, clip_towers, open_clip_names, save, torch_layout
from jaxpref.scorers import aesthetic, base, clip, hpsv2, imagereward, pickscore
from jaxpref.scorers.base import aesthetic_scores, blip_scores, clip_scores, pixels, store

WORDS = 626  # of the tokenizer of `scorer_models`
GOLDEN = Path(__file__).parent / "golden" / "scorers"
# Each CLIP scorer's directory, preprocessing, cleaning of texts, and scale (None: the model's).
COSINES = {
  "clip.h14": ("clip.h14", "pil", "ftfy", 100),
  "clip.h14_tensor_aa": ("clip.h14", "tensor_aa", "ftfy", 100),
  "clip.l14": ("clip.l14", "hf", "fast", 100),
  "hpsv2.v2_0": ("hpsv2.v2_0", "tensor_aa", "ftfy", 100),
  "hpsv2.v2_0_pil": ("hpsv2.v2_0", "pil", "ftfy", 100),
  "hpsv2.v2_0_tensor_noaa": ("hpsv2.v2_0", "tensor_noaa", "ftfy", 100),
  "hpsv2.v2_1": ("hpsv2.v2_1", "tensor_aa", "ftfy", 100),
  "hpsv2.v2_1_pil": ("hpsv2.v2_1", "pil", "ftfy", 100),
  "hpsv2.v2_1_tensor_noaa": ("hpsv2.v2_1", "tensor_noaa", "ftfy", 100),
  "pickscore.v1": ("pickscore.v1", "hf", "fast", None),
}
# The preprocessing of every scorer.
SCORERS = {
  **{name: variant for name, (_, variant, _, _) in COSINES.items()},
  "aesthetic.v1": "pil",
  "aesthetic.v1_hf": "hf",
  "aesthetic.v2": "pil",
  "aesthetic.v2_hf": "hf",
  "imagereward.v1": "pil",
}
BFLOAT16 = ("clip.h14", "clip.l14", "hpsv2.v2_0", "hpsv2.v2_1")
BFLOAT16 += ("aesthetic.v1", "aesthetic.v2", "imagereward.v1")


def of_values(name: str, root: Path, values, prompts):
  """Returns PyTorch's scores of normalized pixels [N, 3, 224, 224]."""
  import scorer_witness

  if name in COSINES:
    weights, _, cleaning, scale = COSINES[name]
    return scorer_witness.clip_scores(
      root / weights, values, prompts, cleaning=cleaning, scale=scale
    )
  if name.startswith("aesthetic"):
    head = root / name.removesuffix("_hf")
    return scorer_witness.aesthetic_scores(head, root / "clip.l14", values)
  return scorer_witness.image_reward_scores(root / name, values, prompts)


def witness(name: str, root: Path, images) -> np.ndarray:
  """Returns PyTorch's scores."""
  import scorer_witness
  import torch

  values = torch.stack([scorer_witness.pixel_values(image, SCORERS[name]) for image in images])
  with torch.no_grad():
    return of_values(name, root, values, scorer_models.PROMPTS).numpy()


def score(name: str, images) -> np.ndarray:
  return scorers.load_scorers([name])[name][1](images, scorer_models.PROMPTS)


def close(got, want, rtol=1e-5) -> bool:
  """Cosines near 0 are compared on the scale of the others."""
  return bool(np.allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max()))


@pytest.fixture(scope="module")
def photographs():
  return scorer_models.photographs()


@pytest.fixture(scope="module")
def golden():
  return {k: np.array(v) for k, v in read("scores")["scores"].items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """The directory of all scorers' weights, which the environment names."""
  with scorer_models.written_all(tmp_path_factory.mktemp("scorers")) as directory:
    yield directory


def read(name: str) -> dict:
  return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_those_of_the_original(name, root, photographs, golden):
  got = score(name, photographs)
  assert got.dtype == np.float32 and np.ptp(golden[name]) > 0.1
  assert close(got, golden[name])


@live
@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_those_of_the_installed_original(name, root, photographs):
  assert close(score(name, photographs), witness(name, root, photographs))


def test_preprocessing_matters(golden):
  for version in ("v2_0", "v2_1"):
    exact = golden[f"hpsv2.{version}"]
    for variant in ("pil", "tensor_noaa"):
      assert not close(golden[f"hpsv2.{version}_{variant}"], exact, rtol=1e-4)


@pytest.mark.parametrize(
  "name", ["pickscore.v1", *(pytest.param(n, marks=pytest.mark.long) for n in BFLOAT16[-2:])]
)
def test_bfloat16_is_near(name, root, photographs, golden):
  got = score(f"{name}_bf16", photographs)
  assert not close(got, golden[name]) and close(got, golden[name], rtol=0.05)


def test_every_scorer_is_tested():
  names = {
    f"{module.__name__.rpartition('.')[2]}.{name}"
    for module in (aesthetic, clip, hpsv2, imagereward, pickscore)
    for name in module.SCORERS
  }
  assert names == {*SCORERS, *(f"{name}_bf16" for name in ("pickscore.v1", *BFLOAT16))}


def test_features_of_clip_l(root, photographs, golden):
  """LAION's first head on them is its scorer."""
  features = scorers.load_features("clip.l14")
  found = features(photographs)
  assert found.shape == (6, 48) and found.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-6)
  head = load_file(root / "aesthetic.v1" / "model.safetensors")
  assert close(found @ head["weight"][0] + head["bias"], golden["aesthetic.v1_hf"])
  assert features(photographs[:0]).shape == (0, 48)


def test_versions_name_number_preprocessing_and_dtype():
  found = scorers.load_scorers(["pickscore.v1", "pickscore.v1_bf16", "hpsv2.v2_1_pil"])
  assert [version for version, _ in found.values()] == ["1-hf", "1-hf-bfloat16", "2.1-pil"]
  for name, variant in SCORERS.items():
    assert scorers.load_scorers([name])[name][0].endswith(variant)


def test_an_array_and_a_list_have_the_same_scores(root, photographs):
  squares = np.stack([image[:80, :80] for image in photographs])
  whole = score("clip.h14", squares)
  np.testing.assert_array_equal(score("clip.h14", list(squares)), whole)
  assert score("clip.h14", photographs).shape == (6,)
  _, function = scorers.load_scorers(["clip.h14"])["clip.h14"]
  assert function(squares[:0], []).shape == (0,)
  # The batch that an image is in, and its place, do not matter.
  alone = [function(squares[i : i + 1], scorer_models.PROMPTS[i : i + 1])[0] for i in range(6)]
  assert close(np.array(alone), whole, rtol=1e-6)


@pytest.fixture(scope="module")
def h14(root):
  return clip_scores.load_clip(clip.H14, "float32")


def cosines(loaded, photographs, *, params=None, module=None, last=False) -> np.ndarray:
  """Returns the scores of `clip.h14`, computed with a change."""
  module, params = module or loaded.module, params or loaded.params
  images = np.stack([pixels.prepare(image, "pil", 224) for image in photographs])
  ids = clip_scores.tokenize(loaded, scorer_models.PROMPTS, "ftfy")
  if last:  # padding with a higher id than the end token's moves the feature
    ids = np.where(np.arange(77) == 76, ids.max(), np.minimum(ids, ids.max() - 1))
  units = pixels.normalize(images, clip_towers.MEAN, clip_towers.STD)
  of_images = clip_towers.image_features(module, params, units)
  of_texts = clip_towers.text_features(module, params, ids)
  return 100 * np.sum(of_images * of_texts, axis=-1)


def test_ablations_are_seen(h14, photographs, golden, monkeypatch):
  want = golden["clip.h14"]
  assert close(cosines(h14, photographs), want)
  quick = clip_towers.build_clip(
    scorer_models.clip_config("quick_gelu", h14.module.config.text_config.vocab_size),
    dtype=np.float32,
  )
  kernel = h14.params["text_projection"]["kernel"]
  changes = {
    "the other GELU": {"module": quick},
    "no transpose": {"params": {**h14.params, "text_projection": {"kernel": kernel.T}}},
    "the feature of the last token": {"last": True},
  }
  found = {name: cosines(h14, photographs, **change) for name, change in changes.items()}

  def without_norm(next_fun, args, kwargs, context):
    left_out = context.module.name == "post_layernorm"
    return args[0] if left_out else next_fun(*args, **kwargs)

  with nn.intercept_methods(without_norm):
    found["no post_layernorm"] = cosines(h14, photographs)
  monkeypatch.setattr(modeling_flax_clip, "make_causal_mask", lambda x: np.ones((1, 1, 77, 77)))
  found["no causal mask"] = cosines(h14, photographs)
  for name, got in found.items():
    assert not close(got, want, rtol=1e-3), name


@pytest.mark.long
def test_ablations_of_image_reward_are_seen(root, photographs, golden, monkeypatch):
  loaded = blip_scores.read(imagereward.V1, "float32")
  want = golden["imagereward.v1"]
  images = np.stack([pixels.prepare(image, "pil", 224) for image in photographs])
  tokens = blip_scores.tokenize(loaded, scorer_models.PROMPTS)
  assert tokens["mask"].sum(axis=1).tolist() == [19, 35, 10, 35, 19, 28]
  assert close(loaded.apply(loaded.params, images, tokens), want)
  whole = {**tokens, "mask": np.ones_like(tokens["mask"])}
  found = {"no mask": loaded.apply(loaded.params, images, whole)}
  encoder = loaded.module.config.text_config.vocab_size - 1  # [ENC]
  encoded = np.where(np.arange(35) == 0, encoder, tokens["ids"])
  found["another first token"] = loaded.apply(loaded.params, images, {**tokens, "ids": encoded})

  def without(name):
    def intercept(next_fun, args, kwargs, context):
      found = next_fun(*args, **kwargs)
      return args[0] if (context.module.name or "").endswith(name) else found

    return intercept

  with nn.intercept_methods(without("visual_encoder.norm")):
    found["no last norm"] = loaded.apply(loaded.params, images, tokens)
  attend = blip._attend
  monkeypatch.setattr(blip, "_gelu", nn.gelu)
  found["tanh's GELU"] = loaded.apply(loaded.params, images, tokens)
  monkeypatch.undo()
  causal = np.tril(np.ones((35, 35), bool))

  def causally(query, key, value, heads, mask=None):
    return attend(query, key, value, heads, None if mask is None else mask & causal)

  monkeypatch.setattr(blip, "_attend", causally)
  found["causal"] = loaded.apply(loaded.params, images, tokens)
  for name, got in found.items():
    assert not close(got, want, rtol=1e-4), name


def score_by_open_clips_names(directory: Path, words: int, *, images, prompts, variant: str):
  """Returns our scores of `open_clip_tensors`; `directory` has the tokenizer."""
  tensors = scorer_models.open_clip_tensors(words, 7)
  assert open_clip_names.is_open_clip(tensors)
  renamed = open_clip_names.to_transformers(tensors)
  save.save_tensors(directory / "model.safetensors", renamed)
  (directory / "config.json").write_text(json.dumps(scorer_models.open_clip_config(words)))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(store, "find_weights", lambda published: directory)
    scorer = base.Cosine(base.Published(directory.name, where="x"), "1", "H14", "ftfy")
    return clip_scores.score(scorer, images, prompts, variant=variant, dtype="float32")


def test_open_clips_names(tmp_path, photographs, golden):
  words = scorer_models.write_tokenizer(tmp_path)
  got = score_by_open_clips_names(
    tmp_path, words, images=photographs, prompts=scorer_models.PROMPTS, variant="tensor_aa"
  )
  assert close(got, golden["open_clip"])
  tensors = scorer_models.open_clip_tensors(words, 7)
  with pytest.raises(UserError, match="does not have: a, b"):
    open_clip_names.to_transformers({**tensors, "b": tensors["visual.proj"], "a": np.ones(3)})


@live
@needs_vocabulary
def test_scores_are_those_of_the_installed_open_clip(tmp_path, photographs):
  """Its class, names, transforms and tokenizer, at reduced width with the whole vocabulary."""
  import open_clip
  import scorer_witness
  import torch

  clips_own_vocabulary(tmp_path)
  tokenizer = open_clip.tokenizer.SimpleTokenizer()
  prepare = open_clip.image_transform(
    224, is_train=False, mean=scorer_witness.MEAN, std=scorer_witness.STD
  )
  # In the last prompt the end token is spelled out, which open_clip takes for words.
  prompts = [*scorer_models.PROMPTS[:-1], "naïve ﬁne art of a cat"]
  values = torch.stack([prepare(Image.fromarray(image)) for image in photographs])
  want = scorer_witness.open_clip_scores(tokenizer.vocab_size, values, tokenizer(prompts))
  got = score_by_open_clips_names(
    tmp_path, tokenizer.vocab_size, images=photographs, prompts=prompts, variant="pil"
  )
  assert np.ptp(got) > 0.1 and close(got, want.numpy())


@functools.cache
def full_width_shapes(towers: str):
  module = clip_towers.build_clip(getattr(clip_towers, towers), dtype=np.float32)
  return clip_towers.abstract_clip(module)


def full_width(table: str) -> dict[str, np.ndarray]:
  """Returns the tensors of a table by name; they take no memory."""
  found = {}
  for pattern, (count, *shape) in read("tensors")[table]["tensors"].items():
    for i in range(count):
      zero = np.float16(0) if "hpsv2" in table else np.float32(0)
      found[pattern.replace("{i}", str(i))] = np.broadcast_to(zero, shape)
  return found


@pytest.mark.long
@pytest.mark.parametrize(
  "table",
  [
    "clip_h_14_hf",
    "clip_l_14_hf",
    "clip_h_14_open_clip",
    "clip_l_14_open_clip",
    "hpsv2_open_clip",
  ],
)
def test_every_name_and_shape_at_full_width(table):
  abstract = full_width_shapes("L14" if "_l_14" in table else "H14")
  floats = sum(leaf.size for leaf in jax.tree.leaves(abstract))
  assert floats == read("tensors")[table]["floats"]
  tensors = full_width(table)
  if "open_clip" in table:
    tensors = open_clip_names.to_transformers(tensors)
  shapes = {name: array.shape for name, array in tensors.items()}
  torch_layout.check_tensors(shapes, abstract, where=table)
  shapes.pop("logit_scale")
  with pytest.raises(UserError, match="missing logit_scale"):
    torch_layout.check_tensors(shapes, abstract, where=table)


@pytest.mark.long
def test_every_name_and_shape_of_image_reward():
  abstract = blip.abstract_params(blip.build_image_reward(blip.IMAGE_REWARD, dtype=np.float32))
  tensors = full_width("imagereward_v1")
  assert sum(a.size for a in tensors.values()) - 512 == 446_665_953  # but for position_ids
  used = {n: a.shape for n, a in tensors.items() if not n.startswith(blip.UNUSED)}
  assert len(tensors) - len(used) == 5
  torch_layout.check_tensors(used, abstract, where="x")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_name_and_shape_of_aesthetic_heads(version):
  shapes = {n: a.shape for n, a in full_width(f"laion_aesthetic_{version}_l14").items()}
  abstract = aesthetic_scores.abstract_head(f"aesthetic.{version}", 768)
  torch_layout.check_tensors(shapes, abstract, where="x")


def test_what_does_not_fit_is_refused_by_name(root, tmp_path, monkeypatch):
  monkeypatch.setenv(store.ROOT, str(tmp_path))
  module = clip_towers.build_clip(scorer_models.clip_config("gelu", WORDS), dtype=np.float32)
  tree = scorer_models.random_params(clip_towers.abstract_clip(module), 0)
  tensors = torch_layout.export_tensors(tree, np.float32)
  directory = tmp_path / "clip.h14"
  scorer_models.write_clip(directory, "gelu", 0)
  name = "vision_model.post_layernorm.bias"
  cases = {
    f"missing {name}": {k: v for k, v in tensors.items() if k != name},
    "surplus head.weight": {**tensors, "head.weight": np.ones(3, np.float32)},
    f"{name} is .2,.": {**tensors, name: np.ones(2, np.float32)},
  }
  for message, changed in cases.items():
    save.save_tensors(directory / "model.safetensors", changed)
    with pytest.raises(UserError, match=message):
      clip_scores.load_clip(clip.H14, "float32")
  # Buffers of older files are left out.
  positions = {
    f"{t}_model.embeddings.position_ids": np.arange(9)[None] for t in ("text", "vision")
  }
  save.save_tensors(directory / "model.safetensors", {**tensors, **positions})
  clip_scores.load_clip(clip.H14, "float32")
  config = scorer_models.clip_config("gelu", 999_999)
  (directory / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match=f"token_embedding.weight is .{WORDS}, 48."):
    clip_scores.read_clip(clip.H14, "float32")
  (directory / "config.json").write_text(json.dumps({"model_type": "clip"}))
  with pytest.raises(UserError, match="config.json: it is not the configuration of a CLIP"):
    clip_scores.read_clip(clip.H14, "float32")


def test_missing_weights_say_where_they_are(tmp_path, monkeypatch):
  monkeypatch.setenv(store.ROOT, str(tmp_path))
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  with pytest.raises(UserError) as error:
    score("hpsv2.v2_1", scorer_models.photographs())
  message = str(error.value)
  assert message.startswith(f"{tmp_path}/hpsv2.v2_1/model.safetensors is missing")
  assert "xswu/HPSv2" in message
  assert "python -m jaxpref.scorers.convert hpsv2.v2_1 HPS_v2.1_compressed.pt" in message

  def unreachable(name, choose, *, whole):
    raise UserError(f"{name}: the Hub cannot be reached")

  monkeypatch.setattr(store.hub, "download", unreachable)
  with pytest.raises(
    UserError, match="pickscore.v1/model.safetensors is missing .yuvalkirstain"
  ):
    score("pickscore.v1", scorer_models.photographs())


@pytest.mark.parametrize("name", SCORERS)
def test_files_are_found_before_they_are_needed(name, root, tmp_path, monkeypatch):
  scorers.find_files([name])
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setenv(store.ROOT, str(tmp_path))
  with pytest.raises(UserError, match=r"model.safetensors is missing"):
    scorers.find_files([name])


def test_weights_and_tokenizer_from_the_hub(root, tmp_path, monkeypatch, photographs, golden):
  asked = {}
  source = root / "pickscore.v1"

  def download(name, choose, *, whole):
    files = [p.name for p in source.iterdir()]
    asked[name] = choose([*files, "pytorch_model.bin", "tokenizer/vocab.json"])
    return source

  monkeypatch.setenv(store.ROOT, str(tmp_path))
  monkeypatch.setattr(store.hub, "download", download)
  assert close(score("pickscore.v1", photographs), golden["pickscore.v1"])
  assert asked == {
    "yuvalkirstain/PickScore_v1": [
      *("config.json", "model.safetensors"),
      *("vocab.json", "merges.txt", "tokenizer_config.json"),
    ]
  }


def test_wrong_input_is_refused(root, photographs):
  _, function = scorers.load_scorers(["clip.h14"])["clip.h14"]
  square = np.zeros((8, 8, 3), np.uint8)
  for image, message in (
    (square.astype(np.float32), "image 1 must be uint8 .* float32"),
    (square[..., :1], "image 1 must be uint8"),
    (square[:0], "image 1 must be uint8"),
    (np.zeros((1, 101, 3), np.uint8), "image 1 is 101 x 1 pixels"),
  ):
    with pytest.raises(UserError, match=message):
      function([square, image], ["a", "b"])
  with pytest.raises(UserError, match="2 images need as many prompts .got 1."):
    function([square, square], ["a"])


def test_features_are_those_that_the_score_compares(root, photographs):
  """A score is a hundred times the cosine of the image's features and the prompt's."""
  for name, scorer in (("clip.h14", clip.H14), ("clip.l14", clip.L14)):
    features = scorers.load_features(name)(photographs)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-6)
    model = clip_scores.load_clip(scorer, "float32")
    texts = clip_scores.text_features(model, scorer_models.PROMPTS, scorer.cleaning)
    assert close(100 * np.sum(features * texts, axis=1), score(name, photographs))
  with pytest.raises(
    UserError, match="'pickscore.v1' is not a name of features; known are clip"
  ):
    scorers.load_features("pickscore.v1")


def test_flattened_names_are_unique(h14):
  """A tower's parameters have one name each, also in PyTorch's layout."""
  flat = flax.traverse_util.flatten_dict(h14.params)
  assert len({torch_layout.torch_name(path) for path in flat}) == len(flat)


def test_names_and_versions_need_neither_jax_nor_transformers():
  program = (
    "import sys\nfrom jaxpref import scorers\n"
    f"scorers.load_scorers({[*SCORERS]})\n"
    "from jaxpref.scorers import convert\n"
    "loaded = {'jax', 'transformers', 'torch'} & set(sys.modules)\n"
    "sys.exit(str(loaded) if loaded else 0)"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr


def test_the_table_of_throughput_is_made_from_its_file():
  place = ROOT / "benchmarks" / "scorers.py"
  spec = importlib.util.spec_from_file_location("scorers_benchmark", place)
  benchmark = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(benchmark)
  found = json.loads(benchmark.TARGET.read_text())
  page = (ROOT / "docs" / "scorers.md").read_text()
  assert found["networks"].keys() == benchmark.NETWORKS.keys()
  assert benchmark.table(found) in page
  times = found["resizing"]
  assert all(f"{times[variant]:.0f} ms (`{variant}`)" in page for variant in pixels.VARIANTS)


def test_the_page_names_every_scorer():
  page = (ROOT / "docs" / "scorers.md").read_text()
  assert [name for name in SCORERS if f"`{name}`" not in page] == []


@pytest.mark.long
def test_scores_of_four_devices_are_those_of_one(root, golden):
  """Six images do not divide by four devices; the copies that fill the batch do not count."""
  program = (
    "import json\nimport jax, scorer_models\nfrom jaxpref import scorers\n"
    "assert jax.device_count() == 4\n"
    "found = scorers.load_scorers(['clip.h14'])\n"
    "inputs = scorer_models.photographs(), scorer_models.PROMPTS\n"
    "print(json.dumps({k: score(*inputs).tolist() for k, (_, score) in found.items()}))"
  )
  paths = os.pathsep.join([WITHOUT_TORCH["PYTHONPATH"], str(ROOT), str(ROOT / "tests")])
  done = subprocess.run(
    [sys.executable, "-c", program],
    env=os.environ | {"PYTHONPATH": paths, "XLA_FLAGS": xla_flags(devices=4)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert len(found) == 1
  for name, got in found.items():
    assert close(got, golden[name]), name
