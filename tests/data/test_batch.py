"""The alphabet of batches refuses what it does not know, all at once."""

import jax
import numpy as np
import pytest

from mmjax.data import batch as batch_lib


def good():
  return {
      "image": np.zeros((2, 4, 6, 3), np.float32),
      "tokens": np.zeros((2, 5), np.int32),
      "weight": np.zeros((2, 5), np.float32),
      "label": np.zeros(2, np.int32),
      "identity": np.zeros(2, np.int32),
      "valid": np.ones(2, np.float32),
  }


def test_good_batches_pass_whatever_holds_them():
  batch_lib.check(good(), "here")
  batch_lib.check({k: jax.numpy.asarray(v) for k, v in good().items()}, "here")
  batch_lib.check(
      {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in good().items()},
      "here",
  )


def test_every_key_is_described():
  for spec in batch_lib.KEYS.values():
    assert spec.axes[0] == "B"
    assert np.dtype(spec.dtype).name == spec.dtype
    assert spec.meaning.endswith(".")


def test_all_faults_come_in_one_message():
  bad = good() | {
      "imagge": np.zeros(2),
      "image": np.zeros((2, 4, 6, 3), np.float64),
      "label": np.zeros((2, 1), np.int32),
      "tokens": np.zeros((3, 5), np.int32),
      "weight": np.zeros((2, 7), np.float32),
  }
  with pytest.raises(ValueError) as error:
    batch_lib.check(bad, "stream 3")
  message = str(error.value)
  assert message.startswith("stream 3: ")
  for part in (
      "'imagge' is no key of a batch; the nearest is 'image'",
      "'image' must be f32[B, H, W, C], is f64[2, 4, 6, 3]",
      "'label' must be i32[B], is i32[2, 1]",
      "axis B has several sizes: 3 in tokens; 2 in weight, identity, valid",
      "axis L has several sizes: 5 in tokens; 7 in weight",
  ):
    assert part in message


@pytest.mark.parametrize("key", list(good()))
def test_each_key_is_checked_alone(key):
  value = good()[key]
  with pytest.raises(ValueError, match=f"'{key}' must be"):
    batch_lib.check({key: value.astype(np.uint8)}, "here")
  with pytest.raises(ValueError, match=f"'{key}' must be"):
    batch_lib.check({key: value[..., None]}, "here")
