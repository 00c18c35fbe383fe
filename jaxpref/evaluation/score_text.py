"""Numbers, p-values and tables of a comparison as text."""

from collections.abc import Sequence
from typing import Any


def percent(share: float) -> str:
  """Formats a share as "71 %"; near 0 and 1 with a decimal, so that 99.6 % is not 100 %."""
  near_end = 0 < share < 0.01 or 0.99 < share < 1
  return f"{100 * share:.{int(near_end)}f} %"


def number(value: float | None, *, sign: bool = False) -> str:
  """Formats a score with about three significant digits, None as "-"."""
  if value is None:
    return "-"
  size = abs(value)
  if size >= 1e5 or 0 < size < 1e-3:
    return f"{value:{'+' if sign else ''}.1e}"
  return f"{value:{'+' if sign else ''}.{3 if size < 10 else 2 if size < 100 else 1}f}"


def p_text(p: float | None) -> str:
  """Formats a p-value as "0.023", "1e-12", "< 1e-15" (smaller is not meaningful) or "-"."""
  if p is None:
    return "-"
  if p < 1e-15:
    return "< 1e-15"
  return f"{p:.0e}" if p < 1e-3 else f"{p:.2g}"


def p_is(p: float | None) -> str:
  """Formats a p-value as "p = 0.023", "p < 1e-15" or "no p-value"."""
  text = p_text(p)
  if p is None:
    return "no p-value"
  return f"p {text}" if text.startswith("<") else f"p = {text}"


def to_text(results: dict[str, Any], categories: list[dict[str, Any]]) -> str:
  """Formats the results of `compare` and `by_category` as tables for the terminal."""
  head = "scorer", "base", "tuned", "difference", "win", "tie", "loss", "win rate", "p"
  lines: list[tuple[str, ...]] = [head]
  for key, e in results.items():
    sides = (f"{number(e[s]['mean'])} ± {number(e[s]['std'])}" for s in ("base", "tuned"))
    shares = (percent(e[s]) for s in ("win", "tie", "loss"))
    flag = " *" if e["selected_training_data"] else ""
    change = number(e["difference"], sign=True)
    lines.append((key + flag, *sides, change, *shares, rate_text(e), p_text(e["p_value"])))
  text = table(lines, left=1)
  if any(e["selected_training_data"] for e in results.values()):
    text += "\n* had a part in the training, so it is not evidence"
  lines = [("category", "scorer", "base", "tuned", "difference", "n")]
  for r in categories:
    means = (number(r[s]) for s in ("base", "tuned"))
    change = number(r["difference"], sign=True)
    lines.append((r["category"], r["scorer"], *means, change, str(r["n"])))
  return text + "\n\n" + table(lines, left=2) + "\n"


def rate_text(entry: dict[str, Any]) -> str:
  """Formats the win rate of an entry of `compare`, with its interval if there is one."""
  low, high = entry["interval"]
  rate = percent(entry["win_rate"])
  return rate if low is None else f"{rate} ({percent(low)[:-2]} to {percent(high)})"


def table(lines: Sequence[tuple[str, ...]], *, left: int) -> str:
  """Aligns the cells of lines, of which the first is a heading.

  Args:
    lines: texts, equally many in each line.
    left: number of columns that are aligned to the left; the others are to the right.
  """
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  text = [
    "  ".join(f"{c:{'<' if i < left else '>'}{widths[i]}}" for i, c in enumerate(line))
    for line in lines
  ]
  return "\n".join([text[0], "-" * len(text[0]), *text[1:]])
