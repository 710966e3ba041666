"""How do any number of features become a few? The Perceiver resampler.

Learned latents look at the features of a picture, or of all frames of a video,
layer by layer (Alayrac et al. 2022, section 2.1, figure 5, after Jaegle et al.
2021). What comes out has a fixed length.
"""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import sharding
from mmjax.nn import linear, transformer
from mmjax.nn import mask as masks
from mmjax.nn.cross import CrossAttention
from mmjax.nn.norm import LayerNorm
from mmjax.nn.partitioning import declared, param

# Projections without biases, drawn as PyTorch does.
INIT = transformer.BlockInit(
    up=linear.FAN_IN_UNIFORM, down=linear.FAN_IN_UNIFORM, mlp_bias=None
)


class ResamplerBlock(nn.Module):
  """Latents that look at the features and at themselves, and an MLP.

  Attributes: see `Resampler`.
  """

  heads: int
  head_dim: int
  mlp: int
  activation: str
  epsilon: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
      self, x: jax.Array, features: jax.Array
  ) -> tuple[jax.Array, None]:
    """Maps latents [B, R, D] to [B, R, D], given features [B, K, D]."""
    x = sharding.constrain(x, "batch", None, None)
    norm = lambda name: LayerNorm(self.epsilon, self.dtype, name=name)
    y = norm("attention_norm")(x)
    # Without self-attention: the latents stand among the keys.
    other = jnp.concatenate([norm("features_norm")(features), y], axis=1)
    x += CrossAttention(
        self.heads, self.head_dim, dtype=self.dtype, name="attention"
    )(y, masks.full(y.shape[1], other.shape[1]), other)
    x += transformer.Mlp(
        self.mlp, self.activation, INIT, dtype=self.dtype, name="mlp"
    )(norm("mlp_norm")(x))
    return x, None


class Resampler(nn.Module):
  """Latents that read the features of pictures and videos.

  Attributes:
    latents: number R of vectors that come out.
    depth: number of layers.
    heads: attention heads.
    head_dim: their width.
    mlp: hidden width of the MLPs.
    activation: of the MLPs, a name in `linear.ACTIVATIONS`: "relu2" in the
      paper, "gelu" in OpenFlamingo.
    epsilon: of the layer norms.
    frames: learned times of frames; None for none. A video of more frames is
      given times between them (appendix A.1.1).
    media: learned places of media in their sequence; None for none.
    spread: standard deviation of the latents, times and places at first. At
      OpenFlamingo's 1, a shallow resampler says at first more of its latents
      than of what they read.
    remat: name in `transformer.REMAT`.
    dtype: of the computation.
  """

  latents: int
  depth: int
  heads: int
  head_dim: int
  mlp: int
  activation: str = "relu2"
  epsilon: float = 1e-5
  frames: int | None = None
  media: int | None = None
  spread: float = 1.0
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps [B, N, T, S, D] to [B, N, R, D].

    Args:
      features: S vectors of each of T frames of N media; a picture has one
        frame.

    Raises:
      ValueError: for more media than there are places.
    """
    chex.assert_rank(features, 5)
    batch, count, time, spots, width = features.shape
    table = lambda name, length: param(
        self,
        name,
        declared(linear.normal(self.spread), None, "embed"),
        (length, width),
        jnp.float32,
    ).astype(self.dtype)
    x = features.astype(self.dtype)
    if self.frames is not None:
      times = _at_times(table("frames", self.frames), time)
      x += times[:, None]
    if self.media is not None:
      if count > self.media:
        raise ValueError(
            f"{count} media: the resampler has places for {self.media}"
        )
      x += table("media", self.media)[:count, None, None]
    x = x.reshape(batch * count, time * spots, width)
    latents = jnp.broadcast_to(
        table("latents", self.latents), (len(x), self.latents, width)
    )
    blocks = transformer.stacked(ResamplerBlock, self.depth, self.remat)
    latents, _ = blocks(
        heads=self.heads,
        head_dim=self.head_dim,
        mlp=self.mlp,
        activation=self.activation,
        epsilon=self.epsilon,
        dtype=self.dtype,
        name="blocks",
    )(latents, x)
    latents = LayerNorm(self.epsilon, self.dtype, name="norm")(latents)
    return latents.reshape(batch, count, self.latents, width)


def _at_times(table: jax.Array, count: int) -> jax.Array:
  """`count` rows of [F, D]: the first ones, or as many between the ends."""
  length = len(table)
  if count <= length:
    return table[:count]
  place = jnp.linspace(0, length - 1, count)
  low = jnp.minimum(place.astype(jnp.int32), length - 2)
  part = (place - low)[:, None].astype(table.dtype)
  return (1 - part) * table[low] + part * table[low + 1]
