"""`python -m jaxpref.score --path=DIR --scorers=NAME,NAME`."""

from jaxpref.runtime import cli
from jaxpref.score import score_images

if __name__ == "__main__":
  cli.run(score_images.main)
