"""How surprised is a language model? Next-token cross-entropy, in chunks."""

from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp

from mmjax.objectives.classification import softmax_cross_entropy
from mmjax.objectives.term import Term


def next_token(
    logits: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    tokens: jax.Array,
    weight: jax.Array,
    *,
    chunks: int = 1,
    smoothing: float = 0.0,
) -> dict[str, Term]:
  """Cross-entropy of each token given those before it.

  With `chunks` the sequence is cut, and each part's logits are made, used and,
  backward, made anew: only [B, L / chunks, V] of them are held at a time.

  Args:
    logits: [B, l, D] -> f32[B, l, V], for any length l.
    hidden: [B, L, D], what the model knows after each token.
    tokens: i32[B, L].
    weight: f32[B, L], how much predicting token i from those before counts;
      that of the first token is not looked at.
    chunks: how many parts.
    smoothing: of the labels, see `softmax_cross_entropy`.

  Returns:
    `next_token` (nats) and `accuracy`, both per unit of weight.
  """
  loss, right, weight = _by_row(
      logits, hidden, tokens, weight, chunks, smoothing
  )
  total = weight.sum()
  return {
      "next_token": Term(loss.sum(), total),
      "accuracy": Term(right.sum(), total),
  }


def next_token_by_kind(
    logits: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    tokens: jax.Array,
    weight: jax.Array,
    kind: jax.Array,
    names: Sequence[str],
    *,
    chunks: int = 1,
) -> dict[str, Term]:
  """As `next_token`, with terms of its own for each data set of a mixture.

  Args:
    logits: see `next_token`, as the others.
    hidden: [B, L, D].
    tokens: i32[B, L].
    weight: f32[B, L].
    kind: i32[B], the data set that a row is from.
    names: of the data sets 0, 1, ...
    chunks: how many parts.

  Returns:
    `next_token_<name>` and `accuracy_<name>` of each data set, per unit of
    its own weight.
  """
  chex.assert_shape(kind, tokens.shape[:1])
  rows = _by_row(logits, hidden, tokens, weight, chunks, 0.0)
  terms = {}
  for number, name in enumerate(names):
    loss, right, total = (jnp.where(kind == number, x, 0).sum() for x in rows)
    terms[f"next_token_{name}"] = Term(loss, total)
    terms[f"accuracy_{name}"] = Term(right, total)
  return terms


def _by_row(
    logits: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    tokens: jax.Array,
    weight: jax.Array,
    chunks: int,
    smoothing: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sums of loss, right guesses and weight of each row, all f32[B]."""
  chex.assert_equal_shape([tokens, weight])
  chex.assert_equal_shape_prefix([hidden, tokens], 2)
  labels = jnp.roll(tokens, -1, axis=1)
  weight = jnp.roll(weight, -1, axis=1).astype(jnp.float32).at[:, -1].set(0)

  def part(operands: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    hidden, labels, weight = operands
    found = logits(hidden)
    loss = softmax_cross_entropy(found, labels, smoothing=smoothing)
    right = found.argmax(axis=-1) == labels
    return (weight * loss).sum(axis=1), (weight * right).sum(axis=1)

  operands = hidden, labels, weight
  if chunks == 1:
    loss, right = part(operands)
  else:
    split = lambda x: _split(x, chunks)
    sums = jax.lax.map(jax.checkpoint(part), jax.tree.map(split, operands))
    loss, right = (x.sum(axis=0) for x in sums)
  return loss, right, weight.sum(axis=1)


def _split(x: jax.Array, chunks: int) -> jax.Array:
  """[B, L, ...] to [chunks, B, L / chunks, ...], zeros at the end."""
  rest = ((0, 0),) * (x.ndim - 2)
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunks), *rest))
  x = x.reshape(x.shape[0], chunks, -1, *x.shape[2:])
  return x.swapaxes(0, 1)
