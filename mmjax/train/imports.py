"""Whose parameters does a stage start from? The functions of `Stage.imports`.

Each is called as `(system, abstract) -> {path: array}`, where `abstract` holds
the shape, dtype and sharding of every parameter of the system, and gives the
parameters that are then not drawn at random.
"""

from collections.abc import Mapping
import dataclasses
import math
import os
import pathlib
import re
import sys
from typing import Any

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
  if (folder / "checkpoints").is_dir():
    return _from_run(system, abstract, folder, skip, step)
  if not folder.exists():
    raise FileNotFoundError(
        f"{folder}: expected a run directory, a transformers directory, or a "
        ".npz or .safetensors file"
    )
  layout, donor, table, source = _open_foreign(system, folder)
  shapes, _ = pretrained.abstract_params(layout, donor)
  _check_fields(system, donor, folder)
  select = _Selection(abstract, _shapes(shapes), skip, str(folder))
  shardings = {
      path: abstract[path].sharding
      if path in select.wanted and path not in select.grids
      else _everywhere(abstract)
      for path in shapes
  }
  found = engine.load(source, table, shapes, shardings=shardings)
  return select.finish(found, system)


def _from_run(
    system: Any,
    abstract: Abstract,
    folder: pathlib.Path,
    skip: str | None,
    step: int | None,
) -> Params:
  checkpoint.stored_config(folder)
  with checkpoint.Checkpoints(folder) as checkpoints:
    step = checkpoints.step(step)
    stored = {
        path.split("/", 1)[1]: (path, shape)
        for path, shape in checkpoints.shapes(step).items()
        if path.startswith(("live/", "frozen/"))
    }
    shapes = {path: shape for path, (_, shape) in stored.items()}
    select = _Selection(abstract, shapes, skip, f"{folder}, step {step}")
    place = _everywhere(abstract)
    read = checkpoints.read(
        {
            stored[path][0]: jax.ShapeDtypeStruct(
                shapes[path], leaf.dtype, sharding=place
            )
            if path in select.grids
            else leaf
            for path, leaf in select.wanted.items()
        },
        step,
    )
  found = {path: read[stored[path][0]] for path in select.wanted}
  return select.finish(found, system)


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


class _Selection:
  """Which stored parameters fill which of ours, checked.

  Attributes:
    wanted: those of ours that are filled.
    grids: path -> (prefix, old side, new side) of tables to resample.
  """

  def __init__(
      self,
      abstract: Abstract,
      stored: Mapping[str, tuple[int, ...]],
      skip: str | None,
      where: str,
  ) -> None:
    """Compares both sides; see `from_checkpoint` for the errors."""
    skipped = re.compile(skip if skip is not None else r"(?!)").fullmatch
    if skip is not None and not any(map(skipped, (*abstract, *stored))):
      raise ValueError(
          f"skip={skip!r} matches no parameter of this system or of {where}"
          + config_lib.nearest(skip, abstract)
      )
    self.wanted = {p: s for p, s in abstract.items() if not skipped(p)}
    self.grids = _moved_grids(self.wanted, stored)
    faults = checkpoint.faults(
        {p: s for p, s in self.wanted.items() if p not in self.grids}, stored
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

  def finish(self, found: Params, system: Any) -> Params:
    """The wanted parameters, resampled where the grid differs."""
    method = getattr(system, "resample", "bicubic")
    return {
        path: _resample(found[path], leaf, *self.grids[path], method)
        if path in self.grids
        else found[path]
        for path, leaf in self.wanted.items()
    }


def _shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  return {path: tuple(leaf.shape) for path, leaf in tree.items()}


def _everywhere(abstract: Abstract) -> jax.sharding.Sharding:
  """The whole array on every device of the mesh."""
  mesh = next(iter(abstract.values())).sharding.mesh
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _check_fields(system: Any, donor: Any, path: os.PathLike[str]) -> None:
  """Refuses a checkpoint whose network computes something else."""
  lines = [
      f"  {name}: {theirs!r} there, {ours!r} here"
      for name, ours, theirs in _different(system, donor, "config.system")
  ]
  if lines:
    raise ValueError(
        f"{path}: its system is not that of the config; set these keys:\n"
        + "\n".join(lines)
    )


def _different(
    ours: Any, theirs: Any, where: str
) -> list[tuple[str, Any, Any]]:
  """(place, ours, theirs) of the fields in which two modules differ."""
  found = []
  for field in dataclasses.fields(ours):
    a, b = (getattr(module, field.name, None) for module in (ours, theirs))
    place = f"{where}.{field.name}"
    if dataclasses.is_dataclass(a) and type(a) is type(b):
      found += _different(a, b, place)
    elif field.name not in _FREE_FIELDS and a != b:
      found.append((place, a, b))
  return found


def _moved_grids(
    wanted: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, int, int]]:
  """path -> (prefix, old side, new side) of tables that must be resampled."""
  found = {}
  for path, leaf in wanted.items():
    old, new = stored.get(path, ()), tuple(leaf.shape)
    is_table = f"/{path}".endswith("/encoder/position/table")
    if is_table and len(old) == 2 and old[1:] == new[1:] and old != new:
      for prefix in range(min(old[0], new[0])):
        sides = math.isqrt(old[0] - prefix), math.isqrt(new[0] - prefix)
        if [s * s for s in sides] == [old[0] - prefix, new[0] - prefix]:
          found[path] = (prefix, *sides)
          break
  return found


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


