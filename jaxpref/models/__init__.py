"""Pretrained models: diffusers' and transformers' Flax modules, and their files.

Only this package imports those two libraries.
"""

import logging

# Every Flax module of diffusers logs at each use that it will be removed after the release that
# setup.py pins. diffusers sets its logger's level on import, so the level is set after that.
import diffusers.utils.logging  # noqa: F401

logging.getLogger("diffusers").setLevel(logging.ERROR)

from jaxpref.models.pipeline import Pipeline, load_pipeline  # noqa: E402

__all__ = ["Pipeline", "load_pipeline"]
