"""Who speaks in TinyWorld, and when is which sound heard?

espeak-ng says any English text in many voices, with the times of its words and
phonemes. A voice is an accent, a timbre (espeak-ng's "variants"), a pitch and a
speed; the test split speaks in timbres that no training voice has.
"""

import _ctypes
import ctypes
import dataclasses
import functools
import itertools
import pathlib
import threading
from typing import Any, NamedTuple

import espeakng_loader
import numpy as np

from mmjax import config
from mmjax.data import audio as audio_lib
from mmjax.data.tinyworld.digits import Dice, Split

# Files of the library. British and Caribbean English are found at once; for a
# name with capitals the library reads the list of all its languages first.
ACCENTS = {"british": "gmw/en", "caribbean": "gmw/en-029"}

TIMBRES: dict[Split, tuple[str, ...]] = {
    "train": (
        "Alex", "Alicia", "Andy", "Annie", "Denis", "Diogo", "Gene", "Henrique",
        "Hugo", "Jacky", "Marco", "Mike", "Nguyen", "Reed", "RicishayMax",
        "Storm", "adam", "announcer", "antonio", "aunty", "benjamin", "boris",
        "david", "ed", "edward", "f1", "f2", "f3", "f5", "grandma", "grandpa",
        "ian", "iven", "iven3", "john", "kaukovalta", "klatt", "klatt2",
        "klatt5", "m1", "m2", "m3", "m4", "m6", "m7", "m8", "marcelo", "max",
        "michel", "miguel", "norbert", "paul", "pedro", "quincy", "rob",
        "shelby", "travis", "zac",
    ),
    "test": (
        "Andrea", "Lee", "Mario", "Michael", "anika", "belinda", "caleb", "f4",
        "gustave", "linda", "m5", "pablo", "robert", "sandro", "steph",
        "victor",
    ),
}  # fmt: skip
# Ranges of pitch (espeak-ng's 0 to 99) and speed (words a minute).
_PITCH = (35, 66)
_SPEED = (140, 211)


class Voice(NamedTuple):
  """One who speaks.

  Attributes:
    accent: name in `ACCENTS`.
    timbre: one of espeak-ng's variants.
    pitch: 0 to 99; 50 is the timbre's own.
    speed: words a minute.
  """

  accent: str
  timbre: str
  pitch: int = 50
  speed: int = 175


class Span(NamedTuple):
  """A word or a phoneme.

  Attributes:
    text: the word as it is written, or the phoneme in the IPA.
    start: where it begins, in seconds.
    end: where it ends.
  """

  text: str
  start: float
  end: float


@dataclasses.dataclass(frozen=True)
class Utterance:
  """What was said.

  Attributes:
    samples: i16[S], 16 kHz, read-only.
    words: in order.
    phonemes: in order, pauses left out.
  """

  samples: np.ndarray
  words: tuple[Span, ...]
  phonemes: tuple[Span, ...]

  @property
  def audio(self) -> np.ndarray:
    """f32[S] in [-1, 1], 16 kHz."""
    return self.samples.astype(np.float32) / np.float32(2**15)


@functools.cache
def voices(split: Split) -> tuple[Voice, ...]:
  """The voices of a split, two for each of its timbres."""
  found = []
  for timbre, number in itertools.product(TIMBRES[split], range(2)):
    dice = Dice("voice", timbre, number)
    found.append(
        Voice(
            dice.choose(tuple(ACCENTS)),
            timbre,
            _PITCH[0] + dice.below(_PITCH[1] - _PITCH[0]),
            _SPEED[0] + dice.below(_SPEED[1] - _SPEED[0]),
        )
    )
  return tuple(found)


# Enough for every phrase about a digit in every voice: 0.3 GB in the end.
@functools.lru_cache(maxsize=2**14)
def speak(text: str, voice: Voice) -> Utterance:
  """Says a text; the same text and voice always sound the same.

  Takes some milliseconds for a second of speech, nothing the second time.
  Threads take turns: the library is not made for several.

  Args:
    text: English. Words are named as they stand there.
    voice: who says it.

  Raises:
    ValueError: if there is no such voice, or no word in the text.
  """
  _check(voice)
  chunks, events = _synthesise(text, voice)
  if all(event.kind != _WORD for event in events):
    raise ValueError(f"espeak-ng found no word in {text!r}")
  rate = next(event.number for event in events if event.kind == _RATE)
  raw = np.frombuffer(b"".join(chunks), np.int16)
  heard = raw.astype(np.float32) / np.float32(2**15)
  heard = audio_lib.resample(heard, rate, audio_lib.RATE) * np.float32(2**15)
  samples = np.clip(heard.round(), -(2**15), 2**15 - 1).astype(np.int16)
  samples.setflags(write=False)
  length = len(raw)
  timed = [e for e in events if e.kind in (_WORD, _PHONEME, _END)]
  words, phonemes = [], []
  for number, event in enumerate(timed):
    later = timed[number + 1 :]
    if event.kind == _WORD:
      # Up to the next word, the next pause or the end of the clause.
      stops = (e.sample for e in later if e.kind != _PHONEME or not e.name)
      end = next(stops, length)
      begin = event.position - 1
      name = text[begin : begin + event.length]
      words.append(Span(name, event.sample / rate, end / rate))
    elif event.kind == _PHONEME and event.name:
      stops = (e.sample for e in later if e.kind != _WORD)
      end = next(stops, length)
      phonemes.append(Span(event.name, event.sample / rate, end / rate))
  return Utterance(samples, tuple(words), tuple(phonemes))


def _check(voice: Voice) -> None:
  """Refuses what the library would take for another voice, in silence."""
  config.pick(ACCENTS, voice.accent, "accent")
  config.pick(dict.fromkeys(_timbres()), voice.timbre, "timbre")
  if not 0 <= voice.pitch <= 99 or not 80 <= voice.speed <= 450:
    raise ValueError(
        f"{voice}: expected a pitch of 0 to 99 and a speed of 80 to 450"
    )


@functools.cache
def _timbres() -> tuple[str, ...]:
  folder = pathlib.Path(espeakng_loader.get_data_path(), "voices", "!v")
  return tuple(sorted(path.name for path in folder.iterdir()))


# From the library's speak_lib.h.
_TERMINATED, _WORD, _END, _PHONEME, _RATE = 0, 1, 5, 7, 8
_SYNCHRONOUS = 2
_PHONEME_EVENTS, _IPA, _DO_NOT_EXIT = 1, 2, 0x8000
_SPEED_PARAMETER, _PITCH_PARAMETER = 1, 3
_UTF8 = 1
_BUFFER_MS = 200


class _Id(ctypes.Union):
  _fields_ = (
      ("number", ctypes.c_int),
      ("name", ctypes.c_char_p),
      ("string", ctypes.c_char * 8),
  )


class _RawEvent(ctypes.Structure):
  _fields_ = (
      ("type", ctypes.c_int),
      ("identifier", ctypes.c_uint),
      ("position", ctypes.c_int),
      ("length", ctypes.c_int),
      ("milliseconds", ctypes.c_int),
      ("sample", ctypes.c_int),
      ("user", ctypes.c_void_p),
      ("id", _Id),
  )


class _Event(NamedTuple):
  """An event of the library, copied."""

  kind: int
  position: int
  length: int
  sample: int
  number: int
  name: str


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_short),
    ctypes.c_int,
    ctypes.POINTER(_RawEvent),
)
_turn = threading.Lock()


def _synthesise(
    text: str, voice: Voice
) -> tuple[list[bytes], list[_Event]]:
  """Samples and events of one utterance, from a library loaded afresh.

  The library keeps the phase of its flutter and the like from one utterance to
  the next and offers nothing to set it back; to load it takes half a
  millisecond.
  """
  chunks: list[bytes] = []
  events: list[_Event] = []

  def take(samples: Any, count: int, raw: Any) -> int:
    if samples and count:
      chunks.append(ctypes.string_at(samples, 2 * count))
    listed = map(raw.__getitem__, itertools.count())
    for event in itertools.takewhile(lambda e: e.type != _TERMINATED, listed):
      name = event.id.string if event.type == _PHONEME else b""
      events.append(
          _Event(
              event.type,
              event.position,
              event.length,
              event.sample,
              event.id.number,
              name.decode("utf-8", "replace"),
          )
      )
    return 0

  callback = _Callback(take)
  said = text.encode()
  with _turn:
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
      library.espeak_Initialize(
          _SYNCHRONOUS,
          _BUFFER_MS,
          espeakng_loader.get_data_path().encode(),
          _PHONEME_EVENTS | _IPA | _DO_NOT_EXIT,
      )
      library.espeak_SetSynthCallback(callback)
      library.espeak_ng_SetRandSeed(ctypes.c_long(1))
      name = f"{ACCENTS[voice.accent]}+{voice.timbre}"
      library.espeak_SetVoiceByName(name.encode())
      library.espeak_SetParameter(_PITCH_PARAMETER, voice.pitch, 0)
      library.espeak_SetParameter(_SPEED_PARAMETER, voice.speed, 0)
      library.espeak_Synth(said, len(said) + 1, 0, 1, 0, _UTF8, None, None)
      library.espeak_Terminate()
    finally:
      _ctypes.dlclose(library._handle)
  return chunks, events
