"""A text file with one prompt per line."""

from ml_collections import ConfigDict

from jaxpref.data import prompt_files
from jaxpref.data.bad_rows import Tally
from jaxpref.data.sources import Table
from jaxpref.runtime.paths import user_path


def open_captions(data: ConfigDict, tally: Tally, kind: str) -> Table:
  """Opens the prompts of the file `data.path`."""
  del tally, kind
  return [
    {"caption": prompt}
    for prompt in prompt_files.read_file(user_path(data.path), shown=f"data.path {data.path!r}")
  ]
