"""FROMAGe: a frozen language model that reads, and answers with, pictures.

FROMAGe (Koh et al. 2023): three linear maps and one token, [RET], are all that
is trained between a frozen CLIP and a frozen OPT. One map turns a picture into
vectors among the words; the others bring pictures, and the state at [RET], into
one space, where the text finds its picture.
"""

from collections.abc import Collection, Mapping
import functools
import os
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models import clip, clip_layout, fromage_layout, llm, llm_layout
from mmjax.nn import linear, norm
from mmjax.nn import mask as masks
from mmjax.nn.cache import Cache
from mmjax.nn.mask import Mask
from mmjax.nn.partitioning import declared, param
from mmjax.objectives import autoregressive, contrastive
from mmjax.objectives.term import Context, Term, objective
from mmjax.weights import engine, layout
from mmjax.weights.source import open_source


def _size(name: str, slots: int) -> dict[str, Any]:
  """CLIP L/14 and an OPT whose table ends with <|image|> and [RET]."""
  return dict(
      vision=dict(
          type="mmjax.models.fromage:tower",
          image=(224, 224), patch=14, width=1024, depth=24, heads=16, mlp=4096,
      ),
      llm=dict(
          type="mmjax.models.llm:Decoder", **dict(llm.SIZES[name], vocab=50_267)
      ),
      ret=50_266,
      joint=256,
      slots=slots,
  )  # fmt: skip


SIZES: dict[str, dict[str, Any]] = {
    # For TinyWorld, not in the paper: the tower is that of CLIP tiny.
    "tiny": dict(
        vision=dict(
            type="mmjax.models.fromage:tower",
            image=(32, 32), patch=8, width=96, depth=4, heads=3, mlp=384,
        ),
        llm=dict(type="mmjax.models.llm:Decoder", **llm.SIZES["tiny"]),
        ret=9,
        joint=64,
        slots=1,
    ),
    "opt6.7b": _size("opt_6.7b", 1),
    "opt6.7b_vis4": _size("opt_6.7b", 4),
}  # fmt: skip


class Tower(nn.Module):
  """CLIP's image tower up to its class token, normed and not projected.

  Attributes:
    encoder: a `clip.encoder`.
  """

  encoder: nn.Module

  def setup(self) -> None:
    """Builds the norm behind the blocks."""
    self.norm = norm.LayerNorm(self.encoder.epsilon, self.encoder.dtype)

  def __call__(self, image: jax.Array) -> jax.Array:
    """Maps f32[B, H, W, 3] to [B, D]."""
    return self.norm(self.encoder(image)[:, 0])


def tower(**attributes: Any) -> Tower:
  """The tower around a `clip.encoder` of these attributes."""
  return Tower(clip.encoder(**attributes))


class FROMAGeOutput(NamedTuple):
  """What FROMAGe makes of texts with pictures.

  Attributes:
    logits: f32[B, L, V], scores of the token after each.
    text: f32[B, L, J], unit rows: what each token, were it [RET], looks for.
    image: f32[B, N, J], unit rows.
    scale: f32[], the inverse temperature.
  """

  logits: jax.Array
  text: jax.Array
  image: jax.Array
  scale: jax.Array


class Search(NamedTuple):
  """What texts look for.

  Attributes:
    text: f32[B, J], unit rows.
    asks: bool[B], whether [RET] is the likeliest token where it stands.
  """

  text: jax.Array
  asks: jax.Array


class FROMAGe(nn.Module):
  """A tower and a decoder, both frozen, and the maps between them (section 3).

  Attributes:
    vision: a `Tower`.
    llm: an `llm.Decoder`.
    ret: the id of [RET]. Its row of the decoder's table is never read: the one
      that is trained is a parameter of its own, `ret_row`.
    joint: width J of the space in which texts find pictures.
    slots: vectors of the decoder that stand for a picture, K.
    dtype: of the maps.
  """

  vision: nn.Module
  llm: llm.Decoder
  ret: int
  joint: int = 256
  slots: int = 1
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Declares the maps, the row of [RET] and the temperature."""
    if not 0 <= self.ret < self.llm.vocab:
      raise ValueError(
          f"ret={self.ret}: expected an id of the decoder's {self.llm.vocab}"
      )
    make = functools.partial(
        linear.Linear, kernel_init=linear.FAN_IN_UNIFORM, dtype=self.dtype
    )
    self.words = make((self.slots, self._table), ("embed", None, None))
    self.image_joint = make(self.joint, linear.EMBED_TO_JOINT)
    self.text_joint = make(self.joint, linear.EMBED_TO_JOINT)
    self.ret_row = param(
        self,
        "ret_row",
        declared(linear.normal(self.llm.std), "embed"),
        (self._table,),
        jnp.float32,
    )
    self.logit_scale = param(
        self,
        "logit_scale",
        declared(nn.initializers.constant(np.log(1 / 0.07))),
        (),
        jnp.float32,
    )

  @property
  def _table(self) -> int:
    return self.llm.table or self.llm.width

  @nn.nowrap
  def init_state(self, batch: int, slots: int) -> Cache:
    """An empty cache of the decoder; pictures take slots too."""
    return self.llm.init_state(batch, slots)

  def look(self, images: jax.Array) -> jax.Array:
    """What the tower sees in f32[B, N, H, W, 3]: [B, N, D]."""
    chex.assert_rank(images, 5)
    seen = self.vision(images.reshape(-1, *images.shape[2:]))
    return seen.reshape(*images.shape[:2], -1)

  def embed_seen(self, seen: jax.Array) -> jax.Array:
    """Where [..., D] of the tower lies in the joint space: f32[..., J]."""
    return norm.normalize(self.image_joint(seen.astype(self.dtype)))

  def embed_image(self, image: jax.Array) -> jax.Array:
    """Where f32[B, H, W, 3] lie in the joint space: f32[B, J]."""
    return self.embed_seen(self.vision(image))

  def embed_text(self, hidden: jax.Array) -> jax.Array:
    """What states [..., E] at [RET] look for: f32[..., J]."""
    return norm.normalize(self.text_joint(hidden.astype(self.dtype)))

  def embeddings(
      self,
      tokens: jax.Array,
      source: jax.Array | None = None,
      seen: jax.Array | None = None,
  ) -> jax.Array:
    """Words, the own row of [RET], and pictures in their places.

    Args:
      tokens: i32[B, L]; what stands at a picture is not read.
      source: i32[B, L], which of the N * K vectors of the pictures stands
        there, -1 for the token itself; None where there are no pictures.
      seen: [B, N, D], see `look`.

    Returns:
      [B, L, E].
    """
    if source is not None:
      tokens = jnp.where(source < 0, tokens, 0)
    words = self.llm.embeddings(tokens)
    own = self.ret_row.astype(words.dtype)
    words = jnp.where((tokens == self.ret)[..., None], own, words)
    if source is None:
      return words
    media = self.words(seen.astype(self.dtype))
    media = media.reshape(media.shape[0], -1, self._table).astype(words.dtype)
    chosen = jnp.take_along_axis(
        media, jnp.maximum(source, 0)[..., None], axis=1
    )
    return jnp.where(source[..., None] < 0, words, chosen)

  def hidden_states(
      self,
      tokens: jax.Array,
      source: jax.Array | None = None,
      seen: jax.Array | None = None,
      position: jax.Array | None = None,
      mask: Mask | None = None,
      state: Cache | None = None,
      count: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """What `logits` reads; arguments as of `embeddings` and `llm.Decoder`."""
    x = self.embeddings(tokens, source, seen)
    return self.llm.hidden(None, x, position, mask, state, count)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """The scores f32[B, L, V] of the tokens after [B, L, E]."""
    scores = self.llm.logits(hidden)
    own = jnp.matmul(
        hidden.astype(self.llm.dtype),
        self.ret_row.astype(self.llm.dtype),
        preferred_element_type=jnp.float32,
    )
    is_ret = jnp.arange(self.llm.vocab) == self.ret
    return jnp.where(is_ret, own[..., None], scores)

  def __call__(
      self,
      images: jax.Array,
      tokens: jax.Array,
      source: jax.Array,
      position: jax.Array | None = None,
      segment: jax.Array | None = None,
  ) -> FROMAGeOutput:
    """Reads rows of one or several texts with pictures in them.

    Args:
      images: f32[B, N, H, W, 3].
      tokens: i32[B, L], see `embeddings`.
      source: i32[B, L], see there.
      position: i32[B, L], counted from the row's beginning by default.
      segment: i32[B, L], which text of its row a token belongs to.
    """
    seen = self.look(images)
    hidden, _ = self.hidden_states(
        tokens, source, seen, position, _packed(segment)
    )
    return FROMAGeOutput(
        self.logits(hidden),
        self.embed_text(hidden),
        self.embed_seen(seen),
        jnp.exp(self.logit_scale),
    )

  def prefill(
      self, batch: Mapping[str, jax.Array], state: Cache, count: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Reads prompts with or without `images`; see `mmjax.evals.answers`."""
    source = seen = None
    if "images" in batch:
      source, seen = batch["source"], self.look(batch["images"])
    hidden, state = self.hidden_states(
        batch["tokens"], source, seen, state=state, count=count
    )
    return self.logits(hidden), state

  def reply(
      self, tokens: jax.Array, state: Cache, count: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Goes on behind what the state holds; see `mmjax.evals.answers`."""
    hidden, state = self.hidden_states(tokens, state=state, count=count)
    return self.logits(hidden), state

  def seek(self, state: Cache) -> tuple[jax.Array, Cache]:
    """Reads a [RET] behind what the state holds; f32[B, J] it looks for."""
    tokens = jnp.full((state.length.shape[0], 1), self.ret, jnp.int32)
    hidden, state = self.hidden_states(tokens, state=state)
    return self.embed_text(hidden[:, 0]), state

  def find(self, tokens: jax.Array, anchor: jax.Array) -> Search:
    """What texts alone look for; see `mmjax.evals.dialogue_retrieval`.

    Args:
      tokens: i32[B, L].
      anchor: i32[B], where each has its [RET].
    """
    hidden, _ = self.hidden_states(tokens)
    at = lambda index: jnp.take_along_axis(hidden, index[:, None, None], axis=1)
    guess = self.logits(at(anchor - 1))[:, 0].argmax(axis=-1)
    return Search(self.embed_text(at(anchor)[:, 0]), guess == self.ret)


def _packed(segment: jax.Array | None) -> Mask | None:
  """Causal, and no text sees another of its row; None for the default."""
  if segment is None:
    return None
  return masks.packed(masks.causal(segment.shape[1]), segment)


@objective(
    "images", "tokens", "source", "weight", "segment", "position", "media",
    "anchors", couples_batch=True,
)  # fmt: skip
def ground(
    system: FROMAGe,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
    chunks: int = 1,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """Captioning and retrieval at once (equations 1 to 4).

  A row holds texts behind their pictures, which are captioned, and the same
  texts alone, which end in [RET]; `anchors` says where, for each picture.
  `chunks` bounds the memory of logits, see `objectives.autoregressive`.

  Returns:
    `caption` and `text`, the cross-entropy of the tokens of either kind (nats),
    their accuracies `caption_accuracy` and `text_accuracy`, and the terms of
    `objectives.contrastive.info_nce` (pictures left); no mutables.
  """
  del context  # No part is random.
  apply = functools.partial(system.apply, variables)
  seen = apply(batch["images"], method="look")
  hidden, _ = apply(
      batch["tokens"], batch["source"], seen, batch["position"],
      _packed(batch["segment"]), method="hidden_states",
  )  # fmt: skip
  terms = {}
  shown = batch["media"] >= 0
  for name, chosen in (("caption", shown), ("text", ~shown)):
    found = autoregressive.next_token(
        lambda x: apply(x, method="logits"), hidden, batch["tokens"],
        batch["weight"] * chosen, chunks=chunks,
    )  # fmt: skip
    terms[name] = found["next_token"]
    terms[f"{name}_accuracy"] = found["accuracy"]
  ends = jnp.take_along_axis(hidden, batch["anchors"][..., None], axis=1)
  text = apply(ends, method="embed_text")
  image = apply(seen, method="embed_seen")
  rows = lambda x: x.reshape(-1, x.shape[-1])
  scale = jnp.exp(variables["params"]["logit_scale"])
  return terms | contrastive.info_nce(rows(image), rows(text), scale), {}


def from_official(
    system: FROMAGe,
    abstract: Mapping[str, Any],
    *,
    path: str | os.PathLike[str],
) -> dict[str, jax.Array]:
  """The trained parameters, of a file with the official names.

  For `Stage.imports`; CLIP and OPT come from their own checkpoints.

  Args:
    system: what is filled.
    abstract: path -> shape, dtype and sharding of its parameters.
    path: a `.safetensors` or `.npz` with the official `state_dict`.

  Raises:
    ValueError: naming all tensors that do not fit.
  """
  table = fromage_layout.trained_table(system)
  trained = {rule.target for rule in table}
  wanted = {name: abstract[name] for name in abstract if name in trained}
  places = {name: leaf.sharding for name, leaf in wanted.items()}
  return engine.load(open_source(path), table, wanted, shardings=places)


def _from_hf(hf: Mapping[str, Any], names: Collection[str]) -> FROMAGe:
  """The system of a config.json."""
  del names  # The config says everything.
  return FROMAGe(
      vision=tower(**clip_layout.encoder_attributes(hf)),
      llm=llm.Decoder(**llm_layout.attributes(hf["text_config"])),
      **fromage_layout.attributes(hf),
  )


LAYOUT = layout.Layout(
    architectures=(fromage_layout.ARCHITECTURE,),
    system=_from_hf,
    config=fromage_layout.config_of,
    table=fromage_layout.table,
    inputs=lambda system: {
        "images": jax.ShapeDtypeStruct(
            (1, 1, *system.vision.encoder.image, 3), jnp.float32
        ),
        "tokens": jax.ShapeDtypeStruct((1, 2), jnp.int32),
        "source": jax.ShapeDtypeStruct((1, 2), jnp.int32),
    },
)
