"""Flamingo: pictures and videos among the text of a frozen language model.

Flamingo (Alayrac et al. 2022) and OpenFlamingo (Awadalla et al. 2023). A
resampler makes a few vectors of every picture; between the blocks of the
decoder, gated blocks let each token read those of the last picture before it.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, TypeAlias

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mmjax import config
from mmjax.models import flamingo_layout, llm
from mmjax.nn import cache as caches
from mmjax.nn import linear, norm, perceiver, transformer
from mmjax.nn import mask as masks
from mmjax.nn.cache import Cache
from mmjax.nn.cross import CrossAttention, GatedCrossBlock, Seen
from mmjax.nn.mask import Mask
from mmjax.nn.rope import Rotation
from mmjax.objectives import autoregressive
from mmjax.objectives.term import Context, Term, objective
from mmjax.weights import layout

# Which tokens of the tower the resampler reads.
SELECTS = {"patches": slice(1, None), "all": slice(None)}
# What OpenFlamingo trained, of a file as it releases them.
from_official = flamingo_layout.from_official
# Arrays of the gated blocks and of the decoder's, stacked over layers.
Stack: TypeAlias = Any


def _paper(
    width: int, depth: int, heads: int, every: int
) -> dict[str, Any]:
  """A row of table 5 of the paper.

  Neither tower nor decoder was released. In place of NFNet-F6 stands a ViT of
  its width and size, and the Chinchilla has rotary positions.
  """
  decoder = dict(
      type="mmjax.models.llm:Decoder", vocab=32_000, width=width, depth=depth,
      heads=heads, mlp=4 * width, length=2048,
      position=dict(type="mmjax.nn.rope:Rope", theta=1e4, layout="half"),
      mlp_kind="plain", activation="gelu",
  )  # fmt: skip
  return dict(
      vision=dict(
          type="mmjax.models.clip:encoder", image=(320, 320), patch=16,
          width=1536, depth=15, heads=24, mlp=6144,
      ),
      resampler=dict(
          type="mmjax.nn.perceiver:Resampler", latents=64, depth=6, heads=16,
          head_dim=96, mlp=6144, frames=8,
      ),
      llm=decoder, every=every, heads=heads, head_dim=128, mlp=4 * width,
  )  # fmt: skip


def _open(name: str, every: int) -> dict[str, Any]:
  """OpenFlamingo: CLIP L/14, GELU, gated blocks that end their groups."""
  decoder = dict(llm.SIZES[name], type="mmjax.models.llm:Decoder")
  # <image>, <|endofchunk|> and <PAD> are new.
  decoder["vocab"] += 3
  return dict(
      vision=dict(
          type="mmjax.models.clip:encoder", image=(224, 224), patch=14,
          width=1024, depth=24, heads=16, mlp=4096,
      ),
      resampler=dict(
          type="mmjax.nn.perceiver:Resampler", latents=64, depth=6, heads=8,
          head_dim=64, mlp=4096, activation="gelu",
      ),
      llm=decoder, every=every, first=every - 1, heads=8, head_dim=64,
      mlp=4 * decoder["width"], activation="gelu",
  )  # fmt: skip


SIZES: dict[str, dict[str, Any]] = {
    # For TinyWorld, not in the papers: the tower is that of CLIP tiny.
    "tiny": dict(
        vision=dict(
            type="mmjax.models.clip:encoder", image=(32, 32), patch=8,
            width=96, depth=4, heads=3, mlp=384,
        ),
        resampler=dict(
            type="mmjax.nn.perceiver:Resampler", latents=4, depth=2, heads=4,
            head_dim=24, mlp=384, frames=4, spread=0.02,
        ),
        llm=dict(type="mmjax.models.llm:Decoder", **llm.SIZES["tiny"]),
        every=1, heads=4, head_dim=24, mlp=384, gate=1.0,
        # In the last block of a CLIP only its class token has been trained.
        select="all",
    ),
    "3b": _paper(2048, 24, 16, every=1),
    "9b": _paper(4096, 40, 32, every=4),
    "80b": _paper(8192, 80, 64, every=7),
    # The first release, on LLaMA. Those of the second stand on MPT and
    # RedPajama's GPT-NeoX, which `llm.Decoder` is not.
    "open_9b": _open("llama_7b", every=4),
}  # fmt: skip


@flax.struct.dataclass
class State:
  """What a text so far has left: words and pictures.

  Attributes:
    cache: of the decoder.
    seen: keys and values of the pictures in all gated blocks,
      [G, B, N * R, heads, head_dim].
    media: i32[B], the picture that further text sees; -1 for none.
  """

  cache: Cache
  seen: Seen
  media: jax.Array


def reordered(state: State, index: jax.Array) -> State:
  """The rows `index`, i32[B'], of a state: what beam search needs."""
  return State(
      caches.reordered(state.cache, index),
      Seen(*(x[:, index] for x in state.seen)),
      state.media[index],
  )


class Flamingo(nn.Module):
  """A tower, a resampler, and a decoder with gated blocks in between.

  Attributes:
    vision: a `clip.encoder`.
    resampler: a `perceiver.Resampler`.
    llm: an `llm.Decoder`.
    every: a gated block stands in every group of so many of its blocks.
    first: before which block of the group: 0 in the paper, the last one in
      OpenFlamingo.
    heads: of the gated blocks.
    head_dim: likewise.
    mlp: hidden width of their MLPs.
    activation: of their MLPs, see `perceiver.Resampler`.
    epsilon: of their norms.
    gate: where their gates start. At 0, as in the paper, they are shut, and
      what stands behind them learns only as they open; batches of a few dozen
      rows just push them to and fro. From elsewhere, the last kernels behind
      them start at 0 instead.
    select: name in `SELECTS`.
    remat: of the gated blocks, a name in `transformer.REMAT`.
    dtype: of the gated blocks.
  """

  vision: nn.Module
  resampler: perceiver.Resampler
  llm: llm.Decoder
  every: int
  heads: int
  head_dim: int
  mlp: int
  first: int = 0
  activation: str = "relu2"
  epsilon: float = 1e-5
  gate: float = 0.0
  select: str = "patches"
  remat: str = "none"
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Builds the gated blocks.

    Raises:
      ValueError: for a place outside of its group, or no gated block.
    """
    config.pick(SELECTS, self.select, "select")
    if not 0 <= self.first < min(self.every, self.llm.depth):
      raise ValueError(
          f"first={self.first}: expected 0 to {self.every - 1}, for groups of "
          f"every={self.every} of {self.llm.depth} blocks"
      )
    last = linear.ZEROS if self.gate else linear.FAN_IN_UNIFORM
    self._parts = dict(
        attention=functools.partial(
            CrossAttention,
            self.heads,
            self.head_dim,
            out_init=last,
            dtype=self.dtype,
        ),
        mlp=functools.partial(
            transformer.Mlp,
            self.mlp,
            self.activation,
            dataclasses.replace(perceiver.INIT, down=last),
            dtype=self.dtype,
        ),
        norm=functools.partial(norm.LayerNorm, self.epsilon, self.dtype),
        gate=self.gate,
    )
    self.gates = transformer.stacked(GatedCrossBlock, self.gated, "none")(
        **self._parts
    )

  @property
  def gated(self) -> int:
    """The number of gated blocks."""
    return len(range(self.first, self.llm.depth, self.every))

  @nn.nowrap
  def init_state(self, batch: int, slots: int) -> Cache:
    """An empty cache of the decoder, in which pictures take no slots."""
    return self.llm.init_state(batch, slots)

  def encode(self, images: jax.Array) -> jax.Array:
    """The resampled pictures or videos of each row.

    Args:
      images: f32[B, N, H, W, 3], or f32[B, N, T, H, W, 3] for T frames.

    Returns:
      [B, N, R, C].
    """
    chex.assert_rank(images, {5, 6})
    if images.ndim == 5:
      images = images[:, :, None]
    tokens = self.vision(images.reshape(-1, *images.shape[3:]))
    tokens = tokens[:, SELECTS[self.select]]
    return self.resampler(tokens.reshape(*images.shape[:3], *tokens.shape[1:]))

  def look(self, image: jax.Array) -> jax.Array:
    """The class token f32[B, C] of f32[B, H, W, 3], to compare pictures by."""
    return self.vision(image)[:, 0].astype(jnp.float32)

  def hidden_states(
      self,
      images: jax.Array,
      tokens: jax.Array,
      media: jax.Array,
      position: jax.Array | None = None,
      mask: Mask | None = None,
      state: Cache | None = None,
      count: jax.Array | None = None,
  ) -> tuple[jax.Array, State | None]:
    """What `logits` reads; arguments as of `__call__`."""
    chex.assert_equal_shape([tokens, media])
    pictures = self.encode(images)
    number, length = pictures.shape[1:3]
    pictures = pictures.reshape(len(pictures), number * length, -1)
    if state is not None:
      pictures = self._read(pictures)
    x, cache = self._through(
        tokens,
        pictures,
        masks.media(media, number, length),
        position,
        mask,
        state,
        count,
    )
    if state is None:
      return x, None
    last = tokens.shape[1] - 1 if count is None else count - 1
    last = jnp.broadcast_to(jnp.maximum(last, 0), len(tokens))
    shown = jnp.take_along_axis(media, last[:, None], axis=1)[:, 0]
    return x, State(cache, pictures, shown)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """The scores f32[B, L, V] of the tokens after [B, L, E]."""
    return self.llm.logits(hidden)

  def __call__(
      self,
      images: jax.Array,
      tokens: jax.Array,
      media: jax.Array,
      position: jax.Array | None = None,
      mask: Mask | None = None,
      state: Cache | None = None,
      count: jax.Array | None = None,
  ) -> tuple[jax.Array, State | None]:
    """Scores the next token after each of L tokens.

    Args:
      images: see `encode`.
      tokens: i32[B, L].
      media: i32[B, L], the picture that each token sees; -1 for none.
      position: as of `llm.Decoder`, like the others.
      mask: of the text alone, see there.
      state: see there; to begin with, it has no pictures.
      count: see there.

    Returns:
      f32[B, L, V], and the state if one was given.
    """
    x, state = self.hidden_states(
        images, tokens, media, position, mask, state, count
    )
    return self.logits(x), state

  def prefill(
      self, batch: Mapping[str, jax.Array], state: Cache, count: jax.Array
  ) -> tuple[jax.Array, State]:
    """Reads prompts, see `evals.answers`: f32[B, 1, V] of what follows."""
    x, state = self.hidden_states(
        batch["images"],
        batch["tokens"],
        batch["media"],
        state=state,
        count=count,
    )
    last = jnp.maximum(count - 1, 0)[:, None, None]
    return self.logits(jnp.take_along_axis(x, last, axis=1)), state

  def reply(
      self,
      tokens: jax.Array,
      state: State,
      count: jax.Array | None = None,
  ) -> tuple[jax.Array, State]:
    """As `__call__`, for text behind the last picture of the state."""
    length = self.resampler.latents
    number = state.seen.k.shape[2] // length
    media = jnp.broadcast_to(state.media[:, None], tokens.shape)
    seeing = masks.media(media, number, length)
    x, cache = self._through(
        tokens, state.seen, seeing, state=state.cache, count=count
    )
    return self.logits(x), state.replace(cache=cache)

  def _read(self, pictures: jax.Array) -> Seen:
    """Keys and values in all gated blocks, of [B, N * R, C]."""
    attention = self._parts["attention"](parent=None)
    return jax.lax.map(
        lambda params: attention.apply(
            {"params": params}, pictures, method="read"
        ),
        self.gates.variables["params"]["attention"],
    )

  def _through(
      self,
      tokens: jax.Array,
      pictures: jax.Array | Seen,
      seeing: Mask,
      position: jax.Array | None = None,
      mask: Mask | None = None,
      state: Cache | None = None,
      count: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Runs the decoder with the gated blocks in it.

    Args:
      tokens: i32[B, L].
      pictures: [B, N * R, C] or what `_read` made of them.
      seeing: of L tokens and N * R vectors of pictures.
      position: as of `llm.Decoder`, like the others.
      mask: see there.
      state: see there.
      count: see there.
    """
    x, mask, rotation = self.llm.enter(tokens, None, position, mask, state)
    if self.is_initializing():  # Only to declare all parameters.
      self.llm.blocks((x, None), jnp.arange(self.llm.depth), mask, rotation)
      x, _ = self.gates(x, seeing, pictures)
      return self.llm.leave(x, None)
    x, state = self._interleaved((x, state), pictures, seeing, mask, rotation)
    return self.llm.leave(x, state, count)

  def _interleaved(
      self,
      carry: tuple[jax.Array, Cache | None],
      pictures: jax.Array | Seen,
      seeing: Mask,
      mask: Mask,
      rotation: Rotation | None,
  ) -> tuple[jax.Array, Cache | None]:
    """Scans over groups of a gated block and `every` of the decoder's.

    The parameters stay in their two stacks, so that a decoder can be imported
    as it is; here they are cut into groups.
    """
    block, gate = self.llm.block, GatedCrossBlock(**self._parts, parent=None)
    blocks = self.llm.blocks.variables["params"]
    gates = self.gates.variables["params"]
    many = isinstance(pictures, Seen)

    @functools.partial(_checkpointed, name=self.llm.remat)
    def layer(carry: Any, params_and_number: Any) -> tuple[Any, None]:
      params, number = params_and_number
      return block.apply({"params": params}, carry, number, mask, rotation)

    @functools.partial(_checkpointed, name=self.remat)
    def look(x: jax.Array, params: Any, pictures: Any) -> jax.Array:
      return gate.apply({"params": params}, x, seeing, pictures)[0]

    def group(carry: Any, stacks: tuple[Stack, Stack]) -> tuple[Any, None]:
      (params, seen), layers = stacks
      carry = _scan(layer, carry, _cut(layers, 0, self.first))
      x = look(carry[0], params, seen if many else pictures)
      return _scan(layer, (x, carry[1]), _cut(layers, self.first, None)), None

    seen = pictures if many else None
    layers = blocks, jnp.arange(self.llm.depth)
    whole = self.llm.depth // self.every
    grouped = jax.tree.map(
        lambda x: x.reshape(whole, self.every, *x.shape[1:]),
        _cut(layers, 0, whole * self.every),
    )
    stacks = _cut((gates, seen), 0, whole), grouped
    if whole:
      carry, _ = jax.lax.scan(group, carry, stacks)
    rest = _cut(layers, whole * self.every, None)
    if self.gated > whole:
      last = jax.tree.map(lambda x: x[-1], (gates, seen))
      return group(carry, (last, rest))[0]
    return _scan(layer, carry, rest)


def _checkpointed(function: Any, name: str) -> Any:
  policy = config.pick(transformer.REMAT, name, "remat")
  if policy is None:
    return function
  return jax.checkpoint(function, policy=policy, prevent_cse=False)


def _cut(stack: Stack, begin: int, end: int | None) -> Stack:
  return jax.tree.map(lambda x: x[begin:end], stack)


def _scan(function: Any, carry: Any, stack: Stack) -> Any:
  """A scan that may have nothing to do."""
  if not len(jax.tree.leaves(stack)[0]):
    return carry
  return jax.lax.scan(function, carry, stack)[0]


@objective(
    "images", "tokens", "media", "weight", "segment", "position", "kind"
)
def next_token(
    system: Flamingo,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
    sets: tuple[str, ...],
    chunks: int = 1,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """Cross-entropy of the text of a mixture, by data set (section 2.4).

  One step sums over the data sets what the stage weighs them by, as the
  paper accumulates their gradients. Documents that share a row do not see
  each other. `sets` names the data sets 0, 1, ... of `kind`.
  """
  del context  # No part is random.
  segment = batch["segment"]
  hidden, _ = system.apply(
      variables,
      batch["images"],
      batch["tokens"],
      batch["media"],
      position=batch["position"],
      mask=masks.packed(masks.causal(segment.shape[1]), segment),
      method="hidden_states",
  )
  begins = jnp.diff(segment, axis=1, prepend=segment[:, :1]) != 0
  weight = jnp.where(begins, 0.0, batch["weight"])
  logits = lambda x: system.apply(variables, x, method="logits")
  return autoregressive.next_token_by_kind(
      logits,
      hidden,
      batch["tokens"],
      weight,
      batch["kind"],
      sets,
      chunks=chunks,
  ), {}


LAYOUT = layout.Layout(
    architectures=("Flamingo",),
    system=lambda hf, names: Flamingo(**flamingo_layout.attributes(hf)),
    config=flamingo_layout.config_of,
    table=flamingo_layout.table,
    inputs=lambda system: {
        "images": jax.ShapeDtypeStruct(
            (1, 1, *system.vision.image, 3), jnp.float32
        ),
        "tokens": jax.ShapeDtypeStruct((1, 2), jnp.int32),
        "media": jax.ShapeDtypeStruct((1, 2), jnp.int32),
    },
)
