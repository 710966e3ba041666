"""The TPU's quantizer kernels, interpreted, and compiled ahead of time."""

import functools
import importlib.util
import itertools
import math

import jax
from jax.extend.core import jaxpr_as_fun
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.kernels import _vq_tpu
from mmjax.kernels import vq_lookup as vq
from mmjax.perf import topology
from tests.kernels import test_vq_lookup as definition

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"
)

LOOKUP, RESIDUAL, SCAN = "tpu:interpret", "tpu:interpret", "scan:interpret"


@pytest.mark.parametrize("metric", vq.METRICS)
@pytest.mark.parametrize("rows,count,dim", [
    (50, 16, 4), (600, 513, 33), (64, 5000, 8), (13, 17, 300)
])
def test_lookup_finds_the_nearest(rows, count, dim, metric):
  x, codebook = definition.draw(0, (rows, dim), (count, dim))
  definition.check_lookup(x, codebook, metric, LOOKUP)


def test_blocks_of_a_codebook_are_searched_one_after_the_other(monkeypatch):
  monkeypatch.setattr(_vq_tpu, "_BLOCK_BYTES", 1200 * 128 * 4)
  x, codebook = definition.draw(1, (520, 8), (1700, 8))
  call = lambda x, codebook: vq.vq_lookup(x, codebook, implementation=LOOKUP)
  (kernel,) = kernels(call, x, codebook)
  assert kernel.params["grid_mapping"].grid == (2, 2)
  definition.check_lookup(x, codebook, "euclidean", LOOKUP)
  definition.check_ties(LOOKUP)


@pytest.mark.parametrize("metric", vq.METRICS)
def test_bfloat16(metric):
  x, codebook = definition.draw(2, (70, 24), (100, 24))
  x, codebook = jnp.asarray(x, "bfloat16"), jnp.asarray(codebook, "bfloat16")
  definition.check_lookup(x, codebook, metric, LOOKUP)


def test_ties_zeros_and_nans():
  definition.check_ties(LOOKUP)
  definition.check_zeros_and_nans(LOOKUP)


@pytest.mark.parametrize("implementation", [RESIDUAL, SCAN])
@pytest.mark.parametrize("rows,count,dim,dtype", [
    (600, 40, 12, "float32"), (50, 700, 33, "float32"), (64, 16, 8, "bfloat16")
])
def test_residual(rows, count, dim, dtype, implementation):
  x, codebooks = definition.draw(3, (rows, dim), (3, count, dim))
  codebooks *= np.array([1, 0.7, 0.5], np.float32)[:, None, None]
  x, codebooks = jnp.asarray(x, dtype), jnp.asarray(codebooks, dtype)
  active = np.arange(rows, dtype=np.int32) % 5
  found = definition.check_residual(x, codebooks, active, implementation)
  # To the bit what the other implementation says: the gather is exact.
  for a, b in zip(found, jax.jit(vq.residual_vq)(x, codebooks, active)):
    np.testing.assert_array_equal(a, b)


def kernels(f, *args):
  """The `pallas_call` equations of a function, those in loops once."""

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "pallas_call":
        yield eqn
        continue
      for value in eqn.params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
          yield from walk(inner)

  return list(walk(jax.make_jaxpr(f)(*args).jaxpr))


def bytes_moved(kernel):
  """Bytes that the pipeline of a kernel copies: each new block, once."""
  grid = kernel.params["grid_mapping"]
  total = 0
  for mapping in grid.block_mappings:
    at = lambda step, index=mapping.index_map_jaxpr: tuple(
        int(i) for i in jaxpr_as_fun(index)(*step)
    )
    steps = itertools.product(*map(range, grid.grid))
    visits = [block for block, _ in itertools.groupby(map(at, steps))]
    array = mapping.array_aval
    # The last block of a dimension ends with the array.
    block = [getattr(b, "block_size", b) for b in mapping.block_shape]
    for visit in visits:
      sizes = [
          min(b, n - i * b) for i, b, n in zip(visit, block, array.shape)
      ]
      total += math.prod(sizes) * array.dtype.itemsize
  return total


def claimed(kernel):
  return kernel.params["cost_estimate"].bytes_accessed


def test_the_fused_kernel_moves_a_third_of_what_lookups_do():
  levels, count, dim = 8, 1024, 128
  x = jax.ShapeDtypeStruct((65536, dim), jnp.float32)
  codebooks = jax.ShapeDtypeStruct((levels, count, dim), jnp.float32)
  (fused,) = kernels(
      lambda x, c: vq.residual_vq(x, c, implementation="tpu"), x, codebooks
  )
  lookups = kernels(
      lambda x, c: [
          vq.vq_lookup(x, c[level], implementation="tpu")
          for level in range(levels)
      ],
      x, codebooks,
  )
  assert len(lookups) == levels
  # What the kernels say of themselves is what their blocks amount to. Eight
  # lookups then move still more: rows to gather and to subtract.
  for kernel in (fused, *lookups):
    assert claimed(kernel) == bytes_moved(kernel)
  assert 3 * claimed(fused) <= sum(map(claimed, lookups))
  # The codebooks are read once, as the rows are.
  assert claimed(fused) <= 4 * (
      2 * 65536 * dim + levels * count * dim + (levels + 1) * 65536
  )


def test_a_codebook_of_many_blocks_is_read_for_every_tile_of_rows():
  x = jax.ShapeDtypeStruct((2048, 128), jnp.float32)
  codebook = jax.ShapeDtypeStruct((2**15, 128), jnp.float32)
  (kernel,) = kernels(
      lambda x, c: vq.vq_lookup(x, c, implementation="tpu"), x, codebook
  )
  assert claimed(kernel) == bytes_moved(kernel)
  assert claimed(kernel) > 4 * codebook.size * 4


@pytest.mark.parametrize("implementation", ["tpu", "scan", "chunked"])
def test_products_of_float32_are_at_full_precision(implementation):
  """A CPU multiplies nothing less; a TPU and a GPU do unless told."""

  def products(dtype, *shape):
    """How many there are, and how many say so of both operands."""
    f = vq.vq_lookup if len(shape) == 2 else vq.residual_vq
    f = functools.partial(f, implementation=implementation)
    args = jnp.zeros((20, 8), dtype), jnp.zeros(shape, dtype)
    text = str(jax.make_jaxpr(f)(*args))
    return text.count("dot_general["), text.count("Precision.HIGHEST") // 2

  every, exact = products(jnp.float32, 3, 16, 8)
  assert every == exact > 0
  if implementation != "scan":
    every, exact = products(jnp.bfloat16, 16, 8)
    assert every > exact == 0


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    "name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v4:2x2x1"]
)
def test_kernels_compile_for(name):
  mesh = sharding.make_mesh({"data": 1}, topology.devices(name)[:1])
  place = sharding.replicated(mesh)

  def compiled(f, *shapes, dtype=jnp.float32):
    args = [jax.ShapeDtypeStruct(s, dtype, sharding=place) for s in shapes]
    with jax.set_mesh(mesh):
      text = jax.jit(f).lower(*args).compile().as_text()
    return text.count("tpu_custom_call")

  for rows, count, dim in (
      (65536, 1024, 128), (1000, 4096, 32), (13, 17, 4), (4096, 5000, 1024)
  ):
    assert compiled(vq.vq_lookup, (rows, dim), (count, dim)) == 1
  # The largest codebook, halves, and angles.
  cosine = lambda x, codebook: vq.vq_lookup(x, codebook, metric="cosine")
  half = jnp.bfloat16
  assert compiled(cosine, (4096, 8), (262144, 8), dtype=half) == 1
  assert compiled(vq.vq_lookup, (600, 300), (5000, 300), dtype=half) == 1
  # EnCodec, Mimi, the widest that fits, an odd one, and Mimi's 32 levels.
  for rows, *codebooks, dim in (
      (65536, 8, 1024, 128), (1000, 8, 2048, 256), (600, 6, 1024, 1024),
      (333, 3, 19, 5), (600, 32, 2048, 256),
  ):
    assert compiled(vq.residual_vq, (rows, dim), (*codebooks, dim)) == 1
