"""Texts that stand for pictures: they tell all that is asked about."""

import pickle

import numpy as np
import pytest

from mmjax.data import conversations, subwords, templates
from mmjax.data.tinyworld import documents, questions, text, written
from mmjax.data.tinyworld.digits import Dice
from tests.data.tinyworld.test_questions import solve


def test_a_told_conversation_differs_in_its_pictures_only():
  source = questions.VisualQuestions("test")
  told = written.Told(source)
  assert told.shown == 0 and len(told) == len(source)
  for index in range(100):
    ours, theirs = told.conversation(index), source.conversation(index)
    (description,) = told.descriptions(index)
    assert ours[0].text == theirs[0].text.replace("<image>", description)
    assert ours[1:] == theirs[1:]
    assert told.answer(index) == source.answer(index)
    assert told.kind(index) == source.kind(index)
  again = pickle.loads(pickle.dumps(told))
  assert again.conversation(3) == told.conversation(3)


def test_descriptions_of_scenes_name_every_digit_with_all_it_has():
  source = questions.SceneCaptions("test", counts=(1, 2, 3, 4))
  told = written.Told(source)
  for index in range(200):
    (said,) = told.descriptions(index)
    scene = source.scene(index)
    if said.endswith("."):
      assert text.read_scene(said) == scene
      continue
    for number, part in enumerate(said.split(", ")):
      colour, digit, *place = part.split()
      assert text.COLOURS.index(colour) == scene.colours[number]
      assert text.CLASSES.index(digit) == scene.digits[number]
      assert " ".join(place) == scene.place(number)


def test_descriptions_of_looks_name_everything_or_the_digit():
  source = documents.FewShot("test", shots=3)
  bare = 0
  for index in range(100):
    told = written.Told(source, digit_only=0.5).descriptions(index)
    for said, look in zip(told, source.looks(index), strict=True):
      found = text.read_look(said)
      bare += len(found) == 1
      assert found["digit"] == look.digit
      assert found == look._asdict() or len(found) == 1
  assert 150 < bare < 250
  turns = written.Told(source, digit_only=1.0).conversation(0)
  assert [turn.text for turn in turns[::2]] == [
      text.CLASSES[look.digit] for look in source.looks(0)
  ]


def test_quizzes_have_right_answers_from_the_description():
  source = written.Quizzes("train", length=400, exchanges=4)
  kinds = set()
  for index in range(200):
    turns = source.conversation(index)
    scene = source.scene(index)
    said, first = turns[0].text.split("\n")
    if said.endswith("."):
      assert text.read_scene(said) == scene
    asked = [first, *(turn.text for turn in turns[2::2])]
    for question, turn in zip(asked, turns[1::2], strict=True):
      assert solve(scene, question)[0] == turn.text
      kinds.add(question.split()[0])
    assert source.answer(index) == turns[-1].text
  assert kinds == {"how", "which", "what", "is"}
  other = written.Quizzes("test", length=400, exchanges=4)
  assert source.conversation(0) != other.conversation(0)


def test_quizzes_refuse_what_cannot_be():
  with pytest.raises(ValueError, match="exchanges=0"):
    written.Quizzes("train", exchanges=0)
  with pytest.raises(ValueError, match="counts"):
    written.Quizzes("train", counts=(5,))
  with pytest.raises(IndexError):
    written.Quizzes("train", length=3).conversation(3)


def test_texts_need_no_pictures_in_a_row():
  formatter = templates.Formatter(subwords.load(), "vicuna", 256)
  source = conversations.Written(written.Quizzes("train"), formatter)
  row = source[0]
  assert not {"image", "images"} & set(row)
  assert np.all(row["source"] == -1)


def test_descriptions_are_varied_and_fixed():
  scene = questions.SceneCaptions("test", counts=(3,)).scene(0)
  said = {written.describe_scene(scene, Dice("x", n)) for n in range(20)}
  assert len(said) > 3
  assert written.describe_scene(scene, Dice("x", 1)) in said


def test_echoes_say_a_list_of_different_words_twice():
  source = written.Echoes("train", length=300, words=(2, 12))
  known = {*documents.WORDS, *text.CLASSES, *text.COLOURS}
  counts = set()
  for index in range(300):
    first, second = source.conversation(index)
    assert first.role == "user" and second.role == "assistant"
    assert first.text == second.text == source.answer(index)
    words = first.text.split()
    assert len(set(words)) == len(words) and set(words) <= known
    counts.add(len(words))
  assert counts == set(range(2, 13))
  held_out = written.Echoes("test", length=300, words=(2, 12))
  assert held_out.answer(0) != source.answer(0)
  with pytest.raises(IndexError, match="300"):
    source.answer(300)


@pytest.mark.parametrize("words", [(0, 3), (4, 3), (1, 10_000)])
def test_bad_lengths_of_lists_are_refused(words):
  with pytest.raises(ValueError, match="two counts"):
    written.Echoes("train", words=words)
