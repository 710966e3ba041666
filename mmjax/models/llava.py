"""LLaVA: a language model that sees through CLIP.

LLaVA (Liu et al. 2023) and LLaVA-1.5 (Liu et al. 2024): the patches of a frozen
CLIP, one block before its last, become vectors of the language model through a
small projector, and stand in the text where the picture was shown.
"""

from collections.abc import Collection, Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import config
from mmjax.models import clip, clip_layout, llm, llm_layout
from mmjax.nn import linear
from mmjax.nn.cache import Cache
from mmjax.nn.mask import Mask
from mmjax.objectives import autoregressive
from mmjax.objectives.term import Context, Term, objective
from mmjax.weights import layout
from mmjax.weights.layout import Ignore, Table

# Which tokens of the tower the language model sees.
SELECTS = {"patches": slice(1, None), "all": slice(None)}


def _size(name: str, image: int, hidden: bool) -> dict[str, Any]:
  """CLIP L/14 up to its last block but one, and a Vicuna."""
  return dict(
      vision=dict(
          type="mmjax.models.clip:encoder",
          image=(image, image), patch=14, width=1024, depth=23, heads=16,
          mlp=4096,
      ),
      llm=dict(type="mmjax.models.llm:Decoder", **llm.SIZES[name]),
      hidden=llm.SIZES[name]["width"] if hidden else None,
  )  # fmt: skip


SIZES: dict[str, dict[str, Any]] = {
    # For TinyWorld, not in the papers: the tower is that of CLIP tiny.
    "tiny": dict(
        vision=dict(
            type="mmjax.models.clip:encoder",
            image=(64, 64), patch=8, width=96, depth=3, heads=3, mlp=384,
        ),
        llm=dict(type="mmjax.models.llm:Decoder", **llm.SIZES["tiny"]),
        hidden=96,
    ),
    "v1_7b": _size("llama_7b", 224, hidden=False),
    "v1_13b": _size("llama_13b", 224, hidden=False),
    "v1.5_7b": _size("llama2_7b", 336, hidden=True),
    "v1.5_13b": _size("llama2_13b", 336, hidden=True),
}  # fmt: skip


class Projector(nn.Module):
  """From the width of the tower to that of the language model.

  Attributes:
    width: of the language model.
    hidden: width between two projections (LLaVA-1.5); None for a single one
      (LLaVA).
    activation: between the two, a name in `linear.ACTIVATIONS`.
    dtype: of the computation.
  """

  width: int
  hidden: int | None = None
  activation: str = "gelu"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D] to [..., width]."""
    if self.hidden is not None:
      x = linear.Linear(
          self.hidden,
          linear.EMBED_TO_MLP,
          linear.FAN_IN_UNIFORM,
          dtype=self.dtype,
          name="up",
      )(x)
      x = linear.ACTIVATIONS[self.activation](x)
    axes = linear.EMBED_TO_MLP[:1] if self.hidden is None else ("mlp",)
    return linear.Linear(
        self.width,
        (*axes, None),
        linear.FAN_IN_UNIFORM,
        dtype=self.dtype,
        name="down",
    )(x)


class LLaVA(nn.Module):
  """A CLIP tower, a projector and a decoder.

  Attributes:
    vision: a `clip.encoder`, without the blocks whose result is not read.
    llm: an `llm.Decoder`.
    hidden: see `Projector`.
    activation: of the projector.
    select: name in `SELECTS`.
    dtype: of the projector.
  """

  vision: nn.Module
  llm: llm.Decoder
  hidden: int | None = None
  activation: str = "gelu"
  select: str = "patches"
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Builds the projector."""
    config.pick(SELECTS, self.select, "select")
    table = self.llm.table or self.llm.width
    self.projector = Projector(table, self.hidden, self.activation, self.dtype)

  @nn.nowrap
  def init_state(self, batch: int, slots: int) -> Cache:
    """An empty cache of the decoder; pictures take slots too."""
    return self.llm.init_state(batch, slots)

  def encode(self, image: jax.Array) -> jax.Array:
    """f32[B, H, W, 3] or f32[B, N, H, W, 3] to [B, (N) * patches, E]."""
    batch = image.shape[0]
    tokens = self.vision(image.reshape(-1, *image.shape[-3:]))
    tokens = tokens[:, SELECTS[self.select]]
    tokens = self.projector(tokens.astype(self.dtype))
    return tokens.reshape(batch, -1, tokens.shape[-1])

  def embeddings(
      self, image: jax.Array, tokens: jax.Array, source: jax.Array
  ) -> jax.Array:
    """Text with the pictures in their places.

    Args:
      image: see `encode`.
      tokens: i32[B, L]; what stands at a placeholder is not read.
      source: i32[B, L], which vector of `encode` stands there; -1 for the
        token itself.

    Returns:
      [B, L, E].
    """
    return self.place(self.encode(image), tokens, source)

  def place(
      self, media: jax.Array, tokens: jax.Array, source: jax.Array
  ) -> jax.Array:
    """Text [B, L, E] with rows of `media` [B, M, E] where `source` says."""
    chex.assert_equal_shape([tokens, source])
    words = self.llm.embeddings(jnp.where(source < 0, tokens, 0))
    seen = jnp.take_along_axis(
        media, jnp.maximum(source, 0)[..., None], axis=1
    )
    return jnp.where(source[..., None] < 0, words, seen.astype(words.dtype))

  def hidden_states(
      self,
      image: jax.Array,
      tokens: jax.Array,
      source: jax.Array,
      position: jax.Array | None = None,
      mask: Mask | None = None,
      state: Cache | None = None,
      count: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """What `logits` reads; arguments as of `__call__`."""
    x = self.embeddings(image, tokens, source)
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
  ) -> tuple[jax.Array, Cache | None]:
    """Scores the next token after each of L tokens.

    Args:
      image: f32[B, H, W, 3], or f32[B, N, H, W, 3] for several pictures.
      tokens: i32[B, L], see `embeddings`.
      source: i32[B, L], see there.
      position: as of `llm.Decoder`, like the others.
      mask: see there.
      state: see there.
      count: see there.

    Returns:
      f32[B, L, V], and the state.
    """
    x, state = self.hidden_states(
        image, tokens, source, position, mask, state, count
    )
    return self.logits(x), state

  def prefill(
      self, batch: Mapping[str, jax.Array], state: Cache, count: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Reads prompts; see `mmjax.evals.answers`."""
    image = batch["images" if "images" in batch else "image"]
    return self(
        image, batch["tokens"], batch["source"], state=state, count=count
    )

  def reply(
      self,
      tokens: jax.Array,
      state: Cache | None = None,
      count: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """As `__call__`, for text behind what the state holds."""
    return self.llm(tokens, state=state, count=count)


@objective("image", "tokens", "source", "weight")
def answer(
    system: LLaVA,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
    chunks: int = 1,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """Cross-entropy of the tokens that the assistant writes (section 4.2)."""
  del context  # No part is random.
  hidden, _ = system.apply(
      variables,
      batch["image"],
      batch["tokens"],
      batch["source"],
      method="hidden_states",
  )
  logits = lambda x: system.apply(variables, x, method="logits")
  return autoregressive.next_token(
      logits, hidden, batch["tokens"], batch["weight"], chunks=chunks
  ), {}


# Where a config.json is silent, transformers takes these (`LlavaConfig`).
_DEFAULTS: dict[str, Any] = dict(
    vision_feature_layer=-2,
    vision_feature_select_strategy="default",
    projector_hidden_act="gelu",
    multimodal_projector_bias=True,
)
_STRATEGIES = {"default": "patches", "full": "all"}
# A tower may go on for so many blocks behind the one that is read.
_MOST_UNREAD = 100


def _from_hf(hf: Mapping[str, Any], names: Collection[str]) -> LLaVA:
  """The system of a config.json, down to the block whose result is read."""
  del names  # The config says everything.
  hf = _DEFAULTS | dict(hf)
  vision = clip_layout.encoder_attributes(hf)
  layer = hf["vision_feature_layer"]
  depth = vision["depth"]
  if not isinstance(layer, int) or not -depth <= layer + 1 <= depth:
    raise ValueError(
        f"vision_feature_layer is {layer}, expected one layer of {depth}"
    )
  if not hf["multimodal_projector_bias"]:
    raise ValueError("multimodal_projector_bias is false; expected true")
  # Layer 0 is what enters the first block, -1 what leaves the last.
  vision["depth"] = layer if layer >= 0 else depth + 1 + layer
  text = llm.Decoder(**llm_layout.attributes(hf["text_config"]))
  select = config.pick(
      _STRATEGIES,
      hf["vision_feature_select_strategy"],
      "vision_feature_select_strategy",
  )
  config.pick(
      linear.ACTIVATIONS, hf["projector_hidden_act"], "projector_hidden_act"
  )
  return LLaVA(
      vision=clip.encoder(**vision),
      llm=text,
      hidden=text.width,
      activation=hf["projector_hidden_act"],
      select=select,
  )


def _to_hf(system: LLaVA) -> dict[str, Any]:
  """The config.json of a system; its tower ends with the block that is read."""
  if system.hidden != system.llm.width:
    raise ValueError(
        f"transformers' LLaVA has a projector of two layers, as wide as the "
        f"language model ({system.llm.width}); hidden is {system.hidden}"
    )
  vision = clip_layout.encoder_config(system.vision)
  strategies = {ours: theirs for theirs, ours in _STRATEGIES.items()}
  return dict(
      architectures=["LlavaForConditionalGeneration"],
      model_type="llava",
      vision_config=vision,
      text_config=llm_layout.config_of(system.llm),
      vision_feature_layer=-1,
      vision_feature_select_strategy=strategies[system.select],
      projector_hidden_act=system.activation,
      # The last id of the vocabulary: no text has it in the released models.
      image_token_index=system.llm.vocab - 1,
      tie_word_embeddings=system.llm.readout == "tied",
  )


def table(system: LLaVA, target: str = "") -> Table:
  """The names that transformers writes, and those of its other releases.

  Args:
    system: whose parameters.
    target: what their paths begin with, as a part of another system.
  """
  rules: list[layout.Rule | Ignore] = []
  for model, language, head in (
      ("", "language_model.model", "language_model.lm_head"),
      ("model.", "model.language_model", "lm_head"),
  ):
    projector = f"{model}multi_modal_projector.linear"
    for tower in ("vision_tower.", "vision_tower.vision_model."):
      rules += clip_layout.encoder_rules(
          f"{model}{tower}", f"{target}vision/"
      )
    rules += [
        *layout.dense(f"{projector}_1", f"{target}projector/up"),
        *layout.dense(f"{projector}_2", f"{target}projector/down"),
        *llm_layout.rules(
            system.llm, body=language, head=head, target=f"{target}llm/"
        ),
    ]
  # Blocks behind the one that is read, and the norm behind them all.
  read = system.vision.depth
  unread = "|".join(str(i) for i in range(read, read + _MOST_UNREAD))
  return [
      *rules,
      Ignore(rf".*vision_tower\..*encoder\.layers\.({unread})\..*"),
      Ignore(r".*vision_tower\.(vision_model\.)?post_layernorm\..*"),
  ]


LAYOUT = layout.Layout(
    architectures=("LlavaForConditionalGeneration",),
    system=_from_hf,
    config=_to_hf,
    table=table,
    inputs=lambda system: {
        "image": jax.ShapeDtypeStruct(
            (1, *system.vision.image, 3), jnp.float32
        ),
        "tokens": jax.ShapeDtypeStruct((1, 2), jnp.int32),
        "source": jax.ShapeDtypeStruct((1, 2), jnp.int32),
    },
)
