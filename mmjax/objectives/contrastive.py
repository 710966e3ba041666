"""Do paired examples find each other? The symmetric InfoNCE loss."""

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
