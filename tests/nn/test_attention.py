"""Attention and masks against the definition, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import attention, mask, partitioning


def reference(q, k, v, visible, scale):
  """softmax(q k^T scale) v over visible keys; zeros where there are none."""
  out = np.zeros(q.shape[:3] + v.shape[3:])
  for b, i, h in np.ndindex(*q.shape[:3]):
    keys = np.flatnonzero(visible[b, i])
    if keys.size:
      logits = scale * (k[b, keys, h] @ q[b, i, h])
      weights = np.exp(logits - logits.max())
      out[b, i, h] = weights @ v[b, keys, h] / weights.sum()
  return out


def random_qkv(rng, queries=5, keys=7):
  q = rng.normal(size=(2, queries, 3, 4))
  k, v = rng.normal(size=(2, 2, keys, 3, 4))
  return q, k, v


def interval_mask(rng, queries, keys):
  first = rng.integers(0, 4, (2, keys))
  return mask.Mask(
      jnp.asarray(rng.integers(-2, 6, (2, queries)), jnp.int32),
      jnp.asarray(first, jnp.int32),
      jnp.asarray(first + rng.integers(0, 3, (2, keys)), jnp.int32),
  )


@pytest.mark.parametrize("pattern", ["full", "causal", "interval"])
def test_attention_is_the_masked_softmax_average(pattern):
  rng = np.random.default_rng(0)
  queries, keys = (6, 6) if pattern == "causal" else (5, 7)
  q, k, v = random_qkv(rng, queries, keys)
  visible = {
      "full": np.ones((2, queries, keys), bool),
      "causal": np.tril(np.ones((2, queries, keys), bool)),
  }
  seen = {
      "full": lambda: mask.full(queries, keys),
      "causal": lambda: mask.causal(queries),
      "interval": lambda: interval_mask(rng, queries, keys),
  }[pattern]()
  if pattern == "interval":
    block, first, last = (
        np.asarray(seen.block), np.asarray(seen.first), np.asarray(seen.last)
    )
    visible[pattern] = np.array([
        [[lo <= b <= hi for lo, hi in zip(first[n], last[n])] for b in block[n]]
        for n in range(2)
    ])
    assert not visible[pattern].any(axis=2).all()  # Some rows see nothing.
  np.testing.assert_array_equal(
      np.broadcast_to(seen.dense(), visible[pattern].shape), visible[pattern]
  )
  out = attention.dot_product_attention(
      *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), seen, scale=0.5
  )
  expected = reference(q, k, v, visible[pattern], 0.5)
  np.testing.assert_allclose(out, expected, atol=2e-6)


def test_a_row_that_sees_nothing_has_a_finite_gradient():
  q, k, v = (
      jnp.asarray(x, jnp.float32) for x in random_qkv(np.random.default_rng(1))
  )
  nothing = mask.Mask(
      jnp.full((1, 5), -1, jnp.int32),
      jnp.zeros((1, 7), jnp.int32),
      jnp.zeros((1, 7), jnp.int32),
  )

  def loss(q, k, v):
    out = attention.dot_product_attention(q, k, v, nothing, scale=1.0)
    return jnp.square(out).sum()

  value, grads = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
  assert value == 0.0
  for grad in grads:
    np.testing.assert_array_equal(grad, 0.0)


def test_bfloat16_stays_near_float32():
  q, k, v = (
      jnp.asarray(x, jnp.float32) for x in random_qkv(np.random.default_rng(2))
  )
  exact = attention.dot_product_attention(q, k, v, mask.full(5, 7), scale=0.5)
  half = attention.dot_product_attention(
      *(x.astype(jnp.bfloat16) for x in (q, k, v)), mask.full(5, 7), scale=0.5
  )
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.03)


def test_heads_must_divide_the_width():
  module = attention.Attention(heads=3)
  with pytest.raises(ValueError, match="width 8 is not divisible by 3 heads"):
    module.init(jax.random.key(0), jnp.zeros((1, 2, 8)), mask.full(2))


def test_a_bias_of_the_keys_changes_nothing():
  x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
  draw = jax.nn.initializers.normal(1.0)
  module = attention.Attention(2, qkv_bias_init=draw)
  variables = partitioning.unbox(
      module.init(jax.random.key(0), x, mask.causal(5))
  )
  expected = module.apply(variables, x, mask.causal(5))
  del variables["params"]["key"]["bias"]
  without = module.clone(biased=("query", "value"))
  found = without.apply(variables, x, mask.causal(5))
  np.testing.assert_allclose(found, expected, atol=1e-5)
