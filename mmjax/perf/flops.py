"""How many FLOPs does a function take? An exact count from its jaxpr.

XLA's own count visits the body of a scan once and a custom call not at all;
this one multiplies. It counts what the program says before the compiler: for
all devices together, with rematerialised work, without what no output needs.
"""

import collections
from collections.abc import Callable, Iterator, Mapping
import dataclasses
import math
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval
import numpy as np

# Primitives that only move data; everything else that is no matrix product
# costs one FLOP per element.
_MOVES = frozenset(
    """
    all_gather all_to_all bitcast_convert_type broadcast_in_dim concatenate
    convert_element_type copy copy_p device_put dynamic_slice
    dynamic_update_slice gather iota optimization_barrier pad pbroadcast
    ppermute pvary random_unwrap random_wrap reshape rev scatter
    sharding_constraint slice split squeeze stop_gradient transpose
    """.split()
)

# The name that `jax.checkpoint` gives to what it computes a second time, and
# that a backward pass written by hand gives to the same.
_REMAT_SCOPE = "rematted_computation"


@dataclasses.dataclass(frozen=True)
class Flops:
  """FLOPs of one call, on all devices together.

  Attributes:
    by_primitive: matrix products and convolutions, by primitive.
    by_dtype: the same, by the dtype of the operands.
    rematerialised: the part of them that `jax.checkpoint` computes again.
    elementwise: everything else, one per element written, or read if more.
    notes: what could not be counted exactly.
  """

  by_primitive: Mapping[str, float]
  by_dtype: Mapping[str, float]
  rematerialised: float
  elementwise: float
  notes: tuple[str, ...]

  @property
  def total(self) -> float:
    """Matrix FLOPs that the hardware executes."""
    return sum(self.by_primitive.values())

  @property
  def model(self) -> float:
    """Matrix FLOPs that the mathematics needs: the numerator of MFU."""
    return self.total - self.rematerialised


def count(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Flops:
  """Counts the FLOPs of `fn(*args, **kwargs)` without running it.

  A multiply-add is two FLOPs. Positions of a convolution that fall on padding
  or on the holes of a dilation are not counted.

  Args:
    fn: any traceable function.
    *args: arrays or `jax.ShapeDtypeStruct`s, in trees.
    **kwargs: likewise.
  """
  jaxpr = _open(jax.make_jaxpr(fn)(*args, **kwargs))
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  tally = _count(jaxpr)
  return Flops(
      by_primitive=dict(tally.primitive),
      by_dtype=dict(tally.dtype),
      rematerialised=tally.rematerialised,
      elementwise=tally.elementwise,
      notes=tuple(dict.fromkeys(tally.notes)),
  )


class _Tally:
  """A sum of FLOPs that grows."""

  def __init__(self) -> None:
    self.primitive: collections.Counter[str] = collections.Counter()
    self.dtype: collections.Counter[str] = collections.Counter()
    self.rematerialised = 0.0
    self.elementwise = 0.0
    self.notes: list[str] = []

  def add(self, other: "_Tally", times: float = 1, again: bool = False) -> None:
    for key, value in other.primitive.items():
      self.primitive[key] += times * value
    for key, value in other.dtype.items():
      self.dtype[key] += times * value
    part = other.primitive.total() if again else other.rematerialised
    self.rematerialised += times * part
    self.elementwise += times * other.elementwise
    self.notes.extend(other.notes)

  def matrix(self, name: str, dtype: Any, flops: float) -> None:
    self.primitive[name] += flops
    self.dtype[np.dtype(dtype).name] += flops


def _count(jaxpr: core.Jaxpr) -> _Tally:
  tally = _Tally()
  for eqn in jaxpr.eqns:
    again = _REMAT_SCOPE in str(eqn.source_info.name_stack)
    tally.add(_count_eqn(eqn), again=again)
  return tally


def _count_eqn(eqn: Any) -> _Tally:
  name = eqn.primitive.name
  tally = _Tally()
  if name in _MATRIX:
    tally.matrix(name, eqn.invars[0].aval.dtype, _MATRIX[name](eqn))
  elif name == "scan":
    tally.add(_count(_open(eqn.params["jaxpr"])), eqn.params["length"])
  elif name == "while":
    _count_while(eqn, tally)
  elif name == "cond":
    branches = [_count(_open(b)) for b in eqn.params["branches"]]
    tally.add(max(
        branches, key=lambda b: (b.primitive.total(), b.elementwise)
    ))
  elif name == "shard_map":
    tally.add(_count(_open(eqn.params["jaxpr"])), _manual_devices(eqn))
  elif name == "pallas_call":
    _count_kernel(eqn, tally)
  elif inner := list(_inner(eqn.params)):
    for jaxpr in inner:
      tally.add(_count(jaxpr))
  elif name not in _MOVES:
    tally.elementwise += max(
        (math.prod(v.aval.shape) for v in (*eqn.invars, *eqn.outvars)
         if hasattr(v.aval, "shape")),
        default=0,
    )
  return tally


def _open(jaxpr: Any) -> core.Jaxpr:
  # A closed jaxpr wraps one; from JAX 0.12 on there is a single class.
  return getattr(jaxpr, "jaxpr", jaxpr)


def _inner(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, (core.Jaxpr, core.ClosedJaxpr)):
        yield _open(item)


def _count_while(eqn: Any, tally: _Tally) -> None:
  times = _trip_count(eqn)
  if times is None:
    times = 1
    tally.notes.append("a while loop of unknown length is counted once")
  tally.add(_count(_open(eqn.params["body_jaxpr"])), times)
  tally.add(_count(_open(eqn.params["cond_jaxpr"])), times)


def _trip_count(eqn: Any) -> int | None:
  """Iterations of a loop that counts up by one between two literals."""
  cond, body = _open(eqn.params["cond_jaxpr"]), _open(eqn.params["body_jaxpr"])
  if len(cond.eqns) != 1 or cond.eqns[0].primitive.name != "lt":
    return None
  num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
  consts, carry = eqn.invars[:num_cond], eqn.invars[num_cond + num_body:]
  initial = dict(zip(cond.invars, (*consts, *carry)))

  def literal(var: Any) -> int | None:
    value = var if isinstance(var, core.Literal) else initial.get(var)
    return int(value.val) if isinstance(value, core.Literal) else None

  counter, bound = cond.eqns[0].invars
  if isinstance(counter, core.Literal):
    return None
  index = cond.invars.index(counter) - num_cond
  inside, after = body.invars[num_body + index], body.outvars[index]
  step = next((e for e in body.eqns if after in e.outvars), None)
  if step is None or step.primitive.name != "add" or (
      inside not in step.invars
      or not any(isinstance(v, core.Literal) and v.val == 1
                 for v in step.invars)
  ):
    return None
  if not isinstance(bound, core.Literal) and bound in cond.invars[num_cond:]:
    place = cond.invars.index(bound) - num_cond
    if body.outvars[place] is not body.invars[num_body + place]:
      return None  # The bound itself moves.
  start, stop = literal(counter), literal(bound)
  return None if start is None or stop is None else max(stop - start, 0)


def _manual_devices(eqn: Any) -> int:
  """How many copies of a shard_map's body run: the axes that it splits."""
  sizes = eqn.params["mesh"].shape
  return math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])


def _count_kernel(eqn: Any, tally: _Tally) -> None:
  """A Pallas kernel: its declared cost, or its body at each grid point."""
  cost = eqn.params["cost_estimate"]
  if cost is not None:
    tally.matrix("pallas_call", eqn.outvars[0].aval.dtype, cost.flops)
    tally.elementwise += cost.transcendentals
    return
  grid = eqn.params["grid_mapping"].grid
  if all(isinstance(n, int) for n in grid):
    tally.add(_count(_open(eqn.params["jaxpr"])), math.prod(grid))
  else:
    tally.notes.append("a Pallas kernel with a dynamic grid is not counted")


def _dot_general(eqn: Any) -> float:
  lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
  (_, contract), (_, batch) = eqn.params["dimension_numbers"]
  free = [
      n for i, n in enumerate(rhs) if i not in contract and i not in batch
  ]
  return 2.0 * math.prod(lhs) * math.prod(free)


def _ragged_dot(eqn: Any) -> float:
  # Every row of a ragged dimension meets one group, so groups do not multiply.
  lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
  numbers = eqn.params["ragged_dot_dimension_numbers"]
  (_, contract), (_, batch) = numbers.dot_dimension_numbers
  taken = {*contract, *batch, *numbers.rhs_group_dimensions}
  free = [n for i, n in enumerate(rhs) if i not in taken]
  return 2.0 * math.prod(lhs) * math.prod(free)


def _conv(eqn: Any) -> float:
  lhs, rhs = (v.aval.shape for v in eqn.invars)
  out = eqn.outvars[0].aval.shape
  p = eqn.params
  numbers = p["dimension_numbers"]
  taps = 1
  for i, (lhs_dim, rhs_dim, out_dim) in enumerate(zip(
      numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:]
  )):
    taps *= _valid_taps(
        lhs[lhs_dim], rhs[rhs_dim], out[out_dim], p["window_strides"][i],
        p["padding"][i][0], p["lhs_dilation"][i], p["rhs_dilation"][i],
    )
  batch, features = (out[d] for d in numbers.out_spec[:2])
  return 2.0 * batch * features * rhs[numbers.rhs_spec[1]] * taps


def _valid_taps(
    size: int, kernel: int, out: int, stride: int, pad: int, lhs_dilation: int,
    rhs_dilation: int,
) -> int:
  """(output, tap) pairs of one dimension that touch a real input element."""
  few, many = sorted(((kernel, rhs_dilation), (out, stride)))
  steps = np.arange(many[0], dtype=np.int64) * many[1] - pad
  total = 0
  for i in range(few[0]):
    position = steps + i * few[1]
    inside = (position >= 0) & (position <= (size - 1) * lhs_dilation)
    total += int(np.sum(inside & (position % lhs_dilation == 0)))
  return total


_MATRIX: Mapping[str, Callable[[Any], float]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
}
