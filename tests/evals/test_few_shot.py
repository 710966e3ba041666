"""Few-shot evaluation with a system that finds equal pictures by looking."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.data import conversations, subwords, templates
from mmjax.data.templates import IMAGE, Turn
from mmjax.evals import few_shot

WORDS = ("bado", "fike", "gulo", "mido")


class Episodes:
  """Grey pictures; episode i asks for class i % 4, shown i // 4 before."""

  shown = 5

  def __len__(self):
    return 16

  def classes(self, index):
    asked, ago = index % 4, index // 4
    others = [n for n in range(4) if n != asked]
    shown = [*others[ago:], asked, *others[:ago]]
    return [*shown, asked]

  def conversation(self, index):
    turns = []
    for number in self.classes(index):
      turns += [Turn("user", IMAGE), Turn("assistant", WORDS[number])]
    return turns

  def pictures(self, index):
    grey = np.asarray(self.classes(index), np.float32)[:, None, None, None]
    return np.broadcast_to(grey, (5, 4, 4, 3))

  def answer(self, index):
    return WORDS[index % 4]

  def labels(self, index):
    return {}


FORMATTER = templates.Formatter(subwords.load(), "flamingo", 32)
(END,) = FORMATTER.ends()[0]
VOCAB = 1024


class Copier(nn.Module):
  """Says what stands behind the last picture that equals the question's."""

  @nn.nowrap
  def init_state(self, batch, slots):
    del slots  # It remembers one word.
    return jnp.full(batch, END, jnp.int32)

  def prefill(self, batch, state, count):
    grey = batch["images"].mean(axis=(2, 3, 4))
    equal = (grey[:, :-1] == grey[:, -1:]).astype(jnp.int32)
    number = equal.shape[1]
    if number == 0:
      return 9 * jax.nn.one_hot(state, VOCAB)[:, None], state
    # A word stands fourth behind the place of its picture.
    place = number - 1 - jnp.argmax(equal[:, ::-1], axis=1)
    word = jnp.take_along_axis(batch["tokens"], 4 + 5 * place[:, None], 1)[:, 0]
    found = jnp.where(equal.any(axis=1), word, END)
    return 9 * jax.nn.one_hot(found, VOCAB)[:, None], found

  def reply(self, tokens, state, count=None):
    return 9 * jax.nn.one_hot(jnp.full_like(tokens, END), VOCAB), state


@pytest.fixture(scope="module")
def source():
  return conversations.Written(Episodes(), FORMATTER)


def test_answers_come_from_the_examples_that_are_shown(source):
  evaluator = few_shot.FewShot(source, shots=(0, 1, 2, 4), batch_size=8)
  metrics, pictures = evaluator(Copier(), {"params": {}})
  # Among n examples is the class of a question n times in four.
  for shots, share in ((0, 0.0), (1, 0.25), (2, 0.5), (4, 1.0)):
    assert metrics[f"exact_{shots}"] == share
    assert metrics[f"choice_{shots}"] >= share
  assert pictures["curve"].dtype == np.uint8 and pictures["curve"].ndim == 3
  assert pictures["answers"].ndim == 3


def test_without_examples_two_are_told_and_not_shown(source):
  asked = few_shot.FewShot(source, shots=(0, 4)).behind(0)
  example = asked.prompt(3)
  text = FORMATTER.tokenizer.decode(
      example["tokens"][example["segment"] > 0].tolist()
  )
  first, second = Episodes().classes(3)[-3:-1]
  assert text.split() == [
      "Output:", f"{WORDS[first]}Output:", f"{WORDS[second]}Output:"
  ]  # fmt: skip
  assert example["images"].shape == (1, 4, 4, 3)
  # Only the question sees the picture.
  assert (example["media"] == 0).sum() == 3


def test_an_answer_is_what_follows_the_prompt(source):
  asked = few_shot.FewShot(source, shots=(1,)).behind(1)
  ids = few_shot.answer_ids(asked, 0, "fike")
  assert ids[-1] == END
  assert FORMATTER.read(ids) == "fike"


def test_likelihoods_are_those_of_whole_texts():
  """Two tokens behind two prompts, of a system whose logits are a table."""
  table = np.random.default_rng(0).normal(size=(7, 7)).astype(np.float32)

  class Bigrams(nn.Module):
    @nn.nowrap
    def init_state(self, batch: int, slots: int) -> Any:
      return jnp.zeros(batch)

    def prefill(self, batch, state, count):
      return jnp.asarray(table)[batch["tokens"]], state

    def reply(self, tokens, state, count=None):
      return jnp.asarray(table)[tokens], state

  batch = dict(
      tokens=jnp.array([[1, 2, 0], [3, 4, 5]]),
      segment=jnp.array([[1, 1, 0], [1, 1, 1]]),
  )
  options, lengths = np.array([[6, 2], [3, 0]]), np.array([2, 1])
  found = few_shot.log_likelihood(Bigrams(), {}, batch, options, lengths)
  log_probs = np.float64(table)
  log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
  for row, last in enumerate((2, 5)):
    np.testing.assert_allclose(
        found[row],
        [log_probs[last, 6] + log_probs[6, 2], log_probs[last, 3]],
        rtol=1e-5,
    )


def test_more_examples_than_there_are(source):
  with pytest.raises(ValueError, match="shots=.0, 5., .* expected 0 to 4"):
    few_shot.FewShot(source, shots=(0, 5))
