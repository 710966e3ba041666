"""How do conversations about pictures become examples of a batch?

A source of conversations says what is said and shown; a `Formatter` says how a
language model reads it. `Written` joins the two, so that one source serves
every template and tokenizer.
"""

from typing import Protocol

import numpy as np

from mmjax.data.batch import Example
from mmjax.data.pack import Document
from mmjax.data.templates import IMAGE, Conversation, Formatter, Turn

_KEYS = ("image", "images")


class Conversations(Protocol):
  """A random-access source of conversations.

  Attributes:
    shown: pictures in each conversation, the same number in all.
  """

  shown: int

  def __len__(self) -> int: ...

  def conversation(self, index: int) -> Conversation:
    """What is said, with `templates.IMAGE` where a picture is shown."""
    ...

  def pictures(self, index: int) -> np.ndarray:
    """The pictures that are shown, f32[shown, H, W, 3]."""
    ...

  def answer(self, index: int) -> str:
    """The last answer, which an evaluator asks for."""
    ...

  def labels(self, index: int) -> Example:
    """Further keys of the example."""
    ...


class Written:
  """Conversations as examples.

  Keys: those of `pack.row`; `anchor`, the place of the last token; the
  pictures as `image` or `images`, where any are shown; and the source's labels.
  """

  def __init__(
      self, source: Conversations, formatter: Formatter, key: str = "images"
  ) -> None:
    """Joins what is said with how it is written.

    Args:
      source: the conversations.
      formatter: makes rows of them.
      key: "images" for f32[shown, H, W, 3], or "image" for f32[H, W, 3] where
        one is shown.

    Raises:
      ValueError: if `key` is neither, or "image" while several are shown.
    """
    if key not in _KEYS:
      raise ValueError(f"key={key!r}: expected one of {', '.join(_KEYS)}")
    if key == "image" and source.shown != 1:
      raise ValueError(
          f"key='image', but {type(source).__name__} shows {source.shown} "
          "pictures: take key='images'"
      )
    self.source = source
    self.formatter = formatter
    self._key = key

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> Example:
    conversation = self.source.conversation(index)
    row = self.formatter.row(conversation, self.source.shown)
    return self._finish(row, index)

  def prompt(self, index: int) -> Example:
    """The same example up to where its last answer begins."""
    conversation = self.source.conversation(index)[:-1]
    row = self.formatter.prompt(conversation, self.source.shown)
    return self._finish(row, index)

  def question(self, index: int) -> str:
    """What is said before `answer`, without the pictures."""
    return last_question(self.source.conversation(index))

  def answer(self, index: int) -> str:
    """What the assistant should say after `prompt`."""
    return self.source.answer(index)

  def document(self, index: int) -> Document:
    """The text of an example, for `pack.Packed`."""
    conversation = self.source.conversation(index)
    return self.formatter.document(conversation, self.source.shown)

  def pictures(self, index: int) -> np.ndarray:
    """The pictures of an example, f32[shown, H, W, 3]."""
    return self.source.pictures(index)

  def _finish(self, row: Example, index: int) -> Example:
    row["anchor"] = np.int32(np.count_nonzero(row["segment"]) - 1)
    if self.source.shown:
      pictures = self.source.pictures(index)
      row[self._key] = pictures if self._key == "images" else pictures[0]
    return row | self.source.labels(index)


def last_question(conversation: Conversation) -> str:
  """What is said before the last answer, without the pictures."""
  turns = [Turn(*turn) for turn in conversation[:-1]]
  return turns[-1].text.replace(IMAGE, "").strip() if turns else ""
