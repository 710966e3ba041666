"""What does the compiled program move? Collectives and memory, read from HLO.

The optimised HLO of an executable is one device's program. This module walks
it as the device would, bodies of loops as often as they run, and lists the
collectives with their bytes and the traffic to memory.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np

from mmjax.perf import groups

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

# Instructions that name buffers or wait for them, and move nothing.
_FREE = frozenset(
    """
    add-dependency after-all bitcast call conditional constant domain
    get-tuple-element iota opt-barrier parameter partition-id recv replica-id
    tuple while
    """.split()
)

# They read of their first operand only what they return.
_READ_PART = frozenset({"dynamic-slice", "slice", "gather"})
# They write into their first operand only this one.
_WRITE_PART = {"dynamic-update-slice": 1, "scatter": 2}


@dataclasses.dataclass(frozen=True)
class Collective:
  """All executions of one kind of collective in one run of the program.

  Attributes:
    op: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`,
      `collective-permute` and so on.
    network: "ici" inside a slice, "dcn" between slices.
    group: the first of the groups that communicate: partition numbers, that is
      places in the flattened mesh; on the "dcn", numbers of slices.
    count: executions.
    bytes: payload of all executions on one device. The payload is the whole
      array that takes part, before it is scattered or after it is gathered:
      the operand, times the group size for an all-gather.
  """

  op: str
  network: str
  group: tuple[int, ...]
  count: int
  bytes: int


  def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that it runs over, given their sizes in order.

    Empty between slices, whose group is not one of partitions.
    """
    if self.network == "dcn":
      return ()
    places = np.unravel_index(self.group, tuple(mesh.values()))
    return tuple(
        axis for axis, place in zip(mesh, places) if len(set(place)) > 1
    )


@dataclasses.dataclass(frozen=True)
class Memory:
  """HBM of one device while the program runs, in bytes, as XLA planned it.

  Attributes:
    arguments: inputs, donated ones included.
    outputs: results that did not take the place of a donated input.
    temporaries: everything in between, at the peak.
    code: the program itself.
  """

  arguments: int
  outputs: int
  temporaries: int
  code: int

  @property
  def total(self) -> int:
    """What has to fit, in bytes."""
    return self.arguments + self.outputs + self.temporaries + self.code


def memory(compiled: Any) -> Memory:
  """Reads the memory plan of a `jax.stages.Compiled`."""
  stats = compiled.memory_analysis()
  return Memory(
      arguments=stats.argument_size_in_bytes,
      outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
      temporaries=stats.temp_size_in_bytes,
      code=stats.generated_code_size_in_bytes,
  )


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """One line of HLO: `name = shape opcode(operands), attributes`."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  literal: str
  attributes: str
  root: bool

  def attribute(self, name: str) -> str | None:
    """The computation or word that follows `name=`."""
    match = re.search(rf'\b{name}=%?"?([\w.\-]+)', self.attributes)
    return match and match[1]


class _Computation(dict[str, _Instruction]):
  """The instructions of one computation, by name, in order."""

  @functools.cached_property
  def root(self) -> _Instruction:
    return next(i for i in self.values() if i.root)

  @functools.cached_property
  def users(self) -> Mapping[str, list[_Instruction]]:
    users = collections.defaultdict(list)
    for instruction in self.values():
      for operand in instruction.operands:
        users[operand].append(instruction)
    return users

  @functools.cached_property
  def parameters(self) -> Mapping[int, _Instruction]:
    return {
        int(i.literal): i for i in self.values() if i.opcode == "parameter"
    }


class Program:
  """The parsed HLO of one device's program.

  Args:
    text: `jax.stages.Compiled.as_text()`.

  Attributes:
    notes: what could not be counted exactly.
  """

  def __init__(self, text: str) -> None:
    self._computations, self._entry = _parse(text)
    found = re.search(r"num_partitions=(\d+)", text)
    self._num_partitions = int(found[1]) if found else 1
    notes: dict[str, None] = {}
    self._executed = list(self._walk(self._entry, 1, False, set(), notes))
    self.notes = tuple(notes)

  def collectives(self) -> list[Collective]:
    """The collectives of one run, equal ones added up, largest first."""
    totals: collections.Counter[tuple[Any, ...]] = collections.Counter()
    counts: collections.Counter[tuple[Any, ...]] = collections.Counter()
    for computation, instruction, times, fused in self._executed:
      found = self._collective(computation, instruction, fused)
      if found:
        *key, payload = found
        counts[tuple(key)] += times
        totals[tuple(key)] += times * payload
    return [
        Collective(*key, count=counts[key], bytes=total)
        for key, total in totals.most_common()
    ]

  def traffic(self) -> int:
    """Bytes that one run reads from and writes to HBM on one device.

    Every instruction reads its operands and writes its result, a fusion as one
    instruction; slices read what they return, and updates and scatters in place
    write what they change. Buffers that XLA put into on-chip memory are left
    out. A kernel moves what its own estimate says; without one, its operands
    count once.
    """
    return sum(
        times * self._moved(computation, instruction)
        for computation, instruction, times, fused in self._executed
        if not fused
    )

  def _walk(
      self, name: str, times: int, fused: bool, seen: set[Any],
      notes: dict[str, None],
  ) -> Iterator[tuple[_Computation, _Instruction, int, bool]]:
    """Yields executed instructions: computation, instruction, times, fused."""
    computation = self._computations[name]
    for i in computation.values():
      # An asynchronous collective that the TPU compiler spreads over several
      # fusions is written into each; chain and channel tell that it is one.
      chain = re.search(r'chain_id="(\d+)"', i.attributes)
      if chain:
        key = chain[1], i.attribute("channel_id")
        if key in seen:
          continue
        seen.add(key)
      yield computation, i, times, fused
      if i.opcode == "while":
        trips = self._trip_count(computation, i)
        if trips is None:
          notes["a loop of unknown length is counted once"] = None
          trips = 1
        for part in ("condition", "body"):
          yield from self._walk(
              i.attribute(part), times * trips, fused, set(), notes
          )
      elif i.opcode == "conditional":
        notes["every branch of a conditional is counted"] = None
        for branch in _branches(i):
          yield from self._walk(branch, times, fused, set(), notes)
      elif i.opcode in ("fusion", "async-start"):
        called = i.attribute("calls")
        yield from self._walk(called, times, True, seen, notes)
      elif i.opcode == "call":
        called = i.attribute("to_apply")
        yield from self._walk(called, times, fused, seen, notes)

  def _collective(
      self, computation: _Computation, i: _Instruction, fused: bool
  ) -> tuple[str, str, tuple[int, ...], int] | None:
    op = i.opcode.removesuffix("-start")
    payload = sum(
        _bytes(computation[name].shape) for name in i.operands
        if name in computation
    )
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
    if i.opcode == "send" and transfer:
      op, network = transfer[1].lower().replace("_", "-"), "dcn"
      group = groups.between_slices(i.attributes)
    elif op in _COLLECTIVES:
      network = "ici"
      group = groups.first(i.attributes, self._num_partitions)
      # The TPU compiler writes a reduce-scatter as a fusion in which an
      # all-reduce is at once sliced.
      users = [user.opcode for user in computation.users[i.name]]
      if op == "all-reduce" and fused and users == ["dynamic-slice"]:
        op = "reduce-scatter"
    else:
      return None
    if op == "all-gather":
      payload *= len(group)
    return op, network, group, payload

  def _trip_count(
      self, computation: _Computation, loop: _Instruction
  ) -> int | None:
    """Iterations of a loop that counts up by one, as scans do."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known[1])
    condition = self._computations[loop.attribute("condition")]
    test = condition.root
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
      return None
    counter, bound = (condition[name] for name in test.operands)
    if counter.opcode != "get-tuple-element" or bound.opcode != "constant":
      return None
    index = int(counter.attribute("index"))
    start = _operand(computation, loop.operands[0], index)
    if start is None or start.opcode != "constant":
      return None
    return max(int(bound.literal) - int(start.literal), 0)

  def _moved(self, computation: _Computation, i: _Instruction) -> int:
    if i.opcode in _FREE or i.opcode.endswith("-done") or (
        i.attribute("custom_call_target") == "AllocateBuffer"
    ):
      return 0
    operands = [
        computation[name].shape for name in i.operands if name in computation
    ]
    if i.opcode == "fusion":
      return self._moved_by_fusion(i, operands)
    if i.opcode == "custom-call":
      said = re.search(r'"bytes_accessed":"(\d+)"', i.attributes)
      if said:
        return int(said[1])
    op, result = _target(i)
    if op in _READ_PART:
      return _hbm_bytes(operands[0], _bytes(result)) + _hbm_bytes(result)
    if op in _WRITE_PART:
      update = operands[_WRITE_PART[op]]
      return _hbm_bytes(update) + _hbm_bytes(result, _bytes(update))
    return sum(map(_hbm_bytes, operands)) + _hbm_bytes(result)

  def _moved_by_fusion(self, i: _Instruction, operands: Sequence[str]) -> int:
    inner = self._computations[i.attribute("calls")]
    total = 0
    for index, shape in enumerate(operands):
      total += _hbm_bytes(shape, self._read(inner, inner.parameters[index]))
    roots = [inner.root]
    if inner.root.opcode == "tuple":
      roots = [inner[name] for name in inner.root.operands]
    for root, shape in zip(roots, _split(i.shape)):
      total += _hbm_bytes(shape, self._written(inner, root))
    return total

  def _read(self, inner: _Computation, parameter: _Instruction) -> int:
    """Bytes that a fused computation reads of one parameter."""
    whole = _bytes(parameter.shape)
    total = 0
    for user in inner.users[parameter.name]:
      first = user.operands[0] == parameter.name
      if user.opcode == "bitcast":
        total += self._read(inner, user)
      elif user.opcode == "fusion":
        called = self._computations[user.attribute("calls")]
        index = user.operands.index(parameter.name)
        total += self._read(called, called.parameters[index])
      elif user.opcode in _READ_PART and first:
        total += _bytes(user.shape)
      elif user.opcode == "tuple" and user.root:
        pass  # Handed on in place.
      elif user.opcode not in _WRITE_PART or not first:
        return whole  # Else it is overwritten in place.
    return min(total, whole)

  def _written(self, inner: _Computation, result: _Instruction) -> int:
    """Bytes that a fused computation writes of one result."""
    if result.opcode == "bitcast":
      return self._written(inner, inner[result.operands[0]])
    if result.opcode == "fusion":
      called = self._computations[result.attribute("calls")]
      return self._written(called, called.root)
    if result.opcode in _WRITE_PART:
      update = result.operands[_WRITE_PART[result.opcode]]
      return _bytes(inner[update].shape)
    return 0 if result.opcode == "parameter" else _bytes(result.shape)


def _target(i: _Instruction) -> tuple[str, str]:
  """The operation of a perhaps asynchronous instruction, and its result."""
  if i.opcode == "send":
    return i.opcode, ""  # It arrives on another device.
  op = i.opcode.removesuffix("-start")
  if op == i.opcode or op == "all-reduce":
    return op, i.shape
  # A copy lists its target and its source, all others the other way round.
  first, second = _split(i.shape)[:2]
  return op, first if op == "copy" else second


def _operand(
    computation: _Computation, name: str, index: int
) -> _Instruction | None:
  """Element `index` of a tuple, followed through copies to its origin."""
  found = computation[name]
  if found.opcode != "tuple":
    return None
  found = computation[found.operands[index]]
  while found.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
    found = computation[found.operands[0]]
  return found


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  computations: dict[str, _Computation] = {}
  entry, current = "", None
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
    if header:
      current = computations[header[2]] = _Computation()
      entry = header[2] if header[1] else entry
    elif line.startswith("}"):
      current = None
    elif current is not None:
      match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line)
      if match:
        current[match[2]] = _parse_instruction(
            match[2], match[3], root=bool(match[1])
        )
  if not entry:
    raise ValueError("expected the text of an HLO module with an ENTRY")
  return computations, entry


def _parse_instruction(name: str, rest: str, root: bool) -> _Instruction:
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index("(")
  closing = _closing(rest, opening)
  inside = rest[opening + 1:closing]
  return _Instruction(
      name=name,
      shape=shape,
      opcode=rest[:opening],
      operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
      literal=inside,
      attributes=rest[closing + 1:],
      root=root,
  )


def _closing(text: str, opening: int) -> int:
  """The index of the parenthesis that closes the one at `opening`."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, opening):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return match.start()
  raise ValueError(f"unbalanced parentheses in HLO: {text[:200]}")


def _split(shape: str) -> list[str]:
  """The elements of a tuple shape, one level deep; any other shape itself."""
  if not shape.startswith("("):
    return [shape]
  parts, depth, start = [], 0, 1
  for i, letter in enumerate(shape):
    depth += (letter in "([{") - (letter in ")]}")
    if (letter == "," and depth == 1) or (i == len(shape) - 1 and i > start):
      parts.append(re.sub(r"/\*.*?\*/", "", shape[start:i]).strip())
      start = i + 1
  return parts


def _bytes(shape: str) -> int:
  """Bytes of a shape, tuples added up; without padding of layouts."""
  total = 0
  for dtype, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape):
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or [0])[0])
    total += math.prod(int(n) for n in dims.split(",") if n) * bits // 8
  return total


def _hbm_bytes(shape: str, part: int | None = None) -> int:
  """`part`, or all, of the bytes of a shape whose layout says HBM."""
  if shape.startswith("("):
    return sum(_hbm_bytes(element) for element in _split(shape))
  # Memory space 0 is the device's main one and is not written.
  if re.search(r"S\([1-9]\d*\)", shape):
    return 0
  return _bytes(shape) if part is None else part


def _branches(i: _Instruction) -> list[str]:
  many = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
  if many:
    return re.findall(r"%?([\w.\-]+)", many[1])
  return [i.attribute("true_computation"), i.attribute("false_computation")]
