"""How does a model write a text, token by token? Greedily, or by drawing.

One compiled program reads the prompts and runs a `lax.while_loop` until every
row has ended; `stream` runs the same loop in pieces. The model is met only
through the protocol of `mmjax.sampling.decoding`.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.sampling import decoding as lib
from mmjax.sampling import processors
from mmjax.sampling.decoding import Decoding, Model, Prompt, Step


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn; applied in this order.

  Attributes:
    temperature: 0 chooses the likeliest token (greedy).
    top_k: tokens to draw from, or None for all.
    top_p: in (0, 1]; see `processors.top_p`.
    min_p: in [0, 1]; see `processors.min_p`.
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self) -> None:
    faults = []
    if not 0 <= self.temperature < math.inf:
      faults.append(
          "temperature must be 0 (greedy) or above, found"
          f" {self.temperature}"
      )
    if self.top_k is not None and self.top_k < 1:
      faults.append(f"top_k must be None or at least 1, found {self.top_k}")
    if not 0 < self.top_p <= 1:
      faults.append(f"top_p must lie in (0, 1], found {self.top_p}")
    if not 0 <= self.min_p <= 1:
      faults.append(f"min_p must lie in [0, 1], found {self.min_p}")
    lib.refuse(faults)

  def process(self, logits: jax.Array) -> jax.Array:
    """Temperature and truncation of f32[B, V], for a temperature above 0."""
    if self.temperature != 1:
      logits = processors.temperature(logits, self.temperature)
    if self.top_k is not None:
      logits = processors.top_k(logits, self.top_k)
    if self.top_p < 1:
      logits = processors.top_p(logits, self.top_p)
    if self.min_p > 0:
      logits = processors.min_p(logits, self.min_p)
    return logits


GREEDY = Sampling(temperature=0.0)


class Generation(NamedTuple):
  """New tokens of every row.

  Attributes:
    tokens: i32[B, N], endings included; `pad` behind the end of a row.
    lengths: i32[B], the real tokens of each row.
    log_probs: f32[B, N], in nats, under the distribution that the tokens were
      chosen from (after all processors); 0 behind the end of a row.
  """

  tokens: Any
  lengths: Any
  log_probs: Any


class _Carry(NamedTuple):
  """What flows through the loop; `count` tokens are chosen in running rows."""

  state: Any
  token: jax.Array  # i32[B], the last real token of each row.
  seen: jax.Array  # bool[B, V].
  done: jax.Array  # bool[B].
  count: jax.Array  # i32[].
  result: Generation
  limit: jax.Array  # i32[B].
  keys: jax.Array | None  # key[B].


def generate(
    step: Step,
    state: Any,
    tokens: Any,
    valid: Any,
    decoding: Decoding,
    sampling: Sampling = GREEDY,
    *,
    key: jax.Array | None = None,
    limit: Any = None,
    prefill: Step | None = None,
) -> tuple[Generation, Any]:
  """Continues prompts until each row has ended.

  A row depends on its own prompt and key alone: a batch gives what its rows
  give one by one (up to the rounding of the model).

  Args:
    step: the model; see `mmjax.sampling.decoding`.
    state: its cache, with room for T + max_new - 1 tokens. It is DONATED: its
      arrays are gone after the call, and none may stand in it twice.
    tokens: i32[B, T], prompts, right-padded.
    valid: i32[B], how many tokens of each prompt count.
    decoding: where to stop, penalty, guidance.
    sampling: how to draw; greedy by default.
    key: a PRNG key, folded with the row's index for each row, or key[B], one of
      its own for each row. Token n is drawn with `fold_in(row key, n)`.
    limit: i32[B], new tokens of each row; `decoding.max_new` by default.
    prefill: reads the prompts in place of `step`, where they are more than
      tokens (pictures bound to it with `Partial`).

  Returns:
    The new tokens, and the state after them. The last token of each row has
    not been seen by the model: a dialogue goes on with it as the first token
    of the next prompt.

  Raises:
    ValueError: bad input, before anything is compiled.
  """
  prompt, keys = _checked(decoding, sampling, tokens, valid, limit, key)
  return _generate(
      Model.of(step, prefill), state, prompt, keys, decoding, sampling
  )


def stream(
    step: Step,
    state: Any,
    tokens: Any,
    valid: Any,
    decoding: Decoding,
    sampling: Sampling = GREEDY,
    *,
    every: int,
    key: jax.Array | None = None,
    limit: Any = None,
    prefill: Step | None = None,
) -> Iterator[Generation]:
  """`generate` in pieces of `every` tokens, as soon as they are there.

  Side by side the pieces are the tokens of `generate`, up to its longest row.
  The state is donated from piece to piece.

  Args:
    step: see `generate`, as all others.
    state: donated, too.
    tokens: i32[B, T].
    valid: i32[B].
    decoding: where to stop.
    sampling: how to draw.
    every: tokens of a piece; the last one may be shorter.
    key: PRNG key or keys.
    limit: i32[B].
    prefill: reads the prompts in place of `step`.

  Yields:
    Generations of numpy arrays, of at most `every` tokens; `lengths` counts the
    real tokens in the piece. The iterator returns the final state (the value
    of `yield from`).

  Raises:
    ValueError: bad input, at once and not at the first piece.
  """
  if every < 1:
    lib.refuse([f"every must be at least 1, found {every}"])
  prompt, keys = _checked(decoding, sampling, tokens, valid, limit, key)
  return _pieces(
      Model.of(step, prefill), state, prompt, keys, decoding, sampling, every
  )


def _checked(
    decoding: Decoding,
    sampling: Sampling,
    tokens: Any,
    valid: Any,
    limit: Any,
    key: jax.Array | None,
) -> tuple[Prompt, jax.Array | None]:
  """The prompt, checked, and the key of every row (None for greedy)."""
  prompt = lib.checked_prompt(decoding, tokens, valid, limit)
  if sampling.temperature == 0:
    return prompt, None
  samples = prompt.limit.shape[0]
  if key is None or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    lib.refuse(["drawing needs `key`, from jax.random.key"])
  if key.shape not in ((), (samples,)):
    lib.refuse([
        f"key must be one key or [{samples}] keys, found {list(key.shape)}"
    ])
  if not key.shape:
    key = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(samples))
  return prompt, key


def _pieces(
    model: Model,
    state: Any,
    prompt: Prompt,
    keys: jax.Array | None,
    decoding: Decoding,
    sampling: Sampling,
    every: int,
) -> Iterator[Generation]:
  carry = _prefill(model, state, prompt, keys, decoding, sampling)
  shown, done = np.int32(0), False
  while not done:
    carry, piece, count, done = _chunk(
        model, carry, shown, decoding, sampling, every
    )
    piece, count, done = jax.device_get((piece, count, done))
    width = int(count - shown)
    yield Generation(
        piece.tokens[:, :width], piece.lengths, piece.log_probs[:, :width]
    )
    shown = count
  return carry.state


@functools.partial(
    jax.jit,
    static_argnames=("decoding", "sampling"),
    donate_argnames="state",
)
def _generate(
    model: Model,
    state: Any,
    prompt: Prompt,
    keys: jax.Array | None,
    decoding: Decoding,
    sampling: Sampling,
) -> tuple[Generation, Any]:
  carry = _start(model, state, prompt, keys, decoding, sampling)
  carry = _advance(model, carry, decoding.max_new, decoding, sampling)
  return carry.result, carry.state


@functools.partial(
    jax.jit,
    static_argnames=("decoding", "sampling"),
    donate_argnames="state",
)
def _prefill(
    model: Model,
    state: Any,
    prompt: Prompt,
    keys: jax.Array | None,
    decoding: Decoding,
    sampling: Sampling,
) -> _Carry:
  return _start(model, state, prompt, keys, decoding, sampling)


@functools.partial(
    jax.jit,
    static_argnames=("decoding", "sampling", "every"),
    donate_argnames="carry",
)
def _chunk(
    model: Model,
    carry: _Carry,
    shown: jax.Array,
    decoding: Decoding,
    sampling: Sampling,
    every: int,
) -> tuple[_Carry, Generation, jax.Array, jax.Array]:
  """Advances to `shown + every` tokens; copies those behind `shown`."""
  carry = _advance(model, carry, shown + every, decoding, sampling)
  at = jnp.minimum(shown + jnp.arange(every), decoding.max_new - 1)
  piece = Generation(
      carry.result.tokens[:, at],
      jnp.clip(carry.result.lengths - shown, 0, every),
      carry.result.log_probs[:, at],
  )
  return carry, piece, carry.count, carry.done.all()


def _start(
    model: Model,
    state: Any,
    prompt: Prompt,
    keys: jax.Array | None,
    decoding: Decoding,
    sampling: Sampling,
) -> _Carry:
  """Reads the prompts and chooses the first token of every row."""
  logits, state = lib.predict(
      decoding, model.read, prompt.tokens, prompt.valid, state
  )
  samples, vocabulary = logits.shape
  shape = (samples, decoding.max_new)
  carry = _Carry(
      state=state,
      token=jnp.zeros(samples, jnp.int32),
      seen=lib.seen_in_prompt(prompt, vocabulary),
      done=jnp.zeros(samples, bool),
      count=jnp.int32(0),
      result=Generation(
          jnp.full(shape, decoding.pad, jnp.int32),
          jnp.zeros(samples, jnp.int32),
          jnp.zeros(shape, jnp.float32),
      ),
      limit=prompt.limit,
      keys=keys,
  )
  return _append(carry, logits, decoding, sampling)


def _advance(
    model: Model,
    carry: _Carry,
    until: jax.Array | int,
    decoding: Decoding,
    sampling: Sampling,
) -> _Carry:
  """Chooses tokens until `until` of them are there or all rows have ended."""

  def unfinished(carry: _Carry) -> jax.Array:
    return (carry.count < until) & ~carry.done.all()

  def body(carry: _Carry) -> _Carry:
    tokens = decoding.model_rows(carry.token)[:, None]
    valid = decoding.model_rows((~carry.done).astype(jnp.int32))
    logits, state = lib.predict(
        decoding, model.step, tokens, valid, carry.state
    )
    return _append(
        carry._replace(state=state), logits, decoding, sampling
    )

  return jax.lax.while_loop(unfinished, body, carry)


def _append(
    carry: _Carry, logits: jax.Array, decoding: Decoding, sampling: Sampling
) -> _Carry:
  """Chooses one token per running row from logits f32[B, V]."""
  logits = decoding.process(logits, carry.seen)
  if sampling.temperature == 0:
    chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  else:
    logits = sampling.process(logits)
    keys = jax.vmap(jax.random.fold_in, (0, None))(carry.keys, carry.count)
    chosen = jax.vmap(jax.random.categorical)(keys, logits)
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  log_prob = jnp.take_along_axis(log_probs, chosen[:, None], axis=-1)[:, 0]

  live, at = ~carry.done, carry.count
  tokens, lengths, history = carry.result
  tokens = tokens.at[:, at].set(jnp.where(live, chosen, decoding.pad))
  history = history.at[:, at].set(jnp.where(live, log_prob, 0))
  lengths = lengths + live
  rows = jnp.arange(live.shape[0])
  return carry._replace(
      token=jnp.where(live, chosen, carry.token),
      seen=carry.seen.at[rows, chosen].set(True),
      done=carry.done
      | decoding.ends(tokens, at)
      | (lengths >= carry.limit),
      count=at + 1,
      result=Generation(tokens, lengths, history),
  )
