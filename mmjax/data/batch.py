"""What may a batch hold? The one alphabet of keys, shapes and dtypes.

A batch is a flat dict of arrays. Sources, objectives and evaluators meet only
through the names below, so a key means the same everywhere.
"""

from collections.abc import Mapping
import dataclasses
import difflib
from typing import TYPE_CHECKING, Protocol, TypeAlias, Union

import numpy as np

if TYPE_CHECKING:
  import jax

Batch: TypeAlias = Mapping[str, Union[np.ndarray, "jax.Array"]]
# One row of a batch: the same keys without the leading axis.
Example: TypeAlias = dict[str, np.ndarray]


class Source(Protocol):
  """A random-access source of examples."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Spec:
  """What one key holds.

  Attributes:
    dtype: numpy's name of the element type.
    axes: one letter an axis; equal letters have equal sizes within a batch.
    meaning: one sentence.
  """

  dtype: str
  axes: tuple[str, ...]
  meaning: str

  def __str__(self) -> str:
    return f"{_short(self.dtype)}[{', '.join(self.axes)}]"


KEYS: dict[str, Spec] = {
    "image": Spec(
        "float32",
        ("B", "H", "W", "C"),
        "A picture, channels last, in [-1, 1] or as its system normalises it.",
    ),
    "images": Spec(
        "float32",
        ("B", "N", "H", "W", "C"),
        "Pictures of one example in order; slots behind the last are 0.",
    ),
    "patches": Spec(
        "float32",
        ("B", "patches", "values"),
        "A picture of any shape as its patches, row by row; 0 behind the last.",
    ),
    "grid": Spec(
        "int32", ("B", "2"), "Rows and columns of a picture's patches."
    ),
    "video": Spec(
        "float32",
        ("B", "F", "H", "W", "C"),
        "Frames of a film in order, as `image`.",
    ),
    "depth": Spec(
        "float32",
        ("B", "H", "W"),
        "Disparity of every pixel: 1 is near, 0 far.",
    ),
    "thermal": Spec(
        "float32", ("B", "H", "W"), "Heat of every pixel: 1 is hot, 0 cold."
    ),
    "imu": Spec(
        "float32",
        ("B", "I", "6"),
        "Accelerometer x, y, z, then gyroscope x, y, z, over time.",
    ),
    "audio": Spec(
        "float32", ("B", "S"), "Samples of one channel in [-1, 1]."
    ),
    "mel": Spec(
        "float32",
        ("B", "M", "mels"),
        "Log energies of mel bands over time, as their system normalises them.",
    ),
    "tokens": Spec(
        "int32", ("B", "L"), "Ids of a tokenizer, padded to a fixed length."
    ),
    "targets": Spec(
        "int32",
        ("B", "M"),
        "Ids that a decoder apart from what reads `tokens` is to write; -1 "
        "behind their end.",
    ),
    "question": Spec(
        "int32",
        ("B", "asked"),
        "Ids that a part of the system reads beside `tokens`, in its own "
        "vocabulary; 0 behind the end.",
    ),
    "label": Spec("int32", ("B",), "Index of the right class."),
    "identity": Spec(
        "int32", ("B",), "Examples of equal identity are interchangeable."
    ),
    "weight": Spec(
        "float32", ("B", "L"), "How much the loss at a token counts."
    ),
    "position": Spec("int32", ("B", "L"), "Where in its sequence a token is."),
    "segment": Spec(
        "int32",
        ("B", "L"),
        "Which packed document a token belongs to, from 1; 0 is padding.",
    ),
    "source": Spec(
        "int32",
        ("B", "L"),
        "Which row of the example's media features, flattened over its media, "
        "stands in the place of a token; -1 for none.",
    ),
    "media": Spec(
        "int32",
        ("B", "L"),
        "Index of the last medium that its document showed up to a token; -1 "
        "before the first.",
    ),
    "anchor": Spec(
        "int32", ("B",), "Index of the token whose state stands for the text."
    ),
    "anchors": Spec(
        "int32",
        ("B", "N"),
        "Index of the token whose state stands for the text of each picture.",
    ),
    "kind": Spec(
        "int32",
        ("B",),
        "Which data set of a mixture an example is from, from 0.",
    ),
    "valid": Spec("float32", ("B",), "1 for an example, 0 for a padding row."),
}


def check(batch: Batch, where: str) -> None:
  """Refuses a batch that the alphabet does not allow.

  Args:
    batch: arrays, or anything with `dtype` and `shape`, under the names of
      `KEYS`, each with its leading axis B.
    where: what made the batch; it opens the message.

  Raises:
    ValueError: one message with every unknown key (and the nearest valid one),
      wrong dtype, wrong rank and letter that has two sizes.
  """
  faults = []
  sizes: dict[str, dict[int, list[str]]] = {}
  for key, value in batch.items():
    spec = KEYS.get(key)
    if spec is None:
      near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]
      faults.append(f"{key!r} is no key of a batch; the nearest is {near!r}")
      continue
    shape = tuple(value.shape)
    found = f"{_short(str(value.dtype))}[{', '.join(map(str, shape))}]"
    if str(value.dtype) != spec.dtype or len(shape) != len(spec.axes):
      faults.append(f"{key!r} must be {spec}, is {found}")
      continue
    for letter, size in zip(spec.axes, shape, strict=True):
      sizes.setdefault(letter, {}).setdefault(size, []).append(key)
  for letter, found_sizes in sizes.items():
    if len(found_sizes) > 1:
      parts = [f"{n} in {', '.join(k)}" for n, k in found_sizes.items()]
      faults.append(f"axis {letter} has several sizes: {'; '.join(parts)}")
  if faults:
    lines = "".join(f"\n  {fault}" for fault in faults)
    raise ValueError(
        f"{where}: not a batch:{lines}\n"
        f"Keys of a batch: {', '.join(KEYS)} (mmjax/data/batch.py)."
    )


def _short(dtype: str) -> str:
  for name, letter in (("float", "f"), ("uint", "u"), ("int", "i")):
    dtype = dtype.replace(name, letter)
  return dtype
