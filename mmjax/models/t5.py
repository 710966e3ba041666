"""T5, T5 1.1 and Flan-T5: an encoder, and a decoder that looks at it.

T5 (Raffel et al. 2020) with the changes of version 1.1 (gated MLPs, a head of
its own; Shazeer 2020), which Flan-T5 (Chung et al. 2022) goes on from.
Distances between tokens enter as learned biases on the scores, one table for
each stack.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import config
from mmjax.models import t5_layout
from mmjax.nn import attention, cache, linear, norm, transformer
from mmjax.nn import mask as masks
from mmjax.nn.cache import CrossCache
from mmjax.nn.relative_position import RelativePositions
from mmjax.objectives import autoregressive
from mmjax.objectives.term import Context, Term, objective
from mmjax.weights import layout

MLPS = {"gated": transformer.GatedMlp, "plain": transformer.Mlp}
READOUTS = ("own", "tied")


def _first(
    width: int, depth: int, heads: int, mlp: int, head_dim: int = 64
) -> dict[str, Any]:
  """A size of the paper (section 3.7): plain MLPs, the token table read out."""
  return dict(
      vocab=32_128, width=width, encoder_depth=depth, decoder_depth=depth,
      heads=heads, head_dim=head_dim, mlp=mlp, mlp_kind="plain",
      activation="relu", readout="tied", logit_scale=width**-0.5,
  )  # fmt: skip


def _second(width: int, depth: int, heads: int, mlp: int) -> dict[str, Any]:
  """A size of T5 1.1, and of Flan-T5."""
  own = dict(mlp_kind="gated", activation="gelu_new", readout="own")
  return _first(width, depth, heads, mlp) | own | dict(logit_scale=1.0)


SIZES: dict[str, dict[str, Any]] = {
    # For TinyWorld, not in a paper.
    "tiny": _second(96, 3, 4, 256) | dict(vocab=1024, head_dim=24),
    "v1_small": _first(512, 6, 8, 2048),
    "v1_base": _first(768, 12, 12, 3072),
    "v1_large": _first(1024, 24, 16, 4096),
    "v1_3b": _first(1024, 24, 32, 16_384, head_dim=128),
    "v1_11b": _first(1024, 24, 128, 65_536, head_dim=128),
    "small": _second(512, 8, 6, 1024),
    "base": _second(768, 12, 12, 2048),
    "large": _second(1024, 24, 16, 2816),
    "xl": _second(2048, 24, 32, 5120),
    "xxl": _second(4096, 24, 64, 10_240),
}


@dataclasses.dataclass(frozen=True)
class Parts:
  """What the blocks of both stacks are made of; attributes as of `T5`."""

  width: int
  heads: int
  head_dim: int
  mlp: int
  mlp_kind: str
  activation: str
  buckets: int
  longest: int
  epsilon: float
  dtype: Any

  def attention(self, kind: Any, **kwargs: Any) -> Any:
    """An attention whose scores are not scaled; the first values make up."""
    return functools.partial(
        kind,
        heads=self.heads,
        head_dim=self.head_dim,
        qkv_init=linear.normal(self.width**-0.5),
        query_init=linear.normal((self.width * self.head_dim) ** -0.5),
        out_init=linear.normal((self.heads * self.head_dim) ** -0.5),
        scale=1.0,
        dtype=self.dtype,
        **kwargs,
    )

  def own_attention(self) -> Any:
    """To the sequence itself."""
    return self.attention(attention.CachedAttention, groups=self.heads)

  def feed_forward(self) -> Any:
    """The MLP."""
    inits = transformer.BlockInit(
        up=linear.normal(self.width**-0.5),
        down=linear.normal(self.mlp**-0.5),
        mlp_bias=None,
    )
    kind = config.pick(MLPS, self.mlp_kind, "mlp_kind")
    config.pick(linear.ACTIVATIONS, self.activation, "activation")
    return functools.partial(
        kind, self.mlp, self.activation, inits, dtype=self.dtype
    )

  def norm(self) -> Any:
    """The norm before each part of a block, and behind the last block."""
    return functools.partial(norm.RMSNorm, self.epsilon, self.dtype)

  def positions(self, sides: str) -> RelativePositions:
    """The biases that all blocks of a stack share."""
    return RelativePositions(
        self.heads,
        self.buckets,
        self.longest,
        sides,
        linear.normal(self.width**-0.5),
    )


class Encoder(nn.Module):
  """The stack that reads.

  Attributes:
    depth: number of blocks.
    parts: of a block.
    remat: name in `transformer.REMAT`.
  """

  depth: int
  parts: Parts
  remat: str = "none"

  def setup(self) -> None:
    """Builds the parts."""
    parts = self.parts
    self.position = parts.positions("both")
    self.blocks = transformer.stacked(
        transformer.CachedBlock,
        self.depth,
        self.remat,
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
    )(parts.own_attention(), parts.feed_forward(), parts.norm())
    self.norm = parts.norm()()

  def __call__(
      self, x: jax.Array, count: jax.Array | None = None
  ) -> jax.Array:
    """Maps [B, K, D] to [B, K, D]; see `T5.encode`."""
    length = x.shape[1]
    place = jnp.arange(length)[None]
    mask = masks.full(length)
    if count is not None:
      mask = masks.padded(mask, place < count[:, None])
    layers, bias = jnp.arange(self.depth), self.position(place, place)
    x = x.astype(self.parts.dtype)
    (x, _), _ = self.blocks((x, None), layers, mask, None, bias)
    return self.norm(x)


class Decoder(nn.Module):
  """The stack that writes, looking at what the other has read.

  Attributes:
    depth: number of blocks.
    parts: of a block.
    remat: name in `transformer.REMAT`.
  """

  depth: int
  parts: Parts
  remat: str = "none"

  def setup(self) -> None:
    """Builds the parts."""
    parts = self.parts
    self.position = parts.positions("past")
    self.blocks = transformer.stacked(
        transformer.CachedCrossBlock,
        self.depth,
        self.remat,
        in_axes=(0, *(nn.broadcast,) * 4),
    )(
        parts.own_attention(),
        parts.attention(attention.CachedCrossAttention),
        parts.feed_forward(),
        parts.norm(),
    )
    self.norm = parts.norm()()

  def __call__(
      self,
      x: jax.Array,
      seen: jax.Array | None,
      seen_count: jax.Array | None,
      state: CrossCache | None,
      count: jax.Array | None,
  ) -> tuple[jax.Array, CrossCache | None]:
    """Maps [B, T, D] to [B, T, D]; see `T5.decode`."""
    length = x.shape[1]
    query = key = jnp.arange(length)[None]
    mask = masks.causal(length)
    if state is not None:
      query, mask = state.own.positions(length), state.own.mask(length)
      key = jnp.arange(state.own.slots)[None]
    if seen is None:
      seen_mask = state.seen_mask(length)
    else:
      seen_mask = masks.full(length, seen.shape[1])
      if seen_count is not None:
        there = jnp.arange(seen.shape[1]) < seen_count[:, None]
        seen_mask = masks.padded(seen_mask, there)
    layers, bias = jnp.arange(self.depth), self.position(query, key)
    x = x.astype(self.parts.dtype)
    (x, state), _ = self.blocks(
        (x, state), layers, mask, seen_mask, seen, bias
    )
    if state is not None:
      own = state.own.advanced(length if count is None else count)
      other = state.seen
      if seen is not None:
        every = seen.shape[1] if seen_count is None else seen_count
        other = other.advanced(every)
      state = CrossCache(own, other)
    return self.norm(x), state


class T5(nn.Module):
  """An encoder-decoder transformer.

  Attributes:
    vocab: number of token ids V, unused rows included.
    width: D.
    encoder_depth: blocks of the encoder.
    decoder_depth: blocks of the decoder.
    heads: of every attention.
    head_dim: width of a head; the heads need not make up D.
    mlp: hidden width of the MLPs.
    mlp_kind: name in `MLPS`.
    activation: name in `linear.ACTIVATIONS`; "gelu_new" is the tanh
      approximation, BLIP-2 takes the exact "gelu" instead.
    readout: of `READOUTS`: a head of its own, or the token table again.
    logit_scale: factor on what is read out: D ** -0.5 in T5 1.0.
    buckets: of distances, see `nn.relative_position.bucket`.
    longest: likewise.
    epsilon: of every norm.
    start: the token that the decoder begins with.
    remat: name in `transformer.REMAT`.
    dtype: of the computation and of caches; logits are float32.
  """

  vocab: int
  width: int
  encoder_depth: int
  decoder_depth: int
  heads: int
  head_dim: int
  mlp: int
  mlp_kind: str = "gated"
  activation: str = "gelu_new"
  readout: str = "own"
  logit_scale: float = 1.0
  buckets: int = 32
  longest: int = 128
  epsilon: float = 1e-6
  start: int = 0
  remat: str = "none"
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Builds the parts; refuses words that name none."""
    config.pick(dict.fromkeys(READOUTS), self.readout, "readout")
    parts = Parts(
        self.width, self.heads, self.head_dim, self.mlp, self.mlp_kind,
        self.activation, self.buckets, self.longest, self.epsilon, self.dtype,
    )  # fmt: skip
    self.embed = linear.Embed(
        self.vocab, self.width, linear.normal(1.0), self.dtype
    )
    self.encoder = Encoder(self.encoder_depth, parts, self.remat)
    self.decoder = Decoder(self.decoder_depth, parts, self.remat)
    if self.readout == "own":
      # As in t5x; the first values of the table would drown the signal.
      self.head = linear.Head(self.vocab, self.width**-0.5, self.dtype)

  @nn.nowrap
  def init_state(
      self, batch: int, slots: int, seen: int | None = None
  ) -> CrossCache:
    """An empty memory of the decoder.

    Args:
      batch: B.
      slots: tokens that a row may write.
      seen: vectors of the encoder that a row may look at, padding included;
        as many as `slots` by default.
    """
    seen = slots if seen is None else seen
    empty = lambda slots: cache.empty(
        self.decoder_depth, batch, self.heads, slots, self.head_dim, self.dtype
    )
    return CrossCache(empty(slots), empty(seen))

  def embeddings(self, tokens: jax.Array) -> jax.Array:
    """The vectors [B, L, D] of i32[B, L], for others to be put among."""
    return self.embed(tokens)

  def encode(
      self,
      tokens: jax.Array | None = None,
      embeddings: jax.Array | None = None,
      count: jax.Array | None = None,
  ) -> jax.Array:
    """What the decoder looks at.

    Args:
      tokens: i32[B, K]; or
      embeddings: [B, K, D], such as soft prompts before those of tokens.
      count: i32[B], how many of the K are no padding on the right; all by
        default.

    Returns:
      [B, K, D].

    Raises:
      ValueError: for both or neither of tokens and embeddings, or embeddings of
        another width.
    """
    if (tokens is None) == (embeddings is None):
      raise ValueError("encoder: expected either tokens or embeddings")
    x = self.embed(tokens) if embeddings is None else embeddings
    if x.shape[-1] != self.width:
      raise ValueError(
          f"embeddings of width {x.shape[-1]}: the model's tokens have "
          f"{self.width}"
      )
    return self.encoder(x, count)

  def decode_hidden(
      self,
      tokens: jax.Array,
      seen: jax.Array | None = None,
      seen_count: jax.Array | None = None,
      state: CrossCache | None = None,
      count: jax.Array | None = None,
  ) -> tuple[jax.Array, CrossCache | None]:
    """What `logits` reads: the last block's result, normed. See `decode`."""
    if seen is None and state is None:
      raise ValueError("decoder: expected `seen`, or a state that has it")
    return self.decoder(self.embed(tokens), seen, seen_count, state, count)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """The scores f32[B, L, V] of the tokens after [B, L, D]."""
    hidden = hidden * jnp.asarray(self.logit_scale, hidden.dtype)
    return (self.embed.logits if self.readout == "tied" else self.head)(hidden)

  def decode(
      self,
      tokens: jax.Array,
      seen: jax.Array | None = None,
      seen_count: jax.Array | None = None,
      state: CrossCache | None = None,
      count: jax.Array | None = None,
  ) -> tuple[jax.Array, CrossCache | None]:
    """Scores the next token after each of T tokens.

    Args:
      tokens: i32[B, T]; a text begins with the token `start`.
      seen: [B, K, D], of `encode`. With a state it is given to the first call
        alone, which keeps its keys and values.
      seen_count: i32[B], the `count` that `encode` had.
      state: what came before, see `init_state`; None for nothing.
      count: i32[B], how many of the T tokens are no padding on the right; all
        by default. Only a state needs to know.

    Returns:
      f32[B, T, V], and the state with the tokens in it, None if none was given.

    Raises:
      ValueError: without anything to look at, or more tokens than the state has
        slots.
    """
    x, state = self.decode_hidden(tokens, seen, seen_count, state, count)
    return self.logits(x), state

  def prefill(
      self, batch: dict[str, jax.Array], state: CrossCache, count: jax.Array
  ) -> tuple[jax.Array, CrossCache]:
    """The encoder reads `tokens` i32[B, L], the decoder its first token.

    With `reply` the protocol of `mmjax.evals.answers`.
    """
    seen = self.encode(batch["tokens"], count=count)
    begin = jnp.full((len(seen), 1), self.start, jnp.int32)
    return self.decode(begin, seen, count, state)

  def reply(
      self, tokens: jax.Array, state: CrossCache, count: jax.Array
  ) -> tuple[jax.Array, CrossCache]:
    """As `decode`, of what is behind the state."""
    return self.decode(tokens, state=state, count=count)

  def __call__(
      self,
      tokens: jax.Array,
      targets: jax.Array,
      segment: jax.Array | None = None,
  ) -> jax.Array:
    """Scores every token of a text given those before it.

    Args:
      tokens: i32[B, L], what the encoder reads.
      targets: i32[B, M], the text.
      segment: i32[B, L], 0 where `tokens` are padding (on the right); None
        for none.

    Returns:
      f32[B, M, V].
    """
    count = None if segment is None else (segment > 0).sum(axis=1)
    seen = self.encode(tokens, count=count)
    return self.decode(opened(self, targets)[:, :-1], seen, count)[0]


def opened(system: T5, targets: jax.Array) -> jax.Array:
  """What the decoder reads of i32[B, M]: the start before it, [B, M + 1]."""
  tokens, begin = jnp.maximum(targets, 0), ((0, 0), (1, 0))
  return jnp.pad(tokens, begin, constant_values=system.start)


@objective("tokens", "segment", "targets")
def write(
    system: T5,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
    chunks: int = 1,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """Cross-entropy of the targets given what the encoder reads.

  `chunks` bounds the memory of logits, see `objectives.autoregressive`.
  """
  del context  # No part is random.
  count = (batch["segment"] > 0).sum(axis=1)
  seen = system.apply(
      variables, batch["tokens"], count=count, method="encode"
  )
  return surprise(
      system, variables, seen, count, batch["targets"], chunks
  ), {}


def surprise(
    system: T5,
    variables: Any,
    seen: jax.Array,
    seen_count: jax.Array | None,
    targets: jax.Array,
    chunks: int = 1,
) -> dict[str, Term]:
  """`next_token` and `accuracy` of targets; see `autoregressive.next_token`.

  Args:
    system: a T5.
    variables: its variables.
    seen: [B, K, D], of `T5.encode`.
    seen_count: i32[B], its `count`.
    targets: i32[B, M], -1 behind the end.
    chunks: how many parts the text is cut into.
  """
  tokens = opened(system, targets)
  hidden, _ = system.apply(
      variables, tokens, seen, seen_count, method="decode_hidden"
  )
  logits = lambda x: system.apply(variables, x, method="logits")
  weight = jnp.pad(targets >= 0, ((0, 0), (1, 0))).astype(jnp.float32)
  return autoregressive.next_token(
      logits, hidden, tokens, weight, chunks=chunks
  )


LAYOUT = layout.Layout(
    architectures=("T5ForConditionalGeneration",),
    system=lambda hf, names: T5(
        **t5_layout.attributes(hf, own_head=t5_layout.HEAD in names)
    ),
    config=t5_layout.config_of,
    table=t5_layout.rules,
    inputs=lambda system: {
        name: jax.ShapeDtypeStruct((1, 2), jnp.int32)
        for name in ("tokens", "targets")
    },
)
