"""Which row of a codebook is nearest? Exact, and without an N x K matrix.

`vq_lookup` quantises with one codebook, `residual_vq` with several, each of
which quantises what those before left over (SoundStream, Zeghidour et al. 2021,
section III-C). Who serves a call is decided by `choose`:

  tpu      Pallas, Mosaic TPU; all levels in one kernel      `_vq_tpu.py`
  scan     level after level through the lookup of `tpu`, where the codebooks
           of all levels do not fit on chip
  gpu      Pallas, Mosaic GPU (Hopper); level after level    `_vq_gpu.py`
  chunked  jnp, chunk by chunk                               `_vq_jnp.py`

Neither is differentiable: their results are constants. The gradients that
quantizers are trained with are in `mmjax.nn.quantize`.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.kernels import _vq_gpu, _vq_jnp, _vq_tpu, device

IMPLEMENTATIONS = ("tpu", "scan", "gpu", "chunked")
METRICS = ("euclidean", "cosine")

# By platform, the fastest first. The last one serves every call.
_PREFERENCES = {
    "tpu": ("tpu", "scan", "chunked"),
    "gpu": ("gpu", "chunked"),
    "cpu": ("chunked",),
}


def vq_lookup(
    x: jax.Array,
    codebook: jax.Array,
    *,
    metric: str = "euclidean",
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Finds the nearest row of a codebook; no gradient.

  Takes O(N + K D) of memory beside its arguments; O(N D) where a bfloat16 x on
  a CPU, or a float32 x on a GPU, is first rewritten as what the device
  multiplies.

  Args:
    x: [N, D] in float32 or bfloat16.
    codebook: [K, D] in float32 or bfloat16. Products are those of float32 at
      full precision, summed in float32; those of bfloat16 need one pass where
      both are.
    metric: "euclidean", or "cosine", in which a row of zeros, of x or of the
      codebook, has a similarity of 0 to everything.
    implementation: one of `IMPLEMENTATIONS`; by default `choose` decides.

  Returns:
    i32[N], the nearest rows, of equally near ones the first; and f32[N], the
    squared Euclidean distance to them, or 1 - cosine similarity, computed from
    the difference and not from what the search compared. A row of x that holds
    a NaN yields index 0 and a distance of NaN. The codebook must be finite.

  Raises:
    ValueError: for shapes that do not fit together, a dtype or metric that
      nobody serves, or an implementation that cannot serve the call.
  """
  if metric not in METRICS:
    raise ValueError(
        f"vq_lookup: metric={metric!r}; expected one of {list(METRICS)}"
    )
  _check("vq_lookup", x, "codebook", codebook, "[K, D]")
  x, codebook = map(jnp.asarray, jax.lax.stop_gradient((x, codebook)))
  # Unit vectors are compared in float32.
  dtype = jnp.promote_types(x.dtype, codebook.dtype)
  dtype = dtype if metric == "euclidean" else jnp.float32
  call = Call(device.kind(), codebook.shape, dtype)
  chosen = choose(call, implementation).implementation
  name = chosen.removesuffix(device.INTERPRET)
  if name == "chunked":
    return _vq_jnp.lookup(x, codebook, metric)
  index = _search(call.device_kind, chosen)(x, codebook, metric)
  return index, _vq_jnp.distances(x, codebook, index, metric)


def residual_vq(
    x: jax.Array,
    codebooks: jax.Array,
    active: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Quantises with each codebook what those before it left over; no gradient.

  The rest is kept, and nearest rows are found, in float32 whatever the dtypes.

  Args:
    x: [N, D] in float32 or bfloat16.
    codebooks: [Q, K, D] in float32 or bfloat16; finite.
    active: i32[N], how many levels each row uses, from the first on (quantizer
      dropout, SoundStream section III-C); by default all.
    implementation: one of `IMPLEMENTATIONS`; by default `choose` decides.

  Returns:
    i32[N, Q], the nearest rows level by level, of equally near ones the first,
    and -1 at levels that a row does not use; and the sum of the rows chosen,
    [N, D] in the dtype of x. A row of x that holds a NaN yields code 0 at every
    level that it uses.

  Raises:
    ValueError: as `vq_lookup` does.
  """
  _check("residual_vq", x, "codebooks", codebooks, "[Q, K, D]")
  if active is None:
    active = jnp.full(x.shape[:1], codebooks.shape[0], jnp.int32)
  if active.shape != x.shape[:1] or active.dtype != jnp.int32:
    raise ValueError(
        f"residual_vq: active is {active.dtype}{list(active.shape)}, expected "
        f"int32[{x.shape[0]}], one number per row of x"
    )
  x, codebooks = map(jnp.asarray, jax.lax.stop_gradient((x, codebooks)))
  call = Call(device.kind(), codebooks.shape, codebooks.dtype)
  chosen = choose(call, implementation).implementation
  name = chosen.removesuffix(device.INTERPRET)
  if name == "chunked":
    return _vq_jnp.residual(x, codebooks, active)
  if name == "tpu":
    return _vq_tpu.residual(
        x, codebooks, active, call.device_kind, name != chosen
    )
  search = _search(call.device_kind, chosen)
  nearest = lambda rest, level: search(rest, codebooks[level], "euclidean")
  return _vq_jnp.descend(x, codebooks, active, nearest)


def _search(device_kind: str, chosen: str) -> Callable[..., jax.Array]:
  """The kernel that finds indices: (x, codebook, metric) -> i32[N]."""
  name = chosen.removesuffix(device.INTERPRET)
  interpret = name != chosen
  if name == "gpu":
    return functools.partial(_vq_gpu.lookup, interpret=interpret)
  return functools.partial(
      _vq_tpu.lookup, device_kind=device_kind, interpret=interpret
  )


def code_statistics(
    x: jax.Array,
    index: jax.Array,
    count: int,
    weight: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """What a moving-average codebook learns from a batch; no gradient.

  Both are sums over rows: those of microbatches or shards add up.

  Args:
    x: [N, D].
    index: i32[N], the code of each row; a negative one counts nowhere.
    count: K, the number of codes.
    weight: f32[N], of the rows; by default 1.

  Returns:
    f32[K], the weight of the rows of each code; and f32[K, D], their weighted
    sum.

  Raises:
    ValueError: for shapes that do not fit together.
  """
  rows = x.shape[:1]
  if x.ndim != 2 or index.shape != rows or (
      weight is not None and weight.shape != rows
  ):
    raise ValueError(
        f"code_statistics: x is {x.shape}, index {index.shape}, weight "
        f"{None if weight is None else weight.shape}; expected [N, D], [N], [N]"
    )
  x = jax.lax.stop_gradient(x).astype(jnp.float32)
  if weight is None:
    weight = jnp.ones(rows, jnp.float32)
  else:
    weight = jax.lax.stop_gradient(weight).astype(jnp.float32)
    x = x * weight[:, None]
  # A negative index would count from the end; one that is too large is dropped.
  index = jnp.where(index < 0, count, index)
  add = lambda values: jnp.zeros(
      (count, *values.shape[1:]), jnp.float32
  ).at[index].add(values, mode="drop")
  return add(weight), add(x)


class Call(NamedTuple):
  """What the choice of an implementation depends on.

  Attributes:
    device_kind: see `device.kind`.
    shape: of the codebook [K, D], or of the codebooks [Q, K, D].
    dtype: of the products of a lookup; of the codebooks.
  """

  device_kind: str
  shape: tuple[int, ...]
  dtype: Any = jnp.float32


def choose(call: Call, implementation: str | None = None) -> device.Choice:
  """Says who serves a call and why.

  Args:
    call: what is to be served.
    implementation: what was asked for; None leaves the choice here. It need
      not suit the platform: a kernel may be lowered for another one.

  Raises:
    ValueError: if what was asked for is unknown or cannot serve the call.
  """
  if implementation is not None:
    name = implementation.removesuffix(device.INTERPRET)
    if name not in IMPLEMENTATIONS:
      raise ValueError(
          f"vq: implementation={implementation!r}; expected one of "
          f"{list(IMPLEMENTATIONS)}"
      )
    refusal = _refusal(name, call)
    if refusal:
      raise ValueError(f"vq: {name} cannot serve this: {refusal}")
    return device.Choice(implementation, "asked for")
  platform = device.platform(call.device_kind)
  reasons = [f"on {call.device_kind}"]
  for name in _PREFERENCES[platform]:
    refusal = _refusal(name, call)
    if name == "gpu" and not device.is_hopper(call.device_kind):
      refusal = "its kernel is for Hopper"
    if not refusal:
      break
    reasons.append(f"not {name}: {refusal}")
  return device.Choice(name, "; ".join(reasons))


def _refusal(name: str, call: Call) -> str:
  """Why an implementation cannot serve a call; empty if it can."""
  if name == "tpu":
    return _vq_tpu.refusal(call.device_kind, call.shape, call.dtype)
  if name == "scan":
    if len(call.shape) == 2:
      return "one codebook has no levels to scan"
    return _vq_tpu.refusal(call.device_kind, call.shape[1:], call.dtype)
  if name == "gpu":
    # What is left over by a level is float32.
    dtype = call.dtype if len(call.shape) == 2 else jnp.float32
    return _vq_gpu.refusal(call.shape[-2:], dtype)
  return ""


def _check(
    where: str, x: jax.Array, name: str, codebook: jax.Array, expected: str
) -> None:
  """Refuses arguments that do not fit together, naming every fault."""
  rank = expected.count(",") + 1
  if x.ndim != 2 or codebook.ndim != rank:
    raise ValueError(
        f"{where}: x is {x.shape} and {name} {codebook.shape}, expected [N, D] "
        f"and {expected}"
    )
  faults = [
      f"{argument} is {array.dtype}, expected float32 or bfloat16"
      for argument, array in (("x", x), (name, codebook))
      if array.dtype not in (jnp.float32, jnp.bfloat16)
  ] + [
      f"{argument} is {array.shape}, which holds nothing"
      for argument, array in (("x", x), (name, codebook))
      if 0 in array.shape
  ]
  if x.shape[1] != codebook.shape[-1]:
    faults.append(f"x is {x.shape} and {name} {codebook.shape}: D must agree")
  if faults:
    raise ValueError(f"{where}: " + "; ".join(faults))
