"""LAION's aesthetic predictors on OpenAI's CLIP-L: how people rate an image, mostly 4 to 7.

Version 1 is a linear layer, version 2 five layers without activations, so both are affine in
the normalized feature. Prompts do not matter. The two are not on one scale.
"""

import functools

from jaxpref.scorers import clip
from jaxpref.scorers.base import Published, version_of

V1 = Published(
  "aesthetic.v1",
  where="https://github.com/LAION-AI/aesthetic-predictor",
  file="sa_0_4_vit_l_14_linear.pth",
  sha256="2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
)
V2 = Published(
  "aesthetic.v2",
  where="https://github.com/christophschuhmann/improved-aesthetic-predictor",
  file="sac+logos+ava1-l14-linearMSE.pth",
  sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)


def _entry(published: Published, variant: str, dtype: str = "float32"):
  def score(images, prompts):
    from jaxpref.scorers.base import aesthetic_scores  # noqa: PLC0415  # imports JAX

    return aesthetic_scores.score(
      published, clip.L14, images, prompts, variant=variant, dtype=dtype
    )

  return version_of(published.name[-1], variant, dtype), score


def _reward(published: Published):
  def load(dtype):
    from jaxpref.scorers.base import aesthetic_scores  # noqa: PLC0415  # imports JAX

    return aesthetic_scores.reward(published, clip.L14, dtype)

  return load


def _find_files(published: Published) -> None:
  from jaxpref.scorers.base import store  # noqa: PLC0415  # imports JAX

  store.find_weights(published)
  store.find_weights(clip.L14.published)


SCORERS = {
  "v1": _entry(V1, "pil"),
  "v1_bf16": _entry(V1, "pil", "bfloat16"),
  "v1_hf": _entry(V1, "hf"),
  "v2": _entry(V2, "pil"),
  "v2_bf16": _entry(V2, "pil", "bfloat16"),
  "v2_hf": _entry(V2, "hf"),
}
_FIND = {
  published.name[-1]: functools.partial(_find_files, published) for published in (V1, V2)
}
FILES = {name: _FIND[name[1]] for name in SCORERS}
REWARDS = {"v1": _reward(V1), "v2": _reward(V2)}
