"""Losses against numpy in float64, and under a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.objectives import classification, contrastive, term

RNG = np.random.default_rng(0)


def log_softmax(x):
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_terms_add_up_over_parts():
  values, weight = RNG.normal(size=(2, 12))
  weight = np.abs(weight)
  whole = term.mean_term(jnp.asarray(values), jnp.asarray(weight))
  parts = [
      term.mean_term(jnp.asarray(v), jnp.asarray(w))
      for v, w in zip(np.split(values, 3), np.split(weight, 3))
  ]
  total, mass = (sum(getattr(p, f) for p in parts) for f in whole._fields)
  np.testing.assert_allclose(total / mass, whole.total / whole.weight, 1e-5)
  np.testing.assert_allclose(
      whole.total / whole.weight, np.average(values, weights=weight), 1e-5
  )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing):
  logits, labels = RNG.normal(size=(6, 5)), RNG.integers(0, 5, 6)
  target = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
  expected = -(target * log_softmax(logits)).sum(axis=1)
  loss = classification.softmax_cross_entropy(
      jnp.asarray(logits, jnp.float32), jnp.asarray(labels), smoothing=smoothing
  )
  np.testing.assert_allclose(loss, expected, atol=1e-5)
  terms = classification.terms(jnp.asarray(logits), jnp.asarray(labels))
  accuracy = terms["accuracy"].total / terms["accuracy"].weight
  assert accuracy == pytest.approx((logits.argmax(1) == labels).mean())


def pairs(batch=16, width=4):
  rows = RNG.normal(size=(2, batch, width))
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_info_nce_is_the_mean_of_both_directions():
  left, right = pairs()
  logits = 7.0 * left @ right.T
  both = np.diag(log_softmax(logits)) + np.diag(log_softmax(logits.T))
  expected = -0.5 * both.mean()
  terms = contrastive.info_nce(
      jnp.asarray(left, jnp.float32),
      jnp.asarray(right, jnp.float32),
      jnp.float32(7.0),
  )
  loss = terms["contrastive"].total / terms["contrastive"].weight
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  hits = (logits.argmax(1) == np.arange(16)).mean()
  assert float(terms["left_to_right"].total) / 16 == pytest.approx(hits)


@pytest.mark.parametrize("shape", [dict(data=8), dict(data=2, fsdp=4)], ids=str)
def test_negatives_come_from_the_global_batch(shape):
  """The same loss and gradient on eight devices, logits never whole."""
  left, right = (jnp.asarray(x, jnp.float32) for x in pairs(batch=64))

  def loss(left, right):
    terms = contrastive.info_nce(left, right, jnp.float32(7.0))
    return terms["contrastive"].total / terms["contrastive"].weight

  expected = jax.value_and_grad(loss, (0, 1))(left, right)
  mesh = sharding.make_mesh(shape)
  with jax.set_mesh(mesh):
    rows = jax.device_put((left, right), sharding.batch_sharding(mesh))
    step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*rows).compile()
    found = step(*rows)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected
  )
  text = step.as_text()
  assert "f32[8,64]" in text and "f32[64,64]" not in text


def test_objectives_declare_what_they_need():
  @term.objective("image", "tokens", couples_batch=True)
  def function():
    pass

  assert function.needs == ("image", "tokens") and function.couples_batch
