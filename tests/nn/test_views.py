"""Crops: where they lie and what is in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import views


def test_boxes_lie_inside_and_have_the_areas_asked_for():
  boxes = np.asarray(
      views.random_boxes(jax.random.key(0), (500, 8), (0.05, 0.4))
  )
  top, left, height, width = np.moveaxis(boxes, -1, 0)
  assert boxes.shape == (500, 8, 4)
  assert (boxes >= 0).all()
  assert (top + height).max() <= 1 and (left + width).max() <= 1
  area, ratio = height * width, height / width
  assert 0.05 - 1e-6 <= area.min() < 0.06 and 0.39 < area.max() <= 0.4 + 1e-6
  assert area.mean() == pytest.approx(0.225, abs=0.01)
  assert ratio.min() == pytest.approx(3 / 4, abs=0.02)
  assert ratio.max() == pytest.approx(4 / 3, abs=0.02)
  assert top.mean() == pytest.approx(left.mean(), abs=0.02)


def test_a_box_that_is_longer_than_the_image_is_cut():
  boxes = views.random_boxes(jax.random.key(0), (100,), (1.0, 1.0))
  assert np.asarray(boxes[:, :2]).max() <= 0.15
  assert np.asarray(boxes[:, 2:]).max() == 1


def test_crops_of_a_ramp():
  """Of an image that tells where it is, away from the edges of the crop."""
  y, x = np.mgrid[:40, :60] + 0.5
  image = jnp.asarray(np.stack([y / 40, x / 60], axis=-1)[None], jnp.float32)
  box = jnp.asarray([[[0.25, 0.1, 0.5, 0.4], [0.0, 0.5, 1.0, 0.5]]])
  found = np.asarray(views.crop(image, box, 10))
  assert found.shape == (1, 2, 10, 10, 2)
  steps = (np.arange(10) + 0.5) / 10
  for crop, (top, left, height, width) in zip(found[0], np.asarray(box[0])):
    inner = crop[2:-2, 2:-2]
    np.testing.assert_allclose(
        inner[:, 0, 0], top + height * steps[2:-2], atol=1e-3
    )
    np.testing.assert_allclose(
        inner[0, :, 1], left + width * steps[2:-2], atol=1e-3
    )


def test_the_whole_image_is_itself():
  image = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)))
  box = jnp.asarray([[[0.0, 0.0, 1.0, 1.0]]] * 2)
  np.testing.assert_allclose(
      views.crop(image, box, 8)[:, 0], image, atol=1e-6
  )
