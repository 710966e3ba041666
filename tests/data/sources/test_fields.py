"""Fields of records as keys of examples."""

import io

import numpy as np
import pytest

from mmjax.data import transforms
from mmjax.data.sources import (
    BadRecord,
    Frames,
    Label,
    Limits,
    Numbers,
    Picture,
    Sound,
    Text,
)
from mmjax.data.tokenizers import ClipTokenizer
from tests.data.sources import files


def test_picture():
  record = {"png": files.picture(9)}
  image = Picture("jpg;png", 6)(record)
  expected = transforms.CLIP(np.full((6, 6, 3), files.shade(9), np.uint8))
  np.testing.assert_allclose(image, expected, atol=1e-6)
  image = Picture("png", 6, "mmjax.data.transforms:vit_image")(record)
  np.testing.assert_allclose(image, files.shade(9) / 127.5 - 1, atol=1e-6)
  with pytest.raises(BadRecord, match="pixels"):
    Picture("png", 6, limits=Limits(pixels=100))(record)
  for make in (Picture, lambda *a, **k: Frames(a[0], 2, a[1], **k)):
    with pytest.raises(ValueError, match="did you mean 'clip_image'"):
      make("png", 6, transform="mmjax.data.transforms:clip_imag")


def test_sound():
  pytest.importorskip("soundfile")
  record = {"wav": files.sound(0.1, rate=8000)}
  wave = Sound("wav", 8000, 1000)(record)
  assert wave.shape == (1000,) and wave.dtype == np.float32
  expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(800) / 8000)
  np.testing.assert_allclose(wave[:800], expected, atol=1e-4)
  assert not wave[800:].any()
  np.testing.assert_array_equal(Sound("wav", 8000, 300)(record), wave[:300])


def test_sound_of_arrays():
  numbers = np.arange(-4, 4) * 2**12
  for value in (numbers, numbers / 2**15, numbers.tolist()):
    wave = Sound("x", 8000, 8, array_rate=8000)({"x": value})
    np.testing.assert_allclose(wave, numbers / 2**15, atol=1e-6)
  stereo = np.stack([numbers, 0 * numbers], 1)
  wave = Sound("x", 8000, 8, array_rate=8000)({"x": stereo})
  np.testing.assert_allclose(wave, numbers / 2**16, atol=1e-6)
  with pytest.raises(ValueError, match="say array_rate"):
    Sound("x", 8000, 8)({"x": numbers})
  with pytest.raises(BadRecord, match="expected a sound file or samples"):
    Sound("x", 8000, 8, array_rate=8000)({"x": "text"})


def test_text():
  tokenizer = ClipTokenizer.tinyworld(length=8)
  expected = tokenizer.encode("a red 7")
  for value in ("a red 7", b"a red 7"):
    found = Text("txt", tokenizer)({"txt": value})
    np.testing.assert_array_equal(found, expected)
  with pytest.raises(BadRecord, match="'txt': text longer than the 6 tokens"):
    Text("txt", tokenizer)({"txt": "a red 7 " * 9})
  with pytest.raises(BadRecord, match="not UTF-8"):
    Text("txt", tokenizer)({"txt": b"\xff\xfe"})
  with pytest.raises(BadRecord, match="expected a text, found int"):
    Text("txt", tokenizer)({"txt": 3})


def test_label():
  for value in (3, np.int64(3), b"3", "3"):
    found = Label("y")({"y": value})
    assert found == 3 and found.dtype == np.int32
  classes = ("cats", "dogs")
  assert Label("folder", classes)({"folder": b"dogs\n"}) == 1
  for value in ("x", None, 2**40, [1, 2]):
    with pytest.raises(BadRecord, match="expected a whole number"):
      Label("y")({"y": value})
  with pytest.raises(BadRecord, match="not one of the 2 classes; did you mean"):
    Label("folder", classes)({"folder": "dogz"})


def npy(value, **options):
  file = io.BytesIO()
  np.save(file, value, **options)
  return file.getvalue()


def test_numbers():
  value = np.arange(6.0).reshape(2, 3)
  for form in (value, value.tolist(), npy(value)):
    found = Numbers("x", (2, 3))({"x": form})
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, value)
  with pytest.raises(BadRecord, match=r"expected \(3,\), found \(2, 3\)"):
    Numbers("x", (3,))({"x": value})
  for bad in (b"", b"junk", npy(value)[:-9], "text"):
    with pytest.raises(BadRecord, match="no array"):
      Numbers("x", (2, 3))({"x": bad})


class Trap:
  def __reduce__(self):
    return pytest.fail, ("a pickle was loaded",)


def test_no_pickle_is_loaded():
  data = npy(np.array([Trap()], object), allow_pickle=True)
  with pytest.raises(BadRecord, match="allow_pickle=False"):
    Numbers("x", (1,))({"x": data})
