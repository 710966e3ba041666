"""How does a text become what is read and what is to be written?

For models whose encoder reads `tokens` and whose decoder writes `targets`: a
question and its answer, a text and how it goes on, or a text with holes and
what was in them.
"""

from typing import Any

import numpy as np

from mmjax.data import pack
from mmjax.data.batch import Example
from mmjax.data.conversations import Written
from mmjax.data.pack import Document, Documents


class Answered:
  """What comes before the last answer of a conversation, and the answer.

  Keys: `tokens`, `segment` (1 on them, 0 behind) and `targets`, the answer with
  its end; where pictures are shown, they and `source`; and the source's labels.
  """

  def __init__(
      self,
      source: Written,
      target_length: int,
      begun: float = 0.0,
      seed: int = 0,
  ) -> None:
    """Reads nothing yet.

    Args:
      source: the conversations; its formatter says how long `tokens` are.
      target_length: ids of `targets`, M.
      begun: share of the examples in which `tokens` go on with a beginning of
        the answer, of any length, and `targets` are the rest: the prefix
        language modelling of BLIP-2 (Li et al. 2023, section 3.2).
      seed: of the lengths.

    Raises:
      ValueError: if an argument cannot be.
    """
    if target_length < 1 or not 0 <= begun <= 1:
      raise ValueError(
          f"target_length={target_length}, begun={begun}: expected at least 1, "
          "and a share"
      )
    self._source = source
    self._length = target_length
    self._begun = begun
    self._seed = seed

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    example = self._source.prompt(index)
    room = len(example["tokens"])
    document = self._source.document(index)
    cut = np.count_nonzero(example["segment"])
    dice = np.random.default_rng((self._seed, index))
    if dice.random() < self._begun:
      # At least the end of the answer is left to be written.
      cut += dice.integers(0, min(len(document.tokens) - cut, room - cut + 1))
    read = Document(*(part[:cut] for part in document[:4]), document.sizes)
    example |= pack.row([read], room, self._source.formatter.pad_id)
    unread = {"weight", "position", "media", "anchor"}
    if not document.sizes:
      unread.add("source")
    example = {key: x for key, x in example.items() if key not in unread}
    targets = _row(document.tokens[cut:], self._length, index)
    return example | {"targets": targets}


class Corrupted:
  """Texts with holes, and what was in the holes (T5, section 3.1.4).

  A marker stands in the place of each hole; `targets` are every marker with
  what it stands for, and the end.

  Keys: `tokens`, `segment` (1 on them, 0 behind) and `targets`.
  """

  def __init__(
      self,
      source: Documents,
      length: int,
      target_length: int,
      marker: int,
      end: int,
      density: float = 0.15,
      span: float = 3.0,
      seed: int = 0,
      pad_id: int = 0,
  ) -> None:
    """Reads nothing yet.

    Args:
      source: the texts, without pictures.
      length: ids of `tokens`, L; of a longer text the beginning is read.
      target_length: ids of `targets`, M.
      marker: id of the first marker; those of the others count down from it
        (32,099 in T5, whose tokenizer has 100 of them last).
      end: id behind the text and behind the targets.
      density: share of the tokens that go into holes.
      span: how many of them a hole has on average.
      seed: of the holes.
      pad_id: the token behind the end of `tokens`.

    Raises:
      ValueError: if an argument cannot be.
    """
    if min(length, target_length) < 4 or not 0 < density < 1 or span < 1:
      raise ValueError(
          f"length={length}, target_length={target_length}, density={density}, "
          f"span={span}: expected at least 4, a share, and at least 1"
      )
    self._source = source
    self._length = length
    self._target_length = target_length
    self._marker, self._end, self._pad = marker, end, pad_id
    self._density, self._span = density, span
    self._seed = seed

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    document = self._source.document(index)
    if document.sizes:
      raise ValueError(
          f"document {index} shows {len(document.sizes)} pictures: holes are "
          "for texts without"
      )
    tokens = document.tokens[: self._length - 1]
    dice = np.random.default_rng((self._seed, index))
    read, written = self._cut(tokens, dice)
    example = pack.row([_text(read)], self._length, self._pad)
    return {
        "tokens": example["tokens"],
        "segment": example["segment"],
        "targets": _row(written, self._target_length, index),
    }

  def _cut(self, tokens: np.ndarray, dice: Any) -> tuple[list, list]:
    """What is read and what is written."""
    count = len(tokens)
    hidden = min(max(round(count * self._density), 1), count - 1)
    holes = min(max(round(hidden / self._span), 1), hidden, count - hidden)
    kept = _parts(count - hidden, holes, dice)
    taken = _parts(hidden, holes, dice)
    read: list[int] = []
    written: list[int] = []
    at = 0
    for number, (stay, go) in enumerate(zip(kept, taken, strict=True)):
      marker = self._marker - number
      read += [*tokens[at : at + stay], marker]
      written += [marker, *tokens[at + stay : at + stay + go]]
      at += stay + go
    return [*read, self._end], [*written, self._end]


def _parts(total: int, count: int, dice: Any) -> np.ndarray:
  """`total` in `count` parts of at least 1, every way equally likely."""
  cuts = np.sort(dice.choice(total - 1, count - 1, replace=False)) + 1
  return np.diff(cuts, prepend=0, append=total)


def _text(tokens: list[int]) -> Document:
  none = np.full(len(tokens), -1, np.int32)
  return Document(
      np.asarray(tokens, np.int32),
      np.zeros(len(tokens), np.float32),
      none,
      none,
      (),
  )


def _row(ids: Any, length: int, index: int) -> np.ndarray:
  """Targets, with -1 behind their end.

  Raises:
    ValueError: if they are too long.
  """
  if len(ids) > length:
    raise ValueError(
        f"example {index} has {len(ids)} ids to write, which do not fit "
        f"target_length={length}"
    )
  row = np.full(length, -1, np.int32)
  row[: len(ids)] = ids
  return row
