"""Losses, scorers and data sources of other packages: each mistake of an author is one line."""

import sys

import numpy as np
import pytest

from jaxpref import base_config, config, losses, main, plugins, scorers
from jaxpref.data import rows
from jaxpref.errors import UserError, failure_of


@pytest.fixture
def module(tmp_path, monkeypatch):
  """Writes a module `theirs` that can be imported."""
  monkeypatch.syspath_prepend(tmp_path)

  def write(source):
    (tmp_path / "theirs.py").write_text(source)
    sys.modules.pop("theirs", None)

  yield write
  sys.modules.pop("theirs", None)


def refused(message, call, *arguments):
  with pytest.raises(UserError, match=message) as caught:
    call(*arguments)
  assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------- the module

IMPORTS = [
  ("import no_such_thing", r"theirs.py, line 1: ModuleNotFoundError: No module named"),
  ("x = 1\ny = x.z", r"theirs.py, line 2: AttributeError: 'int' object has no attribute 'z'"),
  ("def f(:", r"theirs.py, line 1: SyntaxError: "),
  ("raise ValueError('a\\nb')", r"theirs.py, line 1: ValueError: a$"),
]


@pytest.mark.parametrize(("source", "message"), IMPORTS)
def test_a_module_that_cannot_be_imported(module, source, message):
  module(source)
  refused(rf"module 'theirs' cannot be imported: \S*{message}", losses.load_loss, "theirs")
  refused("cannot be imported", scorers.load_scorers, ["theirs.x"])


def test_an_entry_point_without_its_module(register_plugin, tmp_path):
  register_plugin("jaxpref.losses", "gone", "gone_loss", "")
  (tmp_path / "gone_loss.py").unlink()
  sys.modules.pop("gone_loss", None)
  refused("entry point 'gone' of jaxpref.losses names .* 'gone_loss'", losses.load_loss, "gone")


def test_a_line_is_the_users_and_not_that_of_a_parsed_text(tmp_path):
  """json's errors have a line number, too: that of the JSON text."""
  file = tmp_path / "c.py"
  file.write_text("import json\n\n\njson.loads('[1,')")
  refused(r"c.py, line 4: JSONDecodeError: Expecting value", config.load_config, str(file))


def test_an_error_without_a_message_or_file():
  assert failure_of(KeyboardInterrupt(), None) == "KeyboardInterrupt"


# ----------------------------------------------------------------------------- losses

LOSS = "from jaxpref.losses import Needs, Arranged\nNEEDS = Needs(rows='pairs'{})\n"
W, L = "terms.err['w']", "terms.err['l']"


def loss_of(module, needs, code):
  module(LOSS.format(needs) + code)
  loss = losses.make_loss({"name": "theirs"})
  arms = losses.load_loss("theirs").NEEDS.arms or ("w", "l")
  losses.check_loss(loss, arms, images=2)
  return loss


@pytest.mark.parametrize(
  ("needs", "returned", "message"),
  [
    ("", f"{W}[:, None] - {L}, {{}}", r"losses of shape \[B\] .got \(2, 2\) for B = 2"),
    ("", f"{W}.mean(), {{}}", r"losses of shape \[B\] .got \(\)"),
    ("", f"({W} > {L}).astype(int), {{}}", "losses that are floats .got int32"),
    ("", W, "must return losses and a dict of metrics .got an array"),
    ("", f"{W}, {L}", "losses and a dict of metrics .got an array and an array"),
    ("", "None", "losses and a dict of metrics .got NoneType"),
    ("", f"{W}, {{'a': {{'b': 1.0}}}}", r"the metric a must be a scalar or of shape \[B\]"),
    ("", "terms.err['e'], {}", r"reads 'e', .*rows='pairs', rollout=None.* errors w, l and"),
    ("", "terms.labels['liked'], {}", r"reads 'liked', .* the labels \(none\)"),
    ("", "terms.ref['w'], {}", r"reads terms.ref\['w'\], which needs reference=True in NEEDS"),
    ("", "terms.old['w'], {}", r"reads terms.old\['w'\], which needs old=True in NEEDS"),
    (", old=True", "terms.ref['w'], {}", "reference=True in NEEDS"),
    (", reference=True", "terms.ref['e'], {}", "reads 'e', .* the errors w, l and"),
    ("", "terms.errors, {}", r"theirs.py, line 4: AttributeError: 'Terms' object has no attri"),
    ("", f"{W} if {W}[0] > 0 else {L}, {{}}", "line 4: TracerBoolConversionError: Attempted"),
    ("", f"{W} @ jnp.ones(3), {{}}", "line 4: NameError: name 'jnp' is not defined"),
  ],
)
def test_an_objective_with_a_mistake(module, needs, returned, message):
  code = f"def objective(terms):\n  return {returned}\n"
  refused(f"^loss 'theirs': objective.*{message}", loss_of, module, needs, code)


def test_a_sound_objective(module):
  returned = "terms.ref['l'], {'a': terms.ref['w'], 'b': 1.0}"
  code = f"def objective(terms):\n  return {returned}\n"
  loss_of(module, ", reference=True", code)


def test_a_loss_on_trajectories_gets_the_log_ratios_of_steps(module):
  for part, refusal in ((".sum(0)", None), ("", r"of shape \[B\] .got \(3, 2\) for B = 2")):
    code = f"def objective(terms):\n  return (terms.err['a'] - terms.err['b']){part}, {{}}\n"
    module(LOSS.format("").replace("'pairs'", "'paths', reference=True") + code)
    loss = losses.make_loss({"name": "theirs"})
    check = lambda loss=loss: losses.check_loss(loss, ("a", "b"), images=2)  # noqa: E731
    if refusal:
      refused(refusal, check)
    else:
      check()


OBJECTIVE = f"def objective(terms):\n  return {W}, {{}}\n"
CONTENTS = [
  ("def objective(): pass", r"objective is called with \(terms\), .*\(\): too many positional"),
  ("def objective(terms, beta): pass", "parameters are .terms, beta.: missing .* 'beta'"),
  ("def objective(terms, b, *, c): pass", r"called with \(terms, c=...\), and .* 'b'"),
  ("objective = 3", r"objective must be a function of \(terms\) \(got 3\)"),
  ("", "it lacks objective$"),
  ("NEEDS = {'rows': 'pairs'}\n" + OBJECTIVE, "must be a jaxpref.losses.Needs .got {'rows'"),
  (OBJECTIVE + "def arrange(x0): pass", r"arrange is called with \(x0, cond, uncond, key\)"),
  (
    OBJECTIVE + "def arrange(x0, cond, uncond, key): return x0",
    "arrange must return a jaxpref.losses.Arranged .got .*Array",
  ),
  (OBJECTIVE + "def arrange(x0, cond, uncond, key): x0.y", "line 5: AttributeError: .* 'y'"),
  (OBJECTIVE + "def refine(needs): return needs", r"refine is called with \(needs, updates\)"),
  (OBJECTIVE + "def refine(needs, updates): return 1", "refine must return a .*Needs .got int"),
  (
    OBJECTIVE + "def refine(needs, updates): needs.x",
    "refine: .*line 5: AttributeError: .*'x'",
  ),
]


@pytest.mark.parametrize(("code", "message"), CONTENTS)
def test_a_loss_module_with_a_mistake(module, code, message):
  refused(message, loss_of, module, "", code)


@pytest.mark.parametrize(
  ("label", "message"),
  [
    ("return rewards", r"label must return a dict of arrays \[N\] \(got array"),
    ("return {'a': rewards[:1]}", r"label must return a dict of arrays \[N\] \(got {'a'"),
    ("return {'a': rewards / 'b'}", "label: .*theirs.py, line 6: "),
  ],
)
def test_labels_of_rounds_with_a_mistake(module, label, message):
  needs = "NEEDS = Needs(rows='scored')\n"
  objective = "def objective(terms):\n  return terms.err['x'], {}\n"
  module(f"{LOSS.format('')}{needs}{objective}def label(rewards): {label}\n")
  loss = losses.make_loss({"name": "theirs"})
  refused(message, lambda: losses.check_loss(loss, ("x",), images=1))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"rows": "pair"}, "rows must be one of experts, pairs, .*, prompts .got 'pair'"),
    ({"rows": ["pairs"]}, r"rows must be one of .*\(got \['pairs'\]"),
    ({"rows": "pairs", "rollout": True}, "rollout must be None or states .got True"),
    ({"rows": "pairs", "reference": "base"}, "reference must be False or True .got 'base'"),
    ({"rows": "pairs", "condition": "mask"}, "condition must be None or image .got 'mask'"),
    ({"rows": "pairs", "arms": "wl"}, "arms must be a tuple of names .got 'wl'"),
  ],
)
def test_needs_of_another_kind(fields, message):
  refused(f"Needs: {message}", lambda: losses.Needs(**fields))


def test_hyper_parameters_are_all_there_and_no_others():
  known = r"\(its hyper-parameters are beta, variant"
  dpo = {"name": "dpo", "beta": 1.0, "variant": "ipo"}
  refused(rf"needs loss.beta, loss.variant .*{known}\)", losses.make_loss, {"name": "dpo"})
  for given, message in {
    "margin": rf"does not take loss.margin = 2.0 {known}: the parameters of objective after",
    "betta": rf"does not take loss.betta = 2.0; did you mean loss.beta\? {known}",
  }.items():
    refused(message, losses.make_loss, dpo | {given: 2.0})
  refused(r"loss.beta = 1 \(.* are \(none\)", losses.make_loss, {"name": "sft", "beta": 1})


# ----------------------------------------------------------------------------- scorers

SCORER = "import numpy as np\ndef s(images, prompts):\n  return {}\nSCORERS = {{'s': ('1', s)}}"
IMAGES = np.zeros((2, 4, 4, 3), np.uint8)


def scores_of(module, source):
  module(source)
  _, function = scorers.load_scorers(["theirs.s"])["theirs.s"]
  scorers.categorize(["theirs.s"], ["a", "b"])
  return scorers.score("theirs.s", function, IMAGES, ["a", "b"])


SCORERS = [
  ("SCORERS = {'t': 1}", r"unknown scorer 'theirs.s' \(theirs has t\)"),
  ("", r"unknown scorer 'theirs.s' \(theirs has no SCORERS\)"),
  ("SCORERS = ['s']", "SCORERS of theirs must be a dict .got list"),
  ("SCORERS = {'s': len}", r"'theirs.s': its entry in SCORERS must be \(version, function\)"),
  ("SCORERS = {'s': ('1', len)}", r"called with \(images, prompts\), and its parameters are"),
  ("SCORERS = {'s': ('1', lambda images: 1)}", r"its parameters are \(images\): too many"),
  (SCORER.format("None"), r"one number for each of 2 images \(got an array of shape \(\)\)"),
  (SCORER.format("[1.0]"), r"one number for each of 2 images \(got an array of shape \(1,\)"),
  (SCORER.format("['a', 'b']"), r"one number for each of 2 images \(got \['a', 'b'\]\)"),
  (SCORER.format("[1.0, np.nan]"), "'theirs.s' gives nan for the prompt 'b'"),
  (SCORER.format("images.x"), "'theirs.s': .*theirs.py, line 3: AttributeError: .* 'x'"),
  (SCORER.format("[1, 2]") + "\ndef category(): pass", "theirs.category: .*: TypeError: "),
  (SCORER.format("[1, 2]") + "\ndef category(p): pass", "must return a text .got None for 'a'"),
]


@pytest.mark.parametrize(("source", "message"), SCORERS)
def test_a_scorer_with_a_mistake(module, source, message):
  refused(message, scores_of, module, source)


@pytest.mark.parametrize(
  ("reward", "message"),
  [
    ("lambda: 1", r"its entry in REWARDS is called with \(dtype\)"),
    ("lambda dtype: 1", "must return a jaxpref.scorers.Reward .got int"),
    ("lambda dtype: dtype.x", "theirs.py, line 1: AttributeError"),
  ],
)
def test_a_reward_with_a_mistake(module, reward, message):
  module(f"REWARDS = {{'s': {reward}}}")
  refused(message, scorers.load_reward, "theirs.s")


@pytest.mark.parametrize(
  ("features", "message"),
  [
    ("lambda: 1", r"features 'theirs.s' is called with \(images\)"),
    ("lambda images: [1.0, 2.0]", r"must be an array \[N, D\] for 2 images .got shape \(2,\)"),
    ("lambda images: [[1.0, 2.0]]", r"for 2 images .got shape \(1, 2\)"),
    ("lambda images: images.x", "theirs.py, line 1: AttributeError"),
  ],
)
def test_features_with_a_mistake(module, features, message):
  module(f"FEATURES = {{'s': {features}}}")
  refused(message, lambda: scorers.load_features("theirs.s")(IMAGES))


def test_errors_of_this_package_keep_their_traceback():
  from jaxpref.scorers import shapes

  function = shapes.SCORERS["correct"][1]
  with pytest.raises(AttributeError):
    scorers.score("shapes.correct", function, [None], ["a red circle"])


# ----------------------------------------------------------------------------- sources


def rows_of(module, source):
  module(source)
  data = base_config.base("x", "tiny").data
  data.update(source="theirs", path="p", num_rows=0, num_experts=0)
  return rows.load_rows("experts", data, image_size=8, seed=0)


OPEN = "def open_images(data, tally, kind):\n  return {}"
SOURCES = [
  ("", "data.source 'theirs' is not a source: it has none of open_pairs"),
  ("def open_images(data): pass", r"open_images is called with \(data, tally, kind\), and its"),
  ("open_images = []", r"open_images must be a function of .data, tally, kind. .got \[\]"),
  (OPEN.format("[]") + "\ndef tables_in(): pass", r"tables_in is called with \(data\)"),
  (
    OPEN.format("[]") + "\ndef tables_in(data): return 'images'",
    "must return a tuple of pairs, images, .* .got 'images'",
  ),
  (OPEN.format("None"), "open_images must return a sequence of rows, .* .got NoneType"),
  (OPEN.format("iter([1])"), "open_images must return a sequence of rows, .*iterator"),
  (OPEN.format("data.no_such_field"), "theirs.py, line 2: AttributeError: .*no_such_field"),
  (OPEN.format("[('a', b'')]"), "open_images must return rows that are mappings .got tuple"),
  (OPEN.format("{'a': 1}"), "open_images, row 0: .*KeyError: 0"),
  (OPEN.format("[{'text': 'a'}]"), "row 0 of the data lacks the column 'caption'"),
  (OPEN.format("[{'caption': 'a', 'jpg': 3}]"), "1 of 1 rows of the data cannot be used"),
  (OPEN.format("[]"), "the data has 0 experts: at least one is needed"),
]


@pytest.mark.parametrize(("source", "message"), SOURCES)
def test_a_source_with_a_mistake(module, source, message):
  refused(message, rows_of, module, source)


# ----------------------------------------------------------------------------- a whole command


def test_the_command_line_prints_one_line(module, tmp_path, capsys):
  module(LOSS.format("") + "def objective(terms):\n  return terms.ref['w'], {}\n")
  file = tmp_path / "c.py"
  file.write_text(
    "from jaxpref import base_config\n"
    "def get_config(preset='tiny'):\n  return base_config.base('theirs', preset)\n"
  )
  assert main.main([f"--config={file}", f"--workdir={tmp_path / 'w'}"]) == 2
  assert capsys.readouterr().err == (
    "jaxpref: error: loss 'theirs': objective reads terms.ref['w'], which needs reference=True "
    "in NEEDS\n"
  )
  assert not (tmp_path / "w").exists()


def test_own_modules_come_first_and_the_interface_is_reserved():
  assert plugins.find_module("jaxpref.losses", "dpo").__name__ == "jaxpref.losses.dpo"
  assert plugins.find_module("jaxpref.losses", "base") is None
