"""What can be learned of TinyWorld without eyes? Conversations in text alone.

Descriptions stand where other sources show pictures, made of the same scenes
and looks, so that a language model that is trained on them speaks the language
of the visual tasks before it sees.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.data.batch import Example
from mmjax.data.conversations import Conversations
from mmjax.data.templates import IMAGE, Turn
from mmjax.data.tinyworld import documents, questions, text
from mmjax.data.tinyworld.digits import Dice, Split
from mmjax.data.tinyworld.questions import Question
from mmjax.data.tinyworld.text import Look, Scene


def describe_look(look: Look, dice: Dice, digit_only: float = 0.0) -> str:
  """A picture of one digit in words, `digit_only` of the time only which."""
  if dice.between(0, 1) < digit_only:
    return text.CLASSES[look.digit]
  if dice.below(2):
    return text.full_caption(look, dice)
  return (
      f"{text.SIZES[look.size]} {text.COLOURS[look.colour]} "
      f"{text.CLASSES[look.digit]} {text.GROUNDS[look.ground]}"
  )


def describe_scene(scene: Scene, dice: Dice) -> str:
  """A scene in words: a caption, or a list of what is where."""
  if dice.below(2):
    return text.scene_caption(scene, dice)
  things = zip(scene.colours, scene.digits, strict=True)
  return ", ".join(
      f"{text.COLOURS[colour]} {text.CLASSES[digit]} {scene.place(number)}"
      for number, (colour, digit) in enumerate(things)
  )


class _Unseen:
  """What sources without pictures have in common."""

  shown = 0

  def pictures(self, index: int) -> np.ndarray:
    """None are shown: f32[0, 1, 1, 3]."""
    del index  # All examples are alike.
    return np.zeros((0, 1, 1, 3), np.float32)

  def labels(self, index: int) -> Example:
    """None."""
    del index  # All examples are alike.
    return {}


class Told(_Unseen):
  """The conversations of another source with words in place of pictures."""

  def __init__(
      self, source: Conversations, digit_only: float = 0.0, seed: int = 0
  ) -> None:
    """Wraps a source.

    Args:
      source: TinyWorld's; it has `scene(index)`, or `looks(index)`.
      digit_only: how often a look is told by its digit alone.
      seed: another seed is other words for the same pictures.
    """
    self.source = source
    self._digit_only = digit_only
    self._seed = seed

  def __len__(self) -> int:
    return len(self.source)

  def __getattr__(self, name: str) -> Any:
    """`kind` and the like of the source."""
    if name == "source":  # While it is being copied to a worker.
      raise AttributeError(name)
    return getattr(self.source, name)

  def conversation(self, index: int) -> list[Turn]:
    """See `conversations.Conversations`."""
    told = iter(self.descriptions(index))
    turns = []
    for turn in self.source.conversation(index):
      first, *rest = turn.text.split(IMAGE)
      said = first + "".join(next(told) + part for part in rest)
      turns.append(turn._replace(text=said))
    return turns

  def descriptions(self, index: int) -> list[str]:
    """What stands for each picture."""
    dice = lambda number: Dice("told", self._seed, index, number)
    if hasattr(self.source, "looks"):
      return [
          describe_look(look, dice(number), self._digit_only)
          for number, look in enumerate(self.source.looks(index))
      ]
    return [describe_scene(self.source.scene(index), dice(0))]

  def answer(self, index: int) -> str:
    """See `conversations.Conversations`."""
    return self.source.answer(index)


class Quizzes(_Unseen):
  """A described scene, and many questions about it.

  One scene a question wastes a language model's time on descriptions, of which
  it learns little.
  """

  def __init__(
      self,
      split: Split,
      length: int = 2**20,
      seed: int = 0,
      counts: Sequence[int] = (1, 2, 3, 4),
      exchanges: int = 8,
      weight: float = 1.0,
  ) -> None:
    """A source of `length` conversations.

    Args:
      split: "train" or "test".
      length: examples an epoch.
      seed: another seed is other scenes.
      counts: how many digits a scene may show, of 1 to 4.
      exchanges: questions a conversation.
      weight: of the answers in the loss.

    Raises:
      ValueError: if an argument cannot be.
    """
    self._counts = questions.checked_counts(counts)
    if exchanges < 1 or length < 1:
      raise ValueError(
          f"length={length}, exchanges={exchanges}: expected at least 1"
      )
    self._split, self._length, self._seed = split, length, seed
    self._exchanges = exchanges
    self._weight = weight

  def __len__(self) -> int:
    return self._length

  def scene(self, index: int) -> Scene:
    """What is described."""
    dice = self._dice(index, "scene")
    count = dice.choose(self._counts)
    return Scene(
        dice.choose(questions.LAYOUTS[count]),
        tuple(dice.sample(count, len(text.COLOURS))),
        tuple(dice.below(len(text.CLASSES)) for _ in range(count)),
    )

  def questions(self, index: int) -> list[Question]:
    """The questions with their answers, in order."""
    scene = self.scene(index)
    kinds = list(questions.KINDS)
    if len(scene.digits) == 1:
      kinds = [kind for kind in kinds if kind not in questions.OF_TWO]
    found = []
    for number in range(self._exchanges):
      dice = self._dice(index, "question", number)
      subject = dice.below(len(scene.digits))
      found.append(questions.ask(dice.choose(kinds), scene, subject, dice))
    return found

  def conversation(self, index: int) -> list[Turn]:
    """See `conversations.Conversations`."""
    said = describe_scene(self.scene(index), self._dice(index, "told"))
    turns = []
    for question in self.questions(index):
      opening = "" if turns else f"{said}\n"
      turns.append(Turn("user", f"{opening}{question.text}"))
      turns.append(Turn("assistant", question.answer, self._weight))
    return turns

  def answer(self, index: int) -> str:
    """The last answer."""
    return self.questions(index)[-1].answer

  def _dice(self, index: int, *use: str | int) -> Dice:
    if not 0 <= index < self._length:
      raise IndexError(f"index {index} of {self._length} examples")
    return Dice("quizzes", self._split, self._seed, index, *use)


class Echoes(_Unseen):
  """Lists of words, each of which is said again.

  Nothing but what stands before tells what comes, from the first word of the
  answer to the last: of all texts the fastest to teach a language model that it
  can look things up there (Olsson et al. 2022, "induction heads").
  """

  def __init__(
      self,
      split: Split,
      length: int = 2**20,
      seed: int = 0,
      words: Sequence[int] = (2, 12),
  ) -> None:
    """A source of `length` lists.

    Args:
      split: "train" or "test".
      length: examples an epoch.
      seed: another seed is other lists.
      words: how many a list has, at least and at most.

    Raises:
      ValueError: if an argument cannot be.
    """
    self._said = (*documents.WORDS, *text.CLASSES, *text.COLOURS)
    least, most = words
    if length < 1 or not 1 <= least <= most <= len(self._said):
      raise ValueError(
          f"length={length}, words={tuple(words)}: expected at least 1, and "
          f"two counts from 1 to {len(self._said)}"
      )
    self._split, self._length, self._seed = split, length, seed
    self._least, self._most = least, most

  def __len__(self) -> int:
    return self._length

  def conversation(self, index: int) -> list[Turn]:
    """See `conversations.Conversations`."""
    said = self.answer(index)
    return [Turn("user", said), Turn("assistant", said)]

  def answer(self, index: int) -> str:
    """The list."""
    if not 0 <= index < self._length:
      raise IndexError(f"index {index} of {self._length} examples")
    dice = Dice("echoes", self._split, self._seed, index)
    count = self._least + dice.below(self._most - self._least + 1)
    places = dice.sample(count, len(self._said))
    return " ".join(self._said[place] for place in places)
