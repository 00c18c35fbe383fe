"""The report that compares models says what the numbers say, and leaves nothing out."""

import argparse
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_comparisons import table

from jaxpref.evaluate import examples
from jaxpref.evaluation import comparison_text, comparisons, diversity, geneval, models_report

PROMPTS = 8


def compared(selected_by=(), scorers=("chosen",)):
  """Results of a model that wins every prompt by each scorer."""
  rng = np.random.default_rng(0)
  base = rng.normal(size=(PROMPTS, 2))
  rows = [
    table({"base": base, "dro": base + 1 + 0.1 * rng.normal(size=base.shape)}, scorer=name)
    for name in scorers
  ]
  return comparisons.compare_all(pd.concat(rows), baseline="base", selected_by=selected_by)


def test_a_verdict_says_that_scorers_which_selected_the_data_do_not_count():
  [one] = models_report.verdicts(compared(["chosen"]))
  assert one["result"] == "undecided"
  assert one["text"].startswith(
    "It is undecided whether dro or base is better: no scorer counts. chosen-1, 100 % wins"
  )
  assert one["text"].endswith(", had a part in the training, so it is not evidence.")
  [one] = models_report.verdicts(compared(["a", "b"], ["a", "b"]))
  assert " and b-1, 100 % wins" in one["text"] and "so they are not evidence." in one["text"]


def test_a_verdict_quotes_only_scorers_that_count():
  [one] = models_report.verdicts(compared(["a"], ["a", "b"]))
  assert one["text"].startswith("dro is better than base: b-1 100 % wins")
  assert "a-1" not in one["text"]


class Compared:
  """Three models on 40 prompts with two images each; `write` returns their report.

  The first images of `dro` differ from the baseline's by -20 to 19, those of `dpo` by a third.
  """

  def __init__(self, directory):
    self.directory = directory
    self.changes = np.random.default_rng(0).permutation(40) - 20.0
    scores = {"base": np.zeros((40, 2)), "dro": np.zeros((40, 2)), "dpo": np.zeros((40, 2))}
    scores["dro"][:, 0], scores["dpo"][:, 0] = self.changes, self.changes[::-1] / 3
    self.rows = table(scores)
    self.images = self.rows[["model", "prompt_id", "seed", "prompt", "category"]]
    file = directory / "image.png"
    Image.new("RGB", (8, 8)).save(file)
    self.images = self.images.assign(file=file)
    self.results = comparisons.compare_all(self.rows, baseline="base", resamples=20)
    features = np.random.default_rng(1).normal(size=(len(self.images), 5))
    self.results["diversity"] = diversity.compare_diversity(
      features, self.images, name="pixels", baseline="base", resamples=20
    )

  def choose(self):
    flags = argparse.Namespace(seed=0, examples=10)
    return examples.choose(flags, self.rows, self.images, self.results)

  def write(self):
    models_report.write(
      self.directory / "report.html",
      title="three",
      results=self.results,
      categories=[],
      units={},
      examples=self.choose(),
      warnings=[],
      facts={},
    )
    return (self.directory / "report.html").read_text()


@pytest.fixture
def three(tmp_path):
  return Compared(tmp_path)


def test_images_begin_with_the_largest_losses_of_any_model(three):
  chosen = three.choose()
  scores = [one["scores"]["quality-1"] for one in chosen]
  worst = [min(of["dro"], of["dpo"]) for of in scores]
  assert worst == sorted(worst) and worst[0] == -20
  for model, extremes in (("dro", range(-20, -12)), ("dpo", np.arange(12, 20) / 3)):
    assert set(extremes) <= {of[model] for of in scores}
  assert sum(one["at_random"] for one in chosen) == 10


def test_filters_sort_by_the_model_that_they_name(three):
  page = three.write()
  chosen = three.choose()
  ranks = re.findall(r'class="pair [^"]+" style="--rank-1:(\d+);--rank-2:(\d+);"', page)
  assert len(ranks) == len(chosen)
  for column, model in enumerate(("dro", "dpo")):
    order = sorted(range(len(chosen)), key=lambda i: int(ranks[i][column]))
    sorted_scores = [chosen[i]["scores"]["quality-1"][model] for i in order]
    assert sorted_scores == sorted(sorted_scores)
    assert f"#lost-{column + 1}:checked) .pair {{ order: var(--rank-{column + 1})" in page
    assert f"#won-{column + 1}:checked) .pair {{ order: calc(-1 * var(--rank" in page
  assert page.count(' random"') == 10 and 'id="random">chosen at random' in page


def test_a_judge_without_scores_of_the_baseline_sorts_nothing(three):
  three.rows = three.rows[three.rows["model"] != "base"]
  assert [one["at_random"] for one in three.choose()] == [True] * 10


def test_diversity_has_its_table_with_every_measure_and_p_value(three):
  page = three.write()
  section = page[page.index('id="diversity"') : page.index('id="pictures-section"')]
  section = section.replace("\N{NO-BREAK SPACE}", " ")
  for line in comparison_text.diversity_rows(three.results["diversity"])[1:]:
    cells = "".join(f"<td [^>]+>{re.escape(text)}</td>" for text in line[1:])
    assert re.search(f"</i>{line[0]}</th>{cells}", section)
  assert "as means over prompts" in section and "against base." in section


def test_diversity_is_shown_without_scorers_and_with_one_image_of_a_prompt(three):
  first = three.images["seed"] % 10 == 0
  features = np.random.default_rng(1).normal(size=(first.sum(), 5))
  three.results |= {"comparisons": [], "scorers": {}, "groups": {}}
  three.results["models"] = {name: {} for name in three.results["models"]}
  three.results["diversity"] = diversity.compare_diversity(
    features, three.images[first], name="pixels", baseline="base"
  )
  three.rows, three.images = three.rows[:0], three.images[first]
  page = three.write()
  overall = three.results["diversity"]["overall"]["dpo"]
  assert f">{overall['vendi']:.3f}</td>" in page and f">{overall['distance']:.3f}</td>" in page
  assert "with one image of a prompt, there is no diversity by prompt." in page


def test_genevals_numbers_are_those_of_its_paper(three):
  """The mean of the tasks, not of the images; a task that a model lacks is left open."""
  assert 'id="geneval"' not in three.write()
  tasks = ["counting"] * 10 + ["colors"] * 40
  rows = pd.DataFrame(
    {"category": tasks, "prompt_id": range(50), "score": [1.0] * 10 + [0.0, 1.0] * 20}
  )
  three.results["geneval"] = {
    "base": geneval.summarize_results(rows, resamples=20),
    "dro": geneval.summarize_results(rows[:10], resamples=20),
  }
  page = three.write().replace("\N{NO-BREAK SPACE}", " ")
  section = page[page.index('id="geneval"') : page.index('id="geneval"') + 6000]
  shares = re.findall(r"(?:<td>|^)\s*([\d.]+ %|-)(?:<|$)", section, re.MULTILINE)
  assert shares[4:6] == ["100.0 %", "100.0 %"] and shares[6:8] == ["50.0 %", "-"]
  assert shares[12:18] == ["75.0 %", "100.0 %", "60.0 %", "100.0 %", "60.0 %", "100.0 %"]
