"""Attention over a sequence that is split over devices: the ring.

Every device keeps its queries; keys and values travel around the ring of the
`context` axis, and partial results are merged by their log-sum-exp (Liu et al.
2023, "Ring Attention"). The mask travels with the keys, so that any visibility
pattern is exact, and parts that a device does not see cost it nothing.

Under a causal mask a device that holds late queries has more to do than one
that holds early ones. `zigzag` gives an order of the sequence in which all
have the same (Llama 3, Dubey et al. 2024, section 3.3.2): reorder tokens,
positions and mask (`mask.reordered`) by it once, where they enter a model.
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mmjax import sharding
from mmjax.kernels import flash_attention as flash
from mmjax.kernels.intervals import Mask

Arrays = tuple[jax.Array, ...]


def zigzag(length: int, parts: int) -> np.ndarray:
  """The order in which part i holds the i-th and the i-th last piece.

  Args:
    length: of the sequence, a multiple of 2 * parts.
    parts: devices along `context`.

  Returns:
    i64[length]: `x[:, order]` reorders, `y[:, argsort(order)]` restores.

  Raises:
    ValueError: if the pieces are not of equal length.
  """
  if length % (2 * parts):
    raise ValueError(
        f"a sequence of {length} cannot be cut into {2 * parts} equal pieces, "
        f"two for each of {parts} devices: pad it to a multiple of {2 * parts}"
    )
  pieces = np.arange(length).reshape(2 * parts, -1)
  order = [piece for i in range(parts) for piece in (i, 2 * parts - 1 - i)]
  return pieces[order].reshape(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    axis: str,
    implementation: str,
    scale: float,
    softcap: float | None,
) -> Arrays:
  """One device's share of attention, called within `jax.shard_map`.

  Args:
    q: [B, Q / n, H, D], the queries of this device, one of n along `axis`.
    k: [B, K / n, G, D].
    v: [B, K / n, G, D].
    mask: of these queries and these keys.
    axis: the mesh axis of the ring.
    implementation: one of `flash.TILED`.
    scale: as in `flash_attention`.
    softcap: likewise.

  Returns:
    The output [B, Q / n, H, D] and f32[B, H, Q / n], as `flash_attention`.
  """
  visit = functools.partial(
      flash.forward, implementation=implementation, scale=scale,
      softcap=softcap,
  )

  def step(carry: Any, unused: None) -> tuple[Any, None]:
    travelling, out, lse = carry
    coming = sharding.pass_on(travelling, axis)  # While this device computes.
    return (coming, *_merge(out, lse, *_visit(travelling))), None

  def _visit(travelling: Arrays) -> Arrays:
    k, v, first, last = travelling
    return visit(q, k, v, _of_part(mask, first, last))

  start = (
      (k, v, mask.first, mask.last),
      jnp.zeros(q.shape, jnp.float32),
      jnp.full((q.shape[0], q.shape[2], q.shape[1]), -jnp.inf, jnp.float32),
  )
  (travelling, out, lse), _ = lax.scan(
      step, start, length=lax.axis_size(axis) - 1
  )
  out, lse = _merge(out, lse, *_visit(travelling))
  return out.astype(q.dtype), lse


def _forward(q, k, v, mask, axis, implementation, scale, softcap):  # noqa: ANN001, ANN202
  out, lse = ring_attention(
      q, k, v, mask, axis, implementation, scale, softcap
  )
  return (out, lse), (q, k, v, mask, out, lse)


def _backward(axis, implementation, scale, softcap, saved, cotangents):  # noqa: ANN001, ANN202
  q, k, v, mask, out, lse = saved
  dout, dlse = cotangents
  delta = flash.row_delta(out, dout, lse, dlse)

  def step(carry: Any, unused: None) -> tuple[Any, None]:
    (k, v, first, last), dk, dv, dq = carry
    coming = sharding.pass_on((k, v, first, last), axis)
    more_q, more_k, more_v, _ = flash.backward(
        q, k, v, _of_part(mask, first, last), None, lse, delta, dout,
        implementation=implementation, scale=scale, softcap=softcap,
    )
    # Gradients travel with their keys, and are home after a whole round.
    dk, dv = sharding.pass_on((dk + more_k, dv + more_v), axis)
    return (coming, dk, dv, dq + more_q), None

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  start = (k, v, mask.first, mask.last), zeros(k), zeros(v), zeros(q)
  (_, dk, dv, dq), _ = lax.scan(step, start, length=lax.axis_size(axis))
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


ring_attention.defvjp(_forward, _backward)


def _of_part(mask: Mask, first: jax.Array, last: jax.Array) -> Mask:
  """The mask of this device's queries and another one's keys."""
  # A part of a causal mask is not causal itself; one of a full mask is full.
  pattern = "full" if mask.pattern == "full" else "interval"
  return Mask(mask.block, first, last, pattern)


def _merge(
    out: jax.Array, lse: jax.Array, more: jax.Array, more_lse: jax.Array
) -> Arrays:
  """Attention over two sets of keys from attention over each of them.

  Args:
    out: f32[B, Q, H, D].
    lse: f32[B, H, Q], -inf where a row saw nothing.
    more: [B, Q, H, D], over other keys.
    more_lse: likewise.

  Returns:
    The output and the log-sum-exp over both.
  """
  total = jnp.logaddexp(lse, more_lse)
  base = jnp.where(jnp.isneginf(total), 0.0, total)
  share = lambda x: jnp.exp(x - base).swapaxes(1, 2)[..., None]
  return out * share(lse) + more * share(more_lse), total
