"""The real models at full width, by shapes alone: each tensor has its place, both ways."""

import types
from pathlib import Path

import families
import flax
import jax
import numpy as np
import pytest
from conftest import live

from jaxpref import base_config, sharding
from jaxpref.models import pipeline, torch_layout

LAYOUTS = Path(__file__).parent / "golden" / "layouts"
COUNTS = {  # of the published models
  ("sd15", "unet"): 859_520_964,
  ("sd15", "vae"): 83_653_863,
  ("sd15", "text_encoder"): 123_060_480,
  ("sd21", "unet"): 865_910_724,
  ("sd21", "vae"): 83_653_863,
  ("sd21", "text_encoder"): 340_387_840,
  ("sdxl", "unet"): 2_567_463_684,
  ("sdxl", "vae"): 83_653_863,
  ("sdxl", "text_encoder"): 123_060_480,
  ("sdxl", "text_encoder_2"): 694_659_840,
}


def _layout(family: str) -> dict[str, dict[str, tuple[int, ...]]]:
  parts: dict[str, dict[str, tuple[int, ...]]] = {}
  for line in (LAYOUTS / f"{family}.txt").read_text().splitlines():
    part, name, *shape = line.split()
    parts.setdefault(part, {})[name] = tuple(map(int, shape))
  return parts


@pytest.mark.long
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_tensor_has_its_place(family):
  layout = _layout(family)
  modules = pipeline.build_modules(families.real_configs(family))
  assert modules.keys() == layout.keys()
  for part, module in modules.items():
    abstract = pipeline.abstract_params(module)
    # From PyTorch: nothing missing, nothing left over, every shape as it should be.
    torch_layout.check_tensors(layout[part], abstract, where=part)
    # To PyTorch: the very names and shapes.
    flat = flax.traverse_util.flatten_dict(abstract)
    written = {
      torch_layout.torch_name(p): torch_layout.torch_shape(p, a.shape) for p, a in flat.items()
    }
    assert len(written) == len(flat) and written == layout[part]
    count = sum(int(np.prod(shape)) for shape in layout[part].values())
    assert count == COUNTS[family, part]


@pytest.mark.long
@pytest.mark.parametrize("family", (*families.FAMILIES, *base_config.FLOWS))
def test_every_large_tensor_is_split(family):
  for part, module in pipeline.build_modules(families.real_configs(family)).items():
    shapes = pipeline.abstract_params(module)
    whole = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    for devices in (2, 8, 16):
      mesh = sharding.abstract_mesh(types.SimpleNamespace(data=1, fsdp=devices), devices)
      placement = sharding.params_sharding(mesh, shapes)
      if part != "text_encoder":  # whose table of words is a prime number
        assert sharding.list_unsharded(shapes, placement) == []
      if part in ("unet", "transformer"):
        pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(placement), strict=True)
        held = sum(np.prod(where.shard_shape(leaf.shape)) for leaf, where in pairs)
        assert 0.85 * devices * held < whole


def test_what_cannot_be_split_is_said(caplog):
  mesh = sharding.abstract_mesh(types.SimpleNamespace(data=1, fsdp=3), 3)
  shapes = {"a": {"b": jax.ShapeDtypeStruct((512, 1024), np.float32)}}
  placement = sharding.params_sharding(mesh, shapes)
  assert sharding.list_unsharded(shapes, placement) == ["a/b"]
  assert "2 MiB of them, for example a/b" in caplog.text


@pytest.mark.long
@live
@pytest.mark.parametrize("family", families.FAMILIES)
def test_layouts_are_pytorchs(family):
  from golden import make_layouts

  assert make_layouts.layout(family) == (LAYOUTS / f"{family}.txt").read_text()
