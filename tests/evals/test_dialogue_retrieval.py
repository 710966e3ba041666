"""Recall of dialogues, of a system whose answers are known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.evals.dialogue_retrieval import DialogueRetrieval
from mmjax.models.fromage import Search


class Dialogues:
  """Six dialogues about pictures whose first pixel is their number."""

  def __len__(self):
    return 6

  def __getitem__(self, index):
    image = np.full((4, 4, 3), index, np.float32)
    tokens = np.array([7, index, 0], np.int32)
    return {"image": image, "tokens": tokens, "anchor": np.int32(1)}

  def answer(self, index):
    return f"number {index}"


class Oracle(nn.Module):
  """Takes number 5 for 4; asks where numbers are odd."""

  def embed_image(self, image):
    return jax.nn.one_hot(image[:, 0, 0, 0].astype(jnp.int32), 6)

  def find(self, tokens, anchor):
    number = jnp.take_along_axis(tokens, anchor[:, None], axis=1)[:, 0]
    text = jax.nn.one_hot(jnp.minimum(number, 4), 6)
    return Search(text + 0.1 * jax.nn.one_hot(number, 6), number % 2 == 1)


def test_recall_and_who_asks():
  metrics, figures = DialogueRetrieval(Dialogues(), ks=(1, 2), shown=3)(
      Oracle(), {}
  )
  assert metrics == {
      "r1": pytest.approx(5 / 6), "r2": 1.0, "asks": pytest.approx(0.5)
  }
  assert figures["found"].shape[2] == 3
