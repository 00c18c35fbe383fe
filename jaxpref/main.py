"""The training program.

  python -m jaxpref.main --config=configs/dro.py [--workdir=W] [--config.FIELD=VALUE ...]

On several machines, each runs the same command, see `jaxpref.runtime.distributed`.
"""

from typing import Any

from jaxpref import config as config_lib
from jaxpref.runtime import cli
from jaxpref.runtime import workdir as workdir_lib

FLAGS = {
  **cli.FLAGS,
  "coordinator": "for several processes: HOST:PORT of process 0, the same for all; or 'auto': "
  "from the TPU pod, SLURM, Open MPI or Kubernetes",
  "num_processes": "with --coordinator=HOST:PORT: the number of processes",
  "process_id": "with --coordinator=HOST:PORT: the number of this process, from 0",
}


def main(argv: list[str]) -> int:
  """Starts or resumes the configured run; returns the exit status."""
  return cli.exit_status(_run, argv)


def _run(argv: list[str]) -> None:
  config, flags = config_lib.parse_args(argv, flags=FLAGS)
  config_lib.validate(config)
  # Imported late, so that errors on the command line do not wait for JAX.
  from jaxpref import base_config, scorers  # noqa: PLC0415
  from jaxpref.runtime import distributed, wandb_run, watchdog  # noqa: PLC0415
  from jaxpref.training import iterate, setup, train  # noqa: PLC0415

  distributed.initialize(flags)
  distributed.first(lambda: wandb_run.check_installed(config.train.wandb))
  fields = {name: repr(value) for name, value in config_lib.leaves(config)}
  distributed.check_same("configurations", fields)
  iterative = "iterate" in config
  program: Any = iterate if iterative else train
  path = workdir_lib.path_of(flags.get("workdir"), config)
  # Reads and checks all input before it writes anything.
  prepared = distributed.together(
    lambda: iterate.prepare(config) if iterative else setup.prepare(config)
  )
  distributed.check_same("inputs", prepared.inputs)
  judging = dict.fromkeys((*prepared.scorers, *base_config.trained_scorers(config)))
  distributed.first(lambda: scorers.find_files(judging))  # process 0 scores
  safe = iterate.RESUME_SAFE if iterative else workdir_lib.RESUME_SAFE
  with (
    distributed.open_workdir(path, config, resume_safe=safe) as workdir,
    watchdog.watching(hang_minutes=config.train.hang_minutes),
  ):
    program.run(prepared, workdir)


if __name__ == "__main__":
  cli.run(main)
