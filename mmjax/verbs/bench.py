"""mmjax bench train [--sizes SYSTEM:SIZE[:BATCH],...] [--json FILE]

Measures train steps on the devices of this machine. On a CPU where PyTorch is
installed it measures the same networks there too, eager and through
torch.compile: equal parameters, batch, loss, optimizer and number of threads,
after a check that loss and gradient agree. The contestants take turns, so that
a slow minute of the machine is slow for all of them, and rounds in which other
processes were busy are repeated. Systems and optimizers are those of the
configs, but plain: float32, no dropout, label smoothing, rematerialisation,
accumulation nor moving averages. Use taskset to choose the cores.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import importlib.util
import json
import os
import pathlib
import re
import statistics
import time
from typing import Any

from absl import flags
import ml_collections

from mmjax import verbs

# A turn: one step that does not count, then steps for so long, but so many.
TURN_SECONDS = 0.5
TURN_STEPS = 3
# A round counts as quiet while other processes use less than this of a core.
QUIET = 0.1
# How far loss and gradient norm may differ, relatively: float32 rounding.
TOLERANCE = 1e-4

# What makes two implementations comparable, by key of systems and objectives.
PLAIN = dict(
    dtype="float32", dropout=0.0, remat="none", smoothing=0.0, chunks=1,
    pool="token",
)

Row = dict[str, Any]
Contestants = Mapping[str, Callable[[], None]]


def main(argv: Sequence[str]) -> int:
  """Runs the verb; see `mmjax.verbs` for the exit codes."""
  what = [word for word in argv[:1] if not word.startswith("-")]
  body = functools.partial(_bench, what)
  return verbs.run(__doc__, argv[len(what) :], _define, body)


def _define(values: flags.FlagValues, argv: Sequence[str]) -> None:
  del argv
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
  flags.DEFINE_integer(
      "rounds",
      10,
      "turns of each contestant",
      lower_bound=2,
      flag_values=values,
  )
  flags.DEFINE_float(
      "patience",
      60.0,
      "seconds to spend on a size in search of quiet rounds",
      flag_values=values,
  )
  flags.DEFINE_string(
      "configs", "configs", "directory of config files", flag_values=values
  )
  flags.DEFINE_string(
      "json", None, "file to write all numbers to", flag_values=values
  )
  verbs.define_runtime(values)


def _bench(what: Sequence[str], values: flags.FlagValues) -> int:
  if what != ["train"]:
    raise ValueError("say what to measure: mmjax bench train [flags]")
  configs = {
      where: load(values.configs, where, values.batch)
      for where in values.sizes
  }
  verbs.start_runtime(values)
  report = environment()
  print(heading(report))
  report["rows"] = []
  for where, config in configs.items():
    rows = measure(config, values.rounds, values.patience)
    for row in rows:
      row |= {"size": where, "share": row["flop_rate"] / report["peak"]}
      print(line(row), flush=True)
    report["rows"] += rows
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(report, indent=2) + "\n")
  return verbs.DONE


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


def threads() -> int:
  """The cores that this process may use; either framework has as many threads.
  """
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def torch_twins() -> Any:
  """The module of twins; None without PyTorch, or if the devices are no CPU."""
  import jax

  if jax.default_backend() != "cpu" or not importlib.util.find_spec("torch"):
    return None
  from mmjax.verbs import _bench_torch

  _bench_torch.torch.set_num_threads(threads())
  return _bench_torch


def environment() -> dict[str, Any]:
  """Where the rows of a report are measured; `peak` is in FLOP/s."""
  import jax

  from mmjax.perf import chips

  kind, count = jax.devices()[0].device_kind, jax.device_count()
  chip, twins = chips.from_device_kind(kind), torch_twins()
  return {
      "device": kind,
      "devices": count,
      "threads": threads(),
      "jax": jax.__version__,
      "torch": twins and twins.torch.__version__,
      "peak": chip.peak("float32") * count if chip else product_rate(),
  }


def product_rate(side: int = 2048, times: int = 10) -> float:
  """FLOP/s of the fastest of some products of square float32 matrices."""
  import jax
  import jax.numpy as jnp

  x = jnp.ones((side, side))
  multiply = jax.jit(jnp.matmul)
  seconds = []
  for _ in range(1 + times):
    start = time.perf_counter()
    jax.block_until_ready(multiply(x, x))
    seconds.append(time.perf_counter() - start)
  return 2 * side**3 / min(seconds[1:])


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
    contestants = make_contestants(plan, config)
    seconds, others = interleave(contestants, rounds, patience)
  medians = {name: statistics.median(s) for name, s in seconds.items()}
  return [
      {
          "batch": config.batch_size,
          "step": name,
          "seconds": median,
          "spread": spread(seconds[name]),
          "slower": median / medians["mmjax"],
          "examples_per_second": config.batch_size / median,
          "flop_rate": work.model / median,
          "rounds": seconds[name],
          "others": others,
      }
      for name, median in medians.items()
  ]


def make_contestants(plan: Any, config: Any) -> Contestants:
  """The steps to measure, each a function of nothing, already compiled.

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
  twins, system = torch_twins(), plan.stage.system
  if twins is None or type(system) not in twins.TWINS:
    return {"mmjax": ours}
  inputs = twins.make_inputs(batch)
  check_agreement(
      found, twins.loss_and_norm(twins.make_twin(system, params), inputs)
  )
  contestants = {"mmjax": ours}
  for name, compiled in (("eager", False), ("compile", True)):
    try:
      step = twins.make_step(
          twins.make_twin(system, params),
          params,
          inputs,
          config_lib.freeze(config.optim),
          config.lr,
          compiled,
      )
      step()
    except RuntimeError as error:  # torch.compile needs a C++ compiler.
      print(f"no torch.{name}: {str(error).strip().splitlines()[0]}")
    else:
      contestants[name] = step
  return contestants


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
  jitted = plan_lib.make_step(plan.stage, plan.state, plan.mesh)
  compiled = plan_lib.compile_for(plan.mesh, jitted.lower(state, arrays))
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


def interleave(
    contestants: Contestants, rounds: int, patience: float
) -> tuple[dict[str, list[float]], float]:
  """Lets the contestants take turns.

  Args:
    contestants: name -> a function that takes one step and waits for it.
    rounds: how many rounds to keep, the quietest ones.
    patience: seconds after which the rounds so far must do, if enough.

  Returns:
    name -> median seconds per step of each kept round; and the cores that
    other processes used in the least quiet round of them.
  """
  found: list[tuple[float, dict[str, float]]] = []
  end = time.perf_counter() + patience
  while len(found) < rounds or (
      sum(others <= QUIET for others, _ in found) < rounds
      and time.perf_counter() < end
  ):
    turns = {name: _turn(step) for name, step in contestants.items()}
    found.append((
        max(others for _, others in turns.values()),
        {name: seconds for name, (seconds, _) in turns.items()},
    ))
  kept = sorted(found, key=lambda item: item[0])[:rounds]
  seconds = {name: [turns[name] for _, turns in kept] for name in contestants}
  return seconds, kept[-1][0]


def _turn(step: Callable[[], None]) -> tuple[float, float]:
  """Median seconds of a step, and the cores that others used meanwhile."""
  step()  # Threads wake up, and the cache fills.
  start, used = time.perf_counter(), cpu_seconds()
  seconds = []
  while sum(seconds) < TURN_SECONDS or len(seconds) < TURN_STEPS:
    begin = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - begin)
  machine, mine = (b - a for a, b in zip(used, cpu_seconds()))
  others = max(machine - mine, 0.0) / (time.perf_counter() - start)
  return statistics.median(seconds), others


def cpu_seconds(path: str = "/proc/stat") -> tuple[float, float]:
  """CPU seconds of the machine and of this process since they started.

  Where there is no such file, only this process is known.
  """
  mine = time.process_time()
  try:
    words = pathlib.Path(path).read_text().split("\n", 1)[0].split()
  except OSError:
    return mine, mine
  user, nice, system, _, _, irq, softirq, steal = map(int, words[1:9])
  ticks = user + nice + system + irq + softirq + steal
  return ticks / os.sysconf("SC_CLK_TCK"), mine


def spread(seconds: Sequence[float]) -> float:
  """The interquartile range, relative to the median."""
  low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
  return (high - low) / statistics.median(seconds)


def heading(report: Mapping[str, Any]) -> str:
  """What stands above the rows."""
  torch = f", torch {report['torch']}" if report["torch"] else ""
  return (
      f"{report['devices']} x {report['device']}, {report['threads']} threads, "
      f"jax {report['jax']}{torch}; peak {report['peak'] / 1e9:,.0f} GFLOP/s\n"
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
      f"{row['share']:8.0%}" + (busy if row["others"] > QUIET else "")
  )
