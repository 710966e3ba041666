"""What must a mixture of interleaved data sets say of its rows?"""

import dataclasses
import zlib

import numpy as np

from mmjax.data.batch import Example


@dataclasses.dataclass(frozen=True)
class Mark:
  """Says which data set a row is from; may turn its texts to later pictures.

  For `mixture.Stream.transform`. On web pages a text may belong to the picture
  before it or to the one behind it: in a share of the documents every text
  sees the next picture instead of the last one (Flamingo, section 2.4 and
  appendix A.3.2). The text behind the last picture then sees none. A document
  is turned or not by the hash of its tokens, so always the same way.

  Attributes:
    kind: number of the data set, from 0.
    ahead: share of the documents that are turned.
  """

  kind: int
  ahead: float = 0.0

  def __post_init__(self) -> None:
    if self.kind < 0 or not 0 <= self.ahead <= 1:
      raise ValueError(
          f"kind={self.kind}, ahead={self.ahead}: expected a number from 0, "
          "and a share from 0 to 1"
      )

  def __call__(self, example: Example) -> Example:
    """Adds `kind`, and changes `media`."""
    media = example["media"].copy()
    for number in range(1, example["segment"].max() + 1):
      part = example["segment"] == number
      coin = zlib.crc32(example["tokens"][part].tobytes()) / 2**32
      if coin < self.ahead:
        media[part] = _ahead(media[part])
    return example | {"kind": np.int32(self.kind), "media": media}


def _ahead(media: np.ndarray) -> np.ndarray:
  """The medium after each of the last media of one document, or -1."""
  shown = np.unique(media[media >= 0])
  place = np.searchsorted(shown, media, side="right")
  return np.append(shown, -1)[place].astype(media.dtype)
