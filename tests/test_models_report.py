"""The report that compares models says what the numbers say, and leaves nothing out."""

import numpy as np
import pandas as pd
from test_comparisons import table

from jaxpref.evaluation import comparisons, models_report

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
    "It is undecided whether dro or base is better: no scorer counts. chosen-1 (100 % wins"
  )
  assert one["text"].endswith(") selected the training data, so it is not evidence.")
  [one] = models_report.verdicts(compared(["a", "b"], ["a", "b"]))
  assert " and b-1 (100 % wins" in one["text"] and "so they are not evidence." in one["text"]


def test_a_verdict_quotes_only_scorers_that_count():
  [one] = models_report.verdicts(compared(["a"], ["a", "b"]))
  assert one["text"].startswith("dro is better than base: b-1 100 % wins")
  assert "a-1" not in one["text"]
