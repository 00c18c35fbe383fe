"""A page with random rows of a built data set."""

import base64
import html
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from jaxpref.data import images
from jaxpref.data.bad_rows import Tally
from jaxpref.data.build_report import report_lines
from jaxpref.data.sources import built
from jaxpref.runtime import workdir

_SIDE = 256  # pixels of the shorter side of an image on the page
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; }
body { max-width: 1100px; padding: 0 1rem; }
pre { overflow-x: auto; padding: .8rem 1rem; border: 1px solid #8886; border-radius: 6px; }
.rows { display: grid; gap: 1rem; }
.rows { grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
figure { margin: 0; border: 1px solid #8886; border-radius: 6px; padding: .6rem; }
.images { display: flex; gap: .4rem; }
.images div { flex: 1; min-width: 0; }
img { width: 100%; border-radius: 4px; }
figcaption { overflow-wrap: anywhere; margin-top: .4rem; }
small { color: #777; }
"""


def write(directory: Path, *, rows: int, seed: int) -> Path:
  """Writes `inspect.html` into a data set's directory and returns its path.

  Args:
    directory: of the data set.
    rows: number of rows on the page.
    seed: selects the rows.
  """
  facts = built.read_facts(os.fspath(directory))
  data = ConfigDict({"path": os.fspath(directory)})
  table = built.open_pairs(data, Tally(), "all")
  order = np.random.default_rng(seed).permutation(len(table))[:rows]
  figures = "\n".join(_figure(int(i), table[int(i)]) for i in sorted(order))
  report = html.escape("\n".join(report_lines(facts["plan"], facts["report"])))
  title = html.escape(directory.name)
  page = (
    f"<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>{title}</title>\n"
    "<meta name='viewport' content='width=device-width'>\n"
    f"<style>{_STYLE}</style>\n<h1>{title}</h1>\n<pre>{report}</pre>\n"
    f"<div class='rows'>\n{figures}\n</div></html>\n"
  )
  path = directory / "inspect.html"
  workdir.write_text(path, page)
  return path


def _figure(number: int, row: Mapping[str, Any]) -> str:
  columns = sorted(name for name in row if name.startswith("jpg"))
  shown = "".join(_image(row, name) for name in columns)
  caption = row.get("caption", row.get("prompt", b"")).decode(errors="replace")
  return (
    f"<figure><div class='images'>{shown}</div><figcaption dir='auto'>{html.escape(caption)} "
    f"<small>row {number}</small></figcaption></figure>"
  )


def _image(row: Mapping[str, Any], name: str) -> str:
  k = name.removeprefix("jpg")
  pixels = Image.fromarray(images.decode(row[name]))
  pixels.thumbnail((2 * _SIDE, 2 * _SIDE))
  pixels.save(buffer := io.BytesIO(), "JPEG", quality=85)
  uri = base64.b64encode(buffer.getvalue()).decode()
  note = next(
    (f"{what} {float(row[what + k]):g}" for what in ("label", "rank") if what + k in row),
    "" if "liked" not in row else "liked" if row["liked"] else "disliked",
  )
  height, width = row[f"size{k}"]
  return (
    f"<div><img src='data:image/jpeg;base64,{uri}' alt=''>"
    f"<small>{note}{' · ' if note else ''}{width} x {height}</small></div>"
  )
