"""Is this pair a pair? The sigmoid loss over all pairs of a batch.

No device ever holds the matrix of logits, nor a whole row of it. Every device
keeps its images; the texts, and the gradients with respect to them, travel
around the ring of the devices that share the batch, and a device takes the
texts that visit it in parts.
"""

import functools
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp

from mmjax import sharding
from mmjax.objectives.term import Term

Gradients = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

# Texts that a device compares with its images at a time.
_COLUMNS = 1024


def pairs(
    left: jax.Array,
    right: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    columns: int = _COLUMNS,
) -> dict[str, Term]:
  """The loss of SigLIP (Zhai et al. 2023, algorithm 1).

  Row i of `left` belongs to row i of `right` and to no other row of the GLOBAL
  batch. The loss is summed over columns and averaged over rows. Under a mesh a
  device takes `B / devices * (E + columns)` numbers beside its rows.

  Args:
    left: f32[B, E], unit rows.
    right: f32[B, E], unit rows.
    scale: f32[], the inverse temperature.
    bias: f32[], added to every logit.
    columns: how many texts a device compares with its images at a time, at
      most; it changes memory and speed alone.

  Returns:
    `sigmoid`, in nats a row.
  """
  chex.assert_equal_shape([left, right])
  chex.assert_shape([scale, bias], ())
  total = _total(left, right, scale, bias, columns)
  return {"sigmoid": Term(total, jnp.float32(left.shape[0]))}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _total(
    left: jax.Array,
    right: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    columns: int,
) -> jax.Array:
  """The loss summed over rows, f32[]."""
  return _around_the_ring(left, right, scale, bias, columns)[0]


def _forward(left, right, scale, bias, columns):  # noqa: ANN001, ANN202
  # The gradient of a scalar is known up to a factor: made here, it costs one
  # product less than to make the logits again, and one round of the ring.
  return _around_the_ring(left, right, scale, bias, columns)


def _backward(columns, gradients, cotangent):  # noqa: ANN001, ANN202
  del columns
  return jax.tree.map(lambda g: g * cotangent, gradients)


_total.defvjp(_forward, _backward)


def _around_the_ring(
    left: jax.Array,
    right: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    columns: int,
) -> tuple[jax.Array, Gradients]:
  """The loss and its gradients, over the ambient mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  run = functools.partial(_on_device, columns=columns)
  if mesh.empty or mesh.size == 1:
    return run(left, right, scale, bias, axes=())
  rows = sharding.spec(("batch", None), left.shape, mesh)
  whole = jax.sharding.PartitionSpec()
  return jax.shard_map(
      functools.partial(run, axes=rows[0] or ()),
      in_specs=(rows, rows, whole, whole),
      out_specs=(whole, (rows, rows, whole, whole)),
      check_vma=False,
  )(left, right, scale, bias)


def _on_device(
    left: jax.Array,
    right: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    columns: int,
    axes: tuple[str, ...],
) -> tuple[jax.Array, Gradients]:
  """One device's share: its rows of `left`, and all of `right` in turn.

  Args:
    left: f32[b, E].
    right: f32[b, E].
    scale: f32[].
    bias: f32[].
    columns: as in `pairs`.
    axes: mesh axes of the ring; none for a device that has all rows.

  Returns:
    The loss summed over the rows of all devices, and its gradients with
    respect to this device's arguments.
  """
  left, right = left.astype(jnp.float32), right.astype(jnp.float32)
  turns = lax.axis_size(axes) if axes else 1
  pass_on = lambda x: sharding.pass_on(x, axes) if axes else x

  def visit(carry: Any, turn: jax.Array) -> tuple[Any, None]:
    texts, d_texts, sums = carry
    coming = pass_on(texts)  # While this device computes.
    more, d_more = _compare(
        left, texts, scale, bias, turn == 0, _parts(len(left), columns)
    )
    sums = jax.tree.map(jnp.add, sums, more)
    # Gradients travel with their texts, and are home after a whole round.
    return (coming, pass_on(d_texts + d_more), sums), None

  zero = jnp.zeros((), jnp.float32)
  start = right, jnp.zeros_like(right), (zero, jnp.zeros_like(left), zero, zero)
  (_, d_right, sums), _ = lax.scan(visit, start, jnp.arange(turns))
  total, d_left, d_scale, d_bias = sums
  if axes:
    total, d_scale, d_bias = lax.psum((total, d_scale, d_bias), axes)
  return total, (d_left, d_right, d_scale, d_bias)


def _compare(
    left: jax.Array,
    right: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    own: jax.Array,
    parts: int,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """Images and texts, each with each, a part of the texts at a time.

  Args:
    left: f32[b, E].
    right: f32[b, E].
    scale: f32[].
    bias: f32[].
    own: bool[], whether row i of the texts belongs to row i of the images;
      otherwise no pair is one.
    parts: how many parts, a divisor of b.

  Returns:
    (loss, gradients for `left`, `scale` and `bias`), and that for `right`.
  """

  def compare(sums: Any, part: Any) -> tuple[Any, jax.Array]:
    texts, index = part
    product = jnp.matmul(
        left, texts.T, preferred_element_type=jnp.float32
    )
    logits = scale * product + bias
    matched = own & (jnp.arange(len(left))[:, None] == index)
    loss = jax.nn.softplus(jnp.where(matched, -logits, logits)).sum()
    slope = jax.nn.sigmoid(logits) - matched
    back = jnp.matmul(slope, texts, preferred_element_type=jnp.float32)
    more = loss, scale * back, jnp.vdot(slope, product), slope.sum()
    d_texts = scale * jnp.matmul(
        slope.T, left, preferred_element_type=jnp.float32
    )
    return jax.tree.map(jnp.add, sums, more), d_texts

  zero = jnp.zeros((), jnp.float32)
  split = lambda x: x.reshape(parts, -1, *x.shape[1:])
  sums, d_right = lax.scan(
      compare,
      (zero, jnp.zeros_like(left), zero, zero),
      (split(right), split(jnp.arange(len(right)))),
  )
  return sums, d_right.reshape(right.shape)


def _parts(rows: int, columns: int) -> int:
  """The fewest equal parts of `rows` that hold at most `columns` each."""
  least = -(-rows // columns)
  return next(n for n in range(least, rows + 1) if not rows % n)
