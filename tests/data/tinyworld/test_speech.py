"""Speech: the same everywhere, timed, in voices that only one split has."""

import hashlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from mmjax.data import audio
from mmjax.data import batch as batch_lib
from mmjax.data.tinyworld import sounds, speech, spoken
from mmjax.data.tinyworld.digits import Dice
from mmjax.data.tinyworld.speech import Voice, speak

VOICE = Voice("british", "m3")

FINGERPRINT = """
import hashlib
from mmjax.data.tinyworld import speech
for timbre in ("m3", "klatt", "f2"):
  heard = speech.speak("a red seven", speech.Voice("british", timbre)).audio
  print(hashlib.sha256(heard.tobytes()).hexdigest())
"""


def test_an_utterance_is_the_same_in_any_order_thread_and_process():
  found = subprocess.run(
      [sys.executable, "-c", FINGERPRINT],
      capture_output=True,
      text=True,
      check=True,
  ).stdout.split()
  voices = [Voice("british", name) for name in ("m3", "klatt", "f2")]
  heard = {}

  def say(voice):
    # Past the memory, while others speak too.
    heard[voice] = speak.__wrapped__("a red seven", voice).audio

  threads = [
      threading.Thread(target=say, args=(voice,)) for voice in voices[::-1] * 2
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  expected = [hashlib.sha256(heard[v].tobytes()).hexdigest() for v in voices]
  assert found == expected
  assert len(set(expected)) == 3


def test_words_and_phonemes_lie_where_they_are_heard():
  found = speak("the digit three, is red.", VOICE)
  assert found.audio.dtype == np.float32 and not found.samples.flags.writeable
  assert 0.1 < np.abs(found.audio).max() <= 1
  words = [word.text for word in found.words]
  assert words == ["the", "digit", "three", "is", "red"]
  assert [p.text.strip("ˈˌ") for p in found.phonemes][:2] == ["ð", "ə"]
  for spans in (found.words, found.phonemes):
    for before, after in zip(spans, spans[1:]):
      assert before.start < before.end <= after.start + 1e-9
    assert spans[-1].end <= len(found.audio) / audio.RATE + 1e-9
  # Words are loud, the pause at the comma is not.
  level = lambda start, end: np.abs(
      found.audio[round(start * audio.RATE) : round(end * audio.RATE)]
  ).max()
  three, then = found.words[2:4]
  assert then.start - three.end > 0.05
  assert level(three.end + 0.02, then.start - 0.01) < 0.02
  for word in found.words:
    assert level(word.start, word.end) > 0.05
  # A word's phonemes lie within it.
  inside = [p for p in found.phonemes if three.start <= p.start < three.end]
  assert inside[0].text == "θ" and inside[-1].text.startswith("ˈiː")


def test_pitch_and_speed_are_heard():
  said = lambda speed: speak("the digit seven", VOICE._replace(speed=speed))
  slow, fast = said(140), said(210)
  assert len(slow.audio) > 1.25 * len(fast.audio)

  def pitch(height):
    heard = speak("nine", VOICE._replace(pitch=height)).audio
    middle = heard[len(heard) // 4 : len(heard) // 2]
    middle = middle - middle.mean()
    echo = np.correlate(middle, middle, "full")[len(middle) :]
    # A man's voice.
    lowest, highest = audio.RATE // 220, audio.RATE // 50
    return audio.RATE / (lowest + echo[lowest:highest].argmax())

  assert pitch(80) > 1.1 * pitch(20)


def test_splits_share_no_timbre_and_voices_sound_different():
  train, test = (speech.voices(split) for split in ("train", "test"))
  assert len(train) == len(set(train)) > 100 and len(test) > 30
  assert not {v.timbre for v in train} & {v.timbre for v in test}
  assert {v.accent for v in train} == {v.accent for v in test}
  some = (*train[::13], *test[::7])
  heard = {speak("three", voice).audio.tobytes() for voice in some}
  assert len(heard) == len(some)


def test_what_the_library_would_ignore_is_refused():
  for voice, message in (
      (Voice("klingon", "m3"), "accent"),
      (Voice("british", "m33"), "timbre.*did you mean 'm3'"),
      (Voice("british", "m3", pitch=120), "pitch of 0 to 99"),
      (Voice("british", "m3", speed=9), "speed of 80"),
  ):
    with pytest.raises(ValueError, match=message):
      speak("one", voice)
  with pytest.raises(ValueError, match="no word in '...'"):
    speak("...", VOICE)


def test_sources_are_rows_of_the_alphabet_and_never_change():
  for make in (spoken.SpokenDigits, spoken.SpokenFilms, sounds.SoundEvents):
    for split in ("train", "test"):
      source = make(split, seconds=2.0)
      first, last = source[7], source[len(source) - 1]
      batch = {key: np.stack([first[key], last[key]]) for key in first}
      batch_lib.check(batch, make.__name__)
      assert batch["audio"].shape == (2, 32000)
      assert np.abs(batch["audio"]).max() <= 1
      again = make(split, seconds=2.0)[7]
      assert all(np.array_equal(first[key], again[key]) for key in first)
      with pytest.raises(IndexError):
        source[len(source)]
    others = [make("train", seed=1)[7], make("train")[8]]
    assert not any(
        np.array_equal(make("train")[7]["audio"], other["audio"])
        for other in others
    )


def test_a_spoken_digit_says_its_label():
  source = spoken.SpokenDigits("test")
  for index in range(12):
    words = [word.text for word in source.utterance(index).words]
    assert words[-1] == spoken.text.CLASSES[int(source[index]["label"])]


def test_phrases_have_their_articles():
  said = {
      spoken.phrase(digit, colour, Dice(digit, colour, i))
      for digit in range(10)
      for colour in range(8)
      for i in range(6)
  }
  assert "an orange one" in said and "it is an eight" in said
  assert any(s.startswith("a ") and s.endswith(" eight") for s in said)
  assert not any("a orange" in s or "a eight" in s for s in said)


def test_digits_of_a_film_appear_with_their_words():
  source = spoken.SpokenFilms("test", size=48, frames=12, seconds=3.0)
  for index in range(3):
    film, words = source[index]["video"], source.words(index)
    assert len(words) == 3
    ground = np.median(film[0], axis=(0, 1))
    ink = (np.abs(film - ground).max(axis=-1) > 0.3).sum(axis=(1, 2))
    times = np.arange(12) * 0.25
    shown = np.array([[w.start <= t for w in words] for t in times]).sum(axis=1)
    assert not ink[shown == 0].any()
    for frame in range(1, 12):
      if shown[frame] > shown[frame - 1]:
        assert ink[frame] > ink[frame - 1] + 20


def test_sounds_sound_as_they_are_called():
  time = np.arange(32000) / 16000
  peak = lambda x: np.abs(np.fft.rfft(x)).argmax() * 16000 / len(x)
  make = lambda name: sounds.sound(name, 32000, Dice("test", name))
  tone = make("a tone")
  assert peak(tone[:8000]) == pytest.approx(peak(tone[-8000:]), abs=2)
  for name, way in (("a rising chirp", 1), ("a falling chirp", -1)):
    chirp = make(name)
    assert way * (peak(chirp[-4000:]) - peak(chirp[:4000])) > 500
  spectrum = np.abs(np.fft.rfft(make("a rumble"))) ** 2
  assert spectrum[:1600].sum() > 5 * spectrum[1600:].sum()
  bell = make("a bell")
  assert np.abs(bell[:4000]).max() > 5 * np.abs(bell[-4000:]).max()
  assert len(time) == len(bell)
  with pytest.raises(ValueError, match="at most"):
    sounds.noise(10**7, Dice("long"))
