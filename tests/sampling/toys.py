"""Models small enough to be searched exhaustively, in jax and in numpy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Pair(NamedTuple):
  """The state of `table_step`: the last token of each row, or 0."""

  last: jax.Array


def table_step(table, tokens, valid, state):
  """Logits of the next token from the last two: table[V, V, V]."""
  before = jnp.concatenate([state.last[:, None], tokens[:, :-1]], axis=1)
  joined = jnp.concatenate([state.last[:, None], tokens], axis=1)
  last = jnp.take_along_axis(joined, valid[:, None], axis=1)[:, 0]
  return table[before, tokens], Pair(last)


def table_state(rows):
  return Pair(jnp.zeros(rows, jnp.int32))


class Memory(NamedTuple):
  """The state of `memory_step`: what was written, and how much of it counts."""

  written: jax.Array
  length: jax.Array


def memory_step(weights, tokens, valid, state):
  """Attends from each token to all before it, through an explicit cache.

  It returns the logits of the last valid position only, as [B, 1, V].
  """
  embedding, head = weights
  slots = jnp.arange(state.written.shape[1])
  which = slots - state.length[:, None]
  new = jnp.take_along_axis(
      tokens, jnp.clip(which, 0, tokens.shape[1] - 1), axis=1
  )
  here = (which >= 0) & (which < tokens.shape[1])
  written = jnp.where(here[:, :, None], embedding[new], state.written)
  place = state.length + jnp.maximum(valid - 1, 0)
  query = jnp.take_along_axis(written, place[:, None, None], axis=1)[:, 0]
  scores = jnp.einsum("bd,bsd->bs", query, written)
  scores = jnp.where(slots <= place[:, None], scores, -jnp.inf)
  mixed = jnp.einsum("bs,bsd->bd", jax.nn.softmax(scores), written)
  logits = jnp.tanh(mixed + query) @ head
  return logits[:, None], Memory(written, state.length + valid)


def memory_weights(vocabulary, seed=0, width=6):
  rng = np.random.default_rng(seed)
  return (
      rng.normal(0, 0.7, (vocabulary, width)).astype(np.float32),
      rng.normal(0, 2.0, (width, vocabulary)).astype(np.float32),
  )


def memory_state(rows, slots, width=6):
  # What nobody wrote must not be read: it is not zero.
  return Memory(
      jnp.full((rows, slots, width), 99.0), jnp.zeros(rows, jnp.int32)
  )


def memory_log_probs(weights, history):
  """The same model in float64, without a cache: f64[V] after `history`."""
  embedding, head = (np.asarray(w, np.float64) for w in weights)
  seen = embedding[np.asarray(history)]
  attention = np.exp(seen @ seen[-1])
  mixed = attention @ seen / attention.sum()
  return log_softmax(np.tanh(mixed + seen[-1]) @ head)


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def reorder(state, index):
  return jax.tree.map(lambda x: x[index], state)


def pad_prompts(prompts, fill=0):
  """Lists of ids to (tokens i32[B, T], valid i32[B])."""
  valid = np.array([len(p) for p in prompts], np.int32)
  tokens = np.full((len(prompts), valid.max()), fill, np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  return tokens, valid
