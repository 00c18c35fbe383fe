"""Hooks of the documentation site: pages made from the code, and equations without scripts.

mkdocs calls the `on_*` functions. Pages that stand elsewhere in the repository (README.md,
CONTRIBUTING.md, CHANGELOG.md) or in the code (configurations, metrics) become pages of the
site. Equations between dollar signs become MathML when the site is built, so a page needs
neither JavaScript nor the network to show them.
"""

import ast
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxpref import base_config  # noqa: E402
from jaxpref import config as config_lib  # noqa: E402
from jaxpref.evaluation import glossary  # noqa: E402

# Pages that are files at the top of the repository.
_COPIED = {
  "index.md": "README.md",
  "contributing.md": "CONTRIBUTING.md",
  "changelog.md": "CHANGELOG.md",
}
_METHOD = "dro"  # whose defaults are shown
_PRESETS = base_config.PUBLISHED  # shown where they differ from `shapes`
# Code shown beside an equation: `<!-- code: losses/dpo.py dpo_loss -->`.
_CODE = re.compile(r"^<!-- code: (\S+) (\w+) -->$", re.MULTILINE)
# Links to what the site does not have, such as records: their text remains.
_ELSEWHERE = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)#]*(?:\.jsonl?|\.sh|/)\)")
_MATH = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
  """Adds the generated pages."""
  pages = {name: _copied(ROOT / source) for name, source in _COPIED.items()}
  # Its section has no other page to navigate to, so its tables and blocks get the room.
  pages["index.md"] = f"---\nhide: [navigation]\n---\n\n{pages['index.md']}"
  pages |= {"configuration.md": _configuration(), "metrics.md": _metrics()}
  for name, text in pages.items():
    files.append(File.generated(config, name, content=text))
  return files


def on_page_markdown(markdown: str, **_: Any) -> str:
  """Adds code where a comment asks for it; drops links to files that the site lacks."""
  return _CODE.sub(lambda m: _code_of(m[1], m[2]), _ELSEWHERE.sub(r"\1", markdown))


def on_page_content(html: str, **_: Any) -> str:
  """Turns equations into MathML."""
  return _MATH.sub(_to_mathml, html)


def _code_of(file: str, name: str) -> str:
  """Returns a function's code without its docstring, as a fenced block."""
  source = (ROOT / "jaxpref" / file).read_text(encoding="utf-8")
  (function,) = (
    node
    for node in ast.parse(source).body
    if isinstance(node, ast.FunctionDef) and node.name == name
  )
  lines = source.splitlines()[function.lineno - 1 : function.end_lineno]
  if ast.get_docstring(function):
    docstring = function.body[0]
    del lines[docstring.lineno - function.lineno : docstring.end_lineno - function.lineno + 1]
  return "\n".join([f'```python title="jaxpref/{file}"', *lines, "```"])


def _to_mathml(match: re.Match) -> str:
  text = match[2].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
  text = re.sub(r"\\(log|ln) ", r"\\\1\\, ", text)  # MathML has no space after them
  display = "block" if match[1] == "div" else "inline"
  return latex2mathml.converter.convert(text.strip(), display=display)


def _copied(source: Path) -> str:
  """Returns a page's text with its links as they are from within docs/."""
  text = source.read_text(encoding="utf-8").replace("](docs/", "](")
  for name, other in _COPIED.items():
    text = text.replace(f"]({other}", f"]({name}")
  return text


def _configuration() -> str:
  """Returns the configuration reference: a table for each section, and one for each method."""
  methods = sorted(file.stem for file in (ROOT / "configs").glob("[!_]*.py"))
  methods = [name for name in methods if name not in ("shapes_base", "shapes_mmdit")]
  common = set.intersection(*({path for path, _ in _fields(name)} for name in methods))
  lines = [
    "# Configuration",
    "",
    "Every field of a training run, generated from the configuration files. Set one on the "
    "command line with `--config.SECTION.FIELD=VALUE`; `python -m jaxpref.main --config=dro "
    "--help` prints the same list. Defaults are those of the preset `shapes` of `dro`; the "
    "other columns show where these presets of `dro` differ.",
  ]
  shared = [path for path, _ in _fields(_METHOD) if path in common]
  for section, paths in itertools.groupby(shared, lambda path: path.rpartition(".")[0]):
    lines += ["", f"## `{section}`" if section else "## The run", ""]
    lines += _table(_METHOD, paths, "default")
  lines += ["", "## Fields of single methods", ""]
  lines.append("Fields that only some methods have, with the defaults of their presets.")
  for name in methods:
    if own := [path for path, _ in _fields(name) if path not in common]:
      lines += ["", f"### `{name}`", "", *_table(name, own, "`shapes`")]
  return "\n".join(lines) + "\n"


def _table(name: str, paths: Iterable[str], title: str) -> list[str]:
  """Returns a table of fields: default, meaning, and where other presets differ."""
  known = config_lib.presets_of(name)
  presets = [preset for preset in _PRESETS if preset in known]
  usual, *others = (dict(_fields(name, preset)) for preset in ("shapes", *presets))
  meanings = config_lib.field_meanings(name)
  heads = ("field", title, "meaning", *(f"`{preset}`" for preset in presets))
  lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
  for path in paths:
    different = [_value(of[path]) if of[path] != usual[path] else "" for of in others]
    cells = [f"`{path}`", _value(usual[path]), _escaped(meanings.get(path, "")), *different]
    lines.append(f"| {' | '.join(cells)} |")
  return lines


def _fields(name: str, preset: str = "shapes") -> Iterator[tuple[str, Any]]:
  """Yields (dotted path, value): first what belongs to no section, then the sections."""
  fields = dict(config_lib.leaves(config_lib.load_config(f"{name}:{preset}")))
  for path in sorted(fields, key=lambda path: "." in path):
    if path not in ("name", "preset"):
      yield path, fields[path]


def _value(value: Any) -> str:
  """Returns a default as the command line takes it."""
  if value in ("", ()):
    return "empty"
  text = ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
  return f"`{_escaped(text)}`"


def _metrics() -> str:
  """Returns the glossary of logged metrics."""
  lines = [
    "# Metrics",
    "",
    "What a run logs into `metrics.jsonl` and shows as curves in `report.html`. Generated from "
    "the glossary that the report uses.",
  ]
  groups: dict[str, dict[str, glossary.Metric]] = {}
  for name, metric in glossary.METRICS.items():
    groups.setdefault(name.partition("/")[0], {})[name] = metric
  for group, metrics in groups.items():
    lines += ["", f"## `{group}`", "", "| metric | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {_escaped(metric.meaning)} |" for name, metric in metrics.items()]
  return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
  return text.replace("|", "\\|").replace("<", "&lt;")
