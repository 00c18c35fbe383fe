"""Presets: the values of fields that differ from `shapes`, for all methods.

`sd15` and `sdxl` train Stable Diffusion 1.5 and SDXL, `sd35m`, `sana` and `flux` the
flow-matching models Stable Diffusion 3.5 Medium, SANA 0.6B (512 pixels) and Flux.1-dev. They
are the published recipe of a method if it has one; each configuration file names its source.

Learning rate, batch size, warm-up, number of updates and prompt dropout without a source of
their own are those of Diffusion-DPO's launchers
(https://github.com/SalesforceAIResearch/DiffusionDPO), which later methods reuse. These
launchers also sample latents from the VAE's posterior at each update and encode dropped prompts
as "". There are two differences: they use Adafactor for SDXL, and these presets use AdamW; they
flip images at random, which here takes `--config.data.flip=true`. It is off except for DRO and
SFT because it doubles the memory that the rows take. The evaluation, on captions of the
training images and with a seed of its own, has no published source.

`sd35m` has the optimizer of Flow-GRPO's code (https://github.com/yifan123/flow_grpo), where DPO
trains this model: LoRA of rank 32 with alpha 64 on the eight projections of the joint
attention, AdamW at 3e-4 with a weight decay of 1e-4, gradients clipped at 1, logit-normal(0, 1)
levels with the model's shift, errors of the velocity, 40 solver steps with guidance 4.5. Its
average has the decay 0.9 at every eighth update, which is 0.987 at each. Images have 512
pixels there and here; `--config.model.image_size=1024` trains at the model's own size. Batch
size and number of updates are our choices.

`sana` has no published recipe of preference training. All parameters are trained, in bfloat16
with float32 masters. The optimizer is that of `sd15`, the nearest that trains all parameters.
The levels are those of SANA's pretraining (https://github.com/NVlabs/Sana), logit-normal(0, 1)
with shift 3; steps and guidance are the defaults of its pipeline.

`flux` has no published recipe of preference training on pairs. LoRA, optimizer, batch and
density of the levels are those of `sd35m`, the nearest that trains LoRA; its levels are not
shifted in training, as in diffusers' script for LoRA on this model. The network was distilled
from guidance and is given the scale: 1 in training, as in that script's documentation
(https://github.com/huggingface/diffusers/blob/main/examples/dreambooth/README_flux.md); 3.5 in
sampling, with 28 steps, the defaults of its pipeline. It trains at 1024 pixels.
"""

from ml_collections import ConfigDict

LORA_FLOWS = ("sd35m", "flux")  # flow-matching models of which LoRA is trained
FLOWS = ("sd35m", "sana", "flux")  # flow-matching models
PUBLISHED = ("sd15", "sdxl", *FLOWS)  # models to be downloaded
PRESETS = ("shapes", *PUBLISHED, "tiny")
NO_FLOWS = tuple(name for name in PRESETS if name not in FLOWS)
_JOINT = (
  r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0"
  r"|add_q_proj|add_k_proj|add_v_proj|to_add_out)$"
)
_TARGETS = {  # of LoRA, by PyTorch's names
  "sd35m": _JOINT,
  "sana": r"transformer_blocks\.\d+\.attn[12]\.to_[qkv]$",
  "flux": _JOINT,
}
_SAMPLING = {"sd35m": (40, 4.5), "sana": (20, 4.5), "flux": (28, 3.5)}  # steps and guidance


def apply(c: ConfigDict) -> None:
  """Sets the fields of the configuration's preset."""
  if c.preset in PUBLISHED:
    _scale_up(c)
  if c.preset in FLOWS:
    _match_flows(c)
  if c.preset == "tiny":
    _scale_down(c)


def _scale_up(c: ConfigDict) -> None:
  """Sets the fields of the presets of published models."""
  c.model.path = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd35m": "stabilityai/stable-diffusion-3.5-medium",
    "sana": "Efficient-Large-Model/Sana_600M_512px_diffusers",
    "flux": "black-forest-labs/FLUX.1-dev",
  }[c.preset]
  c.model.dtype = c.model.frozen_dtype = "bfloat16"
  c.model.remat = "blocks"  # a fifth more compute, a thirtieth of the memory
  c.data.source = "pickapic"
  c.data.latents = "sample"
  c.rollout.num_steps = 20
  c.rollout.batch_size = 64  # a quarter of Diffusion-DRO's rows
  c.optim.lr = 2.048e-5  # 1e-8 per row of the batch
  c.optim.warmup_updates = 200 if c.preset == "sdxl" else 500
  c.optim.ema_decay = 0.0  # Diffusion-DPO evaluates the last update's parameters
  c.train.batch_size = 2048
  c.train.accumulate = 64
  c.train.num_updates = 2000
  c.train.updates_per_iteration = 200
  c.evaluate.prompts = "captions"
  c.evaluate.num_prompts = 500
  c.evaluate.images_per_prompt = 5
  c.evaluate.scorers = ()
  c.evaluate.num_steps = 50
  c.evaluate.guidance = 7.5 if c.preset == "sd15" else 5.0
  c.evaluate.batch_size = 16


def _match_flows(c: ConfigDict) -> None:
  """Sets the fields in which flow-matching models differ from other published models."""
  c.lora.targets = _TARGETS[c.preset]
  c.loss.space = "v"
  c.noise.density = "logit_normal"
  c.evaluate.num_steps, c.evaluate.guidance = _SAMPLING[c.preset]
  if c.preset == "sana":
    c.data.latents = "mode"  # its VAE has no posterior
    return
  if c.preset == "sd35m":
    c.model.image_size = 512
  c.lora.rank, c.lora.alpha = 32, 64.0
  c.optim.lr = 3e-4
  c.optim.warmup_updates = 0
  c.optim.weight_decay = 1e-4
  c.optim.ema_decay = 0.987
  c.train.batch_size, c.train.accumulate = 128, 8


def _scale_down(c: ConfigDict) -> None:
  """Sets the fields of the preset `tiny`."""
  c.data.num_experts = 16
  c.data.num_rows = 16
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
