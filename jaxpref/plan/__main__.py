"""`python -m jaxpref.plan`."""

from jaxpref.plan import estimate
from jaxpref.runtime import cli

if __name__ == "__main__":
  cli.run(estimate.main)
