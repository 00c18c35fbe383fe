r"""Training of the shapes world's preference model, the scorer `shapes.preference`.

  python -m jaxpref.pretrain --config=configs/shapes_preference.py

It learns from the simulated annotator's pairs, by the pairwise log-sigmoid loss and CLIP's loss
on the preferred images. Its text tower begins as the bundled pipeline's text encoder. The model
is in `<workdir>/model`, with a card that has its accuracy on held-out pairs. The same command
resumes an interrupted run.
"""

from ml_collections import ConfigDict

PRESETS = ("shapes", "tiny")


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration; `tiny` takes seconds, for tests."""
  c = ConfigDict()
  c.name = "shapes_preference"
  c.preset = preset
  c.seed = 0

  c.pairs = ConfigDict()
  c.pairs.num_train = 30_000  # pairs of train prompts, ties included, which are left out
  c.pairs.num_test = 1_000  # pairs of held-out prompts, for the card
  c.pairs.image_size = 32  # height and width in pixels; the pairs' 64 are resized

  c.model = ConfigDict()
  c.model.path = (
    "shapes"  # pipeline whose text encoder and tokenizer the text tower begins with
  )
  c.model.channels = (32, 64, 128)  # of the image tower's levels, each of half the size
  c.model.width = 128  # of the features

  c.preference = ConfigDict()
  c.preference.contrast = 1.0  # weight of CLIP's loss beside the pairwise loss
  c.preference.batch_size = 32
  c.preference.num_updates = 900
  c.preference.lr = 1e-3
  c.preference.warmup_updates = 100
  c.preference.decay = 0.8  # share of the updates at the end over which lr falls to 0
  c.preference.weight_decay = 0.01
  c.preference.clip_norm = 1.0
  c.preference.ema_decay = 0.99

  c.log_every = 50  # updates between logged metrics
  c.save_every = 100  # updates between checkpoints

  if preset == "tiny":
    c.pairs.num_train, c.pairs.num_test = 48, 16
    c.model.channels = (8, 16)
    c.model.width = 16
    c.preference.batch_size = 8
    c.preference.num_updates = 2
    c.preference.warmup_updates = 1
    c.log_every = c.save_every = 1
  return c
