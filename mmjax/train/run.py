"""What does a run do between its steps? It reports, evaluates and goes back."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import numpy as np

import mmjax
from mmjax.data.sources import quarantine
from mmjax.train import checkpoint, metrics, spikes
from mmjax.train.plan import Plan, first_state
from mmjax.train.state import TrainState


class NotFiniteError(RuntimeError):
  """Too many steps in a row had a loss or gradient that is not finite."""


class UnstableError(RuntimeError):
  """The loss jumped more often than the config allows."""


def is_first() -> bool:
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


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


@dataclasses.dataclass
class Run:
  """What the loop of a run needs: `say` prints, `traced` steps are profiled."""

  config: Mapping[str, Any]
  plan: Plan
  folder: pathlib.Path
  evaluators: Mapping[str, Callable[..., Any]]
  checkpoints: checkpoint.Checkpoints
  meter: metrics.Meter
  monitor: spikes.Monitor
  say: Callable[[str], None]
  traced: range
  wandb: str | None
  rewinds: int
  writers: Sequence[metrics.Writer] = ()

  def open_writers(self, step: int) -> None:
    """Begins to write, or begins again, behind what belongs to `step`."""
    self.close_writers()
    if is_first():
      self.writers = [
          metrics.Files(self.folder, step),
          metrics.TensorBoard(self.folder, step),
      ]
      if self.wandb:
        self.writers.append(
            metrics.WeightsAndBiases(
                self.wandb, self.folder, checkpoint.resolved(self.config)
            )
        )

  def close_writers(self) -> None:
    """Ends writing."""
    for writer in self.writers:
      writer.close()
    self.writers = ()

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
        loss=self.monitor.facts(),
        rewinds=self.rewinds,
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

  def retire(
      self, step: int, batches: int, found: Mapping[str, jax.Array]
  ) -> None:
    """Looks at the results of a step, which ends when they are there.

    Args:
      step: which.
      batches: global batches taken up to it.
      found: its metrics.

    Raises:
      NotFiniteError: if there were too many bad steps in a row.
      Spike: if the loss jumped.
    """
    in_a_row = int(found["skipped_in_a_row"])
    if in_a_row >= self.config["abort_after"] > 0:
      raise NotFiniteError(
          f"step {step:,}: {in_a_row} steps in a row had a loss or gradient "
          "that is not finite. The parameters are those before them. Look for "
          "bad examples, lower the learning rate or clip gradients; "
          "config.abort_after sets the patience"
      )
    self.monitor.look(step, batches, found["loss"])
    steps = self.plan.stage.steps
    if step % max(self.config["log_every"], 1) == 0 or step == steps:
      order = ["loss", *sorted(found.keys() - {"loss", "grad_norm"})]
      values = {name: float(found[name]) for name in [*order, "grad_norm"]}
      # Records that this process could not read, so far.
      bad = quarantine.of(stream.source for stream in self.plan.streams)
      if bad:
        values["quarantined"] = float(sum(map(len, bad)))
      speed = self.meter.read(step)
      self.write(step, values | speed, {})
      del values["skipped_in_a_row"]
      for name in ("skipped", "quarantined"):
        if not values.get(name):
          values.pop(name, None)
      self.say(metrics.progress_line(step, steps, values, speed))

  def rewind(self, spike: spikes.Spike) -> tuple[TrainState, int, int]:
    """Goes back before a spike, for good: later checkpoints are removed.

    Returns:
      The state there, its step, and how many batches now count as taken.

    Raises:
      UnstableError: if the run has been rewound too often.
    """
    policy = self.monitor.policy
    if self.rewinds == policy.most:
      raise UnstableError(
          f"{spike}, after {self.rewinds} rewinds; config.rewind.most allows "
          "no other. Lower the learning rate or clip gradients"
      )
    self.checkpoints.wait()
    saved = self.checkpoints.steps()
    kept = [step for step in saved if step <= spike.step - policy.back]
    for step in saved[len(kept) :]:
      self.checkpoints.delete(step)
    step, taken, facts = 0, 0, {}
    if kept:
      step = kept[-1]
      data, facts = self.checkpoints.read_json(step)
      taken = data["next_index"]
      state = self.checkpoints.restore(self.plan.state, step)
    else:
      state = first_state(self.plan)
    self.rewinds += 1
    self.monitor = spikes.Monitor(policy, facts.get("loss"))
    batches = spike.batches + policy.skip
    self.open_writers(step)
    # In the first step of the new branch: a run that resumes from the old one
    # drops it.
    numbers = dict(rewound_from=spike.step, batches_skipped=batches - taken)
    self.write(step + 1, numbers, {})
    self.say(
        f"{spike}. Going back to step {step:,}; {batches - taken:,} batches "
        "from there on are left out"
    )
    return state, step, batches
