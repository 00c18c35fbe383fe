"""`python -m jaxpref.pretrain --config=configs/shapes_base.py [--workdir=W]`."""

from jaxpref.pretrain.run import main
from jaxpref.runtime import cli

if __name__ == "__main__":
  cli.run(main)
