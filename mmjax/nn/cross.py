"""What of one sequence matters to another? Attention across, and its block."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import sharding
from mmjax.nn import linear, transformer
from mmjax.nn.attention import Attention, dot_product_attention
from mmjax.nn.mask import Mask
from mmjax.nn.norm import LayerNorm
from mmjax.nn.partitioning import Initializer


class CrossAttention(nn.Module):
  """Queries of one sequence, keys and values of another (Vaswani et al. 2017).

  Attributes:
    heads: number of heads; they share the width of the queries evenly.
    qkv_init: of the query, key and value kernels.
    out_init: of the output kernel.
    dtype: of the computation.
  """

  heads: int
  qkv_init: Initializer = linear.XAVIER
  out_init: Initializer = linear.XAVIER
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, seen: jax.Array, mask: Mask) -> jax.Array:
    """Reads what is seen, [B, K, C], for each row of x, [B, Q, D].

    Args:
      x: [B, Q, D].
      seen: [B, K, C].
      mask: of Q queries and K keys.

    Returns:
      [B, Q, D].

    Raises:
      ValueError: if the heads do not divide the width.
    """
    width = x.shape[-1]
    if width % self.heads:
      raise ValueError(f"width {width} is not divisible by {self.heads} heads")
    head_dim = width // self.heads

    def project(name: str, source: jax.Array) -> jax.Array:
      y = linear.Linear(
          (self.heads, head_dim),
          linear.EMBED_TO_HEADS,
          self.qkv_init,
          dtype=self.dtype,
          name=name,
      )(source)
      return sharding.constrain(y, "batch", "length", "heads", None)

    q = project("query", x)
    k, v = project("key", seen), project("value", seen)
    y = dot_product_attention(q, k, v, mask, scale=head_dim**-0.5)
    return linear.Linear(
        width,
        linear.HEADS_TO_EMBED,
        self.out_init,
        dtype=self.dtype,
        name="out",
    )(y)


class CrossBlock(nn.Module):
  """A pre-norm block that also looks at another sequence.

  The decoder layer of Vaswani et al. 2017 (section 3.1), with norms before its
  parts.

  Attributes:
    heads: attention heads, of both attentions.
    mlp: hidden width of the MLP.
    activation: name in `linear.ACTIVATIONS`.
    epsilon: of the layer norms.
    inits: initializers.
    dtype: of the computation; the residual stream has it too.
  """

  heads: int
  mlp: int
  activation: str
  epsilon: float
  inits: transformer.BlockInit = transformer.BlockInit()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
      self, x: jax.Array, mask: Mask, seen: jax.Array, seen_mask: Mask
  ) -> tuple[jax.Array, None]:
    """Maps [B, L, D] to [B, L, D]; the None is what `nn.scan` stacks.

    Args:
      x: [B, L, D].
      mask: of L queries and L keys.
      seen: [B, K, C], the other sequence.
      seen_mask: of L queries and K keys.
    """
    x = sharding.constrain(x, "batch", "length", None)
    y = LayerNorm(self.epsilon, self.dtype, name="attention_norm")(x)
    x += Attention(
        self.heads,
        self.inits.qkv,
        self.inits.out,
        dtype=self.dtype,
        name="attention",
    )(y, mask)
    y = LayerNorm(self.epsilon, self.dtype, name="cross_norm")(x)
    x += CrossAttention(
        self.heads,
        self.inits.qkv,
        self.inits.out,
        dtype=self.dtype,
        name="cross",
    )(y, seen, seen_mask)
    y = LayerNorm(self.epsilon, self.dtype, name="mlp_norm")(x)
    y = transformer.Mlp(
        self.mlp, self.activation, self.inits, dtype=self.dtype, name="mlp"
    )(y)
    return x + y, None
