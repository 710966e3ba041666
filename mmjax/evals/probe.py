"""What do the patches of a tower know? A linear probe (dense features).

A classifier says of every patch whether it is ground or which digit's ink it
holds. It sees one frozen token and is linear, so that it finds only what is
already there, in its place.
"""

from typing import Any, Protocol

import numpy as np
from sklearn import linear_model, pipeline, preprocessing

from mmjax.data.batch import Example
from mmjax.evals import figures, run

GROUND = 0


class Segmented(Protocol):
  """A random-access source of `image`, `label`, and the shape of the ink."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...

  def ink(self, index: int) -> np.ndarray:
    """How far ink covers each pixel, f32[H, W] in [0, 1]."""
    ...


class LinearProbe:
  """How well a linear classifier of patch tokens finds and reads digits.

  Attributes:
    train: pictures that the classifier learns from.
    test: pictures that it is scored on.
    patch: side of the tower's patches.
    covered: a patch is ink if this part of it or more is.
    batch_size: global batch.
    shown: pictures in the figure.
  """

  def __init__(
      self,
      train: Segmented,
      test: Segmented,
      patch: int,
      covered: float = 0.15,
      batch_size: int = 128,
      shown: int = 16,
  ) -> None:
    self.train = train
    self.test = test
    self.patch = patch
    self.covered = covered
    self.batch_size = batch_size
    self.shown = shown

  def __call__(
      self, system: Any, variables: Any
  ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns `accuracy` of patches, `miou`, and pictures with what was found.

    `miou` is the mean over ground and digits of the intersection of the patches
    that are and that are called so, over their union.
    """
    classifier = pipeline.make_pipeline(
        preprocessing.StandardScaler(),
        linear_model.LogisticRegression(max_iter=300),
    )
    tokens, labels = self._patches(system, variables, self.train)
    classifier.fit(tokens.reshape(-1, tokens.shape[-1]), labels.reshape(-1))
    tokens, labels = self._patches(system, variables, self.test)
    guess = classifier.predict(tokens.reshape(-1, tokens.shape[-1]))
    guess = guess.reshape(labels.shape)
    metrics = {
        "accuracy": float((guess == labels).mean()),
        "miou": mean_iou(labels, guess),
    }
    return metrics, {"ink": self._figure(labels, guess)}

  def _patches(
      self, system: Any, variables: Any, source: Segmented
  ) -> tuple[np.ndarray, np.ndarray]:
    """Tokens f32[n, N, D], and what is in their patches, i64[n, N]."""

    def encode(variables: Any, batch: Any) -> dict[str, Any]:
      found = system.apply(variables, batch["image"], method="encode_image")
      return {"tokens": found.tokens}

    found = run.map_source(encode, variables, source, self.batch_size)
    ink = np.stack([source.ink(index) for index in range(len(source))])
    count, height, width = ink.shape
    rows, columns = height // self.patch, width // self.patch
    ink = ink[:, : rows * self.patch, : columns * self.patch]
    ink = ink.reshape(count, rows, self.patch, columns, self.patch)
    covered = ink.mean(axis=(2, 4)).reshape(count, -1) >= self.covered
    labels = np.where(covered, 1 + found["label"][:, None], GROUND)
    # A class token, where there is one, stands before the patches.
    return found["tokens"][:, -labels.shape[1] :], labels

  def _figure(self, labels: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """The first pictures; what is called ground is dark."""
    images, captions, right = [], [], []
    for index in range(min(self.shown, len(self.test))):
      example = self.test[index]
      image = example["image"]
      side = image.shape[1] // self.patch
      lit = np.kron(
          guess[index].reshape(-1, side) != GROUND,
          np.ones((self.patch, self.patch)),
      )[..., None]
      images.append(np.where(lit, image[: len(lit), : lit.shape[1]], -1.0))
      digits = sorted(set(guess[index].tolist()) - {GROUND})
      captions.append(", ".join(str(digit - 1) for digit in digits))
      right.append(bool((guess[index] == labels[index]).all()))
    return figures.captioned_grid(images, captions, right)


def mean_iou(labels: np.ndarray, guess: np.ndarray) -> float:
  """Intersection over union, averaged over the classes in `labels`."""
  found = []
  for label in np.unique(labels):
    is_one, is_called = labels == label, guess == label
    found.append((is_one & is_called).sum() / (is_one | is_called).sum())
  return float(np.mean(found))
