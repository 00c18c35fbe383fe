"""`python -m jaxpref.pretrain --config=configs/shapes_base.py [--workdir=W]`."""

import sys

from jaxpref.pretrain.run import main

if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
