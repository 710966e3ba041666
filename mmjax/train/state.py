"""What changes while training? The state, and where it lives on the mesh.

Parameters are flat dicts `path -> array`, split into live and frozen ones, so
that a frozen parameter costs neither gradient nor optimizer state.
"""

from collections.abc import Mapping
import inspect
from typing import Any

from flax import traverse_util
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from mmjax import sharding
from mmjax.nn import partitioning
from mmjax.train.stage import Stage

Flat = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
  """Everything that a checkpoint holds, beside the data iterator.

  Attributes:
    step: i32[], steps taken, skipped ones included.
    rng: u32[2], key data; fixed for a run, folded with the step.
    live: the parameters that are trained.
    frozen: the parameters that are not.
    mutables: variable collections that objectives return (codebooks, moving
      norms), `collection -> tree`.
    opt: optimizer state of the live parameters.
    shadow: slow copies of live parameters (EMA, teacher, fixed reference).
    skipped: i32[], steps that were not finite.
    skipped_in_a_row: i32[], those since the last finite one.
  """

  step: jax.Array
  rng: jax.Array
  live: Flat
  frozen: Flat
  mutables: dict[str, Any]
  opt: Any
  shadow: Flat
  skipped: jax.Array
  skipped_in_a_row: jax.Array

  def key(self) -> jax.Array:
    """The PRNG key of the current step."""
    return jax.random.fold_in(jax.random.wrap_key_data(self.rng), self.step)

  def variables(self, shadow: bool = False) -> dict[str, Any]:
    """The variables for `system.apply`, with shadow parameters if asked."""
    params = self.frozen | self.live | (self.shadow if shadow else {})
    return {"params": nest(params)} | self.mutables


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dicts to `"a/b/c" -> leaf`."""
  return traverse_util.flatten_dict(tree, sep="/")


def nest(tree: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flat`."""
  return traverse_util.unflatten_dict(tree, sep="/")


def inputs(system: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
  """The batch leaves that the system's `__call__` takes, by name.

  Raises:
    ValueError: if the batch lacks a required one.
  """
  parameters = inspect.signature(type(system).__call__).parameters
  names = [name for name in parameters if name != "self"]
  missing = [
      name
      for name in names
      if name not in batch
      and parameters[name].default is inspect.Parameter.empty
  ]
  if missing:
    raise ValueError(
        f"{type(system).__name__} takes the batch keys {names}; the batch has "
        f"{sorted(batch)} and lacks {missing}"
    )
  return {name: batch[name] for name in names if name in batch}


def boxed_variables(system: Any, batch: Mapping[str, Any]) -> Any:
  """Abstract variables of a system, boxed with their logical axes."""
  example = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
      for name, leaf in inputs(system, batch).items()
  }
  return jax.eval_shape(
      lambda rng, example: system.init(_init_rngs(rng), **example),
      jax.random.key(0),
      example,
  )


def _init_rngs(rng: jax.Array) -> dict[str, jax.Array]:
  return dict(zip(("params", "dropout"), jax.random.split(rng)))


def make_init(
    stage: Stage,
    batch: Mapping[str, Any],
    mesh: Mesh,
    imported: Mapping[str, Any] | None = None,
) -> tuple[Any, TrainState]:
  """Builds the function that makes the first state, and the state's shape.

  Args:
    stage: the stage.
    batch: arrays or ShapeDtypeStructs of one global batch.
    mesh: the device mesh.
    imported: flat `path -> array` of parameters that are not drawn at random.

  Returns:
    A jitted function of `(seed i32[], imported)` that makes the state right in
    its shardings, drawing nothing that is imported; and the abstract state,
    whose leaves are ShapeDtypeStructs with shardings.

  Raises:
    ValueError: if rules and parameters do not fit.
  """
  boxed = boxed_variables(stage.system, batch)
  shapes = partitioning.unbox(boxed)
  axes = flat(partitioning.axes(boxed["params"]))
  live = stage.live_paths(flat(shapes["params"]))
  rows = {
      name: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype)
      for name, leaf in inputs(stage.system, batch).items()
  }

  def init(seed: jax.Array, imported: Flat) -> TrainState:
    key = jax.random.key(seed)
    variables = partitioning.unbox(
        stage.system.init(_init_rngs(jax.random.fold_in(key, 0)), **rows)
    )
    return begin(variables, jax.random.fold_in(key, 1), imported)

  def begin(variables: Any, key: jax.Array, imported: Flat) -> TrainState:
    mutables = dict(variables)
    params = flat(mutables.pop("params")) | imported
    return TrainState(
        step=jnp.int32(0),
        rng=jax.random.key_data(key),
        live={path: params[path] for path in live},
        frozen={
            path: leaf.astype(stage.frozen_dtype)
            for path, leaf in params.items()
            if path not in live
        },
        mutables=mutables,
        opt=stage.optimizer(params).init({p: params[p] for p in live}),
        shadow={p: jnp.copy(params[p]) for p in stage.shadow_decay(live)},
        skipped=jnp.int32(0),
        skipped_in_a_row=jnp.int32(0),
    )

  imported = dict(imported or {})
  state = jax.eval_shape(begin, shapes, jax.random.key(0), imported)
  placed = _shardings(state, axes, mesh)
  state = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=place
      ),
      state,
      placed,
  )
  return jax.jit(init, out_shardings=placed), state


def _shardings(state: TrainState, axes: Mapping[str, Any], mesh: Mesh) -> Any:
  """Shardings of a state: a leaf keyed by a path lives like its parameter."""

  def place(keys: tuple[Any, ...], leaf: Any) -> jax.sharding.NamedSharding:
    path = getattr(keys[-1], "key", None)
    names = axes.get(path)
    # Factored or scalar statistics are keyed by a path too but have another
    # rank; they are small.
    if names is None or len(names) != leaf.ndim:
      return sharding.replicated(mesh)
    return jax.sharding.NamedSharding(
        mesh, sharding.spec(names, leaf.shape, mesh)
    )

  return jax.tree_util.tree_map_with_path(place, state)


def apply_gradients(
    stage: Stage, state: TrainState, grads: Flat, mutables: Any
) -> TrainState:
  """Moves the live parameters, and after them their slow copies."""
  optimizer = stage.optimizer([*state.live, *state.frozen])
  updates, opt = optimizer.update(
      grads, state.opt, state.live, frozen=state.frozen
  )
  live = optax.apply_updates(state.live, updates)
  decay = stage.shadow_decay(live)
  shadow = {
      path: slow + (1 - decay[path]) * (live[path] - slow)
      if decay[path] < 1
      else slow
      for path, slow in state.shadow.items()
  }
  return state.replace(live=live, opt=opt, mutables=mutables, shadow=shadow)


def select(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
  """`new` if `finite`, else `old`; the step and its counters always move."""
  kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
  skip = jnp.where(finite, 0, 1).astype(jnp.int32)
  return kept.replace(
      step=old.step + 1,
      skipped=old.skipped + skip,
      skipped_in_a_row=(old.skipped_in_a_row + 1) * skip,
  )


def bytes_per_device(tree: Any) -> int:
  """Bytes of one device's share of a tree of (abstract) sharded arrays."""
  return sum(
      int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(tree)
  )
