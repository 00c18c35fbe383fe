"""A small preference model: an image tower and a text tower, compared by a cosine, as in CLIP.

The image tower is a residual network with one layer of attention on its last map. The text
tower is CLIP's text encoder, read at the end token.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpref.models import convolution
from jaxpref.models import text as text_lib

MEAN, STD = 0.5, 0.25  # of pixels in [0, 1]
_GROUPS, _HEADS = 8, 4


class ImageTower(nn.Module):
  """Images float [B, S, S, 3], normalized, to features [B, width].

  Attributes:
    channels: of each level; every level halves height and width.
    width: of the features.
    dtype: of the computation.
  """

  channels: tuple[int, ...]
  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes the features."""
    dtype = self.dtype
    x = nn.Conv(self.channels[0], (3, 3), dtype=dtype, name="stem")(x.astype(dtype))
    for i, channels in enumerate(self.channels):
      x = Residual(channels, 2, dtype, name=f"down_{i}")(x)
      if i:
        x = Residual(channels, 1, dtype, name=f"same_{i}")(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    places = self.param("places", nn.initializers.normal(0.3), x.shape[1:])
    x += places.astype(dtype)
    normal = nn.LayerNorm(dtype=dtype, name="norm_1")(x)
    x += nn.SelfAttention(_HEADS, dtype=dtype, name="attention")(normal)
    normal = nn.LayerNorm(dtype=dtype, name="norm_2")(x)
    hidden = nn.gelu(nn.Dense(4 * x.shape[-1], dtype=dtype, name="fc_1")(normal))
    x += nn.Dense(x.shape[-1], dtype=dtype, name="fc_2")(hidden)
    pooled = nn.LayerNorm(dtype=dtype, name="norm_3")(x).mean(axis=1)
    return nn.Dense(self.width, dtype=dtype, name="projection")(pooled)


class Residual(nn.Module):
  """Two convolutions with a shortcut.

  Attributes:
    channels: of the output.
    stride: of the first convolution.
    dtype: of the computation.
  """

  channels: int
  stride: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Applies the block."""
    options = {"dtype": self.dtype}
    hidden = nn.silu(nn.GroupNorm(_GROUPS, **options, name="norm_1")(x))
    hidden = nn.Conv(self.channels, (3, 3), self.stride, **options, name="conv_1")(hidden)
    hidden = nn.silu(nn.GroupNorm(_GROUPS, **options, name="norm_2")(hidden))
    hidden = nn.Conv(self.channels, (3, 3), **options, name="conv_2")(hidden)
    if x.shape != hidden.shape:
      size = (self.stride, self.stride)
      x = nn.Conv(self.channels, size, self.stride, **options, name="shortcut")(x)
    return x + hidden


class Towers(NamedTuple):
  """Both towers, without parameters.

  Attributes:
    image: an `ImageTower`.
    text: from `text.build_text_encoder`.
    image_size: height and width of the images, in pixels.
  """

  image: ImageTower
  text: Any
  image_size: int


def build_towers(config: Mapping[str, Any], *, dtype: Any = jnp.float32) -> Towers:
  """Builds the towers of a preference model's `config.json`.

  Args:
    config: 'image_size', 'channels', 'width', and 'text_config' in transformers' format.
    dtype: of the computation.
  """
  image = ImageTower(tuple(config["channels"]), config["width"], jnp.dtype(dtype))
  text = text_lib.build_text_encoder(config["text_config"], dtype=jnp.dtype(dtype))
  return Towers(image, text, config["image_size"])


def init_towers(towers: Towers, key: jax.Array, *, encoder: Any = None) -> dict[str, Any]:
  """Initializes parameters.

  Args:
    towers: the modules.
    key: of the random numbers.
    encoder: parameters of a trained text encoder; None: random ones.
  """
  keys = jax.random.split(key, 3)
  size, config = towers.image_size, towers.text.config
  if encoder is None:
    encoder = text_lib.init_text_encoder(towers.text, keys[1])
  std = config.hidden_size**-0.5
  projection = std * jax.random.normal(keys[2], (config.hidden_size, towers.image.width))
  return {
    "image": towers.image.init(keys[0], jnp.zeros((1, size, size, 3)))["params"],
    "text": encoder,
    "text_projection": {"kernel": projection},
    "logit_scale": jnp.log(jnp.float32(10.0)),
  }


def abstract_towers(towers: Towers) -> Any:
  """Returns the shapes of the parameters, float32."""
  return jax.eval_shape(lambda key: init_towers(towers, key), jax.random.key(0))


def image_features(towers: Towers, params: Any, pixels: jax.Array) -> jax.Array:
  """Computes features of images, float32 [B, width] of length 1.

  Args:
    towers: the modules.
    params: their parameters.
    pixels: float [B, S, S, 3], normalized with `MEAN` and `STD`.
  """
  with convolution.fast_in_loops(jax.default_backend()):
    return _unit(towers.image.apply({"params": params["image"]}, pixels))


def text_features(towers: Towers, params: Any, ids: jax.Array) -> jax.Array:
  """Computes features of texts, float32 [B, width] of length 1.

  Args:
    towers: the modules.
    params: their parameters.
    ids: token ids, int [B, L]; the highest one ends a text.
  """
  hidden = text_lib.encode_text(towers.text, params["text"], ids)
  end = jnp.take_along_axis(hidden, jnp.argmax(ids, axis=1)[:, None, None], axis=1)[:, 0]
  return _unit(end @ params["text_projection"]["kernel"].astype(end.dtype))


def _unit(features: Any) -> jax.Array:
  wide = features.astype(jnp.float32)
  return wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)
