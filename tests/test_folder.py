"""One's own pictures as experts: real photographs, every mode, every kind of bad file."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
import skimage.data
from PIL import Image, PngImagePlugin

from jaxpref.data import images
from jaxpref.data.sources import folder
from jaxpref.errors import UserError

# Photographs inside the scikit-image wheel: nothing is downloaded.
PHOTOS = {
  "astronaut": "an astronaut in an orange suit",
  "coffee": "a cup of coffee on a wooden table",
  "chelsea": "a tabby cat",
  "rocket": "a rocket on its launch pad",
}


def _photo(name):
  return getattr(skimage.data, name)()


def _write(path, image, caption, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
  if caption is not None:
    path.with_suffix(".txt").write_text(caption)


def _square(image, size):
  """An independent centre crop and area average, float [size, size, 3]."""
  height, width = image.shape[:2]
  side = min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  crop = image[top : top + side, left : left + side].astype(float)
  edges = np.linspace(0, side, size + 1).round().astype(int)
  rows = np.add.reduceat(crop, edges[:-1], axis=0)
  cells = np.add.reduceat(rows, edges[:-1], axis=1)
  area = np.diff(edges)
  return cells / (area[:, None, None] * area[None, :, None])


# --------------------------------------------------------------------- what works


def test_photographs_in_both_layouts(tmp_path, caplog):
  _write(tmp_path / "chelsea.jpg", _photo("chelsea"), PHOTOS["chelsea"], quality=95)
  _write(tmp_path / "rocket.webp", _photo("rocket"), PHOTOS["rocket"], quality=95)
  _write(tmp_path / "001" / "whatever.png", _photo("astronaut"), None)
  (tmp_path / "001" / "caption.txt").write_text(PHOTOS["astronaut"] + "\n")
  _write(tmp_path / "002" / "photo.JPEG", _photo("coffee"), None, quality=95)
  (tmp_path / "002" / "caption.txt").write_text(PHOTOS["coffee"])

  found = folder.load_folder(str(tmp_path), image_size=64)
  assert {e.source: e.caption for e in found} == {
    "001/whatever.png": PHOTOS["astronaut"],
    "002/photo.JPEG": PHOTOS["coffee"],
    "chelsea.jpg": PHOTOS["chelsea"],
    "rocket.webp": PHOTOS["rocket"],
  }
  assert [e.source for e in found] == sorted(e.source for e in found)
  assert not caplog.records
  names = {caption: name for name, caption in PHOTOS.items()}
  for example in found:
    assert example.image.shape == (64, 64, 3)
    assert example.image.dtype == np.uint8
    expected = _square(_photo(names[example.caption]), 64)
    # Lanczos and box averages of a photograph differ by its finest detail alone.
    assert np.abs(example.image - expected).mean() < 6
    assert np.abs(example.image.mean(axis=(0, 1)) - expected.mean(axis=(0, 1))).max() < 1.5


def test_order_and_limit(tmp_path):
  for name in ("b/x.png", "a.png", "c.png", "B.png"):
    _write(tmp_path / name, Image.new("RGB", (8, 8)), f"picture {name}")
  (tmp_path / "d.png").write_bytes(b"never read")
  (tmp_path / "d.txt").write_text("d")
  found = folder.load_folder(tmp_path, image_size=8, limit=4)
  assert [e.source for e in found] == ["B.png", "a.png", "b/x.png", "c.png"]
  assert len(folder.load_folder(tmp_path, image_size=8, limit=2)) == 2
  assert len(folder.load_folder(tmp_path, image_size=8, limit=99)) == 4


def test_home_is_expanded_and_hidden_files_are_passed_over(tmp_path, monkeypatch, caplog):
  monkeypatch.setenv("HOME", str(tmp_path))
  _write(tmp_path / "mine" / "a.png", Image.new("RGB", (8, 8)), "a")
  for name in ("._a.jpg", ".DS_Store", "__MACOSX/a.jpg", ".git/x.png"):
    (tmp_path / "mine" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "mine" / name).write_bytes(b"junk")
  assert len(folder.load_folder("~/mine", image_size=8)) == 1
  assert not caplog.records


def test_captions_are_one_line_of_utf8(tmp_path):
  _write(tmp_path / "a.png", Image.new("RGB", (8, 8)), None)
  (tmp_path / "a.txt").write_bytes("\ufeffun café,\r\n  très  bon \n".encode())
  (example,) = folder.load_folder(tmp_path, image_size=8)
  assert example.caption == "un café, très bon"


def test_own_caption_goes_before_the_shared_one(tmp_path):
  _write(tmp_path / "a.png", Image.new("RGB", (8, 8)), "of its own")
  _write(tmp_path / "b.png", Image.new("RGB", (8, 8)), None)
  (tmp_path / "caption.txt").write_text("shared")
  found = folder.load_folder(tmp_path, image_size=8)
  assert {e.source: e.caption for e in found} == {"a.png": "of its own", "b.png": "shared"}


def _read(tmp_path, image, suffix=".png", size=4, **options):
  _write(tmp_path / f"x{suffix}", image, "x", **options)
  (example,) = folder.load_folder(tmp_path, image_size=size)
  return example.image.astype(int)


@pytest.mark.parametrize("wide", [True, False])
def test_the_centre_is_kept_as_if_cropped_after_resizing(tmp_path, wide):
  photo = _photo("rocket")[:300, :600]
  photo = photo if wide else photo.transpose(1, 0, 2)
  size, box = ((80, 40), (20, 0, 60, 40)) if wide else ((40, 80), (0, 20, 40, 60))
  whole = Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS)
  assert np.abs(_read(tmp_path, photo, size=40) - np.asarray(whole.crop(box))).mean() < 0.5


def test_a_single_pixel_is_enlarged(tmp_path):
  assert (_read(tmp_path, np.full((1, 1, 3), 9, np.uint8), size=5) == 9).all()


def test_exif_turns_the_image(tmp_path):
  image = np.zeros((16, 16, 3), np.uint8)
  image[:8] = 255  # white above
  exif = Image.Exif()
  exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees clockwise
  turned = _read(tmp_path, image, ".jpg", exif=exif, quality=100)
  assert turned[:, 3].min() > 200  # white on the right
  assert turned[:, 0].max() < 50


def test_transparent_parts_are_white(tmp_path):
  rgba = np.zeros((4, 4, 4), np.uint8)
  rgba[:, :2] = (200, 0, 0, 255)
  rgba[:, 2:] = (0, 0, 0, 0)
  rgba[0] = (0, 0, 100, 128)
  image = _read(tmp_path, rgba)
  assert (image[1:, :2] == (200, 0, 0)).all()
  assert (image[1:, 2:] == 255).all()
  assert np.abs(image[0] - (127, 127, 177)).max() <= 1  # half of it over white


def _png_of_16_bits(color_type, pixels, clear):
  """Writes a PNG by its specification; Pillow writes no colours of 16 bits."""

  def part(name, data):
    return (
      struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    )

  height, width = pixels.shape[:2]
  lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
  return (
    b"\x89PNG\r\n\x1a\n"
    + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))
    + part(b"tRNS", np.asarray(clear, ">u2").tobytes())
    + part(b"IDAT", zlib.compress(lines))
    + part(b"IEND", b"")
  )


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3)])
def test_the_clear_colour_of_16_bits_is_white(color_type, channels):
  pixels = np.full((4, 4, channels), 25700)  # 100 of 255
  for shade in (0, 5140):
    pixels[0] = shade
    found = images.decode(_png_of_16_bits(color_type, pixels, [shade] * channels))
    assert (found[0] == 255).all() and (found[1:] == 100).all()


def test_long_texts_of_a_png_are_no_damage():
  texts = PngImagePlugin.PngInfo()
  texts.add_text("workflow", "x" * 3_000_000, zip=True)
  Image.new("RGB", (4, 4), (9, 9, 9)).save(buffer := io.BytesIO(), "PNG", pnginfo=texts)
  assert (images.decode(buffer.getvalue()) == 9).all()


def test_grey_with_alpha_and_palette_with_a_transparent_colour(tmp_path):
  la = np.stack([np.full((4, 4), 90), np.full((4, 4), 0)], axis=-1).astype(np.uint8)
  assert (_read(tmp_path, Image.fromarray(la, "LA")) == 255).all()
  palette = Image.new("P", (4, 4), 1)
  palette.putpalette([0, 0, 0, 10, 200, 30])
  assert (_read(tmp_path, palette, transparency=0) == (10, 200, 30)).all()
  assert (_read(tmp_path, palette, transparency=1) == 255).all()
  (tmp_path / "x.png").unlink()
  assert np.abs(_read(tmp_path, palette, ".gif") - (10, 200, 30)).max() <= 1


@pytest.mark.parametrize(
  ("pixels", "suffix", "expected"),
  [
    (np.full((4, 4), 77, np.uint8), ".png", 77),
    (np.full((4, 4), True), ".png", 255),
    (np.full((4, 4), 77 * 257, np.uint16), ".png", 77),
    (np.full((4, 4), 77 * 257, np.uint16), ".tif", 77),
    (np.full((4, 4), 77 * 257, np.int32), ".tif", 77),
    (np.full((4, 4), 77, np.int32), ".tif", 77),
    (np.full((4, 4), 77 / 255, np.float32), ".tif", 77),
    (np.full((4, 4), 77, np.float32), ".tif", 77),
    # What is white says the file's depth, however dark its brightest pixel is.
    *(
      (np.full((4, 4), value, np.uint16), suffix, expected)
      for suffix in (".png", ".tif")
      for value, expected in ((0, 0), (1, 0), (2, 0), (200, 1), (255, 1), (3000, 12))
    ),
    (np.full((4, 4), 200, np.uint16), ".pgm", 1),
    (np.full((4, 4), 65535, np.uint16), ".png", 255),
  ],
)
def test_greys_of_any_depth(tmp_path, pixels, suffix, expected):
  assert (_read(tmp_path, Image.fromarray(pixels), suffix) == expected).all()


def test_numbers_that_are_not_finite_are_no_picture(tmp_path, caplog):
  with pytest.raises(UserError, match="see the warning"):
    _read(tmp_path, Image.fromarray(np.full((4, 4), np.nan, np.float32)), ".tif")
  assert "x.tif (it has non-finite values)" in caplog.text


def test_cmyk(tmp_path):
  image = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
  read = _read(tmp_path, image, ".jpg", quality=100)
  assert np.abs(read - (200, 40, 90)).max() <= 4


def test_large_jpegs_lose_nothing_by_their_short_cut(tmp_path):
  # Decoded at a fraction of its size, at 128 of 512 pixels, the picture stays the same.
  photo = _photo("astronaut")
  short_cut = _read(tmp_path, photo, ".jpg", size=64, quality=100)
  (tmp_path / "x.jpg").unlink()
  in_full = _read(tmp_path, photo, ".png", size=64)
  assert np.abs(short_cut - in_full).mean() < 3


def test_format_is_told_by_content_and_first_frames_are_taken(tmp_path):
  frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
  file = io.BytesIO()
  frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
  (tmp_path / "x.jpg").write_bytes(file.getvalue())
  (tmp_path / "x.txt").write_text("x")
  (example,) = folder.load_folder(tmp_path, image_size=4)
  assert (example.image == (255, 0, 0)).all()


# ----------------------------------------------------------------- what does not work


def _bomb():
  """A PNG that says it is 20,000 x 20,000."""
  header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)

  def chunk(kind, data):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

  parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + parts


def _jpeg():
  file = io.BytesIO()
  Image.fromarray(_photo("chelsea")).save(file, "JPEG")
  return file.getvalue()


def _png():
  file = io.BytesIO()
  Image.fromarray(_photo("chelsea")).save(file, "PNG")
  return file.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
BAD = {
  "truncated jpeg": ("x.jpg", _jpeg()[:2000], b"x", "truncated"),
  "truncated png": ("x.png", _png()[:20_000], b"x", "x.png"),
  "damaged png": ("x.png", _png()[:5000] + b"\0" * 900 + _png()[5900:], b"x", "x.png"),
  "bomb": ("x.png", _bomb(), b"x", "too many pixels"),
  "text": ("x.jpg", b"<html>not found</html>", b"x", "not an image"),
  "empty file": ("x.webp", b"", b"x", "not an image"),
  "postscript": ("x.jpg", EPS, b"x", "EPS is not read"),
  "no caption": ("x.jpg", _jpeg(), None, "no caption"),
  "empty caption": ("x.jpg", _jpeg(), b"", "empty caption"),
  "blank caption": ("x.jpg", _jpeg(), b" \n\t", "empty caption"),
  "latin-1 caption": ("x.jpg", _jpeg(), "café".encode("latin-1"), "not UTF-8"),
  "utf-16 caption": ("x.jpg", _jpeg(), "coffee".encode("utf-16"), "not UTF-8"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named_and_the_rest_is_used(tmp_path, caplog, kind):
  name, data, caption, reason = BAD[kind]
  _write(tmp_path / "good.png", _photo("rocket"), "a rocket")
  bad = tmp_path / "sub" / name
  bad.parent.mkdir()
  bad.write_bytes(data)
  if caption is not None:
    bad.with_suffix(".txt").write_bytes(caption)
  found = folder.load_folder(tmp_path, image_size=16)
  assert [e.source for e in found] == ["good.png"]
  (record,) = caplog.records
  assert record.levelno == logging.WARNING
  message = record.getMessage()
  assert ": 1 file cannot be used" in message
  assert f"sub/{name} (" in message
  assert reason in message
  assert "\n" not in message
  (tmp_path / "good.png").unlink()
  with pytest.raises(UserError, match="no image with a caption in") as error:
    folder.load_folder(tmp_path, image_size=16)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("files", "named"),
  [
    (["caption.txt"], "sub/caption.txt (a caption without an image)"),
    (
      ["caption.txt", "a.png", "b.png"],
      "sub/caption.txt (a caption for several images: a.png, b.png)",
    ),
    (["a.txt"], "sub/a.txt (a caption without an image)"),
    (["a.txt", "a.png", "a.jpg"], "sub/a.txt (a caption for several images: a.jpg, a.png)"),
  ],
)
def test_captions_need_one_image(tmp_path, caplog, files, named):
  _write(tmp_path / "good.png", _photo("rocket"), "a rocket")
  (tmp_path / "sub").mkdir()
  for name in files:
    data = b"a caption" if name.endswith("txt") else _png()
    (tmp_path / "sub" / name).write_bytes(data)
  assert len(folder.load_folder(tmp_path, image_size=16)) == 1
  assert named in caplog.records[0].getMessage()


def test_many_bad_files_are_counted(tmp_path, caplog):
  _write(tmp_path / "good.png", _photo("rocket"), "a rocket")
  for i in range(57):
    (tmp_path / f"x{i:02d}.jpg").write_bytes(b"")
    (tmp_path / f"x{i:02d}.txt").write_text("x")
  folder.load_folder(tmp_path, image_size=16)
  (record,) = caplog.records
  message = record.getMessage()
  assert "57 files cannot be used: x00.jpg (not an image: empty), x01.jpg" in message
  assert message.endswith("x49.jpg (not an image: empty) and 7 more")


def test_nothing_there(tmp_path):
  with pytest.raises(UserError, match="no image with a caption"):
    folder.load_folder(tmp_path, image_size=16)
  (tmp_path / "file").write_text("")
  for path in ("", str(tmp_path / "missing"), str(tmp_path / "file")):
    with pytest.raises(UserError, match="is not a folder"):
      folder.load_folder(path, image_size=16)
