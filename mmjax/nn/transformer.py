"""Transformer blocks, with and without a memory, and stacks under one scan."""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import config, sharding
from mmjax.nn import linear
from mmjax.nn.attention import Attention
from mmjax.nn.cache import Cache, CrossCache
from mmjax.nn.mask import Mask
from mmjax.nn.norm import LayerNorm
from mmjax.nn.partitioning import Initializer
from mmjax.nn.rope import Rotation

# What the backward pass recomputes: nothing; everything inside a block; or all
# but the results of matrix products with parameters.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class BlockInit:
  """The initializers of one block; the defaults are ViT's."""

  qkv: Initializer = linear.XAVIER
  qkv_bias: Initializer | None = linear.ZEROS
  out: Initializer = linear.XAVIER
  up: Initializer = linear.XAVIER
  down: Initializer = linear.XAVIER
  mlp_bias: Initializer | None = linear.normal(1e-6)
  # Which of the three have `qkv_bias`: a bias of keys changes nothing.
  biased: tuple[str, ...] = ("query", "key", "value")
  # Of a key and a value that all queries see besides; None for none.
  extra: Initializer | None = None
  # Of low-rank updates of all kernels (`linear.Linear`); 0 for none.
  rank: int = 0


class Mlp(nn.Module):
  """Two projections with an activation between them.

  Attributes:
    hidden: width between the projections.
    activation: name in `linear.ACTIVATIONS`.
    inits: initializers.
    dropout: rate after the activation and after the second projection.
    dtype: of the computation.
  """

  hidden: int
  activation: str
  inits: BlockInit
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, L, D] to [B, L, D]."""
    y = linear.Linear(
        self.hidden,
        linear.EMBED_TO_MLP,
        self.inits.up,
        self.inits.mlp_bias,
        self.dtype,
        self.inits.rank,
        name="up",
    )(x)
    y = sharding.constrain(y, "batch", "length", "mlp")
    # Recomputed backward: its input is kept already, its parts need not be.
    activation = linear.ACTIVATIONS[self.activation]
    y = jax.checkpoint(activation, prevent_cse=False)(y)
    y = dropout(self, y, self.dropout)
    y = linear.Linear(
        x.shape[-1],
        linear.MLP_TO_EMBED,
        self.inits.down,
        self.inits.mlp_bias,
        self.dtype,
        self.inits.rank,
        name="down",
    )(y)
    return dropout(self, y, self.dropout)


class GatedMlp(nn.Module):
  """Two projections, one of which gates the other, and one back.

  down(activation(gate(x)) * up(x)), the GLU variants of Shazeer (2020).

  Attributes:
    hidden: width between the projections.
    activation: name in `linear.ACTIVATIONS`; "silu" makes SwiGLU.
    inits: initializers; `up` is that of the gate too.
    dtype: of the computation.
  """

  hidden: int
  activation: str
  inits: BlockInit
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, L, D] to [B, L, D]."""

    def project(name: str) -> jax.Array:
      y = linear.Linear(
          self.hidden,
          linear.EMBED_TO_MLP,
          self.inits.up,
          self.inits.mlp_bias,
          self.dtype,
          name=name,
      )(x)
      return sharding.constrain(y, "batch", "length", "mlp")

    activation = linear.ACTIVATIONS[self.activation]
    # Recomputed backward: its inputs are kept already, its parts need not be.
    gated = jax.checkpoint(lambda g, y: activation(g) * y, prevent_cse=False)
    return linear.Linear(
        x.shape[-1],
        linear.MLP_TO_EMBED,
        self.inits.down,
        self.inits.mlp_bias,
        self.dtype,
        name="down",
    )(gated(project("gate"), project("up")))


class Block(nn.Module):
  """A pre-norm transformer block (ViT, equations 2 and 3).

  Attributes:
    heads: attention heads.
    mlp: hidden width of the MLP.
    activation: name in `linear.ACTIVATIONS`.
    epsilon: of the layer norms.
    inits: initializers.
    dropout: rate, active where the caller gives a `dropout` rng.
    dtype: of the computation; the residual stream has it too.
  """

  heads: int
  mlp: int
  activation: str
  epsilon: float
  inits: BlockInit = BlockInit()
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
      self, x: jax.Array, mask: Mask, skip: jax.Array | float = 0.0
  ) -> tuple[jax.Array, None]:
    """Maps [B, L, D] to [B, L, D]; the None is what `nn.scan` stacks.

    Args:
      x: [B, L, D].
      mask: of L queries and L keys, or one more with `inits.extra`.
      skip: rate at which a row leaves out either half, see `drop_path`.
    """
    x = sharding.constrain(x, "batch", "length", None)
    y = LayerNorm(self.epsilon, self.dtype, name="attention_norm")(x)
    y = Attention(
        self.heads,
        self.inits.qkv,
        self.inits.out,
        self.inits.qkv_bias,
        self.dtype,
        self.inits.biased,
        self.inits.extra,
        self.inits.rank,
        name="attention",
    )(y, mask)
    x = x + drop_path(self, dropout(self, y, self.dropout), skip)
    y = LayerNorm(self.epsilon, self.dtype, name="mlp_norm")(x)
    y = Mlp(
        self.mlp,
        self.activation,
        self.inits,
        self.dropout,
        self.dtype,
        name="mlp",
    )(y)
    return x + drop_path(self, y, skip), None


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
  inits: BlockInit = BlockInit()
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
    x += Attention(
        self.heads,
        self.inits.qkv,
        self.inits.out,
        dtype=self.dtype,
        name="cross",
    )(y, seen_mask, seen)
    y = LayerNorm(self.epsilon, self.dtype, name="mlp_norm")(x)
    y = Mlp(
        self.mlp, self.activation, self.inits, dtype=self.dtype, name="mlp"
    )(y)
    return x + y, None


# Where the norms of a `CachedBlock` stand: before its two halves, or after the
# sums (the original transformer; OPT-350m).
ORDERS = ("pre", "post")


class CachedBlock(nn.Module):
  """A transformer block with a memory, of parts that its model chooses.

  Attributes:
    attention: makes the attention, see `attention.CachedAttention`.
    mlp: makes the MLP.
    norm: makes each of the two norms.
    order: one of `ORDERS`.
  """

  attention: Callable[..., nn.Module]
  mlp: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]
  order: str = "pre"

  @nn.compact
  def __call__(
      self,
      carry: tuple[jax.Array, Cache | None],
      layer: jax.Array | int,
      mask: Mask,
      rotation: Rotation | None = None,
      bias: jax.Array | None = None,
  ) -> tuple[tuple[jax.Array, Cache | None], None]:
    """One layer, in the form that `nn.scan` wants.

    Args:
      carry: [B, T, D] and the cache of all layers, None for none.
      layer: i32[], the number of this layer.
      mask: see `CachedAttention`.
      rotation: likewise.
      bias: likewise.

    Returns:
      The new carry, and the None that `nn.scan` stacks.
    """
    x, cache = carry
    x = sharding.constrain(x, "batch", "length", None)
    pre = self.order == "pre"
    norm = self.norm(name="attention_norm")
    y, cache = self.attention(name="attention")(
        norm(x) if pre else x, mask, rotation, cache, layer, bias
    )
    x = x + y if pre else norm(x + y)
    norm = self.norm(name="mlp_norm")
    y = self.mlp(name="mlp")(norm(x) if pre else x)
    x = x + y if pre else norm(x + y)
    return (x, cache), None


class CachedCrossBlock(nn.Module):
  """A pre-norm block with a memory that also looks at another sequence.

  Attributes:
    attention: makes the self-attention, see `attention.CachedAttention`.
    cross: makes the other one, see `attention.CachedCrossAttention`.
    mlp: makes the MLP.
    norm: makes each of the three norms.
  """

  attention: Callable[..., nn.Module]
  cross: Callable[..., nn.Module]
  mlp: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(
      self,
      carry: tuple[jax.Array, CrossCache | None],
      layer: jax.Array | int,
      mask: Mask,
      seen_mask: Mask,
      seen: jax.Array | None = None,
      bias: jax.Array | None = None,
  ) -> tuple[tuple[jax.Array, CrossCache | None], None]:
    """One layer, in the form that `nn.scan` wants.

    Args:
      carry: [B, T, D] and the cache of all layers, None for none.
      layer: i32[], the number of this layer.
      mask: of the self-attention.
      seen_mask: of the other one.
      seen: [B, K, C], the other sequence; None where the cache has it already.
      bias: on the scores of the self-attention.

    Returns:
      The new carry, and the None that `nn.scan` stacks.
    """
    x, cache = carry
    own, other = (None, None) if cache is None else (cache.own, cache.seen)
    x = sharding.constrain(x, "batch", "length", None)
    y, own = self.attention(name="attention")(
        self.norm(name="attention_norm")(x), mask, None, own, layer, bias
    )
    x = x + y
    y, other = self.cross(name="cross")(
        self.norm(name="cross_norm")(x), seen_mask, seen, other, layer
    )
    x = x + y
    x = x + self.mlp(name="mlp")(self.norm(name="mlp_norm")(x))
    return (x, None if cache is None else CrossCache(own, other)), None


def dropout(module: nn.Module, x: jax.Array, rate: float) -> jax.Array:
  """Dropout that is active exactly where the caller gave a `dropout` rng."""
  if rate == 0.0 or not module.has_rng("dropout"):
    return x
  keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0.0).astype(x.dtype)


def drop_path(
    module: nn.Module, x: jax.Array, rate: jax.Array | float
) -> jax.Array:
  """Stochastic depth (Huang et al. 2016), under the rule of `dropout`.

  Args:
    module: whose rng decides.
    x: [B, L, D], what a block adds to its input.
    rate: at which whole rows add nothing; the others add so much more.
  """
  if isinstance(rate, float) and not rate or not module.has_rng("dropout"):
    return x
  keep = jax.random.bernoulli(
      module.make_rng("dropout"), 1 - rate, (len(x), 1, 1)
  )
  return jnp.where(keep, x / (1 - rate), 0.0).astype(x.dtype)


def stacked(
    block: type[nn.Module],
    depth: int,
    remat: str,
    in_axes: Any = nn.broadcast,
) -> Any:
  """A block class whose parameters are stacked `[depth, ...]` and scanned.

  One scanned body compiles several times faster than `depth` copies of it.

  Args:
    block: a module class called as `block(x, *rest) -> (x, None)`.
    depth: number of blocks.
    remat: name in `REMAT`.
    in_axes: along which axis each of `rest` is scanned; `nn.broadcast` gives
      it whole to every block.

  Returns:
    The class to instantiate with the block's attributes.
  """
  policy = config.pick(REMAT, remat, "remat")
  if policy is not None:
    block = nn.remat(block, policy=policy, prevent_cse=False)
  return nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=in_axes,
      length=depth,
      metadata_params={nn.PARTITION_NAME: "layers"},
  )
