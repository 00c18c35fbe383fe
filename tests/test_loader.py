"""The loader: epochs, positions, processes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from jaxpref.data.loader import make_loader, probabilities_of


def _take(loader, num_batches):
  return np.stack([next(loader) for _ in range(num_batches)])


def test_every_epoch_deals_every_row_in_another_order():
  rows = _take(make_loader(12, batch_size=4, seed=0), 9).reshape(3, 12)
  for epoch in rows:
    assert sorted(epoch) == list(range(12))
  assert len({tuple(e) for e in rows}) == 3


def test_epochs_follow_without_a_gap_whatever_the_batch():
  rows = _take(make_loader(10, batch_size=4, seed=1), 5).ravel()
  assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))


def test_batches_may_be_larger_than_the_data():
  batch = next(make_loader(3, batch_size=8, seed=0))
  assert batch.shape == (8,)
  assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]
  assert next(make_loader(1, batch_size=2, seed=0)).tolist() == [0, 0]


def test_order_depends_on_the_seed_alone():
  one, again, other = (_take(make_loader(50, batch_size=10, seed=s), 5) for s in (3, 3, 4))
  assert (one == again).all()
  assert (one != other).any()


def test_a_rows_place_in_its_epoch_tells_nothing():
  # Over 100 epochs of 20 rows the mean index at each place is that of all, 9.5, within 5
  # standard deviations (5.77 for one).
  rows = _take(make_loader(20, batch_size=20, seed=0), 100)
  assert np.abs(rows.mean(axis=0) - 9.5).max() < 5 * 5.77 / np.sqrt(100)


@pytest.mark.parametrize("done", [0, 1, 7])
def test_resumes_exactly_through_json(done):
  loader = make_loader(10, batch_size=4, seed=7)
  for _ in range(done):
    next(loader)
  position = json.dumps(loader.get_state())
  assert len(position) < 100
  rest = _take(loader, 12)
  resumed = make_loader(10, batch_size=4, seed=7)
  next(resumed)
  resumed.set_state(json.loads(position))
  assert (_take(resumed, 12) == rest).all()
  assert resumed.get_state() == loader.get_state()


@pytest.mark.parametrize(
  "wrong",
  [
    {"num_rows": 0},
    {"batch_size": 0},
  ],
)
def test_wrong_arguments(wrong):
  arguments = {"num_rows": 10, "batch_size": 4, "seed": 0} | wrong
  with pytest.raises(ValueError, match="must be at least 1"):
    make_loader(arguments.pop("num_rows"), **arguments)


def test_command_line_flags_need_not_be_parsed():
  make_loader(4, batch_size=2, seed=0)  # grain defines its flags as it is imported
  parsed = flags.FLAGS.is_parsed()
  flags.FLAGS.unparse_flags()
  try:
    loader = make_loader(4, batch_size=2, seed=0)
    next(loader)
    loader.set_state(loader.get_state())
    next(loader)
  finally:
    if parsed:
      flags.FLAGS.mark_as_parsed()


def test_works_beside_flags_that_absl_does_not_know():
  program = (
    "from jaxpref.data.loader import make_loader;"
    "print(sorted(next(make_loader(4, batch_size=4, seed=0)).tolist()))"
  )
  command = [sys.executable, "-c", program, "--config=x", "--unheard_of"]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[0, 1, 2, 3]"


# ------------------------------------------------------------- kinds drawn by their share


def _weighted(desirable, share, **options):
  chances = probabilities_of(np.array(desirable), share)
  given = {"batch_size": 10, "seed": 0} | options
  return make_loader(len(desirable), probabilities=chances, **given)


@pytest.mark.parametrize(("liked", "share"), [(4, 0.8), (16, 0.5), (1, 0.2)])
def test_kinds_have_the_share_asked_for_in_expectation(liked, share):
  rows = _take(_weighted([True] * liked + [False] * (20 - liked), share), 1000).ravel()
  counts = np.bincount(rows, minlength=20) / len(rows)
  # Five standard deviations of 10,000 draws; no row of either kind is left out for good.
  assert abs(counts[:liked].sum() - share) < 5 * np.sqrt(share * (1 - share) / len(rows))
  for of, each in (
    (counts[:liked], share / liked),
    (counts[liked:], (1 - share) / (20 - liked)),
  ):
    assert np.abs(of - each).max() < 5 * np.sqrt(each / len(rows))
    assert of.min() > 0


def test_draws_depend_on_seed_and_position_alone():
  kinds = [True, False, False, True, False]
  whole = _take(_weighted(kinds, 0.8, seed=3), 20).ravel()
  assert (_take(_weighted(kinds, 0.8, seed=3, batch_size=25), 8).ravel() == whole).all()
  assert (_take(_weighted(kinds, 0.8, seed=4), 20).ravel() != whole).any()
  loader = _weighted(kinds, 0.8, seed=3)
  _take(loader, 7)
  position = json.dumps(loader.get_state())
  assert len(position) < 100
  resumed = _weighted(kinds, 0.8, seed=3)
  resumed.set_state(json.loads(position))
  assert (_take(resumed, 13).ravel() == whole[70:]).all()


def test_probabilities_are_of_each_row():
  with pytest.raises(ValueError, match="got 2 probabilities for 3 rows"):
    make_loader(3, batch_size=1, seed=0, probabilities=np.array([0.5, 0.5]))
