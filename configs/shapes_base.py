r"""The base pipeline of the shapes world, trained from scratch on its flawed corpus.

  python -m jaxpref.pretrain --config=configs/shapes_base.py
  python -m jaxpref.pretrain --config=configs/shapes_base.py:more
  python -m jaxpref.pretrain --config=configs/shapes_base.py:decoder

Three stages: a VAE on the corpus's images, then its text encoder and UNet together on the
latents, then the export to `<workdir>/pipeline` in diffusers' directory layout, with a model
card. Each is resumable: the same command continues where it was stopped.

The presets `more` and `decoder` train on what there is: `more` the text encoder and UNet of
the bundled pipeline, on as many new images; `decoder` the VAE's decoder alone, towards
sharper edges, which leaves latents and UNet as they are. How the bundled pipeline was made is
on its model card.
"""

from ml_collections import ConfigDict

PRESETS = ("shapes", "more", "decoder", "tiny")


def get_config(preset: str = "shapes") -> ConfigDict:
  """Settings of the run; `more` and `decoder` go on, `tiny` is it in seconds, for tests."""
  c = ConfigDict()
  c.name = "shapes_base"
  c.preset = preset
  c.seed = 0

  c.corpus = ConfigDict()
  c.corpus.num_images = 60_000  # rendered once, with the flaws of web data
  c.corpus.image_size = 32  # pixels; the renderer's 64 are averaged down

  c.tokenizer = ConfigDict()
  c.tokenizer.vocab_size = 640  # 512 bytes with and without word end, the rest merges
  c.tokenizer.max_length = 16  # tokens; the longest caption of this world takes 13

  c.vae = ConfigDict()
  c.vae.path = ""  # the pipeline whose VAE is kept, and of it only the decoder trained on
  c.vae.channels = (32, 64, 96)  # of each level, 32 x 32 pixels to 8 x 8 latents
  c.vae.latent_channels = 4
  c.vae.norm_groups = 8
  c.vae.kl_weight = 1e-5
  c.vae.edge_weight = 0.0  # of the error of steps between neighbouring pixels
  c.vae.batch_size = 24
  c.vae.num_updates = 3_600
  c.vae.lr = 2e-3
  c.vae.warmup_updates = 100
  c.vae.decay = 0.7  # the last share of the updates, over which lr falls to 0

  c.text = ConfigDict()
  c.text.width = 128
  c.text.layers = 2
  c.text.heads = 4

  c.unet = ConfigDict()
  c.unet.channels = (64, 128)
  c.unet.attention = (False, True)  # levels with self- and cross-attention
  c.unet.heads = (2, 4)
  c.unet.layers_per_block = 1
  c.unet.prediction_type = "v_prediction"

  c.denoiser = ConfigDict()
  c.denoiser.path = ""  # the pipeline whose text encoder and UNet are trained on; '' for none
  c.denoiser.batch_size = 32
  c.denoiser.num_updates = 24_000
  c.denoiser.lr = 1.5e-3
  c.denoiser.warmup_updates = 300
  c.denoiser.decay = 0.4
  c.denoiser.weight_decay = 0.01
  c.denoiser.clip_norm = 1.0
  c.denoiser.prompt_dropout = 0.1  # share of rows trained without their prompt
  c.denoiser.ema_decay = 0.999

  c.log_every = 100  # updates
  c.save_every = 500  # updates

  if preset in ("more", "decoder"):
    c.seed = 1  # another corpus, other noise
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
    c.unet.attention = (False,)  # but in the middle
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
