"""Retrieval with a second look, against answers known beforehand."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.evals import matching


class Pairs:
  """Five pairs; picture and text of a pair hold its number."""

  def __len__(self):
    return 5

  def __getitem__(self, i):
    image = np.full((2, 2, 3), i, np.float32)
    return {"image": image, "tokens": np.full(4, i, np.int32)}

  def caption(self, i):
    return f"number {i}"


class Blurred(nn.Module):
  """Takes neighbours for each other, until it looks again."""

  sharp: bool = True

  def encode_image(self, image):
    number = image[:, 0, 0, 0]
    places = jnp.arange(5)
    # The next number is a little nearer than the own one.
    near = jnp.maximum(0, 2 - jnp.abs(places - number[:, None] - 0.7))
    vectors = jnp.stack([0 * near, near], axis=1)  # One query is blind.
    return number[:, None, None], vectors

  def encode_text(self, tokens):
    return jnp.eye(5)[tokens[:, 0]]

  def match(self, seen, tokens):
    yes = jnp.where(seen[:, 0, 0] == tokens[:, 0], 5.0, -5.0) * self.sharp
    return jnp.stack([-yes, yes], axis=-1)[:, None]


def test_the_second_look_finds_what_similarity_does_not():
  evaluator = matching.Reranked(Pairs(), candidates=2, ks=(1, 2), batch_size=4)
  metrics, pictures = evaluator(Blurred(), {})
  assert metrics["similar_i2t_r1"] == pytest.approx(1 / 5)  # The last has none.
  assert metrics["i2t_r1"] == metrics["t2i_r1"] == 1.0
  assert pictures["captions"].dtype == np.uint8
  # Without a verdict of its own it changes nothing.
  metrics, _ = evaluator(Blurred(sharp=False), {})
  for key in ("i2t_r1", "t2i_r1", "i2t_r2"):
    assert metrics[key] == metrics[f"similar_{key}"]


def test_candidates_are_those_of_the_query():
  similar = np.array([[0.9, 0.8, 0.1], [0.2, 0.7, 0.6]], np.float32)
  looked = matching.nearest(similar, 2)
  np.testing.assert_array_equal(looked, [[1, 1, 0], [0, 1, 1]])
  sure = np.array([[-9, -8, 99], [99, -1, 2]], np.float32)
  found = matching.reranked(similar, sure, looked)
  # What was not looked at stays behind, in its order.
  np.testing.assert_array_equal(
      np.argsort(-found, axis=1), [[1, 0, 2], [2, 1, 0]]
  )
