"""How does TinyWorld look? One picture with examples of every task."""

import pathlib
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmjax.data.batch import Source
from mmjax.data.tinyworld import tasks, text
from mmjax.data.tinyworld.digits import Split

_COLUMNS = 8
_ROWS = 2
_SIDE = 128
_CELL = 150
_MARGIN = 8
_LINE = 12
_LETTERS = 26


def contact_sheet(path: str | pathlib.Path, split: Split = "test") -> None:
  """Writes a PNG with two rows of every task, captions below the pictures."""
  classes = tasks.Classification(split)
  captioned = {
      "captioned digits, 32 pixels": tasks.CaptionedDigits(split),
      "captioned digits, 64 pixels": tasks.CaptionedDigits(split, size=64),
      "retrieval set, 32 pixels": tasks.retrieval_set(split),
      "captioned scenes, 32 pixels": tasks.CaptionedScenes(split),
      "captioned scenes, 64 pixels": tasks.CaptionedScenes(split, size=64),
  }
  count = range(_COLUMNS * _ROWS)
  names = [text.CLASSES[int(classes[i]["label"])] for i in count]
  bands = [_band("classification, 32 pixels", classes, names)]
  bands += [
      _band(title, source, [source.caption(i) for i in count])
      for title, source in captioned.items()
  ]
  page = Image.new("RGB", (bands[0].width, sum(b.height for b in bands)))
  top = 0
  for band in bands:
    page.paste(band, (0, top))
    top += band.height
  page.save(path)


def _band(title: str, source: Source, captions: list[str]) -> Image.Image:
  """The first examples of one task under its title."""
  wrapped = [textwrap.wrap(caption, _LETTERS) for caption in captions]
  height = _SIDE + _LINE * max(map(len, wrapped)) + _MARGIN
  size = (_COLUMNS * _CELL + _MARGIN, 2 * _LINE + _ROWS * height + _MARGIN)
  band = Image.new("RGB", size, "white")
  pen = ImageDraw.Draw(band)
  font = ImageFont.load_default(10)
  pen.text((_MARGIN, 0), title, "black", font)
  for index, lines in enumerate(wrapped):
    row, column = divmod(index, _COLUMNS)
    x, y = _MARGIN + column * _CELL, 2 * _LINE + row * height
    picture = _to_picture(source[index]["image"])
    picture = picture.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    band.paste(picture, (x, y))
    for number, line in enumerate(lines):
      pen.text((x, y + _SIDE + number * _LINE), line, "black", font)
  return band


def _to_picture(image: np.ndarray) -> Image.Image:
  return Image.fromarray(((image + 1) * 127.5).round().astype(np.uint8))
