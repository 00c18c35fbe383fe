"""The decoder of image files that all data sources share."""

import io
import stat
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from jaxpref.data.bad_rows import BadRow
from jaxpref.errors import first_line

# Pillow would run Ghostscript for EPS, and it recognizes the others but cannot decode them.
_NOT_READ = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
MAX_PIXELS = 1 << 26  # 8,192 x 8,192 decoded pixels; JPEG is shrunk while it is decoded
_MAX_BYTES = 1 << 30  # of a file
# Of a PNG's texts, which hold whole workflows; Pillow allows a megabyte.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 26


def suffixes() -> set[str]:
  """Returns the suffixes of the image formats that can be read, in lower case."""
  kinds = Image.registered_extensions() | {".mpo": "MPO"}  # which Pillow only knows by content
  return {s for s, kind in kinds.items() if kind in set(Image.OPEN) - _NOT_READ}


def decode(
  file: bytes | Path, image_size: int | tuple[int, int] = 0, place: float | None = 0.5
) -> np.ndarray:
  """Decodes an image file of any mode and rotates it upright.

  Args:
    file: the file's content or its path.
    image_size: height and width in pixels to resize and crop to, see `fit`; 0 keeps the size.
    place: where to crop, see `fit`.

  Returns:
    uint8 [H, W, 3]. Transparent parts become white; grey values of more than 8 bits are scaled
    to 8 bits.

  Raises:
    BadRow: the file is not an image, damaged, truncated, too large or not a regular file.
  """
  if not isinstance(file, bytes | Path):
    raise BadRow("with an image that is neither bytes nor a path", f"a {type(file).__name__}")
  with io.BytesIO(file) if isinstance(file, bytes) else open_regular(file) as stream:
    try:
      return _decode(stream, image_size, place)
    except UnidentifiedImageError as error:
      stream.seek(0)
      begins = stream.read(12)
      raise BadRow("not an image", f"begins with {begins!r}" if begins else "empty") from error
    except Image.DecompressionBombError as error:
      raise BadRow(
        "too many pixels", f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)}"
      ) from error
    except BadRow:
      raise
    except Exception as error:  # for damaged images Pillow raises errors of any type
      raise BadRow("damaged image", first_line(error)) from error


def normalize(content: bytes) -> tuple[bytes, tuple[int, int], str]:
  """Checks an image file by decoding it whole, and converts what few readers agree on.

  Args:
    content: of the file.

  Returns:
    The file as it is, or as PNG if it has to be rotated or flattened; its height and width;
    and why it was converted, or ''.

  Raises:
    BadRow: the file is not an image, damaged, truncated or too large.
  """
  pixels = decode(content)
  with io.BytesIO(content) as stream, _open(stream) as image:
    kind, mode = image.format, image.mode
    turned = image.getexif().get(0x0112, 1) != 1
    many = getattr(image, "n_frames", 1) > 1
  why = (
    "rotated by EXIF"
    if turned
    else f"{mode} to RGB"
    if mode not in ("RGB", "L")
    else f"{kind} to PNG"
    if kind not in ("JPEG", "PNG", "WEBP") or many
    else ""
  )
  if why:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    content = buffer.getvalue()
  return content, (pixels.shape[0], pixels.shape[1]), why


def open_regular(path: Path, max_bytes: int = _MAX_BYTES) -> BinaryIO:
  """Opens a regular file for reading.

  Raises:
    BadRow: the file is a pipe, a device, larger than `max_bytes`, or cannot be read.
  """
  try:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
      raise BadRow("not a regular file")
    if found.st_size > max_bytes:
      raise BadRow(f"more than {max_bytes} bytes", f"{found.st_size} bytes")
    return path.open("rb")
  except FileNotFoundError as error:
    raise BadRow("no such file", path.name) from error
  except (OSError, ValueError) as error:
    raise BadRow("cannot be read", first_line(error)) from error


def _decode(
  stream: BinaryIO, image_size: int | tuple[int, int], place: float | None
) -> np.ndarray:
  with _open(stream) as image:
    if image.format == "PNG":
      # Pillow does not check the checksums of the pixels while it decodes.
      image.verify()
      stream.seek(0)
  with _open(stream) as image:
    if image_size:
      # Pillow decodes JPEG at 1/2, 1/4 or 1/8 of its size much faster.
      longest = 2 * max((image_size,) if isinstance(image_size, int) else image_size)
      image.draft(None, (longest, longest))
    width, height = image.size
    if width * height > MAX_PIXELS:
      raise BadRow("too many pixels", f"{width} x {height}, more than {MAX_PIXELS}")
    white = _white_of(image)
    ImageOps.exif_transpose(image, in_place=True)
    upright = _to_rgb(image, white)
    return fit(upright, image_size, place) if image_size else np.asarray(upright)


def _open(stream: BinaryIO) -> Image.Image:
  with warnings.catch_warnings():
    # Pillow warns at its limit and raises at twice the limit; only the error matters here.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    image = Image.open(stream)
  if image.format in _NOT_READ:
    raise BadRow(f"{image.format} is not read")
  return image


def fit(
  image: Image.Image, size: int | tuple[int, int], place: float | None = 0.5
) -> np.ndarray:
  """Resizes an image so that it covers a size, and crops what is too long.

  Args:
    image: of any size.
    size: height and width of the result in pixels; one number for a square.
    place: where the crop is, from 0, left or top, to 1, right or bottom; None does not crop
      but changes the proportions.

  Returns:
    uint8 [height, width, 3].
  """
  height, width = (size, size) if isinstance(size, int) else size
  box = (0.0, 0.0, float(image.width), float(image.height))
  if place is not None:
    wide, high = float(image.width), image.width * height / width
    if high > image.height:
      wide, high = image.height * width / height, float(image.height)
    left, top = (image.width - wide) * place, (image.height - high) * place
    box = (left, top, left + wide, top + high)
    if (wide, high) == (width, height) and left.is_integer() and top.is_integer():
      # The same pixels, several times faster.
      return np.asarray(image.crop(box))
  resized = image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
  return np.asarray(resized)


def _white_of(image: Image.Image) -> float | None:
  """Returns the value of white in a grey image of more than 8 bits; None if unknown."""
  if image.format == "TIFF":
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (1,))[0]
    return 2.0**bits - 1 if image.mode.startswith("I;16") else None
  if image.mode.startswith("I;16"):
    return 65535.0
  # Pillow returns the 16 bits of these formats as 32-bit integers.
  return 65535.0 if image.mode == "I" and image.format in ("PNG", "PPM") else None


def _to_rgb(image: Image.Image, white: float | None) -> Image.Image:
  clear = image.info.get("transparency")
  if image.mode.startswith("I") or image.mode == "F":
    grey = np.asarray(image, np.float64)
    shades = _to_8_bits(grey, white)
    if isinstance(clear, int):
      shades = np.where(grey == clear, np.uint8(255), shades)
    return Image.fromarray(shades).convert("RGB")
  if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:  # noqa: PLR2004
    # Of 16 bits a colour, of which Pillow keeps the upper 8, also for the colour that is clear.
    pixels = np.asarray(image)
    is_clear = (pixels == np.array(clear) >> 8).all(axis=-1, keepdims=True)
    return Image.fromarray(np.where(is_clear, np.uint8(255), pixels))
  if image.has_transparency_data:
    layer = image.convert("RGBA")
    paper = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(paper, layer).convert("RGB")
  return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(grey: np.ndarray, white: float | None) -> np.ndarray:
  """Scales grey values [H, W] to uint8.

  Floats and 32-bit integers do not define white: the range is the smallest of [0, 1], [0, 255]
  and [0, 65535] that contains all values.
  """
  if not np.isfinite(grey).all():
    raise BadRow("it has non-finite values")
  top = white or next((t for t in (1.0, 255.0) if grey.max() <= t), 65535.0)
  return np.clip(np.rint(grey * (255 / top)), 0, 255).astype(np.uint8)
