"""Tokenizers of flow models, and their texts against diffusers' own pipelines."""

import json
from pathlib import Path

import numpy as np
import prompt_encoders as encoders
import pytest
from conftest import live

from jaxpref.errors import UserError
from jaxpref.models import gemma, piece_tokenizers, t5, text

TOKENIZERS = Path(__file__).parent / "golden" / "tokenizers"


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
  encoders.check(np.asarray(found), hidden.detach().numpy())
  encoders.check(np.asarray(found_pooled), pooled.detach().numpy())


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
  encoders.check(np.asarray(found), pooled.detach().numpy())
  module = encoders.build("t5")
  loaded = piece_tokenizers.load_piece_tokenizer(TOKENIZERS / "t5", "t5", max_length=40)
  (ids,) = text.tokenize([loaded], texts)
  encoders.check(
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
    encoders.check(np.asarray(found), want.detach().numpy())
    np.testing.assert_array_equal(gemma.keep_prompt(own, 100), want_mask)
