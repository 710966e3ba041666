"""What is heard in TinyWorld besides speech? Ten sounds with names, and noise.

A sound is made of a few numbers that chance draws: a pitch, a speed, how fast
it fades. All are f32[S] at 16 kHz, in [-1, 1].
"""

from collections.abc import Callable
import functools
import hashlib

import numpy as np

from mmjax.data.audio import RATE
from mmjax.data.batch import Example
from mmjax.data.tinyworld import render
from mmjax.data.tinyworld.digits import Dice, Split
from mmjax.data.tinyworld.tasks import Deck

# Of silence in a room, relative to the loudest sound.
ROOM = 0.002
_NOISE_SECONDS = 16


def noise(count: int, dice: Dice) -> np.ndarray:
  """White noise of deviation 1, nearly normal: f32[count].

  Raises:
    ValueError: for more than is kept, 8 s.
  """
  field = _field()
  if count > len(field) // 2:
    raise ValueError(f"noise of {count} samples: at most {len(field) // 2}")
  start = dice.below(len(field) - count)
  return field[start : start + count]


@functools.cache
def _field() -> np.ndarray:
  """Sums of four fixed bytes: f32[n], read-only."""
  count = _NOISE_SECONDS * RATE
  data = hashlib.shake_128(b"tinyworld noise, heard").digest(4 * count)
  sums = np.frombuffer(data, np.uint8).reshape(count, 4).sum(axis=1)
  found = (sums - 510.0).astype(np.float32)
  found /= found.std()
  found.setflags(write=False)
  return found


def _phase(hertz: np.ndarray) -> np.ndarray:
  return 2.0 * np.pi * np.cumsum(hertz) / RATE


def _tone(time: np.ndarray, dice: Dice) -> np.ndarray:
  return np.sin(2 * np.pi * dice.between(400, 1200) * time)


def _hum(time: np.ndarray, dice: Dice) -> np.ndarray:
  turns = dice.between(60, 140) * time
  return 2.0 * (turns % 1.0) - 1.0


def _chirp(time: np.ndarray, low: float, high: float) -> np.ndarray:
  return np.sin(_phase(np.geomspace(low, high, len(time))))


def _rising(time: np.ndarray, dice: Dice) -> np.ndarray:
  return _chirp(time, dice.between(200, 500), dice.between(1500, 4000))


def _falling(time: np.ndarray, dice: Dice) -> np.ndarray:
  return _chirp(time, dice.between(1500, 4000), dice.between(200, 500))


def _siren(time: np.ndarray, dice: Dice) -> np.ndarray:
  middle, turns = dice.between(600, 1000), dice.between(1.5, 4)
  return np.sin(_phase(middle * (1 + 0.4 * np.sin(2 * np.pi * turns * time))))


def _hiss(time: np.ndarray, dice: Dice) -> np.ndarray:
  return 0.3 * noise(len(time), dice)


def _rumble(time: np.ndarray, dice: Dice) -> np.ndarray:
  size = 40 + dice.below(60)
  white = noise(len(time) + size - 1, dice)
  return 0.3 * np.convolve(white, np.full(size, size**-0.5), "valid")


def _clicks(time: np.ndarray, dice: Dice) -> np.ndarray:
  every = dice.between(0.08, 0.25)
  since = time % every
  return np.exp(-since * 800) * np.sign(np.sin(2 * np.pi * 3000 * since))


def _bell(time: np.ndarray, dice: Dice) -> np.ndarray:
  base, fade = dice.between(500, 900), dice.between(2, 5)
  partials = ((1.0, 1.0), (2.76, 0.6), (5.4, 0.3))
  ring = lambda pitch, rate: np.sin(2 * np.pi * pitch * time) * np.exp(
      -rate * time
  )
  return 0.5 * sum(
      size * ring(base * ratio, fade * ratio) for ratio, size in partials
  )


def _knocks(time: np.ndarray, dice: Dice) -> np.ndarray:
  since = time % dice.between(0.2, 0.4)
  return np.exp(-since * 40) * np.sin(2 * np.pi * dice.between(90, 160) * since)


SOUNDS: dict[str, Callable[[np.ndarray, Dice], np.ndarray]] = {
    "a tone": _tone,
    "a hum": _hum,
    "a rising chirp": _rising,
    "a falling chirp": _falling,
    "a siren": _siren,
    "a hiss": _hiss,
    "a rumble": _rumble,
    "clicks": _clicks,
    "a bell": _bell,
    "knocks": _knocks,
}
NAMES = tuple(SOUNDS)


def sound(name: str, count: int, dice: Dice) -> np.ndarray:
  """One of `SOUNDS`, of `count` samples, with a room around it."""
  time = np.arange(count) / RATE
  loud = dice.between(0.2, 0.7)
  made = loud * SOUNDS[name](time, dice)
  # Neither end may click.
  edge = np.minimum(1.0, np.minimum(time, time[::-1]) * 100)
  made = made * edge + ROOM * noise(count, dice)
  return np.clip(made, -1, 1).astype(np.float32)


class SoundEvents:
  """Sounds with names: `audio`, `label` (index into `NAMES`)."""

  def __init__(
      self,
      split: Split,
      seconds: float = 2.0,
      length: int | None = None,
      seed: int = 0,
  ) -> None:
    """A source of `length` examples.

    Args:
      split: "train" or "test".
      seconds: of every sound, at most 8.
      length: examples an epoch; by default as many as pictures have.
      seed: another seed is another set of sounds.
    """
    # No picture is drawn of any size.
    self._deck = Deck.make(
        "sound events", split, render.SMALLEST, length, seed, variety=0.0
    )
    self._count = round(seconds * RATE)

  def __len__(self) -> int:
    return self._deck.length

  def __getitem__(self, index: int) -> Example:
    _, dice = self._deck.deal(index)
    label = index % len(NAMES)
    return {
        "audio": sound(NAMES[label], self._count, dice),
        "label": np.int32(label),
    }

  def caption(self, index: int) -> str:
    """The name of what is heard."""
    return NAMES[index % len(NAMES)]
