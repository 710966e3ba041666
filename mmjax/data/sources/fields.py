"""How does a field of a record become a key of an example?

Each class is one kind of value; a config names them by key:
`fields=dict(image=dict(type="mmjax.data.sources:Picture", field="jpg;png",
size=224), ...)`. `field` is what `records.find` takes.
"""

from collections.abc import Callable, Sequence
import dataclasses
import io
from typing import Any, Protocol

import numpy as np

from mmjax import config as config_lib
from mmjax.data.sources import limits as limits_lib
from mmjax.data.sources import media
from mmjax.data.sources.limits import Limits
from mmjax.data.sources.records import BadRecord, Record, find

_CLIP = "mmjax.data.transforms:clip_image"


class Field(Protocol):
  """What `Examples` asks of a field."""

  field: str

  def __call__(self, record: Record) -> np.ndarray:
    """The value under one key of the example.

    Raises:
      BadRecord: if the record cannot give it.
    """
    ...


def _function(path: str | Callable[..., Any]) -> Callable[..., Any]:
  return config_lib.locate(path) if isinstance(path, str) else path


@dataclasses.dataclass(frozen=True)
class Picture:
  """A PNG, JPEG, WebP or GIF (its first frame) as f32[size, size, 3].

  Attributes:
    field: holds the file.
    size: side in pixels.
    transform: `(PIL image, size) -> array`, or where it is, "module:name".
    limits: what a file may cost.
  """

  field: str
  size: int
  transform: str | Callable[..., np.ndarray] = _CLIP
  limits: Limits = limits_lib.DEFAULT

  def __post_init__(self) -> None:
    _function(self.transform)  # Wrong names are found before any data is read.

  def __call__(self, record: Record) -> np.ndarray:
    """f32[size, size, 3]."""
    data = find(record, self.field)
    transform = _function(self.transform)
    return media.picture(data, transform, self.size, self.limits)


@dataclasses.dataclass(frozen=True)
class Frames:
  """Frames of a video (MP4, Matroska, WebM, AVI), f32[frames, size, size, 3].

  Attributes:
    field: holds the file.
    frames: how many, evenly spread over the time.
    size: side in pixels.
    transform: as of `Picture`, for each frame.
    limits: what a file may cost.
  """

  field: str
  frames: int
  size: int
  transform: str | Callable[..., np.ndarray] = _CLIP
  limits: Limits = limits_lib.DEFAULT

  def __post_init__(self) -> None:
    _function(self.transform)

  def __call__(self, record: Record) -> np.ndarray:
    """f32[frames, size, size, 3]."""
    data = find(record, self.field)
    transform = _function(self.transform)
    return media.video(data, self.frames, transform, self.size, self.limits)


@dataclasses.dataclass(frozen=True)
class Sound:
  """The first `samples` of a sound, or with silence behind, f32[samples].

  Attributes:
    field: holds a WAV, FLAC, OGG or MP3 file, or an array [T] or
      [T, channels], whose integers are taken for 16 bit.
    rate: samples a second.
    samples: how many.
    array_rate: samples a second where the field holds an array.
    limits: what a file may cost.
  """

  field: str
  rate: int
  samples: int
  array_rate: int | None = None
  limits: Limits = limits_lib.DEFAULT

  def __call__(self, record: Record) -> np.ndarray:
    """f32[samples]."""
    value = find(record, self.field)
    if isinstance(value, (bytes, bytearray, memoryview)):
      seconds = self.samples / self.rate
      wave = media.sound(value, self.rate, self.limits, seconds)
    else:
      wave = self._from_array(np.asarray(value))
    wave = wave[: self.samples]
    return np.pad(wave, (0, self.samples - len(wave)))

  def _from_array(self, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "if" or values.ndim not in (1, 2):
      raise BadRecord(
          f"{self.field!r}: expected a sound file or samples [T] or "
          f"[T, channels], found {values.dtype}{list(values.shape)}"
      )
    if self.array_rate is None:
      raise ValueError(f"Sound: {self.field!r} holds arrays: say array_rate")
    self.limits.check(seconds=len(values) / self.array_rate)
    scale = 1.0 if values.dtype.kind == "f" else 2.0**-15
    wave = (values * scale).astype(np.float32)
    if wave.ndim == 2:
      wave = wave.mean(axis=1)
    return media.resample(wave, self.array_rate, self.rate)


@dataclasses.dataclass(frozen=True)
class Text:
  """A text as ids of a tokenizer, i32[L].

  Attributes:
    field: holds UTF-8 or a string.
    tokenizer: with `encode(text) -> i32[L]` of one length for all.
  """

  field: str
  tokenizer: Any

  def __call__(self, record: Record) -> np.ndarray:
    """i32[L]."""
    words = text(find(record, self.field), self.field)
    try:
      return self.tokenizer.encode(words)
    except ValueError as error:
      raise BadRecord(f"{self.field!r}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Label:
  """A whole number, or the place of a name among `classes`, as i32[]."""

  field: str
  classes: Sequence[str] | None = None

  def __call__(self, record: Record) -> np.ndarray:
    """i32[]."""
    value = find(record, self.field)
    if self.classes is None:
      try:
        return np.int32(int(value))
      except (TypeError, ValueError, OverflowError):
        raise BadRecord(
            f"{self.field!r}: expected a whole number, found {value!r:.60}"
        ) from None
    word = text(value, self.field).strip()
    if word not in self.classes:
      raise BadRecord(
          f"{self.field!r}: {word!r:.60} is not one of the "
          f"{len(self.classes)} classes{config_lib.nearest(word, self.classes)}"
      )
    return np.int32(self.classes.index(word))


@dataclasses.dataclass(frozen=True)
class Numbers:
  """An array of fixed shape: of a list, or of an .npy file without objects.

  Attributes:
    field: holds it.
    shape: that it must have.
    dtype: that it is turned into.
  """

  field: str
  shape: Sequence[int]
  dtype: str = "float32"

  def __call__(self, record: Record) -> np.ndarray:
    """dtype[shape]."""
    value = find(record, self.field)
    try:
      if isinstance(value, (bytes, bytearray, memoryview)):
        value = np.load(io.BytesIO(value), allow_pickle=False)
      array = np.asarray(value, self.dtype)
    except (TypeError, ValueError, OSError, EOFError) as error:
      raise BadRecord(f"{self.field!r}: no array: {error}") from None
    if array.shape != tuple(self.shape):
      raise BadRecord(
          f"{self.field!r}: expected {tuple(self.shape)}, found {array.shape}"
      )
    return array


def text(value: Any, field: str) -> str:
  """A text out of a record.

  Raises:
    BadRecord: if it is neither a string nor UTF-8.
  """
  if isinstance(value, (bytes, bytearray, memoryview)):
    try:
      return bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
      raise BadRecord(f"{field!r}: not UTF-8: {error.reason}") from None
  if not isinstance(value, str):
    raise BadRecord(
        f"{field!r}: expected a text, found {type(value).__name__}"
    )
  return value
