"""Whose parameters does a stage start from? The functions of `Stage.imports`.

Each is called as `(system, abstract) -> {path: array}`, where `abstract` holds
the shape, dtype and sharding of every parameter of the system, and gives the
parameters that are then not drawn at random.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import math
import os
import pathlib
import re
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax import config as config_lib
from mmjax import pretrained
from mmjax.nn import position
from mmjax.train import checkpoint
from mmjax.weights import engine
from mmjax.weights.source import open_source

Abstract = Mapping[str, jax.ShapeDtypeStruct]
Params = dict[str, jax.Array]

# Fields of a system that may differ from those of the checkpoint it starts
# from: how fast it computes, how it is regularised, what `skip` is for.
_FREE_FIELDS = {
    "classes", "dropout", "dtype", "image", "name", "parent", "pre_logits",
    "remat", "resample",
    # The shapes of parameters tell; None may say the same as a number.
    "groups", "head_dim", "table",
}  # fmt: skip


def from_checkpoint(
    system: Any,
    abstract: Abstract,
    *,
    path: str,
    skip: str | None = None,
    step: int | None = None,
) -> Params:
  """Takes the parameters of a run or of a public checkpoint.

  A position table of another patch grid is resampled, so that a ViT can be
  fine-tuned at another resolution; grids are taken to be square.

  Args:
    system: the system to fill.
    abstract: path -> shape, dtype and sharding of its parameters.
    path: a run directory; a directory as transformers saves one; or a file
      with the official names of the system's paper (`.npz`, `.safetensors`).
    skip: pattern of whole paths, here or there, that are left out.
    step: of a run's checkpoint; the newest by default.

  Returns:
    path -> array, for the paths that `skip` does not match.

  Raises:
    FileNotFoundError: if there is no such run, directory or file.
    ValueError: naming all missing, misshaped and unused parameters, or the
      fields in which the systems differ.
  """
  folder = pathlib.Path(path).expanduser().resolve()
  donor = _open(system, folder, step)
  if donor.layout is not None:
    _check_fields(system, donor.system, folder)
  select = _Selection(abstract, donor.shapes, skip, donor.where)
  return select.finish(donor.read(select.asked()), system)


def from_part(
    system: Any,
    abstract: Abstract,
    *,
    path: str,
    source: str = "",
    target: str = "",
    skip: str | None = None,
    deeper: str | None = None,
    longer: str | None = None,
    step: int | None = None,
) -> Params:
  """Takes a part of another system: CLIP's tower for LLaVA, a trained decoder.

  Of a run whose config evaluates slow copies (`eval_shadow`) they are taken:
  the part that was evaluated is the part that is used.

  Args:
    system: the system of which a part is filled.
    abstract: path -> shape, dtype and sharding of its parameters.
    path: a run directory, or a directory as transformers saves one.
    source: what the part's paths begin with there, such as "vision/encoder/".
    target: what they begin with here, such as "vision/".
    skip: pattern of whole paths, as they are called here, that are left out:
      not filled here, or not wanted of there.
    deeper: pattern of paths here whose stack may have more blocks there, of
      which the first are taken.
    longer: pattern of tables here that may have more rows (a head: columns)
      than there; each of those behind becomes the mean of the others.
    step: of a run's checkpoint; the newest by default.

  Returns:
    path -> array, for all paths below `target` that `skip` does not match;
    position tables of another grid of patches are resampled.

  Raises:
    FileNotFoundError: if there is no such run or directory.
    ValueError: naming all missing, misshaped and unused parameters, or the
      fields in which the parts differ.
  """
  folder = pathlib.Path(path).expanduser().resolve()
  donor = _open(system, folder, step, evaluated=True)
  wanted = _below(abstract, target)
  stored = _below(donor.shapes, source)
  if not wanted or not stored:
    raise ValueError(
        f"{donor.where}: nothing to take: {len(wanted)} parameters here begin "
        f"with target={target!r}, {len(stored)} there with source={source!r}. "
        f"Here there are {_beginnings(abstract)}, there "
        f"{_beginnings(donor.shapes)}"
    )
  if donor.system is not None:
    _check_fields(
        _part(system, target),
        _part(donor.system, source),
        donor.where,
        f"config.system/{target}".rstrip("/").replace("/", "."),
        # Where the length is that of a table, shapes are compared.
        free={"length"}
        | ({"depth"} if deeper else set())
        | ({"vocab"} if longer else set()),
    )
  # Both sides under the names that they have here.
  select = _Selection(
      {target + rest: leaf for rest, leaf in wanted.items()},
      {target + rest: shape for rest, shape in stored.items()},
      skip,
      donor.where,
      deeper,
      longer,
  )
  there = {path: source + path[len(target) :] for path in select.wanted}
  read = donor.read({there[p]: leaf for p, leaf in select.asked().items()})
  found = {path: read[name] for path, name in there.items()}
  return select.finish(found, _part(system, target))


class _Donor(NamedTuple):
  """Where parameters come from.

  Attributes:
    where: for messages.
    system: the module that they belong to, or None if nobody knows.
    layout: of a directory or file of another project; None of a run.
    shapes: path -> shape.
    read: {path: shape, dtype and sharding} -> {path: array}.
  """

  where: str
  system: Any
  layout: Any
  shapes: dict[str, tuple[int, ...]]
  read: Callable[[Mapping[str, jax.ShapeDtypeStruct]], Params]


def _open(
    system: Any, folder: pathlib.Path, step: int | None, evaluated: bool = False
) -> _Donor:
  """A run, or a public checkpoint; no tensor is read yet.

  Args:
    system: whose file knows the names of a public file.
    folder: of the run or checkpoint.
    step: of a run.
    evaluated: whether to take the slow copies of a run that evaluates them.
  """
  if (folder / "checkpoints").is_dir():
    return _open_run(folder, step, evaluated)
  if not folder.exists():
    raise FileNotFoundError(
        f"{folder}: expected a run directory, a transformers directory, or a "
        ".npz or .safetensors file"
    )
  layout, donor, table, source = _open_foreign(system, folder)
  shapes, _ = pretrained.abstract_params(layout, donor)

  def read(wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    places = {path: leaf.sharding for path, leaf in wanted.items()}
    return engine.load(source, table, shapes, shardings=places, only=wanted)

  return _Donor(str(folder), donor, layout, _shapes(shapes), read)


def _open_run(
    folder: pathlib.Path, step: int | None, evaluated: bool
) -> _Donor:
  config = checkpoint.stored_config(folder)
  parts = ["frozen", "live"]
  if evaluated and config.get("eval_shadow"):
    parts.append("shadow")
  with checkpoint.Checkpoints(folder) as checkpoints:
    step = checkpoints.step(step)
    shapes = checkpoints.shapes(step)
  names = {
      path.removeprefix(f"{part}/"): path
      for part in parts  # The later part wins.
      for path in shapes
      if path.startswith(f"{part}/")
  }

  def read(wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    with checkpoint.Checkpoints(folder) as checkpoints:
      stored = {names[path]: leaf for path, leaf in wanted.items()}
      found = checkpoints.read(stored, step)
    return {path: found[names[path]] for path in wanted}

  donor = None
  if "system" in config:
    donor = config_lib.build(config["system"], f"{folder}: config.system")
  return _Donor(
      f"{folder}, step {step}",
      donor,
      None,
      {path: shapes[name] for path, name in names.items()},
      read,
  )


def _open_foreign(
    system: Any, path: pathlib.Path
) -> tuple[Any, Any, Any, Any]:
  """(layout, system, table, tensors) of a public checkpoint."""
  module = sys.modules[type(system).__module__]
  if path.is_dir():
    donor, layout, source, _ = pretrained.open_directory(path)
    return layout, donor, layout.table(donor), source
  if not hasattr(module, "official_table"):
    raise ValueError(
        f"{path}: {module.__name__} knows no official names; give a run or a "
        "transformers directory"
    )
  source = open_source(path)
  return module.LAYOUT, system, module.official_table(system), source


def _below(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """The entries whose path begins with `prefix`, by the rest of the path."""
  return {
      path[len(prefix) :]: leaf
      for path, leaf in tree.items()
      if path.startswith(prefix)
  }


def _beginnings(tree: Mapping[str, Any]) -> str:
  return ", ".join(sorted({f"{path.split('/')[0]}/" for path in tree}))


def _part(system: Any, prefix: str) -> Any:
  """The module that owns the parameters below `prefix`, or the one around."""
  for name in filter(None, prefix.split("/")):
    system = getattr(system, name, system)
  return system


class _Selection:
  """Which stored parameters fill which of ours, checked.

  Attributes:
    wanted: those of ours that are filled.
    grids: path -> (prefix, old side, new side) of tables to resample.
    rows: the paths whose leading axis differs and may.
  """

  def __init__(
      self,
      abstract: Abstract,
      stored: Mapping[str, tuple[int, ...]],
      skip: str | None,
      where: str,
      deeper: str | None = None,
      longer: str | None = None,
  ) -> None:
    """Compares both sides; see `from_part` for the arguments and errors."""
    skipped = _matcher(skip)
    if skip is not None and not any(map(skipped, (*abstract, *stored))):
      raise ValueError(
          f"skip={skip!r} matches no parameter of this system or of {where}"
          + config_lib.nearest(skip, abstract)
      )
    self._stored = stored
    self.wanted = {p: s for p, s in abstract.items() if not skipped(p)}
    self.grids = _moved_grids(self.wanted, stored)
    self.rows = _moved_rows(self.wanted, stored, deeper, longer)
    moved = self.grids.keys() | self.rows
    faults = checkpoint.faults(
        {p: s for p, s in self.wanted.items() if p not in moved}, stored
    ) + [
        f"  {path}: no use for it here"
        for path in stored
        if path not in abstract and not skipped(path)
    ]
    if faults:
      raise ValueError(
          f"{where}: its parameters do not fit this system:\n"
          + "\n".join(faults)
          + "\nLeave parameters out with a pattern in `skip`"
      )

  def asked(self) -> dict[str, jax.ShapeDtypeStruct]:
    """What to read: the wanted ones, in the shapes that are stored."""
    whole = _everywhere(self.wanted) if self.wanted else None
    moved = self.grids.keys() | self.rows
    return {
        path: jax.ShapeDtypeStruct(
            self._stored[path],
            leaf.dtype,
            sharding=whole if path in moved else leaf.sharding,
        )
        for path, leaf in self.wanted.items()
    }

  def finish(self, found: Params, system: Any) -> Params:
    """What was read, in our shapes; `system` knows how to resample grids."""
    method = getattr(system, "resample", "bicubic")
    done = {path: found[path] for path in self.wanted}
    for path, grid in self.grids.items():
      done[path] = _resample(found[path], self.wanted[path], *grid, method)
    for path in self.rows:
      done[path] = _refit(found[path], self.wanted[path])
    return done


def _matcher(pattern: str | None) -> Callable[[str], Any]:
  return re.compile(r"(?!)" if pattern is None else pattern).fullmatch


def _shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  return {path: tuple(leaf.shape) for path, leaf in tree.items()}


def _everywhere(abstract: Abstract) -> jax.sharding.Sharding:
  """The whole array on every device of the mesh."""
  mesh = next(iter(abstract.values())).sharding.mesh
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _check_fields(
    system: Any,
    donor: Any,
    path: os.PathLike[str] | str,
    where: str = "config.system",
    free: Collection[str] = (),
) -> None:
  """Refuses a checkpoint whose network computes something else."""
  lines = [
      f"  {name}: {theirs!r} there, {ours!r} here"
      for name, ours, theirs in _different(system, donor, where)
      if name.rpartition(".")[2] not in free
  ]
  if lines:
    raise ValueError(
        f"{path}: its system is not that of the config; set these keys:\n"
        + "\n".join(lines)
    )


def _different(
    ours: Any, theirs: Any, where: str
) -> list[tuple[str, Any, Any]]:
  """(place, ours, theirs) of the fields in which two modules differ.

  Functions are not compared, nor fields that another kind of module lacks.
  """
  found = []
  alike = type(ours) is type(theirs)
  for field in dataclasses.fields(ours):
    if not alike and not hasattr(theirs, field.name):
      continue
    a, b = (getattr(module, field.name) for module in (ours, theirs))
    place = f"{where}.{field.name}"
    if dataclasses.is_dataclass(a) and type(a) is type(b):
      found += _different(a, b, place)
    elif field.name not in _FREE_FIELDS and not _is_function(a) and a != b:
      found.append((place, a, b))
  return found


def _is_function(value: Any) -> bool:
  return callable(value) and not dataclasses.is_dataclass(value)


def _moved_grids(
    wanted: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, int, int]]:
  """path -> (prefix, old side, new side) of tables that must be resampled."""
  found = {}
  for path, leaf in wanted.items():
    old, new = stored.get(path, ()), tuple(leaf.shape)
    owner = path.removesuffix("position/table")
    # The positions of a text have no patches beside them.
    is_grid = owner != path and f"{owner}patch/kernel" in wanted
    if is_grid and len(old) == 2 and old[1:] == new[1:] and old != new:
      for prefix in range(min(old[0], new[0])):
        sides = math.isqrt(old[0] - prefix), math.isqrt(new[0] - prefix)
        if [s * s for s in sides] == [old[0] - prefix, new[0] - prefix]:
          found[path] = (prefix, *sides)
          break
  return found


def _moved_rows(
    wanted: Mapping[str, Any],
    stored: Mapping[str, tuple[int, ...]],
    deeper: str | None,
    longer: str | None,
) -> set[str]:
  """The paths that have more blocks there, or fewer rows, and may."""
  is_deeper, is_longer = _matcher(deeper), _matcher(longer)
  found = set()
  for path, leaf in wanted.items():
    old, new = stored.get(path, ()), tuple(leaf.shape)
    axis = _only_difference(old, new)
    if axis is None:
      continue
    if (axis == 0 and old[0] > new[0] and is_deeper(path)) or (
        old[axis] < new[axis] and is_longer(path)
    ):
      found.add(path)
  return found


def _only_difference(
    old: tuple[int, ...], new: tuple[int, ...]
) -> int | None:
  """The one axis in which two shapes differ; None if there is no such axis."""
  if len(old) != len(new):
    return None
  axes = [i for i, sizes in enumerate(zip(old, new)) if len({*sizes}) > 1]
  return axes[0] if len(axes) == 1 else None


def _refit(array: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  """The first rows; or all, and their mean in the rows behind."""

  def refit(array: jax.Array) -> jax.Array:
    axis = _only_difference(array.shape, leaf.shape)
    count = leaf.shape[axis] - array.shape[axis]
    if count <= 0:
      return array[: leaf.shape[0]]
    mean = array.mean(axis=axis, keepdims=True)
    return jnp.concatenate([array, jnp.repeat(mean, count, axis)], axis)

  return jax.jit(refit, out_shardings=leaf.sharding)(array)


def _resample(
    table: jax.Array,
    leaf: jax.ShapeDtypeStruct,
    prefix: int,
    old: int,
    new: int,
    method: str,
) -> jax.Array:
  """A table f32[prefix + old * old, D] for a grid of new * new patches."""

  def resample(table: jax.Array) -> jax.Array:
    grid = position.resample_grid(
        table[prefix:], (old, old), (new, new), method
    )
    return jnp.concatenate([table[:prefix], grid])

  return jax.jit(resample, out_shardings=leaf.sharding)(table)


