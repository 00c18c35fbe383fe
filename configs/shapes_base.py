r"""Training of the shapes world's base pipeline from scratch, on its flawed corpus.

  python -m jaxpref.pretrain --config=configs/shapes_base.py
  python -m jaxpref.pretrain --config=configs/shapes_base.py:more
  python -m jaxpref.pretrain --config=configs/shapes_base.py:decoder
  python -m jaxpref.pretrain --config=configs/shapes_base.py:flow

There are three stages. The first trains a VAE on the images of the corpus, the second trains
text encoder and UNet together on the latents, and the third exports them to
`<workdir>/pipeline` in diffusers' directory layout, with a model card. The same command resumes
an interrupted run.

The presets `more` and `decoder` train existing weights further: `more` trains the text encoder
and UNet of the bundled pipeline on new images, as many as before; `decoder` trains only the
VAE's decoder, for sharper edges, which does not change latents and UNet. The model card of the
bundled pipeline describes how it was made. The preset `flow` trains a UNet with flow matching,
on logit-normal levels.
"""

from ml_collections import ConfigDict

PRESETS = ("shapes", "more", "decoder", "flow", "tiny")


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration; `tiny` takes seconds, for tests."""
  c = ConfigDict()
  c.name = "shapes_base"
  c.preset = preset
  c.family = "stable_diffusion"  # kind of pipeline; or 'sd3', see configs/shapes_mmdit.py
  c.seed = 0

  c.corpus = ConfigDict()
  c.corpus.num_images = 60_000  # rendered once, with flaws as in web data
  c.corpus.image_size = 32  # height and width in pixels; the renderer's 64 are averaged

  c.tokenizer = ConfigDict()
  c.tokenizer.vocab_size = 640  # 512 bytes, with and without word end; the others are merges
  c.tokenizer.max_length = 16  # tokens; the longest caption has 13

  c.vae = ConfigDict()
  c.vae.path = ""  # pipeline whose VAE decoder is trained further; '': train a new VAE
  c.vae.channels = (32, 64, 96)  # channels per level, from 32 x 32 pixels to 8 x 8 latents
  c.vae.latent_channels = 4
  c.vae.norm_groups = 8
  c.vae.kl_weight = 1e-5
  c.vae.edge_weight = 0.0  # weight of the error of differences between neighbouring pixels
  c.vae.batch_size = 24
  c.vae.num_updates = 3_600
  c.vae.lr = 2e-3
  c.vae.warmup_updates = 100
  c.vae.decay = 0.7  # share of the updates at the end over which lr falls to 0

  c.text = ConfigDict()
  c.text.width = 128
  c.text.layers = 2
  c.text.heads = 4

  c.unet = ConfigDict()
  c.unet.channels = (64, 128)
  c.unet.attention = (False, True)  # whether a level has self- and cross-attention
  c.unet.heads = (2, 4)
  c.unet.layers_per_block = 1
  c.unet.prediction_type = "v_prediction"  # or 'epsilon', or 'flow_prediction': flow matching

  c.noise = ConfigDict()  # levels of flow matching; others are uniform timesteps
  c.noise.density = "uniform"  # before the shift: 'uniform', 'logit_normal' or 'mode'
  c.noise.mean = 0.0  # of logit_normal's logits; above 0: more noise
  c.noise.std = 1.0  # of logit_normal's logits
  c.noise.scale = 1.29  # of 'mode'; above 0: more levels in the middle
  c.noise.shift = 1.0  # above 1: more noise; written to the scheduler's file, also for sampling

  c.denoiser = ConfigDict()
  c.denoiser.path = ""  # pipeline whose text encoder and UNet are trained further; '': new ones
  c.denoiser.batch_size = 32
  c.denoiser.num_updates = 24_000
  c.denoiser.lr = 1.5e-3
  c.denoiser.warmup_updates = 300
  c.denoiser.decay = 0.4
  c.denoiser.weight_decay = 0.01
  c.denoiser.clip_norm = 1.0
  c.denoiser.prompt_dropout = 0.1  # share of rows trained with an empty prompt
  c.denoiser.ema_decay = 0.999

  c.log_every = 100  # updates between logged metrics
  c.save_every = 500  # updates between checkpoints

  if preset == "flow":
    c.unet.prediction_type = "flow_prediction"
    c.noise.density = "logit_normal"  # Esser et al., 2024
  if preset in ("more", "decoder"):
    c.seed = 1  # gives another corpus and other noise
    c.vae.path = c.denoiser.path = "shapes"
    c.vae.num_updates = c.denoiser.num_updates = 0
  if preset == "more":
    c.denoiser.num_updates = 21_000
    c.denoiser.lr = 1e-3
    c.denoiser.decay = 0.9
  if preset == "decoder":
    c.vae.edge_weight = 1.0
    c.vae.batch_size = 32
    c.vae.num_updates = 2_400
    c.vae.lr = 1e-3
    c.vae.decay = 0.9

  if preset == "tiny":
    c.corpus.num_images = 64
    c.corpus.image_size = 16
    c.vae.channels = (8, 8)
    c.unet.channels = (32,)
    c.unet.attention = (False,)  # the middle block has attention
    c.unet.heads = (2,)
    c.text.layers = 1
    c.text.width = 16
    for stage in (c.vae, c.denoiser):
      stage.batch_size = 4
      stage.num_updates = 2
      stage.warmup_updates = 1
    c.log_every = 1
    c.save_every = 1
  return c
