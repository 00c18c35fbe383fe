"""What the preference methods' configurations share; each file says what it changes.

`shapes` runs on the bundled pipeline and the embedded world, in minutes, without an
accelerator. `sd15` and `sdxl` are for Stable Diffusion 1.5 and SDXL, on Pick-a-Pic from local
files (`--config.data.path=DIR`): the published recipe where a method has one, and otherwise
settings of ours; each file says which. Learning rate, batch, warm-up, updates and prompt
dropout that a file does not give a source for are those of Diffusion-DPO's launchers
(https://github.com/SalesforceAIResearch/DiffusionDPO), which later methods took over. As there,
latents are sampled from the VAE's posterior at each update and dropped prompts are "" encoded.
They use Adafactor for SDXL where AdamW is ours, and flip images at random, which here is
`--config.data.flip=true`: off but for DRO and SFT, as it takes twice the memory. The
evaluation, on captions of the training images with a seed of its own, is ours. `tiny` is
`shapes` cut down to seconds, for tests.
"""

from ml_collections import ConfigDict

PRESETS = ("shapes", "sd15", "sdxl", "tiny")


def base(name: str, preset: str) -> ConfigDict:
  """Every field with its default and what it means."""
  c = ConfigDict()
  c.name = name  # of the run and its default workdir
  c.preset = preset  # chosen with the file, as in --config=dro:tiny
  c.seed = 0  # of everything random; same seed, same numbers
  c.profile = 0  # updates to trace, from the third on, into <workdir>/profile

  c.model = ConfigDict()
  c.model.path = "shapes"  # 'shapes', a directory in diffusers' layout, or a hub id
  c.model.variant = ""  # of its weights, such as fp16; '': the full ones, where there are
  c.model.unet = ""  # another UNet than the pipeline's: a directory, or a hub id
  c.model.vae = ""  # another VAE
  c.model.clip_skip = 0  # last layers of text encoders left out for prompts, as in diffusers
  c.model.start = ""  # a run or pipeline whose UNet training begins with; '': the base's
  c.model.dtype = "float32"  # of the computation; parameters and moments are float32
  c.model.frozen_dtype = "float32"  # in which the base is held besides what is trained
  c.model.attention = "auto"  # 'stock', 'xla', 'cudnn', 'splash'; 'auto': by platform
  c.model.norm = "auto"  # 'lean' keeps less for the backward pass; 'stock'; 'auto': by platform
  c.model.remat = "none"  # 'transformer', 'blocks', 'full' compute twice what they do not keep

  c.data = ConfigDict()
  c.data.source = "shapes"  # 'pickapic' (parquet), 'folder' (captioned images), 'online'
  c.data.path = ""  # of the folder or file
  c.data.split = "train"  # of files or folders named by split; 'all': every one
  c.data.follow_links = False  # also those of a folder's links that lead out of it
  c.data.max_bad_share = 0.25  # of rows that cannot be used; with more, the data is refused
  c.data.num_experts = 500  # the best K images by score; of a folder K at random; 0: all
  c.data.experts = "top"  # 'top': by score; 'winners': every pair's preferred image
  c.data.num_rows = 0  # of pairs, singles or lists, for losses that learn from them; 0: all
  c.data.min_change = 0.0  # of drawn pairs: latents' distance (RMS) below which one is left out
  c.data.desirable_share = 0.8  # of liked images among the singles of a batch, on average
  c.data.good_prefix = ""  # before the prompts of liked singles, and of tuned pictures
  c.data.bad_prefix = ""  # before the prompts of the other singles
  c.data.list_size = 4  # images of a ranked list
  c.data.noise_draws = 0  # fixed draws a row, whose reference errors are computed once; 0: new
  c.data.prompt_dropout = 0.2  # share of rows trained with an empty prompt
  c.data.dropped_prompt = "empty"  # is "" encoded; 'unconditional': as guidance has it
  c.data.latents = "mode"  # of the VAE's posterior, or a 'sample' of it at each update
  c.data.flip = False  # add each image's mirror image; not where left and right matter

  c.loss = ConfigDict()
  c.loss.name = name  # a file of jaxpref/losses, a registered name, or a module
  c.loss.reference = "start"  # where it has one: what training begins with, or 'base'

  c.rollout = ConfigDict()  # how the policy draws its own samples, where the loss asks
  c.rollout.solver = "dpm_solver"  # 'dpm_solver' (++, multistep), 'ddim' or 'ddpm'
  c.rollout.order = 2  # of the DPM-Solver, 1 to 3
  c.rollout.num_steps = 10  # from noise to image
  c.rollout.guidance = 1.0  # classifier-free guidance scale; at most 1: none
  c.rollout.refresh_every = 1  # updates after which the sampling copy of the policy is renewed
  c.rollout.states = 1  # of each trajectory to train on, evenly spaced
  c.rollout.batch_size = 8  # rows drawn at once, each lot as far as it is needed; 0: all
  c.rollout.replay = 0  # updates whose samples are also trained on later, as an ablation

  c.lora = ConfigDict()  # train low-rank additions in the place of all parameters
  c.lora.rank = 0  # of the additions; 0 trains all parameters
  c.lora.alpha = 8.0  # the additions are scaled by alpha / rank
  c.lora.targets = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)$"  # layers, by PyTorch's names

  c.optim = ConfigDict()
  c.optim.lr = 3e-4  # peak learning rate
  c.optim.schedule = "constant"  # 'constant', 'linear', 'cosine' or 'trapezoid'
  c.optim.warmup_updates = 0  # of the schedule, from lr / warmup_updates to lr
  c.optim.weight_decay = 0.01  # AdamW's
  c.optim.b1 = 0.9  # decay of AdamW's mean of gradients
  c.optim.b2 = 0.999  # decay of AdamW's mean of their squares
  c.optim.eps = 1e-8  # AdamW's, added to the root of the latter
  c.optim.clip_norm = 1.0  # global gradient norm
  c.optim.ema_decay = 0.9999  # limit of the moving average's ramp (1 + n) / (10 + n)

  c.train = ConfigDict()
  c.train.batch_size = 32  # rows per update, over all devices and micro-batches
  c.train.accumulate = 1  # micro-batches per update
  c.train.num_updates = 300  # of the parameters; a finished run continues if it is raised
  c.train.updates_per_iteration = 50  # between checkpoints
  c.train.log_every = 10  # updates
  c.train.keep = 2  # newest checkpoints kept
  c.train.checkpoints = ""  # where: a directory or gs://...; by default in the workdir
  c.train.max_skipped = 10  # updates of the run that were not finite; with more it ends
  c.train.hang_minutes = 30.0  # without progress until a process ends itself; 0: never

  c.mesh = ConfigDict()
  c.mesh.data = -1  # devices that split the batch; -1 fills up
  c.mesh.fsdp = 1  # devices that also split large parameters

  c.evaluate = ConfigDict()  # at the end, base against tuned, same prompts and noise
  c.evaluate.every = 0  # also after so many checkpoints each; the best one stays; 0: no
  c.evaluate.prompts = "auto"  # 'shapes': held-out ones; 'captions'; a text file; 'auto'
  c.evaluate.num_prompts = 150  # at most
  c.evaluate.images_per_prompt = 2  # each with noise of its own, the same for both models
  c.evaluate.scorers = ("shapes.correct", "shapes.quality")  # modules of jaxpref/scorers
  c.evaluate.num_steps = 20  # of DPM-Solver++ (2M)
  c.evaluate.guidance = 2.0  # classifier-free guidance scale; at most 1: none
  c.evaluate.batch_size = 50  # images at once
  c.evaluate.seed = 3000  # of the noise and of the choice of prompts
  c.evaluate.num_examples = 24  # pairs shown in the report

  if preset in ("sd15", "sdxl"):
    c.model.path = {
      "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
      "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    }[preset]
    c.model.dtype = c.model.frozen_dtype = "bfloat16"
    c.model.remat = "blocks"  # a fifth more work, a thirtieth of the memory
    c.data.source = "pickapic"
    c.data.latents = "sample"
    c.rollout.num_steps = 20
    c.rollout.batch_size = 64  # a quarter of Diffusion-DRO's rows
    c.optim.lr = 2.048e-5  # 1e-8 a row of the batch
    c.optim.warmup_updates = {"sd15": 500, "sdxl": 200}[preset]
    c.optim.ema_decay = 0.0  # what is compared is the last update, as there
    c.train.batch_size = 2048
    c.train.accumulate = 64
    c.train.num_updates = 2000
    c.train.updates_per_iteration = 200
    c.evaluate.prompts = "captions"
    c.evaluate.num_prompts = 500
    c.evaluate.images_per_prompt = 5
    c.evaluate.scorers = ()
    c.evaluate.num_steps = 50
    c.evaluate.guidance = 7.5 if preset == "sd15" else 5.0
    c.evaluate.batch_size = 16

  if preset == "tiny":
    c.data.num_experts = 16
    c.data.num_rows = 0 if name in ("sft", "spin", "dro") else 16  # those learn from experts
    c.data.list_size = 3
    c.rollout.num_steps = 2
    c.rollout.batch_size = 4
    c.train.batch_size = 8
    c.train.num_updates = 4
    c.train.updates_per_iteration = 2
    c.train.log_every = 1
    c.evaluate.num_prompts = 6
    c.evaluate.images_per_prompt = 1
    c.evaluate.num_steps = 2
    c.evaluate.batch_size = 8
    c.evaluate.num_examples = 2
  return c


def improve(c: ConfigDict) -> None:
  """How an improver draws its version of a picture."""
  c.improve = ConfigDict()
  c.improve.text_guidance = 3.5  # s_T: towards the prompt
  c.improve.image_guidance = 3.0  # s_I: towards the picture it is shown
  c.improve.num_steps = c.evaluate.num_steps  # of DPM-Solver++ (2M)


def iterate(c: ConfigDict, *, winners: str) -> None:
  """How the pairs of each iteration are drawn; updates and learning rate are of one of them."""
  c.data.num_rows = 0  # of an iteration's pairs at most so many are trained on
  c.data.min_change = 0.05  # ours
  c.iterate = ConfigDict()
  c.iterate.num_iterations = 3  # each draws pairs with the model before it and trains on them
  c.iterate.num_pairs = 500  # drawn in each
  c.iterate.winners = winners  # the 'data' images, or the losers 'improved'
  c.iterate.improver = ""  # that improves them: a run of configs/improver.py, or a pipeline
  c.iterate.guidance = c.evaluate.guidance  # of the losers; at most 1: none
  c.iterate.num_steps = c.evaluate.num_steps  # of DPM-Solver++ (2M)
  c.iterate.batch_size = c.evaluate.batch_size  # images at once
  c.iterate.shard_size = 250  # pairs in a file; an interrupted one is drawn anew
  improve(c)
  if c.preset == "tiny":
    c.iterate.num_iterations = 2
    c.iterate.num_pairs = 12
    c.iterate.shard_size = 8


def train_on_experts(c: ConfigDict) -> None:
  """The recipe of Diffusion-DRO's paper for SD 1.5, in which it compares SFT as well."""
  c.data.flip = True
  c.optim.lr = 1e-4
  c.optim.warmup_updates = 0
  c.optim.ema_decay = 0.9999
  c.train.batch_size = 256
  c.train.accumulate = 16
  c.train.num_updates = 1600
