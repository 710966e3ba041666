"""Pairs for two-tower models: true phrases of what is drawn."""

import numpy as np
import pytest

from mmjax.data import tokenizers
from mmjax.data.tinyworld import phrases, questions, render, text
from mmjax.data.tinyworld.digits import Dice

INKS = np.asarray(list(render.INKS.values())) / 127.5 - 1


def test_phrases_say_nothing_false():
  source = questions.SceneCaptions("train", counts=(1, 2, 3, 4))
  for index in range(300):
    scene = source.scene(index)
    only = index % len(scene.digits) if index % 2 else None
    said = text.scene_phrase(scene, Dice("phrase", index), only)
    numbers = range(len(scene.digits)) if only is None else [only]
    words = said.rstrip(".").replace(",", "").split()
    named = [text.CLASSES.index(w) for w in words if w in text.CLASSES]
    colours = [text.COLOURS.index(w) for w in words if w in text.COLOURS]
    if not colours and len(named) == len(numbers):
      assert named == [scene.digits[n] for n in numbers]
      continue
    (digit,) = named
    fits = [
        n for n in numbers
        if scene.digits[n] == digit
        and colours in ([], [scene.colours[n]])
        and (" in the " not in said and " at " not in said
             and " on " not in said or said.endswith(f"{scene.place(n)}."))
    ]  # fmt: skip
    assert fits, said


def test_pairs_fit_the_vocabulary_and_its_length():
  source = phrases.Phrases("train")
  tokenizer = tokenizers.ClipTokenizer.tinyworld(length=77)
  lengths = [
      np.count_nonzero(tokenizer.encode(source.caption(i))) for i in range(500)
  ]
  assert max(lengths) <= phrases.PHRASE_LENGTH
  example = source[0]
  assert example["image"].shape == (64, 64, 3)
  assert example["tokens"].shape == (phrases.PHRASE_LENGTH,)


def _inked(image):
  """Corners in which something brighter than any ground stands."""
  bright = image.max(axis=-1) > 0.2
  return sum(
      bool(part.any())
      for half in np.split(bright, 2)
      for part in np.split(half, 2, axis=1)
  )


def test_one_digit_of_a_scene_may_be_drawn_alone():
  whole = phrases.Phrases("train", counts=(4,), alone=0, single=0)
  part = phrases.Phrases("train", counts=(4,), alone=0, single=1)
  for index in range(20):
    assert _inked(whole[index]["image"]) == 4
    assert _inked(part[index]["image"]) == 1
    assert "digits" not in part.caption(index)


def test_a_source_refuses_counts_that_there_are_not():
  with pytest.raises(ValueError, match="counts"):
    phrases.Phrases("train", counts=(0, 1))
