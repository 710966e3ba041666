"""The ends of a language model: tokens to vectors, vectors to scores."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import sharding
from mmjax.nn import linear
from mmjax.nn.partitioning import declared


class LearnedPositions(nn.Module):
  """A table of positions, of which the first rows belong to padding (OPT).

  Attributes:
    length: number of positions.
    offset: the row of position 0.
    std: of the table at its initialisation.
  """

  length: int
  offset: int = 2
  std: float = 0.02

  @nn.compact
  def __call__(self, position: jax.Array, features: int) -> jax.Array:
    """The rows f32[B or 1, L, features] of i32[B or 1, L]."""
    table = self.param(
        "table",
        declared(linear.normal(self.std), "position", "embed"),
        (self.length + self.offset, features),
        jnp.float32,
    )
    # Padding behind the end of the table is to be finite, whatever it is.
    return jnp.take(table, position + self.offset, axis=0, mode="clip")


class Vocabulary(nn.Module):
  """One vector per token id, to read it and, where tied, to write it.

  Attributes:
    size: number of rows V.
    features: their width E.
    std: of the table at its initialisation.
    dtype: of the computation.
  """

  size: int
  features: int
  std: float
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Declares the table."""
    self.embedding = self.param(
        "embedding",
        declared(linear.normal(self.std), "vocab", "embed"),
        (self.size, self.features),
        jnp.float32,
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps i32[B, L] to [B, L, E]."""
    return jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Maps [B, L, E] to f32[B, L, V]."""
    return _logits(hidden, self.embedding.T, self.dtype)


class Head(nn.Module):
  """Scores of all tokens, with a matrix of its own.

  Attributes:
    vocab: number of tokens V.
    std: of the matrix at its initialisation.
    dtype: of the factors; the scores are float32.
  """

  vocab: int
  std: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, hidden: jax.Array) -> jax.Array:
    """Maps [B, L, E] to f32[B, L, V]."""
    kernel = self.param(
        "kernel",
        declared(linear.normal(self.std), *linear.EMBED_TO_VOCAB),
        (hidden.shape[-1], self.vocab),
        jnp.float32,
    )
    return _logits(hidden, kernel, self.dtype)


def _logits(hidden: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
  found = jnp.matmul(
      hidden.astype(dtype),
      kernel.astype(dtype),
      preferred_element_type=jnp.float32,
  )
  return sharding.constrain(found, "batch", "length", "vocab")
