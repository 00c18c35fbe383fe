"""Preference losses: pure functions of per-sample errors, one file per method.

Functions such as `jaxpref.losses.dpo_loss` take arrays and hyper-parameters and return one
loss per sample. They do not depend on networks, configurations or devices. The inputs that the
train step must provide are declared beside each, see `jaxpref.losses.base`.
"""

from jaxpref.losses.awm import awm_loss
from jaxpref.losses.base import (
  Arranged,
  Loss,
  Needs,
  Terms,
  check_loss,
  known_losses,
  load_loss,
  make_loss,
  to_errors,
)
from jaxpref.losses.csft import csft_loss
from jaxpref.losses.dgpo import dgpo_loss
from jaxpref.losses.dpo import dpo_loss
from jaxpref.losses.dro import dro_loss
from jaxpref.losses.dspo import dspo_loss
from jaxpref.losses.kto import kto_loss
from jaxpref.losses.listwise import plackett_luce_loss
from jaxpref.losses.mapo import mapo_loss
from jaxpref.losses.nft import nft_loss
from jaxpref.losses.prdp import prdp_loss
from jaxpref.losses.rwr import rwr_loss
from jaxpref.losses.sdpo import safeguard, sdpo_scale
from jaxpref.losses.sft import sft_loss
from jaxpref.losses.simpo import simpo_loss
from jaxpref.losses.spin import spin_loss
from jaxpref.losses.step_pairs import step_pair_loss

__all__ = [
  "Arranged",
  "Loss",
  "Needs",
  "Terms",
  "awm_loss",
  "check_loss",
  "csft_loss",
  "dgpo_loss",
  "dpo_loss",
  "dro_loss",
  "dspo_loss",
  "known_losses",
  "kto_loss",
  "load_loss",
  "make_loss",
  "mapo_loss",
  "nft_loss",
  "plackett_luce_loss",
  "prdp_loss",
  "rwr_loss",
  "safeguard",
  "sdpo_scale",
  "sft_loss",
  "simpo_loss",
  "spin_loss",
  "step_pair_loss",
  "to_errors",
]
