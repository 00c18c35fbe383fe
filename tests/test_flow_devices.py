"""SD3.5 and SANA on eight devices: the same updates as on one, every large tensor split."""

import json

import conftest
import flow_devices_main
import flow_networks
import numpy as np
import pytest
import sana_models

# DRO has a reference, as DPO, and rollouts besides: all parameters of one model and LoRA of the
# other, rows and weights split.
CASES = [
  {"preset": "sd35m", "method": "dro", "data": 2, "fsdp": 4},
  {"preset": "sana", "method": "dro", "data": 2, "fsdp": 4, "rank": 4},
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
  return {
    "sd35m": str(flow_networks.write_sd3(tmp_path_factory.mktemp("sd3"), t5=False)),
    "sana": str(sana_models.write_sana(tmp_path_factory.mktemp("sana"))),
  }


@pytest.fixture(scope="module")
def on_eight(directories):
  """Results of all cases, from one process with eight devices."""
  program = ("-m", "tests.flow_devices_main")
  return conftest.on_eight_devices(*program, json.dumps(directories), json.dumps(CASES))


@pytest.mark.long
@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(c) for c in CASES])
def test_eight_devices_equal_one(directories, on_eight, index):
  alone = {k: v for k, v in CASES[index].items() if k not in ("data", "fsdp")}
  history, sums, _ = flow_devices_main.train(directories, **alone)
  # Before the first update policy and reference are equal: rounding decides their order.
  history[0].pop("rewards/accuracy")
  for got, want in zip(on_eight[index][0], history, strict=True):
    assert got["optim/grad_norm"] > 0.0
    for name, value in want.items():
      # Rewards are differences of nearly equal errors, times beta.
      rtol = 2e-3 if name.startswith("rewards") else 1e-4
      assert got[name] == pytest.approx(value, rel=rtol, abs=1e-6), name
  # Gradients of a key's bias are rounding, which AdamW divides by its own size.
  np.testing.assert_allclose(on_eight[index][1], sums, rtol=1e-3)


@pytest.mark.long
def test_rows_are_computed_where_they_are(on_eight):
  """Split weights and additions are gathered; otherwise XLA would move rows to channels."""
  assert [moved for _, _, (_, _, moved) in on_eight] == [[]] * len(CASES)


@pytest.mark.long
def test_of_the_table_of_positions_only_rows_are_communicated(on_eight):
  """The image has 8 x 8 of the table's 12 x 12 rows of 32 channels."""
  gathered, reduced, _ = on_eight[0][2]
  assert not {(1, 144, 32), (144, 32)} & set(map(tuple, gathered))
  assert (8, 8, 32) in set(map(tuple, reduced))
