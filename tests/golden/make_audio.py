"""Writes what torchaudio and transformers make of a sound: `audio.npz`.

Run with torch, torchaudio (2.11) and transformers (5.23):

  python tests/golden/make_audio.py

`in.audio` is half a second at 16 kHz; `out.fbank_*` Kaldi's log mel energies
with ImageBind's options, `out.whisper_*` the first frames of Whisper's
features, `out.slaney` and `out.htk` filter banks.
"""

from pathlib import Path

import numpy as np
import torch
import torchaudio
import transformers

HERE = Path(__file__).parent
RATE = 16_000
FRAMES = 60


def main() -> None:
  draw = np.random.default_rng(0)
  time = np.arange(RATE // 2) / RATE
  audio = 0.3 * np.sin(2 * np.pi * (200 * time + 3000 * time**2))
  audio = (audio + 0.02 * draw.normal(size=len(time))).astype(np.float32)
  found = {"in.audio": audio}
  for bands in (128, 64):
    found[f"out.fbank_{bands}"] = torchaudio.compliance.kaldi.fbank(
        torch.from_numpy(audio)[None],
        htk_compat=True,
        sample_frequency=RATE,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=bands,
        dither=0.0,
        frame_length=25,
        frame_shift=10,
    ).numpy()
  for bands in (80, 128):
    extract = transformers.WhisperFeatureExtractor(feature_size=bands)
    features = extract(audio, sampling_rate=RATE, return_tensors="np")
    found[f"out.whisper_{bands}"] = features.input_features[0].T[:FRAMES]
  fbanks = torchaudio.functional.melscale_fbanks
  found["out.slaney"] = fbanks(
      201, 0.0, 8000.0, 80, RATE, norm="slaney", mel_scale="slaney"
  ).numpy()
  found["out.htk"] = fbanks(257, 0.0, 8000.0, 40, RATE).numpy()
  np.savez_compressed(HERE / "audio.npz", **found)


if __name__ == "__main__":
  main()
