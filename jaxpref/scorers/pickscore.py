"""PickScore v1 (Kirstain et al., 2023, arXiv 2305.01569): CLIP-H tuned on Pick-a-Pic v1.

The score is exp(logit_scale) times the cosine, about 21; for a pair of images of one prompt,
the softmax of the two scores is the probability that people prefer each. Scores of different
prompts are not comparable.
"""

from jaxpref.scorers.base import Cosine, Published

V1 = Cosine(
  Published(
    "pickscore.v1",
    where="yuvalkirstain/PickScore_v1 on the Hugging Face Hub",
    hub="yuvalkirstain/PickScore_v1",
  ),
  number="1",
  towers="H14",
  cleaning="fast",
  scale=None,
)

SCORERS = {"v1": V1.entry("hf"), "v1_bf16": V1.entry("hf", "bfloat16")}
FILES = dict.fromkeys(SCORERS, V1.find_files)
REWARDS = {"v1": V1.reward}
