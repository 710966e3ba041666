"""mmjax bench train [--sizes SYSTEM:SIZE[:BATCH],...] [--json FILE]

Measures train steps on the devices of this machine. On a CPU where PyTorch is
installed it measures the same networks there too, eager and through
torch.compile: equal parameters, batch, loss, optimizer and number of threads,
after a check that loss and gradient agree. Systems and optimizers are those of
the configs, but plain: float32, no dropout, label smoothing, rematerialisation,
accumulation nor moving averages.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
import pathlib
import re
import statistics
from typing import Any

from absl import flags
import ml_collections

from mmjax import verbs
from mmjax.verbs import _timing

# How far loss and gradient norm may differ, relatively: float32 rounding.
TOLERANCE = 1e-4

# What makes two implementations comparable, by key of systems and objectives.
PLAIN = dict(
    dtype="float32", dropout=0.0, remat="none", smoothing=0.0, chunks=1,
    pool="token",
)

TWINS = "mmjax.verbs._bench_torch:contestants"

Row = dict[str, Any]


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  flags.DEFINE_list(
      "sizes",
      ["vit:tiny", "clip:tiny"],
      "what to measure: SYSTEM:SIZE or SYSTEM:SIZE:BATCH",
      flag_values=values,
  )
  flags.DEFINE_integer(
      "batch",
      128,
      "examples in a step, where --sizes does not say",
      lower_bound=1,
      flag_values=values,
  )
  flags.DEFINE_string(
      "configs", "configs", "directory of config files", flag_values=values
  )


def prepare(values: flags.FlagValues) -> dict[str, Any]:
  """The config behind each of --sizes; see `load`."""
  return {
      where: load(values.configs, where, values.batch)
      for where in values.sizes
  }


def rows(
    configs: Mapping[str, Any],
    values: flags.FlagValues,
    report: Mapping[str, Any],
) -> Iterator[Row]:
  """The rows of the table, as they are measured."""
  for where, config in configs.items():
    for row in measure(config, values.rounds, values.patience):
      yield row | {"size": where, "share": row["flop_rate"] / report["peak"]}


def load(folder: str, where: str, batch: int) -> Any:
  """The config behind `SYSTEM:SIZE[:BATCH]`, simplified to be comparable.

  Raises:
    ValueError: if `where` is not of that form, or the size does not exist.
    FileNotFoundError: if the system does not exist.
  """
  found = re.fullmatch(r"(\w+):(\w+)(?::([1-9]\d*))?", where)
  if found is None:
    raise ValueError(
        f"--sizes: {where!r}: expected SYSTEM:SIZE or SYSTEM:SIZE:BATCH"
    )
  system, size, own = found.groups()
  path = pathlib.Path(folder) / f"{system}.py"
  config = verbs.load_config(f"{path}:size={size}")
  with config.unlocked():
    config.batch_size, config.accumulate = int(own or batch), 1
    config.shadow = ()
    config.warmup = 0  # The learning rate in PyTorch is constant.
    for node in (config.system, config.objective):
      _simplify(node)
  return config


def _simplify(node: ml_collections.ConfigDict) -> None:
  for key, value in node.items():
    if isinstance(value, ml_collections.ConfigDict):
      _simplify(value)
    elif key in PLAIN:
      node[key] = PLAIN[key]


def measure(config: Any, rounds: int, patience: float) -> list[Row]:
  """Measures one config: a row for each contestant, ours first.

  Raises:
    ValueError: if PyTorch finds another loss or gradient.
  """
  import jax

  from mmjax import sharding
  from mmjax.perf import flops
  from mmjax.train import plan as plan_lib
  from mmjax.train.step import train_step

  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    plan = plan_lib.make_plan(config, mesh)
    work = flops.count(
        functools.partial(train_step, plan.stage), plan.state, plan.batch
    )
    turns, worker = make_contestants(plan, config)
    try:
      seconds, others = _timing.interleave(turns, rounds, patience)
    finally:
      if worker is not None:
        worker.close()
  medians = {name: statistics.median(s) for name, s in seconds.items()}
  return [
      {
          "batch": config.batch_size,
          "step": name,
          "seconds": median,
          "spread": _timing.spread(seconds[name]),
          "slower": median / medians["mmjax"],
          "examples_per_second": config.batch_size / median,
          "flop_rate": work.model / median,
          "rounds": seconds[name],
          "others": others,
      }
      for name, median in medians.items()
  ]


def make_contestants(
    plan: Any, config: Any
) -> tuple[dict[str, _timing.Turn], _timing.Worker | None]:
  """The steps to measure, already compiled, and the process of some of them.

  Raises:
    ValueError: if PyTorch finds another loss or gradient.
  """
  import jax
  import numpy as np

  from mmjax import config as config_lib
  from mmjax.data import mixture

  rows = next(
      mixture.batches(
          plan.streams, batch_size=config.batch_size, seed=config.seed
      )
  )
  batch = {
      key: np.array(rows[key], leaf.dtype) for key, leaf in plan.batch.items()
  }
  state = plan.init(jax.numpy.int32(config.seed), {})
  # Off the initial values: a head of zeros would pass no gradient on.
  rng = np.random.default_rng(config.seed)
  params = {
      path: np.asarray(leaf) + rng.normal(0, 0.02, leaf.shape).astype("f4")
      for path, leaf in state.live.items()
  }
  live = {
      path: jax.device_put(value, state.live[path].sharding)
      for path, value in params.items()
  }
  ours, found = _our_step(plan, state.replace(live=live), batch)
  turns = {"mmjax": functools.partial(_timing.turn, ours)}
  if not _timing.version("torch") or jax.default_backend() != "cpu":
    return turns, None
  worker = _timing.Worker(
      TWINS, config_lib.freeze(config), params, batch, _timing.threads()
  )
  if worker.facts is None:  # A system without a twin.
    worker.close()
    return turns, None
  agreement, missing = worker.facts
  try:
    check_agreement(found, agreement)
  except ValueError:
    worker.close()
    raise
  for name, reason in missing.items():
    print(f"no torch.{name}: {reason}")
  return turns | worker.turns, worker


def _our_step(
    plan: Any, state: Any, batch: Mapping[str, Any]
) -> tuple[Callable[[], None], tuple[float, float]]:
  """The step, and loss and gradient norm of the first one."""
  import jax

  from mmjax.train import plan as plan_lib

  arrays = {
      key: jax.device_put(batch[key], leaf.sharding)
      for key, leaf in plan.batch.items()
  }
  compiled = plan_lib.compile_for(plan.mesh, plan.step.lower(state, arrays))
  state, metrics = compiled(state, arrays)

  def step() -> None:
    nonlocal state
    state, _ = compiled(state, arrays)
    jax.block_until_ready(state)

  return step, (float(metrics["loss"]), float(metrics["grad_norm"]))


def check_agreement(
    ours: tuple[float, float], theirs: tuple[float, float]
) -> None:
  """Refuses to compare steps that compute different things.

  Args:
    ours: loss and gradient norm.
    theirs: those of PyTorch.

  Raises:
    ValueError: if one of them differs by more than `TOLERANCE`, relatively.
  """
  for name, a, b in zip(("loss", "gradient norm"), ours, theirs):
    if not abs(a - b) <= TOLERANCE * abs(a):
      raise ValueError(
          f"the {name} is {a:.7g} here and {b:.7g} in PyTorch: the networks "
          "are not the same, and a comparison would say nothing"
      )


def heading() -> str:
  """The names of the columns."""
  return (
      f"{'size':16}{'batch':>6}  {'step':8}{'ms':>9}{'spread':>8}{'slower':>8}"
      f"{'examples/s':>12}{'GFLOP/s':>9}{'of peak':>8}"
  )


def line(row: Row) -> str:
  """One row of the table; `slower` is relative to ours."""
  busy = f"  others used {row['others']:.1f} cores"
  return (
      f"{row['size']:16}{row['batch']:6,}  {row['step']:8}"
      f"{1e3 * row['seconds']:9.1f}{row['spread']:8.0%}{row['slower']:7.2f}x"
      f"{row['examples_per_second']:12,.0f}{row['flop_rate'] / 1e9:9,.0f}"
      f"{row['share']:8.0%}" + (busy if row["others"] > _timing.QUIET else "")
  )
