"""Attention over eight devices is attention on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.kernels import intervals
from mmjax.nn import attention, ring, transformer
from mmjax.nn import mask as masks
from tests.kernels import patterns, tpu

BATCH, LENGTH, HEADS, GROUPS, DIM = patterns.BATCH, 64, 4, 2, 16


def arrays(rng, keys, groups=GROUPS, heads=HEADS, queries=LENGTH, batch=BATCH):
  draw = lambda length, n: jnp.asarray(
      rng.normal(size=(batch, length, n, DIM)), jnp.float32
  )
  return (
      draw(queries, heads), draw(keys, groups), draw(keys, groups),
      draw(queries, heads),
  )


def output_and_gradients(mask, q, k, v, dout, **kwargs):
  @jax.jit
  def run(q, k, v, mask):
    out, pull = jax.vjp(
        lambda q, k, v: attention.dot_product_attention(
            q, k, v, mask, scale=0.3, **kwargs
        ),
        q, k, v,
    )
    return out, *pull(dout)

  return run(q, k, v, mask)


def assert_equal_on(shape, mask, operands, **kwargs):
  one = output_and_gradients(mask, *operands, **kwargs)
  with jax.set_mesh(sharding.make_mesh(shape)):
    many = output_and_gradients(mask, *operands, **kwargs)
  for a, b in zip(one, many):
    np.testing.assert_allclose(a, b, atol=2e-6 * float(abs(a).max() + 1))
    assert float(abs(a).max()) > 0


@pytest.mark.parametrize("name", sorted(patterns.PATTERNS))
def test_ring_of_eight(name):
  rng = np.random.default_rng(0)
  mask = patterns.PATTERNS[name](rng, LENGTH)
  assert_equal_on({"context": 8}, mask, arrays(rng, mask.shape[1]))


@pytest.mark.parametrize("shape", [
    {"data": 2, "tensor": 2, "context": 2},
    {"fsdp": 2, "context": 4},
    {"data": 2, "tensor": 4},
    {"tensor": 8},
])
def test_other_meshes(shape):
  """Four devices of `tensor` share two groups of heads, eight one each."""
  rng = np.random.default_rng(1)
  mask = patterns.PATTERNS["packed"](rng, LENGTH)
  assert_equal_on(shape, mask, arrays(rng, LENGTH, heads=8))


@pytest.mark.parametrize("queries,keys", [(64, 60), (60, 64), (63, 61)])
def test_lengths_that_the_ring_does_not_divide(queries, keys):
  rng = np.random.default_rng(2)
  mask = masks.cached(np.array([3, 0]), queries, max(keys, queries + 3))
  mask = masks.Mask(mask.block, mask.first[:, :keys], mask.last[:, :keys])
  operands = arrays(rng, keys, queries=queries)
  assert_equal_on({"context": 8}, mask, operands, softcap=2.0)


def test_a_bias_is_refused_in_the_ring_and_split_elsewhere():
  rng = np.random.default_rng(3)
  bias = jnp.asarray(rng.normal(size=(1, HEADS, LENGTH, LENGTH)), jnp.float32)
  operands = arrays(rng, LENGTH)
  mask = masks.causal(LENGTH)
  assert_equal_on({"data": 2, "tensor": 2, "fsdp": 2}, mask, operands,
                  bias=bias)
  with jax.set_mesh(sharding.make_mesh({"context": 8})):
    with pytest.raises(ValueError, match="around the ring"):
      output_and_gradients(mask, *operands, bias=bias)


def test_long_sequences_take_tiles_within_each_part():
  rng = np.random.default_rng(4)
  mask = masks.window(2048, 700)
  operands = arrays(rng, 2048, queries=2048, heads=2, groups=1, batch=1)
  assert_equal_on({"context": 2, "data": 4}, mask, operands)


def test_zigzag_gives_all_parts_the_same_work():
  parts, length = 4, 256
  order = ring.zigzag(length, parts)
  assert sorted(order) == list(range(length))
  causal = masks.causal(length)

  def work(order):
    """Visible tiles of each device."""
    mask = masks.reordered(causal, order)
    states = np.asarray(intervals.tile_states(mask, 8, 8))[0]
    return (states != intervals.HIDDEN).reshape(parts, -1).sum(axis=1)

  plain, balanced = work(np.arange(length)), work(order)
  assert plain.max() > 1.6 * plain.mean()
  assert balanced.max() == balanced.min() == plain.mean()
  with pytest.raises(ValueError, match="8 equal pieces"):
    ring.zigzag(100, 4)


def test_reordered_sequence_gives_reordered_output():
  rng = np.random.default_rng(5)
  operands = arrays(rng, LENGTH)
  order = ring.zigzag(LENGTH, 8)
  causal = masks.causal(LENGTH)
  shuffled = masks.reordered(causal, order)
  one = output_and_gradients(causal, *operands)
  with jax.set_mesh(sharding.make_mesh({"context": 8})):
    many = output_and_gradients(shuffled, *(x[:, order] for x in operands))
  for a, b in zip(one, many):
    np.testing.assert_allclose(a[:, order], b, atol=3e-6 * float(abs(a).max()))


@pytest.mark.slow
@tpu.needed
def test_a_step_over_32k_tokens_compiles_for_64_chips():
  """Four blocks and their gradients, 2,048 tokens a chip; no L x L array."""
  from mmjax.perf import topology

  length, width = 32768, 1024
  mesh = sharding.make_mesh(
      {"data": 4, "context": 16}, topology.devices("v5p:4x4x4")
  )
  blocks = transformer.stacked(transformer.Block, 4, "full")(
      heads=8, mlp=4096, activation="gelu", epsilon=1e-6, dtype=jnp.bfloat16
  )
  x = jax.ShapeDtypeStruct((4, length, width), jnp.bfloat16)
  order = ring.zigzag(length, 16)

  def loss(params, x):
    mask = masks.reordered(masks.causal(length), order)
    out, _ = blocks.apply(params, x[:, order], mask)
    return jnp.square(out.astype(jnp.float32)).mean()

  params = jax.eval_shape(
      lambda: blocks.init(jax.random.key(0), jnp.zeros((1, 8, width)),
                          masks.causal(8))
  )
  params = jax.tree.map(
      lambda leaf: leaf.unbox() if hasattr(leaf, "unbox") else leaf,
      params, is_leaf=lambda leaf: hasattr(leaf, "unbox"),
  )
  split = sharding.spec(("batch", "length", None), x.shape, mesh)
  place = lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, where)
  )
  with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(loss)).lower(
        jax.tree.map(lambda x: place(x, jax.sharding.PartitionSpec()), params),
        place(x, split),
    ).compile()
  text = compiled.as_text()
  assert "tpu_custom_call" in text and "collective-permute" in text
  scores = 8 * (length // 16) * length * 2
  assert compiled.memory_analysis().temp_size_in_bytes < scores
