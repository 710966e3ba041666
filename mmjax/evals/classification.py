"""How often is a classifier right on held-out examples?"""

from typing import Any

import numpy as np

from mmjax.evals import run


class Accuracy:
  """Top-1 accuracy of a system that returns `logits`.

  Attributes:
    source: examples with `image` and `label`.
    batch_size: global batch.
  """

  def __init__(self, source: Any, batch_size: int = 256) -> None:
    self.source = source
    self.batch_size = batch_size

  def __call__(
      self, system: Any, variables: Any
  ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns `top1`, the share of right labels."""

    def predict(variables: Any, batch: Any) -> dict[str, Any]:
      logits = system.apply(variables, batch["image"]).logits
      return {"guess": logits.argmax(axis=-1)}

    found = run.map_source(predict, variables, self.source, self.batch_size)
    right = found["guess"] == found["label"]
    return {"top1": float(right.mean())}, {}
