"""How does a waveform become a `mel`? Filter banks, and who uses which.

Two families share nothing but the idea. Kaldi's frames (`fbank`: ImageBind,
speech recognition) lie within the signal, are freed of their mean and
emphasised; their triangles are straight over mels. Whisper's frames
(`whisper_mel`) are centred on a padded signal, and their triangles are straight
over hertz.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import numpy as np
from scipy import signal, sparse

# Samples per second of every system here that listens; codecs have their own.
RATE = 16_000

_FLOOR = float(np.finfo(np.float32).eps)


def kaldi_mels(hertz: np.ndarray) -> np.ndarray:
  """The scale of HTK and Kaldi: 1127 ln(1 + f / 700)."""
  return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)


def kaldi_hertz(mels: np.ndarray) -> np.ndarray:
  """The inverse of `kaldi_mels`."""
  return 700.0 * np.expm1(np.asarray(mels) / 1127.0)


# Slaney's scale: straight up to 1,000 Hz, then 27 mels for a factor of 6.4.
_BREAK = 1000.0
_STRAIGHT = 3.0 / 200.0
_STEP = 27.0 / math.log(6.4)


def slaney_mels(hertz: np.ndarray) -> np.ndarray:
  """The scale of Slaney's Auditory Toolbox (1998), librosa's default."""
  hertz = np.asarray(hertz, np.float64)
  above = np.log(np.maximum(hertz, _BREAK) / _BREAK)
  return np.minimum(hertz, _BREAK) * _STRAIGHT + above * _STEP


def slaney_hertz(mels: np.ndarray) -> np.ndarray:
  """The inverse of `slaney_mels`."""
  mels = np.asarray(mels, np.float64)
  knee = _BREAK * _STRAIGHT
  above = np.exp(np.maximum(mels - knee, 0.0) / _STEP)
  return np.minimum(mels, knee) / _STRAIGHT * above


def triangles(edges: np.ndarray, points: np.ndarray) -> np.ndarray:
  """Overlapping triangles: f64[P, N].

  Args:
    edges: f64[N + 2], rising; triangle n rises from edge n to edge n + 1 and
      falls to edge n + 2.
    points: f64[P], where they are read.
  """
  left, middle, right = edges[:-2], edges[1:-1], edges[2:]
  points = points[:, None]
  up = (points - left) / (middle - left)
  down = (right - points) / (right - middle)
  return np.maximum(0.0, np.minimum(up, down))


@functools.cache
def kaldi_filters(
    bands: int, size: int, rate: int, low: float = 20.0
) -> np.ndarray:
  """Kaldi's filter bank f32[size / 2 + 1, bands] from `low` to rate / 2 Hz.

  Args:
    bands: number of triangles.
    size: of the Fourier transform.
    rate: samples per second.
    low: lowest frequency, Hz.
  """
  edges = np.linspace(kaldi_mels(low), kaldi_mels(rate / 2), bands + 2)
  bins = kaldi_mels(np.arange(size // 2 + 1) * (rate / size))
  return triangles(edges, bins).astype(np.float32)


@functools.cache
def mel_filters(
    bands: int,
    size: int,
    rate: int,
    low: float,
    high: float,
    to_mels: Callable[[np.ndarray], np.ndarray] = slaney_mels,
    to_hertz: Callable[[np.ndarray], np.ndarray] = slaney_hertz,
    equal_area: bool = True,
) -> np.ndarray:
  """librosa's and torchaudio's filter bank, f32[size / 2 + 1, bands].

  Args:
    bands: number of triangles.
    size: of the Fourier transform.
    rate: samples per second.
    low: lowest frequency, Hz.
    high: highest frequency, Hz.
    to_mels: the scale.
    to_hertz: its inverse.
    equal_area: whether each triangle is divided by half its width in Hz
      (Slaney's norm), or is 1 at its top.
  """
  edges = to_hertz(np.linspace(to_mels(low), to_mels(high), bands + 2))
  filters = triangles(edges, np.arange(size // 2 + 1) * (rate / size))
  if equal_area:
    filters *= 2.0 / (edges[2:] - edges[:-2])
  return filters.astype(np.float32)


def frames(audio: np.ndarray, length: int, hop: int) -> np.ndarray:
  """The whole windows of a signal: a view f32[M, length] of f32[S].

  Raises:
    ValueError: if the signal is shorter than one window.
  """
  if audio.ndim != 1 or len(audio) < length:
    raise ValueError(
        f"audio: expected one channel of at least {length} samples, found an "
        f"array of shape {audio.shape}"
    )
  return np.lib.stride_tricks.sliding_window_view(audio, length)[::hop]


def fbank(audio: np.ndarray, bands: int = 128, rate: int = RATE) -> np.ndarray:
  """Kaldi's log mel energies with a Hann window, f32[M, bands].

  Windows of 25 ms every 10 ms, M = 1 + (S - 25 ms) // 10 ms. Neither dither nor
  energy, as ImageBind asks of torchaudio's `compliance.kaldi.fbank`.

  Args:
    audio: f32[S], at least 25 ms.
    bands: number of mel bands, from 20 Hz to rate / 2.
    rate: samples per second.
  """
  length, hop = rate // 40, rate // 100
  size = 1 << (length - 1).bit_length()
  x = frames(audio.astype(np.float32, copy=False), length, hop)
  x = x - x.mean(axis=1, keepdims=True)
  emphasised = x.copy()
  emphasised[:, 1:] -= np.float32(0.97) * x[:, :-1]
  # Before the first sample stands that sample again.
  emphasised[:, 0] *= np.float32(1 - 0.97)
  window = np.hanning(length).astype(np.float32)
  spectrum = np.fft.rfft(emphasised * window, size)
  mels = _energies(spectrum, kaldi_filters, bands, size, rate)
  return np.log(np.maximum(mels, _FLOOR))


def _energies(
    spectrum: np.ndarray, bank: Callable[..., np.ndarray], *arguments: Any
) -> np.ndarray:
  """The energies f32[M, bands] of c64[M, bins] in a filter bank."""
  power = spectrum.real**2 + spectrum.imag**2
  filters = _sparse(bank, *arguments)
  return (filters @ power.astype(np.float32, copy=False).T).T


@functools.cache
def _sparse(bank: Callable[..., np.ndarray], *arguments: Any) -> Any:
  """[bands, bins]: a bin is in two triangles, and BLAS would wake threads."""
  return sparse.csr_matrix(bank(*arguments).T)


# Of AudioSet (ImageBind's code, `data.py`).
IMAGEBIND_MEAN, IMAGEBIND_STD = -4.268, 9.138


def imagebind_mel(
    audio: np.ndarray, count: int = 204, bands: int = 128, rate: int = RATE
) -> np.ndarray:
  """What ImageBind hears of a clip of two seconds: f32[count, bands].

  Args:
    audio: f32[S].
    count: frames to cut or to fill up to; filling has an energy of 1.
    bands: number of mel bands.
    rate: samples per second.
  """
  found = fbank(audio - audio.mean(), bands, rate)[:count]
  filled = np.zeros((count, bands), np.float32)
  filled[: len(found)] = found
  return (filled - np.float32(IMAGEBIND_MEAN)) / np.float32(IMAGEBIND_STD)


def spaced_clips(
    audio: np.ndarray, count: int = 3, seconds: float = 2.0, rate: int = RATE
) -> np.ndarray:
  """Clips at equal distances from begin to end: f32[count, seconds * rate].

  A signal that is shorter than a clip is filled with silence.
  """
  length = round(seconds * rate)
  padded = np.pad(audio, (0, max(0, length - len(audio))))
  last = len(padded) - length
  starts = [last * i // max(count - 1, 1) for i in range(count)]
  return np.stack([padded[start : start + length] for start in starts])


def whisper_mel(audio: np.ndarray, bands: int = 80) -> np.ndarray:
  """Whisper's log mel spectrogram, f32[S / 160, bands] (its `audio.py`).

  Windows of 25 ms every 10 ms around the samples of the signal, reflected at
  its ends; decadic logarithms, cut 8 below the loudest, about in [-1, 1].

  Args:
    audio: f32[S] at 16 kHz, filled up with silence by the caller (30 s there).
    bands: 80, or 128 from large-v3 on.
  """
  length, hop = 400, 160
  padded = np.pad(audio.astype(np.float32, copy=False), length // 2, "reflect")
  # The last frame is dropped there too.
  x = frames(padded, length, hop)[: len(audio) // hop]
  # Periodic, as PyTorch's.
  window = np.hanning(length + 1)[:-1].astype(np.float32)
  spectrum = np.fft.rfft(x * window, length)
  bank = (mel_filters, bands, length, RATE, 0.0, RATE / 2)
  mels = _energies(spectrum, *bank)
  logs = np.log10(np.maximum(mels, 1e-10))
  logs = np.maximum(logs, logs.max() - 8.0)
  return ((logs + 4.0) / 4.0).astype(np.float32)


def resample(audio: np.ndarray, old: int, new: int) -> np.ndarray:
  """Another sampling rate, band-limited: f32[ceil(S * new / old)]."""
  common = math.gcd(old, new)
  up, down = new // common, old // common
  if up == down:
    return audio.astype(np.float32)
  return signal.resample_poly(
      audio.astype(np.float32, copy=False), up, down, window=_lowpass(up, down)
  ).astype(np.float32)


@functools.cache
def _lowpass(up: int, down: int) -> np.ndarray:
  """The filter that `resample_poly` would design anew for each signal."""
  widest = max(up, down)
  return signal.firwin(20 * widest + 1, 1 / widest, window=("kaiser", 5.0))
