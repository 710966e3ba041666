"""Beam search against transformers and against exhaustive search."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.sampling.autoregressive import generate
from mmjax.sampling.beam import Beam, beam_search
from mmjax.sampling.decoding import Decoding
from tests.sampling import toys

GOLDEN = Path(__file__).parent.parent / "golden" / "generate_table"
CASES = json.loads((GOLDEN / "cases.json").read_text())
PROMPTS = [[1, 2, 0], [2], [0, 1, 1, 0]]


def table():
  with np.load(GOLDEN / "table.npz") as file:
    return file["table"].astype(np.float32)


def search_table(prompts, decoding, beam, **kwargs):
  tokens, valid = toys.pad_prompts(prompts, fill=17)
  step = jax.tree_util.Partial(toys.table_step, table())
  return beam_search(
      step, toys.reorder, toys.table_state(len(tokens)), tokens, valid,
      decoding, beam, **kwargs,
  )  # fmt: skip


def search_memory(weights, prompts, decoding, beam, **kwargs):
  tokens, valid = toys.pad_prompts(prompts)
  slots = tokens.shape[1] + decoding.max_new - 1
  step = jax.tree_util.Partial(toys.memory_step, weights)
  return beam_search(
      step, toys.reorder, toys.memory_state(len(tokens), slots), tokens, valid,
      decoding, beam, **kwargs,
  )  # fmt: skip


def listed(result, b):
  """The real tokens of each hypothesis of row b."""
  pairs = zip(np.asarray(result.tokens[b]), np.asarray(result.lengths[b]))
  return [tokens[:length].tolist() for tokens, length in pairs]


def upto(tokens, eos):
  """transformers fills what is behind an ending, with the first eos id."""
  ends = [i + 1 for i, token in enumerate(tokens) if token in eos]
  return tokens[: min(ends, default=len(tokens))]


@pytest.mark.parametrize(
    "name", [n for n in CASES["cases"] if n.startswith("beam")]
)
def test_equals_transformers(name):
  case = CASES["cases"][name]
  arguments = case["arguments"]
  eos = arguments.get("eos_token_id", ())
  decoding = Decoding(
      max_new=arguments["max_new_tokens"],
      eos=eos,
      repetition_penalty=arguments.get("repetition_penalty", 1.0),
      pad=-1,
  )
  beam = Beam(
      arguments["num_beams"],
      arguments.get("length_penalty", 1.0),
      arguments.get("early_stopping", False),
  )
  result = search_table(CASES["prompts"], decoding, beam)
  for b, answer in enumerate(case["answers"]):
    assert listed(result, b) == [upto(t, eos) for t in answer["tokens"]]
    np.testing.assert_allclose(result.scores[b], answer["scores"], rtol=1e-5)


def exhaustive(weights, prompt, max_new, eos, length_penalty):
  """All continuations and their scores, the best first."""
  found = []

  def extend(new, log_probs):
    if new and (new[-1] in eos or len(new) == max_new):
      found.append((sum(log_probs) / len(new) ** length_penalty, new))
      return
    next_token = toys.memory_log_probs(weights, [*prompt, *new])
    for i, log_prob in enumerate(next_token):
      extend([*new, i], [*log_probs, log_prob])

  extend([], [])
  return sorted(found, reverse=True)


@pytest.mark.parametrize(
    "eos, length_penalty",
    [((), 1.0), ((2,), 0.0), ((2,), 1.5), ((2,), -1.0)],
)
def test_a_wide_beam_is_exhaustive_search(eos, length_penalty):
  weights = toys.memory_weights(3, seed=4)
  decoding = Decoding(max_new=4, eos=eos, pad=-1)
  beam = Beam(90, length_penalty, "never")
  result = search_memory(weights, PROMPTS, decoding, beam)
  for b, prompt in enumerate(PROMPTS):
    truth = exhaustive(weights, prompt, 4, eos, length_penalty)
    count = len(truth)
    assert count == (31 if eos else 81)
    scores, tokens = zip(*truth)
    np.testing.assert_allclose(result.scores[b, :count], scores, rtol=2e-5)
    assert listed(result, b)[:5] == list(tokens[:5])
    assert set(map(tuple, listed(result, b)[:count])) == set(
        map(tuple, tokens)
    )
    # Fewer continuations exist than places.
    assert np.isneginf(result.scores[b, count:]).all()
    assert not np.asarray(result.lengths[b, count:]).any()
    assert (np.asarray(result.tokens[b, count:]) == -1).all()


def test_scores_are_sums_of_log_probs():
  weights = toys.memory_weights(6, seed=1)
  decoding = Decoding(max_new=6, eos=[2])
  result = search_memory(weights, PROMPTS, decoding, Beam(3, 0.7))
  lengths = np.asarray(result.lengths)
  assert len(np.unique(lengths)) > 1
  sums = np.asarray(result.log_probs).sum(-1) / lengths**0.7
  np.testing.assert_allclose(result.scores, sums, rtol=1e-5)
  for b, k in itertools.product(range(len(PROMPTS)), range(3)):
    history = list(PROMPTS[b])
    for n, token in enumerate(listed(result, b)[k]):
      log_prob = toys.memory_log_probs(weights, history)[token]
      np.testing.assert_allclose(result.log_probs[b, k, n], log_prob, atol=1e-5)
      history.append(token)
    assert not np.asarray(result.log_probs[b, k, lengths[b, k] :]).any()


@pytest.mark.parametrize(
    "early_stopping, b, limit", [(False, 0, 8), (True, 1, 5)]
)
def test_a_ragged_batch_gives_what_its_rows_give(early_stopping, b, limit):
  decoding = Decoding(
      max_new=8, eos=[2], stop=[[1, 3]], repetition_penalty=1.3
  )
  beam = Beam(3, early_stopping=early_stopping)
  weights = toys.memory_weights(6, seed=2)
  batch = search_memory(weights, PROMPTS, decoding, beam, limit=[8, 5, 7])
  alone = search_memory(
      weights, PROMPTS[b : b + 1], decoding, beam, limit=[limit]
  )
  assert listed(alone, 0) == listed(batch, b)
  np.testing.assert_allclose(alone.scores[0], batch.scores[b], atol=1e-5)
  assert np.asarray(batch.lengths[1]).max() <= 5


def test_stop_sequences_end_hypotheses():
  """An ending of one id is that id as eos, and longer ones need all ids."""
  as_eos = search_table([[5, 6]], Decoding(8, eos=[3, 11]), Beam(3))
  as_stop = search_table([[5, 6]], Decoding(8, stop=[[3], [11]]), Beam(3))
  assert listed(as_stop, 0) == listed(as_eos, 0)
  free = search_table([[5, 6]], Decoding(8), Beam(3))
  tail = listed(free, 0)[0][2:4]
  stopped = search_table([[5, 6]], Decoding(8, stop=[tail]), Beam(3))
  for tokens in listed(stopped, 0):
    ended = tokens[-2:] == tail
    assert ended or len(tokens) == 8
    inside = [tokens[i : i + 2] for i in range(len(tokens) - 2)]
    assert tail not in inside
  assert any(tokens[-2:] == tail for tokens in listed(stopped, 0))


def test_one_hypothesis_without_endings_is_greedy():
  weights = toys.memory_weights(6, seed=3)
  tokens, valid = toys.pad_prompts(PROMPTS + PROMPTS[::-1])
  decoding = Decoding(max_new=6, guidance=1.7, repetition_penalty=1.2)
  step = jax.tree_util.Partial(toys.memory_step, weights)
  greedy, _ = generate(
      step, toys.memory_state(6, 9), tokens, valid, decoding
  )
  beam = beam_search(
      step, toys.reorder, toys.memory_state(6, 9), tokens, valid, decoding,
      Beam(1),
  )  # fmt: skip
  np.testing.assert_array_equal(beam.tokens[:, 0], greedy.tokens)


def test_guidance_reorders_both_halves():
  """Every hypothesis keeps its own unconditional row."""
  weights = toys.memory_weights(6, seed=5)
  rich, poor = [[1, 2, 0], [4, 3]], [[5], [0, 5]]
  tokens, valid = toys.pad_prompts(rich + poor)
  result = beam_search(
      jax.tree_util.Partial(toys.memory_step, weights), toys.reorder,
      toys.memory_state(4, 8), tokens, valid,
      Decoding(max_new=5, guidance=1.6), Beam(4),
  )  # fmt: skip
  for b, k in itertools.product(range(2), range(4)):
    total, new = 0.0, []
    for token in listed(result, b)[k]:
      # The rule for logits holds for log-probabilities up to a constant.
      with_prompt = toys.memory_log_probs(weights, rich[b] + new)
      without = toys.memory_log_probs(weights, poor[b] + new)
      guided = without + 1.6 * (with_prompt - without)
      total += toys.log_softmax(guided)[token]
      new.append(token)
    np.testing.assert_allclose(result.scores[b, k], total / 5, rtol=1e-4)


def test_equal_shapes_compile_once():
  traces = []

  def step(tokens, valid, state):
    traces.append(tokens.shape)
    return toys.table_step(jnp.asarray(table()), tokens, valid, state)

  def search(tokens):
    state = toys.table_state(1)
    beam_search(
        step, toys.reorder, state, tokens, [3], Decoding(4), Beam(2)
    )
    return len(traces)

  assert search([[4, 5, 6]]) == search([[7, 8, 9]])
  assert set(traces) == {(1, 3), (2, 1)}
