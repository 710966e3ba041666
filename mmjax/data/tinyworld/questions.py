"""What can be asked about a TinyWorld picture? Conversations about scenes.

Every question has one right answer of one word, so that answers can be compared
letter by letter. Scenes show one to four digits in different colours.
"""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from mmjax.config import nearest
from mmjax.data.batch import Example
from mmjax.data.templates import IMAGE, Turn
from mmjax.data.tinyworld import digits, tasks, text
from mmjax.data.tinyworld.digits import Dice, Split
from mmjax.data.tinyworld.text import Scene

KINDS = ("digit", "count", "colour", "sum", "side")

# Those that need two digits.
OF_TWO = ("sum", "side")

INSTRUCTIONS = (
    "describe the picture.",
    "what is in the picture?",
    "what do you see?",
    "say what is shown.",
)

# By which attribute a kind of question must not name a digit: it would give the
# answer away.
_HIDDEN = {
    "digit": "digit", "colour": "colour", "sum": "digit", "side": "place"
}  # fmt: skip
# The kind of question that a name by an attribute answers by itself.
_TOLD = {"digit": "digit", "colour": "colour", "place": "side"}
_COUNTS = ("how many digits are there?", "how many digits do you see?")
# What is asked of two digits that differ in x, or in y: (first less, more).
_SIDES = (("left", "right"), ("above", "below"))
# Digits in a scene, and the layouts that have so many.
LAYOUTS = {
    count: tuple(
        layout
        for layout, spots in enumerate(text.LAYOUTS)
        if len(spots) == count
    )
    for count in (1, 2, 3, 4)
}


class Question(NamedTuple):
  """A question and its one right answer."""

  text: str
  answer: str


def names(scene: Scene, number: int) -> dict[str, str]:
  """The ways to name a digit of a scene, by the attribute that they use.

  Every name fits one digit only; "digit" is missing where a digit occurs twice.
  """
  digit = scene.digits[number]
  found = {
      "colour": f"the {text.COLOURS[scene.colours[number]]} digit",
      "place": f"the digit {scene.place(number)}",
  }
  if scene.digits.count(digit) == 1:
    found["digit"] = f"the {text.CLASSES[digit]}"
  return found


def ask(
    kind: str, scene: Scene, subject: int, dice: Dice, name: str | None = None
) -> Question:
  """A question about a digit of a scene.

  Args:
    kind: one of `KINDS`; "sum" and "side" need two digits.
    scene: what is shown.
    subject: which of its digits is asked about.
    dice: choose the words, and the other digit.
    name: what to call the subject ("it"); by default one of its `names`.
  """
  call = lambda n: dice.choose(
      [by for key, by in names(scene, n).items() if key != _HIDDEN[kind]]
  )
  if kind == "count":
    answer = text.NUMBERS[len(scene.digits)]
    return Question(dice.choose(_COUNTS), answer)
  if name is None:
    name = call(subject)
  digit = scene.digits[subject]
  if kind == "digit":
    return Question(f"which number is {name}?", text.CLASSES[digit])
  if kind == "colour":
    colour = text.COLOURS[scene.colours[subject]]
    return Question(f"what colour is {name}?", colour)
  other = dice.choose([n for n in range(len(scene.digits)) if n != subject])
  if kind == "sum":
    return Question(
        f"what is the sum of {name} and {call(other)}?",
        text.NUMBERS[digit + scene.digits[other]],
    )
  spots = text.LAYOUTS[scene.layout]
  here, there = spots[subject], spots[other]
  axis = dice.choose([a for a in (0, 1) if here[a] != there[a]])
  less, more = _SIDES[axis]
  of = " of" if axis == 0 else ""
  return Question(
      f"is {name} {less} or {more}{of} {call(other)}?",
      less if here[axis] < there[axis] else more,
  )


@dataclasses.dataclass(frozen=True)
class Scenery:
  """Deals every index of a source the same scene, and draws it."""

  deck: tasks.Deck
  size: int

  def deal(
      self, index: int, counts: Sequence[int], dice: Dice
  ) -> tuple[list[int], Scene]:
    """Positions in the split's `Hand`, and the scene of those digits.

    The digit that the deck deals stands anywhere among the others.
    """
    first, _ = self.deck.deal(index)
    labels = digits.hand(self.deck.split).labels
    count = dice.choose(counts)
    layout = dice.choose(LAYOUTS[count])
    colours = tuple(dice.sample(count, len(text.COLOURS)))
    positions = [dice.below(len(labels)) for _ in range(count - 1)]
    positions.insert(dice.below(count), first)
    shown = tuple(labels[position] for position in positions)
    return positions, Scene(layout, colours, shown)

  def picture(
      self,
      index: int,
      positions: Sequence[int],
      scene: Scene,
      only: int | None = None,
  ) -> np.ndarray:
    """The one picture of an example, f32[1, size, size, 3].

    It shows the digit `only` where one is named.
    """
    strokes = [self.deck.dice(index, "digit", n) for n in range(len(positions))]
    ground = self.deck.dice(index, "ground")
    return self.deck.draw_scene(
        positions, scene, self.size, ground, strokes, only
    )[None]


class SceneCaptions:
  """Conversations of one exchange: an instruction, and a scene's caption."""

  shown = 1

  def __init__(
      self,
      split: Split,
      size: int = 64,
      length: int | None = None,
      seed: int = 0,
      variety: float = 1.0,
      warp: float = 0.0,
      counts: Sequence[int] = (2, 3),
  ) -> None:
    """A source of `length` conversations.

    Args:
      split: "train" or "test".
      size: side of the pictures in pixels.
      length: as for `tasks.Classification`.
      seed: likewise.
      variety: likewise.
      warp: likewise.
      counts: how many digits a scene may show, of 1 to 4.

    Raises:
      ValueError: if an argument cannot be.
    """
    self._counts = checked_counts(counts)
    deck = tasks.Deck.make(
        "scene captions", split, size, length, seed, variety, warp
    )
    self._scenery = Scenery(deck, size)

  def __len__(self) -> int:
    return self._scenery.deck.length

  def scene(self, index: int) -> Scene:
    """What the example shows."""
    return self._deal(index)[1]

  def conversation(self, index: int) -> list[Turn]:
    """See `conversations.Conversations`."""
    _, scene, dice = self._deal(index)
    instruction = dice.choose(INSTRUCTIONS)
    return [
        Turn("user", f"{IMAGE}\n{instruction}"),
        Turn("assistant", text.scene_caption(scene, dice)),
    ]

  def pictures(self, index: int) -> np.ndarray:
    """The picture, f32[1, size, size, 3]."""
    positions, scene, _ = self._deal(index)
    return self._scenery.picture(index, positions, scene)

  def answer(self, index: int) -> str:
    """The caption; `text.read_scene` reads what it says."""
    return self.conversation(index)[-1].text

  def labels(self, index: int) -> Example:
    """None."""
    return {}

  def _deal(self, index: int) -> tuple[list[int], Scene, Dice]:
    dice = self._scenery.deck.dice(index)
    return *self._scenery.deal(index, self._counts, dice), dice


class VisualQuestions:
  """Conversations about a scene: questions, and answers of one word."""

  shown = 1

  def __init__(
      self,
      split: Split,
      size: int = 64,
      length: int | None = None,
      seed: int = 0,
      variety: float = 1.0,
      warp: float = 0.0,
      kinds: Sequence[str] = KINDS,
      exchanges: int = 1,
  ) -> None:
    """As `SceneCaptions`, about one to four digits.

    Args:
      split: "train" or "test".
      size: side of the pictures in pixels.
      length: as for `tasks.Classification`.
      seed: likewise.
      variety: likewise.
      warp: likewise.
      kinds: what may be asked, each as often: some of `KINDS`.
      exchanges: questions a conversation; they do not refer to each other, and
        may be the same.

    Raises:
      ValueError: if an argument cannot be.
    """
    _check("kinds", kinds, KINDS)
    if exchanges < 1:
      raise ValueError(f"exchanges={exchanges}: expected at least 1")
    self._kinds = tuple(kinds)
    self._exchanges = exchanges
    deck = tasks.Deck.make(
        "visual questions", split, size, length, seed, variety, warp
    )
    self._scenery = Scenery(deck, size)

  def __len__(self) -> int:
    return self._scenery.deck.length

  def kind(self, index: int) -> str:
    """What is asked first, one of `KINDS`."""
    return self._deal(index)[0]

  def scene(self, index: int) -> Scene:
    """What the example shows."""
    return self._deal(index)[2]

  def questions(self, index: int) -> list[Question]:
    """The questions with their answers, in order."""
    kind, _, scene, dice = self._deal(index)
    asked = [ask(kind, scene, dice.below(len(scene.digits)), dice)]
    kinds = [k for k in self._kinds if len(scene.digits) > 1 or k not in OF_TWO]
    for number in range(1, self._exchanges):
      dice = self._scenery.deck.dice(index, "question", number)
      subject = dice.below(len(scene.digits))
      asked.append(ask(dice.choose(kinds), scene, subject, dice))
    return asked

  def conversation(self, index: int) -> list[Turn]:
    """See `conversations.Conversations`."""
    turns = []
    for question in self.questions(index):
      shown = "" if turns else f"{IMAGE}\n"
      turns.append(Turn("user", f"{shown}{question.text}"))
      turns.append(Turn("assistant", question.answer))
    return turns

  def pictures(self, index: int) -> np.ndarray:
    """The picture, f32[1, size, size, 3]."""
    _, positions, scene, _ = self._deal(index)
    return self._scenery.picture(index, positions, scene)

  def answer(self, index: int) -> str:
    """The last answer."""
    return self.questions(index)[-1].answer

  def labels(self, index: int) -> Example:
    """None."""
    return {}

  def _deal(self, index: int) -> tuple[str, list[int], Scene, Dice]:
    dice = self._scenery.deck.dice(index)
    kind = dice.choose(self._kinds)
    counts = (2, 3, 4) if kind in OF_TWO else (1, 2, 3, 4)
    return kind, *self._scenery.deal(index, counts, dice), dice


class Dialogues:
  """Conversations of several exchanges about one digit of a scene.

  The first question names the digit; those that follow call it "it", so that
  only who remembers can answer. Nothing is asked that was told.
  """

  shown = 1

  def __init__(
      self,
      split: Split,
      size: int = 64,
      length: int | None = None,
      seed: int = 0,
      variety: float = 1.0,
      warp: float = 0.0,
      exchanges: int = 3,
  ) -> None:
    """As `SceneCaptions`, about two to four digits.

    Args:
      split: "train" or "test".
      size: side of the pictures in pixels.
      length: as for `tasks.Classification`.
      seed: likewise.
      variety: likewise.
      warp: likewise.
      exchanges: questions a conversation, 1 to 4, each of another kind.

    Raises:
      ValueError: if an argument cannot be.
    """
    # Naming the digit gives the answer of one kind away.
    most = len(KINDS) - 1
    if not 1 <= exchanges <= most:
      raise ValueError(
          f"exchanges={exchanges}: expected 1 to {most}, each of another kind"
      )
    self._exchanges = exchanges
    deck = tasks.Deck.make(
        "dialogues", split, size, length, seed, variety, warp
    )
    self._scenery = Scenery(deck, size)

  def __len__(self) -> int:
    return self._scenery.deck.length

  def scene(self, index: int) -> Scene:
    """What the example shows."""
    return self._deal(index)[1]

  def questions(self, index: int) -> list[Question]:
    """The questions with their answers, in order."""
    _, scene, dice = self._deal(index)
    subject = dice.below(len(scene.digits))
    first = dice.choose(("digit", "colour"))
    called = names(scene, subject)
    key = dice.choose([key for key in called if key != _HIDDEN[first]])
    asked = [ask(first, scene, subject, dice, called[key])]
    others = [kind for kind in KINDS if kind not in (first, _TOLD[key])]
    for n in dice.sample(self._exchanges - 1, len(others)):
      asked.append(ask(others[n], scene, subject, dice, "it"))
    return asked

  def conversation(self, index: int) -> list[Turn]:
    """See `conversations.Conversations`."""
    turns = []
    for question in self.questions(index):
      shown = "" if turns else f"{IMAGE}\n"
      turns.append(Turn("user", f"{shown}{question.text}"))
      turns.append(Turn("assistant", question.answer))
    return turns

  def pictures(self, index: int) -> np.ndarray:
    """The picture, f32[1, size, size, 3]."""
    positions, scene, _ = self._deal(index)
    return self._scenery.picture(index, positions, scene)

  def answer(self, index: int) -> str:
    """The last answer."""
    return self.questions(index)[-1].answer

  def labels(self, index: int) -> Example:
    """None."""
    return {}

  def _deal(self, index: int) -> tuple[list[int], Scene, Dice]:
    dice = self._scenery.deck.dice(index)
    return *self._scenery.deal(index, (2, 3, 4), dice), dice


def checked_counts(counts: Sequence[int]) -> tuple[int, ...]:
  """How many digits scenes may show, or an error that says how many."""
  _check("counts", counts, tuple(LAYOUTS))
  return tuple(counts)


def _check(name: str, found: Sequence, allowed: Sequence) -> None:
  unknown = [value for value in found if value not in allowed]
  if unknown or not found:
    near = nearest(str(unknown[0]), map(str, allowed)) if unknown else ""
    raise ValueError(f"{name}={found}: expected some of {allowed}{near}")
