import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxpref import base_config
from jaxpref import config as config_lib
from jaxpref.errors import UserError
from jaxpref.pretrain import preference_run
from jaxpref.pretrain import run as pretrain_run

ROOT = Path(config_lib.__file__).parents[1]

FLAGS = {"workdir": "where the run goes", "pipeline": "the model's directory"}

SOURCE = """
from ml_collections import ConfigDict, config_dict

PRESETS = ("shapes", "sd15", "sdxl")

def get_config(preset="shapes"):
  c = ConfigDict()
  c.name = "dro"  # names the run
  c.seed = 0
  c.loss = ConfigDict(dict(
    margin=1e-3,  # of the hinge
    beta=2000.0,
  ))
  c.optim = dict(lr=1e-4, clip_norm=1.0)
  c.optim.eps = 1e-8  # Adam's
  c.optim.warmup_updates = 10
  c.data = ConfigDict()
  c.data.flip = False
  c.data.path = ""
  c.data.sizes = (64, 32)
  c.data.shares = [0.5, 0.5]
  c.data.num_experts = config_dict.placeholder(int)  # None: all
  c.train = ConfigDict()
  c.train.num_updates = 400
  c.train.batch_size = 16
  if preset == "sd15":
    c.optim.lr = 1e-5
  return c
"""


@pytest.fixture
def path(tmp_path):
  (tmp_path / "sft.py").write_text(SOURCE)
  file = tmp_path / "dro.py"
  file.write_text(SOURCE)
  return str(file)


def parse(path, *args):
  return config_lib.parse_args([f"--config={path}", *args], flags=FLAGS)


def fails(path, *args):
  with pytest.raises(UserError) as caught:
    parse(path, *args)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_presets_flags_and_both_ways_of_giving_a_value(path):
  config, flags = parse(path, "--workdir", "runs/x", "--config.optim.lr=3e-4")
  assert (config.preset, config.optim.lr, flags) == (
    *("shapes", 3e-4),
    {"workdir": "runs/x"},
  )
  config, flags = parse(f"{path}:sd15", "--config.seed", "-7", "--config.seed", "5")
  assert (config.preset, config.optim.lr, config.seed, flags) == ("sd15", 1e-5, 5, {})
  config, _ = config_lib.parse_args(["--config", path], flags={})
  assert config.optim.lr == 1e-4


@pytest.mark.parametrize(
  ("field", "text", "value"),
  [
    ("optim.lr", "1", 1.0),
    ("optim.clip_norm", "inf", float("inf")),
    ("train.num_updates", "-5", -5),
    ("data.flip", "true", True),
    ("data.flip", "1", True),
    ("data.flip", "False", False),
    ("data.path", "none", "none"),
    ("data.path", "a=b:c d", "a=b:c d"),
    ("data.sizes", "(8,)", (8,)),
    ("data.sizes", "[8, 9, 10]", (8, 9, 10)),
    ("data.shares", "1,0.5", [1.0, 0.5]),
    ("data.num_experts", "12", 12),
    ("data.num_experts", "none", None),
  ],
)
def test_values_take_the_type_of_the_default(path, field, text, value):
  config, _ = parse(path, f"--config.{field}={text}")
  got = dict(config_lib.leaves(config))[field]
  assert got == value
  assert type(got) is type(value)
  if isinstance(value, list | tuple):
    assert [type(x) for x in got] == [type(x) for x in value]


@pytest.mark.parametrize(
  ("field", "text", "message"),
  [
    ("optim.lr", "abc", "'optim.lr' takes a float, got 'abc'"),
    ("optim.lr", "nan", "'optim.lr' takes a float, got 'nan'"),
    ("train.num_updates", "1.5", "'train.num_updates' takes an int, got '1.5'"),
    ("data.flip", "yes", "'data.flip' takes a bool, got 'yes'"),
    ("data.num_experts", "x", "'data.num_experts' takes an int, got 'x'"),
    (
      *("data.sizes", "(1, 2.5)"),
      "'data.sizes' takes a tuple of int, e.g. (64, 32) or (64,), got '(1, 2.5)'",
    ),
    ("data.sizes", "8", "'data.sizes' takes a tuple of int, e.g. (64, 32) or (64,), got '8'"),
    (
      *("data.shares", "open('x')"),
      "'data.shares' takes a list of float, e.g. [0.5, 0.5] or [0.5], got \"open('x')\"",
    ),
    ("optim", "1", "'optim' is a section; set one of its fields, e.g. --config.optim."),
    ("preset", "sd15", "choose the preset with the file: --config=FILE:sd15"),
  ],
)
def test_ill_typed_values(path, field, text, message):
  assert fails(path, f"--config.{field}={text}").startswith(message)


@pytest.mark.parametrize(
  ("field", "near"),
  [
    ("optim.learning_rate", "optim.lr"),
    ("optim.clipnorm", "optim.clip_norm"),
    ("lr", "optim.lr"),
    ("train.lr", "optim.lr"),
    ("train.bs", "train.batch_size"),
    ("trian.num_update", "train.num_updates"),
    ("loss.margin.x", "loss.margin"),
  ],
)
def test_an_unknown_field_names_the_nearest(path, field, near):
  expected = f"unknown config field '{field}'; did you mean '{near}'?"
  assert fails(path, f"--config.{field}=1") == expected


def test_a_field_like_no_other_points_to_help(path):
  message = fails(path, "--config.zzz.qqq=1")
  assert message == "unknown config field 'zzz.qqq'; --help lists the fields"


def test_flags_that_are_wrong(path):
  assert fails(path, "--workdri=x") == ("unknown flag '--workdri'; did you mean '--workdir'?")
  assert fails(path, "--workdir") == "'--workdir' needs a value"
  assert fails(path, "--config.seed", "--workdir=x") == "'--config.seed' needs a value"
  assert fails(path, "dro.py").startswith("unexpected argument 'dro.py'")
  with pytest.raises(UserError, match="--config is missing"):
    config_lib.parse_args(["--workdir=x"], flags=FLAGS)


def test_config_files_that_are_wrong(path, tmp_path, monkeypatch):
  assert fails(str(tmp_path / "drq.py")) == (
    f"no config file '{tmp_path / 'drq.py'}'; did you mean '{path}'?"
  )
  assert fails("nowhere/zzz.py").startswith(
    "no config file 'nowhere/zzz.py'; there are alignprop, awm, best_of, "
  )
  monkeypatch.chdir(tmp_path)
  assert fails("configs/dro.py") == "no config file 'configs/dro.py'; did you mean 'dro'?"
  assert fails("ddro") == "no config file 'ddro'; did you mean 'dro'?"
  assert fails(f"{path}:sd51") == (
    f"{path} has no preset 'sd51'; did you mean 'sd15'? (presets: shapes, sd15, sdxl)"
  )
  broken = tmp_path / "broken.py"
  for source, message in [
    ("x = 1\nx.y.z", "line 2: AttributeError: 'int' object has no attribute 'y'"),
    ("def f(:\n", "line 1: SyntaxError: "),
    ("def get_config(preset=''):\n  return 1 / 0", "line 2: ZeroDivisionError: div"),
    ("{}['preset']", "line 1: KeyError: 'preset'"),
    ("import no_such_module", "line 1: ModuleNotFoundError: No module named"),
  ]:
    broken.write_text(source)
    assert fails(str(broken)).startswith(f"{broken}, {message}")
  monkeypatch.chdir(tmp_path)
  broken.write_text("\n1 / 0")
  assert fails("broken.py").startswith("broken.py, line 2: ZeroDivisionError")
  broken.write_text("def get_config(preset=''):\n  return {}")
  assert "must return an ml_collections.ConfigDict" in fails(str(broken))
  broken.write_text("x = 1")
  assert fails(str(broken)) == f"{broken} is not a configuration: it has no function get_config"
  source = "from jaxpref import base_config\n\ndef get_config(preset='tiny'):\n"
  broken.write_text(f"{source}  return base_config.base('dpo', preset)\n")
  known = ", ".join(base_config.PRESETS)
  assert fails(f"{broken}:sd16") == f"{broken}: no preset 'sd16'; choose {known}"
  broken.write_text("def get_config():\n  return {}")
  assert fails(str(broken)) == f"{broken}: get_config takes no 'preset'"


def test_help_lists_flags_fields_defaults_and_comments(path, capsys):
  for args in (["-h"], [f"--config={path}:sd15", "--help"]):
    with pytest.raises(SystemExit) as caught:
      config_lib.parse_args(args, flags=FLAGS)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--workdir        where the run goes" in out
  lines = [line.split() for line in out.splitlines()]
  assert ["--config.loss.margin=0.001", "of", "the", "hinge"] in lines
  assert ["--config.optim.eps=1e-08", "Adam's"] in lines
  assert ["--config.optim.lr=1e-05"] in lines
  assert ["--config.name=dro", "names", "the", "run"] in lines
  assert ["--config.data.num_experts=None", "None:", "all"] in lines
  assert "presets: shapes, sd15, sdxl (shown: sd15)" in out


def test_help_reads_comments_of_modules_beside_the_config(tmp_path, monkeypatch, capsys):
  (tmp_path / "base_for_help.py").write_text(
    "from ml_collections import ConfigDict\n"
    "def base():\n  return ConfigDict(dict(\n    seed=0,  # of everything\n  ))\n"
  )
  file = tmp_path / "tiny.py"
  file.write_text(
    "from base_for_help import base\ndef get_config(preset='a'):\n  return base()\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(SystemExit):
    parse(str(file), "--help")
  out = capsys.readouterr().out
  assert ["--config.seed=0", "of", "everything"] in [s.split() for s in out.splitlines()]


def test_an_unknown_field_cannot_be_set_later(path):
  config, _ = parse(path)
  with pytest.raises(AttributeError, match="locked"):
    config.new_section = 1
  with pytest.raises(AttributeError, match="locked"):
    config.optim.learning_rate = 1


@pytest.mark.parametrize(
  ("field", "text", "message"),
  [
    ("train.num_updates", "-5", "'train.num_updates' must be at least 0, got -5"),
    ("optim.lr", "0", "'optim.lr' must be positive and finite, got 0.0"),
    ("optim.lr", "inf", "'optim.lr' must be positive and finite, got inf"),
    ("data.num_experts", "-1", "'data.num_experts' must be at least 0, got -1"),
    ("train.batch_size", "0", "'train.batch_size' must be at least 1, got 0"),
  ],
)
def test_validate(path, field, text, message):
  config, _ = parse(path)
  config_lib.validate(config)
  config, _ = parse(path, f"--config.{field}={text}")
  with pytest.raises(UserError) as caught:
    config_lib.validate(config)
  assert str(caught.value) == message


@pytest.mark.parametrize(
  ("field", "inside", "outside"),
  [
    ("data.prompt_dropout", [0, 0.1, 1], [-0.01, 1.01]),
    ("evaluate.guidance", [0.0, 7.5], [-0.5]),
    ("mesh.fsdp", [-1, 1, 8], [0, -2]),
    ("model.dtype", ["float32", "bfloat16"], ["float16", ""]),
    ("optim.b2", [0, 0.999], [1.0, -0.1]),
    ("optim.clip_norm", [1.0, float("inf")], [0.0]),
    ("rollout.order", [1, 2, 3], [0, 4]),
    ("rollout.num_steps", [1, 20], [0]),
    ("train.keep", [1], [0]),
  ],
)
def test_the_edges_of_the_rules(field, inside, outside):
  holds, _ = base_config.RULES[field]
  assert all(holds(value) for value in inside)
  assert not any(holds(value) for value in outside)


def test_a_loss_of_another_package_has_no_rules_but_its_own():
  for name, refused in (("dro", True), ("their_loss", False)):
    config = ConfigDict({"loss": {"name": name, "margin": -1.0}})
    with pytest.raises(UserError) if refused else contextlib.nullcontext():
      config_lib.validate(config)
  with pytest.raises(UserError, match=r"'loss.reference' must be one of"):
    config_lib.validate(ConfigDict({"loss": {"name": "their_loss", "reference": "x"}}))


CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.py"))}
# The rules of configurations of jaxpref.pretrain.
PRETRAINED = {
  "shapes_base": pretrain_run.RULES,
  "shapes_mmdit": pretrain_run.RULES,
  "shapes_preference": preference_run.RULES,
}


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("__init__", "common")])
def test_absurd_numbers_are_refused_in_every_field(name):
  """Before anything is read: in fields that only an evaluation or LoRA uses, too."""
  rules = PRETRAINED.get(name, base_config.RULES)
  argument = str(CONFIGS[name])
  config, _ = parse(argument)
  config_lib.validate(config, rules)

  def accepts(path, text):
    try:
      changed = config.copy_and_resolve_references()
      config_lib._override(changed, path, text)
      config_lib.validate(changed, rules)
    except UserError as error:
      assert path in str(error) and str(error).isprintable()
      return False
    return True

  fields = [(path, value) for path, value in config_lib.leaves(config)]
  numbers = [path for path, value in fields if type(value) in (int, float)]
  assert len(numbers) > 15
  for text in (str(10**30), "1e300", "nan", str(-(10**30)), "-inf"):
    assert [path for path in numbers if accepts(path, text)] == []
  infinite = [path for path in numbers if accepts(path, "inf")]
  assert [path for path in infinite if not path.endswith("clip_norm")] == []
  negative = [path for path in numbers if accepts(path, "-1")]
  signed = ("mesh.", "noise.mean", "noise.scale", "loss.target")
  assert [path for path in negative if not path.startswith(signed)] == []
  for path, value in fields:
    if isinstance(value, tuple) and value and type(value[0]) is int:
      assert not accepts(path, f"({10**30},)") and not accepts(path, "(-1,)")


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("evaluate.guidance", 1001.0, "'evaluate.guidance' must be at most 1,000, got 1001.0"),
    ("train.keep", 2**31, "'train.keep' must be at most 2,147,483,647, got 2147483648"),
    ("loss.anything", float("nan"), "'loss.anything' must be at most 1,000,000,000, got nan"),
  ],
)
def test_limits(field, value, message):
  section, name = field.split(".")
  with pytest.raises(UserError) as caught:
    config_lib.validate(ConfigDict({section: {name: value}}))
  assert str(caught.value) == message


def test_json_round_trip_is_stable(path):
  config, _ = parse(path)
  text = config_lib.to_json(config)
  assert text.index('"data"') < text.index('"loss"') < text.index('"optim"')
  again = config_lib.from_json(text)
  assert isinstance(again, ConfigDict)
  assert again.optim.lr == 1e-4
  assert config_lib.to_json(again) == text


def test_importing_it_does_not_import_jax():
  code = "import sys, jaxpref.config; sys.exit('jax' in sys.modules)"
  root = Path(config_lib.__file__).parents[1]
  assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_values_of_another_type_in_a_config_file():
  config = config_lib.load_config("dro:tiny")
  with config.unlocked():
    config.loss = {**config.loss, "margin": "0.05"}
  with pytest.raises(
    UserError, match="'loss.margin' must be at least 0 and finite, got '0.05'"
  ):
    config_lib.validate(config)
