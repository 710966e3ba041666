"""Toy systems: one of each kind of training that the one step must carry."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import sharding
from mmjax.nn import linear, quantize, transformer
from mmjax.nn import mask as masks
from mmjax.objectives import contrastive
from mmjax.objectives.classification import softmax_cross_entropy
from mmjax.objectives.term import Term, mean_term, objective
from mmjax.train import optim
from mmjax.train.stage import Stage
from mmjax.train.state import TrainState, make_init
from mmjax.train.step import train_step

B, L, D, V = 8, 6, 16, 11
KINDS = ("contrastive", "autoregressive", "preference", "flow", "codec")


# --- contrastive -------------------------------------------------------------


class Towers(nn.Module):

  @nn.compact
  def __call__(self, image: jax.Array, audio: jax.Array) -> Any:
    def tower(x: jax.Array, name: str) -> jax.Array:
      x = nn.Dense(D, name=name)(x.reshape(x.shape[0], -1))
      return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    return tower(image, "image"), tower(audio, "audio")


@objective("image", "audio", couples_batch=True)
def contrast(system, variables, batch, context):
  left, right = system.apply(variables, batch["image"], batch["audio"])
  return contrastive.info_nce(left, right, jnp.float32(10.0)), {}


# --- autoregressive with frozen parts, and preference ------------------------


class Decoder(nn.Module):

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = linear.Embed(V, D, name="embed")(tokens)
    blocks = transformer.stacked(transformer.Block, 2, "none")
    x, _ = blocks(2, 2 * D, "silu", 1e-5, name="blocks")(
        x, masks.causal(tokens.shape[1])
    )
    return linear.Linear(V, linear.EMBED_TO_VOCAB, name="head")(x)


@objective("tokens", "weight")
def next_token(system, variables, batch, context):
  logits = system.apply(variables, batch["tokens"][:, :-1])
  loss = softmax_cross_entropy(logits, batch["tokens"][:, 1:])
  return {"next_token": mean_term(loss, batch["weight"][:, 1:])}, {}


@objective("tokens", "weight")
def prefer(system, variables, batch, context, beta: float = 0.5):
  """DPO (Rafailov et al. 2023, equation 7); even rows are preferred."""

  def log_prob(params):
    logits = system.apply({"params": params}, batch["tokens"][:, :-1])
    loss = softmax_cross_entropy(logits, batch["tokens"][:, 1:])
    return -(loss * batch["weight"][:, 1:]).sum(axis=1)

  gain = log_prob(variables["params"]) - log_prob(context.shadow)
  margin = beta * (gain[0::2] - gain[1::2])
  return {"preference": mean_term(-jax.nn.log_sigmoid(margin))}, {}


# --- flow matching with EMA --------------------------------------------------


class Velocity(nn.Module):

  @nn.compact
  def __call__(self, image: jax.Array, time: jax.Array) -> jax.Array:
    x = image.reshape(image.shape[0], -1)
    x = jnp.concatenate([x, time[:, None]], axis=1)
    x = nn.silu(nn.Dense(D, name="in")(x))
    return nn.Dense(image[0].size, name="out")(x).reshape(image.shape)


@objective("image")
def flow(system, variables, batch, context):
  """Rectified flow (Liu et al. 2023): regress x1 - x0 on the straight line."""
  x1 = batch["image"]
  noise, when = jax.random.split(context.rng)
  x0 = jax.random.normal(noise, x1.shape)
  t = jax.random.uniform(when, x1.shape[:1])
  at = t[:, None, None, None]
  v = system.apply(variables, (1 - at) * x0 + at * x1, t)
  return {"flow": mean_term(jnp.square(v - (x1 - x0)))}, {}


# --- a GAN codec with an EMA codebook and two optimizers ----------------------


class Codec(nn.Module):
  """Encoder, codebooks that learn by themselves, decoder, discriminator."""

  learning: tuple[str, ...] = (quantize.COLLECTION,)

  def setup(self):
    self.encoder = nn.Dense(3)
    self.quantizer = quantize.ResidualQuantizer(levels=2, codes=5, features=3)
    self.decoder = nn.Dense(D)
    self.discriminator = nn.Dense(1)

  def reconstruct(self, audio):
    found = self.quantizer(self.encoder(audio))
    return self.decoder(found.quantized), found.commitment

  def judge(self, audio):
    return self.discriminator(audio)[:, 0]

  def __call__(self, audio):
    return self.judge(self.reconstruct(audio)[0])


@objective("audio")
def codec(system, variables, batch, context):
  """One scalar for both players: each sees the other through stop_gradient."""
  real = batch["audio"]
  (fake, commitment), mutables = system.apply(
      variables,
      real,
      method="reconstruct",
      mutable=list(system.learning),
      rngs={quantize.COLLECTION: context.rng},
  )
  books = {quantize.COLLECTION: variables[quantize.COLLECTION]}
  fixed = variables | {
      "params": jax.lax.stop_gradient(variables["params"])
  }
  fooled = system.apply(fixed, fake, method="judge")
  on_real = system.apply(variables, real, method="judge")
  on_fake = system.apply(
      variables, jax.lax.stop_gradient(fake), method="judge"
  )
  return {
      "reconstruction": mean_term(jnp.square(fake - real)),
      "commitment": mean_term(commitment),
      "adversarial": mean_term(-fooled),
      "discriminator": mean_term(
          jax.nn.relu(1 - on_real) + jax.nn.relu(1 + on_fake)
      ),
  }, books | mutables


# --- stages and batches -------------------------------------------------------


def stage(kind: str, **changes: Any) -> Stage:
  """The toy stage of a kind; `changes` replace fields."""
  adam = optim.adamw(1e-2)
  common = dict(optim=[(".*", adam)], batch_size=B, steps=10)
  kinds: dict[str, dict[str, Any]] = {
      "contrastive": dict(
          system=Towers(), objective=contrast, weights={"contrastive": 1.0}
      ),
      "autoregressive": dict(
          system=Decoder(),
          objective=next_token,
          weights={"next_token": 1.0},
          optim=[("blocks/.*", None), ("embed/.*", None), (".*", adam)],
      ),
      "preference": dict(
          system=Decoder(),
          objective=prefer,
          weights={"preference": 1.0},
          shadow=((".*", 1.0),),
      ),
      "flow": dict(
          system=Velocity(),
          objective=flow,
          weights={"flow": 1.0},
          shadow=((".*", 0.9),),
      ),
      "codec": dict(
          system=Codec(),
          objective=codec,
          weights={
              "reconstruction": 1.0,
              "commitment": lambda step: jnp.where(step < 5, 0.1, 0.25),
              "adversarial": 0.5,
              "discriminator": 1.0,
          },
          optim=[
              ("discriminator/.*", optim.sgd(1e-2)),
              (".*", adam),
          ],
      ),
  }
  return Stage(**(common | kinds[kind] | changes))


def batch(kind: str, seed: int = 0, rows: int = B) -> dict[str, np.ndarray]:
  """A random batch for a kind of toy."""
  rng = np.random.default_rng(seed)
  image = rng.normal(size=(rows, 2, 2, 3)).astype(np.float32)
  audio = rng.normal(size=(rows, D)).astype(np.float32)
  if kind == "codec":
    return {"audio": audio}
  if kind == "flow":
    return {"image": image, "time": audio[:, 0]}
  if kind == "contrastive":
    return {"image": image, "audio": audio}
  return {
      "tokens": rng.integers(0, V, (rows, L)).astype(np.int32),
      "weight": rng.integers(0, 2, (rows, L)).astype(np.float32),
  }


def start(
    stage: Stage, example: dict[str, np.ndarray], mesh: Any = None
) -> tuple[Callable[..., Any], TrainState]:
  """The jitted step of a stage and its first state."""
  mesh = mesh or sharding.make_mesh({"data": 1}, jax.devices()[:1])
  init, abstract = make_init(stage, example, mesh)
  with jax.set_mesh(mesh):
    state = init(jnp.int32(stage.seed), {})
  places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  step = jax.jit(
      lambda state, batch: train_step(stage, state, batch),
      out_shardings=(places, None),
  )

  def run(state, batch):
    with jax.set_mesh(mesh):
      batch = jax.device_put(batch, sharding.batch_sharding(mesh))
      return step(state, batch)

  run.jitted = step
  return run, state


__all__ = ["KINDS", "Term", "batch", "stage", "start"]
