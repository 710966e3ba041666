"""How is anything trained? The one step, the same for every objective."""

import jax
import jax.numpy as jnp
import optax

from mmjax import sharding
from mmjax.objectives.term import Context
from mmjax.train.stage import Stage
from mmjax.train.state import TrainState, apply_gradients, nest, select


def train_step(
    stage: Stage, state: TrainState, batch: dict[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Takes one optimizer step on one global batch.

  Only live leaves are differentiated. A step whose loss or gradient is not
  finite changes nothing but its counters.

  Args:
    stage: what to train and how; static under jit.
    state: the state before.
    batch: arrays `[B, ...]`; B is a multiple of `stage.accumulate`.

  Returns:
    The state after, and f32[] metrics: `loss`, every term as a ratio, and
    `grad_norm`.
  """
  rngs = jax.random.split(state.key(), stage.accumulate)
  rows = rngs, sharding.split_rows(batch, stage.accumulate)

  def terms(live, mutables, rng, batch):
    params = state.frozen | live
    shadow = jax.lax.stop_gradient(nest(params | state.shadow))
    return stage.objective(
        stage.system,
        {"params": nest(params)} | mutables,
        batch,
        Context(state.step, rng, shadow),
    )

  def weigh(_, row):  # Weights need no parameters: XLA drops all the rest.
    found, _ = terms(state.live, state.mutables, *row)
    return None, {name: term.weight for name, term in found.items()}

  weights = jax.lax.scan(weigh, None, rows)[1]
  weights = jax.tree.map(lambda w: jnp.maximum(w.sum(), 1e-20), weights)

  def loss(live, mutables, row):
    found, mutables = terms(live, mutables, *row)
    ratios = {name: found[name].total / weights[name] for name in found}
    return stage.combine(ratios, state.step), (ratios, mutables)

  def accumulate(carry, row):
    grads, mutables = carry
    (value, (ratios, mutables)), new = jax.value_and_grad(loss, has_aux=True)(
        state.live, mutables, row
    )
    return (jax.tree.map(jnp.add, grads, new), mutables), {
        "loss": value
    } | ratios

  zeros = jax.tree.map(jnp.zeros_like, state.live), state.mutables
  (grads, mutables), metrics = jax.lax.scan(accumulate, zeros, rows)
  metrics = jax.tree.map(lambda m: m.sum(axis=0), metrics)
  metrics["grad_norm"] = optax.tree.norm(grads)
  finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
  new = apply_gradients(stage, state, grads, mutables)
  return select(finite, new, state), metrics
