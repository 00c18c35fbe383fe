"""`python -m jaxpref.pretrain --config=configs/shapes_base.py [--workdir=W]`."""

from jaxpref import cli
from jaxpref.pretrain.run import main

if __name__ == "__main__":
  cli.run(main)
