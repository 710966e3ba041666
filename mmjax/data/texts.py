"""How does a text become a row of a fixed length for a text tower?

SigLIP reads its texts through a sentencepiece vocabulary, of English (2023) or
of a hundred languages (SigLIP 2): small letters, cut to a length, an end, and
padding that the tower sees.
"""

from collections.abc import Sequence
import re
import string

import numpy as np

from mmjax.data import subwords

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Texts:
  """Rows of ids, as `tokenizers.ClipTokenizer` makes them for CLIP."""

  def __init__(
      self,
      path: str,
      length: int = 64,
      end: str = "<eos>",
      pad: str = "<pad>",
      punctuation: bool = True,
      rows: int | None = None,
  ) -> None:
    """Reads a tokenizer.

    Args:
      path: see `subwords.load`.
      length: ids of a row, L.
      end: special token behind a text; a longer text is cut before it.
      pad: special token behind the end. SigLIP repeats its end, "</s>".
      punctuation: whether it stays (SigLIP 2) or goes (SigLIP, official code).
      rows: of the tower's token table, to be checked.

    Raises:
      ValueError: if the vocabulary lacks a special token or is of another
        table, or if no text fits.
    """
    if length < 2:
      raise ValueError(f"length={length}: expected room for a token and an end")
    self._tokenizer = subwords.load(path)
    if rows is not None:
      subwords.check_vocabulary(self._tokenizer, rows, path)
    self._end = self._tokenizer.special(end)
    self._pad = self._tokenizer.special(pad)
    self._punctuation = punctuation
    self.length = length

  @property
  def vocabulary_size(self) -> int:
    """One more than the largest id: rows of an embedding table."""
    return self._tokenizer.vocabulary_size

  def encode(self, text: str | Sequence[str]) -> np.ndarray:
    """Ids of one text, i32[L], or of several, i32[B, L]."""
    texts = [text] if isinstance(text, str) else list(text)
    ids = np.full((len(texts), self.length), self._pad, np.int32)
    for row, one in zip(ids, texts, strict=True):
      kept = self._tokenizer.encode(self._clean(one))[: self.length - 1]
      row[: len(kept) + 1] = [*kept, self._end]
    return ids[0] if isinstance(text, str) else ids

  def _clean(self, text: str) -> str:
    text = text.lower()
    if self._punctuation:
      return text
    return re.sub(r"\s+", " ", text.translate(_PUNCTUATION)).strip()
