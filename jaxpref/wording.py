"""Numbers in sentences."""


def count(number: int, noun: str) -> str:
  """A number and its noun: '1 image', '2 images', '1,200 images'."""
  return f"{number:,} {noun}{'' if number == 1 else 's'}"
