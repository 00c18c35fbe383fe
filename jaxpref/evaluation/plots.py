"""Layouts of the plots that compare models: numbers become positions in an SVG."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxpref.evaluation import panels

WIDTH, HEIGHT = 380, 220
LEFT, BOTTOM = 48, 24  # margins
_RIGHT, _TOP = 12, 12
_MOST_BINS = 24


def _axis(low: float, high: float) -> tuple[float, float]:
  """Returns the ends of an axis with a margin around the values."""
  pad = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
  return low - pad, high + pad


def _x(value: float, ends: tuple[float, float]) -> float:
  share = (value - ends[0]) / (ends[1] - ends[0])
  return round(LEFT + share * (WIDTH - LEFT - _RIGHT), 1)


def _y(value: float, ends: tuple[float, float]) -> float:
  share = (value - ends[0]) / (ends[1] - ends[0])
  return round(HEIGHT - BOTTOM - share * (HEIGHT - _TOP - BOTTOM), 1)


def _marks(
  ends: tuple[float, float],
  place: Callable[[float, tuple[float, float]], float],
  *,
  percents: bool = False,
) -> list[tuple[float, str]]:
  """Returns places and labels of an axis."""
  ticks = panels.ticks(*ends)
  texts = panels.labels(ticks, percents=percents)
  return [(place(tick, ends), text) for tick, text in zip(ticks, texts, strict=True)]


def scatter(
  results: Mapping[str, Any], key: str, spread: Mapping[str, float]
) -> dict[str, Any] | None:
  """Lays out score against `spread`, the models' diversity, one point per model."""
  points = {
    model: (spread[model], of[key]["mean"])
    for model, of in results["models"].items()
    if key in of and model in spread
  }
  if not points:
    return None
  across, up = (_axis(min(v), max(v)) for v in zip(*points.values(), strict=True))
  return {
    "key": key,
    "points": [(model, _x(a, across), _y(b, up)) for model, (a, b) in points.items()],
    "x": _marks(across, _x),
    "y": _marks(up, _y),
  }


def distribution(key: str, values: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
  """Lays out histograms of the compared values, one outline per model."""
  values = {model: of for model, of in values.items() if len(of)}
  if not values:
    return None
  together = np.concatenate(list(values.values()))
  low, high = float(together.min()), float(together.max())
  if low == high:
    return None
  most = max(len(of) for of in values.values())
  edges = np.linspace(low, high, int(np.clip(np.sqrt(most), 5, _MOST_BINS)) + 1)
  shares = {model: np.histogram(of, edges)[0] / len(of) for model, of in values.items()}
  top = max(float(of.max()) for of in shares.values())
  ends, up = (low, high), (0.0, top)
  lines = []
  for model, of in shares.items():
    points = [(_x(low, ends), _y(0.0, up))]
    for left, right, share in zip(edges[:-1], edges[1:], of, strict=True):
      points += [(_x(left, ends), _y(share, up)), (_x(right, ends), _y(share, up))]
    points.append((_x(high, ends), _y(0.0, up)))
    lines.append((model, "M" + "L".join(f"{a:g} {b:g}" for a, b in points)))
  return {
    "key": key,
    "lines": lines,
    "x": _marks(ends, _x),
    "y": _marks(up, _y, percents=True),
  }
