"""Exact search on one and on eight devices, against numpy."""

import jax
import numpy as np
import pytest

from mmjax import sharding
from mmjax.sampling.retrieval import Index

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(37, 5)).astype(np.float32)
# Equal ones, on different devices.
VECTORS[[3, 11, 30]] = 4 * VECTORS[3]
QUERIES = np.concatenate([RNG.normal(size=(4, 5)), VECTORS[3:4]])


def reference(k, exclude):
  scores = QUERIES.astype(np.float32) @ VECTORS.T
  for row, gone in enumerate(exclude):
    scores[row, [i for i in gone if i >= 0]] = -np.inf
  order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return np.take_along_axis(scores, order, axis=1), order


@pytest.mark.parametrize(
    "shape",
    [dict(data=1), dict(data=4, fsdp=2), dict(data=2, tensor=2, context=2)],
)
def test_the_best_are_those_of_numpy(shape):
  count = int(np.prod(list(shape.values())))
  index = Index(VECTORS, sharding.make_mesh(shape, jax.devices()[:count]))
  exclude = np.full((5, 3), -1)
  exclude[1], exclude[4] = [36, 0, 5], [11, -1, 3]
  for k, gone in ((6, exclude), (1, None)):
    scores, found = index.search(QUERIES, k, gone)
    expected, order = reference(k, [] if gone is None else gone)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    np.testing.assert_array_equal(found, order)
    if gone is not None:
      assert found[4, 0] == 30


def test_what_is_refused():
  index = Index(VECTORS)
  with pytest.raises(ValueError, match=r"\[B, 5\], found \[5, 4\]"):
    index.search(QUERIES[:, :4])
  with pytest.raises(ValueError, match="37 vectors, of which 30"):
    index.search(QUERIES, 8, np.zeros((5, 30)))
  with pytest.raises(ValueError, match=r"\[M, E\], found \[0, 5\]"):
    Index(VECTORS[:0])
