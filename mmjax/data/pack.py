"""How do documents of many lengths share rows of one length?

A document is the tokens of one conversation with everything that counts them. A
row holds one or several, told apart by `segment`, and is what a batch is made
of. The packer fills rows greedily within fixed windows of documents, so that
its plan is a pure function of their lengths: rows may be read in any order, and
a run resumes at any of them.
"""

from collections.abc import Sequence
import itertools
from typing import NamedTuple, Protocol

import numpy as np

from mmjax.data.batch import Example

WINDOW = 256


class Document(NamedTuple):
  """One conversation, before it is padded.

  Attributes:
    tokens: i32[n], ids of a tokenizer.
    weight: f32[n], how much the loss at a token counts; 0 for the first token,
      which nothing predicts.
    source: i32[n], the row of the document's media features that stands in a
      token's place, or -1.
    media: i32[n], index of the last medium up to a token, or -1.
    sizes: rows of features of each medium.
  """

  tokens: np.ndarray
  weight: np.ndarray
  source: np.ndarray
  media: np.ndarray
  sizes: tuple[int, ...]


class Documents(Protocol):
  """A random-access source of documents and of the pictures in them."""

  def __len__(self) -> int: ...

  def document(self, index: int) -> Document:
    """The text of one example."""
    ...

  def pictures(self, index: int) -> np.ndarray:
    """Its pictures, f32[k, H, W, 3]."""
    ...


def row(
    documents: Sequence[Document], length: int, pad_id: int = 0
) -> Example:
  """One row that holds `documents` in order.

  Args:
    documents: at least one.
    length: of the row, L.
    pad_id: the token behind the last document.

  Returns:
    `tokens`, `weight`, `segment` (1, 2, ... and 0 for padding), `position`
    (from 0 in every document), `source` and `media`, all [L]. The last two
    count through the media of all the documents.

  Raises:
    ValueError: if the documents are longer than the row.
  """
  total = sum(len(document.tokens) for document in documents)
  if total > length:
    raise ValueError(f"documents of {total} tokens do not fit length={length}")
  example = {
      "tokens": np.full(length, pad_id, np.int32),
      "weight": np.zeros(length, np.float32),
      "segment": np.zeros(length, np.int32),
      "position": np.zeros(length, np.int32),
      "source": np.full(length, -1, np.int32),
      "media": np.full(length, -1, np.int32),
  }
  begin, features, media = 0, 0, 0
  for number, document in enumerate(documents, 1):
    count = len(document.tokens)
    part = slice(begin, begin + count)
    example["tokens"][part] = document.tokens
    example["weight"][part] = document.weight
    example["segment"][part] = number
    example["position"][part] = np.arange(count)
    example["source"][part] = _shifted(document.source, features)
    example["media"][part] = _shifted(document.media, media)
    begin += count
    features += sum(document.sizes)
    media += len(document.sizes)
  return example


def joined(documents: Sequence[Document]) -> Document:
  """Several documents as one, of which the later parts see the earlier."""
  sources, medias, features, media = [], [], 0, 0
  for document in documents:
    sources.append(_shifted(document.source, features))
    medias.append(_shifted(document.media, media))
    features += sum(document.sizes)
    media += len(document.sizes)
  return Document(
      np.concatenate([document.tokens for document in documents]),
      np.concatenate([document.weight for document in documents]),
      np.concatenate(sources),
      np.concatenate(medias),
      tuple(itertools.chain(*(document.sizes for document in documents))),
  )


def plan(
    lengths: Sequence[int],
    pictures: Sequence[int],
    length: int,
    slots: int,
    window: int = WINDOW,
) -> list[tuple[int, ...]]:
  """Which documents share a row: first fit, in order, window by window.

  Args:
    lengths: tokens of every document.
    pictures: pictures of every document.
    length: tokens that a row holds.
    slots: pictures that a row holds.
    window: documents among which neighbours in a row are sought.

  Returns:
    The indices of the documents of each row, increasing within a row; every
    document is in one row.

  Raises:
    ValueError: if a document fits no row; it names the first of them.
  """
  sizes = list(zip(lengths, pictures, strict=True))
  faults = [
      f"\n  document {index}: {tokens} tokens, {shown} pictures"
      for index, (tokens, shown) in enumerate(sizes)
      if tokens > length or shown > slots
  ]
  if faults:
    raise ValueError(
        f"{len(faults)} documents fit no row of {length} tokens and {slots} "
        f"pictures:{''.join(faults[:8])}\nMake rows larger, or the documents "
        "shorter (a Formatter may truncate)."
    )
  rows: list[tuple[int, ...]] = []
  for begin in range(0, len(sizes), window):
    # Members and room left, of each row that this window has begun.
    begun: list[tuple[list[int], list[int]]] = []
    for index in range(begin, min(begin + window, len(sizes))):
      tokens, shown = sizes[index]
      fitting = (
          (members, room)
          for members, room in begun
          if tokens <= room[0] and shown <= room[1]
      )
      found = next(fitting, None)
      if found is None:
        found = ([], [length, slots])
        begun.append(found)
      members, room = found
      members.append(index)
      room[0] -= tokens
      room[1] -= shown
    rows += [tuple(members) for members, _ in begun]
  return rows


class Packed:
  """A random-access source of rows that hold several documents each.

  Keys: those of `row`, and `images` f32[slots, H, W, 3] where slots > 0.
  """

  def __init__(
      self,
      source: Documents,
      length: int,
      slots: int = 0,
      window: int = WINDOW,
      sizes: np.ndarray | None = None,
      pad_id: int = 0,
  ) -> None:
    """Plans the rows.

    Args:
      source: the documents. All of them are written once to count their tokens,
        unless `sizes` is given; their pictures are not drawn.
      length: tokens that a row holds.
      slots: pictures that a row holds.
      window: documents among which neighbours in a row are sought.
      sizes: i[n, 2], tokens and pictures of every document, if known.
      pad_id: the token behind the last document of a row.

    Raises:
      ValueError: if there is no document, or one fits no row, or an argument
        cannot be.
    """
    if sizes is None:
      documents = map(source.document, range(len(source)))
      sizes = np.asarray([(len(d.tokens), len(d.sizes)) for d in documents])
    faults = []
    if not len(source):
      faults.append("no documents")
    elif sizes.shape != (len(source), 2):
      faults.append(
          f"sizes is {list(sizes.shape)}, expected [{len(source)}, 2]: tokens "
          "and pictures of each document"
      )
    if length < 1 or slots < 0 or window < 1:
      faults.append(
          f"length={length}, slots={slots}, window={window}: expected at least "
          "1, 0 and 1"
      )
    if faults:
      raise ValueError(f"packing: {'; '.join(faults)}")
    self._source = source
    self._length = length
    self._slots = slots
    self._pad_id = pad_id
    counts = sizes.tolist()
    rows = plan(
        [tokens for tokens, _ in counts],
        [shown for _, shown in counts],
        length,
        slots,
        window,
    )
    # Flat arrays: a list of a million tuples would be copied to every worker.
    self._members = np.fromiter(itertools.chain(*rows), np.int64)
    self._ends = np.cumsum([len(members) for members in rows])

  def __len__(self) -> int:
    return len(self._ends)

  def members(self, index: int) -> list[int]:
    """The documents of one row, by their index in the source."""
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} of {len(self)} rows")
    begin = self._ends[index - 1] if index else 0
    return self._members[begin : self._ends[index]].tolist()

  def __getitem__(self, index: int) -> Example:
    members = self.members(index)
    documents = [self._source.document(member) for member in members]
    example = row(documents, self._length, self._pad_id)
    if self._slots:
      example["images"] = _pictures(self._source, members, self._slots)
    return example


class Filled:
  """Rows of text from a source that is too long to be planned.

  Row i holds the documents from `each` * i on, as many as fit; what is left of
  its share is not read. Keys: those of `row`, and `images` as in `Packed`.
  """

  def __init__(
      self,
      source: Documents,
      length: int,
      each: int,
      slots: int = 0,
      pad_id: int = 0,
  ) -> None:
    """Reads nothing yet.

    Args:
      source: the documents.
      length: tokens that a row holds.
      each: documents that a row may hold.
      slots: pictures that a row holds; 0 draws none, and counts none.
      pad_id: the token behind the last document of a row.

    Raises:
      ValueError: if an argument cannot be.
    """
    if length < 1 or not 1 <= each <= len(source):
      raise ValueError(
          f"packing: length={length}, each={each}: expected at least 1, and at "
          f"most {len(source)} documents in a row"
      )
    self._source = source
    self._length = length
    self._each = each
    self._slots = slots
    self._pad_id = pad_id

  def __len__(self) -> int:
    return len(self._source) // self._each

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} of {len(self)} rows")
    first = index * self._each
    room, left, documents = self._length, self._slots, []
    for member in range(first, first + self._each):
      document = self._source.document(member)
      shown = len(document.sizes) if self._slots else 0
      if len(document.tokens) > room or shown > left:
        break
      documents.append(document)
      room -= len(document.tokens)
      left -= shown
    if not documents:
      raise ValueError(
          f"document {first} of {len(document.tokens)} tokens and {shown} "
          f"pictures does not fit length={self._length}, slots={self._slots}"
      )
    example = row(documents, self._length, self._pad_id)
    if self._slots:
      members = range(first, first + len(documents))
      example["images"] = _pictures(self._source, members, self._slots)
    return example


def _pictures(
    source: Documents, members: Sequence[int], slots: int
) -> np.ndarray:
  """The pictures of a row, f32[slots, H, W, 3]; those behind the last are 0."""
  pictures = np.concatenate([source.pictures(member) for member in members])
  rest = ((0, slots - len(pictures)), (0, 0), (0, 0), (0, 0))
  return np.pad(pictures, rest)


def _shifted(index: np.ndarray, by: int) -> np.ndarray:
  return np.where(index < 0, -1, index + by)
