"""Normalisation layers; statistics are always taken in float32."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.nn.partitioning import declared, param


class LayerNorm(nn.Module):
  """Layer normalisation over the last dimension (Ba et al. 2016).

  Attributes:
    epsilon: added to the variance. It differs between papers (1e-5 CLIP, 1e-6
      ViT, 1e-12 BERT and Hugging Face's ViT), so there is no default.
    dtype: of the result.
  """

  epsilon: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D] to [..., D]."""
    shape = x.shape[-1:]
    scale = param(
        self,
        "scale",
        declared(nn.initializers.ones, "embed"),
        shape,
        jnp.float32,
    )
    bias = param(
        self,
        "bias",
        declared(nn.initializers.zeros, "embed"),
        shape,
        jnp.float32,
    )
    # Recomputed backward: cheaper than to write and read what it would keep.
    normalize = jax.checkpoint(_layer_norm, prevent_cse=False)
    return normalize(x, scale, bias, self.epsilon).astype(self.dtype)


def _layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
  x = x.astype(jnp.float32)
  centred = x - x.mean(axis=-1, keepdims=True)
  variance = jnp.square(centred).mean(axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + epsilon) * scale + bias


class RMSNorm(nn.Module):
  """Division by the root mean square (Zhang and Sennrich 2019).

  Scaled in float32 and rounded once, so an epsilon of 1e-8 (Helium) has its
  effect in bfloat16 too.

  Attributes:
    epsilon: added to the mean square: 1e-5 or 1e-6 in LLaMA and Qwen, 1e-8 in
      Helium, so there is no default.
    dtype: of the result.
  """

  epsilon: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D] to [..., D]."""
    scale = param(
        self,
        "scale",
        declared(nn.initializers.ones, "embed"),
        x.shape[-1:],
        jnp.float32,
    )
    normalize = jax.checkpoint(_rms_norm, prevent_cse=False)
    return normalize(x, scale, self.epsilon).astype(self.dtype)


def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  x = x.astype(jnp.float32)
  square = jnp.square(x).mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(square + epsilon) * scale


def normalize(x: jax.Array) -> jax.Array:
  """Scales the rows of [..., E] to unit length, in float32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(
      jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-12)
  )
