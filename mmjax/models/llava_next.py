"""LLaVA-NeXT: LLaVA for pictures of any resolution (Liu et al. 2024, 1.6).

A picture is seen whole and in tiles; what stands where is decided on the host
(`mmjax.data.anyres`), and a learned vector ends every line of the tiles.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models import llava, llm
from mmjax.nn import linear
from mmjax.nn.cache import Cache
from mmjax.nn.mask import Mask
from mmjax.nn.partitioning import declared, param
from mmjax.objectives import autoregressive
from mmjax.objectives.term import Context, Term, objective
from mmjax.weights import layout
from mmjax.weights.layout import Rule, Table

# (height, width) of the grids, in pixels.
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def _size(**text: Any) -> dict[str, Any]:
  """CLIP L/14@336 up to its last block but one, and a language model."""
  return dict(
      base=dict(
          type="mmjax.models.llava:LLaVA",
          vision=llava.SIZES["v1.5_7b"]["vision"],
          llm=dict(type="mmjax.models.llm:Decoder", **text),
          hidden=text["width"],
      ),
      pinpoints=PINPOINTS,
  )


# Vocabularies have rows for "<image>" and padding, as in transformers' form.
_VICUNA: dict[str, Any] = dict(vocab=32_064)
SIZES: dict[str, dict[str, Any]] = {
    # For TinyWorld, not in the report: the tower is that of CLIP tiny, for
    # pictures of half the side.
    "tiny": dict(
        base=dict(
            type="mmjax.models.llava:LLaVA",
            **llava.SIZES["tiny"]
            | dict(vision=llava.SIZES["tiny"]["vision"] | dict(image=(32, 32))),
        ),
        pinpoints=((32, 64), (64, 32), (64, 64)),
    ),
    "v1.6_vicuna_7b": _size(**llm.SIZES["llama2_7b"] | _VICUNA),
    "v1.6_vicuna_13b": _size(**llm.SIZES["llama2_13b"] | _VICUNA),
    # Mistral 7B v0.2 (Jiang et al. 2023).
    "v1.6_mistral_7b": _size(
        **llm.SIZES["llama2_7b"]
        | dict(
            vocab=32_064, mlp=14_336, groups=8, length=32_768,
            position=dict(type="mmjax.nn.rope:Rope", theta=1e6),
        )
    ),
}  # fmt: skip


class LLaVANext(nn.Module):
  """LLaVA and the end of a line.

  Attributes:
    base: tower, projector and decoder.
    pinpoints: (height, width) of the grids, in pixels, for
      `mmjax.data.anyres`.
  """

  base: llava.LLaVA
  pinpoints: Sequence[tuple[int, int]] = PINPOINTS

  def setup(self) -> None:
    """Declares the end of a line."""
    decoder = self.base.llm
    width = decoder.table or decoder.width
    self.newline = param(
        self,
        "newline",
        declared(linear.normal(width**-0.5), "embed"),
        (width,),
        jnp.float32,
    )

  @nn.nowrap
  def init_state(self, batch: int, slots: int) -> Cache:
    """An empty cache of the decoder; pictures take slots too."""
    return self.base.init_state(batch, slots)

  def encode(self, images: jax.Array) -> jax.Array:
    """Tiles f32[B, N, H, W, 3] to [B, N * patches + 1, E], last the newline."""
    tiles = self.base.encode(images)
    newline = self.newline.astype(tiles.dtype)
    shape = (len(tiles), 1, tiles.shape[-1])
    return jnp.concatenate([tiles, jnp.broadcast_to(newline, shape)], axis=1)

  def hidden_states(
      self,
      images: jax.Array,
      tokens: jax.Array,
      source: jax.Array,
      position: jax.Array | None = None,
      mask: Mask | None = None,
      state: Cache | None = None,
      count: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """What `logits` reads; arguments as of `__call__`."""
    x = self.base.place(self.encode(images), tokens, source)
    return self.base.llm.hidden(None, x, position, mask, state, count)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """The scores f32[B, L, V] of the tokens after [B, L, E]."""
    return self.base.logits(hidden)

  def __call__(
      self,
      images: jax.Array,
      tokens: jax.Array,
      source: jax.Array,
      position: jax.Array | None = None,
      mask: Mask | None = None,
      state: Cache | None = None,
      count: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Scores the next token after each of L tokens.

    Args:
      images: tiles f32[B, N, H, W, 3], see `mmjax.data.anyres.Tiled`.
      tokens: i32[B, L].
      source: i32[B, L], which vector of `encode` stands there; -1 for the
        token itself.
      position: as of `llm.Decoder`, like the others.
      mask: see there.
      state: see there.
      count: see there.

    Returns:
      f32[B, L, V], and the state.
    """
    x, state = self.hidden_states(
        images, tokens, source, position, mask, state, count
    )
    return self.logits(x), state

  def prefill(
      self, batch: Mapping[str, jax.Array], state: Cache, count: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Reads prompts; see `mmjax.evals.answers`."""
    inputs = (batch[key] for key in ("images", "tokens", "source"))
    return self(*inputs, state=state, count=count)

  def reply(
      self, tokens: jax.Array, state: Cache, count: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Goes on behind what the state holds; see `mmjax.evals.answers`."""
    return self.base.reply(tokens, state, count)


@objective("images", "tokens", "source", "weight")
def answer(
    system: LLaVANext,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
    chunks: int = 1,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """Cross-entropy of the tokens that the assistant writes."""
  del context  # No part is random.
  inputs = (batch[key] for key in ("images", "tokens", "source"))
  hidden, _ = system.apply(variables, *inputs, method="hidden_states")
  logits = lambda x: system.apply(variables, x, method="logits")
  return autoregressive.next_token(
      logits, hidden, batch["tokens"], batch["weight"], chunks=chunks
  ), {}


def _from_hf(hf: Mapping[str, Any], names: Collection[str]) -> LLaVANext:
  """The system of a config.json."""
  base = llava.LAYOUT.system(hf, names)
  if base.select != "patches":
    raise ValueError(
        "vision_feature_select_strategy is 'full'; tiles are put together from "
        "patches alone ('default')"
    )
  side = base.vision.image[0]
  found = hf.get("image_grid_pinpoints") or PINPOINTS
  pinpoints = tuple(tuple(shape) for shape in found)
  if any(length < 1 or length % side for pair in pinpoints for length in pair):
    raise ValueError(
        f"image_grid_pinpoints is {found}; expected whole tiles of {side} "
        "pixels"
    )
  return LLaVANext(base, pinpoints)


def _to_hf(system: LLaVANext) -> dict[str, Any]:
  """The config.json of a system."""
  tower = system.base.vision
  return llava.LAYOUT.config(system.base) | dict(
      architectures=["LlavaNextForConditionalGeneration"],
      model_type="llava_next",
      image_grid_pinpoints=[list(shape) for shape in system.pinpoints],
      image_seq_length=(tower.image[0] // tower.patch) ** 2,
  )


def _table(system: LLaVANext) -> Table:
  """As LLaVA's, and the end of a line."""
  return [
      *llava.table(system.base, "base/"),
      Rule("image_newline", "newline"),
      Rule("model.image_newline", "newline"),
  ]


LAYOUT = layout.Layout(
    architectures=("LlavaNextForConditionalGeneration",),
    system=_from_hf,
    config=_to_hf,
    table=_table,
    inputs=lambda system: {
        "images": jax.ShapeDtypeStruct(
            (1, 2, *system.base.vision.image, 3), jnp.float32
        ),
        "tokens": jax.ShapeDtypeStruct((1, 2), jnp.int32),
        "source": jax.ShapeDtypeStruct((1, 2), jnp.int32),
    },
)
