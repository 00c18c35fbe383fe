"""Small plots of a run's metrics: numbers become positions in an SVG."""

import itertools
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from jaxpref.evaluation import glossary
from jaxpref.evaluation.score_text import percent

WIDTH, HEIGHT = 340, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 8, 8, 20
_BUCKETS = 120
_ONE_PANEL = ("err", "time")  # prefixes of metrics with a common unit, which share a panel

Curve = Sequence[tuple[float, float]]


def lay_out(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
  """Lays out small plots: SVG paths, labels and meanings, in the order of the metrics.

  Long curves are split into at most 120 runs of points. The line shows the mean of each run,
  and the band shows its range, so that no extreme value is hidden. The axis goes from 0 to 1
  for shares, starts at 0 for counts, and covers the range of other metrics. The axis of a
  constant goes from 0 to twice its value.
  """
  grouped: dict[str, dict[str, Curve]] = {}
  for name, curve in curves.items():
    prefix = name.split("/")[0]
    shared = prefix in _ONE_PANEL and "/" in name
    grouped.setdefault(prefix if shared else name, {})[name] = curve
  laid_out = [_panel(title, lines) for title, lines in grouped.items()]
  return [panel for panel in laid_out if panel]


def ticks(low: float, high: float) -> list[float]:
  """Returns two to five multiples of 1, 2 or 5 times 10^n within [low, high]."""
  widest = (high - low) / 2 * (1 + 1e-9)
  power = 10.0 ** math.floor(math.log10(widest))
  step = max(m * power for m in (1, 2, 5) if m == 1 or m * power <= widest)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [i * step for i in range(first, last + 1)]


def _panel(title: str, lines: Mapping[str, Curve]) -> dict[str, Any] | None:
  points, dropped = {}, 0
  for name, curve in lines.items():
    array = np.asarray(curve, np.float64).reshape(-1, 2)
    finite = np.isfinite(array).all(axis=1)
    dropped += int((~finite).sum())
    if finite.any():
      kept = array[finite]
      points[name] = kept[np.argsort(kept[:, 0], kind="stable")]
  if not points:
    return None
  (x_low, low), (x_high, high) = (
    f([f(a, axis=0) for a in points.values()], axis=0) for f in (np.min, np.max)
  )
  scales = {found.scale for name in lines if (found := glossary.find_metric(name))}
  low, high = _range(low, high, scales)
  steps = [t for t in ticks(low, high) if "count" not in scales or t == round(t)]
  shown = percent if scales == {"share"} else "{:.3g}".format

  def x(step: float) -> float:
    share = (step - x_low) / (x_high - x_low) if x_high > x_low else 0.5
    return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

  def y(value: float) -> float:
    share = (value - low) / (high - low)
    return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)

  series = []
  for name, array in points.items():
    runs = np.array_split(array, min(len(array), _BUCKETS))
    middle = [(x(r[:, 0].mean()), y(r[:, 1].mean())) for r in runs]
    upper = [(x(r[:, 0].mean()), y(r[:, 1].max())) for r in runs]
    lower = [(x(r[:, 0].mean()), y(r[:, 1].min())) for r in runs]
    first, last = array[0], array[-1]
    series.append(
      {
        "name": name,
        "line": _path(middle),
        "band": _path(upper + lower[::-1]) if len(array) > _BUCKETS else "",
        "dot": middle[-1],
        "last": shown(last[1]),
        "text": f"{name} from {first[1]:.3g} at step {first[0]:.0f} "
        f"to {last[1]:.3g} at step {last[0]:.0f}",
      }
    )
  return {
    "title": title,
    "series": series,
    "grid": list(zip(map(y, steps), labels(steps, percents=scales == {"share"}), strict=True)),
    "meanings": [
      (name, found.meaning) for name in lines if (found := glossary.find_metric(name))
    ],
    "first": f"{x_low:,.0f}",
    "last": f"{x_high:,.0f}" if x_high > x_low else "",
    "dropped": dropped,
  }


def _range(low: float, high: float, scales: Set[str]) -> tuple[float, float]:
  """Returns the ends of the axis for metrics of these scales with values in [low, high]."""
  if scales & {"share", "count"}:
    low, high = min(low, 0.0), max(high, 1.0)
  if high - low <= 1e-9 * max(abs(high), abs(low)):
    low, high = min(2 * low, 0.0), max(2 * high, 0.0)
  return (low, high) if high > low else (0.0, 1.0)


def labels(steps: Sequence[float], *, percents: bool) -> list[str]:
  """Formats ticks with enough digits to distinguish neighbours."""
  if percents:
    return [percent(t) for t in steps]
  widest, step = max(map(abs, steps)), min(b - a for a, b in itertools.pairwise(steps))
  digits = max(6, 1 + math.ceil(math.log10(widest / step)))
  return [f"{t:.{digits}g}" for t in steps]


def _path(points: Sequence[tuple[float, float]]) -> str:
  return "M" + "L".join(f"{px:g} {py:g}" for px, py in points)
