"""Arguments that nothing can mean, for every program."""

import importlib.util
import sys

import pytest

from jaxpref import export, generate, main
from jaxpref.runtime import cli
from jaxpref.score import score_images


def test_help_names_the_program_as_it_is_started(monkeypatch):
  for name in ("jaxpref.data.__main__", "jaxpref.score.__main__", "jaxpref.export"):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", importlib.util.find_spec(name))
    wanted = f"usage: python -m {name.removesuffix('.__main__')} "
    assert cli.Parser("Does it.").format_usage().startswith(wanted)


@pytest.mark.parametrize(
  ("program", "argv"),
  [
    (main, ["--config=dro:tiny", "--config.train.num_updates=" + "9" * 400]),
    (main, ["--config=dro:tiny", "--config.train.num_updates=" + "9" * 5000]),
    (main, ["--config=dro:tiny", "--config.optim.lr=1e999"]),
    (generate, ["--model=shapes", "--prompts=\ud800", "--out=x"]),
    (generate, ["--model=shapes", "--prompts=a", "--out=\ud800"]),
    (generate, ["--model=shapes", "--prompts=a\0.txt", "--out=x"]),
    (generate, ["--improver=\ud800", "--images=\ud800", "--out=x"]),
    (export, ["--workdir=x", "--out", "--"]),
    (export, ["--workdir=x", "--out=--"]),
    (export, ["--workdir=\ud800", "--out=y"]),
    (export, ["--workdir=", "--out=y"]),
    (export, ["--workdir=x", "--out="]),
    (score_images, ["--path=\ud800", "--scorers=shapes.quality"]),
    (score_images, ["--path=x\0", "--source=folder", "--scorers=shapes.quality", "--out=y"]),
    (score_images, ["--source=shapes", "--scorers=shapes.quality", "--out=\ud800"]),
    (score_images, ["--source=shapes", "--scorers=\ud800", "--out=x"]),
    (score_images, ["--source=shapes", "--scorers=,", "--out=x"]),
    (main, ["--config=dro:tiny", "--workdir="]),
    (main, ["--config=dro:tiny", "--workdir=\udcc3\udcbc"]),
    (main, ["--config=dro:tiny", "--config.evaluate.prompts="]),
  ],
)
def test_arguments_that_nothing_can_mean_are_one_line(
  program, argv, capsys, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  assert program.main(argv) == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and err.startswith("jaxpref: error: ")
