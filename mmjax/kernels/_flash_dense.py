"""Attention with all scores at once, in jnp: for short sequences.

The scores live within a pass, not between the two. Backward they are made with
the keys in rows: so are those products which sum over queries, and XLA:CPU has
no fast product that sums over the rows of its first factor.
"""

import jax
import jax.numpy as jnp

from mmjax.kernels.intervals import Mask

# The score of a key that is not seen: finite, so that a row without any key
# has no inf - inf, and below the scores of all others.
_HIDDEN = -1e30

# What `jax.checkpoint` calls that which it makes again: no work of the model.
_AGAIN = "rematted_computation"


def _grouped(x: jax.Array, groups: int) -> jax.Array:
  """[B, L, H, D] to [B, G, R * L, D], the R heads of a group below each other.

  With as many groups as heads: [B, H, L, D].
  """
  batch, length, heads, dim = x.shape
  x = x.reshape(batch, length, groups, heads // groups, dim)
  return x.transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, dim)


def _ungrouped(x: jax.Array, length: int) -> jax.Array:
  """The inverse of `_grouped`."""
  batch, groups, _, dim = x.shape
  x = x.reshape(batch, groups, -1, length, dim)
  return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, dim)


def _of_groups(x: jax.Array, groups: int) -> jax.Array:
  """[B or 1, H or 1, ...] to [B or 1, G or 1, R or 1, ...]."""
  groups = groups if x.shape[1] > 1 else 1
  return x.reshape(x.shape[0], groups, -1, *x.shape[2:])


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    bias: jax.Array | None,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """See `flash_attention.forward`."""
  length, groups = q.shape[1], k.shape[2]
  keys, values = _grouped(k, groups), _grouped(v, groups)
  s = _product("bgqd,bgkd->bgqk", _grouped(q * scale, groups), keys)
  s = s.reshape(*s.shape[:2], -1, length, s.shape[-1])
  if bias is not None:
    s += _of_groups(bias, groups)
  if softcap is not None:
    s = softcap * jnp.tanh(s / softcap)
  if mask.pattern != "full":
    s = jnp.where(mask.dense()[:, None, None], s, _HIDDEN)
  top = s.max(axis=-1, keepdims=True)
  p = jnp.exp(s - top)
  total = p.sum(axis=-1, keepdims=True)
  rows = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1])
  # Divided last: there are fewer outputs than scores.
  out = _product("bgqk,bgkd->bgqd", rows(p).astype(v.dtype), values)
  out = _ungrouped(out / rows(total), length)
  lse = (top + jnp.log(total)).reshape(len(q), -1, length)
  if mask.pattern == "interval":  # Else every query sees a key.
    sees = mask.dense().any(axis=-1)
    out = jnp.where(sees[:, :, None, None], out, 0.0)
    lse = jnp.where(sees[:, None], lse, -jnp.inf)
  return out.astype(q.dtype), lse


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    bias: jax.Array | None,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
  """See `flash_attention.backward`; `lse` is +inf where a row sees nothing."""
  length, groups = q.shape[1], k.shape[2]
  queries, douts = _grouped(q * scale, groups), _grouped(dout, groups)
  keys, values = _grouped(k, groups), _grouped(v, groups)
  split = lambda s: s.reshape(*s.shape[:3], -1, length)
  merge = lambda s: s.reshape(*s.shape[:3], -1).astype(q.dtype)
  # [B or 1, G or 1, R or 1, Q, ..] to [.., .., K, R or 1, Q].
  turned = lambda x: x.transpose(0, 1, 4, 2, 3)
  per_row = lambda x: _of_groups(x, groups)[:, :, None]

  with jax.named_scope(_AGAIN):
    s = split(_product("bgkd,bgqd->bgkq", keys, queries))
  if bias is not None:
    s += turned(_of_groups(bias, groups))
  slope = 1.0
  if softcap is not None:
    capped = jnp.tanh(s / softcap)
    s, slope = softcap * capped, 1.0 - capped**2
  if mask.pattern != "full":
    s = jnp.where(turned(mask.dense()[:, None, None]), s, _HIDDEN)
  p = jnp.exp(s - per_row(lse))
  dp = split(_product("bgkd,bgqd->bgkq", values, douts))
  ds = p * (dp - per_row(delta)) * slope
  dbias = None
  if bias is not None:
    shape = _of_groups(bias, groups).shape[:3]
    dbias = ds.transpose(0, 1, 3, 4, 2)
    axes = [axis for axis in range(3) if shape[axis] == 1]
    dbias = dbias.sum(axes, keepdims=True).reshape(bias.shape)
    dbias = dbias.astype(bias.dtype)
  ds = merge(ds)
  # The barriers keep XLA from putting `ds` in the place where it is slow.
  across = jax.lax.optimization_barrier(keys.swapaxes(2, 3))
  dq = jax.lax.optimization_barrier(_product("bgdk,bgkq->bgdq", across, ds))
  dq = dq.swapaxes(2, 3) * scale
  dk = _product("bgkq,bgqd->bgkd", ds, queries)
  dv = _product("bgkq,bgqd->bgkd", merge(p), douts)
  return (
      _ungrouped(dq, length).astype(q.dtype),
      _ungrouped(dk, k.shape[1]).astype(k.dtype),
      _ungrouped(dv, k.shape[1]).astype(v.dtype),
      dbias,
  )
