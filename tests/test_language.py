"""The language of the code and its documents: plain, and one word for a thing."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BANNED = {
  "is no": "is not a",
  "are no": "are not",
  "is none": "is not one",
  "in the place of": "instead of",
  "in place of it": "instead",
  "of one's own": "custom",
  "so many": "name the number",
  "the former": "repeat the noun",
  "the latter": "repeat the noun",
  "see there": "say it here",
  "told": "conditioning",
  "pictures?": "image",
  "lots?": "chunk",
  "makes nothing of": "does not take",
  "one's": "name who",
  "nothing but": "only",
  "alike": "the same, equal",
  "to and fro": "name the directions",
  "drawn?|drew|draws": "sample, generate (a random draw stays one)",
}
# Where a banned word is the right one.
ALLOWED = re.compile(
  r"random draws?|noise draws?|posterior draws|redrawn|hand-drawn|ImageDraw|a lot of|is None"
)
DRAWING = ("jaxpref/shapes", "jaxpref/rng.py")  # shapes are drawn, random numbers too

PATTERNS = {
  re.compile(rf"(?<![\w`'\"./_=-])(?:{phrase})(?![\w`'_=])", re.IGNORECASE): better
  for phrase, better in BANNED.items()
}
CODE = sorted(
  path
  for folder in ("jaxpref", "configs", "benchmarks", "experiments", "launch")
  for path in (ROOT / folder).rglob("*.py")
)
PROSE = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def _strip_code(text: str) -> str:
  """Blanks what stands in backticks or in a code block: names are not prose."""
  blank = lambda m: re.sub(r"[^\n]", " ", m.group())  # noqa: E731
  return re.sub(r"(?s)```.*?```|`[^`]*`|<!--.*?-->", blank, text)


def prose_of(source: str) -> list[tuple[int, str]]:
  """Returns line and text of the comments, docstrings and messages of a module."""
  found = [
    (token.start[0], token.string)
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT
  ]
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
      found.append((node.lineno, node.value))
  return found


def complaints(path: Path) -> list[str]:
  """Lists the banned phrases of a file, each with its line and what to say instead."""
  text = path.read_text(encoding="utf-8")
  name = path.relative_to(ROOT).as_posix()
  found = []
  for line, part in prose_of(text) if path.suffix == ".py" else [(1, text)]:
    plain = _strip_code(part)
    for pattern, better in PATTERNS.items():
      if "draw" in pattern.pattern and name.startswith(DRAWING):
        continue
      for match in pattern.finditer(ALLOWED.sub(lambda m: " " * len(m.group()), plain)):
        where = line + plain[: match.start()].count("\n")
        found.append(f"{name}:{where}: {match.group()!r}: {better}")
  return found


@pytest.mark.parametrize("path", [*CODE, *PROSE], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_banned_phrases(path):
  assert not complaints(path)


# First words that look like a verb in the third person and are not.
_NOUNS = {"This", "As", "Its", "Rows", "Images", "Shapes", "Parameters", "Weights", "Paths"}


def test_docstrings_of_functions_begin_with_a_verb():
  """In the third person: "Returns", "Samples"."""
  found = []
  for path in (path for path in CODE if path.is_relative_to(ROOT / "jaxpref")):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        continue
      names = [d.id for d in node.decorator_list if isinstance(d, ast.Name)]
      text = ast.get_docstring(node)
      if text is None or "property" in names or "cached_property" in names:
        continue
      first = text.split()[0].strip(",.:;")
      if not re.fullmatch(r"[A-Z][a-z-]*s", first) or first in _NOUNS:
        found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text.splitlines()[0]!r}")
  assert not found


def test_the_test_sees():
  source = '"""What is no image."""\n# in the place of\nraise ValueError(f"{x} is none")\n'
  assert sorted(line for line, _ in prose_of(source)) == [1, 2, 3]
