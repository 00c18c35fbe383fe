"""Alarms of online training: what happens to what the reward does not measure.

Every few updates the policy samples images for a few prompts of the evaluation, from the noise
of the base's images. Logged are the trained scorers, the others of the evaluation, the Vendi
score and the divergence from the base. If a trained scorer has risen and another has fallen,
by the rule of `reward_hacking`, the alarm says so.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from jaxpref import base_config, rng, scorers, sharding
from jaxpref.data import encode
from jaxpref.diffusion import guidance as guidance_lib
from jaxpref.diffusion import sampler, schedule, timesteps
from jaxpref.evaluation import comparisons, diversity, reward_hacking, sampling, vendi
from jaxpref.models import lora
from jaxpref.models import vae as vae_lib
from jaxpref.models.denoiser import Denoise
from jaxpref.models.pipeline import Pipeline
from jaxpref.rewards import likelihood
from jaxpref.runtime import distributed, watchdog
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.training.setup import Prepared

_RESAMPLES = 2000
_log = logging.getLogger(__name__)


class Alarms:
  """The looks of a run at its policy; none without the configuration's section `alarms`.

  Attributes:
    said: sentences about contradictions at the last look, perhaps none.
  """

  def __init__(self, prepared: Prepared, workdir: Path):
    """Prepares looks; nothing is sampled yet.

    Args:
      prepared: the run's input.
      workdir: the run's, where `alarms/<update>.json` gets the scores of each image.
    """
    self._prepared, self._directory = prepared, workdir / "alarms"
    self._settings = prepared.config.get("alarms")
    self._look: Callable[[Any, Any], tuple[np.ndarray, np.ndarray]] | None = None
    self._base_scores: dict[str, list[float]] | None = None
    self._metrics: dict[str, float] = {}
    self.said: list[str] = []

  def after(self, done: int, policy: Any, base: Any) -> dict[str, float]:
    """Looks if it is due after `done` updates; returns the last look's metrics.

    Args:
      done: number of updates done.
      policy: the denoiser's parameters.
      base: the base's.

    Raises:
      UserError: a scorer fails.
    """
    every = self._settings.every if self._settings else 0
    if every and done % every == 0:
      self._look_at(policy, base, done)
    return self._metrics

  @property
  def stops(self) -> bool:
    """Whether the run should stop for what the last look has found."""
    return bool(self.said) and self._prepared.config.train.stop_on_hacking

  def _look_at(self, policy: Any, base: Any, done: int) -> None:
    """Samples from policy and, the first time, base; renews the metrics and `said`."""
    prepared, settings = self._prepared, self._settings
    prompts = prepared.prompts[: settings.num_prompts]
    if self._look is None:
      self._look = _make_look(prepared, prompts, settings.images_per_prompt)
    captions = list(np.repeat(prompts, settings.images_per_prompt))
    names = tuple(
      dict.fromkeys((*base_config.trained_scorers(prepared.config), *prepared.scorers))
    )
    if self._base_scores is None:
      images, _ = self._look(lora.without_additions(base, policy), base)
      self._base_scores = distributed.first(lambda: _score(names, images, captions))
    images, divergence = self._look(policy, base)
    before = self._base_scores
    found = distributed.first(lambda: _judge(prepared, names, images, captions, before))
    kl = divergence.mean(axis=1)
    self.said = found["said"]
    self._metrics = {
      **{f"alarm/{name}": float(np.mean(of)) for name, of in found["scores"].items()},
      "alarm/vendi": found["vendi"],
      "alarm/kl": float(kl.sum()),
    }
    record = {**found, "prompts": prompts, "kl_by_step": kl.tolist(), "base": before}
    file = self._directory / f"{done}.json"
    distributed.first(lambda: workdir_lib.write_json(file, record))
    for sentence in self.said:
      _log.warning("after update %d: %s", done, sentence)


def role_of(config: ConfigDict) -> str:
  """Returns what the scorers of `trained_scorers` are to a run, after "which"."""
  trained = "steps" in config and config.steps.judge
  return "stands for the trained judge" if trained else "is trained on"


def _make_look(prepared: Prepared, prompts: Sequence[str], each: int) -> Callable:
  """Makes `look(params, base) -> (images uint8 [N, H, W, 3], divergences [steps, N])`."""
  config, pipeline, mesh = prepared.config, prepared.pipeline, prepared.mesh
  guidance = config.evaluate.guidance
  denoise = pipeline.make_denoise(
    attention=config.model.attention, norm=config.model.norm, mesh=mesh, guidance=guidance
  )
  program = make_sampler(
    *(denoise, pipeline),
    num_steps=config.evaluate.num_steps,
    guidance=pipeline.classifier_free_scale(guidance),
  )
  cond = encode.encode_prompts(pipeline, mesh, prompts)
  uncond = sharding.replicate(encode.encode_no_prompt(pipeline, mesh), mesh)
  seeds = sampling.seeds_of(len(prompts), each, seed=config.evaluate.seed)
  rows = np.repeat(np.arange(len(prompts)), each)
  size = sharding.round_up(min(config.evaluate.batch_size, len(seeds)), mesh)

  def look(params, base):
    vae = sharding.place_params(pipeline.params["vae"], mesh)
    found = []
    for start in range(0, len(seeds), size):
      index = np.arange(start, start + size).clip(max=len(seeds) - 1)
      batch = ({name: of[rows[index]] for name, of in cond.items()}, seeds[index])
      placed = sharding.place_batch(batch, mesh)
      made = program(params, base, vae, placed[0], uncond, placed[1])
      pixels, divergence = map(sharding.to_host, made)
      real = min(size, len(seeds) - start)  # the last batch is padded
      found.append((pixels[:real], divergence[:, :real]))
      watchdog.beat()
    images, divergences = zip(*found, strict=True)
    return np.concatenate(images), np.concatenate(divergences, axis=1)

  return look


def make_sampler(
  denoise: Denoise, pipeline: Pipeline, *, num_steps: int, guidance: float
) -> Callable:
  """Makes the jitted program that samples with DPM-Solver++ and measures the divergence.

  Args:
    denoise: (params, x_t, t, cond) -> prediction.
    pipeline: the schedule, the VAE's module, and the solver's usual timesteps.
    num_steps: solver steps.
    guidance: classifier-free guidance scale, of policy and base.

  Returns:
    `sample(params, base, vae_params, cond, uncond, seeds) -> (pixels, divergences)`: uint8
    [B, H, W, 3], and nats by step and image, [num_steps, B], see `likelihood.ancestral_kl`.
    `cond` is a tree of [B, ...], `uncond` of [1, ...], `seeds` uint32 [B].
  """
  shape, noises = pipeline.latent_shape, pipeline.schedule

  @jax.jit
  def sample(params, base, vae_params, cond, uncond, seeds):
    def guided(weights):
      return guidance_lib.classifier_free(
        functools.partial(denoise, weights), cond, uncond, guidance
      )

    keys = jax.vmap(lambda s: rng.key_of(0, "generate", s))(seeds)
    grid = timesteps.uniform_grid(
      *(noises, num_steps, len(seeds)),
      **pipeline.spacing(),
      tokens=timesteps.image_tokens(shape),
    )
    latents, path = sampler.sample(
      *(guided(params), sampler.initial_noise(keys, shape), grid, noises), trajectory=True
    )

    def compare(_, step):
      x_t, prediction, t, *log_snr = step
      of_base = guided(base)(x_t, schedule.timestep_input(noises, t))
      clean = [
        schedule.split_at(noises.prediction_type, of, x_t, log_snr[0])[0]
        for of in (prediction, of_base)
      ]
      return None, likelihood.ancestral_kl(*clean, *log_snr)

    levels = grid.log_snr[:-1], grid.log_snr[1:]
    steps = (path.states, path.predictions, path.timesteps, *levels)
    _, divergences = jax.lax.scan(compare, None, steps)
    return vae_lib.decode(pipeline.modules["vae"], vae_params, latents).pixels, divergences

  return sample


def _score(
  names: Sequence[str], images: np.ndarray, captions: Sequence[str]
) -> dict[str, list[float]]:
  loaded = scorers.load_scorers(names)
  return {
    name: scorers.score(name, function, images, captions).tolist()
    for name, (_, function) in loaded.items()
  }


def _judge(
  prepared: Prepared,
  names: Sequence[str],
  images: np.ndarray,
  captions: Sequence[str],
  before: dict[str, list[float]],
) -> dict[str, Any]:
  """Scores the policy's images, and compares them with the base's."""
  scores = _score(names, images, captions)
  prompts = list(dict.fromkeys(captions))
  versions = {name: version for name, (version, _) in scorers.load_scorers(names).items()}
  rows = pd.DataFrame(
    {
      "model": model,
      "prompt_id": prompts.index(caption),
      "seed": i,
      "prompt": caption,
      "category": scorers.UNCATEGORIZED,
      "scorer": name,
      "version": versions[name],
      "score": of[name][i],
    }
    for model, of in (("base", before), ("policy", scores))
    for name in names
    for i, caption in enumerate(captions)
  )
  found = comparisons.compare_all(
    rows,
    baseline="base",
    seed=prepared.config.evaluate.seed,
    resamples=_RESAMPLES,
    selected_by=base_config.trained_scorers(prepared.config),
  )
  said = reward_hacking.find_hacking(found, role=role_of(prepared.config))
  spread = vendi.vendi_score(diversity.pixel_features(images))
  return {"scores": scores, "vendi": spread, "said": said}
