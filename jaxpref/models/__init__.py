"""Models: diffusers and transformers Flax modules, and directories of weights.

Nothing outside this package imports those two libraries.
"""

import logging

# Every Flax module of diffusers announces at each use that it ends with the release that
# setup.py pins. diffusers sets the level of its own logger when it is imported, so it is
# imported first.
import diffusers.utils.logging  # noqa: F401

logging.getLogger("diffusers").setLevel(logging.ERROR)

from jaxpref.models.pipeline import Pipeline, load_pipeline  # noqa: E402

__all__ = ["Pipeline", "load_pipeline"]
