"""Token ids against transformers' CLIPTokenizer with ftfy, and against plain Python."""

import gzip
import importlib.util
import json
import random
import shutil
from pathlib import Path

import ftfy
import numpy as np
import pytest
import regex
from transformers import CLIPTokenizer, CLIPTokenizerFast

from jaxpref.errors import UserError
from jaxpref.models import hub, text
from jaxpref.shapes import prompts

# What public captions hold besides plain words.
PIECES = (
  *("a red circle", "A Photo OF the Eiffel Tower", "l'été à Paris", "naïve CAFÉ №5", "it's"),
  *("they’re “quoted” text", "‘single’ and «angled»", "5’ 11”", "rock ’n’ roll", "WE'LL"),
  *("Tom &amp; Jerry", "&quot;best quality&quot;", "&lt;b&gt;bold&lt;/b&gt;", "&#39;s", "<b>"),
  *("a &amp;amp; b", "caf&eacute;", "&nbsp;wide&nbsp;", "&copy; 2023", "AT&T", "R&D &c"),
  *("一只红色的猫", "赤い円", "빨간 원", "красный круг", "κόκκινος ΚΎΚΛΟΣ", "दो वर्ग", "วงกลม"),
  *("😀", "👨\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈", "👍🏽", "🇫🇷", "❤️", "☆★☆", "1️⃣"),
  *("e\u0301te\u0301", "z̴̡a̷l̵g̶o̸", "a\u0308o\u0308", "ﬁre ﬂy ﬃ", "ĳ Ǆ", "ſt", "ß ẞ"),
  *(
    "ｆｕｌｌ　ｗｉｄｔｈ！",
    "①②③",
    "½ x²",
    "1,234.5",
    "3:4 --ar 16:9",
    "8K, HDR, (masterpiece:1.2)",
  ),
  *("zero\u200bwidth", "soft\xadhyphen", "\ufeffmark", "left\u200eright\u200f", "a\u2060b"),
  *(
    "bell\x07",
    "null\x00",
    "\x1b[31mred\x1b[0m",
    "tab\there",
    "line\nbreak",
    "\r\nend",
    "\x85",
  ),
  *(
    "sch\u00c3\u00b6n",
    "itâ€™s",
    "âœ” ok",
    "donÃ¢â‚¬â„¢t",
    "Ã©tÃ©",
    "ðŸ˜€",
    "\u00a0no break\u00a0",
  ),
  *("...", "!!!", "—dash–", "…", "#hashtag @user", "http://a.b/c?d=e&f=g", "snake_case", "C++"),
  *(
    "\u2028separated\u2029",
    "İstanbul ıI",
    "ΣΑΣ",
    "<|endoftext|>",
    "<|STARTOFTEXT|>",
    "\U0001f9d1\u200d",
  ),
  *("  many   spaces  ", "", "'S 'T 'RE", "o''brien", "\ue000private", "\ufffd", "x\u0378y"),
)


def odd_texts(count: int, seed: int = 0) -> list[str]:
  """Captions of one to six pieces; some are much longer than a tokenizer's length."""
  rng = random.Random(seed)
  texts = [*PIECES]
  while len(texts) < count:
    text_ = rng.choice((" ", "", ", ")).join(rng.choices(PIECES, k=rng.randint(1, 6)))
    texts.append(text_ * rng.choice((1, 1, 1, 1, 20)))
  return texts[:count]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
  """A vocabulary of all bytes and some words and parts of words."""
  path = tmp_path_factory.mktemp("tokenizer")
  text.train_tokenizer(odd_texts(400, seed=1), path, vocab_size=800, max_length=77)
  return path


def size_of(directory: Path) -> int:
  return len(json.loads((directory / "vocab.json").read_text("utf-8")))


def witness(directory: Path, texts: list[str], length: int) -> np.ndarray:
  """The same ids from a few lines of Python, but for special tokens within a text."""
  vocabulary = json.loads((directory / "vocab.json").read_text("utf-8"))
  lines = (directory / "merges.txt").read_text("utf-8").split("\n")[1:]
  ranks = {tuple(line.split()): i for i, line in enumerate(lines) if line}
  printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [b for b in range(256) if b not in printed]
  letters = {b: chr(b) for b in printed} | {b: chr(256 + i) for i, b in enumerate(rest)}
  words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.I)

  def parts_of(word: str) -> list[str]:
    parts = [letters[b] for b in word.encode()]
    parts[-1] += "</w>"
    while known := [p for p in zip(parts, parts[1:], strict=False) if p in ranks]:
      best, merged = min(known, key=ranks.__getitem__), []
      while parts:
        count = 2 if tuple(parts[:2]) == best else 1
        merged.append("".join(parts[:count]))
        del parts[:count]
      parts = merged
    return parts

  start, end = vocabulary[text.START], vocabulary[text.END]
  rows = []
  for text_ in texts:
    clean = regex.sub(r"\s+", " ", ftfy.fix_text(text_)).strip().lower()
    ids = [vocabulary[part] for word in words.findall(clean) for part in parts_of(word)]
    ids = [start, *ids[: length - 2], end]
    rows.append(ids + [end] * (length - len(ids)))
  return np.array(rows)


def compare(directory: Path) -> None:
  texts = odd_texts(300)
  tokenizer = text.load_tokenizer(directory)
  (ids,) = text.tokenize([tokenizer], texts)
  reference = CLIPTokenizer.from_pretrained(directory)
  want = reference(texts, truncation=True, padding="max_length", max_length=77)["input_ids"]
  np.testing.assert_array_equal(ids, want)
  plain = [i for i, text_ in enumerate(texts) if "<|" not in text_]
  assert len(plain) > 250
  np.testing.assert_array_equal(ids[plain], witness(directory, [texts[i] for i in plain], 77))
  # Otherwise these texts would prove nothing.
  fast = CLIPTokenizerFast.from_pretrained(directory)
  other = fast(texts, truncation=True, padding="max_length", max_length=77)["input_ids"]
  assert (np.array(other) != ids).any(axis=1).sum() > 50


def test_odd_texts_have_pytorchs_ids(directory):
  compare(directory)


needs_vocabulary = pytest.mark.skipif(  # it is a file of the package
  importlib.util.find_spec("open_clip") is None,
  reason="open_clip is not installed",
)


def clips_own_vocabulary(target: Path) -> None:
  """Writes the tokenizer of all published CLIP models, from the file in open_clip."""
  (origin,) = importlib.util.find_spec("open_clip").submodule_search_locations
  file = Path(origin) / "bpe_simple_vocab_16e6.txt.gz"
  lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
  merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
  bundled = hub.BUNDLED["shapes"] / "tokenizer"
  small = json.loads((bundled / "vocab.json").read_text("utf-8"))
  letters = [token for token in small if len(token) == 1]
  tokens = [*letters, *(a + "</w>" for a in letters), *map("".join, merges)]
  vocabulary = {token: i for i, token in enumerate([*tokens, text.START, text.END])}
  assert len(vocabulary) == 49408
  (target / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
  lines = ["#version: 0.2", *map(" ".join, merges)]
  (target / "merges.txt").write_text("\n".join(lines), "utf-8")
  settings = json.loads((bundled / "tokenizer_config.json").read_text("utf-8"))
  settings["model_max_length"] = 77
  (target / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


@needs_vocabulary
def test_odd_texts_have_pytorchs_ids_with_clips_own_vocabulary(tmp_path):
  clips_own_vocabulary(tmp_path)
  compare(tmp_path)


def test_the_shapes_worlds_captions_keep_their_ids():
  directory = hub.BUNDLED["shapes"] / "tokenizer"
  captions = [prompts.caption(s) for p in prompts.all_prompts("train").values() for s in p]
  captions = sorted(set(captions))[::40]
  fast = CLIPTokenizerFast.from_pretrained(directory)
  want = fast(captions, padding="max_length", truncation=True)["input_ids"]
  (ids,) = text.tokenize([text.load_tokenizer(directory)], captions)
  np.testing.assert_array_equal(ids, want)


def test_the_fast_class_where_a_pipeline_names_it(directory):
  ids = [text.tokenize([text.load_tokenizer(directory, fast=f)], ["“a”"])[0] for f in (0, 1)]
  want = CLIPTokenizerFast.from_pretrained(directory)(["“a”"], padding="max_length")
  np.testing.assert_array_equal(ids[1], want["input_ids"])
  assert (ids[0] != ids[1]).any()


def test_a_word_without_end_takes_no_minutes(directory):
  tokenizer = text.load_tokenizer(directory)
  endless = "abcdefghij" * 100_000
  (ids,) = text.tokenize([tokenizer], [endless, endless[:5000]])
  np.testing.assert_array_equal(ids[0], ids[1])


@pytest.mark.parametrize("keep", [1, 5, 100])
def test_cut_merges_are_refused(directory, tmp_path, keep):
  copy = shutil.copytree(directory, tmp_path / "tokenizer")
  lines = (copy / "merges.txt").read_text("utf-8").splitlines()
  (copy / "merges.txt").write_text("\n".join(lines[:-keep]) + "\n", "utf-8")
  with pytest.raises(UserError, match=f"{keep} of {size_of(directory)} tok.*merges.txt is cut"):
    text.load_tokenizer(copy)
  # In the middle of a line, too.
  whole = "\n".join(lines[: 1 - keep] if keep > 1 else lines)
  (copy / "merges.txt").write_text(whole[:-1], "utf-8")
  with pytest.raises(UserError, match="results of 1 of|not the result of a merge"):
    text.load_tokenizer(copy)


def test_cut_merges_in_a_single_tokenizer_file(directory, tmp_path):
  CLIPTokenizerFast.from_pretrained(directory).save_pretrained(tmp_path)
  for name in ("vocab.json", "merges.txt"):
    (tmp_path / name).unlink(missing_ok=True)
  assert len(text.load_tokenizer(tmp_path)) == size_of(directory)
  file = tmp_path / "tokenizer.json"
  content = json.loads(file.read_text("utf-8"))
  del content["model"]["merges"][-7:]
  file.write_text(json.dumps(content), "utf-8")
  with pytest.raises(UserError, match=f"7 of {size_of(directory)} tokens are not the result"):
    text.load_tokenizer(tmp_path)


@pytest.mark.parametrize("in_config", [True, False])
def test_added_tokens(directory, tmp_path, in_config):
  """As textual inversion saves them, by today's transformers and before 4.34."""
  reference = CLIPTokenizer.from_pretrained(directory)
  reference.add_tokens(["<cat-toy>"])
  reference.save_pretrained(tmp_path)
  assert (tmp_path / "added_tokens.json").exists()
  if not in_config:
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8"))
    del settings["added_tokens_decoder"]
    file.write_text(json.dumps(settings), "utf-8")
  tokenizer = text.load_tokenizer(tmp_path)
  assert len(tokenizer) == size_of(directory) + 1
  (ids,) = text.tokenize([tokenizer], ["a <cat-toy>, “red”"])
  want = reference(["a <cat-toy>, “red”"], padding="max_length")["input_ids"]
  assert size_of(directory) in ids
  np.testing.assert_array_equal(ids, want)
