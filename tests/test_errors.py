"""What programs print when they refuse something: one printable line of bounded length."""

import logging

import pytest

from jaxpref import export, generate, main
from jaxpref.errors import UserError, one_line
from jaxpref.plan import estimate
from jaxpref.pretrain import run as pretrain
from jaxpref.runtime import cli

# A line end, a terminal sequence, an override of the direction of writing, a broken byte.
HOSTILE = "a\nb\x1b[2Jc\u202ed\udcffe"
ESCAPED = r"a\nb\x1b[2Jc\u202ed\udcffe"


def is_line(text, longest=750):
  return text.endswith("\n") and text[:-1].isprintable() and len(text) <= longest


def test_one_line():
  assert one_line(" as it is: café, 日本, 'x' ") == "as it is: café, 日本, 'x'"
  assert one_line(HOSTILE) == ESCAPED
  assert one_line("x" * 700) == "x" * 700
  cut = one_line("begin" + "\n" * 1_000_000 + "end")
  assert cut.startswith(r"begin\n\n") and cut.endswith(r"\n\nend")
  assert "(1,000,008 characters)" in cut and len(cut) < 750


def test_messages_of_libraries_are_bounded_where_they_are_quoted():
  error = UserError(f"{HOSTILE}: {'page of text' * 100_000}\nlast")
  assert str(error).isprintable() and len(str(error)) < 750
  assert len(str(UserError(f"--model: {error}"))) < 750


@pytest.mark.parametrize("name", [HOSTILE, "x" * 1_000_000])
@pytest.mark.parametrize(
  ("program", "arguments"),
  [
    (main.main, ["--config={}"]),
    (estimate.main, ["--config={}", "--topology=v5e:1"]),
    (pretrain.main, ["--config={}"]),
    (generate.main, ["--model=shapes", "--prompts=x", "--out=out", "--solver={}"]),
    (export.main, ["--workdir=w", "--out=out.safetensors", "--dtype={}"]),
  ],
)
def test_every_program_prints_one_line(program, arguments, name, capsys):
  assert program([argument.format(name) for argument in arguments]) == 2
  printed = capsys.readouterr().err
  assert printed.startswith("jaxpref: error: ") and is_line(printed)


@pytest.mark.parametrize(
  "error", [UserError(HOSTILE), PermissionError(13, "Permission denied", HOSTILE)]
)
def test_names_of_files_are_escaped(error, capsys):
  def job(_):
    raise error

  assert cli.exit_status(job, []) == 2
  printed = capsys.readouterr().err
  assert is_line(printed) and r"\x1b[2J" in printed


def test_warnings_are_lines(capsys):
  def job(_):
    logging.getLogger("jaxpref.x").warning("%s is damaged", HOSTILE)
    logging.getLogger("library").warning("%s", "a\n" * 100_000)

  assert cli.exit_status(job, []) == 0
  first, second, rest = capsys.readouterr().err.split("\n")
  assert first == f"jaxpref: {ESCAPED} is damaged" and rest == ""
  assert second.startswith(r"jaxpref: a\na\n") and len(second) < 2100
