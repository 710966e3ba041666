"""Multi-head attention under an interval mask, on one device or on many."""

from collections.abc import Sequence
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mmjax import sharding
from mmjax.kernels import decode_attention as decode
from mmjax.kernels import device
from mmjax.kernels import flash_attention as flash
from mmjax.nn import linear, ring
from mmjax.nn.cache import Cache
from mmjax.nn.mask import Mask
from mmjax.nn.partitioning import Initializer, declared, param
from mmjax.nn.rope import Rotation

# Up to so many new tokens are attended to the cache where it lies; for more, a
# layer is copied out of it once and its keys are tiled along the queries too.
_FEW = 16


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
  """Scaled dot-product attention over the ambient mesh.

  Batch and heads are computed where they are; a sequence that is split over
  the `context` axis takes the ring, see `mmjax.nn.ring`.

  Args:
    q: [B, Q, H, D].
    k: [B, K, G, D]; head h reads group h // (H / G).
    v: [B, K, G, D].
    mask: which keys a query sees; a query that sees none yields zeros.
    scale: factor on the dot products, usually D ** -0.5.
    softcap: see `flash_attention`.
    bias: [B or 1, H or 1, Q, K], see there.

  Returns:
    [B, Q, H, D] in the dtype of q.

  Raises:
    ValueError: for arguments that do not fit together, or a bias where the
      sequence is split.
  """
  flash.check(q, k, v, mask, softcap, bias)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    attend = flash.flash_attention
    return attend(q, k, v, mask, scale=scale, softcap=softcap, bias=bias)[0]
  parts = sharding.axis_size("context")
  in_ring = parts > 1 and not q.shape[1] % parts and not k.shape[1] % parts
  if in_ring and bias is not None:
    raise ValueError(
        "attention: a dense bias cannot travel around the ring of the context "
        "axis; set mesh.context=1"
    )
  keys = "length" if in_ring else None
  names = lambda x, *rest: sharding.spec(("batch", *rest), x.shape, mesh)
  # A shared row of the mask has a batch of 1, which no axis divides.
  masks = Mask(
      names(mask.block, "length"),
      names(mask.first, keys),
      names(mask.last, keys),
      mask.pattern,
  )
  heads = names(q, "length", "heads", None)
  groups = names(k, keys, "heads", None)
  if groups[2] != heads[2]:  # The axis divides the heads, not the groups.
    k, v = (_spread(x, sharding.axis_size("tensor")) for x in (k, v))
    groups = names(k, keys, "heads", None)
  run = functools.partial(
      _ring if in_ring else _alone, scale=scale, softcap=softcap
  )
  operands = [(q, heads), (k, groups), (v, groups), (mask, masks)]
  if bias is not None:
    operands.append((bias, names(bias, "heads", "length", None)))
  arrays, specs = zip(*operands)
  return jax.shard_map(
      run, in_specs=specs, out_specs=heads, check_vma=False
  )(*arrays)


def _spread(x: jax.Array, parts: int) -> jax.Array:
  """Repeats the groups of [B, K, G, D] until `parts` divides them."""
  groups = x.shape[2]
  return jnp.repeat(x, math.lcm(groups, parts) // groups, axis=2)


def _alone(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    bias: jax.Array | None = None,
    **kwargs: Any,
) -> jax.Array:
  """Attention within one device."""
  return flash.flash_attention(q, k, v, mask, bias=bias, **kwargs)[0]


def _ring(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: float,
    softcap: float | None,
) -> jax.Array:
  """Attention along the context axis."""
  call = flash.Call(
      device.kind(), q.shape, k.shape, q.dtype, softcap=softcap is not None
  )
  served_by = flash.choose(call, among=flash.TILED).implementation
  return ring.ring_attention(
      q, k, v, mask, "context", served_by, scale, softcap
  )[0]


def cached_attention(
    q: jax.Array,
    cache: Cache,
    layer: jax.Array | int,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
  """Attention of new tokens to a layer of a cache, over the ambient mesh.

  Args:
    q: [B, T, H, D]; head h reads group h // (H / G).
    cache: holds the keys and values of the new tokens already.
    layer: i32[], which of its layers.
    mask: of T queries and S keys, see `Cache.mask`.
    scale: factor on the dot products, usually D ** -0.5.
    softcap: see `flash_attention`.
    bias: [B or 1, H or 1, T, S], see there; with one the layer is copied out,
      however few the tokens.

  Returns:
    [B, T, H, D] in the dtype of q.

  Raises:
    ValueError: for arguments that do not fit together.
  """
  if q.shape[1] > _FEW or bias is not None:
    k, v = (
        jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
        .swapaxes(1, 2)
        .astype(q.dtype)
        for x in (cache.k, cache.v)
    )
    return dot_product_attention(
        q, k, v, mask, scale=scale, softcap=softcap, bias=bias
    )

  def run(q, k, v, layer, mask):  # noqa: ANN001, ANN202
    return decode.decode_attention(
        q, k, v, layer, mask, scale=scale, softcap=softcap
    )

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return run(q, cache.k, cache.v, layer, mask)
  names = lambda x, *rest: sharding.spec(rest, x.shape, mesh)
  # Where the axis does not divide the groups, every device has all heads.
  shards = names(cache.k, None, "batch", "heads", None, None)
  heads = "heads" if shards[2] else None
  rows = names(q, "batch", None, heads, None)
  return jax.shard_map(
      run,
      in_specs=(
          rows,
          shards,
          shards,
          PartitionSpec(),
          jax.tree.map(lambda x: names(x, "batch", None), mask),
      ),
      out_specs=rows,
      check_vma=False,
  )(q, cache.k, cache.v, jnp.asarray(layer, jnp.int32), mask)


class Attention(nn.Module):
  """Multi-head attention (Vaswani et al. 2017, section 3.2).

  Attributes:
    heads: number of heads; they share the width evenly.
    qkv_init: of the query, key and value kernels.
    out_init: of the output kernel.
    qkv_bias_init: of the query, key and value biases; None for no biases.
    dtype: of the computation.
    biased: which of "query", "key" and "value" have that bias.
    extra_init: of one learned key and one learned value that all queries see
      behind the others (PyTorch's `add_bias_kv`); None for none.
    rank: of the updates of all four kernels, see `linear.Linear`.
  """

  heads: int
  qkv_init: Initializer = linear.XAVIER
  out_init: Initializer = linear.XAVIER
  qkv_bias_init: Initializer | None = linear.ZEROS
  dtype: Any = jnp.float32
  biased: Sequence[str] = ("query", "key", "value")
  extra_init: Initializer | None = None
  rank: int = 0

  @nn.compact
  def __call__(
      self, x: jax.Array, mask: Mask, seen: jax.Array | None = None
  ) -> jax.Array:
    """Maps [B, Q, D] to [B, Q, D].

    Args:
      x: gives the queries.
      mask: of Q queries and K keys, the extra one included.
      seen: [B, K, C], gives keys and values; by default `x` itself.

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
          self.qkv_bias_init if name in self.biased else None,
          self.dtype,
          self.rank,
          name=name,
      )(source)
      return sharding.constrain(y, "batch", "length", "heads", None)

    seen = x if seen is None else seen
    q = project("query", x)
    k, v = project("key", seen), project("value", seen)
    if self.extra_init is not None:
      k, v = self._extended("extra_key", k), self._extended("extra_value", v)
    y = dot_product_attention(q, k, v, mask, scale=head_dim**-0.5)
    return linear.Linear(
        width,
        linear.HEADS_TO_EMBED,
        self.out_init,
        dtype=self.dtype,
        rank=self.rank,
        name="out",
    )(y)

  def _extended(self, name: str, x: jax.Array) -> jax.Array:
    """[B, K, H, D] with a learned vector for each head behind the others."""
    extra = param(
        self,
        name,
        declared(self.extra_init, "heads", "head_dim"),
        x.shape[2:],
        jnp.float32,
    )
    extra = jnp.broadcast_to(extra.astype(x.dtype), (len(x), 1, *x.shape[2:]))
    return jnp.concatenate([x, extra], axis=1)


class CachedAttention(nn.Module):
  """Self-attention of a decoder: grouped, rotary, with a memory.

  Queries share the keys and values of their group (Ainslie et al. 2023).

  Attributes:
    heads: number H of query heads.
    groups: number G of key and value heads; must divide H.
    head_dim: width of a head; H of them need not make the width of the model.
    qkv_init: of the query, key and value kernels.
    out_init: of the output kernel.
    qkv_bias_init: of the query, key and value biases; None for no biases.
    out_bias_init: of the output bias; None for no bias.
    dtype: of the computation.
    scale: factor on the dot products; head_dim ** -0.5 by default.
    query_init: of the query kernel where it is not `qkv_init`.
  """

  heads: int
  groups: int
  head_dim: int
  qkv_init: Initializer
  out_init: Initializer
  qkv_bias_init: Initializer | None = None
  out_bias_init: Initializer | None = None
  dtype: Any = jnp.float32
  scale: float | None = None
  query_init: Initializer | None = None

  @nn.compact
  def __call__(
      self,
      x: jax.Array,
      mask: Mask,
      rotation: Rotation | None = None,
      cache: Cache | None = None,
      layer: jax.Array | int = 0,
      bias: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Maps [B, T, D] to [B, T, D] and the cache to one that holds x too.

    Args:
      x: the new tokens.
      mask: of T queries and T keys; with a cache, of T queries and its slots.
      rotation: turns queries and keys; None for models without.
      cache: what came before; None attends to x alone.
      layer: i32[], which layer of the cache this is.
      bias: on the scores, see `dot_product_attention`; None for models without.

    Raises:
      ValueError: if the groups do not divide the heads.
    """
    if self.heads % self.groups:
      raise ValueError(
          f"{self.heads} heads are not divisible by {self.groups} groups"
      )

    def project(name: str, heads: int, init: Initializer) -> jax.Array:
      y = linear.Linear(
          (heads, self.head_dim),
          linear.EMBED_TO_HEADS,
          init,
          self.qkv_bias_init,
          self.dtype,
          name=name,
      )(x)
      return sharding.constrain(y, "batch", "length", "heads", None)

    q = project("query", self.heads, self.query_init or self.qkv_init)
    k, v = (
        project(name, self.groups, self.qkv_init) for name in ("key", "value")
    )
    if rotation is not None:
      q, k = rotation(q), rotation(k)
    scale = self.head_dim**-0.5 if self.scale is None else self.scale
    if cache is None:
      y = dot_product_attention(q, k, v, mask, scale=scale, bias=bias)
    else:
      cache = cache.write(layer, k, v)
      y = cached_attention(q, cache, layer, mask, scale=scale, bias=bias)
    y = linear.Linear(
        x.shape[-1],
        linear.HEADS_TO_EMBED,
        self.out_init,
        self.out_bias_init,
        self.dtype,
        name="out",
    )(y)
    return y, cache


class CachedCrossAttention(nn.Module):
  """Attention to another sequence, whose keys and values are made once.

  Attributes:
    heads: number H of heads.
    head_dim: width of a head; H of them need not make the width of the model.
    qkv_init: of the query, key and value kernels.
    out_init: of the output kernel.
    qkv_bias_init: of the query, key and value biases; None for no biases.
    out_bias_init: of the output bias; None for no bias.
    dtype: of the computation.
    scale: factor on the dot products; head_dim ** -0.5 by default.
    query_init: of the query kernel where it is not `qkv_init`.
  """

  heads: int
  head_dim: int
  qkv_init: Initializer
  out_init: Initializer
  qkv_bias_init: Initializer | None = None
  out_bias_init: Initializer | None = None
  dtype: Any = jnp.float32
  scale: float | None = None
  query_init: Initializer | None = None

  @nn.compact
  def __call__(
      self,
      x: jax.Array,
      mask: Mask,
      seen: jax.Array | None = None,
      cache: Cache | None = None,
      layer: jax.Array | int = 0,
  ) -> tuple[jax.Array, Cache | None]:
    """Maps [B, T, D] to [B, T, D] and the cache to one that knows `seen`.

    Args:
      x: gives the queries.
      mask: of T queries and the K tokens of `seen`, or, without it, the slots
        of the cache.
      seen: [B, K, C], the other sequence; None where the cache has it already.
      cache: what earlier calls saw; None to see `seen` and forget it.
      layer: i32[], which layer of the cache this is.
    """

    def project(name: str, source: jax.Array, init: Initializer) -> jax.Array:
      y = linear.Linear(
          (self.heads, self.head_dim),
          linear.EMBED_TO_HEADS,
          init,
          self.qkv_bias_init,
          self.dtype,
          name=name,
      )(source)
      return sharding.constrain(y, "batch", "length", "heads", None)

    q = project("query", x, self.query_init or self.qkv_init)
    scale = self.head_dim**-0.5 if self.scale is None else self.scale
    if seen is None:
      y = cached_attention(q, cache, layer, mask, scale=scale)
    else:
      k, v = (project(name, seen, self.qkv_init) for name in ("key", "value"))
      y = dot_product_attention(q, k, v, mask, scale=scale)
      if cache is not None:
        cache = cache.write(layer, k, v)
    y = linear.Linear(
        x.shape[-1],
        linear.HEADS_TO_EMBED,
        self.out_init,
        self.out_bias_init,
        self.dtype,
        name="out",
    )(y)
    return y, cache
