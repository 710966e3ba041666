"""mmjax bench data [--media jpeg,wav] [--batch N] [--json FILE]

Measures how many examples a second come out of a loader: shuffled, decoded,
transformed and stacked. The same files lie in a folder, in tars, in Parquet,
in ArrayRecords and in a TFDS directory, read by threads; the folder also by as
many workers as there are cores. Where PyTorch is installed its DataLoader reads
the folder with the same decoding and transform, in a process of its own, with
as many workers and without any. TFDS is also read as it is, with its own
decoder and sampler of indices. All use all cores that this process may use;
taskset chooses fewer. "CPU ms" is what an example costs of one core, workers
included: unlike the time of a batch it does not depend on what else runs on the
machine.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
import io
import math
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any
import wave

from absl import flags
import numpy as np

from mmjax import config as config_lib
from mmjax.data import mixture, sources
from mmjax.data.sources import fields, media, tf_example, write
from mmjax.verbs import _timing

Row = dict[str, Any]

TWINS = "mmjax.verbs._bench_torch:data_contestants"

SIZE = 224
RATE, SAMPLES = 16_000, 32_000
_SHARD = 64
# Batches a step: as many as lie ready when a turn begins, which its first step
# takes without being timed.
STEP = 4
# Pictures as photographs are: some detail, and larger than they are used.
_WIDTH, _HEIGHT = 500, 375
_OWN_RATE, _SECONDS = 44_100, 3.0


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  flags.DEFINE_list(
      "media", list(MEDIA), "what to read", flag_values=values
  )
  flags.DEFINE_integer(
      "batch", 32, "examples a batch", lower_bound=1, flag_values=values
  )
  flags.DEFINE_integer(
      "files", 256, "files of each kind", lower_bound=1, flag_values=values
  )


def prepare(values: flags.FlagValues) -> list[str]:
  """The names in --media.

  Raises:
    ValueError: if one does not exist, or there are less files than rows.
  """
  for name in values.media:
    config_lib.pick(MEDIA, name, "--media")
  if values.files < values.batch:
    raise ValueError(f"--files={values.files}: less than --batch")
  return values.media


def rows(
    names: list[str], values: flags.FlagValues, report: Mapping[str, Any]
) -> Iterator[Row]:
  """The rows of the table, as they are measured."""
  del report
  for name in names:
    yield from measure(
        name, values.files, values.batch, values.rounds, values.patience
    )


def measure(
    name: str, count: int, batch: int, rounds: int, patience: float
) -> Iterator[Row]:
  """Measures all loaders of one kind of file."""
  cores = _timing.threads()
  steps = multiprocessing.get_context("spawn").Value("q", 0)
  with tempfile.TemporaryDirectory(prefix="mmjax-bench-") as folder:
    places = lay_out(pathlib.Path(folder), name, count)
    ours = contestants(places, name, batch, cores)
    meter = Meter(steps)
    turns = {
        loader: meter.counted(
            loader,
            functools.partial(_timing.turn, functools.partial(run, one, steps)),
            os.getpid(),
        )
        for loader, one in ours.items()
    }
    worker = None
    if _timing.version("torch"):
      worker = _timing.Worker(
          TWINS, places["folder"], name, batch, cores, steps, daemon=False
      )
      turns |= {
          loader: meter.counted(loader, turn, worker.pid)
          for loader, turn in worker.turns.items()
      }
    try:
      seconds, others = _timing.interleave(turns, rounds, patience)
    finally:
      if worker is not None:
        worker.close()
  yield from _rows_of(name, batch, cores, seconds, meter.spent, others)


def _rows_of(
    name: str,
    batch: int,
    cores: int,
    seconds: Mapping[str, list[float]],
    spent: Mapping[str, list[float]],
    others: float,
) -> Iterator[Row]:
  """The numbers of each loader, and how they compare with PyTorch's best."""
  wall = {k: statistics.median(s) / STEP / batch for k, s in seconds.items()}
  cpu = {k: statistics.median(s) / STEP / batch for k, s in spent.items()}
  twins = [loader for loader in wall if loader.startswith("torch")]
  fastest = min((wall[k] for k in twins), default=math.nan)
  cheapest = min((cpu[k] for k in twins), default=math.nan)
  for loader in wall:
    yield {
        "media": name,
        "loader": loader,
        "batch": batch,
        "seconds": wall[loader],
        "spread": _timing.spread(seconds[loader]),
        "per_core": 1 / wall[loader] / cores,
        "of_torch": fastest / wall[loader],
        "cpu_seconds": cpu[loader],
        "cpu_of_torch": cheapest / cpu[loader],
        "rounds": seconds[loader],
        "others": others,
    }


def heading() -> str:
  """The names of the columns."""
  return (
      f"{'files':6}{'loader':20}{'examples/s':>11}{'per core':>10}"
      f"{'x torch':>9}{'spread':>8}{'CPU ms':>8}{'x torch':>9}{'others':>8}"
  )


def line(row: Row) -> str:
  """One row of the table."""
  return (
      f"{row['media']:6}{row['loader']:20}{1 / row['seconds']:11,.0f}"
      f"{row['per_core']:10,.0f}{row['of_torch']:9.2f}{row['spread']:8.0%}"
      f"{row['cpu_seconds'] * 1e3:8.2f}{row['cpu_of_torch']:9.2f}"
      f"{row['others']:8.2f}"
  )


# --- the cost of a step -------------------------------------------------------


def run(one: Callable[[], Any], steps: Any) -> None:
  """A step: several batches, counted where the other process sees it."""
  for _ in range(STEP):
    one()
  steps.value += 1


class Meter:
  """CPU seconds that a loader spends on a step, its workers included."""

  def __init__(self, steps: Any) -> None:
    self.spent: dict[str, list[float]] = {}
    self._steps = steps

  def counted(
      self, loader: str, turn: _timing.Turn, process: int
  ) -> _timing.Turn:
    """`turn`, which notes what its steps cost `process`."""

    def measured() -> tuple[float, float]:
      before, steps = settled(process), self._steps.value
      found = turn()
      cost = settled(process) - before
      count = self._steps.value - steps
      self.spent.setdefault(loader, []).append(cost / count)
      return found

    turn()  # What it reads ahead lies ready from now on.
    return measured


def settled(process: int, wait: float = 0.1) -> float:
  """CPU seconds of a process and those below it, once they rest."""
  found, last = cpu_seconds(process), -1.0
  while found - last > 0.2 * wait:
    time.sleep(wait)
    found, last = cpu_seconds(process), found
  return found


def cpu_seconds(process: int) -> float:
  """CPU seconds of a living process and of all that descend from it."""
  parents, ticks = {}, {}
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      # The name before may hold anything but ends with the last bracket.
      words = path.read_text().rpartition(")")[2].split()
    except OSError:  # It has ended meanwhile.
      continue
    number = int(path.parent.name)
    parents[number] = int(words[1])
    ticks[number] = int(words[11]) + int(words[12])

  def descends(number: int) -> bool:
    while number and number != process:
      number = parents.get(number, 0)
    return bool(number)

  return sum(ticks[n] for n in ticks if descends(n)) / os.sysconf("SC_CLK_TCK")


# --- files --------------------------------------------------------------------


def make_jpeg(index: int) -> bytes:
  """A JPEG file of smooth colours and some noise, about 60 kB."""
  from PIL import Image

  rng = np.random.default_rng(index)
  coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
  picture = Image.fromarray(coarse).resize((_WIDTH, _HEIGHT))
  noise = rng.normal(0, 12, (_HEIGHT, _WIDTH, 1))
  pixels = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "JPEG", quality=90)
  return file.getvalue()


def make_wav(index: int) -> bytes:
  """A WAV file of 3 seconds of two channels at 44.1 kHz."""
  rng = np.random.default_rng(index)
  time = np.arange(int(_OWN_RATE * _SECONDS)) / _OWN_RATE
  tones = np.sin(2 * np.pi * rng.uniform(100, 2000, 2)[:, None] * time)
  samples = (tones.T * 2**14).astype("<i2")
  file = io.BytesIO()
  with wave.open(file, "wb") as out:
    out.setnchannels(2)
    out.setsampwidth(2)
    out.setframerate(_OWN_RATE)
    out.writeframes(samples.tobytes())
  return file.getvalue()


def lay_out(folder: pathlib.Path, name: str, count: int) -> dict[str, str]:
  """Writes the same files in every form; returns where each form is."""
  ending, make, _ = MEDIA[name]
  original = folder / "folder"
  original.mkdir()
  for i in range(count):
    (original / f"{i:06}.{ending}").write_bytes(make(i))
    (original / f"{i:06}.cls").write_text(str(i))
  places = {"folder": str(original)}
  records = sources.Folder(places["folder"])
  for form in ("webdataset", "parquet", "arrayrecord"):
    places[form] = str(folder / form)
    write.convert(records, places[form], form, _SHARD)
  if _timing.version("tensorflow-datasets"):
    places["tfds"] = str(folder / "tfds")
    _write_tfds(records, ending, folder / "tfds")
  return places


def _write_tfds(
    records: sources.Folder, ending: str, folder: pathlib.Path
) -> None:
  """One shard, with the file as a picture or as bytes."""
  from array_record.python import array_record_module
  import tensorflow_datasets as tfds

  folder.mkdir()
  path = folder / "files-train.array_record-00000-of-00001"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for i in range(len(records)):
    record = records[i] | {"cls": i}
    writer.write(tf_example.serialise(record))
  writer.close()
  template = tfds.core.ShardedFileTemplate(
      data_dir=folder,
      template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
      dataset_name="files",
      split="train",
      filetype_suffix="array_record",
  )
  split = tfds.core.SplitInfo(
      name="train",
      shard_lengths=[len(records)],
      num_bytes=os.path.getsize(path),
      filename_template=template,
  )
  file = (
      tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
      if ending == "jpg"
      else tfds.features.Tensor(shape=(), dtype=np.object_)
  )
  tfds.folder_dataset.write_metadata(
      data_dir=str(folder),
      features=tfds.features.FeaturesDict({ending: file, "cls": np.int64}),
      split_infos=[split],
      check_data=False,
  )


# --- loaders ------------------------------------------------------------------


def jpeg_field() -> fields.Field:
  """What becomes of a JPEG file."""
  return sources.Picture("jpg", SIZE)


def wav_field() -> fields.Field:
  """What becomes of a WAV file."""
  return sources.Sound("wav", RATE, SAMPLES)


# Ending of the files, what makes one, what reads one.
MEDIA: dict[
    str, tuple[str, Callable[[int], bytes], Callable[[], fields.Field]]
] = {
    "jpeg": ("jpg", make_jpeg, jpeg_field),
    "wav": ("wav", make_wav, wav_field),
}


def contestants(
    places: Mapping[str, str], name: str, batch: int, cores: int
) -> dict[str, Callable[[], Any]]:
  """name -> a function that takes one batch out of one of our loaders."""
  _, _, field = MEDIA[name]
  key = "image" if name == "jpeg" else "audio"
  steps = {}
  for form, place in places.items():
    split = "train" if form == "tfds" else None
    examples = sources.Examples(
        sources.open_records(place, split),
        {key: field(), "label": sources.Label("cls")},
    )
    batches = functools.partial(
        mixture.batches, [mixture.Stream(examples)], batch_size=batch, seed=0
    )
    rows = batches(threads=cores, prefetch=STEP)
    steps[f"mmjax {form}"] = functools.partial(next, rows)
    if form == "folder":
      # Processes, as PyTorch's: what a decoder does under Python's lock does
      # not hold up another.
      ahead = max(1, STEP // cores)
      rows = batches(workers=cores, threads=0, prefetch=ahead)
      steps[f"mmjax {cores} workers"] = functools.partial(next, rows)
  if "tfds" in places:
    steps["tfds alone"] = _tfds_step(places["tfds"], name, batch)
  return steps


def _tfds_step(place: str, name: str, batch: int) -> Callable[[], Any]:
  """TFDS as its documentation says: a data source, and a sampler of indices."""
  import tensorflow_datasets as tfds

  from mmjax.data import transforms

  data = tfds.builder_from_directory(place).as_data_source("train")
  rng = np.random.default_rng(0)

  def one(record: Mapping[str, Any]) -> np.ndarray:
    if name == "wav":
      seconds = SAMPLES / RATE
      wave = media.sound(record["wav"], RATE, seconds=seconds)[:SAMPLES]
      return np.pad(wave, (0, SAMPLES - len(wave)))
    from PIL import Image

    return transforms.clip_image(Image.fromarray(record["jpg"]), SIZE)

  def step() -> None:
    found = data.__getitems__(rng.integers(len(data), size=batch).tolist())
    np.stack([one(record) for record in found])
    np.stack([record["cls"] for record in found])

  return step
