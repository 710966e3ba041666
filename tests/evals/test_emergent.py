"""Emergent evaluators on embeddings whose answers are known."""

import types

import jax.numpy as jnp
import numpy as np

from mmjax.evals import emergent

CLASSES = ("zero", "one", "two", "three")
COLOURS = ("red", "blue", "green")


class World:
  """All colours and digits; the senses are one-hot vectors of both."""

  def __init__(self):
    self.pairs = [(c, d) for c in range(3) for d in range(4)]

  def __len__(self):
    return len(self.pairs)

  def __getitem__(self, index):
    colour, digit = self.pairs[index]
    seen = np.zeros((2, 2, 3), np.float32)
    seen[0, 0] = colour, digit, 0
    return {
        "image": seen,
        "mel": np.full((2, 2), digit, np.float32),
        "label": np.int32(digit),
    }

  def look(self, index):
    colour, digit = self.pairs[index]
    return types.SimpleNamespace(colour=colour, digit=digit)

  def said(self, index):
    colour, digit = self.pairs[index]
    named = f"a {COLOURS[colour]} " if index % 5 == 4 else ""
    return named + CLASSES[digit], "voice"


class System:
  """Pictures are (colour, digit), speech is the digit, if it is heard."""

  def __init__(self, deaf=False):
    self.deaf = deaf

  def apply(self, variables, image=None, mel=None):
    del variables
    hot = lambda x, n: jnp.asarray(x[..., None] == jnp.arange(n), jnp.float32)
    found = {}
    if image is not None:
      found["image"] = jnp.concatenate(
          [hot(image[:, 0, 0, 0], 3), hot(image[:, 0, 0, 1], 4)], axis=-1
      )
    if mel is not None:
      digit = hot(mel[:, 0, 0], 4)
      if self.deaf:  # Takes three for two.
        digit = digit.at[:, 2].add(2 * digit[:, 3])
      # Of another length than pictures.
      found["mel"] = 5 * jnp.concatenate([jnp.zeros((len(mel), 3)), digit], -1)
    return types.SimpleNamespace(**found)


class Classifier:
  classes = CLASSES

  def classifier(self, system, variables):
    return np.eye(7, dtype=np.float32)[3:]


def test_emergent_counts_what_is_right():
  evaluate = emergent.Emergent(
      World(), Classifier(), ("image", "mel"), (("mel", "image"),), 4, 4
  )
  metrics, shown = evaluate(System(deaf=True), {})
  assert metrics == {
      "image_top1": 1.0, "mel_top1": 0.75, "mel_to_image": 0.75
  }
  assert set(shown) == {"image", "mel", "said"}
  assert all(x.dtype == np.uint8 and x.shape[-1] == 3 for x in shown.values())


def test_sums_have_the_colour_of_the_one_and_the_digit_of_the_other():
  evaluate = emergent.Arithmetic(World(), COLOURS, batch_size=4)
  metrics, shown = evaluate(System(), {})
  assert metrics == {"colour": 1.0, "digit": 1.0, "both": 1.0}
  assert shown["sums"].dtype == np.uint8
  # The digit that was not heard is missed; nothing else is.
  heard, _ = evaluate(System(deaf=True), {})
  assert 0.5 < heard["both"] <= heard["digit"] < 1.0
