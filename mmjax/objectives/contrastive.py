"""Do paired examples find each other? The symmetric InfoNCE loss."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from mmjax import sharding
from mmjax.objectives.classification import softmax_cross_entropy
from mmjax.objectives.term import Term, mean_term


def info_nce(
    left: jax.Array, right: jax.Array, scale: jax.Array
) -> dict[str, Term]:
  """Symmetric cross-entropy over the similarities of a batch (CLIP, figure 3).

  Row i of `left` belongs to row i of `right`; every other row of the GLOBAL
  batch is a negative. Under a mesh each device holds the logits of its own
  rows against all columns, so that memory is B^2 / devices.

  Args:
    left: f32[B, E], unit rows.
    right: f32[B, E], unit rows.
    scale: f32[], the inverse temperature.

  Returns:
    `contrastive` (nats), and the in-batch accuracies `left_to_right` and
    `right_to_left`.
  """
  chex.assert_equal_shape([left, right])
  labels = jnp.arange(left.shape[0])

  def direction(
      rows: jax.Array, columns: jax.Array
  ) -> tuple[jax.Array, Term]:
    rows = sharding.constrain(rows, "batch", None)
    columns = sharding.constrain(columns, None, None)
    logits = scale * jnp.matmul(
        rows, columns.T, preferred_element_type=jnp.float32
    )
    logits = sharding.constrain(logits, "batch", None)
    hit = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
    return softmax_cross_entropy(logits, labels), mean_term(hit)

  forward, left_to_right = direction(left, right)
  backward, right_to_left = direction(right, left)
  return {
      "contrastive": mean_term(0.5 * (forward + backward)),
      "left_to_right": left_to_right,
      "right_to_left": right_to_left,
  }


def paired(
    similarity: jax.Array, same: jax.Array, *, smoothing: float = 0.0
) -> dict[str, Term]:
  """`info_nce` of similarities that are no products of two vectors.

  Args:
    similarity: f32[B, B], of row i of one kind and row j of the other, divided
      by the temperature.
    same: bool[B, B], which pairs belong together, (i, i) among them; they share
      the probability.
    smoothing: of the targets, which is spread over all B.

  Returns:
    The terms of `info_nce`.
  """
  chex.assert_equal_shape([similarity, same])
  target = same / same.sum(axis=1, keepdims=True)
  target = (1 - smoothing) * target + smoothing / len(same)

  def direction(
      logits: jax.Array, target: jax.Array
  ) -> tuple[jax.Array, Term]:
    logits, target = (
        sharding.constrain(x, "batch", None) for x in (logits, target)
    )
    loss = -(target * jax.nn.log_softmax(logits)).sum(axis=1)
    best = logits.argmax(axis=1)[:, None]
    hit = jnp.take_along_axis(same, best, axis=1).astype(jnp.float32)
    return loss, mean_term(hit[:, 0])

  # `same` is symmetric, and so is how its rows share.
  forward, left_to_right = direction(similarity, target)
  backward, right_to_left = direction(similarity.T, target)
  return {
      "contrastive": mean_term(0.5 * (forward + backward)),
      "left_to_right": left_to_right,
      "right_to_left": right_to_left,
  }


def hard_negatives(
    key: jax.Array,
    similarity: jax.Array,
    same: jax.Array,
    draw: Callable[..., jax.Array] = jax.random.categorical,
) -> jax.Array:
  """For every row a column that is not its own, the more alike the likelier.

  They are drawn from the softmax of their similarities (ALBEF, Li et al.
  2021, section 3.2).

  Args:
    key: a PRNG key.
    similarity: f32[N, M], divided by the temperature.
    same: bool[N, M], the columns that are none.
    draw: (key, logits f32[N, M]) -> i32[N].

  Returns:
    i32[N]. A row without any negative gets any column.
  """
  # Not -inf, so that a row in which all is hidden stays finite.
  logits = jnp.where(same, -1e4, jax.lax.stop_gradient(similarity))
  return draw(key, logits)
