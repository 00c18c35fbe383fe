"""Grids of images with captions, for READMEs and reports."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_INK = (28, 32, 40)
_FAINT = (98, 106, 120)
_PAPER = (255, 255, 255)


def image_grid(
  rows_of_images: Sequence[Sequence[np.ndarray]],
  *,
  captions: Sequence[str] | None = None,
  headers: Sequence[str] | None = None,
  columns: int = 1,
  scale: int = 1,
  gap: int = 6,
  font_size: int = 13,
) -> Image.Image:
  """Arranges rows of images in columns, with the caption of each row below it.

  Args:
    rows_of_images: rows of uint8 RGB images [H, W, 3] of one size; all rows have the same
      length (2 for base and tuned).
    captions: one text per row.
    headers: one text per image of a row, shown at the top of every column of rows.
    columns: number of rows that are placed next to each other.
    scale: integer magnification by nearest neighbour.
    gap: pixels between the images of a row; margins are multiples of it.
    font_size: height of the text in pixels.

  Returns:
    An RGB image.

  Raises:
    ValueError: `rows_of_images` is empty; rows, sizes or dtypes differ; the number of captions
      or headers is wrong; or `columns` or `scale` is below 1.
  """
  height, width = _check(rows_of_images, captions, headers, columns, scale)
  per_row = len(rows_of_images[0])
  font = ImageFont.load_default(font_size)
  line = round(font_size * 1.35)
  cell_w, cell_h = width * scale, height * scale
  row_w = per_row * cell_w + (per_row - 1) * gap
  texts = [wrap(c, font, row_w) for c in captions or [""] * len(rows_of_images)]
  bands = [range(i, min(i + columns, len(texts))) for i in range(0, len(texts), columns)]
  # Every band is as tall as its longest caption.
  caption_h = [max(len(texts[i]) for i in band) * line for band in bands]
  margin, across, between = 3 * gap, 5 * gap, 4 * gap
  top = margin + (line + gap if headers else 0)
  used = min(columns, len(texts))
  total_h = top + sum(caption_h) + len(bands) * (cell_h + gap) + margin
  picture = Image.new(
    "RGB",
    (
      2 * margin + used * row_w + (used - 1) * across,
      total_h + (len(bands) - 1) * between,
    ),
    _PAPER,
  )
  draw = ImageDraw.Draw(picture)
  lefts = [margin + i * (row_w + across) for i in range(used)]
  for left in lefts if headers else []:
    for i, header in enumerate(headers or []):
      center = left + i * (cell_w + gap) + cell_w / 2
      draw.text((center, margin), header, fill=_FAINT, font=font, anchor="ma")
  y = top
  for band, text_h in zip(bands, caption_h, strict=True):
    for left, row in zip(lefts, band, strict=False):
      for i, image in enumerate(rows_of_images[row]):
        pixels = image.repeat(scale, axis=0).repeat(scale, axis=1)
        picture.paste(Image.fromarray(pixels), (left + i * (cell_w + gap), y))
      for i, text in enumerate(texts[row]):
        draw.text((left, y + cell_h + gap + i * line), text, fill=_INK, font=font)
    y += cell_h + gap + text_h + between
  return picture


def wrap(
  text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float
) -> list[str]:
  """Breaks `text` into lines of at most `width` pixels; splits words that are longer."""
  lines: list[str] = []
  current = ""
  for word in text.split():
    joined = f"{current} {word}".strip()
    if font.getlength(joined) <= width:
      current = joined
      continue
    if current:
      lines.append(current)
    current = word
    while font.getlength(current) > width and len(current) > 1:
      fits = max(
        (n for n in range(1, len(current)) if font.getlength(current[:n]) <= width),
        default=1,
      )
      lines.append(current[:fits])
      current = current[fits:]
  return [*lines, current] if current else lines


def _check(
  rows: Sequence[Sequence[np.ndarray]],
  captions: Sequence[str] | None,
  headers: Sequence[str] | None,
  columns: int,
  scale: int,
) -> tuple[int, int]:
  if not rows or not rows[0]:
    raise ValueError("a grid needs at least one image")
  if columns < 1 or scale < 1:
    raise ValueError(f"columns and scale must be at least 1 (got {columns} and {scale})")
  if any(len(row) != len(rows[0]) for row in rows):
    raise ValueError(f"rows must have one length (got {sorted({len(row) for row in rows})})")
  if captions is not None and len(captions) != len(rows):
    raise ValueError(f"got {len(captions)} captions for {len(rows)} rows")
  if headers is not None and len(headers) != len(rows[0]):
    raise ValueError(f"got {len(headers)} headers for rows of {len(rows[0])} images")
  shape = rows[0][0].shape
  for image in (image for row in rows for image in row):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
      raise ValueError(f"images must be uint8 [H, W, 3] (got {image.dtype} {image.shape})")
    if image.shape != shape:
      raise ValueError(f"images must have one size (got {shape} and {image.shape})")
  return shape[0], shape[1]
