"""The colours of the shapes world, which the renderer and the verifier share."""

# Saturated object colours, far apart in hue or, within a hue, in lightness.
OBJECTS: dict[str, tuple[int, int, int]] = {
  "red": (214, 40, 40),
  "orange": (247, 140, 28),
  "yellow": (246, 220, 50),
  "green": (44, 150, 60),
  "cyan": (56, 205, 222),
  "blue": (36, 74, 206),
  "purple": (128, 44, 176),
  "pink": (246, 128, 190),
}

# Achromatic, so that every object differs from its background.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
  "white": (244, 244, 244),
  "silver": (186, 186, 186),
  "gray": (104, 104, 104),
  "black": (18, 18, 18),
}
