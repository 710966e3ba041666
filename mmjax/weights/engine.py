"""Does a checkpoint fit a system, and how do its tensors get in and out?

`load` and `dump` apply one table (`layout.Rule`) in the two directions. Both
expand it over our leaves, which gives the name and the shape of every tensor
that the other side must hold; so a checkpoint is judged by its headers, before
anything is allocated.
"""

from collections.abc import (
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np

from mmjax.weights.layout import Ignore, Rule, Table
from mmjax.weights.source import TensorSource
from mmjax.weights.transforms import Transform

Shape = tuple[int, ...]
# A leaf and the place in its stacked axes, `()` for a leaf that has none.
Slot = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Binding:
  """One tensor of theirs and the slices of our leaves that it holds.

  Attributes:
    name: of the tensor.
    paths: of our leaves.
    index: the place in their stacked axes.
    transforms: between a slice and its part of the tensor, one per path.
    parts: shapes of the parts, one per path. The tensor is their
      concatenation along axis 0.
    spare: see `layout.Rule`.
  """

  name: str
  paths: tuple[str, ...]
  index: tuple[int, ...]
  transforms: tuple[Transform, ...]
  parts: tuple[Shape, ...]
  spare: bool = False

  @property
  def slots(self) -> list[Slot]:
    """The slices that the tensor holds."""
    return [(path, self.index) for path in self.paths]

  @property
  def shape(self) -> Shape:
    """Of the whole tensor."""
    if len(self.parts) == 1:
      return self.parts[0]
    return (sum(part[0] for part in self.parts), *self.parts[0][1:])

  def part(self, tensor: np.ndarray, path: str) -> np.ndarray:
    """The part of `tensor` that belongs to `path`."""
    if len(self.parts) == 1:
      return tensor
    which = self.paths.index(path)
    begin = sum(part[0] for part in self.parts[:which])
    return tensor[begin : begin + self.parts[which][0]]


def load(
    source: TensorSource,
    table: Table,
    abstract: Mapping[str, Any],
    *,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    dtype: Any = None,
    only: Collection[str] | None = None,
) -> dict[str, jax.Array]:
  """Reads a checkpoint into our leaves, one leaf at a time.

  With shardings a process reads, of each leaf, the blocks of its own devices.

  Args:
    source: their tensors.
    table: rules from theirs to ours.
    abstract: path -> anything with the leaf's `shape` and `dtype`.
    shardings: path -> sharding; the default device without them.
    dtype: of the floating leaves; their own in `abstract` by default.
    only: the paths to read; the others are checked, and need no sharding.

  Returns:
    path -> array, with the paths of `abstract`, or of `only`.

  Raises:
    ValueError: naming every missing, unexpected, misshaped and doubly given
      tensor and every one of the wrong kind, before anything is read; later,
      for a value that does not fit the dtype.
  """
  chosen = match(source, table, abstract)
  leaves = {}
  for path in abstract if only is None else only:
    leaf = abstract[path]
    shape, target = tuple(leaf.shape), _kept(leaf, dtype)
    read = functools.partial(
        _read_block, source, chosen[path], path, shape, target
    )
    leaves[path] = _place(read, shape, shardings and shardings[path])
  return leaves


def dump(
    table: Table, params: Mapping[str, Any], *, dtype: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields their tensors, in the order of `describe`.

  One leaf at a time is fetched to the host.

  Args:
    table: rules from theirs to ours.
    params: path -> array.
    dtype: of the floating tensors; by default each keeps its own.

  Raises:
    ValueError: for a leaf without a rule, a value that `dtype` cannot hold, or
      an array of which this process holds only a part.
  """
  held: tuple[str, ...] = ()
  leaves: dict[str, np.ndarray] = {}
  for binding in _exported(table, params):
    if binding.paths != held:
      held = binding.paths
      leaves = {path: _fetch(path, params[path]) for path in held}
    parts = [
        transform.to_theirs(np.asarray(leaves[path][binding.index]))
        for path, transform in zip(held, binding.transforms)
    ]
    tensor = np.concatenate(parts) if len(parts) > 1 else parts[0]
    yield binding.name, _convert(tensor, _kept(tensor, dtype), binding.name)


def describe(
    table: Table, abstract: Mapping[str, Any], *, dtype: Any = None
) -> dict[str, jax.ShapeDtypeStruct]:
  """What `dump` will yield: name -> shape and dtype, in order.

  Raises:
    ValueError: for a leaf without a rule.
  """
  return {
      binding.name: jax.ShapeDtypeStruct(
          binding.shape, _kept(abstract[binding.paths[0]], dtype)
      )
      for binding in _exported(table, abstract)
  }


def match(
    source: TensorSource, table: Table, abstract: Mapping[str, Any]
) -> dict[str, dict[tuple[int, ...], Binding]]:
  """Finds for every slice of every leaf the one tensor that fills it.

  Args:
    source: their tensors; only names, shapes and dtypes are looked at.
    table: rules.
    abstract: path -> anything with the leaf's `shape` and `dtype`.

  Returns:
    path -> place in its stacked axes -> binding.

  Raises:
    ValueError: naming all faults.
  """
  bindings = expand(table, abstract)
  wanted: dict[Slot, list[Binding]] = {}
  for binding in bindings:
    for slot in binding.slots:
      wanted.setdefault(slot, []).append(binding)
  faults = _unruled(bindings, abstract)
  chosen: dict[str, dict[tuple[int, ...], Binding]] = {p: {} for p in abstract}
  for (path, index), spellings in wanted.items():
    found = [b for b in spellings if b.name in source.tensors]
    if len(found) > 1:
      found = [b for b in found if not b.spare] or found
    if not found:
      names = " or ".join(b.name for b in spellings)
      shape = _show(spellings[0].shape, abstract[path].dtype)
      faults.append(f"missing: {names} {shape}, for {_slot(path, index)}")
    elif len(found) > 1:
      names = " and ".join(b.name for b in found)
      faults.append(f"filled twice: {_slot(path, index)} by {names}")
    else:
      chosen[path][index] = found[0]
  for binding in bindings:
    if binding.name in source.tensors:
      faults += _compare(binding, source.tensors[binding.name], abstract)
  faults += _unexpected(source, table, bindings, abstract)
  if faults:
    raise ValueError(
        f"{source.path}: the tensors do not fit the system:\n  "
        + "\n  ".join(sorted(set(faults)))
    )
  return chosen


def expand(table: Table, abstract: Mapping[str, Any]) -> list[Binding]:
  """All tensors that the rules expect for the leaves of `abstract`.

  Raises:
    ValueError: if a rule does not fit the leaves that it names.
  """
  bindings = []
  for rule in table:
    if not isinstance(rule, Rule):
      continue
    present = [path for path in rule.paths if path in abstract]
    if not present:
      continue
    if len(present) < len(rule.paths):
      raise ValueError(f"{rule}: of its leaves there are only {present}")
    depth = len(rule.axes)
    shapes = [tuple(abstract[path].shape) for path in rule.paths]
    if any(len(s) < depth or s[:depth] != shapes[0][:depth] for s in shapes):
      raise ValueError(
          f"{rule}: needs {depth} equal leading axes; its leaves are {shapes}"
      )
    parts = tuple(
        _theirs(transform, shape[depth:])
        for transform, shape in zip(rule.transforms, shapes, strict=True)
    )
    bindings += [
        Binding(
            rule.name(index),
            rule.paths,
            index,
            rule.transforms,
            parts,
            rule.spare,
        )
        for index in np.ndindex(*shapes[0][:depth])
    ]
  return bindings


def _theirs(transform: Transform, shape: Shape) -> Shape:
  """Their shape, found on an array without memory (all strides are zero)."""
  return transform.to_theirs(np.broadcast_to(np.uint8(0), shape)).shape


def _exported(table: Table, abstract: Mapping[str, Any]) -> list[Binding]:
  """The bindings to write: of several spellings of a slice the first."""
  taken: set[Slot] = set()
  exported = []
  for binding in expand(table, abstract):
    if taken.isdisjoint(binding.slots):
      exported.append(binding)
      taken.update(binding.slots)
  faults = _unruled(exported, abstract)
  if faults:
    raise ValueError("the rules do not fit:\n  " + "\n  ".join(faults))
  return exported


def _unruled(
    bindings: Sequence[Binding], abstract: Mapping[str, Any]
) -> list[str]:
  ruled = {path for binding in bindings for path in binding.paths}
  return [
      f"no rule: {path} {_show(leaf.shape, leaf.dtype)}"
      for path, leaf in abstract.items()
      if path not in ruled
  ]


def _compare(
    binding: Binding,
    found: jax.ShapeDtypeStruct,
    abstract: Mapping[str, Any],
) -> Iterator[str]:
  leaf = abstract[binding.paths[0]]
  slots = ", ".join(_slot(*slot) for slot in binding.slots)
  got = _show(found.shape, found.dtype)
  if tuple(found.shape) != binding.shape:
    expected = _show(binding.shape, leaf.dtype)
    yield f"misshaped: {binding.name} is {got}, not {expected}, for {slots}"
  if _kind(found.dtype) != _kind(leaf.dtype):
    kind = _kind(leaf.dtype)
    yield f"wrong kind: {binding.name} is {got}, not {kind}, for {slots}"


def _unexpected(
    source: TensorSource,
    table: Table,
    bindings: Sequence[Binding],
    abstract: Mapping[str, Any],
) -> Iterator[str]:
  """Their tensors that nothing takes, with the reason where a rule knows it."""
  expected = {binding.name for binding in bindings}
  ignored = [rule.source for rule in table if isinstance(rule, Ignore)]
  for name, spec in source.tensors.items():
    if name in expected or any(re.fullmatch(i, name) for i in ignored):
      continue
    line = f"unexpected: {name} {_show(spec.shape, spec.dtype)}"
    near = [r for r in table if isinstance(r, Rule) and r.matches(name)]
    if near:
      path = near[0].paths[0]
      leaf = abstract.get(path)
      line += f", for {path}, " + (
          f"here {_show(leaf.shape, leaf.dtype)}"
          if leaf is not None
          else "which the system lacks"
      )
    yield line


def _place(
    read: Callable[[tuple[slice, ...]], np.ndarray],
    shape: Shape,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
  if sharding is None:
    return jax.device_put(read((slice(None),) * len(shape)))
  # Replicas ask for the same block again; it is read once.
  blocks: dict[tuple[Any, ...], np.ndarray] = {}

  def read_once(index: tuple[slice, ...]) -> np.ndarray:
    key = tuple((s.start, s.stop) for s in index)
    if key not in blocks:
      blocks[key] = read(index)
    return blocks[key]

  return jax.make_array_from_callback(shape, sharding, read_once)


def _read_block(
    source: TensorSource,
    slices: Mapping[tuple[int, ...], Binding],
    path: str,
    shape: Shape,
    dtype: np.dtype,
    index: tuple[slice, ...],
) -> np.ndarray:
  """Assembles the block `index` of a leaf from their tensors."""
  ranges = [range(*s.indices(size)) for s, size in zip(index, shape)]
  depth = len(next(iter(slices)))
  block = np.empty([len(r) for r in ranges], dtype)
  for place in np.ndindex(block.shape[:depth]):
    binding = slices[tuple(r[i] for r, i in zip(ranges, place))]
    part = binding.part(source.read(binding.name), path)
    transform = binding.transforms[binding.paths.index(path)]
    ours = transform.to_ours(part, shape[depth:])[index[depth:]]
    block[place] = _convert(ours, dtype, f"{source.path}: {binding.name}")
  return block


def _fetch(path: str, leaf: Any) -> np.ndarray:
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    raise ValueError(
        f"{path}: this process holds only a part of it; export from a "
        f"checkpoint in a single process"
    )
  return np.asarray(leaf)


def _kept(spec: Any, dtype: Any) -> np.dtype:
  """`dtype` for a floating array, the array's own for others and for None."""
  floating = dtype is not None and _kind(spec.dtype) == "float"
  return np.dtype(dtype if floating else spec.dtype)


def _convert(array: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
  """Casts; ValueError if a finite number overflows or an integer changes."""
  with np.errstate(over="ignore", invalid="ignore"):
    cast = array.astype(dtype, copy=False)
  if np.can_cast(array.dtype, dtype, "safe"):
    return cast
  if _kind(dtype) == "float":
    kept = np.isfinite(cast) | ~np.isfinite(array)
  else:
    kept = cast == array
  if not kept.all():
    raise ValueError(
        f"{what}: {np.count_nonzero(~kept)} of {array.size} values of "
        f"{array.dtype} do not fit in {dtype}"
    )
  return cast


def _kind(dtype: Any) -> str:
  """One of "float", "int", "bool", or the name of another dtype."""
  if jax.dtypes.issubdtype(dtype, np.floating):
    return "float"
  if jax.dtypes.issubdtype(dtype, np.integer):
    return "int"
  return str(np.dtype(dtype))


def _show(shape: Sequence[int], dtype: Any) -> str:
  return f"{np.dtype(dtype)}[{', '.join(map(str, shape))}]"


def _slot(path: str, index: Sequence[int]) -> str:
  return f"{path}[{', '.join(map(str, index))}]" if index else path
