"""Writes `tokenizers/`: small tokenizers of T5 and Gemma, and ids by sentencepiece itself.

sentencepiece trains both as T5's and Gemma's are, transformers converts them to
`tokenizer.json`, and sentencepiece's own ids of odd texts are the witness.

  pip install sentencepiece protobuf
  cd tests && PYTHONPATH=. python golden/make_tokenizers.py
"""

import io
import json
import tempfile
from pathlib import Path

import sentencepiece
import transformers
from test_tokenizer import PIECES, odd_texts

HERE = Path(__file__).parent / "tokenizers"
COMMON = {"pad_id": 0, "vocab_size": 500, "hard_vocab_limit": False, "minloglevel": 2}
# A few of the rules of T5's nmt_nfkc, whose table has 300 KB: code points, then the result.
RULES = (
  "FF46\t66\nFB01\t66 69\n2460\t31\n200B\t20\n3000\t20\nA0\t20\n9\t20\nA\t20\n2026\t2E 2E 2E\n"
)


def train(**options):
  """Returns sentencepiece's model, as bytes."""
  lines = [t for t in odd_texts(500, seed=3) if t.strip() and "\n" not in t] + [
    *PIECES[:5]
  ] * 20
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=(model := io.BytesIO()), **COMMON, **options
  )
  return model.getvalue()


def write(name, model, file, cls, **options):
  """Converts a model and writes its tokenizer and the ids of texts without special tokens."""
  target = HERE / name
  with tempfile.TemporaryDirectory() as work:
    (Path(work) / file).write_bytes(model)
    cls(str(Path(work) / file), **options).save_pretrained(target)
  for other in target.glob("*"):
    if other.name not in ("tokenizer.json", "tokenizer_config.json"):
      other.unlink()
  settings = json.loads((target / "tokenizer.json").read_text())
  (target / "tokenizer.json").write_text(json.dumps(settings, ensure_ascii=False))
  processor = sentencepiece.SentencePieceProcessor(model_proto=model)
  # transformers' fast classes, which diffusers uses, strip three separators that sentencepiece
  # keeps, and take special tokens within a text for what they say.
  odd = set("<\x00\x85\u2028\u2029")
  texts = [t for t in odd_texts(150) if len(t) < 80 and not odd & set(t)]
  ids = [processor.encode(text) for text in texts]
  return {"texts": texts, "ids": ids}


T5 = {"extra_ids": 0, "add_prefix_space": True, "legacy": True}  # as in published files


if __name__ == "__main__":
  with tempfile.TemporaryDirectory() as work:
    rules = Path(work) / "rules.tsv"
    rules.write_text(RULES)
    t5 = train(
      model_type="unigram",
      normalization_rule_tsv=str(rules),
      **{"eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
  gemma = train(
    model_type="bpe",
    normalization_rule_name="identity",
    **{"add_dummy_prefix": False, "byte_fallback": True, "remove_extra_whitespaces": False},
    **{"split_digits": True, "allow_whitespace_only_pieces": True},
    **{"eos_id": 1, "bos_id": 2, "unk_id": 3, "eos_piece": "<eos>", "bos_piece": "<bos>"},
    user_defined_symbols=["\n"],
  )
  found = {
    "t5": write("t5", t5, "spiece.model", transformers.T5TokenizerFast, **T5),
    "gemma": write("gemma", gemma, "tokenizer.model", transformers.GemmaTokenizerFast),
  }
  (HERE / "ids.json").write_text(json.dumps(found, ensure_ascii=False))
