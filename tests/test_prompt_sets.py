"""Prompt sets by name: those in the package as published, the others from their files."""

import collections
import json
import logging

import pandas as pd
import pytest
from conftest import ROOT

from jaxpref.errors import UserError
from jaxpref.evaluation import prompt_sets
from jaxpref.evaluation.prompt_sets import load_prompts

GENEVAL = {
  **{"single_object": 80, "two_object": 99, "counting": 80, "colors": 94},
  **{"position": 100, "color_attr": 100},
}
PARTI = {
  **{"Abstract": 51, "Animals": 314, "Artifacts": 287, "Arts": 66, "Food & Beverage": 74},
  **{"Illustrations": 124, "Indoor Scenes": 40, "Outdoor Scenes": 131, "People": 177},
  **{"Produce & Plants": 50, "Vehicles": 104, "World Knowledge": 214},
}


def test_geneval_is_as_published(caplog):
  found = load_prompts("geneval")
  counts = {"prompts": 553, "different": 553, "categories": GENEVAL}
  assert prompt_sets.summarize(found) == counts
  # In the published order: a task follows the other.
  assert list(dict.fromkeys(p.category for p in found)) == list(GENEVAL)
  assert found[0].text == "a photo of a bench"
  for text, category, of in found:
    assert of["prompt"] == text and of["tag"] == category
    assert ("exclude" in of) == (category == "counting")
    assert all({"class", "count"} <= one.keys() for one in of["include"])
  lines = (prompt_sets._SHIPPED / "geneval/evaluation_metadata.jsonl").read_text().splitlines()
  assert [json.dumps(p.metadata) for p in found] == lines  # to the byte
  assert not caplog.messages


def test_partiprompts_are_as_published(caplog):
  found = load_prompts("partiprompts")
  counts = prompt_sets.summarize(found)
  assert counts["prompts"] == counts["different"] == 1632 and counts["categories"] == PARTI
  assert len({p.metadata["Challenge"] for p in found}) == 11
  assert sum(p.text.startswith('"') for p in found) == 1  # which a reader of quotes would eat
  assert sum(p.text != p.text.strip() for p in found) == 10
  assert len({p.text.strip() for p in found}) == 1632
  assert not caplog.messages


def test_the_page_has_all_sets_and_their_counts():
  page = (ROOT / "docs/prompt_sets.md").read_text()
  for name, about in prompt_sets.SETS.items():
    (line,) = (line for line in page.splitlines() if line.startswith(f"| `{name}"))
    counts = line.split("|")[2:4]
    assert f"{about.rows[0]:,}" in counts[0]
    assert counts[1].strip() == (f"{about.different:,}" if about.different else "")


@pytest.mark.parametrize("name", ["geneval", "partiprompts"])
def test_a_licence_lies_beside(name):
  about = prompt_sets.SETS[name]
  licence = (prompt_sets._SHIPPED / about.file).with_name("LICENSE").read_text()
  assert {"geneval": "MIT License", "partiprompts": "Apache License"}[name] in licence


def _write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  match path.suffix:
    case ".parquet":
      pd.DataFrame(rows).to_parquet(path, row_group_size=3)
    case ".csv":
      pd.DataFrame(rows).to_csv(path, index=False)
    case ".jsonl":
      path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    case ".json":
      path.write_text(json.dumps(rows))
    case _:
      path.write_text("\n".join(rows))
  return path


TEXTS = ["a cat", ' "two" dogs ', "a cat", "größer, als", "ein\u2028Satz"]


@pytest.mark.parametrize(
  ("file", "rows"),
  [
    ("test.parquet", [{"caption": t, "jpg_0": b"x", "label_0": 0.5} for t in TEXTS]),
    ("list.json", TEXTS),
    ("objects.json", [{"id": str(i), "prompt": t} for i, t in enumerate(TEXTS)]),
    ("object.json", {f"{i:05}": {"prompt": t, "note": None} for i, t in enumerate(TEXTS)}),
    ("lines.jsonl", [{"prompt": t, "tag": "prompts"} for t in TEXTS]),
    ("table.csv", [{"Prompts": t, "Category": "prompts"} for t in TEXTS]),
    ("table.parquet", [{"prompts": t, "category": "prompts"} for t in TEXTS]),
  ],
)
def test_published_formats(file, rows, tmp_path, caplog):
  path = _write(tmp_path / file, rows)
  found = load_prompts(str(path))
  assert [p.text for p in found] == TEXTS and {p.category for p in found} == {"prompts"}
  assert prompt_sets.summarize(found)["different"] == 4  # the repeated one stays
  again = load_prompts(f"drawbench:{path}")
  assert [p.text for p in again] == TEXTS
  assert caplog.messages == [f"drawbench: {path} has 5 prompts, not 200"]


def test_categories_of_tables_and_folders(tmp_path, caplog):
  rows = [{"prompts": f"text {i}", "category": "Colors" if i else ""} for i in range(2)]
  found = load_prompts(f"drawbench:{_write(tmp_path / 'bench.csv', rows)}")
  assert [p.category for p in found] == ["drawbench", "Colors"]
  caplog.clear()
  styles = prompt_sets.SETS["hpdv2"].parts
  for style, name in styles.items():
    # Repeated in a style and between styles, as published: 3,172 different texts.
    different = {"anime": 781, "concept-art": 795, "paintings": 798}.get(style, 800)
    texts = [f"{style} {i % different}" for i in range(800)]
    texts[:2] = ["anime 0", "anime 1"] if style == "photo" else texts[:2]
    _write(tmp_path / "hpd" / name, texts)
  found = load_prompts(f"hpdv2:{tmp_path / 'hpd'}")
  assert collections.Counter(p.category for p in found) == dict.fromkeys(styles, 800)
  assert prompt_sets.summarize(found)["different"] == 3172 and not caplog.messages
  one = load_prompts(f"hpdv2:{tmp_path / 'hpd' / 'anime.json'}")
  assert {p.category for p in one} == {"anime"} and "has 800 prompts, not 3200" in caplog.text


def test_counts_are_compared_with_the_published_ones(tmp_path, caplog):
  caplog.set_level(logging.WARNING)
  texts = [f"text {i}" for i in range(487)]
  load_prompts(f"pickapic-test:{_write(tmp_path / 'all.json', texts + texts[:13])}")
  load_prompts(f"pickapic-test:{_write(tmp_path / 'once.json', texts)}")
  assert not caplog.messages
  path = _write(tmp_path / "other.json", texts[:486] + texts[:14])
  assert len(load_prompts(f"pickapic-test:{path}")) == 500
  assert caplog.messages == [f"pickapic-test: {path} has 486 different prompts, not 487"]


def test_a_split_of_pick_a_pic(tmp_path, caplog):
  for split, texts in (("train", ["x"]), ("test_unique", ["a", "b", "a"])):
    rows = [{"caption": text, "jpg_0": b"", "jpg_1": b""} for text in texts]
    _write(tmp_path / "data" / f"{split}-00000-of-00001.parquet", rows)
  found = load_prompts(f"pickapic-test:{tmp_path / 'data'}")
  assert [p.text for p in found] == ["a", "b", "a"] and found[0].category == "pickapic-test"
  assert "has 3 prompts, not 500" in caplog.text
  with pytest.raises(UserError, match="no split 'validation_unique'"):
    load_prompts(f"pickapic-validation:{tmp_path / 'data'}")


def test_a_prompt_a_file_and_the_shapes_world(tmp_path):
  assert load_prompts("a photo: two dogs") == [("a photo: two dogs", "prompts", {})]
  path = _write(tmp_path / "mine.txt", ["one", "", " two "])
  assert [p.text for p in load_prompts(str(path))] == ["one", "two"]
  shapes = load_prompts("shapes:12", seed=3)
  assert len({p.text for p in shapes}) == 12 and len({p.category for p in shapes}) == 6
  assert shapes == load_prompts("shapes:12", seed=3) != load_prompts("shapes:12", seed=4)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("", "the text is empty"),
    ("drawbench", "not part of jaxpref: name their file as drawbench:PATH; published: a table"),
    ("hpdv2", "name their folder as hpdv2:PATH.*zhwang/HPDv2"),
    ("pickapic-test", "withdrawn in 2025.*papv2.json: Apache-2.0"),
    ("GenEvl", "no prompt set 'GenEvl'; did you mean 'geneval'?"),
    ("nowhere.csv", "cannot read nowhere.csv: .*No such file"),
    ("geneval:{}", "is a folder: name the file"),
    ("shapes:0", "holds no prompt"),
    ("shapes:99999999", "has only"),
    ("{}/a.json", "a.json row 2: neither a text nor an object"),
    ("{}/b.json", "b.json row 1: none of the columns prompt, prompts, caption, text"),
    ("{}/c.csv", "c.csv cannot be read: line 3 has another number of fields"),
    ("{}/d.jsonl", "d.jsonl cannot be read: Expecting"),
    ("{}/e.json", "e.json holds no prompt"),
    ("{}/f.parquet", "cannot be read as parquet"),
    ("{}/g.json", "g.json row 1: empty prompt"),
    ("{}/h.parquet", "h.parquet has none of the columns prompt"),
  ],
)
def test_what_is_not_a_prompt_set(name, message, tmp_path):
  files = {
    **{"a.json": '["x", 3]', "b.json": '[{"text_en": "x"}]', "d.jsonl": "{"},
    **{"c.csv": "prompt,category\na,b\nc\n", "e.json": "[]", "f.parquet": "x"},
    "g.json": '[" "]',
  }
  for file, text in files.items():
    (tmp_path / file).write_text(text)
  pd.DataFrame({"score": [1.0]}).to_parquet(tmp_path / "h.parquet")
  with pytest.raises(UserError, match=message):
    load_prompts(name.format(tmp_path))
