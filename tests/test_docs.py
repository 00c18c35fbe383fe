"""The documentation: commands have a mark, links a target, quoted messages exist."""

import ast
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))

import run_tutorials  # noqa: E402

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
GENERATED = ("index.md", "contributing.md", "changelog.md", "configuration.md", "metrics.md")


@pytest.mark.parametrize("page", run_tutorials.PAGES)
def test_every_command_says_whether_it_is_run(page):
  blocks = run_tutorials.read_blocks((ROOT / page).read_text(), where=page)
  assert any(block.mark.startswith("run") for block in blocks)


def test_a_command_without_a_mark_is_refused():
  with pytest.raises(ValueError, match="page: a bash block has no"):
    run_tutorials.read_blocks("```bash\ntrue\n```\n", where="page")


def test_a_diff_changes_what_occurs_once(tmp_path):
  (tmp_path / "a.py").write_text("one\ntwo\n")
  text = '```diff title="a.py"\n one\n-two\n+three\n```\n'
  (block,) = run_tutorials.read_blocks(text, where="page")
  run_tutorials.apply(block, tmp_path)
  assert (tmp_path / "a.py").read_text() == "one\nthree\n"
  with pytest.raises(ValueError, match="0 times, not once"):
    run_tutorials.apply(block, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_targets(page):
  text = re.sub(r"(?s)```.*?```", "", page.read_text())
  for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
    name, _, anchor = link.partition("#")
    if name in GENERATED and page.is_relative_to(ROOT / "docs"):
      continue
    target = page.parent / name if name else page
    assert target.exists(), link
    if anchor:
      headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
      slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
      assert anchor in slugs, link


def test_quoted_messages_exist():
  """Those that the page of troubleshooting tells a reader to look for."""
  sources = (ROOT / "jaxpref").rglob("*.py")
  constants = [
    node.value
    for source in sources
    for node in ast.walk(ast.parse(source.read_text()))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
  ]
  text = (ROOT / "docs" / "troubleshooting.md").read_text()
  quoted = [m for m in re.findall(r"`([a-z%][^`]*)`", text) if m.count(" ") > 1]
  quoted = [m for m in quoted if not m.startswith(("python ", "pip ", "kill "))]
  assert len(quoted) >= 6
  for message in quoted:
    assert any(message in constant for constant in constants), message


def test_readme_is_short():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 150
