"""How does TinyWorld look? Pictures with examples of every task."""

from collections.abc import Sequence
import pathlib
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmjax.data import audio
from mmjax.data.conversations import Conversations
from mmjax.data.templates import IMAGE
from mmjax.data.tinyworld import (
  documents,
  questions,
  senses,
  sounds,
  spoken,
  tasks,
  text,
)
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


def senses_sheet(path: str | pathlib.Path, split: Split = "test") -> None:
  """Writes a PNG of what is heard and felt.

  Every row of the first band is one scene, as all senses perceive it. Of films
  eight frames are shown; sounds are spectrograms, low notes at the bottom, a
  second a half of the width.
  """
  source = senses.Senses(split, size=64, samples=256)
  pictures, names = [], []
  for index in range(_ROWS):
    example = source[index]
    pictures += [
        example["image"],
        *example["video"],
        _greys(example["depth"]),
        _heat(example["thermal"]),
        _spectrogram(example["mel"]),
        _lines(example["imu"][:, :3]),
        _lines(example["imu"][:, 3:]),
    ]
    said, voice = source.said(index)
    names += [
        source.caption(index), "film, first frame", "film, second frame",
        "depth", "heat", f"'{said}' ({voice.timbre}, {voice.accent})",
        "acceleration", "rotation",
    ]  # fmt: skip
  bands = [_band("one scene, all senses", pictures, names)]
  films = spoken.SpokenFilms(split, size=64, frames=_COLUMNS - 1)
  pictures, names = [], []
  for index in range(_ROWS):
    film = films[index]
    pictures += [*film["video"], _spectrogram(audio.fbank(film["audio"], 64))]
    seconds = len(film["audio"]) / audio.RATE / len(film["video"])
    names += [f"{i * seconds:.1f} s" for i in range(len(film["video"]))]
    names.append(" ".join(word.text for word in films.words(index)))
  bands.append(_band("spoken films", pictures, names))
  digits, events = spoken.SpokenDigits(split), sounds.SoundEvents(split)
  shown = range(_COLUMNS * _ROWS)
  heard = lambda source, i: _spectrogram(audio.fbank(source[i]["audio"], 64))
  said = lambda i: " ".join(w.text for w in digits.utterance(i).words)
  bands += [
      _band("spoken digits", [heard(digits, i) for i in shown],
            [said(i) for i in shown]),
      _band("sound events", [heard(events, i) for i in shown],
            [events.caption(i) for i in shown]),
  ]  # fmt: skip
  _save(bands, path)


def _greys(values: np.ndarray) -> np.ndarray:
  """f32[H, W] in [0, 1] as f32[H, W, 3] in [-1, 1]."""
  return np.repeat(2 * values[..., None] - 1, 3, axis=-1)


def _heat(values: np.ndarray) -> np.ndarray:
  """As `_greys`, from black over red and yellow to white."""
  return 2 * np.clip(3 * values[..., None] - np.arange(3), 0, 1) - 1


def _spectrogram(mel: np.ndarray) -> np.ndarray:
  """f32[M, mels] as a square picture, time to the right."""
  grey = (mel - mel.min()) / np.ptp(mel)
  picture = Image.fromarray((255 * grey.T[::-1]).astype(np.uint8))
  return _greys(np.asarray(picture.resize((_SIDE, _SIDE))) / 255)


def _lines(values: np.ndarray) -> np.ndarray:
  """f32[n, 3] as curves in red, green and blue."""
  picture = Image.new("RGB", (_SIDE, _SIDE), "white")
  pen = ImageDraw.Draw(picture)
  scale = _SIDE / 2.2 / np.abs(values).max()
  across = np.linspace(0, _SIDE - 1, len(values))
  for column, colour in zip(values.T, ("red", "green", "blue"), strict=True):
    pen.line([*zip(across, _SIDE / 2 - scale * column)], colour)
  return np.asarray(picture) / 127.5 - 1


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
  page.save(path, optimize=True)


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
