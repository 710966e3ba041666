"""What would a config run? Everything that can be known without memory or time.

The loop runs a plan, the compile verb compiles one, and the config verb only
makes one, so that all three find the same faults.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import config as config_lib
from mmjax import sharding
from mmjax.data import mixture
from mmjax.perf import chips, flops
from mmjax.train.stage import Stage, from_config
from mmjax.train.state import TrainState, inputs, make_init
from mmjax.train.step import train_step

# By default the TPU compiler turns products with sharded parameters into rings
# of small products that read and write their sum at every turn: for CLIP L/14
# on 16 chips that is four times the memory traffic of gathering first.
TPU_OPTIONS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}

Abstract = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a config would run.

  Attributes:
    stage: what is trained, and how.
    streams: what is read, and in which proportions.
    mesh: where.
    batch: key -> global shape, dtype and sharding of what the step reads.
    init: jitted `(seed i32[], imported) -> TrainState`.
    state: the abstract state, with shardings.
    step: the jitted train step, see `make_step`; traced already.
    metrics: the names of the numbers that a step returns.
  """

  stage: Stage
  streams: Sequence[mixture.Stream]
  mesh: Any
  batch: Abstract
  init: Callable[..., TrainState]
  state: TrainState
  step: Any
  metrics: tuple[str, ...]

  @property
  def parameters(self) -> Abstract:
    """path -> shape, dtype and sharding, live and frozen."""
    return self.state.live | self.state.frozen


def make_plan(config: Mapping[str, Any], mesh: Any) -> Plan:
  """Checks all of a config that needs no device memory, and builds its stage.

  Args:
    config: see `mmjax.config.base`.
    mesh: a `Mesh`, or an `AbstractMesh` for a plan that is not run.

  Raises:
    ValueError: naming what is wrong: a key of the config, a stream without a
      key, a batch that the mesh does not divide, rules or weights that do not
      fit.
  """
  stage = from_config(config)
  stage.check_mesh(sharding.batch_parts(mesh))
  if not config["streams"]:
    raise ValueError("config.streams: needs at least one stream")
  streams = [
      config_lib.build(
          {"type": "mmjax.data.mixture:Stream", **node}, f"config.streams[{i}]"
      )
      for i, node in enumerate(config["streams"])
  ]
  batch = _abstract_batch(stage, streams, mesh)
  init, state = make_init(stage, batch, mesh)
  step = make_step(stage, state, mesh)
  with sharding.use(mesh):
    _, found = step.eval_shape(state, batch)
  return Plan(
      stage, streams, mesh, batch, init, state, step, tuple(sorted(found))
  )


def _abstract_batch(
    stage: Stage, streams: Sequence[mixture.Stream], mesh: Any
) -> Abstract:
  """The leaves that the step reads; every stream must give them alike."""
  batches = []
  for i, stream in enumerate(streams):
    example = stream.example(0)
    where = f"config.streams[{i}] ({type(stream.source).__name__})"
    stage.check_stream(example, where)
    keys = {*stage.needs, *inputs(stage.system, _rows(example, 1))}
    batches.append(
        _rows({key: example[key] for key in sorted(keys)}, stage.batch_size)
    )
    if batches[i] != batches[0]:
      raise ValueError(
          f"{where} gives other shapes than config.streams[0]: "
          f"{batches[i]} and {batches[0]}"
      )
  place = sharding.batch_sharding(mesh)
  return {
      key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
      for key, leaf in batches[0].items()
  }


def _rows(example: Mapping[str, Any], count: int) -> Abstract:
  arrays = {key: np.asarray(leaf) for key, leaf in example.items()}
  return {
      key: jax.ShapeDtypeStruct(
          (count, *leaf.shape), jax.dtypes.canonicalize_dtype(leaf.dtype)
      )
      for key, leaf in arrays.items()
      if leaf.dtype.kind in "biuf"
  }


def make_step(stage: Stage, state: TrainState, mesh: Any) -> Any:
  """The jitted train step: `(state, batch) -> (state, metrics)`.

  The state is donated. To the metrics of `train_step` it adds the counters
  `skipped` and `skipped_in_a_row`, which the state takes along otherwise.

  Args:
    stage: what is trained.
    state: abstract, with shardings.
    mesh: the device mesh; trace and call it under `jax.set_mesh(mesh)`.
  """

  def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
    state, found = train_step(stage, state, batch)
    counters = dict(
        skipped=state.skipped, skipped_in_a_row=state.skipped_in_a_row
    )
    return state, found | counters

  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  return jax.jit(
      step,
      donate_argnums=0,
      in_shardings=(places, sharding.batch_sharding(mesh)),
      out_shardings=(places, sharding.replicated(mesh)),
  )


def compile_for(mesh: Any, lowered: Any) -> Any:
  """Compiles a lowered step with the options of the mesh's platform."""
  on_tpu = mesh.devices.flat[0].platform == "tpu"
  return lowered.compile(compiler_options=TPU_OPTIONS if on_tpu else None)


def first_state(plan: Plan) -> TrainState:
  """Draws or imports the parameters of step 0, right in their shardings.

  Raises:
    ValueError: if an import gives a parameter that the system lacks, or one of
      another shape.
  """
  imported: dict[str, jax.Array] = {}
  abstract = plan.parameters
  for give in plan.stage.imports:
    imported |= give(plan.stage.system, abstract)
  wrong = [
      f"  {path}: {leaf.shape}, expected "
      f"{abstract[path].shape if path in abstract else 'no such parameter'}"
      for path, leaf in imported.items()
      if path not in abstract or leaf.shape != abstract[path].shape
  ]
  if wrong:
    raise ValueError("config.imports:\n" + "\n".join(wrong))
  return plan.init(jnp.int32(plan.stage.seed), imported)


def count(leaves: Mapping[str, Any]) -> int:
  """Numbers in a flat dict of arrays."""
  return sum(leaf.size for leaf in leaves.values())


def summary(plan: Plan, start: int = 0) -> str:
  """A few lines that say what is about to run."""
  live, frozen = count(plan.state.live), count(plan.state.frozen)
  axes = ", ".join(f"{k} {v}" for k, v in plan.mesh.shape.items() if v > 1)
  device = plan.mesh.devices.flat[0]
  resumed = f", from step {start:,}" if start else ""
  return (
      f"{type(plan.stage.system).__name__}: {live + frozen:,} parameters, "
      f"{live:,} trained, {frozen:,} frozen\n"
      f"{plan.mesh.size} x {device.device_kind}"
      + (f" (mesh: {axes})" if axes else "")
      + f", batch {plan.stage.batch_size:,}, {plan.stage.steps:,} steps"
      + resumed
  )


def ideal_seconds(plan: Plan) -> float | None:
  """Seconds of a step at the peak of the chips, or None where it is unknown."""
  chip = chips.from_device_kind(plan.mesh.devices.flat[0].device_kind)
  if chip is None:
    return None
  work = flops.count(
      functools.partial(train_step, plan.stage), plan.state, plan.batch
  )
  dtype = max(work.by_dtype, key=work.by_dtype.get)
  return work.model / (chip.peak(dtype) * plan.mesh.size)
