"""What do all decoding engines share? The protocol of a model, where to stop.

A model is two things. A step

  step(tokens i32[B, T], valid i32[B], state) -> (logits [B, T, V], state)

takes the next T tokens of every row, of which the first `valid[b]` count (right
padding), and an opaque pytree: the cache. The logits at `valid[b] - 1` predict
the next token of row b. A step may also return logits [B, 1, V] of that
position only, which saves the product with the vocabulary over a long prompt.
Rows that have stopped are stepped with `valid` 0: they must leave their part of
the state alone, and their logits are not read.

The weights belong to the step: `jax.tree_util.Partial(function, variables)`
makes them arguments of the compiled program; a closure would make them
constants. A program is compiled once per (function, shapes, settings).
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.sampling import processors as lib

Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def refuse(faults: Iterable[str]) -> None:
  """Raises one ValueError that lists all faults, if there are any."""
  if faults := list(faults):
    raise ValueError("Cannot decode: " + "; ".join(faults) + ".")


@dataclasses.dataclass(frozen=True)
class Decoding:
  """When a row ends, and what shapes its distribution whatever the engine.

  Attributes:
    max_new: tokens to choose at most; the width of the result.
    eos: ids that end a row. An ending stays in the result.
    stop: sequences of ids that end a row, matched on the tail of the new
      tokens (never across the border to the prompt).
    pad: what fills the result behind the end of a row. Any integer: a row's
      length says what is real.
    repetition_penalty: see `processors.repetition_penalty`; counts the prompt.
    processors: more functions (logits f32[B, V], seen bool[B, V]) -> f32[B, V],
      applied after the penalty and before temperature and truncation. They
      must be hashable, and equal when they do the same, or every call compiles.
    guidance: scale of classifier-free guidance. Prompt and state then have 2B
      rows, the conditional ones first; results have B.
  """

  max_new: int
  eos: Sequence[int] = ()
  stop: Sequence[Sequence[int]] = ()
  pad: int = 0
  repetition_penalty: float = 1.0
  processors: Sequence[lib.Processor] = ()
  guidance: float | None = None

  def __post_init__(self) -> None:
    # Tuples, for settings are part of the key of a compiled program.
    stop = tuple(tuple(int(i) for i in ids) for ids in self.stop)
    object.__setattr__(self, "eos", tuple(int(i) for i in self.eos))
    object.__setattr__(self, "stop", stop)
    object.__setattr__(self, "processors", tuple(self.processors))
    faults = []
    if self.max_new < 1:
      faults.append(f"max_new must be at least 1, found {self.max_new}")
    if any(not ids for ids in stop):
      faults.append(f"a stop sequence is empty in {stop}")
    if any(i < 0 for ids in self.endings for i in ids):
      faults.append(f"ids of eos {self.eos} and stop {stop} must be >= 0")
    if not 0 < self.repetition_penalty < math.inf:
      faults.append(
          "repetition_penalty must be above 0 (1 is none), found"
          f" {self.repetition_penalty}"
      )
    if self.guidance is not None and not math.isfinite(self.guidance):
      faults.append(f"guidance must be finite, found {self.guidance}")
    refuse(faults)

  @property
  def endings(self) -> tuple[tuple[int, ...], ...]:
    """All sequences that end a row; an eos id is one of length 1."""
    return tuple((i,) for i in self.eos) + self.stop

  def model_rows(self, values: jax.Array) -> jax.Array:
    """Repeats [B, ...] for the unconditional rows, where there are any."""
    if self.guidance is None:
      return values
    return jnp.concatenate([values, values])

  def process(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
    """Repetition penalty and the caller's processors, on f32[B, V]."""
    if self.repetition_penalty != 1:
      logits = lib.repetition_penalty(logits, seen, self.repetition_penalty)
    for processor in self.processors:
      logits = processor(logits, seen)
    return logits

  def ends(self, tokens: jax.Array, index: jax.Array) -> jax.Array:
    """Whether the token at `index` completes an ending.

    Args:
      tokens: i32[..., N], new tokens; those behind `index` are not read.
      index: i32[].

    Returns:
      bool[...].
    """
    if not self.endings:
      return jnp.zeros(tokens.shape[:-1], bool)
    width = max(map(len, self.endings))
    anything, nothing = -1, -2
    table = np.full((len(self.endings), width), anything, np.int32)
    for row, ids in zip(table, self.endings):
      row[width - len(ids) :] = ids
    at = index + jnp.arange(1 - width, 1)
    tail = jnp.take(tokens, jnp.maximum(at, 0), axis=-1)
    tail = jnp.where(at >= 0, tail, nothing)[..., None, :]
    return ((tail == table) | (table == anything)).all(-1).any(-1)


class Prompt(NamedTuple):
  """What a call decodes from, checked.

  Attributes:
    tokens: i32[B, T], right-padded; 2B rows with guidance.
    valid: i32[B], from 1 to T; 2B rows with guidance.
    limit: i32[B], the new tokens that each row may have.
  """

  tokens: Any
  valid: Any
  limit: Any


def checked_prompt(
    decoding: Decoding, tokens: Any, valid: Any, limit: Any
) -> Prompt:
  """Checks host values before anything is compiled.

  Within a jitted function only types and shapes can be looked at.

  Args:
    decoding: settings of the call.
    tokens: i32[B, T], right-padded prompts.
    valid: i32[B], how many tokens of each prompt count.
    limit: i32[B], new tokens of each row, or None for `max_new`.

  Raises:
    ValueError: wrong shapes or types, a row without a token, a limit outside
      [1, max_new]; all faults in one message.
  """
  traced = any(
      isinstance(x, jax.core.Tracer) for x in (tokens, valid, limit)
  )
  as_array = jnp.asarray if traced else np.asarray
  tokens, valid = as_array(tokens), as_array(valid)
  if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
    refuse([
        "prompts must be integers [B, T], found"
        f" {tokens.dtype}{list(tokens.shape)}"
    ])
  faults = []
  rows, width = tokens.shape
  if not rows:
    faults.append("the batch has no row")
  samples = rows
  if decoding.guidance is not None:
    samples = rows // 2
    if rows % 2:
      faults.append(f"guidance needs an even number of rows, found {rows}")
  if limit is None:
    limit = np.full(samples, decoding.max_new)
  limit = as_array(limit)
  for name, values, size, most in (
      ("valid", valid, rows, width),
      ("limit", limit, samples, decoding.max_new),
  ):
    if values.shape != (size,) or not np.issubdtype(values.dtype, np.integer):
      faults.append(
          f"{name} must be integers [{size}], found"
          f" {values.dtype}{list(values.shape)}"
      )
    elif traced:
      continue
    elif (bad := np.flatnonzero((values < 1) | (values > most))).size:
      faults.append(
          f"{name} must lie in [1, {most}], found {values[bad].tolist()} in"
          f" rows {bad.tolist()}"
      )
  refuse(faults)
  return Prompt(*(x.astype(np.int32) for x in (tokens, valid, limit)))


def partial(function: Callable[..., Any]) -> jax.tree_util.Partial:
  """The function as a pytree, so that weights bound to it are arguments."""
  if isinstance(function, jax.tree_util.Partial):
    return function
  return jax.tree_util.Partial(function)


class Model(NamedTuple):
  """The steps of a model, as a pytree of its weights.

  Attributes:
    step: reads one token per row.
    prefill: reads the prompts; None for the same step.
  """

  step: jax.tree_util.Partial
  prefill: jax.tree_util.Partial | None

  @classmethod
  def of(cls, step: Step, prefill: Step | None) -> "Model":
    """Of any functions."""
    return cls(
        partial(step), None if prefill is None else partial(prefill)
    )

  @property
  def read(self) -> Step:
    """What reads the prompts."""
    return self.step if self.prefill is None else self.prefill


def predict(
    decoding: Decoding,
    step: Step,
    tokens: jax.Array,
    valid: jax.Array,
    state: Any,
) -> tuple[jax.Array, Any]:
  """One step of the model: logits f32[B, V] of the next tokens, and its state.

  Raises:
    ValueError: the logits have the wrong shape, or an ending lies outside of
      the vocabulary.
  """
  logits, state = step(tokens, valid, state)
  rows, width = tokens.shape
  if logits.ndim != 3 or logits.shape[:2] not in ((rows, width), (rows, 1)):
    refuse([
        f"the step must return logits [{rows}, {width}, V] or [{rows}, 1, V]"
        f" for tokens [{rows}, {width}], found {list(logits.shape)}"
    ])
  vocabulary = logits.shape[-1]
  if any(i >= vocabulary for ids in decoding.endings for i in ids):
    refuse([
        f"eos {decoding.eos} and stop {decoding.stop} must lie in the"
        f" vocabulary of {vocabulary}"
    ])
  last = jnp.clip(valid - 1, 0, logits.shape[1] - 1)
  logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
  logits = logits.astype(jnp.float32)
  if decoding.guidance is not None:
    logits = lib.guide(logits, decoding.guidance)
  return logits, state


def seen_in_prompt(prompt: Prompt, vocabulary: int) -> jax.Array:
  """Marks the ids of each prompt: bool[B, V].

  Ids outside of the vocabulary (placeholders of media) are skipped.
  """
  samples = prompt.limit.shape[0]
  tokens, valid = prompt.tokens[:samples], prompt.valid[:samples]
  counts = jnp.arange(tokens.shape[1]) < valid[:, None]
  ids = jnp.where(counts & (tokens >= 0), tokens, vocabulary)
  empty = jnp.zeros((samples, vocabulary), bool)
  return empty.at[jnp.arange(samples)[:, None], ids].set(True, mode="drop")
