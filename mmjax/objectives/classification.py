"""How wrong is a classifier? Softmax cross-entropy and accuracy."""

import chex
import jax
import jax.numpy as jnp

from mmjax.objectives.term import Term, mean_term


def softmax_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, smoothing: float = 0.0
) -> jax.Array:
  """Cross-entropy with integer labels, in float32.

  Args:
    logits: [..., K].
    labels: i32[...].
    smoothing: label smoothing (Szegedy et al. 2016, section 7).

  Returns:
    f32[...], in nats.
  """
  chex.assert_equal_shape_prefix([logits, labels], labels.ndim)
  logits = logits.astype(jnp.float32)
  # A sum, not a gather: it passes over the logits as the others do, has no
  # scatter backward, and needs no logits of other devices.
  here = jnp.arange(logits.shape[-1]) == labels[..., None]
  wanted = (1 - smoothing) * jnp.where(here, logits, 0.0).sum(axis=-1)
  if smoothing:
    wanted += smoothing * logits.mean(axis=-1)
  return jax.nn.logsumexp(logits, axis=-1) - wanted


def terms(
    logits: jax.Array, labels: jax.Array, *, smoothing: float = 0.0
) -> dict[str, Term]:
  """`cross_entropy` and `accuracy` of logits [B, K] against labels i32[B]."""
  loss = softmax_cross_entropy(logits, labels, smoothing=smoothing)
  right = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
  return {"cross_entropy": mean_term(loss), "accuracy": mean_term(right)}
