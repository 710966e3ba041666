"""Processors against those of transformers, on the same logits."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.sampling import processors
from mmjax.sampling.autoregressive import Sampling
from mmjax.sampling.decoding import Decoding

GOLDEN = Path(__file__).parent.parent / "golden" / "generate_processors.npz"


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN) as file:
    return dict(file)


def seen_tokens(golden):
  seen = np.zeros(golden["in.logits"].shape, bool)
  np.put_along_axis(seen, golden["in.ids"], True, axis=1)
  return seen


def assert_same(ours, theirs):
  removed = np.isneginf(theirs)
  np.testing.assert_array_equal(np.isneginf(ours), removed)
  np.testing.assert_allclose(
      np.where(removed, 0, ours), np.where(removed, 0, theirs), rtol=1e-6
  )


@pytest.mark.parametrize(
    "name, number",
    [
        ("temperature", 0.7),
        ("top_k", 1),
        ("top_k", 10),
        ("top_k", 80),
        ("top_p", 0.01),
        ("top_p", 0.5),
        ("top_p", 0.95),
        ("min_p", 0.05),
        ("min_p", 0.9),
    ],
)
def test_equals_transformers(golden, name, number):
  ours = getattr(processors, name)(jnp.asarray(golden["in.logits"]), number)
  assert_same(np.asarray(ours), golden[f"out.{name}_{number}"])


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_equals_transformers(golden, penalty):
  ours = processors.repetition_penalty(
      jnp.asarray(golden["in.logits"]), seen_tokens(golden), penalty
  )
  assert_same(np.asarray(ours), golden[f"out.repetition_penalty_{penalty}"])


def test_guidance_equals_transformers(golden):
  ours = processors.guide(jnp.asarray(golden["in.logits"]), 2.5)
  np.testing.assert_allclose(
      ours, golden["out.guidance_2.5"], rtol=1e-5, atol=1e-5
  )


def test_the_order_is_that_of_transformers(golden):
  decoding = Decoding(max_new=1, repetition_penalty=1.3)
  sampling = Sampling(temperature=0.7, top_k=15, top_p=0.9, min_p=0.05)

  @jax.jit
  def chain(logits, seen):
    return sampling.process(decoding.process(logits, seen))

  ours = chain(golden["in.logits"], seen_tokens(golden))
  assert_same(np.asarray(ours), golden["out.chain"])


def test_nothing_is_removed_by_default(golden):
  logits = jnp.asarray(golden["in.logits"])
  same = Sampling().process(Decoding(max_new=1).process(logits, None))
  np.testing.assert_array_equal(same, logits)


def test_the_likeliest_token_always_stays():
  logits = jnp.asarray([[0.0, 9.0, 1.0], [2.0, 2.0, -jnp.inf]])
  for kept in (
      processors.top_k(logits, 1),
      processors.top_p(logits, 1e-9),
      processors.min_p(logits, 1.0),
  ):
    best = logits == logits.max(axis=1, keepdims=True)
    assert jnp.isfinite(kept).any(axis=1).all()
    assert not (jnp.isfinite(kept) & ~best).any()


def test_top_k_keeps_what_equals_the_kth():
  kept = processors.top_k(jnp.asarray([[3.0, 1.0, 2.0, 1.0, 0.0]]), 3)
  assert jnp.isfinite(kept).tolist() == [[True, True, True, True, False]]


def test_one_token_is_scaled_or_forbidden():
  logits = jnp.asarray([[1.0, 2.0, -3.0], [0.5, -2.0, 4.0]])
  scaled = processors.Scaled(1, 1.5)
  assert scaled(logits, None).tolist() == [[1, 3, -3], [0.5, -3, 4]]
  assert scaled == processors.Scaled(1, 1.5) and hash(scaled)
  forbidden = processors.Forbidden(2)(logits, None)
  assert forbidden.tolist() == [[1, 2, -np.inf], [0.5, -2, -np.inf]]
  known = processors.Known(2)(logits, None)
  assert known.tolist() == [[1, 2, -np.inf], [0.5, -2, -np.inf]]
