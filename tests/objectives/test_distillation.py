"""The teacher's loss in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.objectives import distillation

RNG = np.random.default_rng(0)


def test_cross_entropy_of_centred_and_sharpened_logits():
  student, teacher = RNG.uniform(-1, 1, (2, 5, 3, 7))
  centre = 0.2 * RNG.normal(size=7)
  target = np.exp((teacher - centre) / 0.04)
  target /= target.sum(axis=-1, keepdims=True)
  guess = np.exp(student / 0.1)
  guess /= guess.sum(axis=-1, keepdims=True)
  found = distillation.cross_entropy(
      *map(jnp.asarray, (student, teacher, centre))
  )
  np.testing.assert_allclose(
      found, -(target * np.log(guess)).sum(axis=-1), rtol=1e-4
  )


def test_no_gradient_reaches_the_teacher():
  student, teacher = jnp.asarray(RNG.uniform(-1, 1, (2, 4, 6)))
  loss = lambda *x: distillation.cross_entropy(*x, jnp.zeros(6)).sum()
  gradients = jax.grad(loss, (0, 1))(student, teacher)
  assert np.any(gradients[0]) and not np.any(gradients[1])


def test_the_centre_follows_the_mean():
  centre = jnp.zeros(3)
  for _ in range(40):
    centre = distillation.moved_centre(centre, jnp.arange(3.0))
  np.testing.assert_allclose(centre, (1 - 0.9**40) * np.arange(3), rtol=1e-5)
  assert float(centre[2]) == pytest.approx(2, rel=0.02)
