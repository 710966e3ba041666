"""Does a dialogue find the picture that it leads to?

Any system that looks for pictures can be evaluated. It has two methods beside
`__call__`:

  embed_image(image f32[B, H, W, 3]) -> f32[B, J]
    Where pictures lie in a joint space, as unit rows.

  find(tokens i32[B, L], anchor i32[B]) -> a tuple with `text` f32[B, J], what
    each text looks for at its token `anchor`, as unit rows, and `asks` bool[B],
    whether it would have asked for a picture there.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.data.conversations import Written
from mmjax.evals import figures, run
from mmjax.evals.retrieval import recall_at


class DialogueRetrieval:
  """Recall among pictures, each of which one dialogue leads to.

  Attributes:
    source: dialogues, written for the system, with the label `image`.
    ks: the k of recall at k.
    batch_size: global batch.
    shown: dialogues in the figure.
  """

  def __init__(
      self,
      source: Written,
      ks: Sequence[int] = (1, 5, 10),
      batch_size: int = 128,
      shown: int = 16,
  ) -> None:
    self.source = source
    self.ks = ks
    self.batch_size = batch_size
    self.shown = shown

  def __call__(
      self, system: Any, variables: Any
  ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns `r<k>`, `asks`, and dialogues with the pictures they found."""

    def embed(variables: Any, batch: Any) -> dict[str, Any]:
      image = system.apply(variables, batch["image"], method="embed_image")
      found = system.apply(
          variables, batch["tokens"], batch["anchor"], method="find"
      )
      return {"image": image, "text": found.text, "asks": found.asks}

    found = run.map_source(embed, variables, self.source, self.batch_size)
    scores = found["text"] @ found["image"].T
    metrics = {f"r{k}": recall_at(scores, k) for k in self.ks}
    metrics["asks"] = float(found["asks"].mean())
    best = scores.argmax(axis=1)
    rows = range(min(self.shown, len(self.source)))
    figure = figures.captioned_grid(
        [self.source[int(best[i])]["image"] for i in rows],
        [self.source.answer(i) for i in rows],
        [bool(best[i] == i) for i in rows],
        side=160,
    )
    return metrics, {"found": figure}
