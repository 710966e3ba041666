"""Which examples does TinyWorld offer? Random-access sources, one class a task.

Every source is a deterministic function of (task, split, seed, index) and
yields the keys of `mmjax.data.batch` without their leading axis. Test examples
show only digits of writers who wrote no training digit, and show each of them
equally often.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from mmjax.data.batch import Example
from mmjax.data.tinyworld import digits, render, text
from mmjax.data.tinyworld.digits import Dice, Split
from mmjax.data.tinyworld.text import Look, Scene
from mmjax.data.tokenizers import ClipTokenizer

TRAIN_LENGTH = 2**20
TEST_LENGTH = 4 * digits.TEST_COUNT
# Ids that hold the longest caption of a task in TinyWorld's vocabulary.
DIGIT_CAPTION_LENGTH = 16
SCENE_CAPTION_LENGTH = 32

# Heights of digits and how far their middles stray, as fractions of the side.
_HEIGHTS = ((0.56, 0.62), (0.8, 0.88))
_STRAY = 0.03
_SCENE_HEIGHT = (0.35, 0.41)
_SCENE_STRAY = 0.02
_SCENE_SPREAD = 0.23


@dataclasses.dataclass(frozen=True)
class Deck:
  """Deals every index of a source the same digit and dice, always."""

  task: str
  split: Split
  length: int
  seed: int
  variety: float
  warp: float

  @classmethod
  def make(
      cls,
      task: str,
      split: Split,
      size: int,
      length: int | None,
      seed: int,
      variety: float,
      warp: float = 0.0,
  ) -> "Deck":
    """A deck of `length` examples, by default as many as the split has.

    Raises:
      ValueError: one message with every argument that cannot be.
    """
    faults = []
    if split not in ("train", "test"):
      faults.append(f"split={split!r}: expected 'train' or 'test'")
    if size < render.SMALLEST or size > render.LARGEST:
      faults.append(
          f"size={size}: expected {render.SMALLEST} to {render.LARGEST} pixels"
      )
    if length is not None and length < 1:
      faults.append(f"length={length}: expected at least one example")
    if faults:
      raise ValueError(f"tinyworld {task}: " + "; ".join(faults))
    usual = TRAIN_LENGTH if split == "train" else TEST_LENGTH
    length = usual if length is None else length
    return cls(task, split, length, seed, variety, warp)

  def dice(self, index: int, *use: str | int) -> Dice:
    """Dice for one use within an example: one set would run out."""
    return Dice(self.task, self.split, self.seed, index, *use)

  def deal(self, index: int) -> tuple[int, Dice]:
    """The position of a digit in the split's `Hand`, and dice."""
    if not 0 <= index < self.length:
      raise IndexError(f"index {index} of {self.length} examples")
    dice = self.dice(index)
    return index % len(digits.hand(self.split).labels), dice

  def draw(
      self, position: int, size: int, look: Look, dice: Dice
  ) -> np.ndarray:
    """A picture of one digit, f32[size, size, 3]."""
    return self.posed(position, size, look, dice)[0]

  def posed(
      self,
      position: int,
      size: int,
      look: Look,
      dice: Dice,
      shift: tuple[float, float] = (0.0, 0.0),
  ) -> tuple[np.ndarray, render.Pose, np.ndarray]:
    """As `draw`, with pose and ink, so that more can be drawn alike.

    Args:
      position: of the digit in the split's `Hand`.
      size: side of the picture in pixels.
      look: what is shown.
      dice: draw the ground and the digit.
      shift: moves the digit right and down, in fractions of the side.
    """
    image = render.background(size, look.ground, dice)
    centre = tuple(
        0.5 + dice.between(-_STRAY, _STRAY) + along for along in shift
    )
    pose, ink = render.draw(
        image,
        digits.hand(self.split).glyphs[position],
        look.colour,
        centre,
        dice.between(*_HEIGHTS[look.size]),
        self.variety,
        dice,
        self.warp,
    )
    return image, pose, ink

  def draw_scene(
      self,
      positions: Sequence[int],
      scene: Scene,
      size: int,
      dice: Dice,
      strokes: Sequence[Dice],
      only: int | None = None,
  ) -> np.ndarray:
    """A picture of several digits, f32[size, size, 3].

    Args:
      positions: of the digits in the split's `Hand`.
      scene: what is shown.
      size: side of the picture in pixels.
      dice: draw the ground.
      strokes: draw each digit; they may be the same dice.
      only: the one digit that is drawn, where it stands; all by default.
    """
    glyphs = digits.hand(self.split).glyphs
    image = render.background(size, dice.below(len(text.GROUNDS)), dice)
    spots = text.LAYOUTS[scene.layout]
    for number, (position, colour, spot, own) in enumerate(
        zip(positions, scene.colours, spots, strokes, strict=True)
    ):
      if only not in (None, number):
        continue
      centre = tuple(
          0.5
          + _SCENE_SPREAD * (2 * place - 1)
          + own.between(-_SCENE_STRAY, _SCENE_STRAY)
          for place in spot
      )
      height = own.between(*_SCENE_HEIGHT)
      render.draw(
          image,
          glyphs[position],
          colour,
          centre,
          height,
          self.variety,
          own,
          self.warp,
      )
    return image


class Classification:
  """Pictures of one digit: `image`, `label` (the digit)."""

  def __init__(
      self,
      split: Split,
      size: int = 32,
      length: int | None = None,
      seed: int = 0,
      variety: float = 1.0,
      warp: float = 0.0,
  ) -> None:
    """A source of `length` examples.

    Args:
      split: "train" or "test".
      size: side of the pictures in pixels.
      length: examples an epoch; by default 2**20 to train, and to test every
        held-out digit four times.
      seed: another seed is another set of pictures of the same digits.
      variety: how far hands stray from how they wrote; more than 1 makes up
        for the few writers of the training split.
      warp: how far their strokes are bent as well, in pixels of the scan.

    Raises:
      ValueError: if an argument cannot be.
    """
    self._size = size
    self._deck = Deck.make(
        "classification", split, size, length, seed, variety, warp
    )

  def __len__(self) -> int:
    return self._deck.length

  def __getitem__(self, index: int) -> Example:
    position, dice = self._deck.deal(index)
    hand = digits.hand(self._deck.split)
    look = Look.drawn(hand.labels[position], dice)
    return {
        "image": self._deck.draw(position, self._size, look, dice),
        "label": np.int32(look.digit),
    }


class CaptionedDigits:
  """Pictures of one digit with captions.

  Keys: `image`, `tokens`, `label` (the digit) and `identity`, which says the
  size, colour, digit and ground.
  """

  def __init__(
      self,
      split: Split,
      tokenizer: ClipTokenizer | None = None,
      size: int = 32,
      length: int | None = None,
      seed: int = 0,
      variety: float = 1.0,
      warp: float = 0.0,
      looks: Sequence[Look] | None = None,
  ) -> None:
    """A source of `length` examples.

    Args:
      split: "train" or "test".
      tokenizer: of the captions; by default TinyWorld's own vocabulary and
        `DIGIT_CAPTION_LENGTH` ids.
      size: side of the pictures in pixels.
      length: as for `Classification`.
      seed: likewise.
      variety: likewise.
      warp: likewise.
      looks: what each example shows, instead of chance; the source is as long
        as they are many, and its captions are the canonical ones.

    Raises:
      ValueError: if an argument cannot be.
    """
    if looks is not None:
      if length not in (None, len(looks)):
        raise ValueError(f"length={length}, but there are {len(looks)} looks")
      length = len(looks)
    self._size = size
    self._looks = looks
    self._deck = Deck.make(
        "captioned digits", split, size, length, seed, variety, warp
    )
    self._tokenizer = tokenizer or _tokenizer(DIGIT_CAPTION_LENGTH)

  def __len__(self) -> int:
    return self._deck.length

  def __getitem__(self, index: int) -> Example:
    position, look, caption, dice = self._deal(index)
    return {
        "image": self._deck.draw(position, self._size, look, dice),
        "tokens": self._tokenizer.encode(caption),
        "label": np.int32(look.digit),
        "identity": np.int32(look.identity),
    }

  def caption(self, index: int) -> str:
    """The text behind the `tokens` of an example."""
    return self._deal(index)[2]

  def look(self, index: int) -> Look:
    """What the example shows."""
    return self._deal(index)[1]

  def _deal(self, index: int) -> tuple[int, Look, str, Dice]:
    position, dice = self._deck.deal(index)
    hand = digits.hand(self._deck.split)
    if self._looks is None:
      look = Look.drawn(hand.labels[position], dice)
      return position, look, text.digit_caption(look, dice), dice
    look = self._looks[index]
    position = dice.choose(hand.of_digit[look.digit])
    return position, look, text.digit_caption(look), dice


def retrieval_set(
    split: Split = "test",
    n: int = 100,
    size: int = 32,
    seed: int = 0,
    tokenizer: ClipTokenizer | None = None,
) -> CaptionedDigits:
  """`n` captioned digits whose canonical captions are pairwise distinct.

  Raises:
    ValueError: if `n` is not between 1 and the number of looks, 640.
  """
  looks = distinct_looks(n, seed)
  return CaptionedDigits(split, tokenizer, size, seed=seed, looks=looks)


def distinct_looks(n: int, seed: int) -> list[Look]:
  """`n` different looks, in random order.

  Raises:
    ValueError: if `n` is not between 1 and the number of looks, 640.
  """
  if not 1 <= n <= text.LOOKS:
    raise ValueError(f"n={n}: there are 1 to {text.LOOKS} distinct captions")
  order = sorted(
      range(text.LOOKS),
      key=lambda identity: Dice("retrieval", seed, identity).between(0, 1),
  )
  return [Look.from_identity(identity) for identity in order[:n]]


class CaptionedScenes:
  """Pictures of two or three digits with captions of how they stand.

  Keys: `image`, `tokens` and `identity`, which says the layout and every digit
  and colour; the ground is free.
  """

  def __init__(
      self,
      split: Split,
      tokenizer: ClipTokenizer | None = None,
      size: int = 32,
      length: int | None = None,
      seed: int = 0,
      variety: float = 1.0,
  ) -> None:
    """As `CaptionedDigits`, with `SCENE_CAPTION_LENGTH` ids by default."""
    self._size = size
    self._deck = Deck.make(
        "captioned scenes", split, size, length, seed, variety
    )
    self._tokenizer = tokenizer or _tokenizer(SCENE_CAPTION_LENGTH)

  def __len__(self) -> int:
    return self._deck.length

  def __getitem__(self, index: int) -> Example:
    positions, scene, caption, dice = self._deal(index)
    image = self._deck.draw_scene(
        positions, scene, self._size, dice, [dice] * len(positions)
    )
    return {
        "image": image,
        "tokens": self._tokenizer.encode(caption),
        "identity": np.int32(scene.identity),
    }

  def caption(self, index: int) -> str:
    """The text behind the `tokens` of an example."""
    return self._deal(index)[2]

  def scene(self, index: int) -> Scene:
    """What the example shows."""
    return self._deal(index)[1]

  def _deal(self, index: int) -> tuple[list[int], Scene, str, Dice]:
    position, dice = self._deck.deal(index)
    labels = digits.hand(self._deck.split).labels
    layout = dice.below(len(text.SPOTS))
    count = len(text.SPOTS[layout])
    # Different colours, so that no two digits of a scene look the same.
    colours = tuple(dice.sample(count, len(text.COLOURS)))
    positions = [position]
    positions += [dice.below(len(labels)) for _ in range(count - 1)]
    scene = Scene(layout, colours, tuple(labels[p] for p in positions))
    return positions, scene, text.scene_caption(scene, dice), dice


def _tokenizer(length: int) -> ClipTokenizer:
  return ClipTokenizer.tinyworld(length=length)
