"""Front ends of sound against torchaudio, transformers and float64."""

from pathlib import Path

import numpy as np
import pytest

from mmjax.data import audio

with np.load(Path(__file__).parents[1] / "golden" / "audio.npz") as arrays:
  GOLDEN = dict(arrays)
SOUND = GOLDEN["in.audio"]


@pytest.mark.parametrize("bands", [128, 64])
def test_fbank_is_kaldis(bands):
  found = audio.fbank(SOUND, bands)
  expected = GOLDEN[f"out.fbank_{bands}"]
  assert found.shape == expected.shape == (48, bands)
  assert found.dtype == np.float32
  # Logarithms of nearly nothing differ in their rounding.
  np.testing.assert_allclose(found, expected, atol=2e-3)
  assert np.abs(found - expected).mean() < 2e-5


def test_fbank_is_its_definition_in_float64():
  x = SOUND.astype(np.float64)
  frames = np.stack([x[160 * i : 160 * i + 400] for i in range(48)])
  frames -= frames.mean(axis=1, keepdims=True)
  before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
  power = np.abs(np.fft.rfft((frames - 0.97 * before) * np.hanning(400), 512))
  mel = lambda f: 1127 * np.log(1 + f / 700)
  edges = np.linspace(mel(20), mel(8000), 66)
  bins = mel(np.arange(257) * 16000 / 512)
  bank = np.array([
      np.interp(bins, edges[i : i + 3], [0, 1, 0]) for i in range(64)
  ])
  expected = np.log(np.maximum(power**2 @ bank.T, np.finfo(np.float32).eps))
  np.testing.assert_allclose(audio.fbank(SOUND, 64), expected, atol=2e-4)


@pytest.mark.parametrize("bands", [80, 128])
def test_whisper_hears_thirty_seconds(bands):
  padded = np.pad(SOUND, (0, 480_000 - len(SOUND)))
  found = audio.whisper_mel(padded, bands)
  assert found.shape == (3000, bands)
  np.testing.assert_allclose(
      found[:60], GOLDEN[f"out.whisper_{bands}"], atol=1e-5
  )
  # Silence is cut 8 below the loudest, not at zero.
  assert found[-1] == pytest.approx(found.max() - 2.0, abs=1e-6)


def test_filter_banks_of_both_scales():
  slaney = audio.mel_filters(80, 400, 16000, 0.0, 8000.0)
  np.testing.assert_allclose(slaney, GOLDEN["out.slaney"], atol=1e-6)
  htk = audio.mel_filters(
      40, 512, 16000, 0.0, 8000.0, audio.kaldi_mels, audio.kaldi_hertz, False
  )
  np.testing.assert_allclose(htk, GOLDEN["out.htk"], atol=2e-5)


@pytest.mark.parametrize("scale", ["kaldi", "slaney"])
def test_scales_are_inverted(scale):
  hertz = np.linspace(0, 8000, 33)
  mels = getattr(audio, f"{scale}_mels")(hertz)
  assert np.all(np.diff(mels) > 0)
  back = getattr(audio, f"{scale}_hertz")(mels)
  np.testing.assert_allclose(back, hertz, atol=1e-9)


def test_imagebind_fills_and_cuts():
  short = audio.imagebind_mel(SOUND, 60, 64)
  plain = audio.fbank(SOUND - SOUND.mean(), 64)
  np.testing.assert_allclose(short[:48], (plain + 4.268) / 9.138, atol=1e-5)
  np.testing.assert_allclose(short[48:], 4.268 / 9.138, rtol=1e-6)
  np.testing.assert_array_equal(audio.imagebind_mel(SOUND, 20, 64), short[:20])


def test_clips_lie_at_equal_distances():
  signal = np.arange(10 * 16, dtype=np.float32)
  clips = audio.spaced_clips(signal, 3, 2.0, rate=16)
  np.testing.assert_array_equal(clips[:, 0], [0, 64, 128])
  assert clips.shape == (3, 32) and clips[-1, -1] == 159
  short = audio.spaced_clips(signal[:20], 2, 2.0, rate=16)
  np.testing.assert_array_equal(short[0], short[1])
  np.testing.assert_array_equal(short[0, 20:], 0)


def test_resampling_keeps_what_fits_and_drops_the_rest():
  time = lambda rate: np.arange(rate) / rate
  tone = lambda hertz, rate: np.sin(2 * np.pi * hertz * time(rate))
  found = audio.resample(tone(1000, 22050), 22050, 16000)
  assert found.shape == (16000,) and found.dtype == np.float32
  inside = slice(200, -200)
  np.testing.assert_allclose(
      found[inside], tone(1000, 16000)[inside], atol=5e-3
  )
  # Above half the new rate nothing may come back as another tone.
  alias = audio.resample(tone(10_000, 22050), 22050, 16000)
  assert np.abs(alias[inside]).max() < 1e-2


def test_a_sound_without_a_window_is_refused():
  with pytest.raises(ValueError, match="at least 400 samples.*(100,)"):
    audio.fbank(np.zeros(100, np.float32))
