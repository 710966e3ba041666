"""mmjax data show|stats|convert --source [KIND:]PATH [flags]

Looks at data on disk, and turns one form of it into another.

  show     prints the first records, and draws their pictures with --figure
  stats    counts records, sizes, durations, and which fields are there
  convert  writes the records to a new directory, --out, as --format

PATH is a file, a pattern ("cc-{000..331}.tar", "*.parquet") or a directory.
KIND is webdataset, parquet, arrayrecord, tfds or folder, and is guessed where
it is not said. Media are copied as they are, never decoded or renamed by what
the source calls them; --out has all of the records or does not exist.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import json
import pathlib
from typing import Any

from absl import flags
import numpy as np

from mmjax import config as config_lib
from mmjax import verbs
from mmjax.data import sources
from mmjax.data.sources import limits, media, stats, write
from mmjax.data.sources.records import BadRecord, Records

_SIDE = 128
_TEXT = 300


def main(argv: Sequence[str]) -> int:
  """Runs the verb; see `mmjax.verbs` for the exit codes."""
  if not argv or argv[0] not in _WHAT:
    rest = [word for word in argv if word.startswith("-")]
    return verbs.run(__doc__, rest, _define, _refuse(argv[:1]))
  return verbs.run(__doc__, argv[1:], _define, _WHAT[argv[0]])


def _refuse(words: Sequence[str]) -> Callable[[flags.FlagValues], int]:
  def refuse(values: flags.FlagValues) -> int:
    del values
    near = config_lib.nearest(words[0], _WHAT) if words else ""
    raise ValueError(
        f"say what to do: mmjax data {'|'.join(_WHAT)} [flags]{near}"
    )

  return refuse


def _define(values: flags.FlagValues, argv: Sequence[str]) -> None:
  del argv
  flags.DEFINE_string(
      "source", None, "[KIND:]PATH of the records", flag_values=values
  )
  flags.DEFINE_string(
      "split", None, "of a TFDS directory: train[10%:]", flag_values=values
  )
  flags.DEFINE_integer(
      "count", 3, "show: records", lower_bound=1, flag_values=values
  )
  flags.DEFINE_string(
      "figure", None, "show: a PNG to draw pictures in", flag_values=values
  )
  flags.DEFINE_integer(
      "limit",
      None,
      "stats: read so many records, spread over all",
      lower_bound=1,
      flag_values=values,
  )
  flags.DEFINE_string(
      "json", None, "stats: a file for all numbers", flag_values=values
  )
  flags.DEFINE_string(
      "out", None, "convert: a directory to make", flag_values=values
  )
  flags.DEFINE_string(
      "format",
      "arrayrecord",
      f"convert: {', '.join(write.WRITERS)}",
      flag_values=values,
  )
  flags.DEFINE_integer(
      "shard_size",
      1000,
      "convert: records in a file",
      lower_bound=1,
      flag_values=values,
  )


def _records(values: flags.FlagValues) -> Records:
  if values.source is None:
    raise ValueError("--source: say where the records are")
  return sources.open_records(values.source, values.split)


# --- show ---------------------------------------------------------------------


def _show(values: flags.FlagValues) -> int:
  records = _records(values)
  print(
      f"{len(records):,} records ({type(records).__name__}) with "
      f"{', '.join(records.fields)}"
  )
  pictures, captions = [], []
  for index in range(min(values.count, len(records))):
    print(f"\n{records.name(index)}")
    try:
      found = list(stats.flat(records[index]))
    except BadRecord as error:
      print(f"  cannot be read: {error}")
      continue
    width = max(len(name) for name, _ in found)
    for name, value in found:
      print(f"  {name:{width}}  {describe(value)}")
    if values.figure:
      for picture in map(_thumbnail, (value for _, value in found)):
        if picture is not None:
          pictures.append(picture)
          captions.append(_caption(found))
  if values.figure:
    _draw(values.figure, pictures, captions)
  return verbs.DONE


def describe(value: Any) -> str:
  """One line about a value of a record."""
  if isinstance(value, (bytes, bytearray, memoryview)):
    size = f"{len(value):,} bytes"
    try:
      found = media.facts(value)
    except BadRecord as error:
      return f"{limits.kind(value)}, {size}, broken: {error}"
    if found is not None:
      pixels = f" {found.width} x {found.height}" if found.width else ""
      time = f" {found.seconds:.2f} s" if found.seconds else ""
      return f"{found.format}{pixels}{time}, {found.detail}, {size}"
    kind = stats.kind_of(value)
    if kind not in ("text", "JSON"):
      return f"{kind}, {size}"
    value = bytes(value[: 4 * _TEXT + 4]).decode(errors="replace")
  if isinstance(value, str):
    # As Python writes it: a text may hold what moves a terminal's cursor.
    return repr(value[:_TEXT]) + ("..." if len(value) > _TEXT else "")
  if isinstance(value, (list, np.ndarray)):
    array = np.asarray(value)
    return f"{array.dtype}{list(array.shape)}"
  return repr(value)


def _thumbnail(value: Any) -> np.ndarray | None:
  """A picture f32[H, W, 3] in [-1, 1] where `value` is one."""
  if not isinstance(value, bytes) or limits.kind(value) not in limits.IMAGES:
    return None
  try:
    return media.picture(value, _fit, _SIDE)
  except BadRecord:
    return None


def _fit(picture: Any, size: int) -> np.ndarray:
  picture = picture.convert("RGB").resize((size, size))
  return np.asarray(picture, np.float32) / 127.5 - 1


def _caption(found: Sequence[tuple[str, Any]]) -> str:
  for _, value in found:
    if isinstance(value, bytes) and stats.kind_of(value) == "text":
      value = value.decode()
    if isinstance(value, str) and limits.kind(value.encode()) is None:
      return value[:90]
  return ""


def _draw(
    path: str, pictures: Sequence[np.ndarray], captions: Sequence[str]
) -> None:
  from PIL import Image

  from mmjax.evals import figures

  if not pictures:
    raise ValueError("--figure: none of the records shown has a picture")
  sheet = figures.captioned_grid(
      pictures, captions, [True] * len(pictures), side=_SIDE
  )
  Image.fromarray(sheet).save(path, format="PNG")
  print(f"\n{len(pictures)} pictures in {path}")


# --- stats --------------------------------------------------------------------


def _stats(values: flags.FlagValues) -> int:
  records = _records(values)
  count = min(values.limit or len(records), len(records))
  indices = [i * len(records) // count for i in range(count)]
  found = stats.collect(records, track(indices, "reading"), limits.DEFAULT)
  part = "" if count == len(records) else f", {count:,} of them read"
  print(f"{len(records):,} records{part}, {len(found['bad']):,} faults")
  print(
      f"{'field':18}{'there':>7}  {'what':16}{'bytes (median, all)':>24}"
      "  least, median, most"
  )
  for name, row in found["fields"].items():
    print(_line(name, row, found["records"]))
  for fault in found["bad"][:10]:
    print(f"  {fault}")
  if len(found["bad"]) > 10:
    print(f"  and {len(found['bad']) - 10} more; --json lists all")
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(found, indent=2) + "\n")
  return verbs.DONE


def _line(name: str, row: dict[str, Any], records: int) -> str:
  kinds = sorted(row["kinds"], key=row["kinds"].get, reverse=True)
  size = f"{row['bytes']['median']:,.0f}, {row['bytes']['total']:,}"
  more = []
  for key, unit, digits in (
      ("width", "wide", 0), ("height", "high", 0), ("seconds", "s", 2),
  ):
    if key in row:
      numbers = (row[key][k] for k in ("least", "median", "most"))
      more.append(f"{', '.join(f'{n:.{digits}f}' for n in numbers)} {unit}")
  if "seconds" in row:
    more.append(f"{row['seconds']['total'] / 3600:.2f} h in all")
  share = row["count"] / max(records, 1)
  return (
      f"{name:18}{share:7.1%}  {', '.join(kinds):16}{size:>24}  "
      + "; ".join(more)
  ).rstrip()


# --- convert ------------------------------------------------------------------


def _convert(values: flags.FlagValues) -> int:
  if values.out is None:
    raise ValueError("--out: say which directory to make")
  if pathlib.Path(values.out).exists():  # Before all records are listed.
    raise FileExistsError(
        f"--out: {values.out} exists; remove it, or name another directory"
    )
  records = _records(values)
  count, faults = write.convert(
      records,
      values.out,
      values.format,
      values.shard_size,
      lambda indices: track(indices, "writing"),
  )
  print(f"{count:,} records in {values.out} ({values.format})")
  if faults:
    path = pathlib.Path(f"{values.out}.left-out.txt")
    path.write_text("".join(f"{fault}\n" for fault in faults))
    print(f"{len(faults):,} could not be read and were left out: see {path}")
  return verbs.DONE


def track(indices: Sequence[int], what: str) -> Iterator[int] | Iterable[int]:
  """Passes indices on and shows on stderr how far they are."""
  from rich import console, progress

  return progress.track(
      indices,
      what,
      console=console.Console(stderr=True),
      transient=True,
  )


_WHAT = {"show": _show, "stats": _stats, "convert": _convert}
