"""In which order do the examples of several sources reach a training step?

Every stream is shuffled and repeated, the streams are mixed in proportion to
their weights, and each global batch of the mixture is cut among the processes.
What one process sees is therefore a part of a sequence that does not depend on
how many processes there are, and the state of an iterator is a step count that
any number of processes can resume from.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import itertools

from absl import flags
import grain
import numpy as np

from mmjax.data import batch as batch_lib
from mmjax.data.batch import Example, Source

# The longest epoch whose order is kept as a table.
_TABLE = 2**16


@dataclasses.dataclass(frozen=True)
class Stream:
  """One part of a mixture.

  Attributes:
    source: where the examples come from.
    weight: its share, relative to the weights of the other streams.
    transform: applied to each example.
  """

  source: Source
  weight: float = 1.0
  transform: Callable[[Example], Example] | None = None

  def example(self, index: int) -> Example:
    """An example as the mixture sees it."""
    return self._transformed(self.source[index])

  def examples(self, indices: Sequence[int]) -> list[Example]:
    """Several examples, in one read where the source has `read(indices)`."""
    read = getattr(self.source, "read", None)
    found = read(indices) if read else [self.source[i] for i in indices]
    return [self._transformed(example) for example in found]

  def _transformed(self, example: Example) -> Example:
    return example if self.transform is None else self.transform(example)


def batches(
    streams: Sequence[Stream],
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
    workers: int = 0,
    prefetch: int = 4,
    start: int = 0,
) -> "grain.DatasetIterator[dict[str, np.ndarray]] | _FromWorkers":
  """An endless iterator of this process's rows of the global batches.

  Args:
    streams: what to mix; all must have the same keys, dtypes and shapes.
    batch_size: rows of a global batch, B.
    seed: orders the examples; equal seeds give equal batches.
    process_index: this process, p of P; it gets rows `[p*B/P, (p+1)*B/P)`.
    process_count: P.
    threads: threads that prepare batches; 0 prepares them in the caller's.
    workers: operating-system processes that prepare them, each with so many
      threads; 0 prepares them in this one. Batches are the same for any number;
      each worker judges by its own share whether too many records are bad.
    prefetch: batches prepared ahead, at most; by each worker.
    start: global batches to skip.

  Returns:
    An iterator. `get_state()` is the number of batches taken, the same in every
    process; `set_state` continues from it, under any `process_count`.

  Raises:
    ValueError: one message with everything that is wrong with the arguments.
  """
  faults = _process_faults(batch_size, process_index, process_count)
  if threads < 0 or workers < 0:
    faults.append(f"threads={threads}, workers={workers}: expected at least 0")
  faults += _stream_faults(streams)
  if faults:
    raise ValueError("mixture: " + "\n  ".join(faults))
  rows = batch_size // process_count
  reader = _Reader(streams)
  parts = [
      _shuffled(addresses, _stream_seed(seed, number))
      for number, addresses in enumerate(reader.addresses())
  ]
  mixed = grain.MapDataset.mix(parts, [stream.weight for stream in streams])
  # Cut the sequence in pieces of B/P rows; a global batch is P of them.
  pieces = mixed.batch(rows, drop_remainder=True, batch_fn=reader)
  mine = pieces.slice(slice(process_index, None, process_count))
  options = grain.ReadOptions(
      num_threads=threads, prefetch_buffer_size=prefetch if threads else 0
  )
  iterator = (
      _FromWorkers(mine, options, workers, prefetch)
      if workers
      else iter(mine.to_iter_dataset(options))
  )
  if start:
    iterator.set_state({"next_index": start})
  return iterator


def eval_batches(
    source: Source,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """One pass over `source` in order: this process's rows of each global batch.

  Every batch has all its rows. Those behind the end of the source repeat its
  last example, and `valid` (f32[B]) is 0 there and 1 elsewhere.

  Args:
    source: at least one example.
    batch_size: rows of a global batch, B.
    process_index: this process, p of P; it gets rows `[p*B/P, (p+1)*B/P)`.
    process_count: P.

  Raises:
    ValueError: if the arguments cannot be; before the first batch is asked for.
  """
  faults = _process_faults(batch_size, process_index, process_count)
  faults += _stream_faults([Stream(source)])
  if faults:
    raise ValueError("evaluation: " + "\n  ".join(faults))
  rows = batch_size // process_count
  count = len(source)

  def generate() -> Iterator[dict[str, np.ndarray]]:
    for first in range(0, count, batch_size):
      begin = first + process_index * rows
      indices = range(begin, begin + rows)
      batch = _stack([source[min(i, count - 1)] for i in indices])
      batch["valid"] = np.asarray([i < count for i in indices], np.float32)
      yield batch

  return generate()


class _FromWorkers:
  """Batches that other processes prepare, in the order of one.

  The state of Grain's own iterator counts what each worker has done; any number
  of workers can go on from this one's.
  """

  def __init__(
      self,
      rows: grain.MapDataset[dict[str, np.ndarray]],
      options: grain.ReadOptions,
      workers: int,
      prefetch: int,
  ) -> None:
    self._rows = rows
    self._options = options
    self._processes = grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=max(1, prefetch)
    )
    self._taken = 0
    self._iterator: Iterator[dict[str, np.ndarray]] | None = None

  def __iter__(self) -> "_FromWorkers":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if self._iterator is None:
      # Grain reads its flags where it starts processes; a library has none.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      rest = self._rows.slice(slice(self._taken, None))
      dataset = rest.to_iter_dataset(self._options)
      self._iterator = iter(dataset.mp_prefetch(self._processes))
    batch = next(self._iterator)
    self._taken += 1
    return batch

  def get_state(self) -> dict[str, int]:
    """How many batches have been taken."""
    return {"next_index": self._taken}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to where so many have been taken; begins with new workers."""
    self.close()
    self._taken = state["next_index"]

  def close(self) -> None:
    """Ends the workers."""
    if self._iterator is not None:
      self._iterator.close()
    self._iterator = None


class _Reader:
  """Reads a batch of addresses, which count through all sources in turn.

  Grain shuffles and mixes the addresses rather than the examples: its care for
  every element that it passes on costs as much as half a TinyWorld example.
  """

  def __init__(self, streams: Sequence[Stream]) -> None:
    self._streams = tuple(streams)
    lengths = [len(stream.source) for stream in streams]
    self._ends = tuple(itertools.accumulate(lengths))
    self._begins = (0, *self._ends[:-1])

  def addresses(self) -> list[grain.MapDataset[int]]:
    """The addresses of each stream."""
    ranges = zip(self._begins, self._ends, strict=True)
    return [grain.MapDataset.range(begin, end) for begin, end in ranges]

  def __call__(self, addresses: Sequence[int]) -> dict[str, np.ndarray]:
    places: dict[int, list[int]] = {}
    for place, address in enumerate(addresses):
      number = bisect.bisect_right(self._ends, address)
      places.setdefault(number, []).append(place)
    examples: list[Example] = [{} for _ in addresses]
    for number, mine in places.items():
      indices = [addresses[place] - self._begins[number] for place in mine]
      found = self._streams[number].examples(indices)
      for place, example in zip(mine, found, strict=True):
        examples[place] = example
    return _stack(examples)


def _shuffled(
    addresses: grain.MapDataset[int], seed: int
) -> grain.MapDataset[int]:
  """Endless epochs, each in an order of its own."""
  count = len(addresses)
  if count > _TABLE:
    return addresses.shuffle(seed).repeat()
  # Grain finds a place in a short order by trial: 0.2 ms of 500, 3 ms of 20.
  begin = addresses[0]
  return addresses.repeat().map_with_index(
      lambda i, _: begin + int(_order(count, seed, i // count)[i % count])
  )


@functools.lru_cache(maxsize=32)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(count)


def _stream_seed(seed: int, number: int) -> int:
  # Grain counts a shuffle's seed up by one an epoch: seeds of streams must not
  # be neighbours, or one stream would follow another's order an epoch later.
  return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _stack(examples: Sequence[Example]) -> dict[str, np.ndarray]:
  return {
      key: np.stack([example[key] for example in examples])
      for key in examples[0]
  }


def _process_faults(batch_size: int, index: int, count: int) -> list[str]:
  faults = []
  if count < 1 or not 0 <= index < count:
    faults.append(f"process_index={index} of process_count={count} cannot be")
  elif batch_size < 1 or batch_size % count:
    faults.append(
        f"batch_size={batch_size} is not a positive multiple of the {count} "
        "processes"
    )
  return faults


def _stream_faults(streams: Sequence[Stream]) -> list[str]:
  if not streams:
    return ["no streams"]
  faults = []
  names = [
      f"stream {number} ({type(stream.source).__name__})"
      for number, stream in enumerate(streams)
  ]
  specs = {}
  for name, stream in zip(names, streams, strict=True):
    if not (stream.weight > 0 and np.isfinite(stream.weight)):
      faults.append(f"{name}: weight {stream.weight} is not positive")
    if len(stream.source) == 0:
      faults.append(f"{name}: no examples")
      continue
    row = _stack([stream.example(0)])
    try:
      batch_lib.check(row, name)
    except ValueError as error:
      faults.append(str(error))
      continue
    specs[name] = {k: f"{v.dtype}{list(v.shape[1:])}" for k, v in row.items()}
  return faults + _spec_faults(specs)


def _spec_faults(specs: dict[str, dict[str, str]]) -> list[str]:
  """Keys that some streams lack, and keys that differ in dtype or shape."""
  faults = []
  for key in dict.fromkeys(key for spec in specs.values() for key in spec):
    kinds: dict[str, list[str]] = {}
    for name, spec in specs.items():
      kinds.setdefault(spec.get(key, "missing"), []).append(name)
    if len(kinds) > 1:
      parts = [f"{kind} in {', '.join(who)}" for kind, who in kinds.items()]
      faults.append(f"key {key!r} differs: {'; '.join(parts)}")
  return faults
