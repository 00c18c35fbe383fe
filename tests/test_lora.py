"""LoRA: additions that start at nothing, merge exactly, and that PyTorch loads."""

import json
import re

import families
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, live
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxpref import export, generate, main
from jaxpref.errors import UserError
from jaxpref.models import lora, pipeline, save, single_file, unet
from jaxpref.training import load_run

ATTENTION = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)$"  # the default targets
EVERYWHERE = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)$|conv1|proj_in|downsamplers"


def adapt(model):
  """The pipeline and its UNet with random additions of rank 3, on every kind of layer."""
  loaded = pipeline.load_pipeline(str(model))
  base = loaded.params["unet"]
  additions = lora.init_lora(base, rank=3, targets=EVERYWHERE, key=jax.random.key(1))
  rng = np.random.default_rng(0)
  additions = jax.tree.map(
    lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), additions
  )
  return loaded, lora.Adapted(base, additions, scale=0.5)


@pytest.fixture(scope="module")
def adapted(tiny_pipeline):
  return adapt(tiny_pipeline)


def _inputs(loaded, rows=2):
  config = loaded.configs["unet"]
  rng = np.random.default_rng(2)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  cond = {"text": draw(rows, 7, config["cross_attention_dim"])}
  if loaded.family.takes_sizes:
    cond |= {"pooled": draw(rows, 16), "time_ids": np.full((rows, 6), 32.0, np.float32)}
    width = config["projection_class_embeddings_input_dim"]
    cond["pooled"] = draw(rows, width - 6 * config["addition_time_embed_dim"])
  return draw(rows, *loaded.latent_shape), np.array([7, 600])[:rows], cond


@pytest.mark.long
def test_untrained_additions_change_nothing(adapted):
  loaded, params = adapted
  denoise = jax.jit(unet.make_denoise(loaded.modules["unet"]))
  zero = jax.tree.map(jnp.zeros_like, params.lora)
  fresh = lora.init_lora(params.base, rank=2, targets=EVERYWHERE, key=jax.random.key(0))
  assert all((up == 0).all() for _, up in lora._layers(fresh).values())
  assert all((down != 0).any() for down, _ in lora._layers(fresh).values())
  inputs = _inputs(loaded)
  want = denoise(params.base, *inputs)
  for tree in (zero, fresh):
    got = denoise(lora.Adapted(params.base, tree, scale=2.0), *inputs)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.long
def test_one_program_samples_base_and_tuned_model(adapted):
  loaded, params = adapted
  denoise, inputs = jax.jit(unet.make_denoise(loaded.modules["unet"])), _inputs(loaded)
  plain = lora.without_additions(params.base, params)
  got = denoise(plain, *inputs)
  assert (denoise(params, *inputs) != got).any() and denoise._cache_size() == 1
  np.testing.assert_allclose(got, denoise(params.base, *inputs), rtol=1e-6, atol=1e-6)
  assert denoise._cache_size() == 2
  assert lora.without_additions(params.base, params.base) is params.base


@pytest.mark.long
def test_merged_is_added(adapted):
  loaded, params = adapted
  denoise = jax.jit(unet.make_denoise(loaded.modules["unet"]))
  inputs = _inputs(loaded)
  merged, base = lora.merge(params), params.base
  got, want = denoise(merged, *inputs), denoise(params, *inputs)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))
  assert float(jnp.abs(denoise(base, *inputs) - want).max()) > 0.02
  assert lora.merge(base) is base


def test_targets_are_patterns(adapted):
  _, params = adapted
  chosen = lora.init_lora(params.base, rank=1, targets=r"attn1\.to_q$", key=jax.random.key(0))
  names = [lora._module_name(m) for m in lora._layers(chosen)]
  assert names and all(n.endswith("attn1.to_q") for n in names)
  with pytest.raises(UserError, match="does not match a layer"):
    lora.init_lora(params.base, rank=1, targets="nothing", key=jax.random.key(0))
  with pytest.raises(UserError, match="is not a regular expression"):
    lora.init_lora(params.base, rank=1, targets="(", key=jax.random.key(0))


def test_a_rank_that_no_layer_has_is_refused(adapted):
  _, params = adapted
  sides = [
    min(layer[0].shape[0], layer[1].shape[-1]) for layer in lora._layers(params.lora).values()
  ]
  settings = {"targets": ATTENTION}
  lora.check_rank(params.base, rank=max(sides), **settings)
  for rank in (max(sides) + 1, 2**31 - 1):
    with pytest.raises(UserError, match=f"lora.rank must be at most {max(sides)},"):
      lora.check_rank(params.base, rank=rank, **settings)


@pytest.mark.parametrize(("family", "count"), [("sd15", 128), ("sdxl", 560)])
def test_comfyui_and_a1111_find_every_layer(family, count):
  """By their names of the default targets' layers, at full size; and where these layers are."""
  names = json.loads((ROOT / "tests" / "golden" / "program_names.json").read_text())[family]
  module = unet.build_unet(families.real_configs(family)["unet"], dtype=jnp.float32)
  layout = (ROOT / "tests" / "golden" / "layouts" / f"{family}.txt").read_text()
  weights = re.findall(r"^unet (\S+)\.weight ", layout, re.MULTILINE)
  layers = [name for name in weights if re.search(ATTENTION, name)]
  one = {"down": np.ones((1, 2), np.float32), "up": np.ones((2, 1), np.float32)}
  paths = [tuple(re.sub(r"\.(\d+)", r"_\1", name).split(".")) for name in layers]
  additions = flax.traverse_util.unflatten_dict(
    {(*path, way): array for path in paths for way, array in one.items()}
  )
  tensors = lora.export_tensors(lora.Adapted({}, additions, scale=0.5), np.float16)
  parts = ("lora_down.weight", "lora_up.weight", "alpha")
  assert tensors.keys() == {f"{name}.{part}" for name in names for part in parts}
  assert len(names) == count and tensors[next(iter(names)) + ".alpha"] == 1.0
  for name in layers:
    written = single_file.unet_name(f"{name}.weight", module)
    assert written == names["lora_unet_" + name.replace(".", "_")] + ".weight"


@pytest.mark.long
@live
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_pytorch_loads_the_additions(family, tmp_path):
  """Onto 1 x 1 convolutions as projections, and onto linear layers."""
  import torch
  import witness

  model = families.write_pipeline(family, tmp_path, shallow=True)
  loaded, params = adapt(model)
  save.save_tensors(tmp_path / "x.safetensors", lora.export_tensors(params, np.float32))
  pipe = witness.load(model)
  x_t, t, cond = _inputs(loaded)
  added = {}
  if loaded.family.takes_sizes:
    added = {k: torch.tensor(cond[k]) for k in ("pooled", "time_ids")}
    added = {"text_embeds": added["pooled"], "time_ids": added["time_ids"]}
  arguments = (torch.tensor(x_t), torch.tensor(t), torch.tensor(cond["text"]))
  with torch.no_grad():
    before = pipe.unet(*arguments, added_cond_kwargs=added).sample.numpy()
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    theirs = pipe.unet(*arguments, added_cond_kwargs=added).sample.numpy()
  ours = jax.jit(unet.make_denoise(loaded.modules["unet"]))(params, x_t, t, cond)
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
  assert np.abs(theirs - before).max() > 0.05


def test_a_lora_run(tiny_pipeline, tfds_dir, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
  workdir = tmp_path / "run"
  fields = {"model.path": tiny_pipeline, "lora.rank": 2, "optim.lr": 0.01}
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  arguments = ["--config=configs/dpo.py:tiny", f"--workdir={workdir}", *flags]
  assert main.main(arguments) == 0
  base = pipeline.load_pipeline(str(tiny_pipeline)).params["unet"]
  adapted = load_run.load(str(workdir), ema=False, merged=False).params["unet"]
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
  assert adapted.scale == 4.0 and count(adapted.lora) < count(base) / 5
  jax.tree.map(np.testing.assert_array_equal, adapted.base, base)
  merged = load_run.load(str(workdir), ema=False).params["unet"]
  jax.tree.map(np.testing.assert_array_equal, merged, lora.merge(adapted))
  assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (merged, base)), strict=True))
  # Exported merged, and alone; drawn with.
  flags = [f"--workdir={workdir}", "--dtype=float32", "--no-ema"]
  assert export.main([*flags, f"--out={tmp_path / 'whole'}"]) == 0
  again = pipeline.load_pipeline(str(tmp_path / "whole")).params["unet"]
  jax.tree.map(np.testing.assert_array_equal, again, merged)
  assert export.main([*flags, "--lora", f"--out={tmp_path / 'x.safetensors'}"]) == 0
  tensors = load_file(tmp_path / "x.safetensors")
  assert len(tensors) == 3 * len(lora._layers(adapted.lora))
  assert all(n.startswith("lora_unet_") for n in tensors)
  assert all(v == 8.0 for n, v in tensors.items() if n.endswith(".alpha"))
  with safe_open(tmp_path / "x.safetensors", "np") as file:
    assert file.metadata()["ss_base_model_version"] == "sd_v1"
    assert file.metadata()["ss_network_dim"] == "2"
  out = tmp_path / "pictures"
  draw = [f"--model={workdir}", f"--out={out}", "--prompts=a red circle", "--steps=2"]
  assert generate.main(draw) == 0 and len(list(out.iterdir())) >= 1
  capsys.readouterr()
  assert export.main([*flags, "--lora", f"--out={tmp_path / 'x'}"]) == 2
  assert "--lora writes a file" in capsys.readouterr().err
  pipe = [f"--workdir={tiny_pipeline}", "--lora", f"--out={tmp_path / 'y.safetensors'}"]
  assert export.main(pipe) == 2
  assert "is not a LoRA run" in capsys.readouterr().err
  # Another pattern or rank is another run.
  assert main.main([*arguments, "--config.lora.rank=3"]) == 2
  assert "lora.rank was 2, now 3" in capsys.readouterr().err
