"""Where do the numbers of a run go, and how fast is it?

Writers put metrics and figures into files and services; the meter measures
throughput; `progress_line` is what a person reads.
"""

from collections.abc import Mapping
import importlib
import json
import math
import pathlib
import time
from typing import Any, Protocol

import numpy as np
from PIL import Image

Scalars = Mapping[str, float]
Figures = Mapping[str, np.ndarray]


class Writer(Protocol):
  """A place that the metrics and figures of a step go to."""

  def write(self, step: int, scalars: Scalars, figures: Figures) -> None:
    """Takes numbers, and pictures u8[H, W, 3]."""

  def close(self) -> None:
    """Writes out what is still held."""


class Files:
  """`metrics.jsonl`, one object per line, and `figures/<name>_<step>.png`.

  It continues the files of a run that stands at `last_step`.
  """

  def __init__(self, workdir: pathlib.Path, last_step: int) -> None:
    self._folder = workdir / "figures"
    self._path = workdir / "metrics.jsonl"
    keep_lines(self._path, last_step)
    self._file = self._path.open("a")

  def write(self, step: int, scalars: Scalars, figures: Figures) -> None:
    """Appends a line; a number that is not finite becomes null.

    Raises:
      OSError: naming the file, if it cannot be written.
    """
    finite = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
    try:
      self._file.write(json.dumps({"step": step, **finite}) + "\n")
      self._file.flush()
    except OSError as error:
      raise OSError(error.errno, error.strerror, str(self._path)) from error
    write_figures(self._folder, step, figures)

  def close(self) -> None:
    """Closes the file of metrics."""
    self._file.close()


def write_figures(folder: pathlib.Path, step: int, figures: Figures) -> None:
  """Writes pictures u8[H, W, 3] to `<folder>/<name>_<step>.png`."""
  for name, picture in figures.items():
    folder.mkdir(parents=True, exist_ok=True)
    file = f"{name.replace('/', '_')}_{step}.png"
    Image.fromarray(picture).save(folder / file)


class TensorBoard:
  """Event files under `tensorboard/`; those beyond `last_step` become void."""

  def __init__(self, workdir: pathlib.Path, last_step: int) -> None:
    # Slow to import, and only the first process needs them. The writer that
    # the package documents hands events to a thread, and waits for it for ever
    # once it has died of a full disk.
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    self._summary, self._protos = summary, event_pb2
    folder = workdir / "tensorboard"
    folder.mkdir(exist_ok=True)
    self._events = event_file_writer.EventsWriter(
        str(folder / "events"), f".{time.time_ns():x}"
    )
    begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(last_step + 1, session_log=begin)

  def _add(self, step: int, **what: Any) -> None:
    self._events.write_event(
        self._protos.Event(wall_time=time.time(), step=step, **what)
    )

  def write(self, step: int, scalars: Scalars, figures: Figures) -> None:
    """Adds events."""
    for name, value in scalars.items():
      self._add(step, summary=self._summary.scalar(name, value))
    for name, picture in figures.items():
      found = self._summary.image(name, picture, dataformats="HWC")
      self._add(step, summary=found)
    self._events.flush()

  def close(self) -> None:
    """Flushes and closes the event file."""
    self._events.close()


class WeightsAndBiases:
  """A run of a Weights & Biases project; a resumed run continues it."""

  def __init__(
      self, project: str, workdir: pathlib.Path, config: Mapping[str, Any]
  ) -> None:
    self._wandb = import_wandb()
    identity = workdir / "wandb_id"
    if not identity.exists():
      identity.write_text(f"{workdir.name}-{time.time_ns():x}")
    self._run = self._wandb.init(
        project=project,
        name=workdir.name,
        id=identity.read_text(),
        resume="allow",
        dir=str(workdir),
        config=dict(config),
    )

  def write(self, step: int, scalars: Scalars, figures: Figures) -> None:
    """Logs numbers and pictures together."""
    images = {name: self._wandb.Image(value) for name, value in figures.items()}
    self._run.log({**scalars, **images}, step=step)

  def close(self) -> None:
    """Ends the session with the service."""
    self._run.finish()


def import_wandb() -> Any:
  """The `wandb` package.

  Raises:
    ValueError: with the install command, if it is missing.
  """
  try:
    return importlib.import_module("wandb")
  except ImportError as error:
    raise ValueError(
        "--wandb needs the package wandb: pip install wandb"
    ) from error


def keep_lines(path: pathlib.Path, last_step: int) -> None:
  """Drops the lines of a metrics file that lie beyond `last_step`.

  A run that was killed has logged steps that the resumed one takes again; its
  last line may be cut.
  """
  if not path.exists():
    return

  def stays(line: str) -> bool:
    try:
      return json.loads(line)["step"] <= last_step
    except (ValueError, KeyError, TypeError):
      return False

  lines = path.read_text().splitlines(keepends=True)
  # A reader, or a run that dies here, finds the old file or the new one.
  draft = path.with_name(path.name + ".tmp")
  draft.write_text("".join(line for line in lines if stays(line)))
  draft.replace(path)


class Meter:
  """A stopwatch for training alone: it stands still in evaluations.

  Attributes:
    seconds: measured so far, earlier processes of a resumed run included.
  """

  def __init__(
      self, batch_size: int, seconds: float, ideal: float | None = None
  ) -> None:
    """Makes a meter that stands still.

    Args:
      batch_size: examples per step.
      seconds: what earlier processes have measured.
      ideal: seconds of a step at the chips' peak, where that is known.
    """
    self.seconds = seconds
    self._batch_size = batch_size
    self._ideal = ideal
    self._since: float | None = None
    self._waited = 0.0
    self._last = (0, seconds)

  def start(self, step: int | None = None) -> None:
    """Runs; with `step`, a window of measurement begins there."""
    self._since = time.perf_counter()
    if step is not None:
      self._last = (step, self.seconds)

  def stop(self) -> None:
    """Stands still."""
    self._tick()
    self._since = None

  def wait(self, seconds: float) -> None:
    """Adds time that the devices spent without a step, waiting for data."""
    self._waited += seconds

  def read(self, step: int) -> dict[str, float]:
    """Speed of the steps since the last reading, and a new window.

    Returns:
      `examples_per_second`, `step_ms`, `data_wait` (a share of the time, an
      upper bound), and `mfu` where the peak of the chip is known.
    """
    self._tick()
    first, begin = self._last
    steps, seconds = step - first, max(self.seconds - begin, 1e-9)
    speed = {
        "examples_per_second": steps * self._batch_size / seconds,
        "step_ms": 1000 * seconds / max(steps, 1),
        "data_wait": min(self._waited / seconds, 1.0),
    }
    if self._ideal is not None:
      speed["mfu"] = steps * self._ideal / seconds
    self._last, self._waited = (step, self.seconds), 0.0
    return speed

  def _tick(self) -> None:
    now = time.perf_counter()
    if self._since is not None:
      self.seconds += now - self._since
      self._since = now


def progress_line(
    step: int, steps: int, values: Scalars, speed: Mapping[str, float]
) -> str:
  """One line for a person: the step, the losses, the speed, the time left."""
  parts = [f"step {step:,}/{steps:,}"]
  parts += [f"{name} {value:.4g}" for name, value in values.items()]
  parts.append(f"{speed['examples_per_second']:,.0f} examples/s")
  parts.append(f"{speed['step_ms']:.3g} ms/step")
  parts.append(f"data wait {speed['data_wait']:.0%}")
  if "mfu" in speed:
    parts.append(f"MFU {speed['mfu']:.1%}")
  parts.append(f"ETA {duration((steps - step) * speed['step_ms'] / 1000)}")
  return "  ".join(parts)


def duration(seconds: float) -> str:
  """Seconds as `4:05`, `1:02:03` or `3d 1:02:03`."""
  minutes, s = divmod(round(seconds), 60)
  hours, m = divmod(minutes, 60)
  days, h = divmod(hours, 24)
  if not hours:
    return f"{m}:{s:02}"
  return (f"{days}d " if days else "") + f"{h}:{m:02}:{s:02}"


def table(values: Scalars) -> str:
  """Names and numbers in two columns."""
  width = max((len(name) for name in values), default=0)
  return "\n".join(
      f"{name:{width}}  {value:,.6g}" for name, value in values.items()
  )
