"""The Querying Transformer of BLIP-2: a few vectors that ask about a picture.

BLIP-2 (Li et al. 2023), section 3.1. A BERT whose rows are learned queries and
a text: both go through the same self-attention, and who sees whom is up to the
mask. Queries look at the picture in every second layer; each kind has MLPs of
its own.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import sharding
from mmjax.nn import linear, norm, position, transformer
from mmjax.nn import mask as masks
from mmjax.nn.attention import Attention
from mmjax.nn.mask import LAST, Mask
from mmjax.nn.partitioning import declared, param

# A pair of sequences: queries [B, Q, D] and text [B, T, D].
Rows = tuple[jax.Array, jax.Array]


def separate_and_written(queries: int, length: int, valid: jax.Array) -> Mask:
  """Two of the masks of figure 2 at once, so that queries are computed once.

  Of rows in this order: queries, which see each other; a text to compare, which
  sees itself alone (uni-modal); the same text to write, of which a token sees
  the queries and what was written before (multi-modal causal).

  Args:
    queries: Q.
    length: T, of each of the two texts.
    valid: bool[B, T], false for padding.

  Returns:
    A mask of Q + 2 * T tokens.
  """
  block = np.repeat([1, 0], [queries, length])
  block = np.concatenate([block, 2 + np.arange(length)])
  mask = masks.blocks(block, back=np.where(block == 0, 0, LAST))
  seen = jnp.ones((len(valid), queries), bool)
  return masks.padded(mask, jnp.concatenate([seen, valid, valid], axis=1))


def together(queries: int, valid: jax.Array) -> Mask:
  """Queries and text see each other: image-text matching, and questions.

  Args:
    queries: Q; 0 for a text alone.
    valid: bool[B, T], false for padding.
  """
  seen = jnp.ones((len(valid), queries), bool)
  mask = masks.full(queries + valid.shape[1])
  return masks.padded(mask, jnp.concatenate([seen, valid], axis=1))


class Layer(nn.Module):
  """A post-norm block of BERT, with a look at the picture for its queries.

  Attributes: as of `QFormer`.
  """

  heads: int
  mlp: int
  activation: str
  epsilon: float
  std: float
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
      self, rows: Rows, mask: Mask, seen: jax.Array | None
  ) -> Rows:
    """Maps queries [B, Q, D] and text [B, T, D], either of which may be none.

    Args:
      rows: queries and text.
      mask: of the Q + T of them.
      seen: [B, K, C], the picture; None for a layer that does not look.
    """
    init = linear.normal(self.std)
    attention = functools.partial(
        Attention, self.heads, init, init, dtype=self.dtype
    )
    inits = transformer.BlockInit(up=init, down=init, mlp_bias=linear.ZEROS)
    mlp = functools.partial(
        transformer.Mlp, self.mlp, self.activation, inits, dtype=self.dtype
    )

    def added(x: jax.Array, y: jax.Array, name: str) -> jax.Array:
      y = transformer.dropout(self, y, self.dropout)
      return norm.LayerNorm(self.epsilon, self.dtype, name=name)(x + y)

    count = rows[0].shape[1]
    x = jnp.concatenate(rows, axis=1)
    x = sharding.constrain(x, "batch", "length", None)
    x = added(x, attention(name="attention")(x, mask), "attention_norm")
    queries, text = x[:, :count], x[:, count:]
    if count and seen is not None:
      look = masks.full(count, seen.shape[1])
      y = attention(name="cross")(queries, look, seen)
      queries = added(queries, y, "cross_norm")
    if count:
      y = mlp(name="query_mlp")(queries)
      queries = added(queries, y, "query_mlp_norm")
    if text.shape[1]:
      text = added(text, mlp(name="text_mlp")(text), "text_mlp_norm")
    return queries, text


class Period(nn.Module):
  """So many layers that one of them, the first, looks at the picture.

  Attributes:
    every: number of layers.
    layer: makes one.
  """

  every: int
  layer: Any

  @nn.compact
  def __call__(
      self, rows: Rows, mask: Mask, seen: jax.Array | None
  ) -> tuple[Rows, None]:
    """As `Layer`; the None is what `nn.scan` stacks."""
    for number in range(self.every):
      layer = self.layer(name=f"layer_{number}")
      rows = layer(rows, mask, None if number else seen)
    return rows, None


class QFormer(nn.Module):
  """Queries, and a text if one is given. The defaults are those of the paper.

  What is never called has no parameters: the text's parts are gone in stage 2.

  Attributes:
    queries: number of learned queries Q.
    width: D.
    depth: number of layers, a multiple of `every`.
    heads: attention heads.
    mlp: hidden width of the MLPs.
    every: of so many layers one looks at the picture.
    vocab: number of token ids V, the last of which, [DEC], begins a text that
      is written.
    length: positions of a text.
    activation: name in `linear.ACTIVATIONS`.
    epsilon: of the layer norms.
    std: of all matrices at their initialisation.
    dropout: rate, active where the caller gives a `dropout` rng. Attention
      probabilities are never dropped.
    remat: name in `transformer.REMAT`.
    dtype: of the computation.
  """

  queries: int = 32
  width: int = 768
  depth: int = 12
  heads: int = 12
  mlp: int = 3072
  every: int = 2
  vocab: int = 30_523
  length: int = 512
  activation: str = "gelu"
  epsilon: float = 1e-12
  std: float = 0.02
  dropout: float = 0.0
  remat: str = "none"
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Builds the parts."""
    if self.depth % self.every:
      raise ValueError(
          f"depth={self.depth} is no multiple of every={self.every}: expected "
          "as many layers behind each look at the picture"
      )
    init = linear.normal(self.std)
    self.query = param(
        self,
        "query",
        declared(init, None, "embed"),
        (self.queries, self.width),
        jnp.float32,
    )
    self.embed = linear.Embed(self.vocab, self.width, init, self.dtype)
    self.position = position.LearnedPositions(
        self.length, offset=0, std=self.std
    )
    self.norm = norm.LayerNorm(self.epsilon, self.dtype)
    self.blocks = transformer.stacked(
        Period, self.depth // self.every, self.remat
    )(
        every=self.every,
        layer=functools.partial(
            Layer,
            self.heads,
            self.mlp,
            self.activation,
            self.epsilon,
            self.std,
            self.dropout,
            self.dtype,
        ),
    )
    self.transform = linear.Linear(
        self.width, ("embed", None), init, dtype=self.dtype
    )
    self.transform_norm = norm.LayerNorm(self.epsilon, self.dtype)
    self.bias = Bias(self.vocab)

  def __call__(
      self,
      seen: jax.Array | None,
      tokens: jax.Array | None = None,
      mask: Mask | None = None,
      texts: int = 1,
  ) -> Rows:
    """What queries and text know in the end.

    Args:
      seen: [B, K, C], a picture for the queries to look at; None for a text
        without queries.
      tokens: i32[B, T], the text or texts; None for queries alone.
      mask: of queries and text, in this order; all see all by default.
      texts: of so many texts of one length T consists.

    Returns:
      Queries [B, Q, D] and text [B, T, D]; Q or T is 0 for what is not given.

    Raises:
      ValueError: for a text of more tokens than there are positions.
    """
    batch = len(tokens if seen is None else seen)
    none = jnp.zeros((batch, 0, self.width), self.dtype)
    queries = text = none
    if seen is not None:
      shape = (batch, *self.query.shape)
      queries = jnp.broadcast_to(self.query.astype(self.dtype), shape)
    if tokens is not None:
      length = tokens.shape[1] // texts
      if length > self.length:
        raise ValueError(
            f"text of {length} tokens: the Q-Former has {self.length} positions"
        )
      places = jnp.tile(jnp.arange(length), texts)[None]
      text = self.embed(tokens)
      text += self.position(places, self.width).astype(self.dtype)
    count = queries.shape[1]
    x = self.norm(jnp.concatenate([queries, text], axis=1))
    x = transformer.dropout(self, x, self.dropout)
    if mask is None:
      mask = masks.full(x.shape[1])
    rows, _ = self.blocks((x[:, :count], x[:, count:]), mask, seen)
    return rows

  def logits(self, text: jax.Array) -> jax.Array:
    """The scores f32[B, T, V] of the tokens after [B, T, D]: BERT's head."""
    x = linear.ACTIVATIONS[self.activation](self.transform(text))
    return self.bias(self.embed.logits(self.transform_norm(x)))


class Bias(nn.Module):
  """A number that is added to the score of each of V tokens."""

  vocab: int

  @nn.compact
  def __call__(self, scores: jax.Array) -> jax.Array:
    """Maps f32[..., V] to f32[..., V]."""
    bias = param(
        self,
        "bias",
        declared(linear.ZEROS, "vocab"),
        (self.vocab,),
        jnp.float32,
    )
    return scores + bias
