"""Can a two-tower model classify by names alone? (CLIP, section 3.1)"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mmjax.evals import figures, run


class ZeroShot:
  """Zero-shot top-1 accuracy with an ensemble of prompts.

  The classifier of a class is the mean of the unit embeddings of its prompts,
  scaled back to unit length.

  Attributes:
    source: examples with `image` and `label`.
    tokenizer: has `encode(texts) -> i32[n, L]`.
    classes: one name per label.
    templates: prompts with `{}` where the name goes.
    batch_size: global batch.
  """

  def __init__(
      self,
      source: Any,
      tokenizer: Any,
      classes: Sequence[str],
      templates: Sequence[str],
      batch_size: int = 256,
  ) -> None:
    self.source = source
    self.tokenizer = tokenizer
    self.classes = classes
    self.templates = templates
    self.batch_size = batch_size

  def classifier(self, system: Any, variables: Any) -> np.ndarray:
    """The unit rows f32[K, E] of the classes."""
    prompts = [t.format(c) for c in self.classes for t in self.templates]
    encode = jax.jit(
        lambda variables, tokens: system.apply(
            variables, tokens, method="encode_text"
        ).embed
    )
    embeds = unit(np.asarray(encode(variables, self.tokenizer.encode(prompts))))
    embeds = embeds.reshape(len(self.classes), len(self.templates), -1)
    return unit(embeds.mean(axis=1))

  def __call__(
      self, system: Any, variables: Any
  ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns `top1`, and the confusion matrix as a figure."""

    def embed(variables: Any, batch: Any) -> dict[str, Any]:
      return {
          "embed": system.apply(
              variables, batch["image"], method="encode_image"
          ).embed
      }

    found = run.map_source(embed, variables, self.source, self.batch_size)
    scores = unit(found["embed"]) @ self.classifier(system, variables).T
    guess = scores.argmax(axis=1)
    figure = figures.confusion(found["label"], guess, self.classes)
    return (
        {"top1": float((guess == found["label"]).mean())},
        {"confusion": figure},
    )


def unit(x: np.ndarray) -> np.ndarray:
  """Scales the rows of [..., E] to unit length, in float32."""
  x = np.asarray(x, np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)
