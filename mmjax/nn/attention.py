"""Multi-head attention under an interval mask."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import sharding
from mmjax.nn import linear
from mmjax.nn.mask import Mask
from mmjax.nn.partitioning import Initializer


def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, *, scale: float
) -> jax.Array:
  """Scaled dot-product attention, the softmax in float32.

  Args:
    q: [B, Q, H, D].
    k: [B, K, H, D].
    v: [B, K, H, D].
    mask: which keys a query sees; a query that sees none yields zeros.
    scale: factor on the dot products, usually D ** -0.5.

  Returns:
    [B, Q, H, D] in the dtype of `v`.
  """
  chex.assert_rank([q, k, v], 4)
  chex.assert_equal_shape([k, v])
  logits = jnp.einsum(
      "bqhd,bkhd->bhqk", q * scale, k, preferred_element_type=jnp.float32
  )
  if mask.pattern == "full":
    weights = jax.nn.softmax(logits)
  else:
    visible = mask.dense()[:, None]
    # The lowest finite number, not -inf: a row without a key stays finite, in
    # the gradient too, and is then set to zero.
    logits = jnp.where(visible, logits, jnp.finfo(logits.dtype).min)
    weights = jnp.where(visible, jax.nn.softmax(logits), 0.0)
  return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


class Attention(nn.Module):
  """Multi-head self-attention (Vaswani et al. 2017, section 3.2).

  Attributes:
    heads: number of heads; they share the width evenly.
    qkv_init: of the query, key and value kernels.
    out_init: of the output kernel.
    qkv_bias_init: of the query, key and value biases; None for no biases.
    dtype: of the computation.
  """

  heads: int
  qkv_init: Initializer = linear.XAVIER
  out_init: Initializer = linear.XAVIER
  qkv_bias_init: Initializer | None = linear.ZEROS
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: Mask) -> jax.Array:
    """Maps [B, L, D] to [B, L, D].

    Raises:
      ValueError: if the heads do not divide the width.
    """
    width = x.shape[-1]
    if width % self.heads:
      raise ValueError(f"width {width} is not divisible by {self.heads} heads")
    head_dim = width // self.heads

    def project(name: str) -> jax.Array:
      y = linear.Linear(
          (self.heads, head_dim),
          linear.EMBED_TO_HEADS,
          self.qkv_init,
          self.qkv_bias_init,
          self.dtype,
          name=name,
      )(x)
      return sharding.constrain(y, "batch", "length", "heads", None)

    q, k, v = project("query"), project("key"), project("value")
    y = dot_product_attention(q, k, v, mask, scale=head_dim**-0.5)
    return linear.Linear(
        width,
        linear.HEADS_TO_EMBED,
        self.out_init,
        dtype=self.dtype,
        name="out",
    )(y)
