"""The first stage of BLIP-2: a Q-Former learns what of a picture is sayable.

BLIP-2 (Li et al. 2023), section 3.1: contrast, matching and writing in one
objective, before a frozen picture encoder.
"""

from collections.abc import Callable
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models import blip2, blip2_layout, qformer
from mmjax.nn import linear, norm
from mmjax.nn.partitioning import declared, param
from mmjax.objectives import autoregressive, classification, contrastive
from mmjax.objectives.term import Context, Term, objective
from mmjax.weights import layout


class ImageText(nn.Module):
  """Compares pictures with texts, fast by their vectors or with care.

  Attributes:
    vision: a `vit.Encoder`, such as `blip2.eva` makes.
    qformer: a `qformer.QFormer`.
    embed: width E of the joint space.
    pad: the id of padding behind a text.
    vision_epsilon: of the norm of what the encoder gives; 1e-5 in the official
      code, 1e-6 in transformers.
    dtype: of that norm and the projections.
  """

  vision: nn.Module
  qformer: qformer.QFormer
  embed: int = 256
  pad: int = 0
  vision_epsilon: float = 1e-6
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Builds the norm and the heads."""
    project = functools.partial(
        linear.Linear,
        kernel_init=linear.FAN_IN_UNIFORM,
        axes=linear.EMBED_TO_JOINT,
        dtype=self.dtype,
    )
    self.vision_norm = norm.LayerNorm(self.vision_epsilon, self.dtype)
    self.vision_projection = project(self.embed)
    self.text_projection = project(self.embed)
    self.match_head = project(2)

  def see(self, image: jax.Array) -> jax.Array:
    """What queries look at, [B, K, C], of f32[B, H, W, 3]."""
    return self.vision_norm(self.vision(image))

  def embed_image(self, queries: jax.Array) -> jax.Array:
    """Unit vectors f32[B, Q, E] of queries [B, Q, D]."""
    return norm.normalize(self.vision_projection(queries))

  def embed_text(self, text: jax.Array) -> jax.Array:
    """A unit vector f32[B, E] of [B, T, D]: that of its first token."""
    return norm.normalize(self.text_projection(text[:, 0]))

  def encode_image(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `match` looks at, [B, K, C], and unit vectors f32[B, Q, E]."""
    seen = self.see(image)
    queries, _ = self.qformer(seen)
    return seen, self.embed_image(queries)

  def encode_text(self, tokens: jax.Array) -> jax.Array:
    """The unit vector f32[B, E] of a text i32[B, T]."""
    mask = qformer.together(0, tokens != self.pad)
    return self.embed_text(self.qformer(None, tokens, mask)[1])

  def match(self, seen: jax.Array, tokens: jax.Array) -> jax.Array:
    """Whether a text describes a picture.

    Args:
      seen: [B, K, C], of `see`.
      tokens: i32[B, T].

    Returns:
      f32[B, Q, 2], what each query thinks; their mean is the verdict: the
      scores of no and yes.
    """
    mask = qformer.together(self.qformer.queries, tokens != self.pad)
    queries, _ = self.qformer(seen, tokens, mask)
    return self.match_head(queries).astype(jnp.float32)

  def __call__(
      self, image: jax.Array, tokens: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Compares f32[B, H, W, 3] with i32[B, T].

    Returns:
      The similarity f32[B, B] of each picture and each text, -1 .. 1, and the
      scores f32[B, 2] of no and yes for each pair.
    """
    seen, vectors = self.encode_image(image)
    text = self.encode_text(tokens)
    return similarity(vectors, text), self.match(seen, tokens).mean(axis=1)


def similarity(image: jax.Array, text: jax.Array) -> jax.Array:
  """Of the query that is nearest to the text: f32[N, M].

  Args:
    image: f32[N, Q, E], unit vectors.
    text: f32[M, E], unit vectors.
  """
  return jnp.einsum("nqe,me->nmq", image, text).max(axis=-1)


class Pretraining(nn.Module):
  """An `ImageText` that also writes, with a temperature.

  Attributes:
    model: the `ImageText`.
  """

  model: ImageText

  def setup(self) -> None:
    """Declares the temperature, which divides."""
    self.temperature = param(
        self,
        "temperature",
        declared(nn.initializers.constant(0.07)),
        (),
        jnp.float32,
    )

  def see(self, image: jax.Array) -> jax.Array:
    """As of `ImageText`."""
    return self.model.see(image)

  def match(self, seen: jax.Array, tokens: jax.Array) -> jax.Array:
    """As of `ImageText`."""
    return self.model.match(seen, tokens)

  def encode_image(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As of `ImageText`."""
    return self.model.encode_image(image)

  def encode_text(self, tokens: jax.Array) -> jax.Array:
    """As of `ImageText`."""
    return self.model.encode_text(tokens)

  def compare_and_write(
      self, seen: jax.Array, tokens: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One pass for two losses: both need the queries as they are without text.

    Args:
      seen: [B, K, C], of `see`.
      tokens: i32[B, T].

    Returns:
      The similarity f32[B, B] of each picture and each text, divided by the
      temperature; the tokens i32[B, T] that are written, which begin with [DEC]
      in place of the first; and what `logits` reads, [B, T, D].
    """
    former, length = self.model.qformer, tokens.shape[1]
    written = jnp.asarray(tokens).at[:, 0].set(former.vocab - 1)
    mask = qformer.separate_and_written(
        former.queries, length, tokens != self.model.pad
    )
    both = jnp.concatenate([tokens, written], axis=1)
    queries, texts = former(seen, both, mask, texts=2)
    found = similarity(
        self.model.embed_image(queries),
        self.model.embed_text(texts[:, :length]),
    )
    return found / self.temperature, written, texts[:, length:]

  def logits(self, hidden: jax.Array) -> jax.Array:
    """The scores f32[B, T, V] of the tokens after [B, T, D]."""
    return self.model.qformer.logits(hidden)

  def __call__(
      self, image: jax.Array, tokens: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All three verdicts on f32[B, H, W, 3] and i32[B, T].

    Returns:
      Similarities f32[B, B] by the temperature, scores f32[B, 2] of no and yes,
      and scores f32[B, T, V] of the tokens behind each of the written text.
    """
    seen = self.see(image)
    found, _, hidden = self.compare_and_write(seen, tokens)
    return found, self.match(seen, tokens).mean(axis=1), self.logits(hidden)


@objective("image", "tokens", "identity", couples_batch=True)
def represent(
    system: Pretraining,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
    smoothing: float = 0.1,
    chunks: int = 1,
    draw: Callable[..., jax.Array] = jax.random.categorical,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """Contrast, matching and writing (section 3.1).

  Args:
    system: the system.
    variables: of it.
    batch: `image`, `tokens` and `identity`: of a picture no text of the same
      identity is a negative.
    context: its key draws the negatives.
    smoothing: of the labels of contrast and writing.
    chunks: see `autoregressive.next_token`.
    draw: see `contrastive.hard_negatives`.

  Returns:
    `contrastive`, `matching` and `next_token`, and accuracies of each.
  """
  names = ("image", "text", "compare", "match")
  keys = dict(zip(names, jax.random.split(context.rng, len(names))))
  apply = lambda name, *args, method: system.apply(
      variables, *args, method=method, rngs={"dropout": keys[name]}
  )
  tokens, identity = batch["tokens"], batch["identity"]
  same = identity[:, None] == identity
  seen = system.apply(variables, batch["image"], method="see")
  found, written, hidden = apply(
      "compare", seen, tokens, method="compare_and_write"
  )
  terms = contrastive.paired(found, same, smoothing=smoothing)
  image = contrastive.hard_negatives(keys["image"], found.T, same, draw)
  text = contrastive.hard_negatives(keys["text"], found, same, draw)
  verdict = apply(
      "match",
      jnp.concatenate([seen, seen[image], seen]),
      jnp.concatenate([tokens, tokens, tokens[text]]),
      method="match",
  )
  matched = (jnp.arange(3 * len(tokens)) < len(tokens)).astype(jnp.int32)
  judged = classification.terms(verdict.mean(axis=1), matched)
  said = autoregressive.next_token(
      lambda x: system.apply(variables, x, method="logits"),
      hidden,
      written,
      (tokens != system.model.pad).astype(jnp.float32),
      chunks=chunks,
      smoothing=smoothing,
  )
  return terms | {
      "matching": judged["cross_entropy"],
      "matching_accuracy": judged["accuracy"],
      "next_token": said["next_token"],
      "next_token_accuracy": said["accuracy"],
  }, {}


def _inputs(
    system: ImageText | Pretraining,
) -> dict[str, jax.ShapeDtypeStruct]:
  model = system.model if isinstance(system, Pretraining) else system
  image = (1, *model.vision.image, 3)
  return {
      "image": jax.ShapeDtypeStruct(image, jnp.float32),
      "tokens": jax.ShapeDtypeStruct((1, 2), jnp.int32),
  }


# The names of the official code.
official_table = blip2_layout.official_pretraining

LAYOUT = layout.Layout(
    architectures=("Blip2ForImageTextRetrieval",),
    system=lambda hf, names: ImageText(
        **blip2.parts(hf),
        embed=blip2_layout.joint_width(hf),
    ),
    config=blip2_layout.retrieval_config,
    table=blip2_layout.retrieval_table,
    inputs=_inputs,
)
