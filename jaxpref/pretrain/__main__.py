"""`python -m jaxpref.pretrain --config=shapes_base [--workdir=W]`."""

from jaxpref.pretrain.run import main
from jaxpref.runtime import cli

if __name__ == "__main__":
  cli.run(main)
