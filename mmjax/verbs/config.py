"""mmjax config --config FILE[:ARGUMENTS] [--config.KEY=VALUE ...] [--devices N]

Prints the config with every value filled in, checks all that `mmjax train`
would check before it starts, and says what would be trained.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from mmjax import verbs

if TYPE_CHECKING:
  from mmjax.train.plan import Plan


def main(argv: Sequence[str]) -> int:
  """Runs the verb; see `mmjax.verbs` for the exit codes."""
  return verbs.run(__doc__, argv, _define, _config)


def _define(values: flags.FlagValues, argv: Sequence[str]) -> None:
  verbs.define_config(values, argv)
  flags.DEFINE_integer(
      "devices",
      None,
      "number of devices of the mesh; those of this machine by default",
      lower_bound=1,
      flag_values=values,
  )


def _config(values: flags.FlagValues) -> int:
  import jax  # Slow, and --help does not need it.

  from mmjax import sharding
  from mmjax.train import loop, plan

  print(text(values.config))
  sizes = sharding.fill_mesh_shape(
      values.config.mesh, values.devices or jax.device_count()
  )
  mesh = jax.sharding.AbstractMesh(
      tuple(sizes.values()),
      tuple(sizes),
      axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
  )
  found = plan.make_plan(values.config, mesh)
  loop.make_evaluators(values.config)
  print(describe(found))
  print("ok")
  return verbs.DONE


def text(config: Mapping[str, Any]) -> str:
  """A config as YAML, all references resolved."""
  import yaml

  from mmjax.train import checkpoint

  return yaml.safe_dump(
      checkpoint.resolved(config), sort_keys=True, default_flow_style=False
  )


def describe(plan: "Plan") -> str:
  """What a plan trains, reads and reports, a line each."""
  from mmjax.train.plan import count
  from mmjax.train.state import bytes_per_device

  def size(leaves: Mapping[str, Any]) -> str:
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
    return f"{count(leaves):,} parameters, {nbytes / 1e6:,.1f} MB"

  shapes = ", ".join(
      f"{key} {leaf.dtype}{list(leaf.shape)}"
      for key, leaf in plan.batch.items()
  )
  axes = " x ".join(f"{name} {n}" for name, n in plan.mesh.shape.items())
  state = bytes_per_device(plan.state) / 1e6
  return "\n".join([
      f"system   {type(plan.stage.system).__name__}",
      f"trained  {size(plan.state.live)}",
      f"frozen   {size(plan.state.frozen)}",
      f"state    {state:,.1f} MB per device, optimizer included",
      f"mesh     {axes}",
      f"batch    {shapes}",
      f"metrics  {', '.join(plan.metrics)}",
  ])
