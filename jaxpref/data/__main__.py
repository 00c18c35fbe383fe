"""`python -m jaxpref.data build` and `python -m jaxpref.data inspect`."""

from jaxpref.data import commands
from jaxpref.runtime import cli

if __name__ == "__main__":
  cli.run(commands.main)
