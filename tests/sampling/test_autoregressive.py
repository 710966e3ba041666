"""Greedy and sampled decoding against numpy and against transformers."""

import json
from pathlib import Path
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mmjax.sampling.autoregressive import GREEDY, Sampling, generate, stream
from mmjax.sampling.beam import Beam, beam_search
from mmjax.sampling.decoding import Decoding
from tests.sampling import toys

GOLDEN = Path(__file__).parent.parent / "golden" / "generate_table"
CASES = json.loads((GOLDEN / "cases.json").read_text())
PROMPTS = [[1, 2, 3], [4], [0, 5, 5, 2, 6], [6, 1]]
VOCABULARY = 7


def table():
  with np.load(GOLDEN / "table.npz") as file:
    return file["table"].astype(np.float32)


def table_model(weights=None):
  weights = table() if weights is None else weights
  return jax.tree_util.Partial(toys.table_step, weights)


def memory_model():
  weights = toys.memory_weights(VOCABULARY)
  return jax.tree_util.Partial(toys.memory_step, weights), weights


def run_memory(prompts, decoding, sampling=GREEDY, **kwargs):
  step, _ = memory_model()
  tokens, valid = toys.pad_prompts(prompts, fill=3)
  slots = tokens.shape[1] + decoding.max_new - 1
  return generate(
      step, toys.memory_state(len(tokens), slots), tokens, valid, decoding,
      sampling, **kwargs,
  )  # fmt: skip


def rows(result):
  """The real tokens of each row."""
  return [
      row[:length].tolist()
      for row, length in zip(np.asarray(result.tokens), result.lengths)
  ]


def greedy_by_hand(weights, prompt, max_new, endings):
  history, log_probs = list(prompt), []
  for n in range(1, max_new + 1):
    next_token = toys.memory_log_probs(weights, history)
    history.append(int(next_token.argmax()))
    log_probs.append(next_token.max())
    new = history[-n:]
    if any(len(e) <= n and new[-len(e) :] == list(e) for e in endings):
      break
  return history[len(prompt) :], log_probs


@pytest.mark.parametrize(
    "name", [n for n in CASES["cases"] if n.startswith("greedy")]
)
def test_greedy_equals_transformers(name):
  case = CASES["cases"][name]
  arguments = case["arguments"]
  decoding = Decoding(
      max_new=arguments["max_new_tokens"],
      eos=arguments.get("eos_token_id", ()),
      repetition_penalty=arguments.get("repetition_penalty", 1.0),
  )
  tokens, valid = toys.pad_prompts(CASES["prompts"], fill=17)
  result, _ = generate(
      table_model(), toys.table_state(len(tokens)), tokens, valid, decoding
  )
  assert rows(result) == [answer["tokens"][0] for answer in case["answers"]]


def test_greedy_equals_numpy_with_a_cache():
  endings = [[2], [5, 5], [1, 4, 6]]
  decoding = Decoding(max_new=9, eos=[2], stop=endings[1:], pad=-1)
  result, _ = run_memory(PROMPTS, decoding)
  _, weights = memory_model()
  lengths = set()
  for b, prompt in enumerate(PROMPTS):
    expected, log_probs = greedy_by_hand(weights, prompt, 9, endings)
    lengths.add(len(expected))
    assert rows(result)[b] == expected
    assert (np.asarray(result.tokens)[b, len(expected) :] == -1).all()
    padded = np.pad(log_probs, (0, 9 - len(expected)))
    np.testing.assert_allclose(result.log_probs[b], padded, atol=1e-5)
  assert len(lengths) > 1


def test_a_stop_sequence_does_not_reach_into_the_prompt():
  weights = np.full((4, 4, 4), -9.0, np.float32)
  weights[:, [0, 1, 2, 3], [1, 2, 3, 1]] = 9.0  # 0 -> 1 -> 2 -> 3 -> 1.
  decoding = Decoding(max_new=8, stop=[[1, 2]])
  result, _ = generate(
      table_model(weights), toys.table_state(1), [[0, 1]], [2], decoding
  )
  assert rows(result) == [[2, 3, 1, 2]]


def test_each_row_has_its_own_limit():
  decoding = Decoding(max_new=6, pad=-1)
  full, _ = run_memory(PROMPTS, decoding)
  limited, state = run_memory(PROMPTS, decoding, limit=[1, 6, 3, 2])
  for row, limit, same in zip(rows(limited), [1, 6, 3, 2], rows(full)):
    assert row == same[:limit]
  # A stopped row leaves its part of the state alone.
  seen = np.array([len(p) for p in PROMPTS]) + [0, 5, 2, 1]
  np.testing.assert_array_equal(state.length, seen)


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(0.8, top_k=6, top_p=0.9)]
)
def test_a_ragged_batch_gives_what_its_rows_give(sampling):
  decoding = Decoding(max_new=8, eos=[2], repetition_penalty=1.2)
  keys = jax.random.split(jax.random.key(3), len(PROMPTS))
  batch, _ = run_memory(PROMPTS, decoding, sampling, key=keys)
  for b in (0, 1):
    alone, _ = run_memory(
        PROMPTS[b : b + 1], decoding, sampling, key=keys[b : b + 1]
    )
    assert rows(alone) == rows(batch)[b : b + 1]
    np.testing.assert_allclose(
        alone.log_probs[0], batch.log_probs[b], atol=1e-5
    )


def test_a_key_is_folded_with_the_row():
  decoding, sampling = Decoding(max_new=8), Sampling()
  key = jax.random.key(5)
  own = jnp.stack([jax.random.fold_in(key, b) for b in range(len(PROMPTS))])
  one, _ = run_memory(PROMPTS, decoding, sampling, key=key)
  many, _ = run_memory(PROMPTS, decoding, sampling, key=own)
  again, _ = run_memory(PROMPTS, decoding, sampling, key=key)
  other, _ = run_memory(PROMPTS, decoding, sampling, key=jax.random.key(6))
  assert rows(one) == rows(many) == rows(again) != rows(other)
  # Equal prompts of a batch are drawn apart.
  same, _ = run_memory([[1, 2]] * 4, decoding, sampling, key=key)
  assert len(set(map(tuple, rows(same)))) > 1


@pytest.mark.parametrize(
    "sampling, every",
    [(GREEDY, 3), (GREEDY, 20), (Sampling(), 1), (Sampling(), 4)],
)
def test_pieces_side_by_side_are_the_whole(sampling, every):
  decoding = Decoding(max_new=8, eos=[2], repetition_penalty=1.1, pad=-1)
  step, _ = memory_model()
  tokens, valid = toys.pad_prompts(PROMPTS)
  arguments = (tokens, valid, decoding, sampling)
  state = lambda: toys.memory_state(4, tokens.shape[1] + 7)
  key = jax.random.key(1)
  whole, final = generate(step, state(), *arguments, key=key)

  def collect():
    end = yield from stream(step, state(), *arguments, key=key, every=every)
    np.testing.assert_allclose(end.length, final.length)

  pieces = list(collect())
  longest = int(whole.lengths.max())
  widths = [piece.tokens.shape[1] for piece in pieces]
  assert widths == [min(every, longest - i) for i in range(0, longest, every)]
  for name in ("tokens", "log_probs"):
    joined = np.concatenate([getattr(p, name) for p in pieces], axis=1)
    expected = np.asarray(getattr(whole, name))[:, :longest]
    np.testing.assert_allclose(joined, expected, atol=1e-6)
  lengths = sum(piece.lengths for piece in pieces)
  np.testing.assert_array_equal(lengths, whole.lengths)


def test_draws_have_the_right_distribution():
  sampling = Sampling(temperature=1.3, top_k=5, min_p=0.02)
  logits = table()[:8, :8, :8] / 2
  count = 20_000
  result, _ = generate(
      table_model(logits), toys.table_state(count),
      np.tile([[3, 6]], (count, 1)), np.full(count, 2),
      Decoding(max_new=2), sampling, key=jax.random.key(0),
  )  # fmt: skip
  drawn = np.asarray(result.tokens)

  def expected(row):
    row = np.where(row < np.sort(row)[-5], -np.inf, row.astype(float)) / 1.3
    row = np.exp(row - row.max())
    row = np.where(row < 0.02, 0, row)
    return row / row.sum()

  first = expected(logits[3, 6])
  # Each second token has the distribution that follows its own first one.
  for given, sample, p in [(None, drawn[:, 0], first)] + [
      (t, drawn[drawn[:, 0] == t, 1], expected(logits[6, t]))
      for t in np.flatnonzero(first > 0.05)
  ]:
    seen = np.bincount(sample, minlength=8)
    assert seen[p == 0].sum() == 0
    test = scipy.stats.chisquare(seen[p > 0], sample.size * p[p > 0])
    assert test.pvalue > 1e-3, (given, test)
  log_first = np.log(first[drawn[:, 0]])
  np.testing.assert_allclose(result.log_probs[:, 0], log_first, atol=1e-5)


def test_equal_shapes_compile_once():
  traces = []

  def step(tokens, valid, state):
    traces.append(tokens.shape)
    return toys.table_step(jnp.asarray(table()), tokens, valid, state)

  prompts = [([[4, 5, 6], [7, 0, 0]], [3, 1]), ([[9, 1, 0], [2, 3, 4]], [2, 3])]
  for tokens, valid in prompts * 2:
    # New but equal settings are the same program.
    decoding = Decoding(max_new=6, eos=[3], stop=[[1, 1]])
    generate(step, toys.table_state(2), tokens, valid, decoding,
             limit=[valid[0], 6])  # fmt: skip
  # The prefill, and the body of the loop.
  assert sorted(set(traces)) == [(2, 1), (2, 3)]
  once = len(traces)
  generate(step, toys.table_state(2), [[5, 5, 1], [8, 8, 8]], [1, 1], decoding)
  assert len(traces) == once <= 4

  pieces = lambda: list(
      stream(step, toys.table_state(2), *prompts[0], decoding, every=2)
  )
  assert len(pieces()) > 1
  streamed = len(traces)
  pieces()
  assert len(traces) == streamed <= once + 4


def test_the_state_is_donated():
  step, _ = memory_model()
  state = toys.memory_state(1, 8)
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # "Some donated buffers were not usable".
    generate(step, state, [[1, 2]], [2], Decoding(max_new=4))
  assert state.written.is_deleted()


def test_a_batch_split_over_devices_gives_the_same():
  mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  tokens, valid = toys.pad_prompts(PROMPTS + PROMPTS[::-1])
  arguments = (tokens, valid, Decoding(max_new=5, eos=[2]), Sampling())
  step, _ = memory_model()
  state = lambda: toys.memory_state(8, 9)
  key = jax.random.key(2)
  one, _ = generate(step, state(), *arguments, key=key)
  with jax.set_mesh(mesh):
    state = jax.device_put(state(), split)
    many, state = generate(step, state, *arguments, key=key)
  assert not state.written.is_fully_replicated
  assert rows(many) == rows(one)


def test_a_state_can_be_continued():
  decoding = Decoding(max_new=3)
  step, _ = memory_model()
  whole, _ = run_memory([[1, 2, 3]], Decoding(max_new=6))
  first, state = generate(
      step, toys.memory_state(1, 9), [[1, 2, 3]], [3], decoding
  )
  last = np.asarray(first.tokens)[:, -1:]
  second, _ = generate(step, state, last, [1], decoding)
  assert rows(first)[0] + rows(second)[0] == rows(whole)[0]


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_combines_two_rows_before_processors(scale):
  weights = table()
  with_prompt, without = [[4, 9, 7], [12]], [[7], [13, 12]]
  tokens, valid = toys.pad_prompts(with_prompt + without)
  decoding = Decoding(max_new=7, guidance=scale, repetition_penalty=1.3)
  result, _ = generate(
      table_model(weights), toys.table_state(4), tokens, valid, decoding
  )
  for b in range(2):
    rich, poor = [0, *with_prompt[b]], [0, *without[b]]
    seen = set(with_prompt[b])
    for n in range(7):
      logits = (1 - scale) * weights[poor[-2], poor[-1]].astype(np.float64)
      logits += scale * weights[rich[-2], rich[-1]]
      for i in seen:
        logits[i] *= 1.3 if logits[i] < 0 else 1 / 1.3
      chosen = int(logits.argmax())
      assert result.tokens[b, n] == chosen
      log_prob = toys.log_softmax(logits)[chosen]
      np.testing.assert_allclose(result.log_probs[b, n], log_prob, atol=1e-4)
      rich.append(chosen)
      poor.append(chosen)
      seen.add(chosen)


def only_even(logits, seen):
  del seen
  even = jnp.arange(logits.shape[-1]) % 2 == 0
  return jnp.where(even, logits, -jnp.inf)


def test_processors_of_the_caller_apply():
  decoding = Decoding(max_new=12, processors=[only_even])
  free, _ = run_memory(PROMPTS, Decoding(max_new=12))
  even, _ = run_memory(PROMPTS, decoding, Sampling(), key=jax.random.key(0))
  assert (np.asarray(free.tokens) % 2).any()
  assert not (np.asarray(even.tokens) % 2).any()


def test_prompts_may_be_read_by_another_function():
  """As with pictures: the prompt is more than its ids."""
  step, weights = memory_model()
  embedding, head = weights
  swapped = (embedding[[1, 0, *range(2, VOCABULARY)]], head)
  decoding = Decoding(max_new=6)
  arguments = ([[0, 4, 0]], [3], decoding)
  plain, _ = run_memory([[1, 4, 1]], decoding)
  state = lambda: toys.memory_state(1, 8)
  prefill = jax.tree_util.Partial(toys.memory_step, swapped)
  result, _ = generate(step, state(), *arguments, prefill=prefill)
  unswapped, _ = run_memory([[0, 4, 0]], decoding)
  assert rows(result) == rows(plain)
  np.testing.assert_allclose(result.log_probs, plain.log_probs, atol=1e-5)
  assert np.abs(result.log_probs - unswapped.log_probs).max() > 1e-2
  pieces = list(stream(step, state(), *arguments, prefill=prefill, every=6))
  assert pieces[0].tokens[0].tolist() == rows(plain)[0]
  best = beam_search(step, toys.reorder, state(), *arguments, Beam(1),
                     prefill=prefill)  # fmt: skip
  assert best.tokens[0, 0].tolist() == rows(plain)[0]
