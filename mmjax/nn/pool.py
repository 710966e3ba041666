"""How does a row of tokens become one vector? Pooling that learns to look."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.nn import linear, transformer
from mmjax.nn.attention import Attention
from mmjax.nn.mask import Mask
from mmjax.nn.norm import LayerNorm
from mmjax.nn.partitioning import declared, param


def _probe_init(rng: jax.Array, shape: Any, dtype: Any) -> jax.Array:
  return linear.XAVIER(rng, (1, *shape), dtype)[0]


class AttentionPool(nn.Module):
  """One learned query that attends to all tokens, and an MLP on its answer.

  The MAP head of "Scaling vision transformers" (Zhai et al. 2022, section 3.2)
  with the residual MLP of SigLIP's code: the attention itself has neither
  residual nor norm.

  Attributes:
    heads: attention heads.
    mlp: hidden width of the MLP.
    activation: of the MLP, a name in `linear.ACTIVATIONS`.
    epsilon: of the layer norm.
    inits: initializers of attention and MLP.
    dtype: of the computation.
  """

  heads: int
  mlp: int
  activation: str
  epsilon: float
  inits: transformer.BlockInit = transformer.BlockInit()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: Mask) -> jax.Array:
    """Maps [B, K, D] to [B, D].

    Args:
      x: [B, K, D].
      mask: of one query and K keys.
    """
    width = x.shape[-1]
    probe = param(
        self,
        "probe",
        declared(_probe_init, "embed"),
        (width,),
        jnp.float32,
    )
    query = jnp.broadcast_to(probe.astype(self.dtype), (len(x), 1, width))
    y = Attention(
        self.heads,
        self.inits.qkv,
        self.inits.out,
        dtype=self.dtype,
        name="attention",
    )(query, mask, x)
    z = LayerNorm(self.epsilon, self.dtype, name="norm")(y)
    y += transformer.Mlp(
        self.mlp, self.activation, self.inits, dtype=self.dtype, name="mlp"
    )(z)
    return y[:, 0]
