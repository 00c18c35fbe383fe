"""PyTorch's contenders: as published scripts do the work, made fast, and compiled.

They are written for these timings, from diffusers' PyTorch UNet and schedulers; weights are
random. `side_by_side.RIVALS` describes P0, P1 and P2.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models import attention_processor

Run = Callable[[], None]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Rival:
  """A PyTorch UNet with random inputs, on the GPU if there is one.

  Args:
    config: the UNet's configuration.
    kind: 'P0', 'P1' or 'P2'.
    rows: batch size.
    dtype: of the computation; weights are float32.
    tokens: length of a prompt.
  """

  def __init__(self, config: dict[str, Any], kind: str, *, rows: int, dtype: str, tokens: int):
    torch.manual_seed(0)
    self.device = "cuda" if torch.cuda.is_available() else "cpu"
    self.fast = kind != "P0"
    self.dtype = getattr(torch, dtype)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    unet = UNet2DConditionModel.from_config(config).to(self.device)
    unet.set_attn_processor(attention_processor.AttnProcessor2_0())  # the default, for both
    if self.fast:
      unet = unet.to(memory_format=torch.channels_last)
    self.unet = unet.train()
    self.reference = copy.deepcopy(unet).requires_grad_(False).eval()
    if self.dtype != torch.float32:
      self.reference = self.reference.to(self.dtype)
    self.ema = copy.deepcopy(unet).requires_grad_(False)
    self.policy_copy = copy.deepcopy(unet).requires_grad_(False).eval()
    options = {"fused": True} if self.fast else {}
    self.optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, **options)

    def compiled(module):
      return torch.compile(module, dynamic=False) if kind == "P2" else module

    self.predict = compiled(self.unet)
    self.predict_reference = compiled(self.reference)
    size = config["sample_size"]
    self.latents = self._normal(rows, config["in_channels"], size, size)
    self.text = self._normal(rows, tokens, config["cross_attention_dim"])
    self.extra = {}
    if config.get("addition_embed_type") == "text_time":
      pooled = config["projection_class_embeddings_input_dim"]
      pooled -= 6 * config["addition_time_embed_dim"]
      self.extra = {
        "text_embeds": self._normal(rows, pooled),
        "time_ids": self._normal(rows, 6),
      }
    self.alpha_bar = DPMSolverMultistepScheduler(**BETAS).alphas_cumprod.to(self.device)

  def sft(self) -> None:
    """Makes one update on noised latents."""
    t, noise, x_t = self._noised()
    self._update((self._predict(self.predict, x_t, t) - noise).square().mean())

  def dro(self, num_steps: int) -> None:
    """Makes one update of Diffusion-DRO with the policy's own samples."""
    own, target, t = (self._draw_fast if self.fast else self._draw_slowly)(num_steps)
    _, noise, x_t = self._noised(t)
    error = lambda out, wanted: (out - wanted).square().mean((1, 2, 3))  # noqa: E731
    if self.fast:
      both, wanted = torch.cat([x_t, own]), torch.cat([noise, target])
      policy = error(self._predict(self.predict, both, torch.cat([t, t])), wanted).chunk(2)
      with torch.no_grad():
        out = self._predict(self.predict_reference, both, torch.cat([t, t]))
        reference = error(out, wanted).chunk(2)
    else:
      halves = ((x_t, noise), (own, target))
      policy = [error(self._predict(self.predict, x, t), y) for x, y in halves]
      with torch.no_grad():
        reference = [error(self._predict(self.predict_reference, x, t), y) for x, y in halves]
    lead = (policy[0] - reference[0]) - (policy[1] - reference[1])
    self._update(torch.relu(lead + 1e-3).mean())

  @torch.no_grad()
  def sample(self, num_steps: int, guidance: float) -> None:
    """Samples latents from noise with DPM-Solver++ and guidance."""
    if self.dtype not in (torch.float32, self.unet.dtype):
      self.unet.to(self.dtype)  # once, as in jaxpref, not at every call
    self.unet.eval()
    scheduler = DPMSolverMultistepScheduler(**BETAS)
    scheduler.set_timesteps(num_steps)
    x_t = self._normal(*self.latents.shape)
    text = torch.cat([torch.zeros_like(self.text), self.text])
    for t in scheduler.timesteps:
      both = self._predict(
        self.predict, torch.cat([x_t, x_t]), t.to(self.device).expand(2 * len(x_t)), text
      )
      without, with_text = both.chunk(2)
      x_t = scheduler.step(without + guidance * (with_text - without), t, x_t).prev_sample
    self._wait()

  @torch.no_grad()
  def _draw_slowly(self, num_steps: int):
    """Samples from a copy of the policy, with one scheduler per sample."""
    self.policy_copy.load_state_dict(self.unet.state_dict())  # refreshed at every update
    rows = len(self.latents)
    offsets, picks = self._offsets(num_steps)
    schedulers = []
    for offset in offsets:
      scheduler = DPMSolverMultistepScheduler(**BETAS)
      scheduler.set_timesteps(timesteps=(_base(num_steps) + offset).tolist())
      schedulers.append(scheduler)
    x_t = self._normal(*self.latents.shape)
    kept: list[Any] = [None] * rows
    for k in range(num_steps):
      t = torch.stack([s.timesteps[k] for s in schedulers]).to(self.device)
      out = self._predict(self.policy_copy, x_t, t)
      for i in range(rows):
        if picks[i] == k:
          kept[i] = x_t[i].clone(), out[i].clone(), t[i]
      x_t = torch.cat(
        [
          s.step(out[i : i + 1], s.timesteps[k], x_t[i : i + 1]).prev_sample
          for i, s in enumerate(schedulers)
        ]
      )
    return tuple(torch.stack(part) for part in zip(*kept, strict=True))

  @torch.no_grad()
  def _draw_fast(self, num_steps: int):
    """Samples from the policy, with vectorised steps of DPM-Solver++ (2M)."""
    offsets, picks = self._offsets(num_steps)
    levels = torch.as_tensor(_base(num_steps)[:, None] + offsets[None], device=self.device)
    alpha_bar = torch.cat(
      [self.alpha_bar[levels], torch.ones(1, len(offsets), device=self.device)]
    )
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    lam = (alpha / sigma).log()
    picks = torch.as_tensor(picks, device=self.device)
    wide = lambda x: x[:, None, None, None]  # noqa: E731
    x_t = self._normal(*self.latents.shape)
    kept, target, t_kept = torch.zeros_like(x_t), torch.zeros_like(x_t), levels[0].clone()
    before = None
    for k in range(num_steps):
      out = self._predict(self.predict, x_t, levels[k])
      here = picks == k
      kept = torch.where(wide(here), x_t, kept)
      target = torch.where(wide(here), out, target)
      t_kept = torch.where(here, levels[k], t_kept)
      x0 = (x_t - wide(sigma[k]) * out) / wide(alpha[k])
      if k == num_steps - 1:
        break
      h = lam[k + 1] - lam[k]
      blend = x0
      if before is not None:
        r = (lam[k] - lam[k - 1]) / h
        blend = x0 + wide(0.5 / r) * (x0 - before)
      x_t = wide(sigma[k + 1] / sigma[k]) * x_t - wide(alpha[k + 1] * torch.expm1(-h)) * blend
      before = x0
    return kept, target, t_kept

  def _offsets(self, num_steps: int):
    rng = np.random.default_rng(0)
    rows = len(self.latents)
    return rng.integers(1000 // num_steps, size=rows), rng.integers(num_steps, size=rows)

  def _noised(self, t: Any = None):
    rows = len(self.latents)
    t = torch.randint(1000, (rows,), device=self.device) if t is None else t
    noise = torch.randn_like(self.latents)
    alpha_bar = self.alpha_bar[t][:, None, None, None]
    return t, noise, alpha_bar.sqrt() * self.latents + (1 - alpha_bar).sqrt() * noise

  def _predict(self, unet: Any, x_t: Any, t: Any, text: Any = None) -> Any:
    times = len(x_t) // len(self.latents)
    text = torch.cat([self.text] * times) if text is None else text
    extra = {name: torch.cat([value] * times) for name, value in self.extra.items()}
    if self.fast:
      x_t = x_t.contiguous(memory_format=torch.channels_last)
    with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
      return unet(x_t, t, text, added_cond_kwargs=extra or None, return_dict=False)[0].float()

  def _update(self, loss: Any) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
      averages, values = list(self.ema.parameters()), list(self.unet.parameters())
      if self.fast:
        torch._foreach_lerp_(averages, values, 1e-4)
      else:
        for average, value in zip(averages, values, strict=True):
          average.lerp_(value, 1e-4)
    self._wait()

  def _normal(self, *shape: int) -> Any:
    return torch.randn(*shape, device=self.device)

  def _wait(self) -> None:
    if self.device == "cuda":
      torch.cuda.synchronize()


def _base(num_steps: int) -> np.ndarray:
  return 1000 - (1000 // num_steps) * np.arange(1, num_steps + 1)
