"""Decoder-only language models: LLaMA and Vicuna, Qwen2, OPT, Helium.

LLaMA (Touvron et al. 2023), Qwen2.5 (Yang et al. 2024), OPT (Zhang et al. 2022)
and Helium (Défossez et al. 2024) are one network with other parts. Pictures and
sound enter it as `embeddings` among those of the tokens.
"""

from collections.abc import Mapping
import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import config
from mmjax.models import llm_layout
from mmjax.nn import attention, cache, linear, norm, rope, transformer
from mmjax.nn import mask as masks
from mmjax.nn.cache import Cache
from mmjax.nn.mask import Mask
from mmjax.objectives import autoregressive
from mmjax.objectives.term import Context, Term, objective
from mmjax.weights import layout

NORMS = {"rms": norm.RMSNorm, "layer": norm.LayerNorm}
MLPS = {"gated": transformer.GatedMlp, "plain": transformer.Mlp}
BIASES = ("mlp", "out", "qkv")
READOUTS = ("own", "tied")


def _rotary(
    width: int, depth: int, heads: int, mlp: int, **rest: Any
) -> dict[str, Any]:
  """LLaMA-1, as changed by `rest`."""
  theta = rest.pop("theta", 1e4)
  kind = rest.pop("layout", "half")
  return dict(
      vocab=32_000, width=width, depth=depth, heads=heads, mlp=mlp, length=2048,
      position=dict(type="mmjax.nn.rope:Rope", theta=theta, layout=kind),
  ) | rest  # fmt: skip


def _qwen(
    width: int, depth: int, heads: int, groups: int, mlp: int, **rest: Any
) -> dict[str, Any]:
  """A row of table 1 of the report; the small ones have tied tables."""
  small = dict(vocab=151_936, length=32_768, readout="tied")
  large = dict(vocab=152_064, length=131_072)
  return _rotary(
      width, depth, heads, mlp, groups=groups, biases=("qkv",), theta=1e6,
      **(small if width < 3000 else large), **rest,
  )  # fmt: skip


def _opt(width: int, depth: int, heads: int, **rest: Any) -> dict[str, Any]:
  """A row of table 1 of the paper."""
  return dict(
      vocab=50_272, width=width, depth=depth, heads=heads, mlp=4 * width,
      length=2048,
      position=dict(type="mmjax.nn.position:LearnedPositions", length=2048),
      norms="layer", epsilon=1e-5, mlp_kind="plain", activation="relu",
      biases=BIASES, readout="tied",
  ) | rest  # fmt: skip


_LLAMA2: dict[str, Any] = dict(epsilon=1e-5, length=4096)
_HELIUM: dict[str, Any] = dict(
    epsilon=1e-8, length=4096, layout="interleaved"
)
# Vicuna 1.1 and 1.3 have the sizes of LLaMA, 1.5 those of LLaMA 2.
SIZES: dict[str, dict[str, Any]] = {
    # For TinyWorld, not in a paper.
    "tiny": _rotary(96, 4, 4, 256, groups=2, vocab=1024, length=256),
    # To be measured, neither.
    "small": _rotary(512, 8, 8, 1376, length=256),
    "llama_7b": _rotary(4096, 32, 32, 11_008),
    "llama_13b": _rotary(5120, 40, 40, 13_824),
    "llama_33b": _rotary(6656, 60, 52, 17_920),
    "llama_65b": _rotary(8192, 80, 64, 22_016),
    "llama2_7b": _rotary(4096, 32, 32, 11_008, **_LLAMA2),
    "llama2_13b": _rotary(5120, 40, 40, 13_824, **_LLAMA2),
    "llama2_70b": _rotary(8192, 80, 64, 28_672, groups=8, **_LLAMA2),
    "llama3.2_1b": _rotary(
        2048, 16, 32, 8192, groups=8, vocab=128_256, length=131_072,
        epsilon=1e-5, readout="tied",
        position=dict(
            type="mmjax.nn.rope:Rope", theta=5e5,
            scaling=dict(
                type="mmjax.nn.rope:Llama3",
                factor=32.0, length=8192, low=1.0, high=4.0,
            ),
        ),
    ),
    "qwen2.5_0.5b": _qwen(896, 24, 14, 2, 4864),
    "qwen2.5_1.5b": _qwen(1536, 28, 12, 2, 8960),
    "qwen2.5_3b": _qwen(2048, 36, 16, 2, 11_008),
    "qwen2.5_7b": _qwen(3584, 28, 28, 4, 18_944),
    "qwen2.5_14b": _qwen(5120, 48, 40, 8, 13_824, epsilon=1e-5),
    "qwen2.5_32b": _qwen(5120, 64, 40, 8, 27_648, epsilon=1e-5),
    "qwen2.5_72b": _qwen(8192, 80, 64, 8, 29_568, epsilon=1e-5),
    "opt_125m": _opt(768, 12, 12),
    "opt_350m": _opt(1024, 24, 16, table=512, order="post"),
    "opt_1.3b": _opt(2048, 24, 32),
    "opt_2.7b": _opt(2560, 32, 32),
    "opt_6.7b": _opt(4096, 32, 32),
    "opt_13b": _opt(5120, 40, 40),
    "opt_30b": _opt(7168, 48, 56),
    "opt_66b": _opt(9216, 64, 72),
    "opt_175b": _opt(12_288, 96, 96),
    "helium_2b": _rotary(
        2560, 24, 20, 7040, vocab=48_000, theta=1e5, **_HELIUM
    ),
    "helium_7b": _rotary(4096, 32, 32, 11_264, **_HELIUM),
}  # fmt: skip


class Decoder(nn.Module):
  """A decoder-only transformer.

  Attributes:
    vocab: number of token ids V, unused rows included.
    width: D.
    depth: number of blocks.
    heads: query heads.
    mlp: hidden width of the MLPs.
    length: the longest sequence that the model is made for.
    position: a `rope.Rope`, or a module called as (i32[B, L], D) whose result
      is added to the embeddings.
    groups: key and value heads; as many as there are heads by default.
    head_dim: width of a head; width / heads by default.
    table: width E of the token table where it is not D (OPT-350m); the
      embeddings are then projected in and the result out again.
    norms: name in `NORMS`.
    epsilon: of every norm.
    order: name in `transformer.ORDERS`; "post" has no norm behind the blocks.
    mlp_kind: name in `MLPS`.
    activation: name in `linear.ACTIVATIONS`.
    biases: which projections have one, of `BIASES`.
    readout: of `READOUTS`: a head of its own, or the token table again.
    std: of all matrices at their initialisation.
    remat: name in `transformer.REMAT`.
    dtype: of the computation and of caches; logits are float32.
  """

  vocab: int
  width: int
  depth: int
  heads: int
  mlp: int
  length: int
  position: Any
  groups: int | None = None
  head_dim: int | None = None
  table: int | None = None
  norms: str = "rms"
  epsilon: float = 1e-6
  order: str = "pre"
  mlp_kind: str = "gated"
  activation: str = "silu"
  biases: tuple[str, ...] = ()
  readout: str = "own"
  std: float = 0.02
  remat: str = "none"
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Builds the parts; refuses words that name none."""
    for word, words, where in (
        (self.order, transformer.ORDERS, "order"),
        (self.readout, READOUTS, "readout"),
        (self.activation, linear.ACTIVATIONS, "activation"),
        *((bias, BIASES, "biases") for bias in self.biases),
    ):
      config.pick(dict.fromkeys(words), word, where)
    init = linear.normal(self.std)
    bias = {b: linear.ZEROS if b in self.biases else None for b in BIASES}
    make_norm = functools.partial(
        config.pick(NORMS, self.norms, "norms"), self.epsilon, self.dtype
    )
    inits = transformer.BlockInit(
        up=init, down=init, mlp_bias=bias["mlp"]
    )
    self.embed = linear.Embed(self.vocab, self._table, init, self.dtype)
    if self._table != self.width:
      project = lambda features: linear.Linear(
          features, ("embed", None), init, None, self.dtype
      )
      self.project_in = project(self.width)
      self.project_out = project(self._table)
    self._parts = dict(
        attention=functools.partial(
            attention.CachedAttention,
            self.heads,
            self._groups,
            self._head_dim,
            init,
            init,
            bias["qkv"],
            bias["out"],
            self.dtype,
        ),
        mlp=functools.partial(
            config.pick(MLPS, self.mlp_kind, "mlp_kind"),
            self.mlp,
            self.activation,
            inits,
            dtype=self.dtype,
        ),
        norm=make_norm,
        order=self.order,
    )
    self.blocks = transformer.stacked(
        transformer.CachedBlock,
        self.depth,
        self.remat,
        in_axes=(0, nn.broadcast, nn.broadcast),
    )(**self._parts)
    if self.order == "pre":
      self.norm = make_norm()
    if self.readout == "own":
      self.head = linear.Head(self.vocab, self.std, self.dtype)

  @property
  def _table(self) -> int:
    return self.table or self.width

  @property
  def _groups(self) -> int:
    return self.groups or self.heads

  @property
  def _head_dim(self) -> int:
    if self.head_dim is None and self.width % self.heads:
      raise ValueError(
          f"width {self.width} is not divisible by {self.heads} heads; give "
          f"head_dim"
      )
    return self.head_dim or self.width // self.heads

  @nn.nowrap
  def init_state(self, batch: int, slots: int) -> Cache:
    """An empty cache with room for `slots` tokens in each of `batch` rows."""
    return cache.empty(
        self.depth, batch, self._groups, slots, self._head_dim, self.dtype
    )

  def embeddings(self, tokens: jax.Array) -> jax.Array:
    """The vectors [B, L, E] of i32[B, L], for others to be put among."""
    return self.embed(tokens)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """The scores f32[B, L, V] of the tokens after [B, L, E]."""
    if self.readout == "tied":
      return self.embed.logits(hidden)
    return self.head(hidden)

  def enter(
      self,
      tokens: jax.Array | None = None,
      embeddings: jax.Array | None = None,
      position: jax.Array | None = None,
      mask: Mask | None = None,
      state: Cache | None = None,
  ) -> tuple[jax.Array, Mask, rope.Rotation | None]:
    """What the first block takes: [B, L, D], the mask and the rotation.

    Arguments as of `__call__`.
    """
    if (tokens is None) == (embeddings is None):
      raise ValueError("decoder: expected either tokens or embeddings")
    x = self.embed(tokens) if embeddings is None else embeddings
    chex.assert_rank(x, 3)
    length, width = x.shape[1:]
    if width != self._table:
      raise ValueError(
          f"embeddings of width {width}: the model's tokens have {self._table}"
      )
    if length > self.length:
      raise ValueError(
          f"sequence of {length} tokens: the model is made for {self.length}"
      )
    if position is None:
      position = (
          jnp.arange(length)[None] if state is None else state.positions(length)
      )
    if mask is None:
      mask = masks.causal(length) if state is None else state.mask(length)
    x = x.astype(self.dtype)
    if width != self.width:
      x = self.project_in(x)
    rotation = None
    if isinstance(self.position, rope.Rope):
      rotation = self.position.rotation(position, self._head_dim)
    else:
      x = x + self.position(position, self.width).astype(self.dtype)
    return x, mask, rotation

  @property
  def block(self) -> transformer.CachedBlock:
    """One of `blocks` by itself, for others to put something between them."""
    return transformer.CachedBlock(**self._parts, parent=None)

  def leave(
      self, x: jax.Array, state: Cache | None, count: jax.Array | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """What `logits` reads, and the state, from what the last block gave."""
    length = x.shape[1]
    if self.order == "pre":
      x = self.norm(x)
    if self._table != self.width:
      x = self.project_out(x)
    if state is not None:
      state = state.advanced(length if count is None else count)
    return x, state

  def hidden(
      self,
      tokens: jax.Array | None = None,
      embeddings: jax.Array | None = None,
      position: jax.Array | None = None,
      mask: Mask | None = None,
      state: Cache | None = None,
      count: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """What `logits` reads: the last block's result, normed. See `__call__`."""
    x, mask, rotation = self.enter(tokens, embeddings, position, mask, state)
    (x, state), _ = self.blocks(
        (x, state), jnp.arange(self.depth), mask, rotation
    )
    return self.leave(x, state, count)

  def __call__(
      self,
      tokens: jax.Array | None = None,
      embeddings: jax.Array | None = None,
      position: jax.Array | None = None,
      mask: Mask | None = None,
      state: Cache | None = None,
      count: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Scores the next token after each of L tokens.

    Args:
      tokens: i32[B, L]; or
      embeddings: [B, L, E], see the method of that name.
      position: i32[B or 1, L], or [B or 1, L, A] for a rope with sections;
        counted from the beginning, the state included, by default.
      mask: of L queries and L keys, or the slots of the state; causal by
        default.
      state: what came before, see `init_state`; None for nothing. L slots
        must be left in it.
      count: i32[B], how many of the L tokens are no padding on the right; all
        by default. Only a state needs to know.

    Returns:
      f32[B, L, V], and the state with the tokens in it, None if none was given.

    Raises:
      ValueError: for both or neither of tokens and embeddings, more tokens than
        `length`, or than the state has slots.
    """
    x, state = self.hidden(tokens, embeddings, position, mask, state, count)
    return self.logits(x), state

  def prefill(
      self, batch: Mapping[str, jax.Array], state: Cache, count: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Reads prompts; see `mmjax.evals.answers`."""
    return self(batch["tokens"], state=state, count=count)

  def reply(
      self, tokens: jax.Array, state: Cache, count: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Goes on behind what the state holds; see `mmjax.evals.answers`."""
    return self(tokens, state=state, count=count)


@objective("tokens", "weight")
def next_token(
    system: Decoder,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
    chunks: int = 1,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """Cross-entropy of each token given those before it.

  `chunks` bounds the memory of logits, see `objectives.autoregressive`.
  """
  del context  # No part is random.
  hidden, _ = system.apply(variables, batch["tokens"], method="hidden")
  return _surprise(system, variables, batch, hidden, batch["weight"], chunks)


@objective("tokens", "weight", "segment", "position")
def next_token_packed(
    system: Decoder,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
    chunks: int = 1,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """As `next_token`, of rows in which several documents stand.

  None sees another, and none predicts the first token of the next.
  """
  del context  # No part is random.
  segment = batch["segment"]
  mask = masks.packed(masks.causal(segment.shape[1]), segment)
  hidden, _ = system.apply(
      variables,
      batch["tokens"],
      position=batch["position"],
      mask=mask,
      method="hidden",
  )
  begins = jnp.diff(segment, axis=1, prepend=segment[:, :1]) != 0
  weight = jnp.where(begins, 0.0, batch["weight"])
  return _surprise(system, variables, batch, hidden, weight, chunks)


def _surprise(
    system: Decoder,
    variables: Any,
    batch: dict[str, jax.Array],
    hidden: jax.Array,
    weight: jax.Array,
    chunks: int,
) -> tuple[dict[str, Term], dict[str, Any]]:
  logits = lambda x: system.apply(variables, x, method="logits")
  return autoregressive.next_token(
      logits, hidden, batch["tokens"], weight, chunks=chunks
  ), {}


LAYOUT = layout.Layout(
    architectures=llm_layout.ARCHITECTURES,
    system=lambda hf, names: Decoder(**llm_layout.attributes(hf)),
    config=llm_layout.config_of,
    table=llm_layout.table,
    inputs=lambda system: {"tokens": jax.ShapeDtypeStruct((1, 2), jnp.int32)},
)
