"""BLIP-2: a Q-Former between a frozen picture encoder and a frozen LLM.

BLIP-2 (Li et al. 2023), section 3.2: what the queries have learned to see (the
first stage, `models.blip2_pretrain`) becomes soft prompts of a language model,
which stand before its text. `BLIP2` holds a decoder (OPT), `BLIP2T5` an
encoder-decoder (FlanT5). Only Q-Former and projection are trained.
"""

from collections.abc import Collection, Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models import blip2_layout, llm, llm_layout, t5, t5_layout, vit
from mmjax.models import qformer as former
from mmjax.nn import linear, norm, transformer
from mmjax.nn.cache import Cache, CrossCache
from mmjax.nn.mask import Mask
from mmjax.objectives import autoregressive
from mmjax.objectives.term import Context, Term, objective
from mmjax.weights import layout


def eva(
    image: tuple[int, int] = (224, 224),
    patch: int = 14,
    width: int = 1408,
    depth: int = 39,
    heads: int = 16,
    mlp: int = 6144,
    activation: str = "gelu",
    epsilon: float = 1e-6,
    biased: tuple[str, ...] = ("query", "value"),
    remat: str = "none",
    dtype: Any = jnp.float32,
    **kwargs: Any,
) -> vit.Encoder:
  """The ViT of EVA-CLIP, whose keys have no bias; g/14 by default.

  Its last block is left out (section 3.4), and with it the norm behind.
  `kwargs` go to the module (`name`).
  """
  init = linear.normal(0.02)
  return vit.Encoder(
      image=image,
      patch=patch,
      width=width,
      depth=depth,
      heads=heads,
      mlp=mlp,
      activation=activation,
      epsilon=epsilon,
      inits=transformer.BlockInit(
          init, linear.ZEROS, init, init, init, linear.ZEROS, biased
      ),
      patch_init=init,
      patch_bias_init=linear.ZEROS,
      cls_init=init,
      position_init=init,
      remat=remat,
      dtype=dtype,
      **kwargs,
  )


_EVA = dict(type="mmjax.models.blip2:eva")
# CLIP L/14 up to its last block but one.
_CLIP = dict(
    type="mmjax.models.clip:encoder",
    image=(224, 224), patch=14, width=1024, depth=23, heads=16, mlp=4096,
)  # fmt: skip
_DECODER = dict(type="mmjax.models.llm:Decoder")
# FlanT5 with the exact GELU that BLIP-2 runs it with.
_T5 = dict(type="mmjax.models.t5:T5", activation="gelu")
_QFORMER = dict(type="mmjax.models.qformer:QFormer")
# Of what a size consists; `llm` is of its second stage.
SIZES: dict[str, dict[str, Any]] = {
    # For TinyWorld, not in the paper: the tower is that of CLIP tiny64.
    "tiny": dict(
        vision=dict(
            type="mmjax.models.clip:encoder",
            image=(64, 64), patch=8, width=96, depth=3, heads=3, mlp=384,
        ),
        qformer=_QFORMER | dict(
            queries=16, width=96, depth=4, heads=4, mlp=384, vocab=1025,
            length=40,
        ),
        embed=64,
        llm=_DECODER | llm.SIZES["tiny"],
        t5=dict(type="mmjax.models.t5:T5", **t5.SIZES["tiny"]),
    ),
    "vitl_opt2.7b": dict(
        vision=_CLIP, qformer=_QFORMER, llm=_DECODER | llm.SIZES["opt_2.7b"]
    ),
    "vitl_flant5xl": dict(
        vision=_CLIP, qformer=_QFORMER, t5=_T5 | t5.SIZES["xl"]
    ),
    "opt2.7b": dict(
        vision=_EVA, qformer=_QFORMER, llm=_DECODER | llm.SIZES["opt_2.7b"]
    ),
    "opt6.7b": dict(
        vision=_EVA, qformer=_QFORMER, llm=_DECODER | llm.SIZES["opt_6.7b"]
    ),
    "flant5xl": dict(
        vision=_EVA, qformer=_QFORMER, t5=_T5 | t5.SIZES["xl"]
    ),
    "flant5xxl": dict(
        vision=_EVA, qformer=_QFORMER, t5=_T5 | t5.SIZES["xxl"]
    ),
}  # fmt: skip


def _prompts(
    system: "BLIP2 | BLIP2T5", image: jax.Array, question: jax.Array | None
) -> jax.Array:
  """Soft prompts [B, (N) * Q, E]; see `BLIP2.encode`."""
  batch, count = len(image), image.shape[1] if image.ndim == 5 else 1
  seen = system.vision(image.reshape(-1, *image.shape[-3:]))
  seen = system.vision_norm(seen)
  mask = None
  if question is not None:
    question = jnp.repeat(question, count, axis=0)
    mask = former.together(system.qformer.queries, question != system.pad)
  queries, _ = system.qformer(seen, question, mask)
  prompts = system.projection(queries.astype(system.dtype))
  return prompts.reshape(batch, -1, prompts.shape[-1])


def _among_words(
    system: "BLIP2 | BLIP2T5",
    prompts: jax.Array,
    tokens: jax.Array,
    source: jax.Array,
) -> jax.Array:
  """Soft prompts in their places [B, L, E]; see `BLIP2.embeddings`."""
  chex.assert_equal_shape([tokens, source])
  words = system.llm.embeddings(jnp.where(source < 0, tokens, 0))
  seen = jnp.take_along_axis(
      prompts, jnp.maximum(source, 0)[..., None], axis=1
  )
  return jnp.where(source[..., None] < 0, words, seen.astype(words.dtype))


class BLIP2(nn.Module):
  """An encoder of pictures, a Q-Former and a decoder.

  Attributes:
    vision: a `vit.Encoder`, such as `eva` makes.
    qformer: a `qformer.QFormer`.
    llm: an `llm.Decoder`.
    pad: the id of padding behind a question to the Q-Former.
    vision_epsilon: of the norm of what the encoder gives.
    dtype: of that norm and of the projection.
  """

  vision: nn.Module
  qformer: former.QFormer
  llm: llm.Decoder
  pad: int = 0
  vision_epsilon: float = 1e-6
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Builds the norm and the projection."""
    self.vision_norm = norm.LayerNorm(self.vision_epsilon, self.dtype)
    self.projection = _projection(self.llm.table or self.llm.width, self.dtype)

  @nn.nowrap
  def init_state(self, batch: int, slots: int) -> Cache:
    """An empty cache of the decoder; soft prompts take slots too."""
    return self.llm.init_state(batch, slots)

  def encode(
      self, image: jax.Array, question: jax.Array | None = None
  ) -> jax.Array:
    """Soft prompts.

    Args:
      image: f32[B, H, W, 3], or f32[B, N, H, W, 3] for several pictures.
      question: i32[B, T] for the Q-Former, which then looks for the answer (the
        fine-tuning of section 4.3); None for queries alone.

    Returns:
      [B, (N) * Q, E].
    """
    return _prompts(self, image, question)

  def embeddings(
      self,
      image: jax.Array,
      tokens: jax.Array,
      source: jax.Array,
      question: jax.Array | None = None,
  ) -> jax.Array:
    """Text with the soft prompts in their places.

    Args:
      image: see `encode`.
      tokens: i32[B, L]; what stands at a placeholder is not read.
      source: i32[B, L], which of the soft prompts stands there; -1 for the
        token itself.
      question: see `encode`.

    Returns:
      [B, L, E].
    """
    return _among_words(self, self.encode(image, question), tokens, source)

  def hidden_states(
      self,
      image: jax.Array,
      tokens: jax.Array,
      source: jax.Array,
      position: jax.Array | None = None,
      mask: Mask | None = None,
      state: Cache | None = None,
      count: jax.Array | None = None,
      question: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """What `logits` reads; arguments as of `__call__`."""
    x = self.embeddings(image, tokens, source, question)
    return self.llm.hidden(None, x, position, mask, state, count)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """The scores f32[B, L, V] of the tokens after [B, L, E]."""
    return self.llm.logits(hidden)

  def __call__(
      self,
      image: jax.Array,
      tokens: jax.Array,
      source: jax.Array,
      position: jax.Array | None = None,
      mask: Mask | None = None,
      state: Cache | None = None,
      count: jax.Array | None = None,
      question: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Scores the next token after each of L tokens.

    Args:
      image: see `encode`.
      tokens: i32[B, L], see `embeddings`.
      source: i32[B, L], see there.
      position: as of `llm.Decoder`, like the others.
      mask: see there.
      state: see there.
      count: see there.
      question: see `encode`.

    Returns:
      f32[B, L, V], and the state.
    """
    x, state = self.hidden_states(
        image, tokens, source, position, mask, state, count, question
    )
    return self.logits(x), state

  def prefill(
      self, batch: Mapping[str, jax.Array], state: Cache, count: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Reads prompts; see `mmjax.evals.answers`."""
    hidden, state = self.hidden_states(
        batch["image"],
        batch["tokens"],
        batch["source"],
        state=state,
        count=count,
        question=batch.get("question"),
    )
    last = jnp.take_along_axis(hidden, count[:, None, None] - 1, axis=1)
    return self.logits(last), state

  def reply(
      self, tokens: jax.Array, state: Cache, count: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Goes on behind what the state holds; see `mmjax.evals.answers`."""
    return self.llm(tokens, state=state, count=count)


class BLIP2T5(nn.Module):
  """An encoder of pictures, a Q-Former and an encoder-decoder.

  Attributes:
    llm: a `t5.T5`; `BLIP2` describes the others.
  """

  vision: nn.Module
  qformer: former.QFormer
  llm: t5.T5
  pad: int = 0
  vision_epsilon: float = 1e-6
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Builds the norm and the projection."""
    self.vision_norm = norm.LayerNorm(self.vision_epsilon, self.dtype)
    self.projection = _projection(self.llm.width, self.dtype)

  @nn.nowrap
  def init_state(self, batch: int, slots: int) -> CrossCache:
    """An empty memory: slots for what is read, and as many for the answer."""
    return self.llm.init_state(batch, slots, slots)

  def encode(
      self, image: jax.Array, question: jax.Array | None = None
  ) -> jax.Array:
    """Soft prompts, see `BLIP2.encode`."""
    return _prompts(self, image, question)

  def read(
      self,
      image: jax.Array,
      tokens: jax.Array,
      source: jax.Array,
      count: jax.Array | None = None,
      question: jax.Array | None = None,
  ) -> jax.Array:
    """What the decoder looks at, [B, L, D].

    Args:
      image: see `BLIP2.encode`.
      tokens: i32[B, L], see `BLIP2.embeddings`.
      source: i32[B, L], see there.
      count: i32[B], how many of the L are no padding on the right; all by
        default.
      question: see `BLIP2.encode`.
    """
    x = _among_words(self, self.encode(image, question), tokens, source)
    return self.llm.encode(embeddings=x, count=count)

  def prefill(
      self, batch: Mapping[str, jax.Array], state: CrossCache, count: jax.Array
  ) -> tuple[jax.Array, CrossCache]:
    """Reads what the encoder is given; see `mmjax.evals.answers`."""
    seen = self.read(
        batch["image"],
        batch["tokens"],
        batch["source"],
        count,
        batch.get("question"),
    )
    start = jnp.full((len(seen), 1), self.llm.start, jnp.int32)
    return self.llm.decode(start, seen, count, state)

  def reply(
      self, tokens: jax.Array, state: CrossCache, count: jax.Array
  ) -> tuple[jax.Array, CrossCache]:
    """Goes on behind what the state holds; see `mmjax.evals.answers`."""
    return self.llm.decode(tokens, state=state, count=count)

  def __call__(
      self,
      image: jax.Array,
      tokens: jax.Array,
      source: jax.Array,
      targets: jax.Array,
      segment: jax.Array | None = None,
      question: jax.Array | None = None,
  ) -> jax.Array:
    """Scores every token of a text given those before it.

    Args:
      image: see `BLIP2.encode`.
      tokens: i32[B, L], what the encoder reads, see `BLIP2.embeddings`.
      source: i32[B, L], see there.
      targets: i32[B, M], the text.
      segment: i32[B, L], 0 where `tokens` are padding (on the right); None
        for none.
      question: see `BLIP2.encode`.

    Returns:
      f32[B, M, V].
    """
    count = None if segment is None else (segment > 0).sum(axis=1)
    seen = self.read(image, tokens, source, count, question)
    before = t5.opened(self.llm, targets)[:, :-1]
    return self.llm.decode(before, seen, count)[0]


def _projection(width: int, dtype: Any) -> linear.Linear:
  return linear.Linear(
      width, ("embed", None), linear.FAN_IN_UNIFORM, dtype=dtype
  )


@objective("image", "tokens", "source", "weight")
def describe(
    system: BLIP2,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
    chunks: int = 1,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """Cross-entropy of a decoder's text behind the soft prompts (section 3.2).

  A batch may have `question`, see `BLIP2.encode`.
  """
  hidden, _ = system.apply(
      variables,
      batch["image"],
      batch["tokens"],
      batch["source"],
      question=batch.get("question"),
      method="hidden_states",
      rngs={"dropout": context.rng},
  )
  logits = lambda x: system.apply(variables, x, method="logits")
  return autoregressive.next_token(
      logits, hidden, batch["tokens"], batch["weight"], chunks=chunks
  ), {}


@objective("image", "tokens", "source", "segment", "targets")
def go_on(
    system: BLIP2T5,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
    chunks: int = 1,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """Cross-entropy of a text whose beginning the encoder reads (section 3.2).

  A batch may have `question`, see `BLIP2.encode`.
  """
  count = (batch["segment"] > 0).sum(axis=1)
  seen = system.apply(
      variables,
      batch["image"],
      batch["tokens"],
      batch["source"],
      count,
      batch.get("question"),
      method="read",
      rngs={"dropout": context.rng},
  )
  inner = {"params": variables["params"]["llm"]}
  return t5.surprise(
      system.llm, inner, seen, count, batch["targets"], chunks
  ), {}


def parts(hf: Mapping[str, Any]) -> dict[str, Any]:
  """Encoder and Q-Former of a config.json."""
  vision = eva(**blip2_layout.vision_attributes(hf))
  return dict(
      vision=vision,
      qformer=former.QFormer(**blip2_layout.qformer_attributes(hf)),
      vision_epsilon=vision.epsilon,
  )


def _from_hf(hf: Mapping[str, Any], names: Collection[str]) -> BLIP2 | BLIP2T5:
  """The system of a config.json; `names` tell whether a T5 has a head."""
  text = hf.get("text_config") or {"model_type": "opt"}
  if text.get("model_type") == "t5":
    own = f"language_model.{t5_layout.HEAD}" in names
    return BLIP2T5(llm=t5.T5(**t5_layout.attributes(text, own)), **parts(hf))
  return BLIP2(llm=llm.Decoder(**llm_layout.attributes(text)), **parts(hf))


def _inputs(system: BLIP2 | BLIP2T5) -> dict[str, jax.ShapeDtypeStruct]:
  image = (1, *system.vision.image, 3)
  names = ["tokens", "source"]
  if isinstance(system, BLIP2T5):
    names.append("targets")
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  return dict.fromkeys(names, tokens) | {
      "image": jax.ShapeDtypeStruct(image, jnp.float32)
  }


# The names of the official code.
official_table = blip2_layout.official_generation

LAYOUT = layout.Layout(
    architectures=("Blip2ForConditionalGeneration",),
    system=_from_hf,
    config=blip2_layout.generation_config,
    table=blip2_layout.generation_table,
    inputs=_inputs,
)
