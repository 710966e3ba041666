"""The Hopper kernels on a Hopper GPU, against float64.

`MMJAX_TEST_PLATFORM=cuda pytest tests/kernels/test_on_gpu.py`
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.kernels import device, flash_attention, vq_lookup
from mmjax.kernels.intervals import LAST
from tests.kernels import reference
from tests.kernels.test_flash_gpu import make_mask, masks, tensors


@pytest.fixture(autouse=True)
def hopper():
  found = jax.devices()[0].device_kind
  if not device.is_hopper(found):
    pytest.skip(f"{found} is no Hopper GPU")


@functools.partial(jax.jit, static_argnames=("scale", "softcap"))
def computed(q, k, v, mask, dout, scale, softcap=None):
  attend = functools.partial(
      flash_attention.flash_attention,
      mask=mask, scale=scale, softcap=softcap, implementation="gpu",
  )  # fmt: skip
  out, pull, lse = jax.vjp(
      lambda q, k, v: attend(q, k, v), q, k, v, has_aux=True
  )
  return {"out": out, "lse": lse} | dict(
      zip(("dq", "dk", "dv"), pull(dout), strict=True)
  )


def check(arguments, mask, softcap=None) -> None:
  q, k, v, dout = arguments
  scale = q.shape[-1] ** -0.5
  expected = reference.results(q, k, v, dout, mask, scale, softcap)
  found = computed(q, k, v, mask, dout, scale, softcap)
  errors = {}
  for name, x in found.items():
    x, want = np.asarray(x, np.float64), expected[name]
    finite = np.isfinite(want)
    np.testing.assert_array_equal(x[~finite], want[~finite], err_msg=name)
    top = np.abs(want[finite]).max(initial=1e-6)
    errors[name] = np.abs(x[finite] - want[finite]).max(initial=0) / top
  print({name: f"{error:.1e}" for name, error in errors.items()})
  assert max(errors.values()) < 1e-2, errors
  assert errors["lse"] < 1e-5, errors


@pytest.mark.parametrize("name", masks())
def test_every_pattern(name):
  check(tensors(heads=2, dim=64, dtype="bfloat16"), masks()[name])


@pytest.mark.parametrize("dim", [32, 80, 128, 160, 192, 256])
def test_head_sizes(dim):
  arguments = tensors(
      batch=2, queries=300, keys=1000, heads=4, groups=2, dim=dim,
      dtype="bfloat16",
  )  # fmt: skip
  last = np.full(1000, LAST)
  check(arguments, make_mask(np.arange(300), np.arange(1000) - 700, last))


def test_softcap():
  arguments = [x * 3 for x in tensors(dim=64, dtype="bfloat16")]
  check(arguments, masks()["causal"], softcap=5.0)


def test_long_rows():
  arguments = tensors(queries=2048, keys=2048, heads=2, dim=64,
                      dtype="bfloat16")  # fmt: skip
  row = np.arange(2048)
  check(arguments, make_mask(row, row, np.full(2048, LAST)))


def test_equal_runs_are_equal():
  q, k, v, dout = tensors(queries=1024, keys=1024, heads=4, groups=2, dim=64,
                          dtype="bfloat16")  # fmt: skip
  mask = make_mask(np.arange(1024), np.arange(1024), np.full(1024, LAST))
  first = computed(q, k, v, mask, dout, 0.125)
  for _ in range(5):
    jax.tree.map(
        np.testing.assert_array_equal, computed(q, k, v, mask, dout, 0.125),
        first,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(5000, 1024, 128), (1000, 4096, 8), (77, 300, 64)], ids=str
)
def test_nearest_codes(shape, dtype):
  rows, codes, dim = shape
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(rows, dim)), dtype)
  codebook = jnp.asarray(rng.normal(size=(codes, dim)), dtype)
  index, distance = jax.jit(
      functools.partial(vq_lookup.vq_lookup, implementation="gpu")
  )(x, codebook)
  x, codebook = np.asarray(x, np.float64), np.asarray(codebook, np.float64)
  squares = (x**2).sum(1)[:, None] + (codebook**2).sum(1) - 2 * x @ codebook.T
  found = np.take_along_axis(squares, np.asarray(index)[:, None], 1)[:, 0]
  np.testing.assert_allclose(found, squares.min(1), rtol=1e-6, atol=1e-5)
  np.testing.assert_allclose(distance, squares.min(1), rtol=1e-5, atol=1e-4)
