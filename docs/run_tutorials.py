"""Runs the commands of the tutorials and of CONTRIBUTING.md as a reader would.

  python docs/run_tutorials.py              # every quick command
  python docs/run_tutorials.py --slow docs/first_run.md

Each page gets its own copy of the checkout, and two pages run at a time. In the order of the
page, a code block with a `title` is written to the file of that name, a `diff` block with a
title changes that file, and a `bash` block runs if the comment above it says so:

  <!-- run -->                    a quick command, which CI runs too
  <!-- run: slow -->              minutes, only with --slow
  <!-- not run: it needs ... -->  never

A page with a bash block that has no such comment is an error.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = (  # those that take longest first
  "docs/own_images.md",
  "CONTRIBUTING.md",
  "docs/first_run.md",
  "docs/compare_methods.md",
  "docs/comfyui.md",
  "docs/add_a_method.md",
  "docs/stable_diffusion.md",
  "docs/api.md",
)
# XLA compiles programs in less time than a few updates would save.
_QUICK = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
_BLOCK = re.compile(
  r"(?:^<!-- (?P<mark>(?:not )?run[^>]*?) -->\n\n?)?"
  r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
  re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
  """A code block of a page.

  Attributes:
    language: of its first line.
    text: between the fences.
    title: the file that it stands for, or ''.
    mark: 'run', 'run: slow', 'not run: REASON', or ''.
  """

  language: str
  text: str
  title: str
  mark: str


def read_blocks(text: str, *, where: str) -> list[Block]:
  """Returns the code blocks of a page, in order.

  Raises:
    ValueError: a bash block has no mark.
  """
  blocks = [
    Block(m["language"], m["text"], m["title"] or "", m["mark"] or "")
    for m in _BLOCK.finditer(text)
  ]
  for block in blocks:
    known = block.mark in ("run", "run: slow") or block.mark.startswith("not run: ")
    if block.language == "bash" and not known:
      raise ValueError(f"{where}: a bash block has no '<!-- run -->' above it:\n{block.text}")
  return blocks


def apply(block: Block, root: Path) -> None:
  """Writes or changes the file that a block stands for.

  Raises:
    ValueError: the lines that a diff changes do not occur exactly once in the file.
  """
  file = root / block.title
  if block.language != "diff":
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(block.text, encoding="utf-8")
    return
  lines = block.text.splitlines(keepends=True)
  before = "".join(line[1:] for line in lines if line[0] != "+")
  after = "".join(line[1:] for line in lines if line[0] != "-")
  whole = file.read_text(encoding="utf-8")
  if whole.count(before) != 1:
    raise ValueError(f"{block.title} has {whole.count(before)} times, not once:\n{before}")
  file.write_text(whole.replace(before, after), encoding="utf-8")


def run_page(page: str, *, slow: bool) -> str:
  """Follows a page in a copy of the checkout.

  Returns:
    What its commands print and how long each takes.

  Raises:
    RuntimeError: a command fails; the message ends with what it printed.
  """
  log = []
  blocks = read_blocks((ROOT / page).read_text(encoding="utf-8"), where=page)
  wanted = ("run", "run: slow") if slow else ("run",)
  with tempfile.TemporaryDirectory() as directory:
    copy = Path(directory) / "jaxpref"
    _copy_checkout(copy)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(copy)}
    if not slow:
      # Readers have no PyTorch, whose import takes seconds.
      environment["PYTHONPATH"] += f"{os.pathsep}{copy / 'tests' / 'without_torch'}"
      environment.setdefault("XLA_FLAGS", _QUICK)
      # Programs that the tests have compiled with these flags need no compilation here.
      environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
      environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    for block in blocks:
      if block.title:
        apply(block, copy)
        log.append(f"{page}: {block.title} written\n")
      elif block.language == "bash" and block.mark in wanted:
        began = time.perf_counter()
        done = subprocess.run(
          ["bash", "-euo", "pipefail", "-c", block.text],
          cwd=copy,
          env=environment,
          check=False,
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
        )
        log.append(f"{page}: {block.text.strip()}\n{done.stdout}")
        log.append(f"{page}: took {time.perf_counter() - began:.0f} s\n\n")
        if done.returncode:
          raise RuntimeError(f"{''.join(log)}{page}: a command failed ({done.returncode})")
  return "".join(log)


def _copy_checkout(target: Path) -> None:
  """Copies what git tracks or would track."""
  listed = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  )
  for name in filter(None, listed.stdout.split("\0")):
    if (ROOT / name).is_file():
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, target / name)


def main(argv: list[str]) -> None:
  """Runs the pages that the arguments name, or all."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("pages", nargs="*", default=PAGES)
  parser.add_argument("--slow", action="store_true", help="also the commands that take minutes")
  options = parser.parse_args(argv)
  with futures.ThreadPoolExecutor(2) as pool:
    runs = [pool.submit(run_page, page, slow=options.slow) for page in options.pages]
    for run in futures.as_completed(runs):
      print(run.result(), flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
