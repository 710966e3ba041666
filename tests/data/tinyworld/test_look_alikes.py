"""Scenes that are easy to take for each other."""

import numpy as np
import pytest

from mmjax.data.tinyworld import look_alikes, text


def test_a_family_differs_in_what_belongs_to_what():
  source = look_alikes.LookAlikes(n=40)
  assert len({source.caption(i) for i in range(40)}) == 40
  assert len({int(source[i]["identity"]) for i in range(40)}) == 40
  for first in range(0, 40, 4):
    scenes = [source.scene(first + i) for i in range(4)]
    assert len({scene.layout for scene in scenes}) == 1
    for field in ("colours", "digits"):
      assert len({frozenset(getattr(s, field)) for s in scenes}) == 1
      assert len({getattr(s, field) for s in scenes}) == 2
  assert {len(source.scene(i).digits) for i in range(40)} == {2, 3}


def test_pictures_show_what_captions_say():
  source = look_alikes.LookAlikes("train", n=8, size=32)
  for index in range(8):
    assert text.read_scene(source.caption(index)) == source.scene(index)
    image = source[index]["image"]
    assert image.shape == (32, 32, 3) and image.dtype == np.float32
    np.testing.assert_array_equal(image, source[index]["image"])
  other = look_alikes.LookAlikes("train", n=8, size=32, seed=1)
  assert source.caption(0) != other.caption(0)


def test_every_scene_is_shown_in_many_hands_and_words():
  source = look_alikes.LookAlikes("train", n=8, size=32, length=80)
  assert len(source) == 80
  assert {source.scene(i) for i in range(80)} == {
      source.scene(i) for i in range(8)
  }
  shown = range(3, 80, 8)
  assert len({source.caption(i) for i in shown}) > 1
  assert len({source[i]["image"].tobytes() for i in shown}) == len(shown)
  assert {int(source[i]["identity"]) for i in shown} == {
      source.scene(3).identity
  }
  for index in shown:
    assert text.read_scene(source.caption(index)) == source.scene(3)


def test_families_are_whole():
  with pytest.raises(ValueError, match="n=10: expected a multiple of 4"):
    look_alikes.LookAlikes(n=10)
