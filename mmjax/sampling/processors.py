"""Which tokens may come next, and how likely? Pure functions of logits.

They compose in any order; `Decoding` and `Sampling` apply them in the order of
transformers: guidance, repetition penalty, processors of the caller,
temperature, top-k, top-p, min-p. A removed token has the logit -inf.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

# (logits f32[B, V], seen bool[B, V]) -> f32[B, V], where `seen` marks the ids
# of a row's prompt and of the tokens chosen so far.
Processor = Callable[[jax.Array, jax.Array], jax.Array]


def guide(logits: jax.Array, scale: float) -> jax.Array:
  """Classifier-free guidance: `uncond + scale * (cond - uncond)`.

  Args:
    logits: f32[2B, V], the conditional rows before the unconditional ones.
    scale: 1 is the conditional model, 0 the unconditional one.

  Returns:
    f32[B, V].
  """
  conditional, unconditional = jnp.split(logits, 2)
  return unconditional + scale * (conditional - unconditional)


def repetition_penalty(
    logits: jax.Array, seen: jax.Array, penalty: float
) -> jax.Array:
  """Divides positive, multiplies negative logits of seen tokens (CTRL, 4.1).

  Args:
    logits: f32[B, V].
    seen: bool[B, V].
    penalty: above 1 makes repetition less likely, below 1 more.
  """
  penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
  return jnp.where(seen, penalised, logits)


def temperature(logits: jax.Array, value: float) -> jax.Array:
  """`logits / value`: above 1 flattens the distribution, below sharpens it."""
  return logits / value


def top_k(logits: jax.Array, k: int) -> jax.Array:
  """Keeps the k highest logits of f32[B, V], and what equals the k-th."""
  kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
  return jnp.where(logits < kth, -jnp.inf, logits)


def top_p(logits: jax.Array, p: float) -> jax.Array:
  """Keeps the smallest set of tokens whose probability reaches p.

  Holtzman et al. 2020, section 3.1. The likeliest token always stays.
  """
  order = jnp.argsort(logits, axis=-1)
  ascending = jnp.take_along_axis(logits, order, axis=-1)
  below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
  removed = (below <= 1 - p).at[..., -1].set(False)
  removed = jnp.put_along_axis(
      jnp.zeros_like(removed), order, removed, axis=-1, inplace=False
  )
  return jnp.where(removed, -jnp.inf, logits)


def min_p(logits: jax.Array, p: float) -> jax.Array:
  """Keeps tokens at least p times as likely as the likeliest one.

  Nguyen et al. 2024, section 3.
  """
  probabilities = jax.nn.softmax(logits, axis=-1)
  floor = p * probabilities.max(axis=-1, keepdims=True)
  return jnp.where(probabilities < floor, -jnp.inf, logits)


@dataclasses.dataclass(frozen=True)
class Scaled:
  """The processor that multiplies the logit of one token by a factor.

  Above 1 it makes a token whose logit is positive likelier (FROMAGe's [RET]).
  """

  token: int
  factor: float

  def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
    """Changes one column of f32[B, V]."""
    del seen  # What came before does not matter.
    return logits.at[:, self.token].multiply(self.factor)


@dataclasses.dataclass(frozen=True)
class Forbidden:
  """The processor that never lets one token come."""

  token: int

  def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
    """Changes one column of f32[B, V]."""
    del seen  # What came before does not matter.
    return logits.at[:, self.token].set(-jnp.inf)


@dataclasses.dataclass(frozen=True)
class Known:
  """The processor that lets only the first `count` tokens come.

  A table may have more rows than its tokenizer has tokens.
  """

  count: int

  def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
    """Changes the last columns of f32[B, V]."""
    del seen  # What came before does not matter.
    return jnp.where(
        jnp.arange(logits.shape[-1]) < self.count, logits, -jnp.inf
    )
