"""The report of a build as text."""

from collections.abc import Mapping
from typing import Any

from jaxpref.errors import count


def report_lines(plan: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
  """Returns the report of a build as lines of text."""
  left_out = sum(report["left_out"].values())
  lines = [
    f"{report['stored']:,} of {report['rows']:,} {plan['table']} stored, {left_out:,} left out",
    *(f"  {number:>9,}  {reason}" for reason, number in report["left_out"].items()),
  ]
  titles = {
    "files": "files that are left out before they are rows",
    "labels": "labels",
    "converted": "converted images",
  }
  for name, title in titles.items():
    if report[name]:
      lines += [f"{title}:", *(f"  {n:>9,}  {what}" for what, n in report[name].items())]
  if report["sizes"]:
    most = list(report["sizes"].items())
    lines.append("sizes of images (width x height):")
    lines += [f"  {number:>9,}  {size}" for size, number in most[:8]]
    if len(most) > 8:  # noqa: PLR2004
      lines.append(f"  {sum(n for _, n in most[8:]):>9,}  in {len(most) - 8:,} other sizes")
  if report["words"]:
    lines.append(_words(report["words"]))
  lines += [f"read: {name}" for name in report["read"]]
  if report["named"]:
    lines += ["first rows left out:", *(f"  {name}" for name in report["named"][:5])]
  return lines


def _words(counts: Mapping[str, int]) -> str:
  """Returns a sentence on the lengths of captions."""
  ordered = sorted((int(words), n) for words, n in counts.items())
  total, seen = sum(n for _, n in ordered), 0
  middle = ordered[-1][0]
  for words, n in ordered:
    seen += n
    if 2 * seen >= total:
      middle = words
      break
  shortest, longest = ordered[0][0], ordered[-1][0]
  if shortest == longest:
    return f"captions: {count(longest, 'word')} each"
  return f"captions: {shortest} to {longest} words, half have at most {middle}"
