"""Each transform against what torch's layout means, and against its inverse."""

import numpy as np
import pytest

from mmjax.weights import transforms


@pytest.mark.parametrize("transform, ours, theirs", [
    (transforms.IDENTITY, (3, 4), (3, 4)),
    (transforms.IDENTITY, (), ()),
    (transforms.LINEAR, (3, 5), (5, 3)),
    (transforms.LINEAR, (3, 2, 4), (8, 3)),
    (transforms.linear(2), (2, 4, 3), (3, 8)),
    (transforms.FLAT, (5,), (5,)),
    (transforms.FLAT, (2, 4), (8,)),
    (transforms.CONV2D, (5, 6, 3, 7), (7, 3, 5, 6)),
    (transforms.leading(1), (4, 3), (1, 4, 3)),
    (transforms.leading(2), (3,), (1, 1, 3)),
])
def test_inverse_and_without_copies(transform, ours, theirs):
  array = np.arange(np.prod(ours), dtype=np.float32).reshape(ours)
  there = np.ascontiguousarray(transform.to_theirs(array)).reshape(theirs)
  back = transform.to_ours(there, ours)
  np.testing.assert_array_equal(back, array)
  # A slice of a leaf must not cost a copy of the whole tensor.
  assert np.shares_memory(back, there)


def test_linear_is_the_same_map():
  rng = np.random.default_rng(0)
  x, matrix = rng.normal(size=(7, 3)), rng.normal(size=(8, 3))
  kernel = transforms.LINEAR.to_ours(matrix, (3, 2, 4))
  np.testing.assert_allclose(
      np.einsum("nd,dhk->nhk", x, kernel).reshape(7, 8), x @ matrix.T
  )


def test_attention_output_is_the_same_map():
  rng = np.random.default_rng(0)
  x, matrix = rng.normal(size=(7, 2, 4)), rng.normal(size=(3, 8))
  kernel = transforms.linear(2).to_ours(matrix, (2, 4, 3))
  np.testing.assert_allclose(
      np.einsum("nhk,hkd->nd", x, kernel), x.reshape(7, 8) @ matrix.T
  )


def test_convolution_is_the_same_map():
  rng = np.random.default_rng(0)
  image, kernel = rng.normal(size=(3, 5, 6)), rng.normal(size=(7, 3, 5, 6))
  ours = transforms.CONV2D.to_ours(kernel, (5, 6, 3, 7))
  np.testing.assert_allclose(
      np.einsum("hwc,hwco->o", image.transpose(1, 2, 0), ours),
      np.einsum("chw,ochw->o", image, kernel),
  )
