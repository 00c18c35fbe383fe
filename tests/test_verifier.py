"""The verifier against scenes whose truth is known, and against pictures drawn by hand."""

import ast
import dataclasses
import io
import itertools
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import skimage.draw
import skimage.segmentation
from PIL import Image
from scipy import ndimage

from jaxpref import scorers
from jaxpref.errors import UserError
from jaxpref.evaluation import evaluate
from jaxpref.shapes import (
  annotator,
  flaws,
  palette,
  prompts,
  quality,
  render,
  segmentation,
  silhouettes,
  verifier,
)

WRONG = ("missing_object", "wrong_count", "swapped_color", "swapped_relation", "cropped")
UGLY = ("blur", "noise", "low_contrast")


def sample(count, rng, flaw=None):
  """`count` specs of each category and split that the flaw can befall."""
  specs = []
  for split, category in itertools.product(("train", "test"), prompts.CATEGORIES):
    choices = prompts.all_prompts(split)[category]
    choices = [s for s in choices if not flaw or flaw in flaws.applicable(s)]
    if choices:
      specs += [choices[i] for i in rng.integers(len(choices), size=count)]
  return specs


def judged(specs, rng, flaw=None, spoil=lambda image, rng: image):
  drawn = [flaws.flawed_scene(s, (flaw,) if flaw else (), rng) for s in specs]
  images = [spoil(render.draw(scene, rng), rng) for scene in drawn]
  return verifier.verify(images, [prompts.caption(s) for s in specs])


def test_clean_images_are_right_and_good():
  rng = np.random.default_rng(1)
  result = judged(sample(30, rng), rng)
  assert result["correct"].shape == result["quality"].shape == (360,)
  assert result["correct"].mean() >= 0.99
  assert np.mean(result["quality"] > 0.9) >= 0.99
  assert result["quality"].max() <= 1.0


@pytest.mark.parametrize("flaw", WRONG)
def test_flaws_of_meaning_are_refused(flaw):
  rng = np.random.default_rng(2)
  specs = sample(60 if flaw == "swapped_relation" else 16, rng, flaw)
  result = judged(specs, rng, flaw)
  assert result["correct"].mean() <= 0.05
  if flaw == "cropped":
    assert np.mean(result["quality"] < quality.GOOD) >= 0.95


@pytest.mark.parametrize("flaw", UGLY)
def test_flaws_of_looks_stay_right_but_are_not_good(flaw):
  rng = np.random.default_rng(3)
  result = judged(sample(16, rng, flaw), rng, flaw)
  assert result["correct"].mean() >= 0.95
  assert np.mean(result["quality"] < quality.GOOD) >= 0.95


def _to_bytes(floats):
  return np.clip(np.rint(floats), 0, 255).astype(np.uint8)


def _halved(image, rng):  # 3 is bicubic
  return np.asarray(Image.fromarray(image).resize((32, 32), 3).resize((64, 64), 3))


def _jpeg(image, rng):
  file = io.BytesIO()
  Image.fromarray(image).save(file, "JPEG", quality=75)
  return np.asarray(Image.open(file))


def _decoded(image, rng):
  """Like the output of a small autoencoder: soft, blotched, tinted, slightly warped."""
  soft = ndimage.gaussian_filter(image.astype(float), (0.8, 0.8, 0))
  blotches = ndimage.gaussian_filter(rng.standard_normal(soft.shape), (2.5, 2.5, 0))
  soft += 4 * blotches / blotches.std() + rng.normal(0, 5, 3)
  warp = ndimage.gaussian_filter(rng.standard_normal((2, 64, 64)), (0, 5, 5))
  where = np.mgrid[:64, :64] + 0.5 * warp / warp.std()
  channels = [
    ndimage.map_coordinates(soft[..., c], where, order=1, mode="nearest") for c in range(3)
  ]
  return _to_bytes(np.stack(channels, axis=-1))


MILD = {
  "soft": lambda image, rng: ndimage.gaussian_filter(image, (0.8, 0.8, 0)),
  "halved": _halved,
  "jpeg": _jpeg,
  "grain": lambda image, rng: _to_bytes(image + rng.normal(0, 6, image.shape)),
  "brighter": lambda image, rng: _to_bytes(255 * (image / 255) ** 0.9),
  "darker": lambda image, rng: _to_bytes(255 * (image / 255) ** 1.1),
  "decoded": _decoded,
}


@pytest.mark.parametrize("kind", MILD)
def test_mild_degradations_are_forgiven(kind):
  rng = np.random.default_rng(4)
  result = judged(sample(10, rng), rng, spoil=MILD[kind])
  assert result["correct"].mean() >= 0.97
  if kind != "jpeg":  # which halves the resolution of colour: that is ugly
    assert np.mean(result["quality"] > quality.GOOD) >= 0.95


def is_true(scene, spec):
  """Whether the spec is true of the scene as drawn; None where that may be disputed."""
  wanted = [t for t in spec.things for _ in range(t.count)]
  if Counter(t.shape for t in wanted) != Counter(o.shape for o in scene.objects):
    return False
  if spec.background not in (None, scene.background):
    return False
  return max(
    (_suits(wanted, order, spec) for order in itertools.permutations(scene.objects)),
    key=[False, None, True].index,
  )


def _suits(wanted, objects, spec):
  verdict = True
  for thing, drawn in zip(wanted, objects, strict=True):
    if thing.shape != drawn.shape or thing.color not in (None, drawn.color):
      return False
    if thing.size and 8.2 < drawn.radius < 17:
      verdict = None
    elif thing.size and thing.size != ("small" if drawn.radius <= 8.2 else "large"):
      return False
  if spec.relation:
    dx, dy = objects[0].x - objects[1].x, objects[0].y - objects[1].y
    if abs(abs(dx) - abs(dy)) < 3:
      return None
    beside = "left of" if dx < 0 else "right of"
    over = "above" if dy < 0 else "below"
    if spec.relation != (beside if abs(dx) > abs(dy) else over):
      return False
  return verdict


def near_misses(spec, scene, rng):
  """Specs that differ from `spec` in one attribute."""

  def other(choices, value):
    choices = [c for c in choices if c != value]
    return choices[rng.integers(len(choices))]

  for i, thing in enumerate(spec.things):
    changes = {"shape": other(prompts.SHAPES, thing.shape)}
    if thing.color:
      changes["color"] = other(prompts.COLORS, thing.color)
    if thing.size:
      changes["size"] = other(prompts.SIZES, thing.size)
    if spec.category == "counting":
      changes["count"] = other((1, 2, 3, 4), thing.count)
    for name, value in changes.items():
      things = list(spec.things)
      things[i] = dataclasses.replace(thing, **{name: value})
      yield name, dataclasses.replace(spec, things=tuple(things))
  if spec.relation:
    relation = other(prompts.RELATIONS, spec.relation)
    yield "relation", dataclasses.replace(spec, relation=relation)
  background = other(prompts.BACKGROUNDS, scene.background)
  yield "background", dataclasses.replace(spec, background=background)


def test_other_prompts_are_refused_unless_true():
  rng = np.random.default_rng(5)
  refused, accepted, near = [], [], {}
  strangers = sample(15, rng)
  for spec in sample(8, rng):
    scene = render.layout(spec, rng)
    image = render.draw(scene, rng)
    truths = [is_true(scene, s) for s in strangers]
    false = [i for i in rng.integers(len(strangers), size=6) if truths[i] is False]
    for i in false + [i for i, truth in enumerate(truths) if truth]:
      seen = verifier.is_correct(image, prompts.caption(strangers[i]))
      (accepted if truths[i] else refused).append(seen == truths[i])
    for name, miss in near_misses(spec, scene, rng):
      if is_true(scene, miss) is False:
        wrong = not verifier.is_correct(image, prompts.caption(miss))
        near.setdefault(name, []).append(wrong)
  assert len(refused) > 500 and len(accepted) > 50
  assert np.mean(refused) >= 0.99
  assert np.mean(accepted) >= 0.97
  assert set(near) == {"shape", "color", "size", "count", "relation", "background"}
  assert np.mean(sum(near.values(), [])) >= 0.97
  assert min(np.mean(v) for v in near.values()) >= 0.9


def test_nothing_and_noise_are_never_right():
  rng = np.random.default_rng(6)
  images = [np.full((64, 64, 3), v, np.uint8) for v in (0, 104, 255)]
  images += [np.full((64, 64, 3), rgb, np.uint8) for rgb in palette.OBJECTS.values()]
  sizes = ((64, 64, 3), (512, 300, 3), (3, 3, 3))
  images += [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
  texts = [prompts.caption(s) for s in sample(2, rng)]
  for image in images:
    assert not any(verifier.is_correct(image, t) for t in texts)
    assert verifier.visual_quality(image) < 0.3


def picture(*shapes, side=64, ground=244):
  """Hand-drawn: masks of four times the size with their colours, averaged down."""
  canvas = np.full((4 * side, 4 * side, 3), ground, float)
  for (rows, columns), color in shapes:
    canvas[rows, columns] = palette.OBJECTS[color]
  return _to_bytes(canvas.reshape(side, 4, side, 4, 3).mean(axis=(1, 3)))


def disk(x, y, radius):
  return skimage.draw.disk((4 * y, 4 * x), 4 * radius, shape=(4 * 64, 4 * 64))


def box(x, y, width, height):
  low, high = (4 * y, 4 * x), (4 * (y + height) - 1, 4 * (x + width) - 1)
  return tuple(i.ravel() for i in skimage.draw.rectangle(low, high))


def test_objects_are_measured():
  image = picture((disk(18, 20, 10), "red"), (box(38, 34, 16, 16), "blue"), ground=18)
  found, background = verifier.find_objects(image)
  circle, square = sorted(found, key=lambda f: f.x)
  assert background == "black"
  assert (circle.shape, circle.color, circle.whole) == ("circle", "red", True)
  assert (square.shape, square.color, square.whole) == ("square", "blue", True)
  measured = [circle.x, circle.y, circle.radius, square.x, square.y, square.radius]
  expected = [18, 20, 10, 46, 42, 16 / np.sqrt(np.pi)]
  np.testing.assert_allclose(measured, expected, atol=0.4)

  double = np.kron(image, np.ones((2, 2, 1), np.uint8))
  first = min(verifier.find_objects(double)[0], key=lambda f: f.x)
  np.testing.assert_allclose([first.x, first.y, first.radius], [36, 40, 20], atol=0.8)


def test_an_explanation_says_what_is_wrong():
  red, blue = (disk(18, 20, 10), "red"), (disk(44, 40, 10), "blue")
  two = picture(red, blue)
  assert verifier.explain(two, "a red circle and a blue circle") == "right"
  assert verifier.explain(two, "a blue circle right of a red circle") == "right"
  assert verifier.explain(two, "three circles") == "2 circles instead of 3"
  assert verifier.explain(two, "two red circles") == "the circle is blue, not red"
  background = verifier.explain(two, "two circles on a black background")
  assert background == "the background is white, not black"
  assert verifier.explain(two, "a circle and a star") == "2 circles instead of 1"
  assert verifier.explain(two, "a star") == "no star, but a red circle and a blue circle"
  one = picture(red)
  assert verifier.explain(one, "a small circle") == "the circle is not small"
  cut = picture((disk(2, 20, 9), "red"))
  assert verifier.explain(cut, "a circle").endswith("is cut by the frame")
  sides = picture((disk(18, 20, 10), "red"), (box(36, 36, 16, 16), "blue"))
  assert verifier.explain(sides, "a square left of a circle") == (
    "the square is not left of the circle"
  )


def test_specks_touching_objects_and_bars():
  circle = (disk(20, 20, 10), "red")
  speck = picture(circle, (box(45, 45, 3, 3), "red"))
  assert verifier.is_correct(speck, "a red circle")
  third = picture(circle, (disk(46, 46, 5.5), "red"))
  assert not verifier.is_correct(third, "a red circle")
  touching = picture((box(20, 24, 15, 15), "red"), (box(35, 24, 15, 15), "blue"))
  assert verifier.is_correct(touching, "a red square and a blue square")
  bar = picture(circle, (box(36, 46, 22, 5), "blue"))
  assert verifier.explain(bar, "a circle") == "also a blue object of no known shape"


def test_quality_falls_as_a_flaw_grows():
  rng = np.random.default_rng(7)
  for spec in sample(1, rng):
    clean = render.layout(spec, rng)
    series = {
      "blur": (0.0, 0.8, 1.4, 2.0),
      "noise": (0.0, 5.0, 10.0, 18.0),
      "contrast": (1.0, 0.7, 0.55, 0.4),
    }
    for field, values in series.items():
      scenes = [dataclasses.replace(clean, **{field: v}) for v in values]
      rates = [
        verifier.visual_quality(render.draw(s, np.random.default_rng(8))) for s in scenes
      ]
      assert rates == sorted(rates, reverse=True)
      assert rates[0] - rates[-1] > 0.3


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 4.0, 8.0])
def test_no_blotch_of_any_scale_or_color_raises_quality(sigma):
  rng = np.random.default_rng(9)
  y, x = np.mgrid[:64, :64] + 0.5
  for spec in sample(1, rng)[::2]:
    clean = render.draw(render.layout(spec, rng), rng)
    best = verifier.visual_quality(clean)
    places = rng.uniform(4, 60, (6, 2))
    spots = [np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * sigma**2)) for a, b in places]
    sign = 1 if np.median(clean) < 128 else -1  # away from where light is cut off
    spots = sign * np.max(spots, axis=0)[..., None]
    for color in ((1, 1, 1), (1.2, -1.2, 0), (0.7, 0.7, -1.4), (1.7, 0, 0)):
      rates = [
        verifier.visual_quality(_to_bytes(clean + amplitude * spots * color))
        for amplitude in (8, 16, 32, 64, 96)
      ]
      assert max(rates) <= best and rates[-1] < best - (0.05 if sigma > 0.5 else 0.01)
      # Strong coloured ones look like objects, and are then judged as such.
      gentle = len(rates) if color == (1, 1, 1) else 2
      assert rates[:gentle] == sorted(rates[:gentle], reverse=True)


def test_specks_stains_and_shades_lower_quality():
  red, blue = (disk(20, 20, 12), "red"), (box(40, 40, 16, 16), "blue")
  clean = verifier.visual_quality(picture(red, blue))
  assert clean == pytest.approx(1, abs=1e-6)
  speck = (box(50, 10, 5, 5), "green")  # too small to be an object
  stain = (disk(20, 20, 3), "purple")  # within the disk
  for spoiled in (picture(red, blue, speck), picture(red, blue, stain)):
    assert verifier.visual_quality(spoiled) < 0.9
  shade = picture(red, blue).astype(float)
  shade[40:56, 40:56] += np.linspace(-25, 25, 16)[:, None]
  assert verifier.visual_quality(_to_bytes(shade)) < 0.8
  # An even slope of light is the background's own, also where it ends in white.
  for light in (np.full(64, -30.0), np.linspace(-16, 0, 64), np.linspace(0, 30, 64)):
    sloped = picture(red, blue).astype(float)
    ground = (sloped == 244).all(axis=-1)
    sloped += np.where(ground, light[:, None], 0)[..., None]
    assert verifier.visual_quality(_to_bytes(sloped)) > 0.95


def test_quality_follows_the_annotator():
  rng = np.random.default_rng(12)
  specs = sample(10, rng)
  found = [flaws.corpus_image(spec, rng) for spec in specs]
  rates = [verifier.visual_quality(image) for image, _ in found]
  penalties = [sum(annotator.PENALTIES.get(f, 0.0) for f in of) for _, of in found]
  assert np.corrcoef(rates, penalties)[0, 1] < -0.855
  halves = [np.asarray(Image.fromarray(image).reduce(2)) for image, _ in found]
  rates = [verifier.visual_quality(image) for image in halves]
  assert np.corrcoef(rates, penalties)[0, 1] < -0.82


def test_it_shares_nothing_with_the_renderer():
  folder = Path(verifier.__file__).parent
  for name in ("verifier", "segmentation", "silhouettes", "quality"):
    tree = ast.parse((folder / f"{name}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
      if isinstance(node, ast.Import | ast.ImportFrom):
        imported.update((getattr(node, "module", None) or "").split("."))
        imported.update(part for alias in node.names for part in alias.name.split("."))
    assert "numpy" in imported  # the names are seen
    assert not imported & {"render", "flaws", "annotator", "corpus", "builder"}


def test_bad_input_is_an_error():
  image = np.zeros((64, 64, 3), np.uint8)
  foreign = "a photo of a dog"
  with pytest.raises(ValueError, match="not a prompt of the shapes world"):
    verifier.is_correct(image, foreign)
  with pytest.raises(UserError, match=foreign):
    scorers.load_scorers(["shapes.correct"])["shapes.correct"][1](image[None], [foreign])
  with pytest.raises(ValueError, match="uint8"):
    verifier.visual_quality(image.astype(np.float32))
  with pytest.raises(ValueError, match="zip"):
    verifier.verify(image[None], ["a star", "a ring"])


def test_scorers_are_found_by_name():
  good = picture((disk(20, 20, 10), "red"))
  images = np.stack([good, good, np.full_like(good, 244)])
  texts = ["a red circle", "a star", "a red circle"]
  loaded = scorers.load_scorers(["shapes.quality", "shapes.correct"])
  assert list(loaded) == ["shapes.quality", "shapes.correct"]
  (version, rate), (_, check) = loaded.values()
  assert version == "2"
  np.testing.assert_array_equal(check(images, texts), [1.0, 0.0, 0.0])
  rates = rate(images, texts)
  assert rates.dtype == np.float64
  assert rates[0] == rates[1] > 0.9 > rates[2] == 0.0


@pytest.mark.parametrize("name", ["shapes.beauty", "clip.score", "correct", "shapes", ""])
def test_unknown_scorers_name_the_known(name):
  with pytest.raises(UserError, match=r"known are .*shapes\.correct, shapes\.quality"):
    scorers.load_scorers([name])


def test_prompts_have_categories_where_scorers_know_them():
  texts = ["a red circle", "two stars"]
  names = ["shapes.quality", "shapes.correct"]
  assert scorers.categorize(names, texts) == [prompts.parse(t).category for t in texts]
  assert scorers.categorize([], texts) == ["prompts", "prompts"]
  with pytest.raises(UserError, match="a photo of a dog"):
    scorers.categorize(names, [*texts, "a photo of a dog"])


@pytest.mark.parametrize(
  ("returned", "message"),
  [
    ("images.mean()", r"one number for each of 2 images .got an array of shape \(\)"),
    ("images", r"one number for each of 2 images .got an array of shape \(2, 4, 4, 3\)"),
    ("[1.0, float('nan')]", "gives nan for the prompt 'b'"),
    ("[1, 2]", ""),
  ],
)
def test_scores_are_one_finite_number_per_image(register_plugin, returned, message):
  register_plugin(
    *("jaxpref.scorers", "odd", "odd_scorers"),
    f"SCORERS = {{'one': ('1', lambda images, texts: {returned})}}\n",
  )
  sys.modules.pop("odd_scorers", None)
  _, function = scorers.load_scorers(["odd.one"])["odd.one"]
  images = np.zeros((2, 4, 4, 3), np.uint8)
  if not message:
    assert scorers.score("odd.one", function, images, ["a", "b"]).tolist() == [1.0, 2.0]
    return
  with pytest.raises(UserError, match=message):
    scorers.score("odd.one", function, images, ["a", "b"])


def test_a_scorer_has_a_version(register_plugin):
  register_plugin("jaxpref.scorers", "bare", "bare_scorers", "SCORERS = {'one': len}\n")
  with pytest.raises(
    UserError, match="'bare.one': its entry in SCORERS must be .version, func"
  ):
    scorers.load_scorers(["bare.one"])


def test_scorers_of_other_packages(register_plugin, caplog):
  register_plugin(
    *("jaxpref.scorers", "theirs", "their_scorers"),
    "import numpy as np\n"
    "SCORERS = {'bright': ('3', lambda images, texts: np.mean(images, (1, 2, 3)))}\n",
  )
  for name in ("theirs.bright", "their_scorers.bright"):
    version, score = scorers.load_scorers([name])[name]
    assert version == "3" and score(np.ones((2, 4, 4, 3), np.uint8), ["a", "b"]).tolist() == [
      1,
      1,
    ]
  with pytest.raises(UserError, match=r"known are .*shapes\.correct.*theirs\.\*"):
    scorers.load_scorers(["theirs.dark"])
  foreign = ["a photo of a dog"]
  names = ["shapes.correct", "theirs.bright"]
  assert evaluate.usable_scorers(names, foreign) == ("theirs.bright",)
  assert "not scored with shapes.correct: " in caplog.text
  assert scorers.categorize(["theirs.bright", "shapes.correct"], ["a star"]) == [
    "single_object"
  ]


def test_polygons_and_grown_labels_are_those_of_scikit_image():
  rng = np.random.default_rng(0)
  corners = [rng.uniform(-5, 45, (n, 2)) for n in range(3, 12) for _ in range(12)]
  corners += [
    rng.integers(0, 40, (n, 2)).astype(float) for n in range(3, 12) for _ in range(12)
  ]
  for points in corners:  # those with corners and edges on pixels as well
    want = skimage.draw.polygon2mask((40, 40), points)
    np.testing.assert_array_equal(silhouettes.fill_polygon(points, 40), want)
  for _ in range(20):
    labels = (rng.random((40, 40)) < 0.01) * rng.integers(1, 6, (40, 40))
    want = skimage.segmentation.expand_labels(labels, distance=5)
    np.testing.assert_array_equal(segmentation.expand_labels(labels, 5), want)
