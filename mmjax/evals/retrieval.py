"""Do pictures find their captions, and captions their pictures?"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.evals import figures, run
from mmjax.evals.zero_shot import unit


def recall_at(
    scores: np.ndarray, k: int, truth: np.ndarray | None = None
) -> float:
  """The share of rows whose true column is among their k best.

  Ties count against the row: a constant score finds nothing.

  Args:
    scores: f32[N, M].
    k: how many columns a row may return.
    truth: i32[N], the true column of a row; row i's is i by default.
  """
  truth = np.arange(len(scores)) if truth is None else truth
  own = scores[np.arange(len(scores)), truth]
  rank = (scores >= own[:, None]).sum(axis=1) - 1
  return float((rank < k).mean())


class Retrieval:
  """Image-text retrieval among pairs with pairwise distinct captions.

  Attributes:
    source: examples with `image` and `tokens`, and `caption(i) -> str`.
    ks: the k of recall at k.
    batch_size: global batch.
    shown: pictures in the figure.
  """

  def __init__(
      self,
      source: Any,
      ks: Sequence[int] = (1, 5),
      batch_size: int = 256,
      shown: int = 16,
  ) -> None:
    self.source = source
    self.ks = ks
    self.batch_size = batch_size
    self.shown = shown

  def __call__(
      self, system: Any, variables: Any
  ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns `i2t_r<k>`, `t2i_r<k>`, and pictures with captions found."""

    def embed(variables: Any, batch: Any) -> dict[str, Any]:
      output = system.apply(variables, batch["image"], batch["tokens"])
      return {"image": output.image, "text": output.text}

    found = run.map_source(embed, variables, self.source, self.batch_size)
    scores = unit(found["image"]) @ unit(found["text"]).T
    metrics = {}
    for k in self.ks:
      metrics[f"i2t_r{k}"] = recall_at(scores, k)
      metrics[f"t2i_r{k}"] = recall_at(scores.T, k)
    best = scores.argmax(axis=1)
    shown = range(min(self.shown, len(self.source)))
    figure = figures.captioned_grid(
        [self.source[i]["image"] for i in shown],
        [self.source.caption(int(best[i])) for i in shown],
        [bool(best[i] == i) for i in shown],
    )
    return metrics, {"captions": figure}
