"""Next-token cross-entropy in chunks against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.objectives import autoregressive

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(3, 10, 6)).astype(np.float32)
KERNEL = RNG.normal(size=(6, 21)).astype(np.float32)
TOKENS = RNG.integers(0, 21, (3, 10))
WEIGHT = RNG.random((3, 10)).astype(np.float32)


def terms(kernel, hidden, chunks):
  return autoregressive.next_token(
      lambda x: x @ kernel,
      hidden,
      jnp.asarray(TOKENS),
      jnp.asarray(WEIGHT),
      chunks=chunks,
  )


@pytest.mark.parametrize("chunks", [1, 2, 3, 10, 11])
def test_totals_are_those_of_the_definition(chunks):
  logits = np.float64(HIDDEN) @ np.float64(KERNEL)
  surprise = right = 0.0
  for b in range(3):
    for i in range(1, 10):
      before = logits[b, i - 1]
      nats = np.log(np.exp(before).sum()) - before[TOKENS[b, i]]
      surprise += WEIGHT[b, i] * nats
      right += WEIGHT[b, i] * (before.argmax() == TOKENS[b, i])
  found = terms(KERNEL, HIDDEN, chunks)
  np.testing.assert_allclose(found["next_token"].total, surprise, rtol=1e-5)
  np.testing.assert_allclose(found["accuracy"].total, right, rtol=1e-5)
  for term in found.values():
    np.testing.assert_allclose(term.weight, WEIGHT[:, 1:].sum(), rtol=1e-5)


def test_chunks_change_memory_and_not_the_gradient():
  hidden = RNG.normal(size=(2, 512, 6)).astype(np.float32)
  kernel = RNG.normal(size=(6, 2000)).astype(np.float32)
  tokens = jnp.asarray(RNG.integers(0, 2000, (2, 512)))

  def loss(kernel, hidden, chunks):
    found = autoregressive.next_token(
        lambda x: x @ kernel, hidden, tokens, jnp.ones((2, 512)), chunks=chunks
    )
    return found["next_token"].total

  step = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
  whole, parts = (step.lower(kernel, hidden, n).compile() for n in (1, 16))
  for a, b in zip(whole(kernel, hidden), parts(kernel, hidden)):
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())
  memory = [f.memory_analysis().temp_size_in_bytes for f in (whole, parts)]
  assert memory[1] < 0.25 * memory[0]


def test_labels_may_be_smoothed():
  rng = np.random.default_rng(3)
  hidden = rng.normal(size=(2, 5, 7)).astype(np.float32)
  tokens = rng.integers(0, 7, (2, 5))
  weight = np.ones((2, 5), np.float32)
  found = autoregressive.next_token(
      lambda x: x, hidden, tokens, weight, smoothing=0.2
  )
  log_probs = hidden - np.log(np.exp(hidden).sum(axis=-1, keepdims=True))
  target = 0.8 * np.eye(7)[tokens[:, 1:]] + 0.2 / 7
  loss = -(target * log_probs[:, :-1]).sum()
  assert float(found["next_token"].total) == pytest.approx(loss, rel=1e-5)


def test_data_sets_of_a_mixture_apart():
  rng = np.random.default_rng(3)
  hidden = rng.normal(size=(4, 9, 5)).astype(np.float32)
  table = rng.normal(size=(5, 7)).astype(np.float32)
  tokens = rng.integers(0, 7, (4, 9)).astype(np.int32)
  weight = rng.random((4, 9)).astype(np.float32)
  kind = np.array([1, 0, 1, 3], np.int32)
  for chunks in (1, 4):
    terms = autoregressive.next_token_by_kind(
        lambda x: x @ table, hidden, tokens, weight, kind, ("a", "b", "c"),
        chunks=chunks,
    )  # fmt: skip
    assert set(terms) == {
        f"{name}_{of}" for name in ("next_token", "accuracy") for of in "abc"
    }
    for number, name in enumerate("abc"):
      own = kind == number
      alone = autoregressive.next_token(
          lambda x: x @ table, hidden[own], tokens[own], weight[own]
      )
      for metric, term in alone.items():
        found = terms[f"{metric}_{name}"]
        np.testing.assert_allclose(found, term, rtol=1e-5)
