"""Does a second look find what similarity alone does not? Retrieval, re-ranked.

The candidates that are nearest by their vectors are compared with the query by
a model that sees both at once (BLIP-2, Li et al. 2023, section 4.4; ALBEF, Li
et al. 2021, section 3.4).
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mmjax.evals import figures, run
from mmjax.evals.retrieval import recall_at


class Reranked:
  """Image-text retrieval among pairs with pairwise distinct captions.

  The system has `encode_image(image) -> (seen, vectors f32[B, Q, E])`,
  `encode_text(tokens) -> f32[B, E]` and `match(seen, tokens) -> f32[B, Q, 2]`,
  such as `models.blip2_pretrain.Pretraining`.

  Attributes:
    source: examples with `image` and `tokens`, and `caption(i) -> str`.
    candidates: how many of each query's nearest are looked at again.
    ks: the k of recall at k.
    batch_size: examples, or pairs, that are computed at a time.
    shown: pictures in the figure.
  """

  def __init__(
      self,
      source: Any,
      candidates: int = 16,
      ks: Sequence[int] = (1, 5),
      batch_size: int = 64,
      shown: int = 16,
  ) -> None:
    self.source = source
    self.candidates = min(candidates, len(source))
    self.ks = ks
    self.batch_size = batch_size
    self.shown = shown

  def __call__(
      self, system: Any, variables: Any
  ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns recalls, and pictures with the captions found.

    `similar_i2t_r<k>` and `similar_t2i_r<k>` are of similarity alone,
    `i2t_r<k>` and `t2i_r<k>` of the second look.
    """

    def embed(variables: Any, batch: Any) -> dict[str, Any]:
      seen, image = system.apply(
          variables, batch["image"], method="encode_image"
      )
      text = system.apply(variables, batch["tokens"], method="encode_text")
      tokens = batch["tokens"]
      return {"seen": seen, "image": image, "text": text, "tokens": tokens}

    found = run.map_source(embed, variables, self.source, self.batch_size)
    similar = np.einsum("nqe,me->nmq", found["image"], found["text"]).max(-1)
    texts = nearest(similar, self.candidates)
    images = nearest(similar.T, self.candidates).T
    verdict = np.zeros_like(similar)
    pairs = np.nonzero(texts | images)
    verdict[pairs] = self._match(system, variables, found, *pairs)
    metrics = {}
    for way, scores, sure, looked in (
        ("i2t", similar, verdict, texts),
        ("t2i", similar.T, verdict.T, images.T),
    ):
      again = reranked(scores, sure, looked)
      for k in self.ks:
        metrics[f"similar_{way}_r{k}"] = recall_at(scores, k)
        metrics[f"{way}_r{k}"] = recall_at(again, k)
    best = reranked(similar, verdict, texts).argmax(axis=1)
    return metrics, {"captions": self._figure(best)}

  def _match(
      self,
      system: Any,
      variables: Any,
      found: Any,
      images: np.ndarray,
      texts: np.ndarray,
  ) -> np.ndarray:
    """How sure the system is of pairs i64[P] and i64[P]: f32[P]."""
    match = jax.jit(
        lambda variables, seen, tokens: system.apply(
            variables, seen, tokens, method="match"
        ).mean(axis=1)[:, 1]
    )
    # The last pair again and again, so that all batches have one shape.
    size, count = self.batch_size, len(images)
    images, texts = (
        np.pad(x, (0, -count % size), mode="edge").reshape(-1, size)
        for x in (images, texts)
    )
    sure = [
        np.asarray(match(variables, found["seen"][i], found["tokens"][t]))
        for i, t in zip(images, texts)
    ]
    return np.concatenate(sure)[:count]

  def _figure(self, best: np.ndarray) -> np.ndarray:
    shown = range(min(self.shown, len(self.source)))
    return figures.captioned_grid(
        [self.source[i]["image"] for i in shown],
        [self.source.caption(int(best[i])) for i in shown],
        [bool(best[i] == i) for i in shown],
    )


def nearest(similar: np.ndarray, count: int) -> np.ndarray:
  """Which columns are among the `count` nearest of their row: bool[N, M].

  Args:
    similar: f32[N, M].
    count: of each row.
  """
  order = np.argsort(-similar, axis=1, kind="stable")
  found = np.zeros(similar.shape, bool)
  np.put_along_axis(found, order[:, :count], True, axis=1)
  return found


def reranked(
    similar: np.ndarray, sure: np.ndarray, looked: np.ndarray
) -> np.ndarray:
  """Scores f32[N, M] in which what was looked at again comes first.

  As in the official code the second verdict is added to the similarity.

  Args:
    similar: f32[N, M].
    sure: f32[N, M], the second verdict.
    looked: bool[N, M], where there is one.
  """
  again = similar + sure
  drop = similar.max() - again[looked].min() + 1
  return np.where(looked, again, similar - drop)
