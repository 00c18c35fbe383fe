"""A process of a cluster for test_inputs.py: reads batches of a built set, prints what it read.

python reading_main.py ADDRESS PROCESSES NUMBER DIRECTORY

Prints JSON: the numbers of the records that it opened, and a digest of all batches, gathered.
"""

import hashlib
import json
import sys

import jax
import numpy as np

from jaxpref import base_config, sharding
from jaxpref.data import built_rows, encode, loader
from jaxpref.data import rows as rows_lib

UPDATES, BATCH = 3, 8


def main(address: str, processes: str, number: str, directory: str) -> None:
  jax.distributed.initialize(address, int(processes), int(number))
  opened = []

  def count(table, i, of=built_rows.BuiltTable.__getitem__):
    opened.append(int(i))
    return of(table, i)

  built_rows.BuiltTable.__getitem__ = count
  data = base_config.base("dpo", "tiny").data
  data.update({"path": directory, "num_rows": 0})
  rows = rows_lib.load_rows("pairs", data, image_size=16, seed=0)
  images = encode.read_images(rows.images, np.arange(len(rows.images)), flip=False)
  opened.clear()  # of the first image, which tells the shape
  rows.images._record.cache_clear()
  of_rows = encode.by_row(
    *({"images": images}, {}),
    image=rows.image,
    text_number=rows.caption,
    desirable=rows.desirable,
    flipped=0,
  )
  mesh = sharding.make_mesh()
  read = lambda _, index: sharding.place_batch(of_rows, mesh, index)  # noqa: E731
  batches = loader.make_loader(len(rows), batch_size=BATCH, seed=0, read=read)
  digest = hashlib.sha256()
  for _ in range(UPDATES):
    batch = sharding.to_host(next(batches))
    for leaf in jax.tree.leaves(batch):
      digest.update(np.ascontiguousarray(leaf).tobytes())
  print(json.dumps({"opened": opened, "digest": digest.hexdigest()}))


if __name__ == "__main__":
  main(*sys.argv[1:])
