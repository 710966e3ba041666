"""The ends of a language model against plain arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.nn import linear, partitioning, position

RNG = np.random.default_rng(0)


def init(module, *args):
  return partitioning.unbox(module.init(jax.random.key(0), *args))


def test_positions_begin_behind_the_rows_of_padding():
  place = jnp.array([[0, 1, 5], [-1, 4, 9]])
  layer = position.LearnedPositions(6, offset=2)
  variables = layer.init(jax.random.key(0), place, 4)
  variables = partitioning.unbox(variables)
  table = variables["params"]["table"]
  assert table.shape == (8, 4)
  found = layer.apply(variables, place, 4)
  # Behind the end stands the last row: padding must be finite.
  np.testing.assert_array_equal(found, table[np.array([[2, 3, 7], [1, 6, 7]])])


def test_a_table_is_read_and_written():
  tokens = RNG.integers(0, 9, (2, 3))
  layer = linear.Embed(9, 4)
  variables = init(layer, tokens)
  table = variables["params"]["embedding"]
  np.testing.assert_array_equal(layer.apply(variables, tokens), table[tokens])
  hidden = RNG.normal(size=(2, 3, 4)).astype(np.float32)
  np.testing.assert_allclose(
      layer.apply(variables, hidden, method="logits"),
      np.float64(hidden) @ np.float64(table).T,
      atol=1e-5,
  )


def test_scores_are_summed_in_float32():
  hidden = jnp.ones((1, 1, 4096), jnp.bfloat16)
  layer = linear.Head(1, std=1.0, dtype=jnp.bfloat16)
  variables = {"params": {"kernel": jnp.ones((4096, 1)).at[0].set(2.0)}}
  found = layer.apply(variables, hidden)
  assert found.dtype == jnp.float32
  assert float(found[0, 0, 0]) == 4097  # bfloat16 would say 4096.
