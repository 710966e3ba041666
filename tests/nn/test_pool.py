"""Attention across sequences, its block and the pooling head, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import attention as attention_lib
from mmjax.nn import mask as masks
from mmjax.nn import partitioning, pool, transformer

RNG = np.random.default_rng(0)


def build(module, *arguments):
  """Parameters that are all of one size, so that none can hide."""
  init = jax.jit(module.init)
  found = partitioning.unbox(init(jax.random.key(0), *arguments))
  draw = lambda x: np.float32(0.3 * RNG.normal(size=x.shape))
  return {"params": jax.tree.map(draw, found["params"])}


def softmax(x):
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  return x / x.sum(axis=-1, keepdims=True)


def attention(p, x, seen, visible):
  """In float64; `visible` is bool[B or 1, Q, K]."""
  project = lambda n, y: (
      np.einsum("bld,dhk->bhlk", y, p[n]["kernel"]) + p[n]["bias"][:, None]
  )
  q, k, v = project("query", x), project("key", seen), project("value", seen)
  scores = np.einsum("bhqk,bhsk->bhqs", q, k) / np.sqrt(q.shape[-1])
  scores = np.where(visible[:, None], scores, -1e30)
  y = np.einsum("bhqs,bhsk->bqhk", softmax(scores), v)
  return np.einsum("bqhk,hkd->bqd", y, p["out"]["kernel"]) + p["out"]["bias"]


def layer_norm(p, x, epsilon=1e-6):
  x = x - x.mean(axis=-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)
  return x * p["scale"] + p["bias"]


def mlp(p, x):
  x = np.maximum(x @ p["up"]["kernel"] + p["up"]["bias"], 0)
  return x @ p["down"]["kernel"] + p["down"]["bias"]


def sequences(queries=5, keys=7):
  x = RNG.normal(size=(2, queries, 12))
  seen = RNG.normal(size=(2, keys, 10))
  valid = np.arange(keys) < np.array([[keys], [3]])
  return np.float32(x), np.float32(seen), valid


def test_cross_attention():
  x, seen, valid = sequences()
  module = attention_lib.Attention(heads=3)
  mask = masks.padded(masks.full(5, 7), valid)
  variables = build(module, x, mask, seen)
  found = jax.jit(module.apply)(variables, x, mask, seen)
  expected = attention(variables["params"], x, seen, valid[:, None])
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_heads_must_divide_the_width():
  x, seen, _ = sequences()
  with pytest.raises(ValueError, match="width 12 is not divisible by 5 heads"):
    attention_lib.Attention(heads=5).init(
        jax.random.key(0), x, masks.full(5, 7), seen
    )


def test_cross_block():
  x, seen, valid = sequences()
  module = transformer.CrossBlock(
      heads=2, mlp=9, activation="relu", epsilon=1e-6
  )
  arguments = (
      x, masks.causal(5), seen, masks.padded(masks.full(5, 7), valid)
  )
  variables = build(module, *arguments)
  found, _ = jax.jit(module.apply)(variables, *arguments)
  p = variables["params"]
  y = layer_norm(p["attention_norm"], x)
  x = x + attention(p["attention"], y, y, np.tri(5, dtype=bool)[None])
  y = layer_norm(p["cross_norm"], x)
  x = x + attention(p["cross"], y, seen, valid[:, None])
  x = x + mlp(p["mlp"], layer_norm(p["mlp_norm"], x))
  np.testing.assert_allclose(found, x, atol=1e-5)


def test_attention_pool():
  x, _, _ = sequences(queries=7)
  valid = np.arange(7) < np.array([[7], [4]])
  module = pool.AttentionPool(heads=3, mlp=8, activation="relu", epsilon=1e-6)
  mask = masks.padded(masks.full(1, 7), valid)
  variables = build(module, x, mask)
  found = jax.jit(module.apply)(variables, x, mask)
  p = variables["params"]
  probe = np.broadcast_to(p["probe"], (2, 1, 12))
  y = attention(p["attention"], probe, x, valid[:, None])
  y = y + mlp(p["mlp"], layer_norm(p["norm"], y))
  np.testing.assert_allclose(found, y[:, 0], atol=1e-5)
  assert jnp.shape(found) == (2, 12)
