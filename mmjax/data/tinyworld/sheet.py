"""How does TinyWorld look? Pictures with examples of every task."""

from collections.abc import Sequence
import pathlib
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmjax.data.conversations import Conversations
from mmjax.data.templates import IMAGE
from mmjax.data.tinyworld import documents, questions, tasks, text
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
  pictures = lambda source: [source[i]["image"] for i in count]
  bands = [_band("classification, 32 pixels", pictures(classes), names)]
  bands += [
      _band(title, pictures(source), [source.caption(i) for i in count])
      for title, source in captioned.items()
  ]
  _save(bands, path)


def conversation_sheet(
    path: str | pathlib.Path, split: Split = "test"
) -> None:
  """Writes a PNG of the tasks that are asked and told.

  Below each picture stands what is said from there on, answers after ">".
  Examples of several pictures go on from cell to cell; of a text that
  leads to a picture, that picture is shown.
  """
  sources = {
      "scene captions": questions.SceneCaptions(split),
      "visual questions": questions.VisualQuestions(split),
      "dialogues": questions.Dialogues(split),
      "interleaved documents, 4 pictures each": (
          documents.InterleavedDocuments(split, count=_COLUMNS // 2)
      ),
      "few shot, 7 examples and a question": (
          documents.FewShot(split, shots=_COLUMNS - 1)
      ),
      "retrieval dialogues": documents.RetrievalDialogues(split),
  }
  _save([_told(title, source) for title, source in sources.items()], path)


def _told(title: str, source: Conversations) -> Image.Image:
  """The first examples of a task of conversations."""
  pictures, texts = [], []
  for index in range(_COLUMNS * _ROWS // max(1, source.shown)):
    said = "\n".join(
        turn.text if turn.role == "user" else f"> {turn.text}"
        for turn in source.conversation(index)
    )
    if source.shown:
      pictures += list(source.pictures(index))
      texts += said.split(IMAGE)[1:]
    else:
      pictures.append(source.labels(index)["image"])
      texts.append(said)
  return _band(title, pictures, texts)


def _save(bands: Sequence[Image.Image], path: str | pathlib.Path) -> None:
  """Writes bands of one width below each other."""
  page = Image.new("RGB", (bands[0].width, sum(b.height for b in bands)))
  top = 0
  for band in bands:
    page.paste(band, (0, top))
    top += band.height
  page.save(path)


def _band(
    title: str, images: Sequence[np.ndarray], captions: Sequence[str]
) -> Image.Image:
  """Pictures of one task with captions, under its title."""
  wrapped = [
      [
          line
          for part in caption.strip().split("\n")
          for line in textwrap.wrap(part, _LETTERS)
      ]
      for caption in captions
  ]
  height = _SIDE + _LINE * max(map(len, wrapped)) + _MARGIN
  size = (_COLUMNS * _CELL + _MARGIN, 2 * _LINE + _ROWS * height + _MARGIN)
  band = Image.new("RGB", size, "white")
  pen = ImageDraw.Draw(band)
  font = ImageFont.load_default(10)
  pen.text((_MARGIN, 0), title, "black", font)
  for index, lines in enumerate(wrapped):
    row, column = divmod(index, _COLUMNS)
    x, y = _MARGIN + column * _CELL, 2 * _LINE + row * height
    picture = _to_picture(images[index])
    picture = picture.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    band.paste(picture, (x, y))
    for number, line in enumerate(lines):
      pen.text((x, y + _SIDE + number * _LINE), line, "black", font)
  return band


def _to_picture(image: np.ndarray) -> Image.Image:
  return Image.fromarray(((image + 1) * 127.5).round().astype(np.uint8))
