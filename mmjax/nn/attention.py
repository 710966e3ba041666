"""Multi-head attention under an interval mask, on one device or on many."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import sharding
from mmjax.kernels import device
from mmjax.kernels import flash_attention as flash
from mmjax.nn import linear, ring
from mmjax.nn.mask import Mask
from mmjax.nn.partitioning import Initializer


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
