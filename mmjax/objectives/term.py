"""What is a loss? A total and the weight that it is a total over.

Sums add up over microbatches and shards where means do not, so an objective
never returns a mean: the one train step divides, once, at the end.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

_F = TypeVar("_F", bound=Callable[..., Any])


class Term(NamedTuple):
  """One named part of a loss, or a metric in the same form.

  Attributes:
    total: f32[], the sum of the values.
    weight: f32[], what that is a sum over (examples, tokens, ...). It depends
      on the batch alone, never on parameters.
  """

  total: jax.Array
  weight: jax.Array


class Context(NamedTuple):
  """What an objective knows beside the variables and the batch.

  Attributes:
    step: i32[], the optimizer step, for schedules inside an objective.
    rng: a PRNG key of this step and microbatch.
    shadow: the parameter tree with the leaves of `Stage.shadow` replaced by
      their slow copies (EMA, teacher, fixed reference); no gradient flows into
      it. Without shadow rules it is the parameters themselves.
  """

  step: jax.Array
  rng: jax.Array
  shadow: Any


def objective(*needs: str, couples_batch: bool = False) -> Callable[[_F], _F]:
  """Declares which batch keys an objective needs.

  Args:
    *needs: keys of the batch alphabet.
    couples_batch: whether an example's loss depends on the other examples
      (in-batch negatives). Such a loss is not a sum over microbatches, so
      gradient accumulation is refused for it.
  """

  def declare(function: _F) -> _F:
    function.needs = needs
    function.couples_batch = couples_batch
    return function

  return declare


def mean_term(values: jax.Array, weight: jax.Array | None = None) -> Term:
  """The term whose ratio is the weighted mean of `values` (same shapes)."""
  if weight is None:
    return Term(
        jnp.sum(values, dtype=jnp.float32), jnp.float32(values.size)
    )
  weight = weight.astype(jnp.float32)
  return Term(jnp.sum(values * weight, dtype=jnp.float32), jnp.sum(weight))
