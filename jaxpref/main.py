"""`python -m jaxpref.main --config=configs/dro.py [--workdir=W] [--config.FIELD=VALUE ...]`."""

import logging
import sys

from jaxpref import config as config_lib
from jaxpref import workdir as workdir_lib
from jaxpref.errors import UserError

FLAGS = {"workdir": "directory of the run; runs/<name>-<preset> by default"}


def main(argv: list[str]) -> int:
  """Runs or resumes what the configuration says; returns the exit status."""
  logging.basicConfig(level=logging.WARNING, format="jaxpref: %(message)s", force=True)
  try:
    config, flags = config_lib.parse_args(argv, flags=FLAGS)
    config_lib.validate(config)
    # Late: errors on the command line should not wait for JAX.
    from jaxpref import train  # noqa: PLC0415

    run = train.prepare(config)  # reads and checks all input before anything is written
    path = flags.get("workdir") or workdir_lib.default_workdir(config)
    workdir = workdir_lib.open_workdir(path, config)
    try:
      train.run(run, workdir.path)
    finally:
      workdir_lib.release(workdir)
  except UserError as error:
    print(f"jaxpref: error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("jaxpref: interrupted; the same command continues this run", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
