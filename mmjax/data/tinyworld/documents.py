"""What can be told with several TinyWorld pictures, or before one is found?

Documents with pictures between the lines, episodes that define words by
examples, and dialogues that lead to a picture. Pictures show one digit.
"""

from collections.abc import Sequence
import itertools

import numpy as np

from mmjax.data.batch import Example
from mmjax.data.templates import IMAGE, Turn
from mmjax.data.tinyworld import digits, tasks, text
from mmjax.data.tinyworld.digits import Dice, Split
from mmjax.data.tinyworld.text import Look

# Words that mean nothing until an episode says what.
_SYLLABLES = ("ba", "do", "fi", "gu", "ke", "lo", "mi", "nu")
WORDS = tuple("".join(pair) for pair in itertools.permutations(_SYLLABLES, 2))

OPENINGS = (
    "i am looking for a picture.",
    "there is a picture of a digit.",
    "guess which picture it is.",
)
_QUESTIONS = {
    "digit": "which digit is it?",
    "colour": "what colour is it?",
    "size": "how large is it?",
    "ground": "on which background?",
}
_WORDS_OF = {
    "digit": text.CLASSES,
    "colour": text.COLOURS,
    "size": text.SIZES,
    "ground": text.GROUNDS,
}


class InterleavedDocuments:
  """Documents of several pictures, each with its caption after it.

  From picture to picture the digits count up, or down, by one.
  """

  def __init__(
      self,
      split: Split,
      size: int = 32,
      length: int | None = None,
      seed: int = 0,
      variety: float = 1.0,
      warp: float = 0.0,
      count: int = 3,
  ) -> None:
    """A source of `length` documents.

    Args:
      split: "train" or "test".
      size: side of the pictures in pixels.
      length: as for `tasks.Classification`.
      seed: likewise.
      variety: likewise.
      warp: likewise.
      count: pictures a document.

    Raises:
      ValueError: if an argument cannot be.
    """
    if count < 1:
      raise ValueError(f"count={count}: expected at least one picture")
    self.shown = count
    self._size = size
    self._deck = tasks.Deck.make(
        "interleaved documents", split, size, length, seed, variety, warp
    )

  def __len__(self) -> int:
    return self._deck.length

  def looks(self, index: int) -> list[Look]:
    """What the pictures show, in order."""
    return self._deal(index)[1]

  def conversation(self, index: int) -> list[Turn]:
    """See `conversations.Conversations`; the captions are answers."""
    _, looks, captions = self._deal(index)
    turns = []
    for caption in captions:
      turns += [Turn("user", IMAGE), Turn("assistant", caption)]
    return turns

  def pictures(self, index: int) -> np.ndarray:
    """The pictures in order, f32[count, size, size, 3]."""
    positions, looks, _ = self._deal(index)
    return _draw(self._deck, index, positions, looks, self._size)

  def answer(self, index: int) -> str:
    """The last caption."""
    return self._deal(index)[2][-1]

  def labels(self, index: int) -> Example:
    """None."""
    return {}

  def _deal(self, index: int) -> tuple[list[int], list[Look], list[str]]:
    first, dice = self._deck.deal(index)
    hand = digits.hand(self._deck.split)
    step = dice.choose((1, -1))
    positions, looks, captions = [first], [], []
    for number in range(self.shown):
      own = self._deck.dice(index, "picture", number)
      digit = (hand.labels[first] + step * number) % 10
      if number:
        positions.append(own.choose(hand.of_digit[digit]))
      looks.append(Look.drawn(digit, own))
      captions.append(text.digit_caption(looks[-1], own))
    return positions, looks, captions


class FewShot:
  """Episodes that define invented words by examples, and ask for one.

  Each episode draws a word for some digits. Its examples are pictures followed
  by their words; the last picture is the question. A word counts in the loss
  only where the episode has told it before.
  """

  def __init__(
      self,
      split: Split,
      size: int = 32,
      length: int | None = None,
      seed: int = 0,
      variety: float = 1.0,
      warp: float = 0.0,
      shots: int = 8,
      ways: int = 4,
  ) -> None:
    """A source of `length` episodes.

    Args:
      split: "train" or "test".
      size: side of the pictures in pixels.
      length: as for `tasks.Classification`.
      seed: likewise.
      variety: likewise.
      warp: likewise.
      shots: examples before the question. The first `ways` of them, the next
        `ways` and so on show every digit of the episode once, in random order.
      ways: digits that an episode names, any of which is asked for.

    Raises:
      ValueError: if an argument cannot be.
    """
    if shots < 0 or not 1 <= ways <= len(text.CLASSES):
      raise ValueError(
          f"shots={shots}, ways={ways}: expected at least 0, and 1 to "
          f"{len(text.CLASSES)}"
      )
    self.shown = shots + 1
    self._ways = ways
    self._size = size
    self._deck = tasks.Deck.make(
        "few shot", split, size, length, seed, variety, warp
    )

  def __len__(self) -> int:
    return self._deck.length

  def words(self, index: int) -> dict[int, str]:
    """What the episode calls its digits."""
    return self._deal(index)[0]

  def looks(self, index: int) -> list[Look]:
    """What the pictures show, in order; the last is the question."""
    return self._deal(index)[2]

  def conversation(self, index: int) -> list[Turn]:
    """See `conversations.Conversations`."""
    words, _, looks = self._deal(index)
    turns, told = [], set()
    for look in looks:
      turns.append(Turn("user", IMAGE))
      weight = float(look.digit in told)
      turns.append(Turn("assistant", words[look.digit], weight))
      told.add(look.digit)
    return turns

  def pictures(self, index: int) -> np.ndarray:
    """Examples, then the question: f32[shots + 1, size, size, 3]."""
    _, positions, looks = self._deal(index)
    return _draw(self._deck, index, positions, looks, self._size)

  def answer(self, index: int) -> str:
    """The word for the last picture."""
    words, _, looks = self._deal(index)
    return words[looks[-1].digit]

  def labels(self, index: int) -> Example:
    """None."""
    return {}

  def _deal(self, index: int) -> tuple[dict[int, str], list[int], list[Look]]:
    question, dice = self._deck.deal(index)
    hand = digits.hand(self._deck.split)
    asked = hand.labels[question]
    others = [digit for digit in range(10) if digit != asked]
    named = [asked]
    named += [others[n] for n in dice.sample(self._ways - 1, len(others))]
    drawn = dice.sample(self._ways, len(WORDS))
    words = {digit: WORDS[n] for digit, n in zip(named, drawn, strict=True)}
    positions, looks = [], []
    for number in range(self.shown):
      own = self._deck.dice(index, "picture", number)
      if number == self.shown - 1:
        positions.append(question)
      else:
        cycle, place = divmod(number, self._ways)
        turn = self._deck.dice(index, "order", cycle)
        digit = named[turn.sample(self._ways, self._ways)[place]]
        # The question must not be among its own examples.
        scans = hand.of_digit[digit]
        chosen = own.below(len(scans) - (digit == asked))
        behind = digit == asked and scans[chosen] >= question
        positions.append(scans[chosen + behind])
      looks.append(Look.drawn(hand.labels[positions[-1]], own))
    return words, positions, looks


class NamedDigits:
  """Pictures of one digit, each followed by the invented name of its digit.

  The ten names are the same in all examples, in both splits: a data set whose
  classes are learned from examples in a prompt or not at all.
  """

  shown = 1

  def __init__(
      self,
      split: Split,
      size: int = 32,
      length: int | None = None,
      seed: int = 0,
      variety: float = 1.0,
      warp: float = 0.0,
  ) -> None:
    """A source of `length` examples, whose names are drawn by `seed`.

    Args:
      split: "train" or "test".
      size: side of the pictures in pixels.
      length: as for `tasks.Classification`.
      seed: likewise.
      variety: likewise.
      warp: likewise.

    Raises:
      ValueError: if an argument cannot be.
    """
    self._size = size
    self._deck = tasks.Deck.make(
        "named digits", split, size, length, seed, variety, warp
    )
    dice = Dice("names of digits", seed)
    self.names = tuple(WORDS[n] for n in dice.sample(10, len(WORDS)))

  def __len__(self) -> int:
    return self._deck.length

  def conversation(self, index: int) -> list[Turn]:
    """See `conversations.Conversations`."""
    return [Turn("user", IMAGE), Turn("assistant", self.answer(index))]

  def pictures(self, index: int) -> np.ndarray:
    """The picture, f32[1, size, size, 3]."""
    position, dice = self._deck.deal(index)
    digit = digits.hand(self._deck.split).labels[position]
    look = Look.drawn(digit, dice)
    return _draw(self._deck, index, [position], [look], self._size)

  def answer(self, index: int) -> str:
    """The name."""
    position, _ = self._deck.deal(index)
    return self.names[digits.hand(self._deck.split).labels[position]]

  def labels(self, index: int) -> Example:
    """None."""
    return {}


class RetrievalDialogues:
  """Texts in which questions and answers lead to one picture.

  A text names the picture's size, colour, digit and ground, in random order. It
  is the answer of a conversation without pictures; the labels are `image`, the
  picture that it leads to, `identity` and `label` (the digit).
  """

  shown = 0

  def __init__(
      self,
      split: Split,
      size: int = 32,
      length: int | None = None,
      seed: int = 0,
      variety: float = 1.0,
      warp: float = 0.0,
      looks: Sequence[Look] | None = None,
  ) -> None:
    """A source of `length` dialogues.

    Args:
      split: "train" or "test".
      size: side of the pictures in pixels.
      length: as for `tasks.Classification`.
      seed: likewise.
      variety: likewise.
      warp: likewise.
      looks: what each example shows, instead of chance; the source is as long
        as they are many.

    Raises:
      ValueError: if an argument cannot be.
    """
    if looks is not None:
      if length not in (None, len(looks)):
        raise ValueError(f"length={length}, but there are {len(looks)} looks")
      length = len(looks)
    self._looks = looks
    self._size = size
    self._deck = tasks.Deck.make(
        "retrieval dialogues", split, size, length, seed, variety, warp
    )

  def __len__(self) -> int:
    return self._deck.length

  def look(self, index: int) -> Look:
    """What the picture shows."""
    return self._deal(index)[1]

  def conversation(self, index: int) -> list[Turn]:
    """See `conversations.Conversations`: one answer, the whole dialogue."""
    return [Turn("assistant", self.answer(index))]

  def pictures(self, index: int) -> np.ndarray:
    """None are shown: f32[0, size, size, 3]."""
    return np.zeros((0, self._size, self._size, 3), np.float32)

  def answer(self, index: int) -> str:
    """The dialogue."""
    return self._deal(index)[2]

  def labels(self, index: int) -> Example:
    """`image` f32[size, size, 3], `identity` and `label`."""
    position, look, _ = self._deal(index)
    return {
        "image": _draw(self._deck, index, [position], [look], self._size)[0],
        "identity": np.int32(look.identity),
        "label": np.int32(look.digit),
    }

  def _deal(self, index: int) -> tuple[int, Look, str]:
    position, dice = self._deck.deal(index)
    hand = digits.hand(self._deck.split)
    if self._looks is None:
      look = Look.drawn(hand.labels[position], dice)
    else:
      look = self._looks[index]
      position = dice.choose(hand.of_digit[look.digit])
    lines = [dice.choose(OPENINGS)]
    keys = tuple(_QUESTIONS)
    for n in dice.sample(len(keys), len(keys)):
      word = _WORDS_OF[keys[n]][getattr(look, keys[n])]
      lines.append(f"{_QUESTIONS[keys[n]]} {word}.")
    return position, look, " ".join(lines)


def dialogue_retrieval_set(
    split: Split = "test",
    n: int = 100,
    size: int = 32,
    seed: int = 0,
) -> RetrievalDialogues:
  """`n` dialogues that lead to pictures of pairwise distinct looks.

  Raises:
    ValueError: if `n` is not between 1 and the number of looks, 640.
  """
  looks = tasks.distinct_looks(n, seed)
  return RetrievalDialogues(split, size, seed=seed, looks=looks)


def _draw(
    deck: tasks.Deck,
    index: int,
    positions: Sequence[int],
    looks: Sequence[Look],
    size: int,
) -> np.ndarray:
  """Pictures of one digit each, f32[n, size, size, 3]."""
  return np.stack([
      deck.draw(position, size, look, deck.dice(index, "strokes", number))
      for number, (position, look) in enumerate(
          zip(positions, looks, strict=True)
      )
  ])
