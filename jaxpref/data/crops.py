"""Random crops, and the sizes that SDXL is conditioned on.

A random crop is new whenever a row is read. Its place travels in the row's index, see
`visit`, so that each process reads only the images of its own devices.
"""

import numpy as np

from jaxpref.data import gather
from jaxpref.data.built_rows import StoredImages

PLACES = 64  # of a random crop


def visit(index: np.ndarray, rows: int, rng: np.random.Generator) -> np.ndarray:
  """Adds a random place for a crop to the indices of rows, see `place_of`.

  Args:
    index: of the rows, int [B].
    rows: number of rows.
    rng: of the places.
  """
  return index + rows * rng.integers(PLACES, size=index.shape)


def place_of(index: np.ndarray, rows: int) -> np.ndarray:
  """Returns the place that `visit` has added to indices, from 0 to 1."""
  return (index // rows) / (PLACES - 1)


class RandomCrops:
  """Images of rows, cropped at the places of their indices, uint8 [N, A, H, W, 3]."""

  def __init__(self, images: StoredImages, image: np.ndarray, *, mirrored: int):
    """Makes the view.

    Args:
      images: of the data set.
      image: numbers of the rows' images, int [N, A].
      mirrored: number of rows at the end that are mirrored.
    """
    self._images, self._image, self._mirrored = images, image, mirrored
    self.shape, self.dtype = (*image.shape, *images.size, 3), np.dtype(np.uint8)

  def __len__(self) -> int:
    """Returns the number of rows."""
    return len(self._image)

  def __getitem__(self, index: np.ndarray) -> np.ndarray:
    """Reads the rows of an index, int [B]."""
    index = np.asarray(index)
    row, place = index % len(self), place_of(index, len(self))
    arms = self._image.shape[1]

    def read(i: int) -> np.ndarray:
      at, arm = divmod(i, arms)
      image = self._images.read(int(self._image[row[at], arm]), float(place[at]))
      return image[:, ::-1] if row[at] >= len(self) - self._mirrored else image

    found = np.stack(gather.in_threads(read)(list(range(len(index) * arms))))
    return found.reshape(len(index), *self.shape[1:])


class TimeIds:
  """SDXL's six numbers of rows, by the stored sizes of their first images, float32 [N, 6].

  They are the original height and width, the crop's top and left in the resized image, and the
  height and width of the result.
  """

  def __init__(self, images: StoredImages, image: np.ndarray, *, mirrored: int):
    """Makes the view; the arguments are those of `RandomCrops`."""
    self._images, self._image, self._mirrored = images, image, mirrored
    self.shape, self.dtype = (len(image), 6), np.dtype(np.float32)

  def __len__(self) -> int:
    """Returns the number of rows."""
    return len(self._image)

  def __getitem__(self, index: np.ndarray) -> np.ndarray:
    """Returns the numbers of the rows of an index, int [B]."""
    index = np.asarray(index)
    row, images = index % len(self), self._images
    sizes = images.sizes(self._image[row, 0]).astype(np.float64)
    place = np.full(len(index), 0.5)
    if images.crop == "random":
      place = place_of(index, len(self))
    target = np.array(images.size, np.float64)
    resized = np.rint(sizes * (target / sizes).max(axis=1, keepdims=True))
    corner = np.rint((resized - target) * place[:, None])
    is_mirrored = row >= len(self) - self._mirrored
    corner[is_mirrored, 1] = (resized[:, 1] - target[1] - corner[:, 1])[is_mirrored]
    if images.crop == "none":
      corner[:] = 0
    targets = np.broadcast_to(target, sizes.shape)
    return np.concatenate([sizes, corner, targets], axis=1).astype(np.float32)
