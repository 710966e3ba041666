"""The Mosaic kernels against the definition, interpreted and compiled."""

import functools
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.kernels import _flash_tpu as flash
from mmjax.kernels import _flash_tpu_grid as grids
from mmjax.kernels import intervals
from mmjax.kernels.flash_attention import row_delta
from mmjax.kernels.intervals import Mask
from tests.kernels import reference, tpu

INF = intervals.LAST


def _mask(block, first, last, pattern="interval"):
  """A mask of rows, or of one row that the batch shares."""
  return Mask(
      *(np.atleast_2d(x).astype(np.int32) for x in (block, first, last)),
      pattern=pattern,
  )


def _index(queries, keys):
  return np.arange(queries), np.arange(keys)


def _full(queries, keys):
  zeros = np.zeros(keys)
  return _mask(np.zeros(queries), zeros, zeros, "full")


def _causal(queries, keys):
  i, j = _index(queries, keys)
  return _mask(i, j, np.full(keys, INF), "causal")


def _window(queries, keys, size=20):
  i, j = _index(queries, keys)
  return _mask(i, j, j + size - 1)


def _documents(queries, keys):
  """Causal within documents, of other lengths in each row of the batch."""
  i, j = _index(queries, keys)
  ends = np.array([[30, 31, 90, 10_000], [64, 70, 71, 10_000]])
  last = [row[np.searchsorted(row, j, side="right")] - 1 for row in ends]
  return _mask(np.stack([i, i]), np.stack([j, j]), np.stack(last))


def _prefix(queries, keys, size=37):
  i, j = _index(queries, keys)
  place = lambda x: np.maximum(x - size + 1, 0)
  return _mask(place(i), place(j), np.full(keys, INF))


def _scales(queries, keys):
  """Next-scale prediction: 1, 2, 3.. squared tokens a scale."""
  ends = np.cumsum(np.arange(1, 20) ** 2)
  scale = lambda x: np.searchsorted(ends, x, side="right")
  i, j = _index(queries, keys)
  return _mask(scale(i), scale(j), np.full(keys, INF))


def _blocks(queries, keys, size=24):
  """Two blocks back, one ahead."""
  i, j = _index(queries, keys)
  return _mask(i // size, j // size - 1, j // size + 2)


def _gaps(queries, keys):
  """Rows that see nothing, alone and as whole tiles; keys that nobody sees."""
  i, j = _index(queries, keys)
  block = np.where((i % 7 == 3) | (i // 40 == 1), -1, i)
  return _mask(block, j, np.where(j % 5 == 2, -2, j + 50))


PATTERNS = {
    function.__name__[1:]: function
    for function in (
        _full, _causal, _window, _documents, _prefix, _scales, _blocks, _gaps
    )
}


def _inputs(queries, keys, heads=2, groups=1, dim=32, batch=2, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda length, count: rng.standard_normal(
      (batch, length, count, dim)
  ).astype(np.float32)
  return (
      draw(queries, heads), draw(keys, groups), draw(keys, groups),
      draw(queries, heads),
  )


@functools.partial(jax.jit, static_argnames=("scale", "softcap", "tiles"))
def _kernels(q, k, v, dout, mask, *, scale, softcap=None, tiles):
  """out, lse, dq, dk, dv from the interpreted kernels."""
  options = dict(scale=scale, softcap=softcap, interpret=True, tiles=tiles)
  out, lse = flash.forward(q, k, v, mask, **options)
  delta = row_delta(out, dout, lse)
  safe = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
  grads = flash.backward(q, k, v, mask, safe, delta, dout, **options)
  return out, lse, *grads


NAMES = "out", "lse", "dq", "dk", "dv"


def _check(inputs, mask, *, tiles=(32, 48), softcap=None, error=2e-6):
  scale = inputs[0].shape[-1] ** -0.5
  expected = reference.results(*inputs, mask, scale, softcap)
  found = _kernels(
      *inputs, mask, scale=scale, softcap=softcap, tiles=tiles
  )
  for name, x in zip(NAMES, found):
    y = expected[name]
    x = np.asarray(x, np.float64)
    assert np.array_equal(np.isneginf(x), np.isneginf(y)), name
    x, y = (np.where(np.isneginf(a), 0, a) for a in (x, y))
    largest, difference = np.abs(y).max(), np.abs(x - y).max()
    assert difference <= error * largest, (name, difference / largest)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern(pattern):
  mask = PATTERNS[pattern](133, 133)
  _check(_inputs(133, 133), mask)


@pytest.mark.parametrize("pattern,queries,keys", [
    ("full", 33, 150), ("causal", 33, 150), ("causal", 150, 33),
    ("window", 150, 33),
])
def test_lengths_that_differ(pattern, queries, keys):
  mask = PATTERNS[pattern](queries, keys)
  _check(_inputs(queries, keys), mask)


def test_parts_of_a_mask_may_be_shared():
  mask, rows = _window(90, 90), _documents(90, 90)
  block = mask.block + np.array([[0], [5]], np.int32)
  _check(_inputs(90, 90), mask.replace(block=block, last=rows.last))


@pytest.mark.parametrize("heads,groups", [(2, 2), (4, 1), (8, 1), (4, 2)])
def test_grouped_queries(heads, groups):
  inputs = _inputs(70, 70, heads=heads, groups=groups, dim=16)
  _check(inputs, _causal(70, 70))


@pytest.mark.parametrize("dim", [64, 80, 256])
def test_head_size(dim):
  _check(_inputs(50, 60, dim=dim), _window(50, 60))


@pytest.mark.parametrize("pattern", ["full", "gaps"])
def test_softcap(pattern):
  q, *rest = _inputs(70, 70)
  mask = PATTERNS[pattern](70, 70)
  _check((4 * q, *rest), mask, softcap=2.0)


def test_scores_of_any_size():
  q, *rest = _inputs(70, 70)
  # Squared scores overflow, and an early tile's maximum is far from the last.
  q = q * np.float32(1000) * np.linspace(-1, 1, 70)[:, None, None]
  _check((q.astype(np.float32), *rest), _causal(70, 70), error=2e-3)


def test_bfloat16():
  inputs = [jnp.asarray(x, jnp.bfloat16) for x in _inputs(133, 133, heads=4)]
  mask = _documents(133, 133)
  _check(inputs, mask, error=2e-2)
  out, lse, *grads = jax.eval_shape(
      functools.partial(_kernels, scale=1.0, tiles=(32, 48)), *inputs, mask
  )
  assert lse.dtype == jnp.float32
  assert all(x.dtype == jnp.bfloat16 for x in (out, *grads))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_mask(data):
  batch = data.draw(st.sampled_from([1, 2]))
  numbers = st.integers(-3, 12)
  row = lambda n: data.draw(st.lists(numbers, min_size=n, max_size=n))
  rows = lambda n: np.array([row(n) for _ in range(batch)])
  # Sorted blocks have tiles of every state, others hardly a hidden one.
  order = data.draw(st.sampled_from([np.sort, np.asarray]))
  first = order(rows(40))
  mask = _mask(order(rows(29)), first, first + np.abs(rows(40)) - 2)
  _check(_inputs(29, 40, dim=8), mask, tiles=(8, 16))


def test_hidden_tiles_are_not_visited():
  inputs = _inputs(128, 128)
  mask = _window(128, 128, size=16)
  tiles = 16, 32
  padded = intervals.tile_states(mask, *tiles)
  assert (padded == intervals.HIDDEN).sum() == 8 * 4 - 11
  clean = _kernels(*inputs, mask, scale=1.0, tiles=tiles)
  # Keys 0 to 31 are seen by the first 48 queries, whose results are compared
  # no more; the others must not even read them.
  for name, which in (("k", 1), ("v", 2)):
    poisoned = [x.copy() for x in inputs]
    poisoned[which][:, :32] = np.nan
    found = _kernels(*poisoned, mask, scale=1.0, tiles=tiles)
    for kind, x, y in zip(NAMES, found, clean):
      if kind in ("out", "dq"):
        assert np.isnan(x[:, :32]).all()
        np.testing.assert_array_equal(x[:, 48:], y[:, 48:], f"{name} {kind}")
  # Likewise queries that a tile of keys does not meet.
  poisoned = [x.copy() for x in inputs]
  poisoned[0][:, :16] = np.nan
  found = _kernels(*poisoned, mask, scale=1.0, tiles=tiles)
  for x, y in zip(found[3:], clean[3:]):
    assert np.isnan(x[:, :16]).all()
    np.testing.assert_array_equal(x[:, 32:], y[:, 32:])


def test_nan_in_a_key_that_nobody_sees():
  q, k, v, dout = _inputs(64, 96)
  mask = _mask(np.zeros(64), np.zeros(96), np.where(np.arange(96) < 48, 0, -1))
  clean = _kernels(q, k, v, dout, mask, scale=1.0, tiles=(32, 48))
  k[:, 48:], v[:, 48:] = np.nan, np.nan
  found = _kernels(q, k, v, dout, mask, scale=1.0, tiles=(32, 48))
  for x, y in zip(found, clean):
    np.testing.assert_array_equal(x, y)


def test_steps():
  states = jnp.array([[[1, 0, 2], [0, 0, 0]], [[0, 1, 0], [1, 2, 0]]])
  steps, count = grids.pack_steps(states)
  assert count == 3
  steps = np.asarray(steps).reshape(2, 6)
  fields = lambda row: [
      (x >> 17, x >> 4 & 0x1FFF, x & 3, x >> 2 & 1, x >> 3 & 1) for x in row
  ]
  idle = (0, 0, 0)
  # Outer tile, inner tile, state, begins, ends.
  assert fields(steps[0]) == [
      (0, 0, 1, 1, 0), (0, 2, 2, 0, 1), (1, 0, 0, 1, 1), *[(1, 0, *idle)] * 3
  ]
  assert fields(steps[1]) == [
      (0, 1, 1, 1, 1), (1, 0, 1, 1, 0), (1, 1, 2, 0, 1), *[(1, 1, *idle)] * 3
  ]


@pytest.mark.parametrize("pattern", sorted(set(PATTERNS) - {"gaps"}))
def test_steps_are_the_visible_tiles(pattern):
  mask = PATTERNS[pattern](192, 192)
  visible = np.asarray(mask.dense()).reshape(-1, 6, 32, 6, 32).any((2, 4))
  # A row of tiles that nobody sees takes a step to write its zeros.
  expected = np.maximum(visible.sum(-1), 1).sum(-1).max()
  _, count = grids.pack_steps(intervals.tile_states(mask, 32, 32))
  assert count == expected
  assert pattern == "full" or expected < 36


def test_one_list_where_many_do_not_fit(monkeypatch):
  monkeypatch.setattr(grids, "_MAX_STEPS", 20)
  mask = _documents(133, 133)
  states = intervals.tile_states(intervals.pad(mask, 160, 144), 32, 48)
  steps, _ = grids.pack_steps(states)
  assert steps.shape == (15,)
  _kernels.clear_cache()  # Whose programs do not know the limit.
  _check(_inputs(133, 133), mask)
  with pytest.raises(ValueError, match="6 x 5 tiles; the TPU kernels take at"):
    grids.pack_steps(jnp.ones((1, 6, 5), jnp.int32))


def test_refusal():
  assert flash.refusal((1, 8, 2, 256), jnp.bfloat16) == ""
  assert "257 is above 256" in flash.refusal((1, 8, 2, 257), jnp.float32)
  assert "float16" in flash.refusal((1, 8, 2, 64), jnp.float16)


def test_tile_sizes():
  sizes = lambda q, k, d=64, t=jnp.bfloat16, c="TPU v5 lite": grids.tile_sizes(
      c, d, t, q, k
  )
  rows, columns = sizes(1 << 20, 1 << 20)
  assert (rows, columns) == grids.TILES["TPU v5 lite"][64]
  assert sizes(1, 129) == (128, 256)
  # 2 tiles of 640 instead of 1024 and 176.
  length = rows + 176
  assert sizes(length, 1)[0] == 128 * math.ceil(length / 256)
  assert sizes(4096, 4096, c="TPU v9") == grids._SMALL_TILES
  for dim in (1, 64, 65, 128, 256):
    for dtype in (jnp.float32, jnp.bfloat16):
      assert all(x % 128 == 0 for x in sizes(1 << 14, 1 << 14, dim, dtype))


# Ahead of time, for chips that are not there.


def _compile(chip, run, *, dim, dtype, pattern, length):
  """Compiles `run(q, k, v, mask, row, dout)` for one chip, 8 heads over 2."""
  array = jax.ShapeDtypeStruct
  q, k = (array((1, length, heads, dim), dtype) for heads in (8, 2))
  number = array((1, length), jnp.int32)
  mask = Mask(number, number, number, pattern=pattern)
  row = array((1, 8, length), jnp.float32)
  return tpu.compile_for(chip, run, q, k, k, mask, row, q)


def _forward(q, k, v, mask, row, dout, softcap=None):
  return flash.forward(
      q, k, v, mask, scale=0.1, softcap=softcap, interpret=False
  )


def _backward(q, k, v, mask, row, dout, softcap=None):
  return flash.backward(
      q, k, v, mask, row, row, dout,
      scale=0.1, softcap=softcap, interpret=False,
  )


@pytest.mark.slow
@tpu.needed
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("dim,dtype,pattern,length", [
    (128, "bfloat16", "causal", 16384),
    (64, "bfloat16", "interval", 16384),
    (80, "bfloat16", "full", 5000),
    (72, "bfloat16", "interval", 300),
    (256, "bfloat16", "interval", 4096),
    (32, "float32", "interval", 1000),
    (256, "float32", "causal", 2048),
])
def test_compiles(chip, dim, dtype, pattern, length):
  case = dict(dim=dim, dtype=dtype, pattern=pattern, length=length)
  whole = 8 * length * dim * jnp.dtype(dtype).itemsize
  for run in (_forward, functools.partial(_backward, softcap=30.0)):
    compiled = _compile(chip, run, **case)
    assert "tpu_custom_call" in compiled.as_text()
    memory = compiled.memory_analysis()
    # Turned and padded arrays, in number of those of q; nothing of L x L.
    assert memory.temp_size_in_bytes < 8 * whole + 2**20


@pytest.mark.slow
@tpu.needed
def test_tiles_are_derived():
  from mmjax.kernels import _flash_tpu_tiles as derivation

  for kind, by_dim in grids.TILES.items():
    for dim, tiles in by_dim.items():
      assert derivation.candidates(derivation.CORES[kind], dim)[0] == tiles
  # Whether the first candidate compiles takes a minute a chip.
  assert derivation.derive("TPU v5 lite", 128) == (
      grids.TILES["TPU v5 lite"][128]
  )
