"""Masks, tiles and schedules against loops over every pair, tile and step."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.kernels import intervals
from mmjax.kernels.intervals import HIDDEN, LAST, LOWEST, PARTIAL, WHOLE, Mask


def random_mask(rng, batches, queries, keys, spread):
  """Random intervals; some keys are seen by nobody, in several ways."""
  block = rng.integers(-spread, spread + 1, (batches[0], queries))
  first = rng.integers(-spread, spread + 1, (batches[1], keys))
  last = first + rng.integers(-2, spread + 1, first.shape)
  endless = rng.random(first.shape) < 0.2
  nobody = rng.random(first.shape) < 0.2
  last = np.where(endless, LAST, last)
  last = np.where(nobody, LOWEST, last)
  first = np.where(nobody, LAST, first)
  return Mask(*(jnp.asarray(x, jnp.int32) for x in (block, first, last)))


def visible(mask):
  """bool[B, Q, K] from Python integers, pair by pair."""
  batch = max(mask.block.shape[0], mask.first.shape[0])
  block, first, last = (
      np.broadcast_to(x, (batch, x.shape[1])).tolist()
      for x in (mask.block, mask.first, mask.last)
  )
  return np.array([
      [[lo <= b <= hi for lo, hi in zip(first[n], last[n])] for b in block[n]]
      for n in range(batch)
  ])


BATCHES = [(1, 1), (3, 3), (3, 1), (1, 3)]


@pytest.mark.parametrize("batches", BATCHES, ids=str)
def test_dense_is_first_block_last(batches):
  mask = random_mask(np.random.default_rng(0), batches, 7, 11, 4)
  assert mask.shape == (7, 11)
  expected = visible(mask)
  assert 0 < expected.sum() < expected.size
  np.testing.assert_array_equal(mask.dense(), expected)


@pytest.mark.parametrize("batches", BATCHES, ids=str)
def test_pad_adds_hidden_keys_and_rows_like_the_last(batches):
  mask = random_mask(np.random.default_rng(1), batches, 7, 11, 4)
  padded = intervals.pad(mask, 12, 16)
  assert padded.shape == (12, 16)
  before, after = visible(mask), visible(padded)
  np.testing.assert_array_equal(after[:, :7, :11], before)
  assert not after[:, :, 11:].any()
  np.testing.assert_array_equal(
      after[:, 7:, :11], np.repeat(before[:, -1:], 5, axis=1)
  )


def test_pad_by_nothing_changes_nothing():
  mask = random_mask(np.random.default_rng(2), (2, 2), 6, 5, 3)
  for x, y in zip(jax.tree.leaves(mask), jax.tree.leaves(
      intervals.pad(mask, 6, 5)
  )):
    np.testing.assert_array_equal(x, y)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tile=st.sampled_from([(1, 1), (4, 3), (8, 12), (2, 12)]),
    batches=st.sampled_from(BATCHES),
    spread=st.sampled_from([0, 2, 10, 2**30]),
    ordered=st.booleans(),
)
def test_tile_states_are_certain(seed, tile, batches, spread, ordered):
  rng = np.random.default_rng(seed)
  mask = random_mask(rng, batches, 8, 12, spread)
  if ordered:
    mask = mask.replace(block=jnp.sort(mask.block, axis=1))
  rows, columns = tile
  states = np.asarray(intervals.tile_states(mask, rows, columns))
  dense = visible(mask)
  assert states.shape == (dense.shape[0], 8 // rows, 12 // columns)
  for b, i, j in np.ndindex(states.shape):
    part = dense[
        b, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns
    ]
    if states[b, i, j] == HIDDEN:
      assert not part.any()
    elif states[b, i, j] == WHOLE:
      assert part.all()
    else:
      assert states[b, i, j] == PARTIAL
    # One pair leaves no room for doubt.
    if tile == (1, 1):
      assert states[b, i, j] != PARTIAL


def test_tile_states_of_a_causal_mask_are_known():
  position = jnp.arange(12, dtype=jnp.int32)[None]
  mask = Mask(position, position, jnp.full_like(position, LAST))
  expected = [
      [PARTIAL, HIDDEN, HIDDEN],
      [WHOLE, PARTIAL, HIDDEN],
      [WHOLE, WHOLE, PARTIAL],
  ]
  np.testing.assert_array_equal(intervals.tile_states(mask, 4, 4)[0], expected)


def test_a_tile_with_a_hidden_key_is_not_whole():
  block = jnp.zeros((1, 4), jnp.int32)
  first = jnp.asarray([[0, 0, LAST, 0]], jnp.int32)
  last = jnp.asarray([[0, 0, LOWEST, 0]], jnp.int32)
  states = intervals.tile_states(Mask(block, first, last), 2, 2)
  np.testing.assert_array_equal(states[0], [[WHOLE, PARTIAL]] * 2)


@pytest.mark.parametrize("shape", [(5, 7), (2, 4, 6), (2, 3, 4, 1)], ids=str)
def test_schedule_visits_what_is_not_hidden_once_and_in_order(shape):
  states = np.random.default_rng(3).choice(
      [HIDDEN, HIDDEN, PARTIAL, WHOLE], shape
  )
  states[..., 0, :] = HIDDEN
  states[..., 1, :] = WHOLE
  order, count = intervals.schedule(jnp.asarray(states))
  assert order.shape == shape and count.shape == shape[:-1]
  assert order.dtype == count.dtype == jnp.int32
  for at in np.ndindex(shape[:-1]):
    tiles = [j for j in range(shape[-1]) if states[at][j] != HIDDEN]
    assert count[at] == len(tiles)
    rest = shape[-1] - len(tiles)
    expected = tiles + [tiles[-1] if tiles else order[at][0]] * rest
    np.testing.assert_array_equal(order[at], expected)
  # The first of nothing is 0, a tile that exists.
  assert not np.asarray(order)[..., 0, :].any()


def test_schedule_of_keys_first_is_that_of_the_transpose():
  states = np.random.default_rng(4).choice([HIDDEN, PARTIAL, WHOLE], (2, 5, 7))
  order, count = intervals.schedule(jnp.asarray(states).swapaxes(1, 2))
  assert order.shape == (2, 7, 5)
  np.testing.assert_array_equal(count, (states != HIDDEN).sum(axis=1))


def test_a_mask_is_data():
  # New arrays of the same shapes need no new compilation.
  compiled = jax.jit(
      lambda mask: intervals.schedule(intervals.tile_states(mask, 4, 4))
  )
  for seed in range(2):
    mask = random_mask(np.random.default_rng(seed), (2, 2), 8, 12, 5)
    order, count = compiled(mask)
    states = np.asarray(intervals.tile_states(mask, 4, 4))
    np.testing.assert_array_equal(count, (states != HIDDEN).sum(-1))
    assert order.shape == (2, 2, 3)
  assert compiled._cache_size() == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_visible_pairs_are_counted(seed, shared_block, shared_keys):
  rng = np.random.default_rng(seed)
  rows = lambda shared: 1 if shared else 3
  first = rng.integers(-3, 6, (rows(shared_keys), 13))
  mask = intervals.Mask(
      *(jnp.asarray(x, jnp.int32) for x in (
          rng.integers(-5, 8, (rows(shared_block), 7)),
          first,
          first + rng.integers(-2, 4, first.shape),
      ))
  )
  expected = np.asarray(mask.dense()).sum((1, 2))
  np.testing.assert_array_equal(intervals.visible_pairs(mask), expected)
