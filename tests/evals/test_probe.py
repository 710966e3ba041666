"""A linear probe finds what is in the tokens, and nothing else."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.evals import probe
from mmjax.models.siglip import Features

PATCH, SIDE = 4, 4


class Squares:
  """One square of ink of the colour of its digit, 0 to 2, somewhere."""

  def __init__(self, length, seed):
    rng = np.random.default_rng(seed)
    self._digits = rng.integers(0, 3, length)
    self._places = rng.integers(0, SIDE, (length, 2))

  def __len__(self):
    return len(self._digits)

  def ink(self, index):
    ink = np.zeros((SIDE * PATCH, SIDE * PATCH), np.float32)
    row, column = self._places[index] * PATCH
    ink[row : row + PATCH, column : column + PATCH - 1] = 1
    return ink

  def __getitem__(self, index):
    colour = np.eye(3, dtype=np.float32)[self._digits[index]]
    image = self.ink(index)[..., None] * colour
    return {"image": image, "label": np.int32(self._digits[index])}


class Tower(nn.Module):
  """Tokens that hold the mean colour of their patch, or of the picture."""

  near: bool

  def encode_image(self, image):
    cut = image.reshape(-1, SIDE, PATCH, SIDE, PATCH, 3).mean(axis=(2, 4))
    tokens = cut.reshape(-1, SIDE * SIDE, 3)
    if not self.near:
      mean = tokens.mean(axis=1, keepdims=True)
      tokens = jnp.broadcast_to(mean, tokens.shape)
    first = jnp.full_like(tokens[:, :1], 9.0)
    return Features(jnp.concatenate([first, tokens], axis=1), tokens[:, 0])


def test_only_patches_that_know_their_place_are_read():
  evaluate = probe.LinearProbe(Squares(60, 0), Squares(30, 1), PATCH)
  near, figures = evaluate(Tower(near=True), {})
  assert near == {"accuracy": 1.0, "miou": 1.0}
  assert figures["ink"].dtype == np.uint8
  far, _ = evaluate(Tower(near=False), {})
  # All that it can say is that most patches are ground.
  assert far["accuracy"] == pytest.approx(15 / 16)
  assert far["miou"] == pytest.approx(15 / 16 / 4)


def test_mean_iou_by_hand():
  labels = np.array([[0, 0, 1, 2]])
  guess = np.array([[0, 1, 1, 0]])
  assert probe.mean_iou(labels, guess) == pytest.approx((1 / 3 + 1 / 2 + 0) / 3)
