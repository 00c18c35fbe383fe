"""One's own pictures as experts: a folder of images with captions beside them.

`NNN/caption.txt` beside the one image in `NNN`, or `name.jpg` beside `name.txt`, at any
depth. What cannot be used is counted and named in one warning, and the rest is used.
"""

import contextlib
import logging
import os
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxpref.data.experts import Example
from jaxpref.errors import UserError, first_line

_log = logging.getLogger(__name__)

_NAMED = 50  # bad files that the warning names
# Pillow would run Ghostscript on EPS, and knows the others by no more than their name.
_NOT_READ = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}


def load_folder(
  path: str | os.PathLike,
  *,
  image_size: int,
  limit: int = 0,
  caption: str | None = None,
  option: str = "data.path",
  hint: str = "",
) -> list[Example]:
  """Reads the pictures of a folder that have captions.

  Args:
    path: the folder.
    image_size: height and width that all are brought to, see `fit`.
    limit: stop after so many, in order of their paths; 0 reads all.
    caption: of all images, which then need none beside them.
    option: that named the folder, for messages.
    hint: what else to do where no image has a caption, for a message.

  Returns:
    Examples in order of their paths, which, relative to the folder, are their `source`.

  Raises:
    UserError: there is no such folder, or nothing in it can be used.
  """
  root = Path(path).expanduser()
  if not os.fspath(path) or not root.is_dir():
    raise UserError(f"{option} {os.fspath(path)!r} is not a folder")
  pairs, skipped = _pairs(root) if caption is None else (_images(root), [])
  examples: list[Example] = []
  for image, text in pairs:
    if limit and len(examples) == limit:
      break
    name = image.relative_to(root).as_posix()
    try:
      told = caption if text is None else _read_caption(text)
      examples.append(Example(read_image(image, image_size), told or "", name))
    except Exception as error:  # of a damaged image Pillow may raise anything
      skipped.append(f"{name} ({_reason(error)})")
  if limit and len(pairs) > limit:
    _log.warning(
      "%s: the first %d of %d pictures are used; data.num_experts=0 takes all",
      *(root, len(examples), len(pairs)),
    )
  if skipped:
    more = f" and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
    named = ", ".join(skipped[:_NAMED]) + more
    files = "file" if len(skipped) == 1 else "files"
    _log.warning("%s: %d %s cannot be used: %s", root, len(skipped), files, named)
  if not examples:
    raise UserError(
      f"no image in {root} can be used"
      if caption is not None
      else f"no image with a caption in {root}: it takes name.jpg beside name.txt, "
      f"or NNN/caption.txt beside one image{'; see the warning' if skipped else ''}{hint}"
    )
  return examples


def count_images(path: str | os.PathLike) -> int:
  """How many pictures there are in a folder, of use or not."""
  return len(_images(Path(path).expanduser()))


def load_captions(path: str | os.PathLike) -> list[str]:
  """The captions of a folder's pictures, in order of their paths; no picture is read.

  Raises:
    UserError: there is no such folder, or no caption in it.
  """
  root = Path(path).expanduser()
  if not os.fspath(path) or not root.is_dir():
    raise UserError(f"data.path {os.fspath(path)!r} is not a folder")
  captions = []
  for _, text in _pairs(root)[0]:
    with contextlib.suppress(OSError, ValueError):  # whoever reads the pictures names it
      captions.append(_read_caption(text) if text else "")
  if not captions:
    raise UserError(f"no image with a caption in {root}")
  return captions


def read_image(path: Path, image_size: int) -> np.ndarray:
  """The image in a file, upright, of any mode, as uint8 [image_size, image_size, 3].

  Raises:
    ValueError: the format is not for images.
    Exception: whatever Pillow raises where the file is damaged, or of too many pixels.
  """
  with warnings.catch_warnings():
    # Large is fine; at twice this warning's limit it is an error.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    picture = Image.open(path)
  with picture:
    if picture.format in _NOT_READ:
      raise ValueError(f"{picture.format} is not read")
    # JPEG can be decoded at a half, a quarter, ... of its size, much faster.
    picture.draft(None, (2 * image_size, 2 * image_size))
    return fit(_to_rgb(ImageOps.exif_transpose(picture)), image_size)


def fit(picture: Image.Image, image_size: int) -> np.ndarray:
  """Shrinks or enlarges the shorter side to `image_size` and crops to the centre.

  Returns:
    uint8 [image_size, image_size, 3].
  """
  side = min(picture.size)
  left, top = ((length - side) / 2 for length in picture.size)
  box = (left, top, left + side, top + side)
  square = (image_size, image_size)
  resized = picture.resize(square, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
  return np.asarray(resized)


def _to_rgb(picture: Image.Image) -> Image.Image:
  """Any mode as RGB: transparent parts on white, deep greys scaled to 8 bits."""
  if picture.mode.startswith("I") or picture.mode == "F":
    return Image.fromarray(_to_8_bits(np.asarray(picture, np.float64))).convert("RGB")
  if picture.has_transparency_data:
    layer = picture.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")
  return picture.convert("RGB")


def _to_8_bits(grey: np.ndarray) -> np.ndarray:
  """Grey [H, W] in [0, 1], [0, 255] or [0, 65535], whichever holds it, as uint8."""
  if not np.isfinite(grey).all():
    raise ValueError("it holds numbers that are not finite")
  top = next((t for t in (1.0, 255.0) if grey.max() <= t), 65535.0)
  return np.clip(np.rint(grey * (255 / top)), 0, 255).astype(np.uint8)


def _pairs(root: Path) -> tuple[list[tuple[Path, Path | None]], list[str]]:
  """Images with their captions, sorted, and what was left over, with the reason."""
  pairs: list[tuple[Path, Path | None]] = []
  skipped: list[str] = []
  suffixes = _suffixes()
  for directory, files in _by_directory(root).items():
    name = directory.relative_to(root).as_posix()
    captions = {p.stem: p for p in files if p.suffix.lower() == ".txt"}
    images: dict[str, list[Path]] = defaultdict(list)
    for p in files:
      if p.suffix.lower() in suffixes:
        images[p.stem].append(p)
    shared = None if images.get("caption") else captions.pop("caption", None)
    if shared:
      images["caption"] = [
        p for stem in list(images) if stem not in captions for p in images.pop(stem)
      ]
      captions["caption"] = shared
    for stem in sorted({*images, *captions}):
      found = images.get(stem, [])
      if stem in captions and len(found) == 1:
        pairs.append((found[0], captions[stem]))
      elif stem in captions:
        beside = f"{len(found) or 'no'} image{'' if len(found) == 1 else 's'} beside it"
        skipped.append(f"{(Path(name) / captions[stem].name).as_posix()} ({beside})")
      else:
        skipped += [f"{(Path(name) / p.name).as_posix()} (no caption)" for p in found]
  return sorted(pairs, key=lambda pair: pair[0]), skipped


def _images(root: Path) -> list[tuple[Path, Path | None]]:
  """All images, none with a caption."""
  suffixes = _suffixes()
  files = [p for found in _by_directory(root).values() for p in found]
  return [(p, None) for p in sorted(files) if p.suffix.lower() in suffixes]


def _by_directory(root: Path) -> dict[Path, list[Path]]:
  """Files under `root` by where they are, sorted; none that are hidden."""
  found: dict[Path, list[Path]] = defaultdict(list)
  for path in sorted(root.rglob("*")):
    parts = path.relative_to(root).parts
    if not any(p.startswith(".") or p == "__MACOSX" for p in parts) and path.is_file():
      found[path.parent].append(path)
  return found


def _suffixes() -> set[str]:
  """Suffixes of what Pillow reads, in lower case."""
  kinds = Image.registered_extensions()
  return {s for s, kind in kinds.items() if kind in set(Image.OPEN) - _NOT_READ}


def _read_caption(path: Path) -> str:
  caption = " ".join(path.read_bytes().decode("utf-8-sig").split())
  if not caption:
    raise ValueError("empty caption")
  return caption


def _reason(error: Exception) -> str:
  match error:
    case UnicodeDecodeError():
      return "caption is not UTF-8"
    case UnidentifiedImageError():
      return "not an image"
    case Image.DecompressionBombError():
      return "too many pixels"
  return first_line(error)
