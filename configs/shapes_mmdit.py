r"""Training of the shapes world's second base, a small MMDiT, on the same flawed corpus.

  python -m jaxpref.pretrain --config=configs/shapes_mmdit.py
  python -m jaxpref.pretrain --config=configs/shapes_mmdit.py:more --config.denoiser.path=DIR

It is Stable Diffusion 3's pipeline in small: its transformer, trained with flow matching on
logit-normal levels (Esser et al., 2024), and two CLIP text encoders, without T5. The VAE is
that of the pipeline `shapes`. The first text encoder begins as the one of that pipeline, with
its tokenizer, and is trained together with the second, smaller one and the transformer. The
same command resumes an interrupted run; `denoiser.num_updates` may then be changed, which is
exact before the learning rate begins to fall.

The preset `more` trains an existing base of this kind, `denoiser.path`, on new images.
"""

from ml_collections import ConfigDict

PRESETS = ("shapes", "more", "tiny")


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration; `tiny` takes seconds, for tests."""
  c = ConfigDict()
  c.name = "shapes_mmdit"
  c.preset = preset
  c.family = "sd3"  # kind of pipeline; or 'stable_diffusion', see configs/shapes_base.py
  c.seed = 0

  c.corpus = ConfigDict()
  c.corpus.num_images = 60_000  # rendered once, with flaws as in web data
  c.corpus.image_size = 32  # height and width in pixels; the renderer's 64 are averaged

  c.tokenizer = ConfigDict()  # without `text.path`
  c.tokenizer.vocab_size = 640  # 512 bytes, with and without word end; the others are merges
  c.tokenizer.max_length = 16  # tokens; the longest caption has 13

  c.vae = ConfigDict()
  c.vae.path = "shapes"  # pipeline whose VAE is used; '': train a new VAE
  c.vae.channels = (32, 64, 96)  # channels per level, from 32 x 32 pixels to 8 x 8 latents
  c.vae.latent_channels = 4
  c.vae.norm_groups = 8
  c.vae.kl_weight = 1e-5
  c.vae.edge_weight = 0.0  # weight of the error of differences between neighbouring pixels
  c.vae.batch_size = 24
  c.vae.num_updates = 0
  c.vae.lr = 2e-3
  c.vae.warmup_updates = 100
  c.vae.decay = 0.7  # share of the updates at the end over which lr falls to 0

  c.text = ConfigDict()
  c.text.path = "shapes"  # pipeline whose text encoder the first one begins as; '': random
  c.text.widths = (128, 64)  # of both text encoders
  c.text.head_dim = 32  # channels per head
  c.text.layers = 2  # of each; the transformer reads the states before the last one

  c.mmdit = ConfigDict()
  c.mmdit.layers = 6
  c.mmdit.heads = 4
  c.mmdit.head_dim = 32
  c.mmdit.patch_size = 2  # latents per token, along each axis

  c.noise = ConfigDict()  # levels
  c.noise.density = "logit_normal"  # before the shift: 'uniform', 'logit_normal' or 'mode'
  c.noise.mean = 0.0  # of logit_normal's logits; above 0: more noise
  c.noise.std = 1.0  # of logit_normal's logits
  c.noise.scale = 1.29  # of 'mode'; above 0: more levels in the middle
  c.noise.shift = 1.0  # above 1: more noise; written to the scheduler's file, also for sampling

  c.denoiser = ConfigDict()
  c.denoiser.path = ""  # pipeline whose text encoders and MMDiT are trained further; '': new
  c.denoiser.batch_size = 64
  c.denoiser.num_updates = 24_000
  c.denoiser.lr = 1.5e-3
  c.denoiser.warmup_updates = 300
  c.denoiser.decay = 0.4
  c.denoiser.weight_decay = 0.01
  c.denoiser.clip_norm = 1.0
  c.denoiser.prompt_dropout = 0.1  # share of rows trained with an empty prompt
  c.denoiser.ema_decay = 0.999

  c.log_every = 100  # updates between logged metrics
  c.save_every = 100  # updates between checkpoints

  if preset == "more":
    c.seed = 1  # gives another corpus and other noise
    c.denoiser.path = "shapes_mmdit"
    c.denoiser.lr = 1e-3
    c.denoiser.decay = 0.9

  if preset == "tiny":
    c.corpus.num_images = 64
    c.mmdit.layers, c.mmdit.heads, c.mmdit.head_dim = 2, 2, 16
    c.denoiser.batch_size = 4
    c.denoiser.num_updates = 2
    c.denoiser.warmup_updates = 1
    c.log_every = 1
    c.save_every = 1
  return c
