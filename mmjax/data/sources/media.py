"""How do the bytes of a picture, sound or video become arrays? Under limits.

Whatever a decoding library says of a broken file becomes a `BadRecord`.
"""

from collections.abc import Callable, Iterator
import contextlib
import io
import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmjax.data.sources import limits as limits_lib
from mmjax.data.sources.limits import Limits
from mmjax.data.sources.records import BadRecord, optional

# Samples that are decoded at once, and seconds that a resampler looks ahead.
_BLOCK = 2**16
_AHEAD = 0.1

_CONTAINERS = {"MP4": "mp4", "MATROSKA": "matroska", "AVI": "avi"}


class Facts(NamedTuple):
  """What the head of a file says.

  Attributes:
    format: as in `limits`.
    width, height: in pixels; 0 of a sound.
    seconds: 0 of a picture.
    detail: for people: the mode, the rate, the frames.
  """

  format: str
  width: int
  height: int
  seconds: float
  detail: str


def picture(
    data: bytes,
    transform: Callable[[Image.Image, int], np.ndarray],
    size: int,
    limits: Limits = limits_lib.DEFAULT,
) -> np.ndarray:
  """`transform(picture, size)` of a picture; of a moving one, its first frame.
  """
  with _open_picture(data, limits) as (found, image):
    with _broken(found):
      image.load()
    return transform(image, size)


def sound(
    data: bytes,
    rate: int,
    limits: Limits = limits_lib.DEFAULT,
    seconds: float = math.inf,
) -> np.ndarray:
  """The mean of a sound's channels.

  Args:
    data: a WAV, FLAC, OGG or MP3 file.
    rate: samples a second of the result; others are resampled (soxr, HQ).
    limits: what it may cost.
    seconds: of the beginning, at least, that are wanted; a little more is read,
      since a resampler looks ahead.

  Returns:
    f32[T] in about [-1, 1].
  """
  with _open_sound(data, limits) as (found, file), _broken(found):
    own = file.samplerate
    # The head may promise more than there is, or less.
    most = int(min(seconds + _AHEAD, limits.seconds + 1) * own)
    parts, count = [], 0
    while count < most and len(
        part := file.read(min(_BLOCK, most - count), "float32", always_2d=True)
    ):
      parts.append(_mono(part))
      count += len(part)
    limits.check(seconds=count / own)
  if not parts:
    raise BadRecord(f"{found}: no samples")
  return resample(np.concatenate(parts), own, rate)


def _mono(samples: np.ndarray) -> np.ndarray:
  """The mean of the channels, f32[T, channels] to f32[T]."""
  # Channel by channel: numpy's mean is slow where the last axis is short.
  mean = samples[:, 0].copy()
  for channel in samples.T[1:]:
    mean += channel
  mean /= samples.shape[1]
  return mean


def resample(samples: np.ndarray, own: int, rate: int) -> np.ndarray:
  """f32[T] at `own` samples a second to f32[T'] at `rate`."""
  if own == rate:
    return samples
  soxr = optional("soxr", "resampling")
  return soxr.resample(samples, own, rate, quality="HQ").astype(np.float32)


def video(
    data: bytes,
    frames: int,
    transform: Callable[[Image.Image, int], np.ndarray],
    size: int,
    limits: Limits = limits_lib.DEFAULT,
) -> np.ndarray:
  """Frames of a video: the middles of `frames` equal spans of its time.

  Returns:
    f32[frames, size, size, 3].
  """
  kept = []
  with _open_video(data, limits) as (found, container, stream):
    with _broken(found):
      times = _times(container, stream, limits)
      span = (times[-1] - times[0]) / max(len(times) - 1, 1) * len(times)
      wanted = [times[0] + (k + 0.5) * span / frames for k in range(frames)]
      container.seek(0)
    shown = _shown_at(container.decode(stream), wanted, limits)
    while len(kept) < frames:
      with _broken(found):
        image = next(shown).to_image()
      kept.append(transform(image, size))
  return np.stack(kept)


def facts(data: bytes, limits: Limits = limits_lib.DEFAULT) -> Facts | None:
  """What a file is, by its head alone; None if it is no medium.

  Raises:
    BadRecord: if the head is broken or promises too much.
  """
  found = limits_lib.kind(data)
  if found in limits_lib.IMAGES:
    with _open_picture(data, limits) as (_, image):
      return Facts(found, image.width, image.height, 0.0, image.mode)
  if found in limits_lib.SOUNDS:
    with _open_sound(data, limits) as (_, file):
      seconds = file.frames / file.samplerate
      detail = f"{file.samplerate} Hz, {file.channels} ch"
      return Facts(found, 0, 0, seconds, detail)
  if found in limits_lib.VIDEOS:
    with _open_video(data, limits) as (_, container, stream), _broken(found):
      width, height = stream.codec_context.width, stream.codec_context.height
      times = _times(container, stream, limits)
      seconds = times[-1] - times[0]
      return Facts(found, width, height, seconds, f"{len(times)} frames")
  return None


@contextlib.contextmanager
def _broken(found: str) -> Iterator[None]:
  """Turns whatever a decoder raises into a `BadRecord`."""
  try:
    yield
  except (BadRecord, MemoryError):
    raise
  except StopIteration:
    raise BadRecord(f"{found}: no frame can be decoded") from None
  except Exception as error:
    reason = str(error).split("\n")[0] or type(error).__name__
    raise BadRecord(f"{found}: {reason}") from error


@contextlib.contextmanager
def _open_picture(
    data: bytes, limits: Limits
) -> Iterator[tuple[str, Image.Image]]:
  """A picture that is not yet decoded."""
  found = limits_lib.allowed(data, limits_lib.IMAGES, limits)
  with _broken(found):
    image = Image.open(io.BytesIO(data), formats=(found,))
  with image:
    limits.check(pixels=image.width * image.height)
    yield found, image


@contextlib.contextmanager
def _open_sound(data: bytes, limits: Limits) -> Iterator[tuple[str, Any]]:
  soundfile = optional("soundfile", "reading sounds")
  found = limits_lib.allowed(data, limits_lib.SOUNDS, limits)
  with _broken(found):
    file = soundfile.SoundFile(io.BytesIO(data))
  with file:
    with _broken(found):
      limits.check(rate=file.samplerate, channels=file.channels)
      limits.check(seconds=file.frames / file.samplerate)
    yield found, file


@contextlib.contextmanager
def _open_video(
    data: bytes, limits: Limits
) -> Iterator[tuple[str, Any, Any]]:
  av = optional("av", "reading videos")
  found = limits_lib.allowed(data, limits_lib.VIDEOS, limits)
  with _broken(found):
    # The container is named: others can refer to files and addresses.
    container = av.open(io.BytesIO(data), format=_CONTAINERS[found])
  with container:
    if not container.streams.video:
      raise BadRecord(f"{found}: no video in it")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None:
      raise BadRecord(f"{found}: its codec is unknown")
    limits.check(pixels=context.width * context.height)
    # The threads of the loader are enough.
    context.thread_count = 1
    yield found, container, stream


def _times(container: Any, stream: Any, limits: Limits) -> list[float]:
  """When the frames are shown, in seconds; nothing is decoded."""
  times = []
  for packet in container.demux(stream):
    if packet.pts is not None:
      times.append(float(packet.pts * packet.time_base))
      limits.check(frames=len(times))
  if not times:
    raise BadRecord("no frames")
  times.sort()
  limits.check(seconds=times[-1] - times[0])
  return times


def _shown_at(
    frames: Iterator[Any], wanted: list[float], limits: Limits
) -> Iterator[Any]:
  """For each time the last frame that is not later, else the first frame."""
  todo, shown = iter([*wanted, math.inf]), None
  time = next(todo)
  for frame in frames:
    # A stream may change its size on the way.
    limits.check(pixels=frame.width * frame.height)
    while shown is not None and (frame.time or 0.0) > time:
      yield shown
      time = next(todo)
    shown = frame
    if time == math.inf:
      return
  while shown is not None and time < math.inf:
    yield shown
    time = next(todo)
