"""Writes what transformers' SigLIP 2 makes of pictures of many shapes.

Run with transformers (5.23 wrote the file that is kept):

  python tests/golden/make_naflex.py

`naflex.npz` holds, for each picture `WIDTHxHEIGHT` (see `picture`), its patches
and its grid.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from transformers.models.siglip2 import image_processing_pil_siglip2 as siglip2

PATCH, SLOTS = 4, 24
SHAPES = ((39, 23), (20, 41), (12, 12), (200, 7), (3, 50), (640, 480))


def picture(width: int, height: int) -> Image.Image:
  """A smooth picture with a hard edge, made of integers alone."""
  y, x = np.mgrid[:height, :width]
  values = np.stack([7 * x + y, 5 * y, 200 * (x > width // 3)], -1) % 256
  return Image.fromarray(values.astype(np.uint8))


def main() -> None:
  process = siglip2.Siglip2ImageProcessorPil(
      patch_size=PATCH, max_num_patches=SLOTS
  )
  arrays = {}
  for width, height in SHAPES:
    out = process(picture(width, height), return_tensors="np")
    name = f"{width}x{height}"
    arrays[f"{name}.patches"] = out["pixel_values"][0].astype(np.float32)
    arrays[f"{name}.grid"] = out["spatial_shapes"][0].astype(np.int32)
    filled = out["pixel_attention_mask"][0].sum()
    assert filled == arrays[f"{name}.grid"].prod()
  np.savez_compressed(Path(__file__).parent / "naflex.npz", **arrays)


if __name__ == "__main__":
  main()
