"""Writes small, faithful samples of every data format that jaxpref builds, with faults.

  python benchmarks/formats.py --out SAMPLES [--rows 40] [--seed 0]

Every sample comes with the truth: the rows that a build has to store, in order, as they were
before they were written, and how many others there are. Nothing here uses jaxpref.
"""

import argparse
import csv
import dataclasses
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image


@dataclasses.dataclass
class Item:
  """A row before it is written.

  Attributes:
    caption: text, raw bytes that are not UTF-8, or None.
    files: content of the image files; None for one that is missing.
    pixels: what the files show, uint8 [H, W, 3].
    labels: one number per image; None for one that is missing.
    fault: what is wrong; '' for a good row.
  """

  caption: str | bytes | None
  files: list[bytes | None]
  pixels: list[np.ndarray]
  labels: list[Any]
  fault: str = ""


# --------------------------------------------------------------------------- images


def _photograph(rng: np.random.Generator) -> np.ndarray:
  height, width = rng.integers(12, 28, 2)
  small = rng.integers(0, 256, (4, 4, 3), np.uint8)
  return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def _encode(pixels: np.ndarray, kind: str, mode: str = "RGB", **options: Any) -> bytes:
  image = Image.fromarray(pixels).convert(mode)
  image.save(file := io.BytesIO(), kind, **options)
  return file.getvalue()


def _plain(kind: str) -> Callable[..., tuple[bytes, np.ndarray]]:
  def make(rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    content = _encode(_photograph(rng), kind)
    return content, np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

  return make


def _turned(rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by a quarter, clockwise
  content = _encode(_photograph(rng), "JPEG", exif=exif)
  stored = np.asarray(Image.open(io.BytesIO(content)))
  return content, np.rot90(stored, -1)


def _clear(rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
  pixels = _photograph(rng)
  alpha = np.where(np.arange(pixels.shape[1]) % 2, 255, 0).astype(np.uint8)
  layers = np.concatenate(
    [pixels, np.broadcast_to(alpha[None, :, None], (*pixels.shape[:2], 1))], axis=2
  )
  Image.fromarray(layers).save(file := io.BytesIO(), "PNG")
  return file.getvalue(), np.where(alpha[None, :, None] > 0, pixels, 255).astype(np.uint8)


def _deep(rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
  grey = _photograph(rng)[..., 0]
  Image.fromarray(grey.astype(np.uint16) * 257).save(file := io.BytesIO(), "PNG")
  return file.getvalue(), np.repeat(grey[..., None], 3, axis=2)


IMAGES = {
  **{kind.lower(): _plain(kind) for kind in ("JPEG", "PNG", "WEBP", "BMP")},
  "turned": _turned,
  "clear": _clear,
  "deep": _deep,
}
BROKEN: dict[str, Callable[[bytes, np.random.Generator], bytes | None]] = {
  "missing": lambda content, rng: None,
  "empty": lambda content, rng: b"",
  "text": lambda content, rng: b"<html>404 not found</html>",
  "truncated": lambda content, rng: content[: max(len(content) // 2, 20)],
}


# ----------------------------------------------------------------------------- rows


def make_items(
  seed: int, count: int, arms: int, *, words: str = "pairs", faults: bool = True
) -> list[Item]:
  """Makes rows, of which about a third have a fault; a few are repeated.

  Args:
    seed: of the rows.
    count: number of rows.
    arms: images of a row.
    words: 'pairs', 'singles', 'lists' or 'images', which says what the labels are.
    faults: whether there are any.
  """
  rng = np.random.default_rng(seed)
  found: list[Item] = []
  for i in range(count):
    kinds = rng.choice(list(IMAGES), arms)
    made = [IMAGES[kind](rng) for kind in kinds]
    labels: list[Any] = [0.0] * arms
    match words:
      case "pairs":
        win = float(rng.choice([0, 0.5, 1]))
        labels = [win, 1 - win]
      case "lists":
        labels = (rng.permutation(arms) + 1).tolist()
      case "singles":
        labels = [bool(rng.integers(2))]
    item = Item(f"row {i}: a {rng.choice(['red', 'blue'])} thing, n°{i}", *zip_of(made), labels)
    draw = rng.random()
    if faults and draw < 0.3:  # noqa: PLR2004
      _break(item, rng, words)
    elif faults and draw < 0.35 and found and not found[-1].fault:  # noqa: PLR2004
      item = dataclasses.replace(found[-1], fault="repeated")
    found.append(item)
  return found


def zip_of(made: list[tuple[bytes, np.ndarray]]) -> tuple[list[Any], list[np.ndarray]]:
  """Returns files and pixels."""
  return [content for content, _ in made], [pixels for _, pixels in made]


def _break(item: Item, rng: np.random.Generator, words: str) -> None:
  """Gives a row one fault."""
  options = ["caption empty", "caption blank", "caption bytes", *(f"image {b}" for b in BROKEN)]
  if words in ("pairs", "lists"):
    options += ["label missing", "label text"]
  item.fault = str(rng.choice(options))
  what, _, how = item.fault.partition(" ")
  if what == "caption":
    item.caption = {"empty": "", "blank": " \n", "bytes": b"caf\xe9 and more"}[how]
  elif what == "image":
    k = int(rng.integers(len(item.files)))
    item.files[k] = BROKEN[how](item.files[k] or b"", rng)
  else:
    k = int(rng.integers(len(item.labels)))
    item.labels[k] = None if how == "missing" else "best"


def _text(caption: str | bytes | None) -> str | None:
  """Returns a caption for a format whose text is Unicode: one that is not becomes null."""
  return caption if isinstance(caption, str) else None


def _write(path: Path, content: bytes | None) -> None:
  if content is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _raw(caption: str | bytes | None) -> bytes:
  return caption.encode() if isinstance(caption, str) else caption or b""


# -------------------------------------------------------------------------- formats


def pickapic(root: Path, items: list[Item], *, nested: bool = False) -> None:
  """Writes Pick-a-Pic's parquet files; `nested` as Hugging Face's `datasets` stores images."""
  rows = []
  for i, item in enumerate(items):
    files: list[Any] = list(item.files)
    if nested:
      files = [None if f is None else {"bytes": f, "path": f"{i}.jpg"} for f in files]
    labels = [x if isinstance(x, float) else None for x in item.labels]
    rows.append(
      {
        "caption": _text(item.caption),
        **{f"jpg_{k}": file for k, file in enumerate(files)},
        **{f"label_{k}": label for k, label in enumerate(labels)},
        **{f"image_{k}_uid": f"{i}-{k}" for k in (0, 1)},
        **{"are_different": True, "has_label": True, "user_id": i % 5, "ranking_id": i},
      }
    )
  root.mkdir(parents=True, exist_ok=True)
  half = len(rows) // 2
  for k, part in enumerate((rows[:half], rows[half:])):
    name = root / f"train-{k:05d}-of-00002.parquet"
    pd.DataFrame(part).to_parquet(name, row_group_size=7)


def hpd_pairs(root: Path, items: list[Item]) -> None:
  """Writes HPDv2's train.json with pairs."""
  entries = []
  for i, item in enumerate(items):
    names = [f"{2 * i + k:08d}.jpg" for k in (0, 1)]
    for name, file in zip(names, item.files, strict=True):
      _write(root / "train" / name, file)
    entries.append(
      {"prompt": _text(item.caption), "file_path": names, "human_preference": item.labels}
    )
  (root / "train").mkdir(parents=True, exist_ok=True)
  (root / "train.json").write_text(json.dumps(entries), encoding="utf-8")


def hpd_lists(root: Path, items: list[Item]) -> None:
  """Writes HPDv2's test.json with ranked lists."""
  entries = []
  for i, item in enumerate(items):
    names = [f"{i:04d}-{k}.jpg" for k in range(len(item.files))]
    for name, file in zip(names, item.files, strict=True):
      _write(root / "test" / name, file)
    entry = {"prompt": _text(item.caption), "image_path": names, "rank": item.labels}
    entries.append(entry | {"raw_annotations": [{"rank": item.labels, "user_hash": "0a"}]})
  (root / "test").mkdir(parents=True, exist_ok=True)
  (root / "test.json").write_text(json.dumps(entries), encoding="utf-8")


def mjhq(root: Path, items: list[Item]) -> None:
  """Writes MJHQ-30k's meta_data.json and its folders by category."""
  meta = {}
  for i, item in enumerate(items):
    category = ("animals", "food", "people")[i % 3]
    _write(root / category / f"id{i:04d}.jpg", item.files[0])
    meta[f"id{i:04d}"] = {"category": category, "prompt": _text(item.caption)}
  root.mkdir(parents=True, exist_ok=True)
  (root / "meta_data.json").write_text(json.dumps(meta), encoding="utf-8")


def caption_folder(root: Path, items: list[Item]) -> None:
  """Writes images with a text file of the same name beside them."""
  for i, item in enumerate(items):
    _write(root / f"{i:04d}.jpg", item.files[0])
    _write(root / f"{i:04d}.txt", _raw(item.caption))


def numbered_folders(root: Path, items: list[Item]) -> None:
  """Writes folders with an image and a caption.txt each."""
  for i, item in enumerate(items):
    _write(root / f"{i:04d}" / "image.png", item.files[0])
    _write(root / f"{i:04d}" / "caption.txt", _raw(item.caption))


def metadata(root: Path, items: list[Item]) -> None:
  """Writes images with a metadata.jsonl, as `datasets` reads an image folder."""
  lines = []
  for i, item in enumerate(items):
    _write(root / "images" / f"{i:04d}.png", item.files[0])
    lines.append(json.dumps({"file_name": f"images/{i:04d}.png", "text": _text(item.caption)}))
  root.mkdir(parents=True, exist_ok=True)
  (root / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def pair_folders(root: Path, items: list[Item]) -> None:
  """Writes a folder for each pair: chosen.png, rejected.png, caption.txt."""
  for i, item in enumerate(items):
    best = int(item.labels[1] == 1.0)
    names = ("chosen.png", "rejected.png") if not best else ("rejected.png", "chosen.png")
    for name, file in zip(names, item.files, strict=True):
      _write(root / f"{i:04d}" / name, file)
    _write(root / f"{i:04d}" / "caption.txt", _raw(item.caption))


def kto_csv(root: Path, items: list[Item]) -> None:
  """Writes Diffusion-KTO's csv and its images."""
  root.mkdir(parents=True, exist_ok=True)
  with (root / "train_processed_v3.csv").open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["", "file_name", "caption", "split"])
    for i, item in enumerate(items):
      _write(root / "train" / f"{i:04d}.jpg", item.files[0])
      split = "exclusive_win" if item.labels[0] else "exclusive_lose"
      writer.writerow([i, f"train/{i:04d}.jpg", _text(item.caption) or "", split])


def webdataset(root: Path, items: list[Item]) -> None:
  """Writes tar files of pairs."""
  root.mkdir(parents=True, exist_ok=True)
  half = (len(items) + 1) // 2
  for t in (0, 1):
    with tarfile.open(root / f"{t:05d}.tar", "w") as tar:
      for i, item in list(enumerate(items))[t * half : (t + 1) * half]:
        members: dict[str, bytes | None] = {"original_prompt.txt": _raw(item.caption)}
        members |= {f"jpg_{k}.jpg": file for k, file in enumerate(item.files)}
        members |= {
          f"label_{k}.txt": None if label is None else str(label).encode()
          for k, label in enumerate(item.labels)
        }
        for name, content in members.items():
          if content is not None:
            member = tarfile.TarInfo(f"{i:05d}.{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def prompts(root: Path, items: list[Item]) -> None:
  """Writes one prompt per line."""
  root.mkdir(parents=True, exist_ok=True)
  lines = [(_text(item.caption) or "").strip() for item in items]
  (root / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Format:
  """A data format.

  Attributes:
    source: jaxpref's name of the source.
    table: what its rows are.
    write: writes rows into a folder.
    arms: images of a row.
    file: what to give as the path, inside of the folder.
    split: of the rows.
  """

  source: str
  table: str
  write: Callable[[Path, list[Item]], None]
  arms: int = 1
  file: str = ""
  split: str = "train"


FORMATS = {
  "pickapic": Format("pickapic", "pairs", pickapic, 2),
  "pickapic_datasets": Format(
    "pickapic", "pairs", lambda root, items: pickapic(root, items, nested=True), 2
  ),
  "hpd_pairs": Format("hpd", "pairs", hpd_pairs, 2),
  "hpd_lists": Format("hpd", "lists", hpd_lists, 4, split="test"),
  "mjhq": Format("mjhq", "images", mjhq),
  "caption_folder": Format("folder", "images", caption_folder),
  "numbered_folders": Format("folder", "images", numbered_folders),
  "metadata": Format("folder", "images", metadata),
  "pair_folders": Format("folder", "pairs", pair_folders, 2),
  "kto_csv": Format("kto", "singles", kto_csv),
  "webdataset": Format("webdataset", "pairs", webdataset, 2),
  "prompts": Format("prompts", "captions", prompts, file="prompts.txt"),
}


def make(name: str, root: Path, *, seed: int, count: int, faults: bool = True) -> list[Item]:
  """Writes a sample of a format; returns all its rows in their order, good ones and others."""
  kind = FORMATS[name]
  words = "pairs" if kind.table == "pairs" else kind.table
  items = make_items(seed, count, kind.arms, words=words, faults=faults)
  if name == "pair_folders":  # they cannot say that neither is better, or that it is unknown
    items = [i for i in items if not i.fault.startswith("label") and i.labels != [0.5, 0.5]]
  kind.write(root, items)
  return items


def pixels_of(content: bytes) -> np.ndarray:
  """Decodes an image file."""
  return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def check_row(name: str, row: Any, item: Item) -> None:
  """Compares a stored row with the row as it was before it was written.

  Raises:
    AssertionError: they differ.
  """
  caption = row["prompt" if name == "hpd_lists" else "caption"].decode()
  assert isinstance(item.caption, str) and caption.split() == item.caption.split()
  if name == "prompts":
    return
  arms = [k for k in row if k.startswith("jpg")]
  files = sorted(arms, key=lambda k: int(k[4:] or 0))
  order = list(range(len(files)))
  if name == "pair_folders" and item.labels[1] == 1.0:
    order = [1, 0]  # the chosen image comes first
  for column, k in zip(files, order, strict=True):
    np.testing.assert_array_equal(pixels_of(row[column]), item.pixels[k])
    assert tuple(row[column.replace("jpg", "size")]) == item.pixels[k].shape[:2]
  if "liked" in row:
    assert bool(row["liked"]) == item.labels[0]
  for k, place in enumerate(order):
    for column in (f"label_{k}", f"rank_{k}"):
      if column in row:
        assert float(row[column]) == item.labels[place]


def expected(name: str, items: list[Item]) -> list[Item]:
  """Returns the rows that a build has to store."""
  if name == "prompts":
    # Of a text file only the lines count; each once.
    texts = [i for i in items if isinstance(i.caption, str) and i.caption.strip()]
    found: dict[Any, Item] = {}
    for item in texts:
      found.setdefault(item.caption, item)
    return list(found.values())
  return [item for item in items if not item.fault]


def main() -> None:
  """Writes all samples."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--rows", type=int, default=40)
  parser.add_argument("--seed", type=int, default=0)
  flags = parser.parse_args()
  for name in FORMATS:
    items = make(name, flags.out / name, seed=flags.seed, count=flags.rows)
    bad = sum(bool(item.fault) for item in items)
    print(f"{name}: {len(items)} rows, {bad} with a fault")


if __name__ == "__main__":
  main()
