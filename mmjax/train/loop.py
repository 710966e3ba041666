"""How does a config become a trained system? Plan, run, save, resume."""

import collections
from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

import mmjax
from mmjax import config as config_lib
from mmjax import sharding
from mmjax.data import mixture
from mmjax.train import checkpoint, metrics
from mmjax.train.plan import (
    Abstract,
    Plan,
    compile_for,
    count,
    first_state,
    ideal_seconds,
    make_plan,
    make_step,
    summary,
)
from mmjax.train.state import TrainState
from mmjax.train.stopper import InterruptedRun, Stopper

# Steps that are dispatched before the results of the first are looked at: the
# devices never wait for the host, nor does the host run far ahead.
IN_FLIGHT = 2


class NotFiniteError(RuntimeError):
  """Too many steps in a row had a loss or gradient that is not finite."""


def make_evaluators(config: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
  """name -> `(system, variables) -> (metrics, figures)`."""
  return {
      name: config_lib.build(node, f"config.evals.{name}")
      for name, node in config["evals"].items()
  }


def evaluate(
    evaluators: Mapping[str, Callable[..., Any]], system: Any, variables: Any
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """Runs all evaluators.

  Returns:
    `<evaluator>/<metric>` -> number and `<evaluator>/<figure>` -> u8[H, W, 3].
  """
  scalars, figures = {}, {}
  for name, evaluator in evaluators.items():
    numbers, pictures = evaluator(system, variables)
    scalars |= {f"{name}/{key}": float(v) for key, v in numbers.items()}
    figures |= {f"{name}/{key}": v for key, v in pictures.items()}
  return scalars, figures


def restore_run(
    config: Mapping[str, Any],
    folder: pathlib.Path,
    step: int | None,
    shadow: bool,
) -> tuple[Plan, int, dict[str, Any]]:
  """Reads the variables of a run; the optimizer's state stays where it is.

  Args:
    config: of the run, or one of the same system.
    folder: the run directory.
    step: of the checkpoint; the newest by default.
    shadow: whether shadow parameters take the place of their originals.

  Returns:
    The plan, the step and the variables for `system.apply`.
  """
  plan = make_plan(config, sharding.make_mesh(config["mesh"]))
  wanted = plan.state.replace(opt={})
  if not shadow:
    wanted = wanted.replace(shadow={})
  with (
      jax.set_mesh(plan.mesh),
      checkpoint.Checkpoints(folder) as checkpoints,
  ):
    step = checkpoints.step(step)
    return plan, step, checkpoints.restore(wanted, step).variables(shadow)


def evaluate_run(
    config: Mapping[str, Any], folder: pathlib.Path, step: int | None = None
) -> tuple[int, dict[str, float], dict[str, np.ndarray]]:
  """Runs a config's `evals` on a checkpoint of a run.

  Returns:
    The step, and what `evaluate` returns.
  """
  evaluators = make_evaluators(config)
  plan, step, variables = restore_run(
      config, folder, step, config["eval_shadow"]
  )
  with jax.set_mesh(plan.mesh):
    return step, *evaluate(evaluators, plan.stage.system, variables)


def begin(
    config: Mapping[str, Any],
    workdir: str | pathlib.Path,
    give: Callable[..., dict[str, jax.Array]],
) -> int:
  """Makes a run that stands at step 0 with imported parameters.

  Args:
    config: of the run.
    workdir: its directory, without checkpoints.
    give: an import function, which comes after those of the config.

  Returns:
    The number of parameters.

  Raises:
    ValueError: if the run has begun, or for bad input.
  """
  folder = checkpoint.run_directory(workdir)
  checkpoint.check_workdir(folder, config)
  plan = make_plan(config, sharding.make_mesh(config["mesh"]))
  with (
      jax.set_mesh(plan.mesh),
      checkpoint.Checkpoints(folder) as checkpoints,
  ):
    if checkpoints.newest() is not None:
      raise ValueError(
          f"{folder} stands at step {checkpoints.newest()}; take another "
          "--workdir"
      )
    stage = dataclasses.replace(
        plan.stage, imports=(*plan.stage.imports, give)
    )
    state = first_state(dataclasses.replace(plan, stage=stage))
    checkpoints.save(0, state, None, {})
    checkpoints.wait()
  if is_first():
    checkpoint.write_json(folder / "config.json", checkpoint.resolved(config))
  return count(plan.parameters)


# --- data ---------------------------------------------------------------------


def process_share(mesh: Any, rows: int) -> tuple[int, int]:
  """Which share of a batch's rows this process must load.

  Processes whose devices hold the same rows (a `tensor` axis across them) load
  the same share.

  Returns:
    (index, count) of the share.

  Raises:
    ValueError: if some processes share a part of their rows only.
  """
  held: dict[int, set[int]] = collections.defaultdict(set)
  places = sharding.batch_sharding(mesh).devices_indices_map((rows,))
  for device, (part,) in places.items():
    held[device.process_index] |= set(range(*part.indices(rows)))
  shares = sorted({tuple(sorted(found)) for found in held.values()})
  if sum(map(len, shares)) != rows or len({*map(len, shares)}) != 1:
    raise ValueError(
        f"mesh {dict(mesh.shape)}: the processes hold overlapping or unequal "
        f"parts of the batch; order the axes so that data x fsdp divides, or "
        "is divided by, the number of processes"
    )
  own = tuple(sorted(held[jax.process_index()]))
  return shares.index(own), len(shares)


class Feed:
  """Global batches on the devices, one ahead of the step that reads them."""

  def __init__(self, iterator: Any, batch: Abstract) -> None:
    """Wraps an iterator over this process's rows, which can be saved."""
    self._iterator = iterator
    self._batch = batch
    self._ahead: tuple[dict[str, jax.Array], Any] | None = None

  def load(self) -> float:
    """Loads the next batch; returns the seconds that it took."""
    begin = time.perf_counter()
    rows = next(self._iterator)
    arrays = {
        key: jax.make_array_from_process_local_data(
            leaf.sharding, np.asarray(rows[key], leaf.dtype), leaf.shape
        )
        for key, leaf in self._batch.items()
    }
    # A copy: the iterator may go on to change what it returned.
    self._ahead = arrays, json.dumps(self._iterator.get_state())
    return time.perf_counter() - begin

  def take(self) -> tuple[dict[str, jax.Array], str]:
    """The loaded batch, and the iterator's state behind it as JSON."""
    taken, self._ahead = self._ahead, None
    return taken


def _make_iterator(plan: Plan, threads: int) -> Any:
  index, count = process_share(plan.mesh, plan.stage.batch_size)
  return mixture.batches(
      plan.streams,
      batch_size=plan.stage.batch_size,
      seed=plan.stage.seed,
      process_index=index,
      process_count=count,
      threads=threads,
  )


# --- run ----------------------------------------------------------------------


@dataclasses.dataclass
class _Run:
  """What the loop of a run needs: `say` prints, `traced` steps are profiled."""

  config: Mapping[str, Any]
  plan: Plan
  evaluators: Mapping[str, Callable[..., Any]]
  checkpoints: checkpoint.Checkpoints
  writers: Sequence[metrics.Writer]
  meter: metrics.Meter
  say: Callable[[str], None]
  traced: range

  def due(self, key: str, step: int) -> bool:
    """Whether a periodic action falls on `step`; the end is apart."""
    every = self.config[key]
    return bool(every) and step % every == 0 and step < self.plan.stage.steps

  def facts(self) -> dict[str, Any]:
    """What a checkpoint says beside the state."""
    text = json.dumps(checkpoint.resolved(self.config), sort_keys=True)
    return dict(
        config=hashlib.sha256(text.encode()).hexdigest(),
        version=mmjax.__version__,
        train_seconds=self.meter.seconds,
    )

  def write(
      self, step: int, scalars: metrics.Scalars, figures: metrics.Figures
  ) -> None:
    """Gives the results of a step to every writer."""
    for writer in self.writers:
      writer.write(step, scalars, figures)

  def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
    """Runs the evaluators and hands on what they find."""
    scalars, figures = evaluate(
        self.evaluators,
        self.plan.stage.system,
        state.variables(shadow=self.config["eval_shadow"]),
    )
    if scalars:
      self.write(step, scalars, figures)
      self.say(f"step {step:,} evaluation\n{metrics.table(scalars)}")
    return scalars

  def retire(self, step: int, found: Mapping[str, jax.Array]) -> None:
    """Looks at the results of a step, which ends when they are there."""
    in_a_row = int(found["skipped_in_a_row"])
    if in_a_row >= self.config["abort_after"] > 0:
      raise NotFiniteError(
          f"step {step:,}: {in_a_row} steps in a row had a loss or gradient "
          "that is not finite. The parameters are those before them. Look for "
          "bad examples, lower the learning rate or clip gradients; "
          "config.abort_after sets the patience"
      )
    steps = self.plan.stage.steps
    if step % max(self.config["log_every"], 1) == 0 or step == steps:
      order = ["loss", *sorted(found.keys() - {"loss", "grad_norm"})]
      values = {name: float(found[name]) for name in [*order, "grad_norm"]}
      speed = self.meter.read(step)
      self.write(step, values | speed, {})
      del values["skipped_in_a_row"]
      if not values["skipped"]:
        del values["skipped"]
      self.say(metrics.progress_line(step, steps, values, speed))


def train(
    config: Mapping[str, Any],
    workdir: str | pathlib.Path,
    *,
    profile: tuple[int, int] | None = None,
    wandb: str | None = None,
    allow: Sequence[str] = (),
) -> dict[str, float]:
  """Trains a config in a run directory, or continues the run that is there.

  Everything that can be wrong is checked before anything expensive.

  Args:
    config: see `mmjax.config.base`.
    workdir: for `config.json`, `checkpoints/`, `metrics.jsonl`,
      `tensorboard/`, `figures/` and, at the end, `results.json`.
    profile: first and last step of a profiler trace in `workdir/profile`.
    wandb: a Weights & Biases project to log to.
    allow: top-level config keys that may differ from those of the run that
      `workdir` holds, beside `checkpoint.FREE_KEYS`.

  Returns:
    The results: `<evaluator>_<metric>` of the last evaluation, `steps`,
    `parameters`, `train_seconds` (of the loop; without compilation and
    evaluation) and `examples_per_second`.

  Raises:
    ValueError: for bad input, see `make_plan` and `checkpoint.check_workdir`.
    NotFiniteError: after `config.abort_after` bad steps in a row.
    InterruptedRun: after SIGTERM or SIGINT, once the state is saved.
  """
  folder = checkpoint.run_directory(workdir)
  checkpoint.check_workdir(folder, config, allow)
  if wandb:
    metrics.import_wandb()
  plan = make_plan(config, sharding.make_mesh(config["mesh"]))
  evaluators = make_evaluators(config)
  say = functools.partial(print, flush=True) if is_first() else _silent
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(plan.mesh))
    checkpoints = stack.enter_context(
        checkpoint.Checkpoints(folder, config["keep_checkpoints"])
    )
    saved = checkpoints.newest()
    start = saved or 0
    if start > plan.stage.steps:
      raise ValueError(
          f"{folder} stands at step {start}, beyond config.steps="
          f"{plan.stage.steps}"
      )
    if start == plan.stage.steps and (folder / "results.json").exists():
      say(f"{folder} is complete; its results are in results.json")
      return json.loads((folder / "results.json").read_text())
    traced = _window(profile, start + 1, plan.stage.steps)
    say(summary(plan, start))
    iterator = _make_iterator(plan, config["loader_threads"])
    facts: dict[str, Any] = {}
    if start:
      data, facts = checkpoints.read_json(start)
      iterator.set_state(data)
    run = _Run(
        config,
        plan,
        evaluators,
        checkpoints,
        _make_writers(folder, start, wandb, config, stack),
        metrics.Meter(
            plan.stage.batch_size,
            facts.get("train_seconds", 0.0),
            ideal_seconds(plan),
        ),
        say,
        traced,
    )
    state = (
        first_state(plan)
        if saved is None
        else checkpoints.restore(plan.state, start)
    )
    state = _fit(run, folder, iterator, state, start)
    return _finish(run, folder, state)


def is_first() -> bool:
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def _silent(text: str) -> None:
  del text


def _window(profile: tuple[int, int] | None, first: int, last: int) -> range:
  """The steps to trace, among those from `first` to `last`."""
  if profile is None:
    return range(0)
  found = range(max(profile[0], first), min(profile[1], last) + 1)
  if not found:
    raise ValueError(
        f"profile {profile[0]}:{profile[1]}: none of the steps that are to be "
        f"taken, {first} to {last}"
    )
  return found


def _make_writers(
    folder: pathlib.Path,
    start: int,
    wandb: str | None,
    config: Mapping[str, Any],
    stack: contextlib.ExitStack,
) -> list[metrics.Writer]:
  if not is_first():
    return []
  writers: list[metrics.Writer] = [
      metrics.Files(folder, start),
      metrics.TensorBoard(folder, start),
  ]
  if wandb:
    writers.append(
        metrics.WeightsAndBiases(wandb, folder, checkpoint.resolved(config))
    )
  for writer in writers:
    stack.callback(writer.close)
  return writers


def _fit(
    run: _Run,
    folder: pathlib.Path,
    iterator: Any,
    state: TrainState,
    start: int,
) -> TrainState:
  """Takes the steps from `start` to the end, and saves on the way."""
  plan, steps = run.plan, run.plan.stage.steps
  if start == steps:
    return state
  feed = Feed(iterator, plan.batch)
  begin = time.perf_counter()
  step_fn = make_step(plan.stage, plan.state, plan.mesh)
  compiled = compile_for(plan.mesh, step_fn.lower(plan.state, plan.batch))
  run.say(f"compiled in {time.perf_counter() - begin:.1f} s")
  if is_first():
    checkpoint.write_json(
        folder / "config.json", checkpoint.resolved(run.config)
    )
  feed.load()
  queue: collections.deque[tuple[int, Any]] = collections.deque()

  def drain(keep: int = 0) -> None:
    while len(queue) > keep:
      run.retire(*queue.popleft())

  with Stopper(plan.mesh, IN_FLIGHT) as stopper:
    run.meter.start(start)
    for step in range(start + 1, steps + 1):
      if step in run.traced[:1]:
        jax.profiler.start_trace(str(folder / "profile"))
      batch, position = feed.take()
      state, found = compiled(state, batch)
      queue.append((step, found))
      if step < steps:
        seconds = feed.load()
        if found["loss"].is_ready():  # The devices stood still for a part.
          run.meter.wait(seconds)
      drain(IN_FLIGHT)
      if step in run.traced[-1:]:
        drain()
        jax.profiler.stop_trace()
      if run.due("eval_every", step):
        drain()
        run.meter.stop()
        run.evaluate(step, state)
        run.meter.start()
      stop = stopper.asked()
      if stop or step == steps or run.due("checkpoint_every", step):
        drain()  # Saving waits for the state anyway.
        run.checkpoints.save(step, state, json.loads(position), run.facts())
      if stop and step < steps:
        run.checkpoints.wait()
        raise InterruptedRun(stopper.signal, step)
    run.meter.stop()
  return state


def _finish(
    run: _Run, folder: pathlib.Path, state: TrainState
) -> dict[str, float]:
  """Evaluates the trained state and writes the results."""
  steps = run.plan.stage.steps
  found = run.evaluate(steps, state)
  results = {key.replace("/", "_"): value for key, value in found.items()}
  results |= dict(
      steps=steps,
      parameters=count(run.plan.parameters),
      train_seconds=run.meter.seconds,
      examples_per_second=steps
      * run.plan.stage.batch_size
      / max(run.meter.seconds, 1e-9),
  )
  run.checkpoints.wait()
  if is_first():
    checkpoint.write_json(folder / "results.json", results)
  return results
