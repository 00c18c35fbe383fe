"""Writes `families.npz`: a part of what PyTorch makes of the reduced pipelines.

PYTHONPATH=. python tests/golden/make_families.py
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import families  # noqa: E402
import test_families  # noqa: E402
import witness  # noqa: E402

numbers = {}
for family in families.FAMILIES:
  directory = families.write_pipeline(family, Path(tempfile.mkdtemp()))
  inputs = test_families.make_inputs(directory)
  for name, value in witness.outputs(directory, inputs, families.PROMPTS).items():
    numbers[f"{family}/{name}"] = test_families.sampled(value)
np.savez_compressed(HERE / "families.npz", **numbers)
