"""`python -m jaxpref.evaluate --models=base=MODEL,dro=MODEL --prompts=... --out=DIR`."""

from jaxpref.evaluate import program
from jaxpref.runtime import cli

if __name__ == "__main__":
  cli.run(program.main)
