"""The GPU's quantizer kernel, interpreted, and lowered for Hopper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.kernels import _vq_gpu
from mmjax.kernels import vq_lookup as vq
from tests.kernels import test_vq_lookup as definition

INTERPRET = "gpu:interpret"


@pytest.mark.parametrize("metric", vq.METRICS)
def test_float32_is_searched_at_full_precision(metric):
  # Far from the origin bfloat16, or two parts of it, would tell nothing apart.
  x, codebook = definition.draw(0, (70, 20), (150, 20))
  shift = 0 if metric == "cosine" else 20
  definition.check_lookup(x + shift, codebook + shift, metric, INTERPRET)


def test_bfloat16():
  x, codebook = definition.draw(1, (130, 70), (40, 70))
  x, codebook = jnp.asarray(x, "bfloat16"), jnp.asarray(codebook, "bfloat16")
  definition.check_lookup(x, codebook, "euclidean", INTERPRET)


def test_zeros_and_nans():
  definition.check_zeros_and_nans(INTERPRET)


def test_ties_go_to_the_lowest_index_across_tiles():
  rng = np.random.default_rng(2)
  x = rng.integers(-2, 3, (60, 3)).astype(np.float32)
  codebook = rng.integers(-2, 3, (300, 3)).astype(np.float32)
  index, _ = vq.vq_lookup(x, codebook, implementation=INTERPRET)
  expected = definition.distances(x, codebook).argmin(axis=1)
  np.testing.assert_array_equal(index, expected)


def test_levels():
  x, codebooks = definition.draw(3, (50, 12), (3, 40, 12))
  active = np.arange(50, dtype=np.int32) % 5
  definition.check_residual(x, codebooks, active, INTERPRET)


def test_parts_add_up():
  x = definition.draw(4, (30, 70)) * 10.0 ** np.arange(-15, 15)[:, None]
  x = x.astype(np.float32)
  parts = jax.jit(lambda x: _vq_gpu._cut(x, 3, 64))(x)
  assert parts.shape == (3, 64, 128) and parts.dtype == jnp.bfloat16
  total = np.asarray(parts).astype(np.float64).sum(axis=0)
  np.testing.assert_array_equal(total[:30, :70], x)
  assert not total[30:].any() and not total[:, 70:].any()


def test_the_products_that_count_are_all_that_float32_resolves():
  x, codebook = definition.draw(5, (64, 64), (64, 64))
  a, b = (
      np.asarray(_vq_gpu._cut(array, 3, 64)).astype(np.float64)
      for array in (x, codebook)
  )
  products = sum(a[i] @ b[j].T for i, j in _vq_gpu._PRODUCTS[3])
  exact = x.astype(np.float64) @ codebook.T.astype(np.float64)
  magnitude = np.abs(x) @ np.abs(codebook).T
  assert np.abs((products - exact) / magnitude).max() < 2**-24


@pytest.mark.parametrize("rows,count,dim,dtype", [
    (65536, 1024, 128, "float32"), (65536, 1024, 128, "bfloat16"),
    (1000, 2048, 256, "float32"), (13, 17, 4, "float32"),
    (600, 5000, 384, "bfloat16"), (4096, 262144, 8, "float32"),
])
def test_lowers_for_cuda(rows, count, dim, dtype):
  shapes = [
      jax.ShapeDtypeStruct(shape, dtype)
      for shape in ((rows, dim), (count, dim))
  ]
  lookup = functools.partial(vq.vq_lookup, implementation="gpu")
  exported = jax.export.export(jax.jit(lookup), platforms=["cuda"])(*shapes)
  assert exported.mlir_module().count("mosaic_gpu") >= 1
  assert exported.out_avals[0].shape == (rows,)


def test_what_does_not_fit_is_refused():
  call = lambda *shape: vq.Call("NVIDIA H100 80GB HBM3", *shape)
  assert vq.choose(call((1024, 256))).implementation == "gpu"
  assert vq.choose(call((8, 1024, 256))).implementation == "gpu"
  half = jnp.bfloat16
  assert vq.choose(call((1024, 384), half)).implementation == "gpu"
  # Levels compute in float32, whatever they are given.
  wide = vq.choose(call((8, 1024, 384), half))
  assert wide.implementation == "chunked"
  assert "384 dimensions of float32 do not fit in shared" in wide.reason
  old = vq.choose(vq.Call("NVIDIA A100-SXM4-80GB", (1024, 128)))
  assert old.implementation == "chunked"
  assert "not gpu: its kernel is for Hopper" in old.reason
