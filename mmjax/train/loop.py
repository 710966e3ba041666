"""How does a config become a trained system? Plan, run, save, resume."""

import collections
from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from mmjax import config as config_lib
from mmjax import sharding
from mmjax.data.sources import quarantine
from mmjax.train import checkpoint, feed, metrics, peers, spikes
from mmjax.train.plan import (
    Plan,
    compile_for,
    count,
    first_state,
    ideal_seconds,
    make_plan,
    summary,
)
from mmjax.train.run import (
    NotFiniteError,
    Run,
    UnstableError,
    evaluate,
    is_first,
)
from mmjax.train.state import TrainState
from mmjax.train.stopper import InterruptedRun, Stopper

# Steps that are dispatched before the results of the first are looked at: the
# devices never wait for the host, nor does the host run far ahead.
IN_FLIGHT = 2


def make_evaluators(config: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
  """name -> `(system, variables) -> (metrics, figures)`."""
  return {
      name: config_lib.build(node, f"config.evals.{name}")
      for name, node in config["evals"].items()
  }


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


# --- run ----------------------------------------------------------------------


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
    UnstableError: if the loss jumps after `config.rewind.most` rewinds.
  """
  with peers.Watch(agreed=(NotFiniteError, UnstableError, InterruptedRun)):
    return _train(config, workdir, profile, wandb, allow)


def _train(
    config: Mapping[str, Any],
    workdir: str | pathlib.Path,
    profile: tuple[int, int] | None,
    wandb: str | None,
    allow: Sequence[str],
) -> dict[str, float]:
  """The body of `train`."""
  folder = checkpoint.run_directory(workdir)
  checkpoint.check_workdir(folder, config, allow)
  if wandb:
    metrics.import_wandb()
  policy = spikes.Policy(**config["rewind"])
  plan = make_plan(config, sharding.make_mesh(config["mesh"]))
  evaluators = make_evaluators(config)
  say = functools.partial(print, flush=True) if is_first() else _silent
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(plan.mesh))
    checkpoints = stack.enter_context(
        checkpoint.Checkpoints(folder, config["keep_checkpoints"])
    )
    saved = checkpoints.recover(say)
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
    data, facts = checkpoints.read_json(start) if start else (None, {})
    run = Run(
        config,
        plan,
        folder,
        evaluators,
        checkpoints,
        metrics.Meter(
            plan.stage.batch_size,
            facts.get("train_seconds", 0.0),
            ideal_seconds(plan),
        ),
        spikes.Monitor(policy, facts.get("loss")),
        say,
        traced,
        wandb,
        facts.get("rewinds", 0),
    )
    stack.callback(run.close_writers)
    run.open_writers(start)
    for bad in quarantine.of(stream.source for stream in plan.streams):
      bad.list_in(str(folder / "quarantine.jsonl"))
    state = (
        first_state(plan)
        if saved is None
        else checkpoints.restore(plan.state, start)
    )
    batches = data["next_index"] if data else 0
    return _finish(run, _fit(run, state, start, batches))


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


def _fit(
    run: Run, state: TrainState, start: int, batches: int
) -> TrainState:
  """Takes the steps from `start` to the end, more than once past a spike."""
  plan = run.plan
  if start == plan.stage.steps:
    return state
  iterator = feed.make_iterator(
      plan, run.config["loader_threads"], run.config["loader_workers"]
  )
  source = feed.Feed(iterator, plan.batch)
  begin = time.perf_counter()
  compiled = compile_for(plan.mesh, plan.step.lower(plan.state, plan.batch))
  run.say(f"compiled in {time.perf_counter() - begin:.1f} s")
  if is_first():
    checkpoint.write_json(
        run.folder / "config.json", checkpoint.resolved(run.config)
    )
  with (
      contextlib.closing(source),
      Stopper(plan.mesh, IN_FLIGHT) as stopper,
  ):
    while True:
      source.seek(batches)
      source.load()
      run.meter.start(start)
      try:
        return _take_steps(run, compiled, source, stopper, state, start)
      except spikes.Spike as spike:
        run.meter.stop()
        spike.__traceback__ = state = None  # They hold what is void now.
        state, start, batches = run.rewind(spike)


def _take_steps(
    run: Run,
    compiled: Callable[..., Any],
    source: feed.Feed,
    stopper: Stopper,
    state: TrainState,
    start: int,
) -> TrainState:
  """Takes the steps behind `start`, and evaluates and saves on the way."""
  steps = run.plan.stage.steps
  queue: collections.deque[tuple[int, int, Any]] = collections.deque()

  def drain(keep: int = 0) -> None:
    while len(queue) > keep:
      run.retire(*queue.popleft())

  for step in range(start + 1, steps + 1):
    if step in run.traced[:1]:
      jax.profiler.start_trace(str(run.folder / "profile"))
    batch, position = source.take()
    state, found = compiled(state, batch)
    queue.append((step, position["next_index"], found))
    if step < steps:
      seconds = source.load()
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
      run.checkpoints.save(step, state, position, run.facts())
    if stop and step < steps:
      run.checkpoints.wait()
      raise InterruptedRun(stopper.signal, step)
  run.meter.stop()
  return state


def _finish(run: Run, state: TrainState) -> dict[str, float]:
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
    checkpoint.write_json(run.folder / "results.json", results)
  return results
