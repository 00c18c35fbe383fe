"""The report stands alone, escapes what it is given and says who won."""

import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image, ImageFont

from jaxpref.evaluation import glossary, image_grid, panels, report

EVIL = "<script>alert('x')</script> & \"quotes\""


def entry(win_rate, interval, *, base=0.5, tuned=0.6, p=1e-12, **other):
  side = {"std": 0.1, "n": 600}
  return {
    "base": {"mean": base, **side},
    "tuned": {"mean": tuned, **side},
    "binary": False,
    "difference": tuned - base,
    "difference_interval": [tuned - base - 0.01, tuned - base + 0.01],
    "interval": interval,
    "loss": 1 - win_rate,
    "p_value": p,
    "prompts": 300,
    "selected_training_data": False,
    "tie": 0.0,
    "win": win_rate,
    "win_rate": win_rate,
    "win_rate_decided": win_rate,
    **other,
  }


WON = entry(0.71, [0.66, 0.76])
CORRECT = entry(0.575, [0.55, 0.6], base=0.48, tuned=0.63, binary=True)
WORSE = entry(0.43, [0.4, 0.46], base=0.63, tuned=0.48, p=1e-5, binary=True)


def picture(size, kind="PNG"):
  data = io.BytesIO()
  Image.new("RGB", (size, size), (200, 30, 60)).save(data, kind)
  return data.getvalue()


def write(path, **changed):
  example = {
    "prompt": EVIL,
    "category": "two_object",
    "seed": 7,
    "base_png": picture(64),
    "tuned_png": picture(64, "JPEG"),
    "scores": {
      "quality-1": {"base": 0.61, "tuned": 0.712},
      "verifier-1": {"base": 1.0, "tuned": 0.0},
    },
  }
  row = {"category": "counting", "base": 0.5, "tuned": 0.6, "difference": 0.1, "n": 9}
  contents = {
    "title": "run <1>",
    "config": {"optim": {"lr": 1e-4, "note": EVIL}, "seed": 0},
    "results": {"quality-1": WON, "verifier-1": CORRECT},
    "categories": [{**row, "scorer": s} for s in ("quality-1", "verifier-1")],
    "curves": {
      "loss": [(i, 1 / (i + 1)) for i in range(500)] + [(500, float("nan"))],
      "err/policy": [(0, 0.1), (1, 0.2)],
      "err/expert": [(0, 0.3), (1, 0.2)],
      "optim/lr": [(0, 1e-4), (10, 1e-4)],
    },
    "examples": [example],
    "facts": {"device": EVIL, "updates": 150},
    **changed,
  }
  report.write_report(path, **contents)
  return path.read_text("utf-8")


class Page(html.parser.HTMLParser):
  """Keeps all tags with their attributes and the visible text; checks the nesting."""

  VOID = ("meta", "img", "line", "path", "circle", "br", "rect")

  def __init__(self, text):
    super().__init__()
    self.tags, self.text, self.open = [], "", []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open[-1:] not in (["style"], ["title"]):
      self.text += data

  def all(self, tag, **wanted):
    found = [a for t, a in self.tags if t == tag]
    return [a for a in found if all(a.get(k) == v for k, v in wanted.items())]


def test_page_is_well_formed_and_asks_for_nothing(tmp_path):
  text = write(tmp_path / "report.html")
  page = Page(text)
  links = [
    value
    for _, attrs in page.tags
    for name, value in attrs.items()
    if name in ("src", "href", "srcset", "xlink:href", "poster", "data", "action")
  ]
  assert len(links) == 2 and all(link.startswith("data:image/") for link in links)
  assert not re.search(r"url\(|@import|https?://|//[a-z]", text)
  assert not page.all("script") and not page.all("link")
  assert "default-src 'none'" in page.all("meta")[-1]["content"]
  assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_everything_from_outside_is_escaped(tmp_path):
  text = write(tmp_path / "report.html")
  page = Page(text)
  assert "<script" not in text
  assert page.text.count(EVIL) == 2  # the prompt's caption and the fact
  assert EVIL.replace('"', '\\"') in page.text  # the configuration, as JSON
  alts = [image["alt"] for image in page.all("img")]
  assert alts == [f"base model: {EVIL}", f"tuned model: {EVIL}"]
  assert "<h1>run &lt;1&gt;</h1>" in text


def test_characters_that_reorder_a_page_are_replaced(tmp_path):
  odd = "a\x00b\x1bc\u202ed\u200de \u05d0"  # a joiner and Hebrew letters stay
  text = write(tmp_path / "report.html", facts={"prompt": odd})
  assert not set("\x00\x1b\u202e") & set(text)
  assert "a\ufffdb\ufffdc\ufffdd\u200de \u05d0" in text


def test_tables_have_headers_and_pictures_scores(tmp_path):
  page = Page(write(tmp_path / "report.html"))
  assert len(page.all("table")) == 3
  assert len(page.all("th", scope="col")) == 8 + 2 * 3
  assert len(page.all("th", scope="row")) == 2 + 2
  for badge in ("quality-1: 0.61", "quality-1: 0.712", "verifier-1: no"):
    assert badge in page.text
  assert "chosen at random with a fixed seed, not by score" in page.text
  [tuned] = page.all("figure", **{"class": "tuned winner"})
  assert tuned and page.all("figure", **{"class": "base loser"})
  assert "optim.lr" in page.text and "0.0001" in page.text


def test_only_small_pictures_are_doubled(tmp_path):
  def images(base, tuned):
    example = {"prompt": "a", "category": "b", "seed": 0, "scores": {}}
    example |= {"base_png": picture(base), "tuned_png": picture(tuned)}
    page = Page(write(tmp_path / "report.html", examples=[example]))
    return [(i["class"], i["width"]) for i in page.all("img")]

  assert images(64, 128) == [("tiny", "128"), ("tiny", "256")]
  assert images(129, 512) == [("large", "129"), ("large", "288")]


def test_empty_run_still_has_a_page(tmp_path):
  nothing = {"results": {}, "categories": [], "curves": {}, "examples": []}
  page = Page(write(tmp_path / "report.html", **nothing))
  assert "No scorer rated these images" in page.text
  assert not page.all("svg") and not page.all("table")


def test_unreadable_picture_writes_nothing(tmp_path):
  bad = {"prompt": "a", "category": "b", "seed": 0, "scores": {}}
  with pytest.raises(ValueError, match="must be a PNG or JPEG"):
    write(tmp_path / "r.html", examples=[{**bad, "base_png": b"", "tuned_png": b""}])
  assert list(tmp_path.iterdir()) == []


def test_verdict_won():
  results = {"quality-1": WON, "verifier-1": CORRECT}
  assert report.verdict(results) == (
    "On 300 held-out prompts, quality-1 prefers the tuned model in 71 % of the pairs "
    "(95 % interval 66 to 76 %, p = 1e-12); images judged correct by verifier-1 rise "
    "from 48 % to 63 %."
  )


def test_verdict_lost_is_told_from_the_bases_side():
  lost = entry(0.38, [0.33, 0.42], base=0.6, tuned=0.5, p=1e-20)
  assert report.verdict({"quality-1": lost, "verifier-1": WORSE}) == (
    "On 300 held-out prompts, quality-1 prefers the base model in 62 % of the pairs "
    "(95 % interval 58 to 67 %, p < 1e-15); images judged correct by verifier-1 fall "
    "from 63 % to 48 %."
  )


def test_verdict_undecided():
  even = entry(0.51, [0.46, 0.56], p=0.62)
  same = entry(0.505, [0.48, 0.53], base=0.48, tuned=0.49, p=0.4, binary=True)
  assert report.verdict({"quality-1": even, "verifier-1": same}) == (
    "On 300 held-out prompts, it is undecided which model is better: quality-1 prefers "
    "the tuned model in 51 % of the pairs (95 % interval 46 to 56 %, p = 0.62); images "
    "judged correct by verifier-1 go from 48 % to 49 %, which may be chance (p = 0.4)."
  )
  equal = entry(0.5, [0.5, 0.5], base=0.48, tuned=0.48, p=1.0, binary=True)
  text = report.verdict({"quality-1": even, "verifier-1": equal})
  assert text.endswith("images judged correct by verifier-1 stay at 48 % (p = 1).")


def test_verdict_on_one_prompt_and_on_mixed_evidence(tmp_path):
  lone = entry(1.0, [None, None], p=None, prompts=1)
  lone["difference_interval"] = [None, None]
  text = report.verdict({"q-1": lone})
  assert text.startswith("On 1 held-out prompt, it is undecided")
  assert "one prompt gives no interval" in text
  Page(write(tmp_path / "a.html", results={"q-1": lone}, categories=[]))

  mixed = {"quality-1": WON, "verifier-1": WORSE}
  assert "; but images judged correct by verifier-1 fall" in report.verdict(mixed)
  page = Page(write(tmp_path / "b.html", results=mixed))
  assert "Mixed result" in page.text


def test_a_scorer_that_selected_the_data_does_not_speak_first():
  results = {
    "a-1": {**WON, "selected_training_data": True},
    "b-1": entry(0.4, [0.36, 0.44], base=0.6, tuned=0.5),
    "c-1": WON,
  }
  assert "b-1 prefers the base model in 60 %" in report.verdict(results)
  assert report.remarks(results) == [
    "a-1 had a part in the training, so it is not evidence.",
    "c-1 prefers the tuned model: 71 % of the pairs for the tuned model, p = 1e-12.",
  ]
  assert "c-1 prefers the tuned model" in report.verdict(results, headline="c-1")
  with pytest.raises(ValueError, match=r"one of a-1, b-1, c-1 \(got 'x-1'"):
    report.verdict(results, headline="x-1")


def test_the_diversity_of_both_models_and_the_warnings_are_shown(tmp_path):
  assert 'id="diversity"' not in write(tmp_path / "none.html")
  overall = {"base": {"vendi": 3.25, "distance": 0.125, "images": 9}}
  overall["tuned"] = {"vendi": 2.5, "distance": None, "images": 9}
  found = {"features": "pixels", "by_prompt": None, "overall": overall}
  text = write(tmp_path / "a.html", diversity=found, warnings=[f"a falls {EVIL}"])
  page = Page(text).text
  for words in ("3.250", "0.125", "2.500", "no diversity by prompt", f"a falls {EVIL}"):
    assert words in page
  assert '<p class="warning">' in text


def test_a_win_by_the_scorer_that_selected_the_data_alone_decides_nothing(tmp_path):
  chose = {"a-1": {**WON, "selected_training_data": True}}
  page = Page(write(tmp_path / "report.html", results=chose)).text
  assert "Undecided" in page and "Tuned model preferred" not in page
  assert "a-1 had a part in the training, so it is not evidence." in page
  assert report.verdict(chose).endswith(
    "it is undecided which model is better: a-1 prefers the tuned model in 71 % of the pairs "
    "(95 % interval 66 to 76 %, p = 1e-12), but had a part in the training, so it is not "
    "evidence."
  )


def test_a_binary_reward_is_not_part_of_the_verdict():
  right = entry(0.6, [0.55, 0.65], base=0.4, tuned=0.6) | {"binary": True}
  results = {"a-1": right, "b-1": WON}
  assert "a-1 rise from 40 % to 60 %" in report.verdict(results)
  results["a-1"] = right | {"selected_training_data": True}
  assert "a-1" not in report.verdict(results)


def test_panels_place_points_and_hide_no_value():
  spike = [(i, 0.0) for i in range(1000)]
  spike[437] = (437, 10.0)
  loss, err = panels.lay_out(
    {"loss": spike, "err/a": [(0, 1.0), (10, 3.0)], "err/b": [(5, float("inf"))]}
  )
  assert loss["title"] == "loss" and err["title"] == "err"
  # 120 means for the line; the band goes there and back and reaches the spike.
  assert loss["series"][0]["line"].count("L") == 119
  ys = [float(p.split()[1]) for p in loss["series"][0]["band"][1:].split("L")]
  assert len(ys) == 240 and min(ys) == 8.0 and max(ys) == 130.0
  # Corners of the plot: x in 42..332, y from 130 up to 8.
  assert err["series"][0]["line"] == "M42 130L332 8"
  assert err["series"][0]["band"] == "" and err["dropped"] == 1
  assert [label for _, label in err["grid"]] == ["1", "2", "3"]
  assert panels.lay_out({"x": [(0, float("nan"))], "y": []}) == []


def labels(name, values):
  [panel] = panels.lay_out({name: list(enumerate(values, 1))})
  return [label for _, label in panel["grid"]], panel["series"][0]


def test_axes_suit_what_is_counted_or_shared():
  # Whole numbers from 0, whatever the number; no number of updates is negative.
  assert labels("optim/skipped", [0, 0, 0])[0] == ["0", "1"]
  assert labels("optim/skipped", [0, 1, 3])[0] == ["0", "1", "2", "3"]
  assert labels("optim/skipped", [7, 7])[0] == ["0", "2", "4", "6"]
  share, line = labels("dro/active", [1.0, 0.97])
  assert share == ["0 %", "50 %", "100 %"] and line["last"] == "97 %"
  # A constant lies in the middle of its axis, which begins at 0.
  assert labels("x", [3.0, 3.0])[0] == ["0", "2", "4", "6"]
  assert labels("x", [3.0])[1]["dot"][1] == (130 + 8) / 2
  assert labels("x", [-3.0, -3.0])[0] == ["-6", "-4", "-2", "0"]
  assert labels("x", [0.0])[0] == ["0", "0.5", "1"]
  # Neighbouring labels differ, also of values that hardly do.
  close, _ = labels("x", [0.69314718, 0.69314719, 0.69314720])
  assert len(set(close)) == len(close) >= 2
  assert labels("x", [0.01, 0.02])[0] == ["0.01", "0.015", "0.02"]


def test_no_axis_of_a_category_table_passes_below_zero_for_nothing(tmp_path):
  row = {"scorer": "quality-1", "difference": 0.7, "n": 1}
  rows = [{**row, "category": "counting", "base": 0.0, "tuned": 0.7}]
  page = Page(write(tmp_path / "a.html", categories=rows))
  assert "0.0000.756" in page.text and "1 pair" in page.text
  rows = [{**row, "category": "counting", "base": -0.5, "tuned": 0.5}]
  assert "-0.5800.580" in Page(write(tmp_path / "b.html", categories=rows)).text


def test_pictures_come_before_the_training_curves(tmp_path):
  unjudged = {"results": {}, "categories": []}
  for changed in ({}, unjudged):
    headings = re.findall(r"<h2[^>]*>([^<]*)", write(tmp_path / "r.html", **changed))
    assert headings[-3:] == ["Images", "Training", "The run"]
  assert headings[0] == "Images"


def test_long_captions_are_cut_and_can_be_unfolded(tmp_path):
  example = {"category": "b", "seed": 0, "scores": {}}
  example |= {"base_png": picture(64), "tuned_png": picture(64)}
  prompts = ["short", "word " * 50 + "END", "word " * 5000 + "END", "\u56fe" * 300]
  pair = {"note": "", "winner_png": picture(64), "loser_png": picture(64)}
  text = write(
    tmp_path / "report.html",
    examples=[{**example, "prompt": p} for p in prompts],
    pairs=[{**pair, "prompt": prompts[2]}],
    facts={"updates": "1" * 5000},
    config={"data": {"good_prefix": "y" * 5000}},
  )
  page = Page(text)
  assert len(text) < 60_000
  assert all(len(image["alt"]) < 200 for image in page.all("img"))
  assert page.text.count("END") == 1  # of the one that is 253 characters long
  assert "beginning of the prompt's 25,003 characters" in page.text
  assert page.text.count("whole prompt") == 2
  # A text without spaces is cut, too, not dropped.
  assert "\u56fe" * 160 + " ..." in page.text and "\u56fe" * 300 in page.text


def test_shorten():
  assert report.shorten("a red circle", 12) == "a red circle"
  assert report.shorten("a red circle", 11) == "a red ..."
  assert report.shorten("x" * 20, 11) == "x" * 11 + " ..."
  assert report.shorten("a " + "x" * 20, 11) == "a " + "x" * 9 + " ..."


def test_metrics_are_explained_beside_their_curves(tmp_path):
  curves = {"dro/active": [(0, 1.0)], "err/policy_e": [(0, 1.0)], "err/policy_p": [(0, 0.0)]}
  curves |= {"foreign/<b>": [(0, 1.0)]}
  page = Page(write(tmp_path / "report.html", curves=curves))
  for name in ("dro/active", "err/policy_e", "err/policy_p"):
    assert glossary.find_metric(name).meaning in page.text
  assert len(page.all("details", **{"class": "more"})) == 2
  assert "foreign/<b>" in page.text


def test_the_glossary_is_short_and_knows_no_strangers():
  assert glossary.find_metric("err/policy_12").meaning.endswith("1 is the best.")
  assert glossary.find_metric("err/policy_") is None
  assert glossary.find_metric("dro") is None
  assert max(len(metric.meaning) for metric in glossary.METRICS.values()) < 200


@pytest.mark.parametrize(
  "low, high, expected",
  [
    (0, 1, [0, 0.5, 1]),
    (0.13, 0.41, [0.2, 0.3, 0.4]),
    (-3, 47, [0, 20, 40]),
    (0.9e-4, 1.1e-4, [0.9e-4, 1e-4, 1.1e-4]),
  ],
)
def test_ticks_are_round_and_inside(low, high, expected):
  np.testing.assert_allclose(panels.ticks(low, high), expected, atol=1e-15)


def test_flatten():
  flat = report.flatten({"a": {"b": (1, 2), "c": {"d": None}}, "e": "x"})
  assert flat == [("a.b", "[1, 2]"), ("a.c.d", "null"), ("e", '"x"')]


def colored(color, size=(6, 8)):
  return np.full((*size, 3), color, np.uint8)


def test_grid_places_and_magnifies_pixels():
  colors = [(200, 10, 20), (10, 200, 20), (10, 20, 200), (120, 90, 60)]
  rows = [[colored(colors[0]), colored(colors[1])], [colored(c) for c in colors[2:]]]
  picture = np.asarray(image_grid.image_grid(rows, columns=2, scale=3, gap=4))
  # margin 12, images 24 x 18, 4 apart, 20 between columns of rows
  assert picture.shape == (12 + 18 + 4 + 12, 12 + 52 + 20 + 52 + 12, 3)
  for left, color in zip((12, 40, 84, 112), colors, strict=True):
    inside = picture[12:30, left : left + 24]
    assert (inside == color).all()
    ring = picture[11:31, left - 1 : left + 25].copy()
    ring[1:-1, 1:-1] = 255
    assert (ring == 255).all()


def test_grid_captions_make_room_and_are_drawn():
  rows = [[colored((0, 0, 0), (32, 32))] * 2] * 3
  plain = image_grid.image_grid(rows)
  long = "a large purple hexagon to the left of a small orange circle"
  captioned = image_grid.image_grid(
    rows, captions=["short", long, ""], headers=["base", "tuned"], font_size=10
  )
  font = ImageFont.load_default(10)
  lines = image_grid.wrap(long, font, 70)
  assert " ".join(lines) == long and len(lines) > 3
  assert all(font.getlength(line) <= 70 for line in lines)
  # 14 pixels a line; the header's line and gap.
  assert captioned.height - plain.height == (1 + len(lines)) * 14 + 14 + 6
  ink = np.asarray(captioned.convert("L")) < 200
  assert ink[18:32].any() and ink[70:88].any()


def test_wrap_cuts_a_word_that_is_too_long():
  font = ImageFont.load_default(10)
  lines = image_grid.wrap("to " + "x" * 50, font, 60)
  assert "".join(lines) == "to" + "x" * 50
  assert all(font.getlength(line) <= 60 for line in lines)


def test_grid_refuses_what_it_cannot_draw():
  image = colored((1, 2, 3))
  for bad, match in (
    (([],), "at least one"),
    (([[image], [image, image]],), "must have one length"),
    (([[image, colored((1, 2, 3), (5, 5))]],), "must have one size"),
    (([[image.astype(np.float32)]],), "uint8"),
    (([[image[..., :1]]],), "uint8"),
  ):
    with pytest.raises(ValueError, match=match):
      image_grid.image_grid(*bad)
  with pytest.raises(ValueError, match="2 captions for 1 rows"):
    image_grid.image_grid([[image]], captions=["a", "b"])
  with pytest.raises(ValueError, match="2 headers"):
    image_grid.image_grid([[image]], headers=["a", "b"])
  with pytest.raises(ValueError, match="at least 1"):
    image_grid.image_grid([[image]], scale=0)
