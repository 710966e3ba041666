"""TinyWorld's sources: deterministic, held out, and true to their captions."""

import collections
import hashlib
import pickle
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from mmjax.data import batch as batch_lib
from mmjax.data import tokenizers
from mmjax.data.tinyworld import digits, questions, render, sheet, tasks, text

SOURCES = (tasks.Classification, tasks.CaptionedDigits, tasks.CaptionedScenes)
INKS = np.asarray(list(render.INKS.values())) / 127.5 - 1
GROUNDS = np.asarray(list(render.GROUNDS.values())) / 127.5 - 1

FINGERPRINT = """
import hashlib
from mmjax.data.tinyworld import tasks
for source in (tasks.Classification, tasks.CaptionedDigits,
               tasks.CaptionedScenes):
  for key, value in source("train")[41].items():
    print(key, hashlib.sha256(value.tobytes()).hexdigest())
"""


def equal(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [32, 64])
def test_examples_are_rows_of_the_alphabet(make, split, size):
  source = make(split, size=size)
  rows = [source[i] for i in (0, len(source) - 1)]
  batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
  batch_lib.check(batch, make.__name__)
  assert batch["image"].shape == (2, size, size, 3)
  assert np.abs(batch["image"]).max() <= 1


@pytest.mark.parametrize("make", SOURCES)
def test_an_index_is_one_example_everywhere(make):
  source = make("train")
  assert equal(source[41], make("train")[41])
  assert equal(source[41], pickle.loads(pickle.dumps(source))[41])
  # Neither the length nor what was read before changes an example.
  assert equal(source[41], make("train", length=42)[41])
  others = (source[42], make("test")[41], make("train", seed=1)[41])
  for other in others:
    assert not np.array_equal(source[41]["image"], other["image"])


def test_examples_are_equal_in_another_process():
  found = subprocess.run(
      [sys.executable, "-c", FINGERPRINT],
      capture_output=True,
      text=True,
      check=True,
  )
  expected = [
      f"{key} {hashlib.sha256(value.tobytes()).hexdigest()}"
      for make in SOURCES
      for key, value in make("train")[41].items()
  ]
  assert found.stdout.split("\n")[:-1] == expected


def test_examples_never_change():
  source = tasks.CaptionedDigits("train")
  assert [source.caption(i) for i in (0, 1, 65535)] == [
      "a big zero in blue.",
      "a photo of a large purple one.",
      "a little 8 in yellow.",
  ]
  scenes = tasks.CaptionedScenes("test")
  assert [scenes.caption(i) for i in (0, 1)] == [
      "a red one below a yellow zero.",
      "three digits: a green one in the top left, a blue two in the top right "
      "and an orange two in the bottom right.",
  ]
  row = source[1]["image"][16, ::4].mean(-1)
  expected = [-0.66, -0.68, -0.69, -0.66, -0.13, 0.21, -0.11, -0.66]
  np.testing.assert_allclose(row, expected, atol=0.02)


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_only_the_hand_of_the_split_is_drawn(make, split, monkeypatch):
  drawn = []
  draw = lambda _, glyph, *__: (drawn.append(glyph), None)
  monkeypatch.setattr(render, "draw", draw)
  source = make(split, length=50)
  for index in range(50):
    source[index]
  own = {id(glyph) for glyph in digits.hand(split).glyphs}
  assert len(drawn) >= 50 and {id(glyph) for glyph in drawn} <= own


def test_retrieval_draws_held_out_digits(monkeypatch):
  drawn = []
  draw = lambda _, glyph, *__: (drawn.append(glyph), None)
  monkeypatch.setattr(render, "draw", draw)
  source = tasks.retrieval_set(n=40)
  for index in range(40):
    source[index]
  own = {id(glyph) for glyph in digits.hand("test").glyphs}
  assert len(drawn) == 40 and {id(glyph) for glyph in drawn} <= own


def test_every_held_out_digit_is_tested_equally_often():
  source = tasks.Classification("test")
  assert len(source) == 4 * digits.TEST_COUNT
  labels = [int(source[i]["label"]) for i in range(len(source))]
  assert labels == 4 * list(digits.hand("test").labels)


def test_looks_are_spread_evenly():
  source = tasks.CaptionedDigits("train")
  looks = [source.look(i) for i in range(4000)]
  for name, count in (("size", 2), ("colour", 8), ("digit", 10), ("ground", 4)):
    found = collections.Counter(getattr(look, name) for look in looks)
    assert len(found) == count
    assert max(found.values()) < 1.3 * min(found.values())


def test_a_picture_shows_its_look():
  source = tasks.CaptionedDigits("test", length=200)
  heights = {0: [], 1: []}
  for index in range(200):
    look, image = source.look(index), source[index]["image"]
    border = np.concatenate([image[0], image[-1]]).mean(0)
    assert np.abs(GROUNDS - border).sum(-1).argmin() == look.ground
    distance = np.abs(image - GROUNDS[look.ground]).sum(-1)
    ink = image.reshape(-1, 3)[distance.ravel().argsort()[-25:]].mean(0)
    assert np.abs(INKS - ink).sum(-1).argmin() == look.colour
    rows = np.flatnonzero((distance > 0.5).any(1))
    heights[look.size].append(rows[-1] - rows[0] + 1)
    assert source[index]["identity"] == look.identity
    assert source[index]["label"] == look.digit
    assert look.digit == digits.hand("test").labels[index]
  # No small digit is as high as any large one.
  assert max(heights[0]) < min(heights[1])


def test_a_picture_shows_its_scene():
  source = tasks.CaptionedScenes("test", size=64, length=150)
  for index in range(150):
    scene, image = source.scene(index), source[index]["image"]
    for colour, spot in zip(scene.colours, text.SPOTS[scene.layout]):
      near = np.abs(image - INKS[colour]).sum(-1) < 0.25
      y, x = np.nonzero(near)
      place = np.asarray([np.median(x), np.median(y)]) / 64
      expected = 0.5 + 0.23 * (2 * np.asarray(spot) - 1)
      np.testing.assert_allclose(place, expected, atol=0.12)
    assert source[index]["identity"] == scene.identity
    assert len(set(scene.colours)) == len(scene.colours)


@pytest.mark.parametrize("make", SOURCES[1:])
def test_tokens_are_the_caption(make):
  tokenizer = tokenizers.ClipTokenizer.tinyworld(length=40)
  source = make("train", tokenizer=tokenizer)
  for index in range(20):
    tokens = source[index]["tokens"]
    np.testing.assert_array_equal(
        tokens, tokenizer.encode(source.caption(index))
    )
    spaced = source.caption(index)
    for sign in ",.:":
      spaced = spaced.replace(sign, f" {sign}")
    assert tokenizer.decode(tokens) == spaced


def test_retrieval_captions_are_distinct_and_canonical():
  source = tasks.retrieval_set(n=100)
  captions = [source.caption(i) for i in range(100)]
  assert len(source) == 100 and len(set(captions)) == 100
  assert len({int(source[i]["identity"]) for i in range(100)}) == 100
  assert captions == [text.digit_caption(source.look(i)) for i in range(100)]
  found = {look.digit for look in map(source.look, range(100))}
  assert found == set(range(10))
  assert captions[0] == "a photo of a small green nine on a navy background."
  again, other = tasks.retrieval_set(n=100), tasks.retrieval_set(n=100, seed=1)
  assert equal(source[5], again[5])
  assert {other.caption(i) for i in range(100)} != set(captions)
  assert len(tasks.retrieval_set(n=640)) == 640


@pytest.mark.parametrize("n", [0, 641])
def test_too_many_distinct_captions_are_refused(n):
  with pytest.raises(ValueError, match=f"n={n}: .* 1 to 640 distinct"):
    tasks.retrieval_set(n=n)


@pytest.mark.parametrize("make", SOURCES)
def test_bad_arguments_are_listed_at_once(make):
  with pytest.raises(ValueError) as error:
    make("valid", size=8, length=0)
  message = str(error.value)
  for part in (
      "split='valid': expected 'train' or 'test'",
      "size=8: expected 16 to ",
      "length=0: expected at least one example",
  ):
    assert part in message
  with pytest.raises(ValueError, match=f"to {render.LARGEST} pixels"):
    make("train", size=render.LARGEST + 1)


def test_looks_and_length_must_agree():
  with pytest.raises(ValueError, match="length=3, but there are 1 looks"):
    tasks.CaptionedDigits("test", looks=[text.Look(0, 0, 0, 0)], length=3)


@pytest.mark.parametrize("make", SOURCES)
def test_a_source_ends(make):
  source = make("test", length=3)
  assert len(list(source)) == 3
  for index in (3, -1):
    with pytest.raises(IndexError, match=f"index {index} of 3"):
      source[index]


def test_a_contact_sheet_holds_the_pictures(tmp_path):
  sheet.contact_sheet(tmp_path / "sheet.png")
  page = np.asarray(Image.open(tmp_path / "sheet.png"), np.float32)
  first = tasks.Classification("test")[0]["image"]
  first = ((first + 1) * 127.5).round().repeat(4, 0).repeat(4, 1)
  rows, columns = first.shape[:2]
  assert any(
      np.array_equal(page[y : y + rows, 8 : 8 + columns], first)
      for y in range(60)
  )


def test_a_conversation_sheet_holds_the_pictures(tmp_path):
  sheet.conversation_sheet(tmp_path / "sheet.png")
  page = np.asarray(Image.open(tmp_path / "sheet.png"), np.float32)
  (first,) = questions.SceneCaptions("test").pictures(0)
  first = ((first + 1) * 127.5).round().repeat(2, 0).repeat(2, 1)
  rows, columns = first.shape[:2]
  assert any(
      np.array_equal(page[y : y + rows, 8 : 8 + columns], first)
      for y in range(60)
  )
