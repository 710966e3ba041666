"""mmjax bench checkpoint [--sizes SYSTEM:SIZE[:BATCH],...] [--folder DIR]

Measures what saving costs a run: how long the loop stands still before the next
step may start, and how much slower the steps are while the checkpoint is
written and its digests are taken in the background. Systems are made as those
of `mmjax bench train`; the rounds are saves.
"""

from collections.abc import Iterator, Mapping
import pathlib
import statistics
import tempfile
import time
from typing import Any

from absl import flags

from mmjax.verbs import _bench_train

Row = dict[str, Any]


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  flags.DEFINE_list(
      "sizes",
      ["vit:b16:8"],
      "what to save: SYSTEM:SIZE or SYSTEM:SIZE:BATCH",
      flag_values=values,
  )
  flags.DEFINE_integer(
      "batch",
      8,
      "examples in a step, where --sizes does not say",
      lower_bound=1,
      flag_values=values,
  )
  flags.DEFINE_string(
      "configs", "configs", "directory of config files", flag_values=values
  )
  flags.DEFINE_string(
      "folder",
      None,
      "where to write and delete the checkpoints; for temporary files by "
      "default",
      flag_values=values,
  )


def prepare(values: flags.FlagValues) -> dict[str, Any]:
  """The config behind each of --sizes; see `_bench_train.load`."""
  return {
      where: _bench_train.load(values.configs, where, values.batch)
      for where in values.sizes
  }


def rows(
    configs: Mapping[str, Any],
    values: flags.FlagValues,
    report: Mapping[str, Any],
) -> Iterator[Row]:
  """The rows of the table, as they are measured."""
  del report
  for where, config in configs.items():
    with tempfile.TemporaryDirectory(dir=values.folder) as folder:
      row = measure(config, values.rounds, pathlib.Path(folder))
    yield row | {"size": where, "batch": config.batch_size}


def measure(config: Any, rounds: int, folder: pathlib.Path) -> Row:
  """Takes steps, and saves after some of them."""
  import jax

  from mmjax import sharding
  from mmjax.train import checkpoint
  from mmjax.train import plan as plan_lib

  mesh = sharding.make_mesh(config.mesh)
  with (
      jax.set_mesh(mesh),
      checkpoint.Checkpoints(folder, keep=1) as checkpoints,
  ):
    plan = plan_lib.make_plan(config, mesh)
    batch = jax.tree.map(
        lambda leaf: jax.device_put(
            jax.numpy.zeros(leaf.shape, leaf.dtype), leaf.sharding
        ),
        plan.batch,
    )
    lowered = plan.step.lower(plan.state, plan.batch)
    step = plan_lib.compile_for(mesh, lowered)
    state = plan_lib.first_state(plan)
    found: dict[str, list[float]] = {
        "step": [], "blocked": [], "beside": [], "whole": []
    }
    for number in range(-1, rounds):
      begin = time.perf_counter()
      state = jax.block_until_ready(step(state, batch)[0])
      stepped = time.perf_counter()
      # What the loop does: the next step starts when `save` returns.
      checkpoints.save(number + 2, state, {}, {})
      saved = time.perf_counter()
      state = jax.block_until_ready(step(state, batch)[0])
      beside = time.perf_counter()
      checkpoints.wait()
      whole = time.perf_counter()
      if number >= 0:  # The first round warms up.
        found["step"].append(stepped - begin)
        found["blocked"].append(saved - stepped)
        found["beside"].append(beside - saved)
        found["whole"].append(whole - stepped)
  medians = {name: statistics.median(times) for name, times in found.items()}
  return medians | {
      "rounds": found,
      "parameters": plan_lib.count(plan.parameters),
      "bytes": sum(
          leaf.size * leaf.dtype.itemsize
          for leaf in jax.tree.leaves(plan.state)
      ),
      "share": medians["blocked"] / medians["step"],
  }


def heading() -> str:
  """The names of the columns."""
  return (
      f"{'size':16}{'batch':>6}{'parameters':>14}{'MB':>8}{'step ms':>10}"
      f"{'blocked ms':>12}{'of a step':>11}{'step beside ms':>16}{'whole s':>9}"
  )


def line(row: Row) -> str:
  """One row of the table."""
  return (
      f"{row['size']:16}{row['batch']:6,}{row['parameters']:14,}"
      f"{row['bytes'] / 1e6:8,.0f}{1e3 * row['step']:10,.0f}"
      f"{1e3 * row['blocked']:12,.0f}{row['share']:11.1%}"
      f"{1e3 * row['beside']:16,.0f}{row['whole']:9.1f}"
  )
