"""Optimizers and schedules that configs name, and their split over parameters.

Parameters, gradients and optimizer states are flat dicts `path -> array`.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmjax.train import rules as rules_lib

Rules = Sequence[tuple[str, optax.GradientTransformation | None]]
Schedule = Callable[[jax.Array], jax.Array]


def cosine(
    peak: float, steps: int, warmup: int = 0, end: float = 0.0
) -> Schedule:
  """Linear warm-up from zero, then a half cosine down to `end`.

  A run that is shorter than its warm-up ends within it.

  Args:
    peak: the highest value.
    steps: total steps, warm-up included.
    warmup: steps of warm-up.
    end: the last value.
  """
  decay = lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x))
  return functools.partial(_warm_up_and_decay, peak, steps, warmup, end, decay)


def linear(
    peak: float, steps: int, warmup: int = 0, end: float = 0.0
) -> Schedule:
  """As `cosine`, with a straight line down to `end`."""
  decay = lambda x: 1 - x
  return functools.partial(_warm_up_and_decay, peak, steps, warmup, end, decay)


def _warm_up_and_decay(
    peak: float,
    steps: int,
    warmup: int,
    end: float,
    decay: Schedule,
    step: jax.Array,
) -> jax.Array:
  """`decay` falls from 1 to 0 as its argument goes from 0 to 1."""
  done = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
  return jnp.where(
      step < warmup,
      peak * step / max(warmup, 1),
      end + (peak - end) * decay(done),
  )


def adamw(
    lr: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: str = ".*kernel",
    clip: float | None = None,
    maximum: float | None = None,
    like_rows: Mapping[str, str] | None = None,
) -> optax.GradientTransformation:
  """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

  Args:
    lr: learning rate or schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: factor, multiplied by the learning rate.
    decay: which parameters decay; matched against whole paths.
    clip: largest global norm of the gradients of this rule.
    maximum: the parameters are kept at or below it (CLIP's temperature).
    like_rows: see `keep_like_rows` (FROMAGe's [RET]).
  """
  return optax.chain(
      optax.clip_by_global_norm(clip) if clip else optax.identity(),
      optax.scale_by_adam(b1, b2, eps),
      _decay(weight_decay, decay),
      optax.scale_by_learning_rate(lr),
      optax.identity() if maximum is None else keep_below(maximum),
      keep_like_rows(like_rows) if like_rows else optax.identity(),
  )


def sgd(
    lr: float | Schedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    decay: str = ".*kernel",
    clip: float | None = None,
) -> optax.GradientTransformation:
  """Gradient descent with momentum and decoupled weight decay."""
  return optax.chain(
      optax.clip_by_global_norm(clip) if clip else optax.identity(),
      optax.trace(momentum),
      _decay(weight_decay, decay),
      optax.scale_by_learning_rate(lr),
  )


def _decay(factor: float, pattern: str) -> optax.GradientTransformation:
  if not factor:
    return optax.identity()

  def mask(params: Mapping[str, Any]) -> dict[str, bool]:
    return {path: bool(re.fullmatch(pattern, path)) for path in params}

  return optax.add_decayed_weights(factor, mask)


def keep_below(maximum: float) -> optax.GradientTransformation:
  """Cuts updates so that no parameter ends above `maximum`.

  Unlike a clamp in the forward pass it leaves the gradient alive, so that a
  parameter at the bound can come down again.
  """

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    cut = lambda u, p: jnp.minimum(p + u, maximum) - p
    return jax.tree.map(cut, updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def keep_like_rows(
    tables: Mapping[str, str],
) -> optax.GradientTransformationExtraArgs:
  """Keeps vectors as long as the mean row of a table that is not trained.

  Args:
    tables: path of a trained vector f32[D] -> path of a frozen table [V, D].
  """

  def update(
      updates: Mapping[str, Any],
      state: Any,
      params: Any = None,
      *,
      frozen: Mapping[str, jax.Array],
      **extra: Any,
  ) -> tuple[dict[str, Any], Any]:
    del extra  # Of other transformations.
    updates = dict(updates)
    for path, table in tables.items():
      rows = frozen[table].astype(jnp.float32)
      moved = params[path] + updates[path]
      length = jnp.linalg.norm(rows, axis=-1).mean() / jnp.linalg.norm(moved)
      updates[path] = length * moved - params[path]
    return updates, state

  return optax.GradientTransformationExtraArgs(
      lambda params: optax.EmptyState(), update
  )


def live_paths(paths: Sequence[str], rules: Rules) -> set[str]:
  """The paths whose rule is not None, i.e. which are trained."""
  owner = rules_lib.assign(paths, [pattern for pattern, _ in rules], "optim")
  return {path for path, index in owner.items() if rules[index][1] is not None}


def partition(
    paths: Sequence[str], rules: Rules
) -> optax.GradientTransformationExtraArgs:
  """One transformation that gives each live parameter to its rule's.

  Args:
    paths: of all parameters, live and frozen.
    rules: ordered (pattern, transformation); None freezes.

  Returns:
    A transformation of live parameters, whose state is a dict from the number
    of a rule to the state of its transformation. Further arguments of its
    `update` go to them all.
  """
  owner = rules_lib.assign(paths, [pattern for pattern, _ in rules], "optim")
  makers = [rule and optax.with_extra_args_support(rule) for _, rule in rules]
  groups: dict[int, list[str]] = {}
  for path, index in owner.items():
    if rules[index][1] is not None:
      groups.setdefault(index, []).append(path)

  def take(tree: Mapping[str, Any], index: int) -> dict[str, Any]:
    return {path: tree[path] for path in groups[index]}

  def init(params: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(index): makers[index].init(take(params, index))
        for index in groups
    }

  def update(
      updates: Mapping[str, Any],
      state: Mapping[str, Any],
      params: Any = None,
      **extra: Any,
  ) -> tuple[dict[str, Any], dict[str, Any]]:
    new_updates, new_state = {}, {}
    for index in groups:
      out, new_state[str(index)] = makers[index].update(
          take(updates, index), state[str(index)], take(params, index), **extra
      )
      new_updates.update(out)
    return new_updates, new_state

  return optax.GradientTransformationExtraArgs(init, update)
