"""Both kernels, interpreted, under every pattern that systems use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.kernels import _flash_gpu, _flash_tpu, flash_attention
from tests.kernels import patterns, reference
from tests.kernels.test_flash_attention import distance

# Odd, and more than one tile of either kernel.
LENGTH, DIM = 139, 32
HEADS = {"1": (2, 2), "4": (4, 1), "8": (8, 1)}


@functools.partial(jax.jit, static_argnames="backend")
def run(q, k, v, dout, mask, backend):
  # The tiles of the TPU kernel can be small, those of the GPU's cannot.
  options = dict(tiles=(32, 48)) if backend is _flash_tpu else {}
  options |= dict(scale=0.2, softcap=None, interpret=True)
  out, lse = backend.forward(q, k, v, mask, **options)
  delta = flash_attention.row_delta(out, dout, lse)
  safe = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
  grads = backend.backward(q, k, v, mask, safe, delta, dout, **options)
  return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads)))


def check(backend, name, ratio):
  rng = np.random.default_rng(0)
  mask = patterns.PATTERNS[name](rng, LENGTH)
  keys = mask.shape[1]
  heads, groups = HEADS[ratio]
  q, k, v, dout = (
      rng.normal(size=(patterns.BATCH, length, n, DIM)).astype(np.float32)
      for length, n in (
          (LENGTH, heads), (keys, groups), (keys, groups), (LENGTH, heads)
      )
  )
  expected = reference.results(q, k, v, dout, mask, 0.2)
  for what, found in run(q, k, v, dout, mask, backend).items():
    assert distance(found, expected[what]) < 2e-6, what


@pytest.mark.parametrize("name", sorted(patterns.PATTERNS))
def test_tpu(name):
  check(_flash_tpu, name, "1")


@pytest.mark.parametrize("ratio", ["4", "8"])
def test_tpu_with_grouped_queries(ratio):
  check(_flash_tpu, "packed", ratio)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_once")
@pytest.mark.parametrize("name", sorted(patterns.PATTERNS))
def test_gpu(name):
  check(_flash_gpu, name, "1")


@pytest.mark.slow
@pytest.mark.usefixtures("compile_once")
@pytest.mark.parametrize("ratio", ["4", "8"])
def test_gpu_with_grouped_queries(ratio):
  check(_flash_gpu, "packed", ratio)
