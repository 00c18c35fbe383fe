"""MJHQ-30k (Li et al. 2024, https://arxiv.org/abs/2402.17245): images with prompts.

`meta_data.json` maps an image's id to its category and prompt; the image is
`<category>/<id>.jpg`. `data.path` is the folder or the file.
"""

import functools
from pathlib import Path
from typing import Any

import ijson
from ml_collections import ConfigDict

from jaxpref.data.bad_rows import BadRow, Tally
from jaxpref.data.sources import Table
from jaxpref.data.sources.listing import Listing, file_in, find_listing
from jaxpref.errors import UserError, first_line

SORTED = True


def open_images(data: ConfigDict, tally: Tally, kind: str) -> Table:
  """Opens the images with their prompts, in the order of the file.

  Raises:
    UserError: the file does not exist, is damaged, or lists no images.
  """
  del tally, kind
  file = find_listing(data.path, "meta_data.json", "MJHQ-30k's meta_data.json")
  try:
    with file.open("rb") as stream:
      entries = list(ijson.kvitems(stream, "", use_float=True))
  except (ijson.JSONError, UnicodeDecodeError, RecursionError) as error:
    raise UserError(f"{file} cannot be read as JSON: {first_line(error)}") from error
  if not entries:
    raise UserError(f"{file} is not a JSON object that lists images")
  return Listing(entries, functools.partial(_image, file.parent), file.name)


def _image(root: Path, entry: tuple[str, Any]) -> dict[str, Any]:
  name, values = entry
  if not isinstance(values, dict) or not isinstance(values.get("category"), str):
    raise BadRow("an entry without a category")
  image = file_in(root, f"{values['category']}/{name}.jpg", "category")
  return {"caption": values.get("prompt"), "jpg": image}
