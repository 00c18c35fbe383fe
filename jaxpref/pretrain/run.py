"""The pretraining run: corpus, tokenizers, VAE, latents, denoiser, export; all resumable."""

import dataclasses
import functools
import hashlib
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import base_config, sharding
from jaxpref import config as config_lib
from jaxpref.data import encode
from jaxpref.diffusion import flow
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.errors import UserError
from jaxpref.models import denoiser as denoiser_lib
from jaxpref.models import pipeline as pipeline_lib
from jaxpref.models import save, text
from jaxpref.models import vae as vae_lib
from jaxpref.pretrain import card, clip_encoder, fit, mmdit_base, preference_run, unet_base
from jaxpref.pretrain import train_denoiser as train_denoiser_lib
from jaxpref.pretrain import train_vae as vae_stage
from jaxpref.runtime import cli, jax_setup
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.shapes import corpus, prompts

STAGES = ("vae", "denoiser")
# Until the learning rate falls, a run does not depend on the number of its updates.
RESUME_SAFE = ("log_every", "save_every", "denoiser.num_updates")
BASES: Mapping[str, Any] = {"stable_diffusion": unet_base, "sd3": mmdit_base}
_SHARES = ("vae.decay", "denoiser.decay", "denoiser.prompt_dropout", "denoiser.ema_decay")
RULES: config_lib.Rules = {
  **dict.fromkeys(
    ("corpus.num_images", "log_every", "save_every", *(f"{s}.batch_size" for s in STAGES)),
    (lambda value: value >= 1, "at least 1"),
  ),
  **dict.fromkeys(
    (f"{s}.{name}" for s in STAGES for name in ("num_updates", "warmup_updates")),
    (lambda value: value >= 0, "at least 0"),
  ),
  **dict.fromkeys(
    (
      *("tokenizer.vocab_size", "tokenizer.max_length", "text.width", "text.layers"),
      *("text.heads", "vae.latent_channels", "vae.norm_groups", "unet.layers_per_block"),
      *("text.head_dim", "mmdit.head_dim", "mmdit.heads", "mmdit.layers", "mmdit.patch_size"),
    ),
    (lambda value: 1 <= value <= 65_536, "between 1 and 65,536"),
  ),
  **dict.fromkeys(
    ("vae.channels", "unet.channels", "unet.heads", "text.widths"),
    (lambda values: all(1 <= n <= 65_536 for n in values), "between 1 and 65,536 each"),
  ),
  "family": (lambda value: value in BASES, f"one of {', '.join(BASES)}"),
  **dict.fromkeys(
    ("vae.kl_weight", "vae.edge_weight", "vae.lr", "denoiser.lr", "denoiser.weight_decay"),
    (lambda value: 0 <= value < math.inf, "at least 0 and finite"),
  ),
  **dict.fromkeys(_SHARES, (lambda value: 0 <= value <= 1, "between 0 and 1")),
  **{name: rule for name, rule in base_config.RULES.items() if name.startswith("noise.")},
  "noise.shift": (lambda value: 0 < value < math.inf, "positive and finite"),
  "denoiser.clip_norm": (lambda value: value > 0, "positive"),
  "seed": (lambda value: 0 <= value < 2**31, "at least 0 and below 2^31"),
  "corpus.image_size": (lambda value: value in (16, 32, 64), "16, 32 or 64"),
}


def main(argv: list[str]) -> int:
  """Runs the pretraining; returns the exit status."""
  return cli.exit_status(_main, argv)


def _main(argv: list[str]) -> None:
  config, flags = config_lib.parse_args(argv, flags=cli.FLAGS)
  preference = "preference" in config
  config_lib.validate(config, preference_run.RULES if preference else RULES)
  # What can be refused is refused before anything is written.
  if preference:
    inputs = preference_run.prepare(config)
    program, what = functools.partial(preference_run.run, inputs), "model"
  else:
    card.check_plots()
    program, what = functools.partial(run, prepare(config)), "pipeline"
  path = flags.get("workdir") or workdir_lib.default_workdir(config)
  workdir = workdir_lib.open_workdir(path, config, resume_safe=RESUME_SAFE)
  workdir_lib.write_config(workdir.path, config)
  try:
    print(f"the {what} is in {program(workdir.path)}")
  finally:
    workdir_lib.release(workdir)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A run's configuration, its mesh, and the pipelines that its weights begin from, if any."""

  config: ConfigDict
  mesh: Mesh
  base: Any  # module with what is the family's own, one of `BASES`
  vae_from: pipeline_lib.Pipeline | None
  denoiser_from: pipeline_lib.Pipeline | None
  text_from: pipeline_lib.Pipeline | None


def prepare(config: ConfigDict) -> Prepared:
  """Reads everything that a run needs.

  Raises:
    UserError: the number of devices does not divide a batch, or the pipeline that the weights
      begin from is missing or does not fit.
  """
  jax_setup.cache_programs()
  base = BASES[config.family]
  make_schedule(config)  # refuses settings of the levels
  mesh = sharding.make_mesh()
  for stage in STAGES:
    if config[stage].num_updates:
      sharding.check_batch(config[stage].batch_size, mesh, section=stage)
    elif not config[stage].path:
      raise UserError(
        f"{stage}.num_updates is 0 and {stage}.path is empty: train the {stage}, or name a "
        "pipeline that has one"
      )
  trained = [base.FAMILY.denoiser, *base.ENCODERS]
  return Prepared(
    *(config, mesh, base),
    vae_from=_load(config, "vae", ["vae"]),
    denoiser_from=_load(config, "denoiser", trained),
    text_from=_load(config, "text", base.ENCODERS[:1]),
  )


def make_schedule(config: ConfigDict) -> schedule_lib.Schedule:
  """Makes the schedule of training levels, see `train_denoiser.make_schedule`."""
  base = BASES[config.family]
  scheduler = base.scheduler_config(config)
  return train_denoiser_lib.make_schedule(base.FAMILY, scheduler, config.noise)


def _load(
  config: ConfigDict, section: str, parts: Sequence[str]
) -> pipeline_lib.Pipeline | None:
  """Loads the pipeline in the section's `path`, if set, and checks the parts."""
  path = config[section].get("path")
  if not path:
    return None
  pipeline = pipeline_lib.load_pipeline(path)
  modules = pipeline_lib.build_modules(
    pipeline_configs(config, vocab_size=len(pipeline.tokenizers[0]))
  )
  for part in parts:
    wanted = dict(pipeline_lib.abstract_params(modules[part]))
    if section == "text":
      wanted.pop("text_projection", None)  # is new
    have = pipeline.params.get(part)
    if jax.tree.map(np.shape, have) != jax.tree.map(np.shape, wanted):
      raise UserError(
        f"{section}.path: the {part} of {path!r} has other shapes than this configuration's"
      )
  return pipeline


def pipeline_configs(config: ConfigDict, *, vocab_size: int) -> dict[str, dict[str, Any]]:
  """Returns the configuration files of the parts; the VAE's scaling factor is set later."""
  base = BASES[config.family]
  return {
    "model_index": dict(base.FAMILY.index),
    "vae": vae_stage.vae_config(config),
    **base.part_configs(config, vocab_size=vocab_size),
    "scheduler": base.scheduler_config(config),
  }


def run(prepared: Prepared, workdir: Path) -> Path:
  """Trains what is not trained yet; returns the pipeline's directory.

  Raises:
    UserError: the checkpoints in the workdir were trained on another corpus or from other
      weights.
  """
  config, mesh = prepared.config, prepared.mesh
  images, captions = corpus.build_corpus(
    workdir / "corpus",
    num_images=config.corpus.num_images,
    size=config.corpus.image_size,
    seed=config.seed,
  )
  tokenizers = write_tokenizers(prepared, workdir)
  configs = pipeline_configs(config, vocab_size=len(tokenizers[0]))
  modules = pipeline_lib.build_modules(configs)
  identity = {"corpus": _fingerprint(images, captions)}
  kept = prepared.vae_from.params["vae"] if prepared.vae_from else None
  vae_params = kept
  if config.vae.num_updates:
    vae_params = train_vae(
      config, modules["vae"], kept, workdir / "vae", images, mesh=mesh, identity=identity
    )
  digest = pipeline_lib.fingerprint(vae_params, of=identity["corpus"])
  file = workdir / f"latents-{digest}.npy"
  latents, scaling = encode_corpus(modules["vae"], vae_params, images, mesh, file)
  if prepared.denoiser_from and prepared.vae_from:  # its denoiser expects their old scale
    before = prepared.vae_from.configs["vae"]["scaling_factor"]
    latents, scaling = latents * np.float32(before / scaling), before
  configs["vae"]["scaling_factor"] = scaling
  first = _first_params(prepared, modules)
  params = train_denoiser(
    config,
    modules,
    first,
    workdir / "denoiser",
    latents,
    text.tokenize(tokenizers, captions),
    empty_ids=text.tokenize(tokenizers, [""]),
    mesh=mesh,
    identity=identity | {"first": pipeline_lib.fingerprint(first | {"vae": vae_params})},
  )
  target = workdir / "pipeline"
  save.save_pipeline(
    target, params | {"vae": vae_params}, configs=configs, tokenizers_from=workdir
  )
  base = prepared.base
  predicts = configs["scheduler"].get("prediction_type", flow.PREDICTION_TYPE)
  card.write_card(
    target, workdir, config, trained=base.TITLE, predicts=predicts, note=base.NOTE
  )
  return target


def write_tokenizers(prepared: Prepared, workdir: Path) -> list[Any]:
  """Writes one tokenizer into the folders of all text encoders, and loads it for each.

  Text encoders whose training goes on need the tokenizer that they were trained with.
  """
  config = prepared.config
  parts = prepared.base.ENCODERS
  first, *others = (workdir / t.folder for t in prepared.base.FAMILY.tokenizers(parts).values())
  if source := prepared.denoiser_from or prepared.text_from:
    shutil.copytree(source.path / first.name, first, dirs_exist_ok=True)
  else:
    text.train_tokenizer(
      [prompts.caption(s) for specs in prompts.all_prompts("train").values() for s in specs],
      first,
      vocab_size=config.tokenizer.vocab_size,
      max_length=config.tokenizer.max_length,
    )
  for other in others:
    shutil.copytree(first, other, dirs_exist_ok=True)
  return [text.load_tokenizer(folder) for folder in (first, *others)]


def _fingerprint(images: np.ndarray, captions: Sequence[str]) -> str:
  """Computes a digest that changes with any image or caption of the corpus."""
  digest = hashlib.sha256("\n".join(captions).encode())
  for start in range(0, len(images), 10_000):
    digest.update(np.ascontiguousarray(images[start : start + 10_000]).data)
  return digest.hexdigest()[:16]


def train_vae(
  config: ConfigDict,
  vae: Any,
  kept: Any,
  directory: Path,
  images: np.ndarray,
  *,
  mesh: Mesh,
  identity: dict[str, str],
) -> Any:
  """Trains the VAE, or only the decoder if `kept` has weights; returns its parameters."""
  settings = config.vae
  key = jax.random.key(config.seed)
  if kept is None:
    params = jax.jit(lambda k: vae_stage.init_vae(vae, k))(jax.random.fold_in(key, 1))
    frozen = {}
  else:
    identity = identity | {"first": pipeline_lib.fingerprint(kept)}
    params = {name: kept[name] for name in vae_stage.DECODER}
    frozen = {name: tree for name, tree in kept.items() if name not in params}
    frozen = jax.device_put(frozen, sharding.replicated(mesh))
  tx = fit.make_optimizer(settings, weight_decay=0.0, clip_norm=1.0)
  state = vae_stage.VaeState(params, tx.init(params), jnp.int32(0))
  state = jax.device_put(state, sharding.replicated(mesh))
  step = vae_stage.make_vae_step(
    vae,
    tx,
    jax.random.fold_in(key, 2),
    kl_weight=settings.kl_weight,
    edge_weight=settings.edge_weight,
  )

  def update(state, rows):
    return step(state, frozen, sharding.place_batch(images[rows], mesh))

  rows = len(images)
  state = fit.run_updates(config, settings, directory, state, update, rows, identity, purpose=1)
  return {**frozen, **state.params}


def encode_corpus(
  vae: Any, params: Any, images: np.ndarray, mesh: Mesh, file: Path
) -> tuple[np.ndarray, float]:
  """Encodes images to latents of unit variance [N, C, h, w]; also returns their scale.

  A resumed run reads the latents from `file`, whose name tells the images and parameters.
  """
  if not file.exists():
    run = jax.jit(lambda p, x: vae_lib.encode(vae, p, x))
    partial = file.with_suffix(".partial.npy")
    np.save(partial, encode.in_batches(run, params, images, 200, mesh))
    partial.replace(file)
  latents = np.load(file)
  scaling = round(float(1.0 / latents.std()), 6)
  return latents * np.float32(scaling), scaling


def _first_params(prepared: Prepared, modules: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the initial weights of text encoders and denoiser: others', or random."""
  base = prepared.base
  if prepared.denoiser_from:
    parts = (base.FAMILY.denoiser, *base.ENCODERS)
    return {part: prepared.denoiser_from.params[part] for part in parts}
  key = jax.random.key(prepared.config.seed)
  first = {base.FAMILY.denoiser: base.init_denoiser(modules, jax.random.fold_in(key, 3))}
  for i, part in enumerate(base.ENCODERS):
    first[part] = clip_encoder.init(modules[part], jax.random.fold_in(key, 4 + i))
  if prepared.text_from:  # all of the encoder but the projection, which is new
    part = base.ENCODERS[0]
    first[part] = {**first[part], **prepared.text_from.params[part]}
  return first


def train_denoiser(
  config: ConfigDict,
  modules: Mapping[str, Any],
  first: dict[str, Any],
  directory: Path,
  latents: np.ndarray,
  ids: Sequence[np.ndarray],
  *,
  empty_ids: Sequence[np.ndarray],
  mesh: Mesh,
  identity: dict[str, str],
) -> dict[str, Any]:
  """Trains denoiser and text encoders together, from `first`; returns their EMA weights."""
  settings, family = config.denoiser, BASES[config.family].FAMILY
  denoiser = family.denoiser
  network, fixed = denoiser_lib.split_fixed(first[denoiser], family.fixed)
  first = {**first, denoiser: network}
  tx = fit.make_optimizer(
    settings, weight_decay=settings.weight_decay, clip_norm=settings.clip_norm
  )
  state = fit.init_state(first, tx, mesh)
  step = train_denoiser_lib.make_denoiser_step(
    family,
    modules,
    make_schedule(config),
    tx,
    list(map(jnp.asarray, empty_ids)),
    jax.random.fold_in(jax.random.key(config.seed), 5),
    fixed=fixed,
    prompt_dropout=settings.prompt_dropout,
    ema_decay=settings.ema_decay,
  )

  def update(state, rows):
    batch = (latents[rows], [of[rows] for of in ids])
    return step(state, *sharding.place_batch(batch, mesh))

  rows = len(latents)
  ema = fit.run_updates(
    config, settings, directory, state, update, rows, identity, purpose=2
  ).ema
  return {**ema, denoiser: denoiser_lib.join_fixed(ema[denoiser], fixed, family.fixed)}
