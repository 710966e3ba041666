"""Documents, episodes and dialogues of several pictures, held out and true."""

import collections
import pickle
import re

import numpy as np
import pytest

from mmjax.data import batch as batch_lib
from mmjax.data import conversations, subwords, templates
from mmjax.data.tinyworld import digits, documents, render, text

SOURCES = (
    documents.InterleavedDocuments,
    documents.FewShot,
    documents.NamedDigits,
    documents.RetrievalDialogues,
)


def shown(source, index):
  """All the pictures of an example."""
  pictures = source.pictures(index)
  return pictures if source.shown else source.labels(index)["image"][None]


@pytest.mark.parametrize("make", SOURCES)
def test_an_index_is_one_example_everywhere(make):
  source = make("train", warp=0.5)
  for other in (
      make("train", warp=0.5, length=42), pickle.loads(pickle.dumps(source))
  ):  # fmt: skip
    np.testing.assert_array_equal(shown(other, 41), shown(source, 41))
    assert other.conversation(41) == source.conversation(41)
  for other in (make("test", warp=0.5), make("train", seed=1, warp=0.5)):
    assert not np.array_equal(shown(other, 41), shown(source, 41))
  assert not np.array_equal(shown(make("train"), 41), shown(source, 41))
  assert source.pictures(41).shape == (source.shown, 32, 32, 3)
  with pytest.raises(IndexError, match="index 42 of 42"):
    make("train", length=42).conversation(42)
  with pytest.raises(ValueError, match="split='valid'.*size=8"):
    make("valid", size=8)


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_only_the_hand_of_the_split_is_drawn(make, split, monkeypatch):
  drawn = []
  draw = lambda _, glyph, *__: (drawn.append(glyph), None)
  monkeypatch.setattr(render, "draw", draw)
  source = make(split)
  glyphs = digits.hand(split).glyphs
  for index in range(30):
    before = len(drawn)
    shown(source, index)
    assert any(glyph is glyphs[index] for glyph in drawn[before:])
    assert len(drawn) - before == max(1, source.shown)
  own = {id(glyph) for glyph in glyphs}
  assert {id(glyph) for glyph in drawn} <= own


def test_documents_count_up_or_down():
  source = documents.InterleavedDocuments("test", count=4)
  steps = collections.Counter()
  for index in range(300):
    looks, turns = source.looks(index), source.conversation(index)
    found = {
        (b.digit - a.digit) % 10 for a, b in zip(looks, looks[1:])
    }  # fmt: skip
    assert found in ({1}, {9})
    steps[found.pop()] += 1
    assert [turn.text for turn in turns[::2]] == ["<image>"] * 4
    for look, turn in zip(looks, turns[1::2], strict=True):
      words = re.findall(r"\w+", turn.text)
      assert text.CLASSES[look.digit] in words or str(look.digit) in words
      others = set(text.COLOURS) - {text.COLOURS[look.colour]}
      assert not others & set(words)
    assert source.answer(index) == turns[-1].text
  assert min(steps.values()) > 100
  with pytest.raises(ValueError, match="count=0"):
    documents.InterleavedDocuments("test", count=0)


def test_pictures_show_their_looks():
  inks = np.asarray(list(render.INKS.values())) / 127.5 - 1
  grounds = np.asarray(list(render.GROUNDS.values())) / 127.5 - 1
  for source in (
      documents.InterleavedDocuments("test"), documents.FewShot("test")
  ):  # fmt: skip
    for index in range(20):
      for image, look in zip(
          source.pictures(index), source.looks(index), strict=True
      ):
        border = np.concatenate([image[0], image[-1]]).mean(0)
        assert np.abs(grounds - border).sum(-1).argmin() == look.ground
        distance = np.abs(image - grounds[look.ground]).sum(-1)
        ink = image.reshape(-1, 3)[distance.ravel().argsort()[-25:]].mean(0)
        assert np.abs(inks - ink).sum(-1).argmin() == look.colour


@pytest.mark.parametrize("shots,ways", [(0, 4), (3, 4), (4, 4), (8, 4), (8, 8)])
def test_episodes_define_their_words(shots, ways):
  source = documents.FewShot("test", shots=shots, ways=ways)
  asked = collections.Counter()
  for index in range(200):
    words, looks = source.words(index), source.looks(index)
    turns = source.conversation(index)
    assert len(words) == ways == len(set(words.values()))
    assert set(words.values()) <= set(documents.WORDS)
    assert len(turns) == 2 * (shots + 1)
    told = set()
    for look, turn in zip(looks, turns[1::2], strict=True):
      assert turn.text == words[look.digit]
      # What was never told cannot be learned.
      assert turn.weight == (turn.text in told)
      told.add(turn.text)
    # Whole cycles show every digit equally often.
    for begin in range(0, shots - ways + 1, ways):
      cycle = [look.digit for look in looks[begin : begin + ways]]
      assert sorted(cycle) == sorted(words)
    assert looks[-1].digit == digits.hand("test").labels[index]
    assert source.answer(index) == words[looks[-1].digit]
    asked[looks[-1].digit] += 1
  assert len(asked) == 10


def test_words_and_places_of_episodes_tell_nothing():
  source = documents.FewShot("train", shots=4)
  word_of, place_of = collections.Counter(), collections.Counter()
  for index in range(2000):
    looks = source.looks(index)
    word_of[source.answer(index)] += 1
    place_of[[look.digit for look in looks].index(looks[-1].digit)] += 1
  assert len(word_of) == len(documents.WORDS) == 56
  assert max(word_of.values()) < 2.5 * 2000 / 56
  assert all(count == pytest.approx(500, abs=80) for count in place_of.values())


def test_an_episode_never_shows_the_scan_that_it_asks_for(monkeypatch):
  drawn = []
  draw = lambda _, glyph, *__: (drawn.append(glyph), None)
  monkeypatch.setattr(render, "draw", draw)
  source = documents.FewShot("test", shots=8, ways=1)
  for index in range(100):
    drawn.clear()
    source.pictures(index)
    assert drawn[-1] not in drawn[:-1]


def test_bad_episodes_are_refused():
  for shots, ways in ((-1, 4), (4, 0), (4, 11)):
    with pytest.raises(ValueError, match=f"shots={shots}, ways={ways}"):
      documents.FewShot("train", shots=shots, ways=ways)


def read(dialogue):
  """The look that a dialogue leads to."""
  said = dict(re.findall(r"(\w+ \w+ \w+)(?: is it)?\? (\w+)\.", dialogue))
  by_question = {}
  for question, word in re.findall(r"([^.?]+)\? (\w+)\.", dialogue):
    by_question[question.strip()] = word
  assert len(by_question) == 4, said
  return text.Look(
      text.SIZES.index(by_question["how large is it"]),
      text.COLOURS.index(by_question["what colour is it"]),
      text.CLASSES.index(by_question["which digit is it"]),
      text.GROUNDS.index(by_question["on which background"]),
  )


def test_names_are_those_of_the_digits_in_both_splits():
  train, test = documents.NamedDigits("train"), documents.NamedDigits("test")
  assert train.names == test.names and len(set(train.names)) == 10
  assert documents.NamedDigits("train", seed=1).names != train.names
  for source, split in ((train, "train"), (test, "test")):
    labels = digits.hand(split).labels
    for index in range(30):
      assert source.answer(index) == source.names[labels[index]]


def test_dialogues_lead_to_their_picture():
  source = documents.RetrievalDialogues("train")
  orders = set()
  for index in range(300):
    (turn,) = source.conversation(index)
    look = source.look(index)
    assert turn.role == "assistant" and turn.text == source.answer(index)
    assert read(turn.text) == look
    labels = source.labels(index)
    assert labels["identity"] == look.identity
    assert labels["label"] == look.digit
    orders.add(tuple(re.findall(r"(\w+ \w+)(?: \w+)*\?", turn.text)))
  assert len(orders) == 24


def test_the_retrieval_set_is_distinct():
  source = documents.dialogue_retrieval_set(n=100)
  looks = [source.look(i) for i in range(len(source))]
  assert len(source) == 100 == len({look.identity for look in looks})
  assert [read(source.answer(i)) for i in range(100)] == looks
  other = documents.dialogue_retrieval_set(n=100, seed=1)
  assert other.look(0) != source.look(0)
  with pytest.raises(ValueError, match="n=641"):
    documents.dialogue_retrieval_set(n=641)
  with pytest.raises(ValueError, match="length=3, but there are 1 looks"):
    documents.RetrievalDialogues("test", length=3, looks=looks[:1])


@pytest.mark.parametrize(
    "make,name,length",
    [
        (documents.InterleavedDocuments, "flamingo", 80),
        (documents.FewShot, "flamingo", 80),
        (documents.RetrievalDialogues, "fromage_retrieval", 40),
    ],
)
def test_examples_are_rows_of_the_alphabet(make, name, length):
  source = make("test")
  formatter = templates.Formatter(subwords.load(), name, length)
  written = conversations.Written(source, formatter)
  for index in range(30):
    example = written[index]
    batch_lib.check({k: v[None] for k, v in example.items()}, make.__name__)
    # Every picture has its place.
    rows = example["source"][example["source"] >= 0]
    assert rows.tolist() == list(range(source.shown))
  if not source.shown:
    anchor = example["tokens"][example["anchor"]]
    assert anchor == formatter.tokenizer.special("[RET]")
    assert example["image"].shape == (32, 32, 3) and "images" not in example
