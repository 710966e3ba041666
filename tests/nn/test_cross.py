"""Cross-attention: shut gates, what is read once, rows that see nothing."""

import functools

import jax
import numpy as np

from mmjax.nn import cross, norm, partitioning, perceiver, transformer
from mmjax.nn import mask as masks


def build():
  block = cross.GatedCrossBlock(
      attention=functools.partial(cross.CrossAttention, 2, 5),
      mlp=functools.partial(transformer.Mlp, 16, "relu2", perceiver.INIT),
      norm=functools.partial(norm.LayerNorm, 1e-5),
  )
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 6, 8)).astype(np.float32)
  other = rng.normal(size=(2, 6, 7)).astype(np.float32)
  index = np.array([[-1, 0, 0, 1, 1, 2], [-1, -1, 2, 2, 2, 2]], np.int32)
  mask = masks.media(index, 3, 2)
  params = partitioning.unbox(block.init(jax.random.key(0), x, mask, other))
  return block, params, x, mask, other, index


def test_gates_are_shut_at_first_and_open_by_their_tanh():
  block, params, x, mask, other, index = build()
  np.testing.assert_array_equal(block.apply(params, x, mask, other)[0], x)
  params["params"]["attention_gate"] = np.float32(0.7)
  found, _ = block.apply(params, x, mask, other)
  # Against float64, the two vectors of its picture for each token.
  p = jax.tree.map(np.float64, params["params"])
  y = x - x.mean(-1, keepdims=True)
  y = y / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
  expected = np.float64(x)
  for b in range(2):
    for t in range(6):
      if index[b, t] < 0:
        continue
      seen = other[b, 2 * index[b, t] : 2 * index[b, t] + 2]
      for head in range(2):
        kernel = lambda name: p["attention"][name]["kernel"][:, head]  # noqa: B023
        scores = y[b, t] @ kernel("query") @ (seen @ kernel("key")).T
        share = np.exp(scores / np.sqrt(5))
        read = share / share.sum() @ (seen @ kernel("value"))
        out = p["attention"]["out"]["kernel"][head]
        expected[b, t] += np.tanh(0.7) * (read @ out)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_mlp_sees_all_tokens():
  block, params, x, mask, other, index = build()
  params["params"]["mlp_gate"] = np.float32(-0.4)
  found, _ = block.apply(params, x, mask, other)
  assert (np.abs(found - x).max(-1) > 1e-3).all()


def test_what_is_read_once_serves_many():
  block, params, x, mask, other, _ = build()
  params["params"]["attention_gate"] = np.float32(0.7)
  seen = block.attention(parent=None).apply(
      {"params": params["params"]["attention"]}, other, method="read"
  )
  np.testing.assert_allclose(
      block.apply(params, x, mask, seen)[0],
      block.apply(params, x, mask, other)[0],
      atol=1e-6,
  )
