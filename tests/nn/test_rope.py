"""Rotary positions against complex numbers in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import rope

RNG = np.random.default_rng(0)
DIM = 12


def turned(x, position, frequencies, layout):
  """Pairs as complex numbers, times e^(i p f)."""
  half = x.shape[-1] // 2
  if layout == "half":
    pairs = x[..., :half] + 1j * x[..., half:]
  else:
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
  pairs = pairs * np.exp(1j * position[..., None, None] * frequencies)
  if layout == "half":
    return np.concatenate([pairs.real, pairs.imag], axis=-1)
  return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


@pytest.mark.parametrize("layout", rope.LAYOUTS)
def test_pairs_turn_by_position_times_frequency(layout):
  x = RNG.normal(size=(2, 5, 3, DIM))
  position = RNG.integers(0, 300, (2, 5))
  frequencies = 500.0 ** (-2 * np.arange(DIM // 2) / DIM)
  rotation = rope.Rope(500.0, layout).rotation(jnp.asarray(position), DIM)
  found = rotation(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(
      found, turned(x, position, frequencies, layout), atol=2e-4
  )


@pytest.mark.parametrize("layout", rope.LAYOUTS)
def test_products_depend_on_the_distance_alone(layout):
  q, k = RNG.normal(size=(2, 1, 1, 1, DIM)).astype(np.float32)

  def product(i, j):
    turn = lambda x, p: rope.Rope(100.0, layout).rotation(
        jnp.array([[p]]), DIM
    )(x)
    return float((turn(q, i) * turn(k, j)).sum())

  assert product(9, 4) == pytest.approx(product(25, 20), abs=1e-4)
  assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)


def test_each_section_follows_its_axis():
  place = RNG.integers(0, 50, (2, 4, 3))
  made = rope.Rope(sections=(1, 3, 2)).rotation(jnp.asarray(place), DIM)
  frequencies = 1e4 ** (-2 * np.arange(DIM // 2) / DIM)
  axis = np.array([0, 1, 1, 1, 2, 2])
  np.testing.assert_allclose(
      made.cos, np.cos(place[..., axis] * frequencies), atol=1e-5
  )
  with pytest.raises(ValueError, match="add up to 6"):
    rope.Rope(sections=(1, 1, 2)).rotation(jnp.asarray(place), DIM)
  with pytest.raises(ValueError, match="sections"):
    rope.Rope().rotation(jnp.asarray(place), DIM)


def test_interpolation_divides_every_frequency():
  plain = rope.Rope().frequencies(DIM)
  made = rope.Rope(scaling=rope.Interpolated(4.0)).frequencies(DIM)
  np.testing.assert_allclose(made, plain / 4)


def test_llama3_keeps_fast_pairs_and_squeezes_slow_ones():
  """The three cases by wavelength, as the model's release wrote them."""
  scaling = rope.Llama3(factor=32.0, length=8192, low=1.0, high=4.0)
  plain = rope.Rope(5e5).frequencies(64)
  made = rope.Rope(5e5, scaling=scaling).frequencies(64)
  expected = []
  for f in plain:
    wave = 2 * math.pi / f
    if wave < 8192 / 4:
      expected.append(f)
    elif wave > 8192:
      expected.append(f / 32)
    else:
      smooth = (8192 / wave - 1) / (4 - 1)
      expected.append((1 - smooth) * f / 32 + smooth * f)
  np.testing.assert_allclose(made, expected, rtol=1e-12)
  assert made[0] == plain[0] and made[-1] == plain[-1] / 32
  assert len(set(np.round(made / plain, 6))) > 3


def test_yarn_ramps_between_its_two_pairs():
  scaling = rope.Yarn(factor=4.0, length=32_768)
  plain = rope.Rope(1e6).frequencies(128)
  kept = rope.Rope(1e6, scaling=scaling).frequencies(128) / plain
  # Pair i turns length * theta ** (-2i / 128) / (2 pi) times.
  turns = 32_768 * plain / (2 * math.pi)
  fast = int((turns > 32).sum()) - 1  # Rounded down,
  slow = int((turns >= 1).sum())  # and up.
  np.testing.assert_allclose(kept[: fast + 1], 1.0)
  np.testing.assert_allclose(kept[slow:], 0.25)
  ramp = np.arange(slow - fast + 1) / (slow - fast)
  np.testing.assert_allclose(kept[fast : slow + 1], 1 - 0.75 * ramp)
  assert scaling.gain == pytest.approx(0.1 * math.log(4) + 1)
  assert rope.Yarn(factor=0.5, length=8).gain == 1.0
  assert rope.Yarn(factor=4.0, length=8, attention=1.3).gain == 1.3
  made = rope.Rope(scaling=scaling).rotation(jnp.zeros((1, 1), jnp.int32), DIM)
  np.testing.assert_allclose(made.cos, scaling.gain, rtol=1e-6)


def test_words_and_widths_that_cannot_be():
  with pytest.raises(ValueError, match="layout='halved'"):
    rope.Rope(layout="halved")
  with pytest.raises(ValueError, match="heads of 7"):
    rope.Rope().frequencies(7)
