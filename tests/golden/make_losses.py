"""Writes losses.json: every loss's values on fixed residuals, from tests/equations.py.

  cd tests && PYTHONPATH=. python golden/make_losses.py

Nothing of jaxpref is used, and gradients are central differences in float64.
"""

import json
from pathlib import Path

import equations
import numpy as np

CASES = {
  "sft": ("sft", ("e",), {}),
  "csft": ("csft", ("x",), {}),
  "dro": ("dro", ("e", "p"), {"margin": 0.05}),
  "dpo": ("dpo", ("w", "l"), {"beta": 7.0, "variant": "sigmoid"}),
  "dpo-hinge": ("dpo", ("w", "l"), {"beta": 7.0, "variant": "hinge"}),
  "dpo-ipo": ("dpo", ("w", "l"), {"beta": 7.0, "variant": "ipo"}),
  "spin": ("spin", ("w", "l"), {"beta": 7.0}),
  "simpo": ("simpo", ("w", "l"), {"beta": 7.0, "target_margin": 0.5}),
  "mapo": ("mapo", ("w", "l"), {"beta": 0.1, "snr": 0.5}),
  **{
    f"kto-{utility}": (
      "kto",
      ("x",),
      {
        "beta": 7.0,
        "utility": utility,
        "weight_desirable": 1.0,
        "weight_undesirable": 1.5,
      },
    )
    for utility in ("kt", "loss_averse", "risk_seeking")
  },
  "listwise": ("listwise", ("1", "2", "3", "4"), {"beta": 7.0}),
  "dspo": ("dspo", ("w", "l"), {"beta": 0.5}),
  "rwr": ("rwr", ("x",), {}),
  "awm": (
    "awm",
    ("x",),
    {"strength": 0.7, "clip": 0.05, "weight_reference": 0.3, "weight_old": 0.6},
  ),
  "nft": ("nft", ("x",), {"beta": 0.6, "clip": 1.5, "weight_reference": 0.3}),
  "dgpo": (
    "dgpo",
    ("1", "2", "3", "4"),
    {"beta": 7.0, "clip": 0.1, "weight_reference": 0.3},
  ),
  "ppo": (
    "ppo",
    ("x",),
    {
      "variant": "clipped",
      "clip": 0.02,
      "density": "gaussian",
      "tie": "step",
      "weight_reference": 0.3,
    },
  ),
  "ppo-dpok": (
    "ppo",
    ("x",),
    {
      "variant": "dpok",
      "clip": 0.2,
      "density": "gaussian",
      "tie": "prediction",
      "weight_reference": 0.3,
    },
  ),
  "ppo-cps": (
    "ppo",
    ("x",),
    {
      "variant": "clipped",
      "clip": 0.02,
      "density": "square",
      "tie": "scaled",
      "weight_reference": 3.0,
    },
  ),
  "ppo-score": (
    "ppo",
    ("x",),
    {
      "variant": "score",
      "clip": 0.02,
      "density": "gaussian",
      "tie": "step",
      "weight_reference": 0.0,
    },
  ),
  **{
    f"ppo-{variant}": (
      "ppo",
      ("x",),
      {
        "variant": variant,
        "clip": clip,
        "density": "gaussian",
        "tie": "scaled",
        "weight_reference": 0.0,
      },
    )
    for variant, clip in (("guarded", 0.02), ("region", 0.05))
  },
  "prdp": ("prdp", ("a", "b"), {"beta": 2.5, "clip": 0.1}),
  "prdp-fresh": ("prdp", ("a", "b"), {"beta": 2.5, "clip": 0.1}),
  "step_pairs": ("step_pairs", ("w", "l"), {"beta": 7.0, "clip": 0.1}),
  "step_pairs-free": ("step_pairs", ("w", "l"), {"beta": 7.0, "clip": 0.0}),
}
PPO = ("ppo", "ppo-dpok", "ppo-cps", "ppo-score", "ppo-guarded", "ppo-region")
STEP_PAIRS = ("step_pairs", "step_pairs-free")
PRDP = ("prdp", "prdp-fresh")
SCORED = ("rwr", "awm", "nft", "dgpo", *PRDP, *PPO, *STEP_PAIRS)
FRESH = ("rwr", "prdp-fresh", "ppo-score", *STEP_PAIRS)  # without a lagging policy
ROWS, SHAPE = 6, (2, 3)


def residuals(arms):
  """Residuals of policy and reference by arm, and labels."""
  rng = np.random.default_rng(20)
  policy = {a: 0.6 * rng.standard_normal((ROWS, *SHAPE)) for a in arms}
  reference = {a: v + 0.2 * rng.standard_normal((ROWS, *SHAPE)) for a, v in policy.items()}
  return policy, reference, rng.random(ROWS) < 0.5


def scored(case, policy):
  """Labels and the lagging policy's residuals, for losses on scored samples."""
  rng = np.random.default_rng(21)
  shape = {"dgpo": (ROWS, 4)} | dict.fromkeys((*PRDP, *STEP_PAIRS), (ROWS, 2))
  shape = shape.get(case, ROWS)
  labels = {"advantage": rng.standard_normal(shape), "weight": rng.random(shape)}
  old = {a: v + 0.15 * rng.standard_normal(v.shape) for a, v in policy.items()}
  names = ("weight",) if case == "rwr" else ("advantage",)
  if case in PPO:
    ranges = {"std": (0.3, 1.0), "gain": (0.5, 2.0), "length": (0.05, 0.2)}
    labels |= {name: rng.uniform(*of, shape) for name, of in ranges.items()}
    names = ("advantage", *ranges)
  if case in STEP_PAIRS:
    labels |= {
      "std": rng.uniform(0.3, 1.0, shape),
      "reward": np.sort(labels["advantage"])[:, ::-1],
    }
    labels["reward"][0] = 0.5  # a tie
    names = ("std", "reward")
  return {name: labels[name] for name in names}, {} if case in FRESH else old


def values_of(case, policy, reference, desirable, **fixed):
  """Losses [B] by the equations; `extra` has what `scored` made of the unmoved policy."""
  name, _, hyper = CASES[case]
  if case in SCORED:
    more, old = fixed.pop("extra", None) or scored(case, policy)
    given = {**more, **({"old": old} if old else {}), **hyper, **fixed}
    return getattr(equations, name)(policy, reference, **given)
  labels = {"desirable": desirable} if name in ("kto", "csft") else {}
  return getattr(equations, name)(policy, reference, **labels, **hyper, **fixed)


def gradients_of(case, policy, reference, desirable):
  """Of the mean loss with respect to every prediction, by central differences."""
  fixed = {}
  if case.startswith("kto"):  # the reference point carries no gradient
    gain = equations.err(reference["x"]) - equations.err(policy["x"])
    fixed["reference_point"] = max(gain.mean(), 0.0)
  if case in SCORED:
    fixed["extra"] = labels, old = scored(case, policy)
    hyper = CASES[case][2]
  if case == "nft":
    fixed["sizes"] = equations.nft_sizes(equations.nft_sides(policy, old, hyper["beta"]))
  if case == "dgpo":
    fixed["fixed"] = equations.dgpo_fixed(
      policy, reference, old, labels["advantage"], hyper["beta"], hyper["clip"]
    )
  found = {}
  for arm, array in policy.items():
    found[arm] = np.zeros_like(array)
    for index in np.ndindex(array.shape):
      sides = []
      for step in (1e-6, -1e-6):
        moved = array.copy()
        moved[index] += step
        at = values_of(case, policy | {arm: moved}, reference, desirable, **fixed)
        sides.append(at.mean())
      found[arm][index] = (sides[0] - sides[1]) / 2e-6
  return found


if __name__ == "__main__":
  golden = {}
  for case, (_, arms, _) in CASES.items():
    inputs = residuals(arms)
    golden[case] = {
      "loss": [round(float(v), 12) for v in values_of(case, *inputs)],
      "gradient": {
        arm: [round(float(v), 9) for v in g[0].ravel()]
        for arm, g in gradients_of(case, *inputs).items()
      },
    }
  path = Path(__file__).with_name("losses.json")
  path.write_text(json.dumps(golden, indent=1) + "\n")
