"""What can be said about a TinyWorld picture, and in which words?

A picture has attributes; a caption names some of them, or all of them where it
is canonical. Captions vary in words and order and never say a false thing.
"""

from collections.abc import Iterator
import itertools
import re
from typing import NamedTuple

from mmjax.data.tinyworld import render
from mmjax.data.tinyworld.digits import Dice

CLASSES = (
    "zero", "one", "two", "three", "four",
    "five", "six", "seven", "eight", "nine",
)
# Every sum of two digits.
NUMBERS = (
    *CLASSES,
    "ten", "eleven", "twelve", "thirteen", "fourteen",
    "fifteen", "sixteen", "seventeen", "eighteen",
)
COLOURS = tuple(render.INKS)
GROUNDS = tuple(render.GROUNDS)
SIZES = ("small", "large")
_SIZE_WORDS = (("small", "little", "tiny"), ("large", "big", "huge"))

# Prompts of a zero-shot classifier, to be filled with one of `CLASSES`. Their
# words are words of the training captions; not all their sentences are.
TEMPLATES = (
    "a photo of the digit {}.",
    "a photo of the number {}.",
    "a picture of the digit {}.",
    "a picture of the number {}.",
    "an image of the digit {}.",
    "an image of the number {}.",
    "the digit {}.",
)

# The first one makes the canonical caption.
_FULL = (
    "a photo of a {size} {colour} {digit} on a {ground} background.",
    "a picture of a {size} {digit} in {colour} on {ground}.",
    "a {size} {colour} {digit} on {ground}.",
    "the digit {digit}, {size} and {colour}, on a {ground} background.",
    "on a {ground} background there is a {size} {colour} {digit}.",
    "an image of the {size} {colour} digit {digit} on {ground}.",
)
_PARTIAL = (
    "a photo of a {size} {colour} {digit}.",
    "a {size} {digit} in {colour}.",
    "a {colour} {digit}.",
    "a photo of the digit {digit}.",
    "a picture of the number {digit}.",
    "an image of the digit {digit}.",
)
# Few captions name everything: the more they name, the less is the shape of
# the digit needed to tell the pictures of a batch apart, and the later learned.
_FULL_SHARE = 0.3
_NUMERAL_SHARE = 0.25

# Before what is written with a vowel and spoken with one ("a one" is right).
_ARTICLE = re.compile(r"\ba (?=orange\b|eight\b|8\b)")


class Look(NamedTuple):
  """The attributes of a picture of one digit, as indices into the words."""

  size: int
  colour: int
  digit: int
  ground: int

  @property
  def identity(self) -> int:
    """The look as one integer, 0 .. `LOOKS` - 1."""
    index = self.size
    index = index * len(COLOURS) + self.colour
    index = index * len(CLASSES) + self.digit
    return index * len(GROUNDS) + self.ground

  @classmethod
  def from_identity(cls, identity: int) -> "Look":
    """The inverse of `identity`."""
    rest, ground = divmod(identity, len(GROUNDS))
    rest, digit = divmod(rest, len(CLASSES))
    size, colour = divmod(rest, len(COLOURS))
    return cls(size, colour, digit, ground)

  @classmethod
  def drawn(cls, digit: int, dice: Dice) -> "Look":
    """Everything but the digit by chance."""
    return cls(
        size=dice.below(len(SIZES)),
        colour=dice.below(len(COLOURS)),
        digit=digit,
        ground=dice.below(len(GROUNDS)),
    )


LOOKS = len(SIZES) * len(COLOURS) * len(CLASSES) * len(GROUNDS)


def digit_caption(look: Look, dice: Dice | None = None) -> str:
  """A caption drawn by `dice`, or the canonical one, which names everything."""
  if dice is None:
    return _fill(_FULL[0], look, SIZES[look.size], CLASSES[look.digit])
  full = dice.between(0, 1) < _FULL_SHARE
  numeral = dice.between(0, 1) < _NUMERAL_SHARE
  return _fill(
      dice.choose(_FULL if full else _PARTIAL),
      look,
      dice.choose(_SIZE_WORDS[look.size]),
      str(look.digit) if numeral else CLASSES[look.digit],
  )


def full_caption(look: Look, dice: Dice) -> str:
  """A caption drawn by `dice` of those that name everything."""
  size = dice.choose(_SIZE_WORDS[look.size])
  return _fill(dice.choose(_FULL), look, size, CLASSES[look.digit])


def _fill(template: str, look: Look, size: str, digit: str) -> str:
  text = template.format(
      size=size,
      colour=COLOURS[look.colour],
      digit=digit,
      ground=GROUNDS[look.ground],
  )
  return _ARTICLE.sub("an ", text)


# Where the digits of a scene stand: left of, above, or in three of the four
# corners. A corner is (column, row).
_CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))
_CORNER_NAMES = ("top left", "top right", "bottom left", "bottom right")
SPOTS: tuple[tuple[tuple[float, float], ...], ...] = (
    ((0.0, 0.5), (1.0, 0.5)),
    ((0.5, 0.0), (0.5, 1.0)),
    *itertools.combinations(_CORNERS, 3),
)
# One digit in the middle, and one in every corner, are only asked about.
LAYOUTS = (*SPOTS, ((0.5, 0.5),), _CORNERS)
_PLACES = {
    (0.0, 0.5): "on the left",
    (1.0, 0.5): "on the right",
    (0.5, 0.0): "at the top",
    (0.5, 1.0): "at the bottom",
    (0.5, 0.5): "in the middle",
}
_PLACES |= {
    corner: f"in the {name}" for corner, name in zip(_CORNERS, _CORNER_NAMES)
}
_PAIRS = (
    # (first, then second), (second, then first)
    ("to the left of", "to the right of"),
    ("above", "below"),
)
_SCENE_OPENINGS = ("a photo of ", "a picture of ", "")
# Most phrases name only the digits: whatever else is told shows which picture
# of a batch is meant, and digits are learned late.
_DIGITS_SHARE = 0.6


class Scene(NamedTuple):
  """The attributes of a picture of several digits.

  Attributes:
    layout: index into `LAYOUTS`, which begin with `SPOTS`.
    colours: the colour of each digit, in the order of the layout's spots.
    digits: likewise.
  """

  layout: int
  colours: tuple[int, ...]
  digits: tuple[int, ...]

  @property
  def identity(self) -> int:
    """The scene as one integer below 2**31, unique among those of `SPOTS`."""
    index = self.layout
    for colour, digit in zip(self.colours, self.digits, strict=True):
      index = (index * len(COLOURS) + colour) * len(CLASSES) + digit
    # Pairs have the layouts 0 and 1, so they all count below the triples.
    return index

  def place(self, number: int) -> str:
    """Where a digit stands, to be put after its name: "in the top left"."""
    return _PLACES[LAYOUTS[self.layout][number]]


def scene_caption(scene: Scene, dice: Dice | None = None) -> str:
  """A caption drawn by `dice`, or the canonical one; all name everything."""
  things = [
      f"a {COLOURS[colour]} {CLASSES[digit]}"
      for colour, digit in zip(scene.colours, scene.digits, strict=True)
  ]
  opening = _SCENE_OPENINGS[0] if dice is None else dice.choose(_SCENE_OPENINGS)
  turned = dice is not None and dice.below(2) == 1
  if len(things) == 1:
    text = f"{opening}{things[0]}."
  elif len(things) == 2:
    relation = _PAIRS[scene.layout][turned]
    first, second = reversed(things) if turned else things
    text = f"{opening}{first} {relation} {second}."
  else:
    placed = [
        f"{thing} {scene.place(number)}" for number, thing in enumerate(things)
    ]
    if turned:
      placed.reverse()
    listed = f"{', '.join(placed[:-1])} and {placed[-1]}"
    text = f"{opening}{NUMBERS[len(placed)]} digits: {listed}."
  return _ARTICLE.sub("an ", text)


# What a phrase may say of one digit, in which order.
_OF_ONE = (
    "{opening}a {colour} {digit}.",
    "{opening}a {digit} {place}.",
    "{opening}a {colour} {digit} {place}.",
)


def scene_phrase(scene: Scene, dice: Dice, only: int | None = None) -> str:
  """What a hasty eye reports of a scene: its digits, or one with what it has.

  Digits come in the order of the layout's spots, which is that of reading.

  Args:
    scene: what is shown.
    dice: choose what is said.
    only: the one digit that is shown of the scene; all by default.
  """
  opening = dice.choose(_SCENE_OPENINGS)
  words = [CLASSES[digit] for digit in scene.digits]
  if dice.between(0, 1) < _DIGITS_SHARE:
    if only is not None:
      words = [words[only]]
    if len(words) == 1:
      return f"{opening}the {dice.choose(('digit', 'number'))} {words[0]}."
    listed = f"{', '.join(words[:-1])} and {words[-1]}"
    return f"{opening}the digits {listed}."
  number = dice.below(len(words)) if only is None else only
  text = dice.choose(_OF_ONE).format(
      opening=opening,
      colour=COLOURS[scene.colours[number]],
      digit=words[number],
      place=scene.place(number),
  )
  return _ARTICLE.sub("an ", text)


_THING = re.compile(
    rf"\ban? ({'|'.join(COLOURS)}) ({'|'.join(CLASSES)})\b"
    rf"(?: in the ({'|'.join(_CORNER_NAMES)}))?"
)


def read_scene(caption: str) -> Scene | None:
  """The scene that a caption describes, or None if it describes none.

  The inverse of `scene_caption`, for telling how much of a generated caption is
  right.
  """
  found = _THING.findall(caption)
  if len(found) == 1:
    layout = LAYOUTS.index(((0.5, 0.5),))
  elif len(found) == 2:
    said = [
        (layout, turned)
        for layout, pair in enumerate(_PAIRS)
        for turned, words in enumerate(pair)
        if f" {words} " in caption
    ]
    if len(said) != 1:
      return None
    layout, turned = said[0]
    found = found[::-1] if turned else found
  else:
    by_name = dict(zip(_CORNER_NAMES, _CORNERS))
    if not all(name in by_name for _, _, name in found):
      return None
    found.sort(key=lambda thing: _CORNERS.index(by_name[thing[2]]))
    spots = tuple(by_name[name] for _, _, name in found)
    if spots not in LAYOUTS:
      return None
    layout = LAYOUTS.index(spots)
  return Scene(
      layout,
      tuple(COLOURS.index(colour) for colour, _, _ in found),
      tuple(CLASSES.index(digit) for _, digit, _ in found),
  )


_READ_AS = {
    word: (name, index)
    for name, words in (
        ("digit", CLASSES),
        ("digit", tuple(map(str, range(len(CLASSES))))),
        ("colour", COLOURS),
        ("ground", GROUNDS),
        *(("size", same) for same in zip(*_SIZE_WORDS)),
    )
    for index, word in enumerate(words)
}


def read_look(caption: str) -> dict[str, int]:
  """What a caption of one digit names, by the fields of `Look`.

  Of an attribute that it names twice, differently, nothing is told.
  """
  said: dict[str, set[int]] = {}
  for word in re.findall(r"\w+", caption):
    if word in _READ_AS:
      name, index = _READ_AS[word]
      said.setdefault(name, set()).add(index)
  return {name: min(found) for name, found in said.items() if len(found) == 1}


def corpus() -> Iterator[str]:
  """Texts that hold every word and sentence form, for training a vocabulary."""
  for look in map(Look.from_identity, range(LOOKS)):
    sizes = _SIZE_WORDS[look.size]
    digits = (CLASSES[look.digit], str(look.digit))
    for words in itertools.product(_FULL + _PARTIAL, sizes, digits):
      template, size, digit = words
      yield _fill(template, look, size, digit)
  for template, name in itertools.product(TEMPLATES, CLASSES):
    yield template.format(name)
  for layout, spots in enumerate(SPOTS):
    count = len(spots)
    for index in range(256):
      dice = Dice("corpus", layout, index)
      colours = tuple(dice.sample(count, len(COLOURS)))
      digits = tuple(dice.below(len(CLASSES)) for _ in range(count))
      yield scene_caption(Scene(layout, colours, digits), dice)
