"""The memory of a decoder, and attention to it, against plain arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.nn import attention, cache, linear, norm, partitioning, transformer
from mmjax.nn import mask as masks

RNG = np.random.default_rng(0)


def filled(depth=2, batch=3, groups=2, slots=24, dim=4):
  found = cache.empty(depth, batch, groups, slots, dim, jnp.float32)
  return found.replace(
      k=jnp.asarray(RNG.normal(size=found.k.shape), jnp.float32),
      v=jnp.asarray(RNG.normal(size=found.v.shape), jnp.float32),
      length=jnp.array([0, 3, 5]),
  )


def test_tokens_land_behind_those_of_their_row_and_layer():
  before = filled()
  k, v = RNG.normal(size=(2, 3, 2, 2, 4)).astype(np.float32)
  after = before.write(1, k, v)
  for name, new in (("k", k), ("v", v)):
    expected = np.array(getattr(before, name))
    for row, start in enumerate([0, 3, 5]):
      for i in range(2):
        expected[1, row, :, start + i] = new[row, i]
    np.testing.assert_array_equal(getattr(after, name), expected)
  np.testing.assert_array_equal(after.length, before.length)
  np.testing.assert_array_equal(
      before.positions(2), [[0, 1], [3, 4], [5, 6]]
  )
  np.testing.assert_array_equal(before.advanced(2).length, [2, 5, 7])
  counts = jnp.array([0, 2, 1])
  np.testing.assert_array_equal(before.advanced(counts).length, [0, 5, 6])


def test_the_mask_sees_what_is_held_and_is_causal():
  seen = filled().mask(2).dense()
  for row, start in enumerate([0, 3, 5]):
    for i in range(2):
      np.testing.assert_array_equal(
          seen[row, i], np.arange(24) <= start + i
      )
  with pytest.raises(ValueError, match="do not fit 24 slots"):
    filled().mask(25)


@pytest.mark.parametrize("count", [1, 3, 19])
@pytest.mark.parametrize("mesh", [None, dict(tensor=2), dict(tensor=8)])
def test_attention_to_a_layer(count, mesh):
  """Few tokens where the cache lies, many to a copy; over meshes too."""
  held = filled()
  q = RNG.normal(size=(3, count, 8, 4)).astype(np.float32)
  mask = held.mask(count)
  expected = np.zeros(q.shape)
  visible = np.asarray(mask.dense())
  k, v = (np.float64(x[1]) for x in (held.k, held.v))
  for b, i, h in np.ndindex(*q.shape[:3]):
    keys = np.flatnonzero(visible[b, i])
    scores = 0.7 * k[b, h // 4, keys] @ q[b, i, h]
    weights = np.exp(scores - scores.max())
    expected[b, i, h] = weights @ v[b, h // 4, keys] / weights.sum()
  run = jax.jit(
      lambda q, held, layer: attention.cached_attention(
          q, held, layer, mask, scale=0.7
      )
  )
  shape = dict(data=1) if mesh is None else mesh
  size = 1 if mesh is None else mesh["tensor"]
  with jax.set_mesh(sharding.make_mesh(shape, jax.devices()[:size])):
    found = run(q, held, 1)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_groups_must_divide_heads():
  layer = attention.CachedAttention(4, 3, 4, linear.XAVIER, linear.XAVIER)
  with pytest.raises(ValueError, match="4 heads .* 3 groups"):
    layer.init(jax.random.key(0), jnp.zeros((1, 2, 8)), masks.causal(2))


def apply(module, x):
  variables = partitioning.unbox(module.init(jax.random.key(0), x))
  noise = lambda x: np.float32(x + 0.3 * RNG.normal(size=x.shape))
  variables = jax.tree.map(noise, variables)
  return module.apply(variables, x), variables["params"]


def test_rms_norm():
  x = RNG.normal(size=(2, 3, 8)).astype(np.float32) * 1e-3
  found, params = apply(norm.RMSNorm(1e-5), x)
  mean = np.square(np.float64(x)).mean(axis=-1, keepdims=True)
  np.testing.assert_allclose(
      found, x / np.sqrt(mean + 1e-5) * params["scale"], rtol=1e-5
  )
  half = norm.RMSNorm(1e-8, jnp.bfloat16)
  x = jnp.full((1, 8), 1e-4, jnp.bfloat16)
  found = half.apply({"params": {"scale": jnp.ones(8)}}, x)
  assert found.dtype == jnp.bfloat16
  # Without epsilon it would be 1.
  np.testing.assert_allclose(np.float32(found), 0.5**0.5, rtol=1e-2)


def test_gated_mlp():
  x = RNG.normal(size=(2, 3, 8)).astype(np.float32)
  inits = transformer.BlockInit()
  found, params = apply(transformer.GatedMlp(5, "silu", inits), x)
  project = lambda name, x: (
      x @ params[name]["kernel"] + params[name]["bias"]
  )
  gate = project("gate", np.float64(x))
  hidden = gate / (1 + np.exp(-gate)) * project("up", np.float64(x))
  np.testing.assert_allclose(found, project("down", hidden), atol=1e-5)


def test_reordered_rows_take_their_past_with_them():
  before = filled()
  after = cache.reordered(before, jnp.array([2, 0, 2, 1]))
  np.testing.assert_array_equal(after.length, [5, 0, 5, 3])
  np.testing.assert_array_equal(after.k[:, 3], before.k[:, 1])
  np.testing.assert_array_equal(after.v[:, 0], after.v[:, 2])
  one = cache.empty(1, 1, 1, 2, 4, jnp.float32)
  assert one.k is not one.v  # Both are donated.
