"""Files with a prompt a line, as generation and evaluation read them."""

import os

import pytest

from jaxpref import generate
from jaxpref.data import prompt_files
from jaxpref.errors import UserError
from jaxpref.evaluation import prompt_sets


def test_lines_without_marks_and_empty_ones(tmp_path):
  file = tmp_path / "prompts.txt"
  file.write_bytes("\ufeffa star \r\n\n größer\u2028als\n".encode())
  expected = ["a star", "größer\u2028als"]
  assert prompt_files.read_file(file, shown="it") == expected
  assert generate.read_prompts(str(file)) == expected
  assert sorted(prompt_sets.choose_prompts(str(file), 9, [], seed=0)) == sorted(expected)


def _huge(path):
  with path.open("wb") as file:
    file.truncate(1 << 40)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (os.mkfifo, "not a regular file"),  # which would be waited for
    (lambda file: file.mkdir(), "(not a regular file|is a folder)"),
    (lambda file: file.write_bytes(b"\xff"), "cannot read"),
    (lambda file: file.write_text("\n \n"), "holds no prompt"),
    (_huge, "1048576 MB"),
  ],
)
def test_what_is_not_a_file_of_prompts(make, message, tmp_path):
  file = tmp_path / "prompts.txt"
  make(file)
  with pytest.raises(UserError, match=f"--prompts: .*{message}"):
    generate.read_prompts(str(file))
  with pytest.raises(UserError, match=f"evaluate.prompts: .*{message}"):
    prompt_sets.choose_prompts(str(file), 9, [], seed=0)
