"""Which continuation is likeliest as a whole? Beam search.

The semantics are those of `generate(num_beams=k)` of transformers 5: scores are
sums of log-probabilities (after the processors), divided by
length ** length_penalty once a hypothesis has ended; the k best ended
hypotheses are kept, and k running ones beside them.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mmjax.sampling import decoding as lib
from mmjax.sampling.decoding import Decoding, Model, Prompt, Step


class Reorder(Protocol):
  """Picks rows of a model's state."""

  def __call__(self, state: Any, index: jax.Array) -> Any:
    """Row i of the result is row index[i] of the state; index is i32[R]."""


@dataclasses.dataclass(frozen=True)
class Beam:
  """Settings of the search.

  Attributes:
    width: hypotheses kept, k.
    length_penalty: exponent of the length; above 0 favours long texts.
    early_stopping: True ends a row as soon as k hypotheses have ended. False
      ends it when the best running one, ended now, would not beat the worst
      ended one. "never" ends it only when none could, at any length.
  """

  width: int
  length_penalty: float = 1.0
  early_stopping: bool | Literal["never"] = False

  def __post_init__(self) -> None:
    faults = []
    if self.width < 1:
      faults.append(f"width must be at least 1, found {self.width}")
    if not math.isfinite(self.length_penalty):
      faults.append(
          f"length_penalty must be finite, found {self.length_penalty}"
      )
    if not isinstance(self.early_stopping, bool) and (
        self.early_stopping != "never"
    ):
      faults.append(
          "early_stopping must be True, False or 'never', found"
          f" {self.early_stopping!r}"
      )
    lib.refuse(faults)


class Hypotheses(NamedTuple):
  """Continuations of every row, the best first.

  A place without one (fewer than K continuations exist) has length 0 and the
  score -inf.

  Attributes:
    tokens: i32[B, K, N], endings included; `pad` behind the end.
    lengths: i32[B, K].
    log_probs: f32[B, K, N], after the processors; 0 behind the end.
    scores: f32[B, K], `log_probs.sum(-1) / lengths ** length_penalty`.
  """

  tokens: jax.Array
  lengths: jax.Array
  log_probs: jax.Array
  scores: jax.Array


class _Carry(NamedTuple):
  """What flows through the loop.

  Scores of `running` are plain sums; `parent` i32[B, K] is the running
  hypothesis of the step before that each one continues.
  """

  state: Any
  running: Hypotheses
  ended: Hypotheses
  parent: jax.Array
  seen: jax.Array  # bool[B, K, V].
  open: jax.Array  # bool[B].
  count: jax.Array  # i32[].


def beam_search(
    step: Step,
    reorder: Reorder,
    state: Any,
    tokens: Any,
    valid: Any,
    decoding: Decoding,
    beam: Beam,
    *,
    limit: Any = None,
    prefill: Step | None = None,
) -> Hypotheses:
  """The k best continuations of every prompt that the search finds.

  The prompt is read once per row; `reorder` then makes k rows of each, so that
  row `b * k + i` of the state belongs to hypothesis i of prompt b (with
  guidance, the unconditional rows follow behind all conditional ones).

  Args:
    step: the model; see `mmjax.sampling.decoding`.
    reorder: picks rows of the state, any number of them.
    state: the cache of B rows, with room for T + max_new - 1 tokens.
    tokens: i32[B, T], prompts, right-padded.
    valid: i32[B], how many tokens of each prompt count.
    decoding: where to stop, penalty, guidance.
    beam: settings of the search.
    limit: i32[B], new tokens of each row; `decoding.max_new` by default.
    prefill: reads the prompts in place of `step`, where they are more than
      tokens (pictures bound to it with `Partial`).

  Raises:
    ValueError: bad input, before anything is compiled.
  """
  prompt = lib.checked_prompt(decoding, tokens, valid, limit)
  return _search(
      Model.of(step, prefill),
      lib.partial(reorder),
      state,
      prompt,
      decoding,
      beam,
  )


@functools.partial(jax.jit, static_argnames=("decoding", "beam"))
def _search(
    model: Model,
    reorder: Reorder,
    state: Any,
    prompt: Prompt,
    decoding: Decoding,
    beam: Beam,
) -> Hypotheses:
  samples, width = prompt.limit.shape[0], beam.width

  def unfinished(carry: _Carry) -> jax.Array:
    return (carry.count < decoding.max_new) & carry.open.any()

  def body(carry: _Carry) -> _Carry:
    parent = carry.parent + width * jnp.arange(samples)[:, None]
    index = _state_rows(decoding, parent.reshape(-1), samples * width)
    last = carry.running.tokens[:, :, carry.count - 1].reshape(-1)
    valid = jnp.repeat(carry.open.astype(jnp.int32), width)
    logits, state = lib.predict(
        decoding,
        model.step,
        decoding.model_rows(last)[:, None],
        decoding.model_rows(valid),
        reorder(carry.state, index),
    )
    logits = logits.reshape(samples, width, -1)
    carry = carry._replace(state=state)
    return _extend(carry, logits, prompt.limit, decoding, beam)

  carry = _start(model, reorder, state, prompt, decoding, beam)
  return jax.lax.while_loop(unfinished, body, carry).ended


def _start(
    model: Model,
    reorder: Reorder,
    state: Any,
    prompt: Prompt,
    decoding: Decoding,
    beam: Beam,
) -> _Carry:
  """Reads the prompts once, makes k rows of each, chooses first tokens."""
  logits, state = lib.predict(
      decoding, model.read, prompt.tokens, prompt.valid, state
  )
  samples, vocabulary = logits.shape
  width = beam.width
  index = jnp.repeat(jnp.arange(samples), width)
  seen = lib.seen_in_prompt(prompt, vocabulary)
  shape = (samples, width, decoding.max_new)
  nothing = Hypotheses(
      jnp.full(shape, decoding.pad, jnp.int32),
      jnp.zeros(shape[:2], jnp.int32),
      jnp.zeros(shape, jnp.float32),
      jnp.full(shape[:2], -jnp.inf),
  )
  # One root: k equal ones would give k equal continuations.
  root = nothing._replace(scores=nothing.scores.at[:, 0].set(0.0))
  carry = _Carry(
      state=reorder(state, _state_rows(decoding, index, samples)),
      running=root,
      ended=nothing,
      parent=jnp.zeros(shape[:2], jnp.int32),
      seen=jnp.broadcast_to(seen[:, None], (samples, width, vocabulary)),
      open=jnp.ones(samples, bool),
      count=jnp.int32(0),
  )
  logits = jnp.broadcast_to(logits[:, None], carry.seen.shape)
  return _extend(carry, logits, prompt.limit, decoding, beam)


def _state_rows(
    decoding: Decoding, index: jax.Array, rows: int
) -> jax.Array:
  """Adds the unconditional rows, which lie `rows` behind the others."""
  if decoding.guidance is None:
    return index
  return jnp.concatenate([index, index + rows])


def _extend(
    carry: _Carry,
    logits: jax.Array,
    limit: jax.Array,
    decoding: Decoding,
    beam: Beam,
) -> _Carry:
  """One token more: candidates, from them the running and the ended.

  Args:
    carry: what flows through the loop.
    logits: f32[B, K, V] of the running hypotheses.
    limit: i32[B].
    decoding: where to stop.
    beam: settings of the search.
  """
  candidates, parent = _candidates(carry, logits, decoding, beam)
  ends = decoding.ends(candidates.tokens, carry.count)
  ends |= (carry.count + 1 >= limit)[:, None]

  scores = jnp.where(ends, -jnp.inf, candidates.scores)
  scores, best = jax.lax.top_k(scores, beam.width)
  running = _pick(candidates, best)._replace(scores=scores)
  parent = jnp.take_along_axis(parent, best, axis=1)
  # Only the k best candidates may end; the rest are there to run on.
  may_end = ends & (jnp.arange(ends.shape[1]) < beam.width)
  may_end &= carry.open[:, None]
  ended = _merge(carry.ended, candidates, may_end, beam)

  seen = jnp.take_along_axis(carry.seen, parent[:, :, None], axis=1)
  rows, columns = jnp.indices(parent.shape)
  chosen = running.tokens[:, :, carry.count]
  return carry._replace(
      running=running,
      ended=ended,
      parent=parent,
      seen=seen.at[rows, columns, chosen].set(True),
      open=carry.open
      & ~ends.all(axis=1)
      & _may_improve(running, ended, limit, beam),
      count=carry.count + 1,
  )


def _candidates(
    carry: _Carry, logits: jax.Array, decoding: Decoding, beam: Beam
) -> tuple[Hypotheses, jax.Array]:
  """The best continuations by one token, and whose they are: i32[B, C].

  There are enough of them that k can run on when all others end.
  """
  samples, width, vocabulary = logits.shape
  log_probs = jax.nn.log_softmax(logits, axis=-1).reshape(-1, vocabulary)
  log_probs = decoding.process(log_probs, carry.seen.reshape(-1, vocabulary))
  log_probs = log_probs.reshape(samples, width, vocabulary)
  totals = carry.running.scores[:, :, None] + log_probs
  ways = max(2, 1 + len({ids[-1] for ids in decoding.endings}))
  scores, flat = jax.lax.top_k(
      totals.reshape(samples, -1), width * min(ways, vocabulary)
  )
  parent, token = flat // vocabulary, flat % vocabulary
  picked = jnp.take_along_axis(
      log_probs.reshape(samples, -1), flat, axis=1
  )
  longer = _pick(carry.running, parent)
  at = carry.count
  return Hypotheses(
      longer.tokens.at[:, :, at].set(token),
      longer.lengths + 1,
      longer.log_probs.at[:, :, at].set(picked),
      scores,
  ), parent


def _pick(hypotheses: Hypotheses, index: jax.Array) -> Hypotheses:
  """Those with the places index i32[B, J]."""
  rows = jnp.arange(index.shape[0])[:, None]
  return jax.tree.map(lambda x: x[rows, index], hypotheses)


def _merge(
    ended: Hypotheses, candidates: Hypotheses, may_end: jax.Array, beam: Beam
) -> Hypotheses:
  """The k best of those that had ended and those that end now."""
  lengths = candidates.lengths.astype(jnp.float32)
  scores = candidates.scores / lengths**beam.length_penalty
  scores = jnp.where(may_end, scores, -jnp.inf)
  both = jax.tree.map(
      lambda *x: jnp.concatenate(x, axis=1),
      ended,
      candidates._replace(scores=scores),
  )
  scores, best = jax.lax.top_k(both.scores, beam.width)
  real = jnp.isfinite(scores)
  merged = _pick(both, best)
  return Hypotheses(
      jnp.where(real[:, :, None], merged.tokens, ended.tokens),
      jnp.where(real, merged.lengths, 0),
      jnp.where(real[:, :, None], merged.log_probs, 0.0),
      scores,
  )


def _may_improve(
    running: Hypotheses, ended: Hypotheses, limit: jax.Array, beam: Beam
) -> jax.Array:
  """Whether running hypotheses may still enter the ended ones: bool[B]."""
  full = (ended.lengths > 0).all(axis=1)
  if beam.early_stopping is True:
    return ~full & jnp.isfinite(running.scores[:, 0])
  length = running.lengths[:, 0]
  if beam.early_stopping == "never" and beam.length_penalty > 0:
    length = limit
  best = running.scores[:, 0] / (
      length.astype(jnp.float32) ** beam.length_penalty
  )
  return jnp.where(full, best > ended.scores.min(axis=1), jnp.isfinite(best))
