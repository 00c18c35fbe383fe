"""`python -m jaxpref.main --config=configs/dro.py [--workdir=W] [--config.FIELD=VALUE ...]`."""

import sys
from typing import Any

from jaxpref import cli
from jaxpref import config as config_lib
from jaxpref import workdir as workdir_lib


def main(argv: list[str]) -> int:
  """Runs or resumes what the configuration says; returns the exit status."""
  return cli.exit_status(_run, argv)


def _run(argv: list[str]) -> None:
  config, flags = config_lib.parse_args(argv, flags=cli.FLAGS)
  config_lib.validate(config)
  # Late: errors on the command line should not wait for JAX.
  from jaxpref import iterate, prepare, train  # noqa: PLC0415

  iterative = "iterate" in config
  # Reads and checks all input before anything is written.
  prepared: Any = iterate.prepare(config) if iterative else prepare.prepare(config)
  path = flags.get("workdir") or workdir_lib.default_workdir(config)
  safe = iterate.RESUME_SAFE if iterative else workdir_lib.RESUME_SAFE
  workdir = workdir_lib.open_workdir(path, config, resume_safe=safe)
  try:
    (iterate if iterative else train).run(prepared, workdir.path)
  finally:
    workdir_lib.release(workdir)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
