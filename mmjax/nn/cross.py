"""How does one sequence read another that stays as it is? Cross-attention.

Keys and values of what is read are made once (`read`) and used for as many
queries as come. `GatedCrossBlock` adds what it reads through a gate that is
shut at first, so that a trained model around it begins as it was.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import sharding
from mmjax.nn import linear
from mmjax.nn.attention import dot_product_attention
from mmjax.nn.mask import Mask
from mmjax.nn.partitioning import Initializer, declared, param


class Seen(NamedTuple):
  """Keys and values of another sequence.

  Attributes:
    k: [B, K, H, D].
    v: [B, K, H, D].
  """

  k: jax.Array
  v: jax.Array


class CrossAttention(nn.Module):
  """Queries of one sequence, keys and values of another; no biases.

  Attributes:
    heads: number of heads H.
    head_dim: width of a head; H of them need not make the width of the model.
    init: of all kernels.
    out_init: of the last one, if it has another.
    dtype: of the computation.
  """

  heads: int
  head_dim: int
  init: Initializer = linear.FAN_IN_UNIFORM
  out_init: Initializer | None = None
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Declares the projections into heads."""
    self.query, self.key, self.value = (
        linear.Linear(
            (self.heads, self.head_dim),
            linear.EMBED_TO_HEADS,
            self.init,
            None,
            self.dtype,
        )
        for _ in range(3)
    )

  def read(self, other: jax.Array) -> Seen:
    """The keys and values of [B, K, C]."""
    split = lambda x: sharding.constrain(x, "batch", None, "heads", None)
    return Seen(split(self.key(other)), split(self.value(other)))

  @nn.compact
  def __call__(
      self, x: jax.Array, mask: Mask, other: jax.Array | Seen
  ) -> jax.Array:
    """Maps [B, Q, D] to [B, Q, D].

    Args:
      x: gives the queries.
      mask: of Q queries and K keys; a query that sees none yields zeros.
      other: what is read, [B, K, C], or what `read` made of it.
    """
    seen = other if isinstance(other, Seen) else self.read(other)
    q = sharding.constrain(
        self.query(x), "batch", "length", "heads", None
    )
    y = dot_product_attention(
        q, seen.k, seen.v, mask, scale=self.head_dim**-0.5
    )
    return linear.Linear(
        x.shape[-1],
        linear.HEADS_TO_EMBED,
        self.out_init or self.init,
        None,
        self.dtype,
        name="out",
    )(y)


class GatedCrossBlock(nn.Module):
  """What is read, then an MLP, each behind a gate (Flamingo, figure 4).

    x += tanh(a) * attention(norm(x)); x += tanh(b) * mlp(norm(x))

  The gates a and b are scalars that start at `gate`, 0 in the paper.

  Attributes:
    attention: makes the `CrossAttention`.
    mlp: makes the MLP.
    norm: makes each of the two norms.
    gate: where the gates start.
  """

  attention: Callable[..., nn.Module]
  mlp: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]
  gate: float = 0.0

  @nn.compact
  def __call__(
      self, x: jax.Array, mask: Mask, other: jax.Array | Seen
  ) -> tuple[jax.Array, None]:
    """Maps [B, Q, D] to [B, Q, D]; the None is what `nn.scan` stacks.

    Args:
      x: the text.
      mask: see `CrossAttention`, as `other`.
      other: what is read.
    """

    def gated(name: str, y: jax.Array) -> jax.Array:
      gate = param(
          self,
          f"{name}_gate",
          declared(nn.initializers.constant(self.gate)),
          (),
          jnp.float32,
      )
      return jnp.tanh(gate).astype(y.dtype) * y

    x = sharding.constrain(x, "batch", "length", None)
    y = self.norm(name="attention_norm")(x)
    x += gated("attention", self.attention(name="attention")(y, mask, other))
    y = self.norm(name="mlp_norm")(x)
    return x + gated("mlp", self.mlp(name="mlp")(y)), None
