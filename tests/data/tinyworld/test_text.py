"""Captions say true things in known words, and canonical ones everything."""

import itertools
import re

import pytest

from mmjax.data import tokenizers
from mmjax.data.tinyworld import tasks, text
from mmjax.data.tinyworld.digits import Dice

SIZE_OF = {
    "small": 0, "little": 0, "tiny": 0, "large": 1, "big": 1, "huge": 1,
}  # fmt: skip
DIGIT_OF = {word: n for n, word in enumerate(text.CLASSES)}
DIGIT_OF |= {str(n): n for n in range(10)}
LOOKS = [text.Look.from_identity(i) for i in range(text.LOOKS)]


def read(caption):
  """The attributes that a caption of one digit names, by their words alone."""
  said = {}
  for word in re.findall(r"\w+", caption):
    for name, table in (
        ("size", SIZE_OF),
        ("colour", {c: i for i, c in enumerate(text.COLOURS)}),
        ("digit", DIGIT_OF),
        ("ground", {c: i for i, c in enumerate(text.GROUNDS)}),
    ):
      if word in table:
        assert name not in said, caption
        said[name] = table[word]
  return said


def read_scene(caption):
  """The scene that a caption describes, by its words alone."""
  thing = r"an? (\w+) (\w+)"
  names = ("top left", "top right", "bottom left", "bottom right")
  if "three digits" in caption:
    found = re.findall(rf"{thing} in the (\w+ \w+)", caption)
    found.sort(key=lambda parts: names.index(parts[2]))
    missing = set(names) - {place for _, _, place in found}
    # The corner that stays empty names the layout: the last one first.
    layout = 2 + 3 - names.index(missing.pop())
  else:
    pattern = rf"{thing} (to the left of|to the right of|above|below) {thing}"
    a, b, relation, c, d = re.search(pattern, caption).groups()
    found = [(a, b), (c, d)]
    if relation in ("to the right of", "below"):
      found.reverse()
    layout = int(relation in ("above", "below"))
  return text.Scene(
      layout,
      tuple(text.COLOURS.index(parts[0]) for parts in found),
      tuple(text.CLASSES.index(parts[1]) for parts in found),
  )


def scenes(count):
  for index in range(count):
    dice = Dice("scenes", index)
    layout = dice.below(len(text.SPOTS))
    n = len(text.SPOTS[layout])
    colours = tuple(dice.sample(n, len(text.COLOURS)))
    digits = tuple(dice.below(10) for _ in range(n))
    yield text.Scene(layout, colours, digits), dice


def test_a_look_is_its_identity():
  assert text.LOOKS == 2 * 8 * 10 * 4
  assert [look.identity for look in LOOKS] == list(range(text.LOOKS))


def test_canonical_captions_say_everything_and_are_distinct():
  for look in LOOKS:
    assert read(text.digit_caption(look)) == look._asdict()
  assert len({text.digit_caption(look) for look in LOOKS}) == text.LOOKS


def test_drawn_captions_say_nothing_false_and_always_the_digit():
  counts = {}
  for index in range(4000):
    dice = Dice("captions", index)
    look = LOOKS[dice.below(text.LOOKS)]
    caption = text.digit_caption(look, dice)
    said = read(caption)
    assert said.items() <= look._asdict().items() and "digit" in said, caption
    counts[len(said)] = counts.get(len(said), 0) + 1
  # Full captions, and every kind of partial one, are common.
  assert counts[4] / 4000 == pytest.approx(0.3, abs=0.05)
  assert all(counts[n] > 200 for n in (1, 2, 3))


def test_articles_follow_sounds():
  assert text.digit_caption(text.Look(0, 1, 8, 0)).startswith(
      "a photo of a small orange eight on"
  )
  for caption in text.corpus():
    assert not re.search(r"\ba (orange|eight|8)\b", caption)
    assert not re.search(r"\ban (?!orange\b|eight\b|8\b|image\b)", caption)


def test_scene_captions_are_determined_by_the_scene_and_determine_it():
  for scene, dice in scenes(500):
    assert read_scene(text.scene_caption(scene)) == scene
    assert read_scene(text.scene_caption(scene, dice)) == scene


def test_captions_of_one_and_of_four_digits():
  one = text.Scene(6, (1,), (8,))
  assert text.scene_caption(one) == "a photo of an orange eight."
  four = text.Scene(7, (0, 1, 2, 3), (1, 8, 1, 0))
  assert text.scene_caption(four) == (
      "a photo of four digits: a red one in the top left, an orange eight in "
      "the top right, a yellow one in the bottom left and a green zero in the "
      "bottom right."
  )


def test_a_caption_is_read_back():
  for scene, dice in scenes(500):
    assert text.read_scene(text.scene_caption(scene)) == scene
    assert text.read_scene(text.scene_caption(scene, dice)) == scene
  for layout, spots in enumerate(text.LAYOUTS):
    count = range(len(spots))
    scene = text.Scene(layout, tuple(count), tuple(n + 3 for n in count))
    for index in range(8):
      caption = text.scene_caption(scene, Dice("read", index))
      assert text.read_scene(caption) == scene


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a photo of the digit two.",
        "a red two and a blue three.",
        "a red two above a blue three below a green four.",
        "three digits: a red two in the top left, a blue one in the top left "
        "and a green two in the bottom left.",
        "a red two to the left of above a blue three.",
        "a red two to the left of a blue three above a",
        "two digits: a red two in the top left, a blue one in the top right "
        "and a green one.",
    ],
)
def test_what_describes_no_scene_is_not_read(caption):
  assert text.read_scene(caption) is None


def test_scene_identities_are_unique_and_fit():
  found = {}
  for scene, _ in scenes(3000):
    assert 0 <= scene.identity < 2**31
    assert found.setdefault(scene.identity, scene) == scene
  last = text.Scene(5, (7, 7, 7), (9, 9, 9))
  assert last.identity < 2**31


def test_prompts_use_words_of_the_training_captions():
  source = tasks.CaptionedDigits("train")
  known = {
      word
      for index in range(2000)
      for word in re.findall(r"\w+", source.caption(index))
  }
  for template, name in itertools.product(text.TEMPLATES, text.CLASSES):
    assert set(re.findall(r"\w+", template.format(name))) <= known


def test_every_word_is_one_token_and_every_caption_fits():
  tokenizer = tokenizers.ClipTokenizer.tinyworld()
  words = set()
  for caption in text.corpus():
    words.update(re.findall(r"\w+|[^\w\s]+", caption))
  for word in words:
    assert tokenizer.encode(word)[2] == tokenizer.end_id, word
  longest = {True: 0, False: 0}
  for caption in text.corpus():
    pieces = len(re.findall(r"\w+|[^\w\s]+", caption)) + 2
    of_scene = " left" in caption or " below" in caption or " above" in caption
    longest[of_scene] = max(longest[of_scene], pieces)
  assert longest[False] <= tasks.DIGIT_CAPTION_LENGTH
  assert longest[True] <= tasks.SCENE_CAPTION_LENGTH


def test_the_committed_vocabulary_is_what_the_corpus_teaches(tmp_path):
  trained = tokenizers.ClipTokenizer.train(text.corpus(), 2048)
  tokenizers.write_merges(tmp_path / "merges", trained.merges)
  committed = tokenizers.tinyworld_merges().read_bytes()
  assert (tmp_path / "merges").read_bytes() == committed
