"""How does a real picture become an `image`? Resize, crop, normalise."""

from typing import NamedTuple

import numpy as np
from PIL import Image


class Normalisation(NamedTuple):
  """Mean and deviation of each channel, of pixels in [0, 1]."""

  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def __call__(self, pixels: np.ndarray) -> np.ndarray:
    """u8[..., 3] to f32[..., 3]."""
    # By whole rows and in place: numpy is slow where the last axis is short.
    rows = pixels.reshape(*pixels.shape[:-2], -1)
    count = rows.shape[-1] // 3
    scaled = rows.astype(np.float32)
    scaled /= np.float32(255)
    scaled -= np.tile(np.float32(self.mean), count)
    scaled /= np.tile(np.float32(self.std), count)
    return scaled.reshape(pixels.shape)


# To [-1, 1]: ViT (Dosovitskiy et al. 2021, the authors' code) and TinyWorld.
HALF = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# CLIP (Radford et al. 2021, the authors' code).
CLIP = Normalisation(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)


def resize_crop(picture: Image.Image, size: int) -> np.ndarray:
  """The middle square of a picture, as CLIP's authors cut it.

  Args:
    picture: of any mode and shape.
    size: the side to cut, in pixels; the short side is resized to it (bicubic).

  Returns:
    u8[size, size, 3].
  """
  picture = picture.convert("RGB")
  width, height = picture.size
  short = min(width, height)
  resized = picture.resize(
      (size * width // short, size * height // short), Image.Resampling.BICUBIC
  )
  # Halves go to the even pixel, as in the authors' code.
  left = round((resized.width - size) / 2)
  top = round((resized.height - size) / 2)
  return np.asarray(resized.crop((left, top, left + size, top + size)))


def clip_image(picture: Image.Image, size: int) -> np.ndarray:
  """A picture as CLIP sees it: f32[size, size, 3]."""
  return CLIP(resize_crop(picture, size))


def vit_image(picture: Image.Image, size: int) -> np.ndarray:
  """A picture as ViT sees it: squeezed to f32[size, size, 3] in [-1, 1]."""
  squeezed = picture.convert("RGB").resize(
      (size, size), Image.Resampling.BILINEAR
  )
  return HALF(np.asarray(squeezed))
