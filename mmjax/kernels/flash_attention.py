"""Attention under an interval mask, exact, and without an L x L array.

`flash_attention` is what the rest of the house calls. Who serves a call is
decided by `choose`, from shapes, dtypes and the device:

  tpu      Pallas, Mosaic TPU           `_flash_tpu.py`
  gpu      Pallas, Mosaic GPU (Hopper)  `_flash_gpu.py`
  cudnn    cuDNN, for full and causal masks on a GPU
  chunked  jnp, tile by tile            `_flash_jnp.py`; what a CPU runs
  dense    jnp, all scores at once      `_flash_dense.py`; for short sequences

All but `cudnn`, which does so itself, store the output and the log-sum-exp of
each row, and recompute the probabilities backward (FlashAttention-2, Dao 2023).
"""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.kernels import (
    _flash_dense,
    _flash_gpu,
    _flash_jnp,
    _flash_tpu,
    device,
)
from mmjax.kernels.intervals import Mask

IMPLEMENTATIONS = ("tpu", "gpu", "cudnn", "chunked", "dense")

_IN_JNP = {"chunked": _flash_jnp, "dense": _flash_dense}

# Those that hold no more than some tiles of scores at a time.
TILED = ("tpu", "gpu", "chunked")

# By platform, the fastest first. The last one serves every call.
_PREFERENCES = {
    "tpu": ("dense", "tpu", "chunked"),
    "gpu": ("dense", "cudnn", "gpu", "chunked"),
    "cpu": ("dense", "chunked"),
}

# Scores of one head up to which all at once is faster than tile by tile.
DENSE_SCORES = 256 * 256


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    bias: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Scaled dot-product attention; differentiable in q, k, v and bias.

  Args:
    q: [B, Q, H, D] in float32 or bfloat16.
    k: [B, K, G, D] of the same dtype; H must be a multiple of G (grouped-query
      attention, Ainslie et al. 2023): head h reads group h // (H / G).
    v: [B, K, G, D].
    mask: which keys a query sees.
    scale: factor on the dot products, usually D ** -0.5.
    softcap: c in c * tanh(score / c), applied before the mask (Gemma 2).
    bias: [B or 1, H or 1, Q, K], added to the scores before the mask. It is
      dense by nature: only the jnp paths take it.
    implementation: one of `IMPLEMENTATIONS`; by default `choose` decides.

  Returns:
    The output, [B, Q, H, D] in the dtype of q; and f32[B, H, Q], the logarithm
    of the sum of the exponentials of a row's visible scores. A query that sees
    nothing yields zeros and -inf. NaNs spread to every row that sees them, and
    may spread to rows of the same tile that do not.

  Raises:
    ValueError: for shapes that do not fit together, a dtype that nobody
      serves, or an implementation that cannot serve the call.
  """
  check(q, k, v, mask, softcap, bias)
  call = Call(
      device.kind(),
      q.shape,
      k.shape,
      q.dtype,
      mask.pattern,
      softcap is not None,
      bias is not None,
  )
  choice = choose(call, implementation)
  if choice.implementation == "cudnn":
    return _cudnn(q, k, v, mask, scale)
  return _flash(q, k, v, mask, bias, choice.implementation, scale, softcap)


def check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    softcap: float | None = None,
    bias: jax.Array | None = None,
) -> None:
  """Refuses arguments of `flash_attention` that do not fit together.

  Raises:
    ValueError: naming every fault.
  """
  faults = []
  for name, x in (("q", q), ("k", k), ("v", v)):
    if x.ndim != 4:
      raise ValueError(f"attention: {name} is {x.shape}, expected [B, L, H, D]")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
      faults.append(f"{name} is {x.dtype}, expected float32 or bfloat16")
    if x.dtype != q.dtype:
      faults.append(f"{name} is {x.dtype} and q {q.dtype}: cast one of them")
  batch, queries, heads, dim = q.shape
  if k.shape != v.shape:
    faults.append(f"k is {k.shape} and v {v.shape}, expected the same")
  if k.shape[0] != batch or k.shape[3] != dim:
    faults.append(f"q is {q.shape} and k {k.shape}: B and D must agree")
  if heads % k.shape[2]:
    faults.append(f"{heads} heads are no multiple of {k.shape[2]} groups")
  for name, x, length in (
      ("block", mask.block, queries),
      ("first", mask.first, k.shape[1]),
      ("last", mask.last, k.shape[1]),
  ):
    if x.shape not in ((1, length), (batch, length)):
      faults.append(
          f"mask.{name} is {x.shape}, expected {(batch, length)} or "
          f"{(1, length)}"
      )
  if softcap is not None and not softcap > 0:
    faults.append(f"softcap is {softcap}, expected a positive number or None")
  if bias is not None:
    full = (batch, heads, queries, k.shape[1])
    if bias.ndim != 4 or any(
        have not in allowed
        for have, allowed in zip(
            bias.shape, ((batch, 1), (heads, 1), full[2:3], full[3:])
        )
    ):
      faults.append(
          f"bias is {bias.shape}, expected {full}; B and H may be 1"
      )
  if faults:
    raise ValueError("attention: " + "; ".join(faults))


class Call(NamedTuple):
  """What the choice of an implementation depends on.

  Attributes:
    device_kind: see `device.kind`.
    q_shape: [B, Q, H, D].
    k_shape: [B, K, G, D].
    dtype: of q, k and v.
    pattern: of the mask.
    softcap: whether there is one.
    bias: whether there is one.
  """

  device_kind: str
  q_shape: tuple[int, ...]
  k_shape: tuple[int, ...]
  dtype: Any
  pattern: str = "interval"
  softcap: bool = False
  bias: bool = False


def choose(
    call: Call,
    implementation: str | None = None,
    among: Sequence[str] = IMPLEMENTATIONS,
) -> device.Choice:
  """Says who serves a call and why.

  Args:
    call: what is to be served.
    implementation: what was asked for; None leaves the choice here. It need
      not suit the platform: a kernel may be lowered for another one.
    among: the implementations to choose from; `TILED` for the two passes
      `forward` and `backward`.

  Raises:
    ValueError: if what was asked for is unknown or cannot serve the call.
  """
  if implementation is not None:
    name = implementation.removesuffix(device.INTERPRET)
    if name not in IMPLEMENTATIONS:
      raise ValueError(
          f"attention: implementation={implementation!r}; expected one of "
          f"{list(IMPLEMENTATIONS)}"
      )
    refusal = _refusal(name, call)
    if refusal:
      raise ValueError(f"attention: {name} cannot serve this: {refusal}")
    return device.Choice(implementation, "asked for")
  platform = device.platform(call.device_kind)
  reasons = [f"on {call.device_kind}"]
  for name in _PREFERENCES[platform]:
    if name not in among:
      continue
    refusal = _refusal(name, call)
    scores = call.q_shape[1] * call.k_shape[1]
    if name == "dense" and scores > DENSE_SCORES:
      refusal = f"{scores:,} scores a head are more than {DENSE_SCORES:,}"
    if name == "gpu" and not device.is_hopper(call.device_kind):
      refusal = "its kernel is for Hopper"
    if not refusal:
      break
    reasons.append(f"not {name}: {refusal}")
  return device.Choice(name, "; ".join(reasons))


def _refusal(name: str, call: Call) -> str:
  """Why an implementation cannot serve a call; empty if it can."""
  if name in ("tpu", "gpu"):
    if call.bias:
      return "the kernels take no dense bias"
    backend = _flash_tpu if name == "tpu" else _flash_gpu
    return backend.refusal(call.q_shape, call.dtype)
  if name == "cudnn":
    if call.pattern == "interval":
      return "cuDNN takes full and causal masks"
    if call.softcap or call.bias:
      return "neither a softcap nor a bias is passed on to cuDNN"
    if call.dtype != jnp.bfloat16:
      return f"cuDNN takes bfloat16, not {jnp.dtype(call.dtype)}"
    if call.q_shape[3] % 8 or call.q_shape[3] > 128:
      return f"cuDNN takes head sizes 8, 16, .. 128, not {call.q_shape[3]}"
  return ""


# The implementations in two passes.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _flash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    bias: jax.Array | None,
    implementation: str,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
  return forward(
      q, k, v, mask, bias,
      implementation=implementation, scale=scale, softcap=softcap,
  )


def _flash_fwd(q, k, v, mask, bias, implementation, scale, softcap):  # noqa: ANN001, ANN202
  out, lse = _flash(q, k, v, mask, bias, implementation, scale, softcap)
  return (out, lse), (q, k, v, mask, bias, out, lse)


def _flash_bwd(implementation, scale, softcap, saved, cotangents):  # noqa: ANN001, ANN202
  q, k, v, mask, bias, out, lse = saved
  dout, dlse = cotangents
  dq, dk, dv, dbias = backward(
      q, k, v, mask, bias, lse, row_delta(out, dout, lse, dlse), dout,
      implementation=implementation, scale=scale, softcap=softcap,
  )
  return dq, dk, dv, None, dbias


_flash.defvjp(_flash_fwd, _flash_bwd)


def row_delta(
    out: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    dlse: jax.Array | None = None,
) -> jax.Array:
  """What every row subtracts from the gradient of its probabilities.

  A change of the score s_ij changes the output by p_ij (v_j - out_i) and the
  log-sum-exp by p_ij, hence ds_ij = p_ij (dout_i . v_j - delta_i) with
  delta_i = dout_i . out_i - dlse_i.

  Args:
    out: [B, Q, H, D].
    dout: cotangent of `out`.
    lse: f32[B, H, Q].
    dlse: cotangent of `lse`; None for zero.

  Returns:
    f32[B, H, Q]; 0 where a row sees nothing.
  """
  # No product of matrices: it would be counted, and run, as one.
  delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1)
  delta = delta.swapaxes(1, 2)
  if dlse is not None:
    delta -= dlse
  return jnp.where(jnp.isneginf(lse), 0.0, delta)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    bias: jax.Array | None = None,
    *,
    implementation: str,
    scale: float,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The forward pass; arguments and results of `flash_attention`."""
  name = implementation.removesuffix(device.INTERPRET)
  if name in _IN_JNP:
    return _IN_JNP[name].forward(
        q, k, v, mask, bias, scale=scale, softcap=softcap
    )
  backend = {"tpu": _flash_tpu, "gpu": _flash_gpu}[name]
  return backend.forward(
      q, k, v, mask,
      scale=scale, softcap=softcap, interpret=name != implementation,
  )


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
    implementation: str,
    scale: float,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
  """The backward pass.

  Args:
    q: as in `flash_attention`, like the next four.
    k: see there.
    v: see there.
    mask: see there.
    bias: see there.
    lse: f32[B, H, Q] of all keys of the row, even if k holds some of them.
    delta: f32[B, H, Q], from `row_delta`.
    dout: [B, Q, H, D], cotangent of the output.
    implementation: any but `cudnn`.
    scale: as in `flash_attention`.
    softcap: as in `flash_attention`.

  Returns:
    Cotangents of q, k and v in their dtypes, and of the bias (None without).
  """
  # exp(score - lse) becomes 0, not NaN, in rows that see nothing.
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
  name = implementation.removesuffix(device.INTERPRET)
  if name in _IN_JNP:
    return _IN_JNP[name].backward(
        q, k, v, mask, bias, lse, delta, dout, scale=scale, softcap=softcap
    )
  backend = {"tpu": _flash_tpu, "gpu": _flash_gpu}[name]
  grads = backend.backward(
      q, k, v, mask, lse, delta, dout,
      scale=scale, softcap=softcap, interpret=name != implementation,
  )
  return *grads, None


# The implementation that JAX differentiates.


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float
) -> tuple[jax.Array, jax.Array]:
  out, lse = jax.nn.dot_product_attention(
      q, k, v,
      scale=scale,
      is_causal=mask.pattern == "causal",
      implementation="cudnn",
      return_residual=True,
  )
  return out, lse.swapaxes(1, 2)
