"""CLIP scores: 100 times the cosine between CLIP's features of image and prompt.

`h14` is LAION's ViT-H/14, which papers of preference tuning report; `l14` is OpenAI's ViT-L/14,
the default of torchmetrics. Their values are not comparable. Neither is clipped at 0.
"""

from jaxpref.scorers.base import Cosine, Published

H14 = Cosine(
  Published(
    "clip.h14",
    where="laion/CLIP-ViT-H-14-laion2B-s32B-b79K on the Hugging Face Hub",
    file="open_clip_model.safetensors",
    hub="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
  ),
  number="laion2b",
  towers="H14",
  cleaning="ftfy",
)
L14 = Cosine(
  Published(
    "clip.l14",
    where="openai/clip-vit-large-patch14 on the Hugging Face Hub",
    hub="openai/clip-vit-large-patch14",
  ),
  number="openai",
  towers="L14",
  cleaning="fast",
)


SCORERS = {
  "h14": H14.entry("pil"),
  "h14_bf16": H14.entry("pil", "bfloat16"),
  # As through the loader of the package hpsv2.
  "h14_tensor_aa": H14.entry("tensor_aa"),
  "l14": L14.entry("hf"),
  "l14_bf16": L14.entry("hf", "bfloat16"),
}
FILES = {name: (H14 if name.startswith("h14") else L14).find_files for name in SCORERS}
REWARDS = {"h14": H14.reward, "l14": L14.reward}
FEATURES = {"h14": H14.features("pil"), "l14": L14.features("hf")}
