"""Human Preference Score v2.0 and v2.1 (Wu et al., 2023, arXiv 2306.09341): CLIP-H, tuned.

The score is 100 times the cosine; the model's logit scale is not used. The two versions are two
models with different ranges. Their package resizes a float image, with antialiasing since
torchvision 0.17 and without before; open_clip resizes the 8-bit image.
"""

from jaxpref.scorers.base import Cosine, Published

_WHERE = "xswu/HPSv2 on the Hugging Face Hub"
V2_0 = Cosine(
  Published("hpsv2.v2_0", where=_WHERE, file="HPS_v2_compressed.pt"),
  number="2.0",
  towers="H14",
  cleaning="ftfy",
)
V2_1 = Cosine(
  Published("hpsv2.v2_1", where=_WHERE, file="HPS_v2.1_compressed.pt"),
  number="2.1",
  towers="H14",
  cleaning="ftfy",
)

SCORERS = {
  "v2_0": V2_0.entry("tensor_aa"),
  "v2_0_bf16": V2_0.entry("tensor_aa", "bfloat16"),
  "v2_0_pil": V2_0.entry("pil"),
  "v2_0_tensor_noaa": V2_0.entry("tensor_noaa"),
  "v2_1": V2_1.entry("tensor_aa"),
  "v2_1_bf16": V2_1.entry("tensor_aa", "bfloat16"),
  "v2_1_pil": V2_1.entry("pil"),
  "v2_1_tensor_noaa": V2_1.entry("tensor_noaa"),
}
FILES = {name: (V2_0 if name.startswith("v2_0") else V2_1).find_files for name in SCORERS}
REWARDS = {"v2_0": V2_0.reward, "v2_1": V2_1.reward}
