"""Makes this directory: pictures as transformers prepares them.

Needs transformers; run from the repository's root:
`python tests/golden/pictures/make.py`.
"""

import pathlib

import numpy as np
from PIL import Image
import transformers

SIZE = 12


def picture(width, height):
  """A smooth picture with a hard edge, made of integers alone."""
  y, x = np.mgrid[:height, :width]
  values = np.stack([7 * x + y, 5 * y, 200 * (x > width // 3)], -1) % 256
  return Image.fromarray(values.astype(np.uint8))


def main():
  square = {"height": SIZE, "width": SIZE}
  clip = transformers.CLIPImageProcessorPil(
      size={"shortest_edge": SIZE}, crop_size=square
  )
  vit = transformers.ViTImageProcessorPil(size=square)
  arrays = {}
  for width, height in ((39, 23), (20, 41), (12, 12)):
    for name, processor in (("clip", clip), ("vit", vit)):
      out = processor(picture(width, height), return_tensors="np")
      values = out["pixel_values"][0].transpose(1, 2, 0)
      arrays[f"{name}_{width}_{height}"] = values
  np.savez_compressed(pathlib.Path(__file__).parent / "expected.npz", **arrays)


if __name__ == "__main__":
  main()
