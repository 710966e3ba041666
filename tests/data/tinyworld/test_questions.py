"""Questions about scenes: true, unambiguous, and answered by looking only."""

import collections
import pickle
import re

import numpy as np
import pytest

from mmjax.data.tinyworld import digits, questions, render, text
from mmjax.data.tinyworld.digits import Dice

SOURCES = (
    questions.SceneCaptions, questions.VisualQuestions, questions.Dialogues
)  # fmt: skip
INKS = np.asarray(list(render.INKS.values())) / 127.5 - 1
PLACES = {
    "on the left": (0, 0.5), "on the right": (1, 0.5),
    "at the top": (0.5, 0), "at the bottom": (0.5, 1),
    "in the middle": (0.5, 0.5),
    "in the top left": (0, 0), "in the top right": (1, 0),
    "in the bottom left": (0, 1), "in the bottom right": (1, 1),
}  # fmt: skip


def find(scene, name, it=None):
  """Which digit of a scene a name means; it must mean one only."""
  if name == "it":
    return it
  spots = text.LAYOUTS[scene.layout]
  if found := re.fullmatch(r"the (\w+) digit", name):
    numbers = [
        n for n, colour in enumerate(scene.colours)
        if text.COLOURS[colour] == found[1]
    ]  # fmt: skip
  elif found := re.fullmatch(r"the digit (.+)", name):
    numbers = [n for n, s in enumerate(spots) if s == PLACES[found[1]]]
  else:
    digit = text.CLASSES.index(re.fullmatch(r"the (\w+)", name)[1])
    numbers = [n for n, d in enumerate(scene.digits) if d == digit]
  assert len(numbers) == 1, (scene, name)
  return numbers[0]


def solve(scene, question, it=None):
  """The answer, by the words of the question alone, and who was asked about."""
  if question.startswith("how many"):
    return text.NUMBERS[len(scene.digits)], it
  if found := re.fullmatch(r"which number is (.+)\?", question):
    number = find(scene, found[1], it)
    return text.CLASSES[scene.digits[number]], number
  if found := re.fullmatch(r"what colour is (.+)\?", question):
    number = find(scene, found[1], it)
    return text.COLOURS[scene.colours[number]], number
  if found := re.fullmatch(r"what is the sum of (.+) and (.+)\?", question):
    pair = [find(scene, name, it) for name in found.groups()]
    assert pair[0] != pair[1]
    return text.NUMBERS[sum(scene.digits[n] for n in pair)], pair[0]
  found = re.fullmatch(
      r"is (.+?) (left or right of|above or below) (.+)\?", question
  )
  here, there = (find(scene, name, it) for name in (found[1], found[3]))
  axis = int(found[2] == "above or below")
  spots = text.LAYOUTS[scene.layout]
  difference = spots[here][axis] - spots[there][axis]
  assert difference
  return found[2].split()[0 if difference < 0 else 2], here


@pytest.mark.parametrize("split", ["train", "test"])
def test_visual_questions_have_their_answer(split):
  source = questions.VisualQuestions(split)
  kinds = collections.Counter()
  for index in range(1500):
    scene, question = source.scene(index), source.questions(index)[0]
    assert solve(scene, question.text)[0] == question.answer
    assert len(set(scene.colours)) == len(scene.digits)
    kinds[source.kind(index)] += 1
    user, assistant = source.conversation(index)
    assert user.text == f"<image>\n{question.text}"
    assert assistant.text == source.answer(index) == question.answer
    assert re.fullmatch("[a-z]+", question.answer)
  assert set(kinds) == set(questions.KINDS)
  assert min(kinds.values()) > 0.8 * 1500 / 5


def test_no_answer_is_much_likelier_than_others():
  source = questions.VisualQuestions("train")
  found = collections.defaultdict(collections.Counter)
  for index in range(4000):
    found[source.kind(index)][source.answer(index)] += 1
  # The most that who does not look can get right.
  guess = {
      kind: max(counts.values()) / sum(counts.values())
      for kind, counts in found.items()
  }
  assert guess["digit"] < 0.15 and guess["colour"] < 0.18
  assert guess["count"] < 0.3 and guess["sum"] < 0.15 and guess["side"] < 0.35
  sides = found["side"]
  assert sides["left"] / (sides["left"] + sides["right"]) == pytest.approx(
      0.5, abs=0.06
  )


def test_questions_do_not_give_their_answer_away():
  source = questions.VisualQuestions("train", kinds=["digit", "sum", "side"])
  for index in range(600):
    words = set(re.findall(r"\w+", source.questions(index)[0].text))
    if source.kind(index) == "side":
      assert not words & {"top", "bottom", "middle", "on"}
    else:
      assert not words & set(text.CLASSES)


def test_dialogues_need_memory_and_ask_nothing_twice():
  source = questions.Dialogues("test", exchanges=4)
  firsts = collections.Counter()
  for index in range(600):
    scene, asked = source.scene(index), source.questions(index)
    assert len(asked) == 4 == len({q.text for q in asked})
    it = None
    for number, question in enumerate(asked):
      assert number == 0 or " it " in f"{question.text[:-1]} " or (
          "how many" in question.text
      )
      answer, it = solve(scene, question.text, it)
      assert answer == question.answer
    firsts[asked[0].text.split()[0]] += 1
    told = asked[0].text
    later = " ".join(question.text for question in asked[1:])
    if "digit on" in told or "digit at" in told or "digit in" in told:
      assert "is it" not in later.replace("which number is it", "").replace(
          "what colour is it", ""
      )
    turns = source.conversation(index)
    assert [turn.role for turn in turns] == ["user", "assistant"] * 4
    assert sum(turn.text.count("<image>") for turn in turns) == 1
    assert turns[0].text.startswith("<image>\n")
    assert turns[-1].text == source.answer(index)
  assert min(firsts.values()) > 200


def test_scene_captions_say_what_is_shown():
  source = questions.SceneCaptions("train", counts=(1, 2, 3, 4))
  counts = collections.Counter()
  for index in range(400):
    scene = source.scene(index)
    assert text.read_scene(source.answer(index)) == scene
    user, assistant = source.conversation(index)
    assert user.text.removeprefix("<image>\n") in questions.INSTRUCTIONS
    assert assistant.text == source.answer(index)
    counts[len(scene.digits)] += 1
  assert min(counts.values()) > 60
  usual = questions.SceneCaptions("train")
  found = {len(usual.scene(i).digits) for i in range(50)}
  assert found == {2, 3}


@pytest.mark.parametrize("make", SOURCES)
def test_a_picture_shows_its_scene(make):
  source = make("test")
  for index in range(60):
    scene, (image,) = source.scene(index), source.pictures(index)
    assert image.shape == (64, 64, 3) and np.abs(image).max() <= 1
    for colour, spot in zip(scene.colours, text.LAYOUTS[scene.layout]):
      near = np.abs(image - INKS[colour]).sum(-1) < 0.25
      y, x = np.nonzero(near)
      place = np.asarray([np.median(x), np.median(y)]) / 64
      expected = 0.5 + 0.23 * (2 * np.asarray(spot) - 1)
      np.testing.assert_allclose(place, expected, atol=0.12)


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_only_the_hand_of_the_split_is_drawn(make, split, monkeypatch):
  drawn = []
  draw = lambda _, glyph, *__: (drawn.append(glyph), None)
  monkeypatch.setattr(render, "draw", draw)
  source = make(split)
  hand = digits.hand(split)
  for index in range(50):
    before = len(drawn)
    source.pictures(index)
    shown = drawn[before:]
    # Each in its turn is drawn, so that all are tested equally often.
    assert hand.glyphs[index] in shown
    assert len(shown) == len(source.scene(index).digits)
  own = {id(glyph) for glyph in hand.glyphs}
  assert {id(glyph) for glyph in drawn} <= own


@pytest.mark.parametrize("make", SOURCES)
def test_an_index_is_one_example_everywhere(make):
  source = make("train", warp=0.5)
  for other in (
      make("train", warp=0.5, length=42), pickle.loads(pickle.dumps(source))
  ):  # fmt: skip
    np.testing.assert_array_equal(other.pictures(41), source.pictures(41))
    assert other.conversation(41) == source.conversation(41)
  for other in (make("test", warp=0.5), make("train", seed=1, warp=0.5)):
    assert not np.array_equal(other.pictures(41), source.pictures(41))
  bent = np.abs(make("train").pictures(41) - source.pictures(41))
  assert bent.max() > 0.5 and source.labels(41) == {}
  with pytest.raises(IndexError, match="index 42 of 42"):
    make("train", length=42).conversation(42)


def test_examples_never_change():
  source = questions.VisualQuestions("test")
  assert [source.questions(i) for i in range(3)] == [
      [("how many digits do you see?", "two")],
      [("which number is the pink digit?", "nine")],
      [("how many digits are there?", "three")],
  ]
  more = questions.VisualQuestions("test", exchanges=3)
  for index in range(50):
    asked = more.questions(index)
    assert len(asked) == 3 and asked[:1] == source.questions(index)
    for question in asked:
      assert solve(more.scene(index), question.text)[0] == question.answer
  with pytest.raises(ValueError, match="exchanges=0"):
    questions.VisualQuestions("test", exchanges=0)
  dialogue = questions.Dialogues("test").questions(6)
  assert [tuple(question) for question in dialogue] == [
      ("what colour is the eight?", "yellow"),
      ("what is the sum of it and the digit in the bottom right?", "twelve"),
      ("how many digits are there?", "three"),
  ]


def test_bad_arguments_are_refused():
  with pytest.raises(ValueError, match=r"kinds=.*mean 'colour'\?"):
    questions.VisualQuestions("train", kinds=["collor"])
  with pytest.raises(ValueError, match=r"kinds=\[\]: expected some of"):
    questions.VisualQuestions("train", kinds=[])
  with pytest.raises(ValueError, match=r"counts=\(5,\): expected some of"):
    questions.SceneCaptions("train", counts=(5,))
  for exchanges in (0, 5):
    with pytest.raises(ValueError, match=f"exchanges={exchanges}: expected 1"):
      questions.Dialogues("train", exchanges=exchanges)
  for make in SOURCES:
    with pytest.raises(ValueError, match="split='valid'.*size=8"):
      make("valid", size=8)


def test_only_unique_digits_are_named_by_their_number():
  scene = text.Scene(2, (0, 1, 2), (7, 7, 3))
  assert questions.names(scene, 0) == {
      "colour": "the red digit", "place": "the digit in the top left"
  }  # fmt: skip
  assert questions.names(scene, 2)["digit"] == "the three"
  found = {
      questions.ask("colour", scene, 2, Dice("names", i)).text
      for i in range(40)
  }
  assert found == {
      "what colour is the three?",
      "what colour is the digit in the bottom left?",
  }
