"""Scores of other judges, read from files."""

import json
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_comparisons import random_scores, table

from jaxpref.errors import UserError
from jaxpref.evaluation import comparisons, score_files, score_rows

OWN = table(random_scores(["base", "dro"], prompts=6, seeds=2))


def judged(**changes):
  """Rows of a judge for all images of `OWN`."""
  rows = OWN[["model", "prompt_id", "seed"]].assign(scorer="hpsv3", version="1.0")
  return rows.assign(**({"score": np.arange(len(OWN)) / 8} | changes))


def write(path, rows):
  if path.suffix == ".parquet":
    rows.to_parquet(path)
  elif path.suffix == ".csv":
    rows.to_csv(path, index=False)
  else:
    lines = (json.dumps(row) for row in rows.to_dict("records"))
    path.write_text("\n".join(lines) + "\n\n")
  return path


@pytest.fixture(params=["parquet", "csv", "jsonl"])
def file(request, tmp_path):
  return tmp_path / f"scores.{request.param}"


def test_rows_are_those_of_the_images(file):
  rows = judged()
  for by in ("prompt_id", "prompt"):
    given = rows.assign(prompt=OWN["prompt"]).drop(columns={"prompt_id", "prompt"} - {by})
    found = score_files.read_scores(write(file, given.assign(comment="x")), OWN)
    expected = OWN.assign(scorer="hpsv3", version="1.0", score=rows["score"])
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)
  both = pd.concat([OWN, found])
  score_rows.write_rows(file.with_name("all.parquet"), both)
  compared = comparisons.compare_all(both, baseline="base", imported=["hpsv3"])
  assert compared["models"]["dro"]["hpsv3-1.0"]["mean"] == (12 + 23) / 2 / 8


def test_missing_scores_are_left_out_of_the_comparison(file):
  rows = judged()
  rows.loc[3, "score"] = np.nan
  found = score_files.read_scores(write(file, rows), OWN)
  assert list(np.flatnonzero(found["score"].isna())) == [3]
  both = pd.concat([OWN, found])
  compared = comparisons.compare_all(both, baseline="base", imported=["hpsv3"])
  entry = compared["comparisons"][0]["scorers"]["hpsv3-1.0"]
  assert (entry["dropped"], entry["prompts"]) == (1, 6)
  assert compared["comparisons"][0]["scorers"]["quality-1"]["dropped"] == 0
  score_rows.write_rows(file.with_name("all.parquet"), both, imported=["hpsv3"])
  read = pd.read_parquet(file.with_name("all.parquet"))
  assert comparisons.compare_all(read, baseline="base", imported=["hpsv3"]) == compared


def test_other_ways_to_write_a_value(tmp_path):
  path = tmp_path / "scores.jsonl"
  row = {"model": "base", "prompt": "prompt 0", "scorer": "geneval", "version": 2}
  lines = [row | {"seed": "0", "score": True}, row | {"seed": 1.0, "score": None}]
  path.write_text("\n".join(map(json.dumps, lines)))
  found = score_files.read_scores(path, OWN)
  assert found["seed"].tolist() == [0, 1] and found["version"].tolist() == ["2", "2"]
  assert found["score"].tolist()[0] == 1.0 and np.isnan(found["score"].tolist()[1])
  path = tmp_path / "scores.csv"
  header = "\ufeffmodel,prompt_id,seed,scorer,version,score\n"  # as spreadsheets write it
  path.write_text(header + "base,0,0,NA,1, 0.5\nbase,0,1,NA,1,nan\nbase,1,10,NA,1,\n")
  found = score_files.read_scores(path, OWN)
  assert found["scorer"].tolist() == ["NA"] * 3 and found["score"].isna().tolist() == [0, 1, 1]


@pytest.mark.parametrize(
  "change, message",
  [
    ({"score": "good"}, r"row 1: score must be a finite number .got 'good'"),
    ({"score": "inf"}, r"row 1: score must be a finite number .got 'inf'"),
    ({"seed": 0.5}, r"row 1: seed must be an integer from 0 .got '?0.5"),
    ({"seed": -1}, r"row 1: seed must be an integer from 0 .got '?-1"),
    ({"prompt_id": "p"}, r"row 1: prompt_id must be an integer from 0 .got 'p'"),
    ({"scorer": ""}, r"row 1: scorer must be a text .got ''"),
    ({"model": "ema"}, r"row 1: model ema has no image of prompt_id 0, seed 0 .and 23 more"),
    ({"seed": 99}, r"row 1: model base has no image of prompt_id 0, seed 99 .and 23 more"),
  ],
)
def test_bad_values_are_named(file, change, message):
  with pytest.raises(UserError, match=message):
    score_files.read_scores(write(file, judged(**change)), OWN)


def test_bad_tables_are_named(file):
  rows = judged()
  with pytest.raises(UserError, match="row 25: the score of hpsv3-1.0 for model dro, prompt 5"):
    score_files.read_scores(write(file, pd.concat([rows, rows[-1:]])), OWN)
  lacking = rows.drop(columns=["version", "prompt_id"])
  with pytest.raises(UserError, match="lacks the columns version, prompt_id or prompt .got"):
    score_files.read_scores(write(file, lacking), OWN)
  with pytest.raises(UserError, match="no rows|lacks the columns"):
    score_files.read_scores(write(file, rows[:0]), OWN)


def test_prompts_of_one_text_and_seed_need_their_ids(tmp_path):
  images = OWN.assign(prompt="same", seed=OWN["seed"] % 10)
  by_text = judged().drop(columns="prompt_id").assign(prompt="same", seed=images["seed"])
  with pytest.raises(UserError, match="several images of prompt 'same', seed 0: give"):
    score_files.read_scores(write(tmp_path / "s.csv", by_text), images)
  by_id = judged().assign(seed=images["seed"])
  assert len(score_files.read_scores(write(tmp_path / "s.csv", by_id), images)) == len(OWN)


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"PAR1" * 20, b"[1]\n", b"{" * 9999])
def test_damaged_files_are_refused(file, content):
  with pytest.raises(UserError, match="does not exist"):
    score_files.read_scores(file, OWN)
  os.mkfifo(file)
  with pytest.raises(UserError, match="is not a file"):
    score_files.read_scores(file, OWN)
  file.unlink()
  file.write_bytes(content)
  with pytest.raises(UserError, match=file.name):
    score_files.read_scores(file, OWN)


def test_other_kinds_of_files_are_refused(tmp_path):
  with pytest.raises(UserError, match="must end in .parquet, .csv, .jsonl"):
    score_files.read_scores(tmp_path / "scores.txt", OWN)


def test_texts_that_are_not_utf_8_are_refused(tmp_path):
  file = write(tmp_path / "scores.parquet", judged())
  whole = file.read_bytes()
  assert b"hpsv3" in whole
  file.write_bytes(whole.replace(b"hpsv3", b"hpsv\xff"))
  with pytest.raises(UserError, match="cannot be read"):
    score_files.read_scores(file, OWN)


def test_a_column_occurs_once(tmp_path):
  rows = pa.Table.from_pandas(judged())
  pq.write_table(rows.append_column("seed", rows["seed"]), tmp_path / "scores.parquet")
  with pytest.raises(UserError, match="has two columns seed"):
    score_files.read_scores(tmp_path / "scores.parquet", OWN)
