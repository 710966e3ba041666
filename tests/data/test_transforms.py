"""Pictures become what transformers' processors make of them."""

import pathlib

import numpy as np
from PIL import Image
import pytest

from mmjax.data import transforms

GOLDEN = np.load(
    pathlib.Path(__file__).parent.parent / "golden/pictures/expected.npz"
)
SIZE = 12
PREPARE = {"clip": transforms.clip_image, "vit": transforms.vit_image}


def picture(width, height):
  y, x = np.mgrid[:height, :width]
  values = np.stack([7 * x + y, 5 * y, 200 * (x > width // 3)], -1) % 256
  return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize("case", GOLDEN.files)
def test_pictures_are_those_of_transformers(case):
  name, width, height = case.split("_")
  image = PREPARE[name](picture(int(width), int(height)), SIZE)
  assert image.dtype == np.float32
  np.testing.assert_allclose(image, GOLDEN[case], atol=1e-6)


def test_an_odd_rest_is_cut_as_by_the_authors():
  # 15 columns to 12: half of 3 rounds to the even 2.
  wide = Image.fromarray(np.tile(np.arange(15, dtype=np.uint8), (12, 1)))
  cut = transforms.resize_crop(wide, 12)
  np.testing.assert_array_equal(cut[0, :, 0], np.arange(2, 14))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_become_rgb(mode):
  image = picture(20, 16).convert(mode)
  expected = transforms.clip_image(image.convert("RGB"), SIZE)
  np.testing.assert_array_equal(transforms.clip_image(image, SIZE), expected)
