"""Where does every array live? The mesh, and the logical axes mapped on it.

`nn/` names the axes of parameters and activations with the words of `RULES`;
this file alone says which mesh axes carry them. A rule is a preference: a mesh
axis is used at most once per array, and only where it divides the dimension.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

from mmjax.perf import topology

# data: replicated parameters; fsdp: parameters sharded, gathered when used;
# tensor: heads, hidden units and vocabulary split; context: the sequence split.
AXES = ("data", "fsdp", "tensor", "context")

RULES: dict[str, tuple[str, ...]] = {
    # Activations.
    "batch": ("data", "fsdp"),
    "length": ("context",),
    # Parameters, and activations inside a block.
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    # Never split: one head, one patch, positions, stacked layers, one joint
    # space of embeddings.
    "head_dim": (),
    "patch": (),
    "position": (),
    "layers": (),
    "joint": (),
}

# A leaf below this many elements may stay whole on every device.
SMALL_LEAF = 2**16


def make_mesh(
    shape: Mapping[str, int] | None = None,
    devices: Sequence[Any] | None = None,
) -> Mesh:
  """Builds the device mesh with the axes of `AXES`.

  Args:
    shape: axis name -> size; absent axes have size 1, and one axis may be -1,
      which takes the devices that are left. The default is `{"data": -1}`.
    devices: the devices to use; all of `jax.devices()` by default.

  Returns:
    A mesh with axes `("data", "fsdp", "tensor", "context")`, all `Auto`.

  Raises:
    ValueError: for an unknown axis, or if the sizes do not multiply to the
      number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = fill_mesh_shape(shape or {"data": -1}, len(devices))
  # Not `jax.make_mesh`: it refuses several slices and split torus axes.
  return Mesh(
      topology.arrange(tuple(sizes.values()), devices),
      AXES,
      axis_types=(AxisType.Auto,) * len(AXES),
  )


def fill_mesh_shape(
    shape: Mapping[str, int], num_devices: int
) -> dict[str, int]:
  """Resolves -1 and absent axes of a mesh shape, in the order of `AXES`."""
  unknown = sorted(set(shape) - set(AXES))
  if unknown:
    raise ValueError(
        f"mesh: unknown axes {unknown}; the axes are {list(AXES)}"
    )
  sizes = {axis: int(shape.get(axis, 1)) for axis in AXES}
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or any(s < 1 and s != -1 for s in sizes.values()):
    raise ValueError(
        f"mesh: sizes must be positive, at most one of them -1; got {sizes}"
    )
  if free and num_devices % fixed == 0:
    sizes[free[0]] = num_devices // fixed
  if math.prod(sizes.values()) != num_devices:
    raise ValueError(
        f"mesh: {dict(shape)} needs a product of {num_devices} devices; "
        f"change the sizes or set one of them to -1"
    )
  return sizes


def spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Any
) -> PartitionSpec:
  """Maps the logical axes of one array to a partition spec.

  Args:
    names: one logical axis, or None, per dimension.
    shape: the dimensions.
    mesh: a `Mesh` or `AbstractMesh`; only its axis sizes are read.

  Returns:
    A spec in which a mesh axis appears at most once and divides its dimension.
  """
  if len(names) != len(shape):
    raise ValueError(f"axes {tuple(names)} do not name shape {tuple(shape)}")
  sizes = dict(mesh.shape)
  taken: set[str] = set()
  entries = []
  for name, dim in zip(names, shape):
    axes = []
    for axis in RULES[name] if name is not None else ():
      parts = sizes.get(axis, 1)
      if axis not in taken and parts > 1 and dim % parts == 0:
        axes.append(axis)
        taken.add(axis)
        dim //= parts
    entries.append(tuple(axes) or None)
  return PartitionSpec(*entries)


def use(mesh: Mesh | AbstractMesh) -> contextlib.AbstractContextManager[Any]:
  """The context in which programs for a mesh are traced."""
  if isinstance(mesh, AbstractMesh):
    return jax.sharding.use_abstract_mesh(mesh)
  return jax.set_mesh(mesh)


def axis_size(axis: str) -> int:
  """The size of an axis of the ambient mesh; 1 without a mesh."""
  return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Pins an activation to its logical axes; does nothing without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
  """Shardings for a tree of arrays.

  Args:
    axes: tree of tuples of logical axis names, as `nn.partitioning.axes` gives.
    shapes: tree of arrays or `ShapeDtypeStruct` of the same structure.
    mesh: the device mesh.

  Returns:
    A tree of `NamedSharding`.
  """
  return jax.tree.map(
      lambda leaf, names: NamedSharding(mesh, spec(names, leaf.shape, mesh)),
      shapes,
      axes,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of scalars and of everything every device must hold."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of one batch leaf: its first dimension over the batch axes."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def split_rows(batch: Any, count: int) -> Any:
  """Reshapes leaves [B, ...] to [count, B / count, ...].

  Part i takes the rows i, i + count, ...: with the batch sharded in contiguous
  blocks, every device finds an equal share of each part among its own rows.
  """

  def split(x: jax.Array) -> jax.Array:
    x = jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)
    return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

  return jax.tree.map(split, batch)


def merge_rows(parts: Any) -> Any:
  """The inverse of `split_rows`."""

  def merge(x: jax.Array) -> jax.Array:
    x = jnp.swapaxes(x, 0, 1)
    x = x.reshape(-1, *x.shape[2:])
    return constrain(x, "batch", *(None,) * (x.ndim - 1))

  return jax.tree.map(merge, parts)


def by_chunks(
    function: Callable[[Any], tuple[Any, Any]], rows: Any, chunks: int
) -> tuple[Any, Any]:
  """`function` of all rows, a part at a time, forward and, anew, backward.

  Only what it returns is kept of the other parts: the gradient stays exact and
  memory is that of one chunk (Gao et al. 2021, GradCache).

  Args:
    function: maps a tree of [b, ...] to a tree of [b, ...], row by row, and a
      tree of sums over rows.
    rows: a tree of [B, ...].
    chunks: how many parts, a divisor of B; 1 calls the function as it is.
  """
  if chunks == 1:
    return function(rows)
  parts = split_rows(rows, chunks)
  found, sums = jax.lax.map(jax.checkpoint(function), parts)
  return (
      merge_rows(found),
      jax.tree.map(lambda part: part.sum(axis=0), sums),
  )


def pass_on(arrays: Any, axes: str | tuple[str, ...]) -> Any:
  """Gives a tree to the next device of a ring, and takes the last one's.

  To be called within `jax.shard_map`; the ring runs along the mesh `axes`.
  """
  count = jax.lax.axis_size(axes)
  return jax.lax.ppermute(
      arrays, axes, [(i, (i + 1) % count) for i in range(count)]
  )


def batch_parts(mesh: Any) -> int:
  """Into how many parts a mesh splits the batch."""
  sizes = dict(mesh.shape)
  return math.prod(sizes.get(axis, 1) for axis in RULES["batch"])
