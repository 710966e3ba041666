"""How else can a TinyWorld picture be perceived? Five companions of one scene.

For every picture of a digit there are a film of it, speech about it, its depth,
its heat and the movement of the pen that wrote it. They are rendered from the
same pose of the same digit:

- film: the digit drifts on from where the picture shows it;
- speech: a voice says the digit, or the colour and the digit;
- depth: strokes stand out as ridges from a ground that leans;
- heat: ink is warm and cools: what was written last glows most;
- movement: what an inertial sensor in the pen feels. The pen leans about the
  writing hand, so the gyroscope sees its velocity and gravity its place, beside
  the acceleration itself.

Each shows the digit, and none but film and speech its colour.
"""

from collections.abc import Sequence
import functools
from typing import Any

import numpy as np

from mmjax.data import audio as audio_lib
from mmjax.data.audio import RATE
from mmjax.data.batch import Example
from mmjax.data.tinyworld import (
    digits,
    sounds,
    speech,
    spoken,
    strokes,
    tasks,
    text,
)
from mmjax.data.tinyworld.digits import Dice, Split
from mmjax.data.tinyworld.render import Pose
from mmjax.data.tinyworld.speech import Voice
from mmjax.data.tinyworld.tasks import Deck
from mmjax.data.tinyworld.text import Look
from mmjax.data.tokenizers import ClipTokenizer

# How far a film's digit drifts from frame to frame, as a fraction of the side.
_DRIFT = 0.04

# Disparities: of the ground's middle, how far it leans, of a stroke on top.
_GROUND, _LEAN, _RIDGE = 0.3, 0.15, 0.4
# Heats: of the room, of ink just written.
_ROOM, _INK = 0.15, 0.7
# How much of a writing's time ink takes to cool to 1 / e.
_COOLING = (0.4, 0.9)
_SENSOR_NOISE = 0.02

# The pen: metres to a side of the picture, from the tip to the hand, lifted
# above the paper; gravity; seconds that are felt.
_SIDE, _LEVER, _LIFT, _GRAVITY, _SECONDS = 0.02, 0.12, 0.003, 9.81, 2.0
# How long a digit takes to write, as a share of what is felt.
_WRITING = (0.5, 0.8)
# To bring metres per square second, and radians per second, to about 1.
_ACCELERATION_UNIT, _ROTATION_UNIT = 0.5, 0.2
_PEN_NOISE = 0.05
# A hand's movement is smooth over so many of 128 samples.
_SMOOTH = 9 / 128

# Samples from frame to frame of a spectrogram.
_HOP = RATE // 100


def depth(pose: Pose, ink: np.ndarray, size: int, dice: Dice) -> np.ndarray:
  """Disparities f32[size, size], 1 near and 0 far.

  Args:
    pose: of the digit.
    ink: f32[h, w], see `Pose.ink`.
    size: side of the picture in pixels.
    dice: how the ground leans, and noise.
  """
  across = np.linspace(-1, 1, size, dtype=np.float32)
  lean = dice.between(-_LEAN, _LEAN), dice.between(-_LEAN, _LEAN)
  found = _GROUND + lean[0] * across[:, None] + lean[1] * across
  found += _SENSOR_NOISE * sounds.noise(size * size, dice).reshape(size, size)
  found[pose.window] += _RIDGE * ink
  return np.clip(found, 0, 1)


def thermal(
    pose: Pose, ink: np.ndarray, age: np.ndarray, size: int, dice: Dice
) -> np.ndarray:
  """Heats f32[size, size], 1 hot and 0 cold.

  Args:
    pose: of the digit.
    ink: f32[h, w], see `Pose.ink`.
    age: u8[h, w], the warped `strokes.age`.
    size: side of the picture in pixels.
    dice: how fast ink cools, and noise.
  """
  passed = 1.0 - age.astype(np.float32) / 255
  heat = np.zeros((size, size), np.float32)
  heat[pose.window] = ink * np.exp(-passed / dice.between(*_COOLING))
  heat = _ROOM + _INK * _blur(heat)
  heat += _SENSOR_NOISE * sounds.noise(size * size, dice).reshape(size, size)
  return np.clip(heat, 0, 1)


def _blur(image: np.ndarray) -> np.ndarray:
  """Every pixel takes a quarter from each two neighbours along both axes."""
  for axis in (0, 1):
    image = 0.5 * image + 0.25 * (
        np.roll(image, 1, axis) + np.roll(image, -1, axis)
    )
  return image


def movement(
    pose: Pose, path: strokes.Path, count: int, size: int, dice: Dice
) -> np.ndarray:
  """What the pen feels in two seconds: f32[count, 6].

  Accelerometer x, y, z in units of 0.5 m/s^2, gravity's constant share left
  out; gyroscope x, y, z in units of 0.2 rad/s.

  Args:
    pose: of the digit.
    path: how it was written.
    count: samples.
    size: side of the picture in pixels.
    dice: when and how fast it is written, and noise.
  """
  lasts = dice.between(*_WRITING)
  begin = dice.between(0.05, 0.95 - lasts)
  clock = (np.linspace(0, 1, count) - begin) / lasts
  place, down = path.at(np.clip(clock, 0, 1))
  place = pose.turn(place - digits.GLYPH_SIDE / 2) * (_SIDE / size)
  height = _LIFT * (1.0 - down)
  tip, velocity, felt = _motion(count) @ np.column_stack([place, height])
  lean = tip[:, :2] / _LEVER
  felt[:, :2] += _GRAVITY * lean
  turning = np.zeros_like(felt)
  # Leaning to the right turns about the axis that points up the page.
  turning[:, 0] = -velocity[:, 1] / _LEVER
  turning[:, 1] = velocity[:, 0] / _LEVER
  # A hand that moves forth twists the pen a little.
  turning[:, 2] = 0.3 * (turning[:, 0] + turning[:, 1])
  sensed = np.concatenate(
      [felt / _ACCELERATION_UNIT, turning / _ROTATION_UNIT], axis=1
  )
  grain = _PEN_NOISE * sounds.noise(sensed.size, dice).reshape(sensed.shape)
  return (sensed + grain).astype(np.float32)


@functools.cache
def _motion(count: int) -> np.ndarray:
  """What makes a hand's way, velocity and acceleration of where it should be.

  Returns:
    f64[3, count, count], of which each is multiplied by f64[count, axes].
  """
  step = _SECONDS / (count - 1)
  way = _smooth(np.eye(count))
  velocity = np.gradient(way, step, axis=0)
  return np.stack([way, velocity, np.gradient(velocity, step, axis=0)])


def _smooth(signal: np.ndarray) -> np.ndarray:
  """Every column of f64[n, c] under a Hann window; the ends go on."""
  size = max(3, round(_SMOOTH * len(signal))) | 1
  window = np.hanning(size + 2)[1:-1]
  window /= window.sum()
  padded = np.pad(signal, ((size // 2, size // 2), (0, 0)), "edge")
  return np.stack(
      [np.convolve(column, window, "valid") for column in padded.T], axis=1
  )


@functools.lru_cache(maxsize=2**15)
def _heard(
    said: str, voice: Voice, count: int, bands: int
) -> tuple[np.ndarray, int]:
  """An utterance at the begin of a clip of a quiet room.

  Kept for all: it takes longer to make than all else of an example.

  Returns:
    f16[count, bands], and how many frames the utterance lasts.
  """
  samples = (count + 2) * _HOP
  dice = Dice("heard", said, *voice)
  audio = sounds.ROOM * sounds.noise(samples, dice)
  utterance = speech.speak(said, voice).audio[:samples]
  audio[: len(utterance)] += utterance
  mel = audio_lib.imagebind_mel(audio, count, bands)
  return mel.astype(np.float16), len(utterance) // _HOP


class Senses:
  """Pictures of one digit with captions and all their companions.

  Keys: those of `CaptionedDigits`, and `video`, `mel`, `depth`, `thermal` and
  `imu`.
  """

  def __init__(
      self,
      split: Split,
      tokenizer: ClipTokenizer | None = None,
      size: int = 32,
      frames: int = 2,
      mel: tuple[int, int] = (128, 64),
      samples: int = 128,
      length: int | None = None,
      seed: int = 0,
      variety: float = 1.0,
      warp: float = 0.0,
      masked: int = 0,
      looks: Sequence[Look] | None = None,
  ) -> None:
    """A source of `length` examples.

    Args:
      split: "train" or "test".
      tokenizer: as for `CaptionedDigits`.
      size: side of picture, film, depth and heat in pixels.
      frames: of a film; 0 for no `video`.
      mel: frames of 10 ms and bands of the speech, as ImageBind hears it.
      samples: of the pen's movement.
      length: as for `CaptionedDigits`.
      seed: likewise.
      variety: likewise.
      warp: likewise.
      masked: how many neighbouring bands, and frames, of the speech are covered
        at most (SpecAugment, Park et al. 2019).
      looks: as for `CaptionedDigits`.

    Raises:
      ValueError: if an argument cannot be.
    """
    if looks is not None:
      if length not in (None, len(looks)):
        raise ValueError(f"length={length}, but there are {len(looks)} looks")
      length = len(looks)
    self._deck = Deck.make("senses", split, size, length, seed, variety, warp)
    self._tokenizer = tokenizer or ClipTokenizer.tinyworld(
        length=tasks.DIGIT_CAPTION_LENGTH
    )
    self._size, self._frames, self._mel = size, frames, mel
    self._samples, self._masked, self._looks = samples, masked, looks

  def __len__(self) -> int:
    return self._deck.length

  def __getitem__(self, index: int) -> Example:
    deck, size = self._deck, self._size
    position, look, caption = self._deal(index)
    image, pose, ink = deck.posed(
        position, size, look, deck.dice(index, "picture")
    )
    ink = ink[..., 0]
    age = pose.warp(strokes.age(deck.split, position))
    dice = deck.dice(index, "senses")
    film = self._film(index, position, look) if self._frames else {}
    return film | {
        "image": image,
        "tokens": self._tokenizer.encode(caption),
        "mel": self._speech(index, look),
        "depth": depth(pose, ink, size, dice),
        "thermal": thermal(pose, ink, age, size, dice),
        "imu": movement(
            pose, strokes.path(deck.split, position), self._samples, size, dice
        ),
        "label": np.int32(look.digit),
        "identity": np.int32(look.identity),
    }

  def caption(self, index: int) -> str:
    """The text behind the `tokens` of an example."""
    return self._deal(index)[2]

  def look(self, index: int) -> Look:
    """What the example shows."""
    return self._deal(index)[1]

  def said(self, index: int) -> tuple[str, Voice]:
    """What is said behind `mel`, and who says it."""
    return self._said(index, self.look(index))

  def _deal(self, index: int) -> tuple[int, Look, str]:
    position, dice = self._deck.deal(index)
    hand = digits.hand(self._deck.split)
    if self._looks is None:
      look = Look.drawn(hand.labels[position], dice)
      return position, look, text.digit_caption(look, dice)
    look = self._looks[index]
    position = dice.choose(hand.of_digit[look.digit])
    return position, look, text.digit_caption(look)

  def _said(self, index: int, look: Look) -> tuple[str, Voice]:
    dice = self._deck.dice(index, "speech")
    said = spoken.phrase(look.digit, look.colour, dice)
    return said, dice.choose(speech.voices(self._deck.split))

  def _film(self, index: int, position: int, look: Look) -> Example:
    """`video`; the same dice for every frame keep the hand."""
    dice = self._deck.dice(index, "film")
    drift = dice.between(-_DRIFT, _DRIFT), dice.between(-_DRIFT, _DRIFT)
    frames = [
        self._deck.posed(
            position,
            self._size,
            look,
            self._deck.dice(index, "picture"),
            (frame * drift[0], frame * drift[1]),
        )[0]
        for frame in range(self._frames)
    ]
    return {"video": np.stack(frames)}

  def _speech(self, index: int, look: Look) -> np.ndarray:
    """f32[M, mels], somewhere in the clip."""
    count, bands = self._mel
    said, voice = self._said(index, look)
    dice = self._deck.dice(index, "clip")
    clip, lasts = _heard(said, voice, count, bands)
    clip = clip.astype(np.float32)
    clip = np.roll(clip, dice.below(max(count - lasts, 0) + 1), axis=0)
    if self._masked:
      for axis, length in enumerate((count, bands)):
        covered = dice.below(self._masked + 1)
        begin = dice.below(length - covered + 1)
        spot = [slice(None)] * 2
        spot[axis] = slice(begin, begin + covered)
        clip[tuple(spot)] = clip.mean()
    return clip


def sensed_looks(
    split: Split = "test",
    n: int = 100,
    seed: int = 0,
    **options: Any,
) -> Senses:
  """`n` examples of `Senses` that look pairwise different."""
  looks = tasks.distinct_looks(n, seed)
  return Senses(split, seed=seed, looks=looks, **options)
