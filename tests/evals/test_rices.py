"""Examples that look like the question, with pictures that are one grey."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.data import conversations, subwords, templates
from mmjax.data.templates import IMAGE, Turn
from mmjax.evals import rices

WORDS = ("bado", "fike", "gulo", "mido")
FORMATTER = templates.Formatter(subwords.load(), "flamingo", 32)
(END,) = FORMATTER.ends()[0]


class Greys:
  """Example i shows the grey i % 4."""

  shown = 1

  def __len__(self):
    return 24

  def conversation(self, index):
    return [Turn("user", IMAGE), Turn("assistant", self.answer(index))]

  def pictures(self, index):
    return np.full((1, 4, 4, 3), 1 + index % 4, np.float32)

  def answer(self, index):
    return WORDS[index % 4]

  def labels(self, index):
    return {}


class Last(nn.Module):
  """Says the word of the last example."""

  @nn.nowrap
  def init_state(self, batch, slots):
    return jnp.zeros(batch, jnp.int32)

  def look(self, image):
    grey = image[:, 0, 0, :1]
    return jnp.concatenate([jnp.cos(grey), jnp.sin(grey)], axis=1)

  def prefill(self, batch, state, count):
    # Behind it: its end, the picture of the question, two of "Output:".
    place = count[:, None] - 5
    word = jnp.take_along_axis(batch["tokens"], place, axis=1)
    return 9 * jax.nn.one_hot(word, 1024), state

  def reply(self, tokens, state, count):
    return 9 * jax.nn.one_hot(jnp.full_like(tokens, END), 1024), state


def test_nearest_is_the_cosine_and_comes_last():
  rng = np.random.default_rng(0)
  questions, pool = rng.normal(size=(5, 3)), rng.normal(size=(9, 3))
  found = rices.nearest(questions, pool, 4)
  for question, own in zip(questions, found, strict=True):
    cosine = pool @ question / np.linalg.norm(pool, axis=1)
    assert own.tolist() == np.argsort(cosine)[-4:].tolist()


def test_nearest_examples_answer_where_those_by_chance_do_not():
  source = conversations.Written(Greys(), FORMATTER)
  evaluator = rices.Rices(source, source, 2, 24, 24, batch_size=8)
  metrics, pictures = evaluator(Last(), {"params": {}})
  assert metrics["rices"] == 1.0 and 0.0 < metrics["random"] < 0.6
  assert pictures["chosen"].ndim == 3
  with pytest.raises(ValueError, match="supports=99"):
    rices.Rices(source, source, 2, 99)
