"""Bytes of pictures, sounds and videos under limits."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
import pytest

from mmjax.data.sources import limits, media
from mmjax.data.sources.limits import Limits
from mmjax.data.sources.records import BadRecord
from tests.data.sources import files


def pixels(picture, size):
  del size
  return np.asarray(picture.convert("RGB"))


# --- pictures -----------------------------------------------------------------


@pytest.mark.parametrize("kind", limits.IMAGES)
def test_pictures_of_every_format(kind):
  data = files.picture(20, kind)
  assert limits.kind(data) == kind
  found = media.picture(data, pixels, 0)
  assert found.shape == (10, 12, 3)
  assert abs(found.astype(int) - files.shade(20)).max() <= 2
  assert media.facts(data)[:4] == (kind, 12, 10, 0.0)


def test_of_a_moving_picture_the_first_frame_counts():
  frames = [Image.new("RGB", (4, 4), (40 * i, 0, 0)) for i in range(1, 4)]
  for kind in ("GIF", "WEBP"):
    file = io.BytesIO()
    frames[0].save(
        file, kind, save_all=True, append_images=frames[1:],
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    assert media.picture(file.getvalue(), pixels, 0)[0, 0, 0] == 40


def chunk(kind, body):
  crc = zlib.crc32(kind + body)
  return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def huge_png(width, height):
  """A few kilobytes that promise, and hold, a huge picture."""
  head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
  return (
      b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
      + chunk(b"IDAT", zlib.compress(b"\0" * 2**20)) + chunk(b"IEND", b"")
  )


def test_a_decompression_bomb_is_not_decoded(monkeypatch):
  monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
  for side, message in (
      (9_000, "pixels: 81,000,000 is more than the 64,000,000 allowed"),
      (30_000, "decompression bomb"),  # Pillow's own limit.
  ):
    data = huge_png(side, side)
    assert len(data) < 2000
    with pytest.raises(BadRecord, match=message):
      media.picture(data, pixels, 0)
    with pytest.raises(BadRecord, match=message):
      media.facts(data)


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "PPM", "ICO", "PCX"])
def test_other_formats_are_refused(kind):
  with pytest.raises(BadRecord, match="format not allowed: .*; expected PNG"):
    media.picture(files.picture(1, kind), pixels, 0)


@pytest.mark.parametrize(
    "data,message",
    [
        (b"", "the file is empty"),
        (b"%!PS-Adobe", "begins with b'%!PS-Ado"),
        (files.sound(), "format not allowed: WAV; expected PNG"),
        (files.picture(1, "JPEG")[:200], "JPEG: "),
        (files.picture(1)[:45], "PNG: "),
        (files.picture(1)[:20] + b"x" * 60, "PNG: "),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WEBP: "),
        ("text", "expected the bytes of a file, found str"),
    ],
)
def test_broken_pictures(data, message):
  with pytest.raises(BadRecord, match=message):
    media.picture(data, pixels, 0)


def test_a_fault_of_a_transform_is_no_fault_of_the_picture():
  def wrong(picture, size):
    raise TypeError("wrong")

  with pytest.raises(TypeError, match="wrong"):
    media.picture(files.picture(1), wrong, 0)
  with pytest.raises(TypeError, match="wrong"):
    media.video(film("mp4", "mpeg4", 3), 1, wrong, 0)


# --- sounds -------------------------------------------------------------------


def encode(wave, kind, subtype=None, rate=16000):
  sf = pytest.importorskip("soundfile")
  file = io.BytesIO()
  sf.write(file, wave, rate, format=kind, subtype=subtype)
  return file.getvalue()


WAVE = (0.5 * np.sin(np.arange(8000) * 0.1)).astype(np.float32)


@pytest.mark.parametrize(
    "kind,subtype,loss",
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "FLOAT", 1e-7),
        ("WAVEX", None, 1e-4),
        ("FLAC", None, 1e-4),
        ("OGG", "VORBIS", 0.1),
        ("MP3", None, 0.1),
    ],
)
def test_sounds_of_every_format(kind, subtype, loss):
  stereo = np.stack([WAVE, 0 * WAVE], axis=1)
  data = encode(stereo, kind, subtype)
  found = media.sound(data, 16000)
  assert found.dtype == np.float32 and found.shape == (8000,)
  assert abs(found - WAVE / 2)[100:-100].max() < loss
  assert media.facts(data).seconds == pytest.approx(0.5, abs=1e-3)


def test_resampling_keeps_the_tone():
  data = files.sound(0.5, rate=44100, hertz=440.0, channels=2)
  pytest.importorskip("soxr")
  found = media.sound(data, 16000)
  assert found.dtype == np.float32 and abs(len(found) - 8000) <= 1
  expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(found)) / 16000)
  assert abs(found - expected)[200:-200].max() < 2e-3
  begin = media.sound(data, 16000, seconds=0.2)
  assert len(begin) < 5000
  np.testing.assert_allclose(begin[:3200], found[:3200], atol=1e-4)


def test_a_sound_that_is_too_long():
  data = files.sound(2.0)
  with pytest.raises(BadRecord, match="seconds: 2.0 is more than the 1 allow"):
    media.sound(data, 8000, Limits(seconds=1))
  with pytest.raises(BadRecord, match="rate: 8,000 is more than the 4,000"):
    media.sound(data, 8000, Limits(rate=4000))
  with pytest.raises(BadRecord, match="size: 32,044 is more than the 100"):
    media.sound(data, 8000, Limits(size=100))


def test_a_head_that_promises_too_much():
  data = bytearray(encode(WAVE, "FLAC"))
  # The 36 bits of STREAMINFO that count samples: all ones is 2**36 - 1.
  data[21] |= 0x0F
  data[22:26] = b"\xff" * 4
  with pytest.raises(BadRecord, match="seconds: 4,294,967"):
    media.sound(bytes(data), 16000)


@pytest.mark.parametrize(
    "data,message",
    [
        (files.picture(0), "format not allowed: PNG; expected WAV"),
        (b"FORM\0\0\0\0AIFF" + bytes(100), "format not allowed"),
        (b"RIFF\0\0\0\0WAVE", "WAV: "),
        (files.sound()[:44], "WAV: no samples"),
        (b"fLaC" + bytes(100), "FLAC: "),
        (b"OggS" + bytes(100), "OGG: "),
        (b"ID3" + bytes(100), "MP3: "),
    ],
)
def test_broken_sounds(data, message):
  pytest.importorskip("soundfile")
  with pytest.raises(BadRecord, match=message):
    media.sound(data, 8000)


# --- videos -------------------------------------------------------------------


def film(form, codec, count=20, size=(64, 48)):
  """Frame i is of the grey 10 i and is shown at i / 10 seconds."""
  av = pytest.importorskip("av")
  file = io.BytesIO()
  with av.open(file, "w", format=form) as out:
    stream = out.add_stream(codec, rate=10)
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    for i in range(count):
      grey = np.full((size[1], size[0], 3), 10 * i, np.uint8)
      frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
      out.mux(stream.encode(frame))
    out.mux(stream.encode())
  return file.getvalue()


@pytest.mark.parametrize(
    "form,codec,kind",
    [
        ("mp4", "h264", "MP4"),
        ("webm", "vp9", "MATROSKA"),
        ("matroska", "mpeg4", "MATROSKA"),
        ("avi", "mpeg4", "AVI"),
    ],
)
def test_frames_are_the_middles_of_equal_spans(form, codec, kind):
  data = film(form, codec)
  found = media.video(data, 4, pixels, 0)
  assert found.shape == (4, 48, 64, 3)
  # 2 seconds in four spans: 0.25, 0.75, 1.25, 1.75.
  shades = found.mean(axis=(1, 2, 3))
  np.testing.assert_allclose(shades, [20, 70, 120, 170], atol=4)
  facts = media.facts(data)
  assert facts[:3] == (kind, 64, 48) and facts.detail == "20 frames"
  assert facts.seconds == pytest.approx(1.9, abs=0.05)


def test_a_short_video_repeats_its_frames():
  data = film("mp4", "mpeg4", count=2)
  shades = media.video(data, 4, pixels, 0).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(shades, [0, 0, 10, 10], atol=3)


def test_videos_beyond_limits():
  data = film("mp4", "mpeg4")
  for message, limit in (
      ("pixels: 3,072", Limits(pixels=3000)),
      ("frames: 11", Limits(frames=10)),
      ("seconds: 1.9", Limits(seconds=1.5)),
  ):
    with pytest.raises(BadRecord, match=message):
      media.video(data, 2, pixels, 0, limit)


def test_broken_videos(tmp_path):
  data = film("mp4", "mpeg4")
  with pytest.raises(BadRecord, match="MP4: "):
    media.video(data[: len(data) // 2], 2, pixels, 0)
  with pytest.raises(BadRecord, match="MP4: "):
    media.video(data[:40], 2, pixels, 0)
  # A playlist names other files: it is no video of ours.
  (tmp_path / "secret.mp4").write_bytes(data)
  playlist = f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/secret.mp4\n"
  for text in (playlist, f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n"):
    with pytest.raises(BadRecord, match="format not allowed"):
      media.video(text.encode(), 2, pixels, 0)


def test_a_file_that_is_no_medium_has_no_facts():
  assert media.facts(b"a text") is None


def damaged(data, count=40):
  """Copies with flipped bytes, cut short or with a piece doubled."""
  rng = np.random.default_rng(0)
  for _ in range(count):
    copy = bytearray(data)
    for at in rng.integers(0, len(copy), rng.integers(1, 8)):
      copy[at] = rng.integers(256)
    begin, end = sorted(rng.integers(0, len(copy), 2))
    yield bytes(copy)
    yield bytes(copy[:end])
    yield bytes(copy[:end] + copy[begin:])


@pytest.mark.parametrize("kind", limits.IMAGES)
def test_damaged_pictures_are_bad_records_or_pictures(kind):
  for data in damaged(files.picture(3, kind, (40, 30))):
    try:
      assert media.picture(data, pixels, 0).shape[2] == 3
    except BadRecord:
      pass


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_damaged_sounds_are_bad_records_or_sounds(kind):
  limit = Limits(seconds=60)
  for data in damaged(encode(WAVE, kind)):
    try:
      found = media.sound(data, 16000, limit)
      assert found.dtype == np.float32 and len(found) <= 60 * 192_000
    except BadRecord:
      pass


@pytest.mark.parametrize("form", ["mp4", "webm"])
def test_damaged_videos_are_bad_records_or_videos(form):
  data = film(form, {"mp4": "mpeg4", "webm": "vp9"}[form], count=5)
  for broken in damaged(data, count=10):
    try:
      assert media.video(broken, 2, pixels, 0).shape[0] == 2
    except BadRecord:
      pass
