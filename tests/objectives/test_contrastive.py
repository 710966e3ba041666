"""Contrast by any similarity, and hard negatives, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.objectives import contrastive


def test_paired_is_info_nce_where_it_can_be():
  rng = np.random.default_rng(0)
  left, right = rng.normal(size=(2, 6, 4)).astype(np.float32)
  expected = contrastive.info_nce(left, right, 2.0)
  found = contrastive.paired(2 * left @ right.T, np.eye(6, dtype=bool))
  for name, term in expected.items():
    np.testing.assert_allclose(found[name], term, rtol=1e-5)


def test_those_that_belong_together_share_the_target():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(3, 3)) * 3
  same = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], bool)
  target = 0.9 * np.array([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]) + 0.1 / 3
  loss = 0.0
  for x in (logits, logits.T):
    log_probs = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    loss -= (target * log_probs).sum() / 2
  found = contrastive.paired(
      jnp.asarray(logits, jnp.float32), same, smoothing=0.1
  )
  assert float(found["contrastive"].total) == pytest.approx(loss, rel=1e-5)
  hits = [same[i, logits[i].argmax()] for i in range(3)]
  assert float(found["left_to_right"].total) == sum(hits)


def test_negatives_are_drawn_from_the_softmax_of_the_others():
  logits = jnp.array([[9.0, 1.0, 0.0, 2.0]])
  same = jnp.array([[True, False, False, False]])
  rows = 20_000
  found = contrastive.hard_negatives(
      jax.random.key(0),
      jnp.repeat(logits, rows, axis=0),
      jnp.repeat(same, rows, axis=0),
  )
  share = np.bincount(found, minlength=4) / rows
  odds = np.exp([1.0, 0.0, 2.0])
  np.testing.assert_allclose(share[1:], odds / odds.sum(), atol=0.02)
  assert share[0] == 0
  # Where there is no negative, any column will do.
  (any_,) = contrastive.hard_negatives(
      jax.random.key(0), logits[:, :1], same[:, :1]
  )
  assert any_ == 0
