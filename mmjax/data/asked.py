"""How does a part of a system read the question in a vocabulary of its own?"""

import numpy as np

from mmjax.data.batch import Example
from mmjax.data.conversations import Conversations
from mmjax.data.templates import IMAGE, Turn
from mmjax.data.tokenizers import ClipTokenizer


class Asked:
  """Conversations with one more key: `question`, what is asked last.

  For a Q-Former that looks for the answer (BLIP-2, Li et al. 2023, section
  4.3), beside the language model that gives it.
  """

  def __init__(self, source: Conversations, tokenizer: ClipTokenizer) -> None:
    """Joins conversations with a tokenizer of texts of fixed length."""
    self.shown = source.shown
    self.kind = getattr(source, "kind", None)
    self._source = source
    self._tokenizer = tokenizer

  def __len__(self) -> int:
    return len(self._source)

  def conversation(self, index: int) -> list[Turn]:
    """As of the source."""
    return self._source.conversation(index)

  def pictures(self, index: int) -> np.ndarray:
    """As of the source."""
    return self._source.pictures(index)

  def answer(self, index: int) -> str:
    """As of the source."""
    return self._source.answer(index)

  def labels(self, index: int) -> Example:
    """Those of the source, and `question`."""
    asked = [
        turn.text for turn in self.conversation(index) if turn.role == "user"
    ]
    text = asked[-1].replace(IMAGE, "").strip()
    return {
        **self._source.labels(index),
        "question": self._tokenizer.encode(text),
    }
