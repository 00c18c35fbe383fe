"""Published prompt sets: their sources, sizes and licences."""

from collections.abc import Mapping
from typing import NamedTuple


class PromptSet(NamedTuple):
  """The published facts about a set.

  Attributes:
    rows: number of prompts, the usual one first if it is published in several forms.
    different: number of different prompts; 0 if it is not published.
    where: the file, and where it is published.
    licence: of the prompts, or what is known of it.
    file: in the package, or ''.
    parts: files of a set that is a folder, by category.
    split: of Pick-a-Pic's files, if the set is one of its splits.
  """

  rows: tuple[int, ...]
  different: int
  where: str
  licence: str
  file: str = ""
  parts: Mapping[str, str] = {}
  split: str = ""


_PICKAPIC = (
  "column `caption` of {}, parquet, in yuvalkirstain/pickapic_v2 on the Hugging Face hub, "
  "withdrawn in 2025"
)
_STYLES = ("anime", "concept-art", "paintings", "photo")
_COMPBENCH = (
  *("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial"),
  "complex",
)
SETS: Mapping[str, PromptSet] = {
  "geneval": PromptSet(
    (553,),
    553,
    "prompts/evaluation_metadata.jsonl, github.com/djghosh13/geneval",
    "MIT",
    file="geneval/evaluation_metadata.jsonl",
  ),
  "partiprompts": PromptSet(
    (1632,),
    1632,
    "PartiPrompts.tsv, github.com/google-research/parti",
    "Apache-2.0",
    file="partiprompts/PartiPrompts.tsv",
  ),
  "pickapic-test": PromptSet(
    (500, 487),
    487,
    f"{_PICKAPIC.format('the split test_unique')}; the different prompts are in "
    "prompts/papv2.json, github.com/AIDC-AI/Diffusion-SDPO",
    "of users, some explicit; papv2.json: Apache-2.0",
    split="test_unique",
  ),
  "pickapic-validation": PromptSet(
    (500,),
    0,
    _PICKAPIC.format("the split validation_unique"),
    "of users, some explicit",
    split="validation_unique",
  ),
  "hpdv2": PromptSet(
    (3200,),
    3172,
    "the folder benchmark with one JSON file for each style, in zhwang/HPDv2 on the Hugging "
    "Face hub",
    "see its page",
    parts={style: f"{style}.json" for style in _STYLES},
  ),
  "drawbench": PromptSet(
    (200,), 0, "a table `prompts, category` in copies on the Hugging Face hub", "unknown"
  ),
  "genai-bench": PromptSet(
    (1600, 527),
    0,
    "genai_image.json, in BaiqiL/GenAI-Bench on the Hugging Face hub",
    "Apache-2.0",
  ),
  "imagereward": PromptSet(
    (100,), 100, "benchmark/benchmark-prompts.json, github.com/THUDM/ImageReward", "Apache-2.0"
  ),
  "t2i-compbench": PromptSet(
    (2400,),
    2400,
    "the folder examples/dataset, github.com/Karine-Huang/T2I-CompBench",
    "MIT",
    parts={name: f"{name}_val.txt" for name in _COMPBENCH},
  ),
}
