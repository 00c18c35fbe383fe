"""ImageReward v1.0 (Xu et al., 2023, arXiv 2304.05977): BLIP, trained on ranked images.

Scores are about standard normal over the authors' data. A prompt counts up to 33 tokens.
"""

from jaxpref.scorers.base import Published, version_of

V1 = Published(
  "imagereward.v1", where="zai-org/ImageReward on the Hugging Face Hub", file="ImageReward.pt"
)


def _entry(dtype: str):
  def score(images, prompts):
    from jaxpref.scorers.base import blip_scores  # noqa: PLC0415  # imports JAX

    return blip_scores.score(V1, images, prompts, dtype=dtype)

  return version_of("1", "pil", dtype), score


def _reward(dtype: str):
  from jaxpref.scorers.base import blip_scores  # noqa: PLC0415  # imports JAX

  return blip_scores.reward(V1, dtype)


def _find_files() -> None:
  from jaxpref.scorers.base import store  # noqa: PLC0415  # imports JAX

  store.find_bert_vocabulary(store.find_weights(V1))


SCORERS = {"v1": _entry("float32"), "v1_bf16": _entry("bfloat16")}
FILES = dict.fromkeys(SCORERS, _find_files)
REWARDS = {"v1": _reward}
