"""Pictures of any shape become the patches of transformers' processor."""

from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from mmjax.data import batch as batch_lib
from mmjax.data import naflex

GOLDEN = Path(__file__).parents[1] / "golden" / "naflex.npz"
PATCH, SLOTS = 4, 24


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN) as arrays:
    return dict(arrays)


def picture(width, height):
  y, x = np.mgrid[:height, :width]
  values = np.stack([7 * x + y, 5 * y, 200 * (x > width // 3)], -1) % 256
  return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize(
    "shape",
    [(39, 23), (20, 41), (12, 12), (200, 7), (3, 50), (640, 480)],
)
def test_patches_are_those_of_transformers(golden, shape):
  name = "x".join(map(str, shape))
  patches, grid = naflex.patches(picture(*shape), PATCH, SLOTS)
  np.testing.assert_array_equal(grid, golden[f"{name}.grid"])
  np.testing.assert_allclose(patches, golden[f"{name}.patches"], atol=1e-6)


def test_proportions_are_kept_to_a_patch():
  for height in (3, 17, 224, 1080):
    for width in (3, 50, 300, 4000):
      rows, columns = naflex.grid(height, width, 16, 256)
      assert 1 <= rows * columns <= 256
      # A larger scale would not fit: one more row or column is too many.
      assert (rows + 1) * (columns + 1) > 256
  with pytest.raises(ValueError, match="0x5"):
    naflex.grid(0, 5, 16, 256)


def test_examples_lose_their_image_and_keep_the_rest():
  class Source:
    def __len__(self):
      return 1

    def __getitem__(self, index):
      image = np.asarray(picture(9, 14), np.float32) / 127.5 - 1
      return {"image": image, "label": np.int32(3)}

  source = naflex.Patched(Source(), PATCH, SLOTS)
  example = source[0]
  batch_lib.check({k: v[None] for k, v in example.items()}, "patched")
  patches, grid = naflex.patches(picture(9, 14), PATCH, SLOTS)
  np.testing.assert_array_equal(example["patches"], patches)
  np.testing.assert_array_equal(example["grid"], grid)
  assert example["label"] == 3 and "image" not in example and len(source) == 1
