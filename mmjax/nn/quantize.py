"""Vectors as codes: what the quantizers of codecs and tokenizers share.

EnCodec and Mimi learn stacked codebooks as moving averages, and take
`ResidualQuantizer`. DAC and VAR learn theirs by gradient, between projections
and interpolations of their own, from `nearest`, `straight_through` and
`squared_error`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mmjax import sharding
from mmjax.kernels import vq_lookup

# The variable collection of codebooks that no gradient moves.
COLLECTION = "codebook"

# A code that next to nothing falls on keeps a finite row (Mimi's epsilon).
_LEAST_COUNT = 1e-5


def nearest(
    x: jax.Array, codebook: jax.Array, metric: str = "euclidean"
) -> jax.Array:
  """The nearest row of a codebook for each vector; see `kernels.vq_lookup`.

  Args:
    x: [B, ..., D].
    codebook: [K, D].
    metric: "euclidean" or "cosine".

  Returns:
    i32[B, ...].
  """

  def lookup(x: jax.Array, codebook: jax.Array) -> jax.Array:
    index, _ = vq_lookup.vq_lookup(
        x.reshape(-1, x.shape[-1]), codebook, metric=metric
    )
    return index.reshape(x.shape[:-1])

  return _by_example(lookup, (x,), (codebook,))


def residual(
    x: jax.Array, codebooks: jax.Array, active: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Codes of each vector, level by level; see `kernels.vq_lookup.residual_vq`.

  Args:
    x: [B, ..., D].
    codebooks: [Q, K, D].
    active: i32[B], how many levels each example uses; by default all.

  Returns:
    i32[B, ..., Q], -1 at unused levels; and the sum of the chosen rows,
    [B, ..., D] in the dtype of x, without a gradient.
  """
  levels = codebooks.shape[0]
  if active is None:
    active = jnp.full(x.shape[:1], levels, jnp.int32)

  def lookup(x: jax.Array, active: jax.Array, codebooks: jax.Array) -> Any:
    rows = x.reshape(-1, x.shape[-1])
    active = jnp.repeat(active, len(rows) // len(x))
    codes, quantized = vq_lookup.residual_vq(rows, codebooks, active)
    return codes.reshape(*x.shape[:-1], levels), quantized.reshape(x.shape)

  return _by_example(lookup, (x, active), (codebooks,))


def _by_example(
    f: Callable[..., Any], split: tuple[Any, ...], whole: tuple[Any, ...]
) -> Any:
  """Applies f to every device's own examples: kernels know no mesh.

  Args:
    f: maps `[B, ...]` arrays to `[B, ...]` arrays, example by example.
    split: arguments `[B, ...]`.
    whole: further arguments, which every device needs in full.
  """
  mesh = jax.sharding.get_abstract_mesh()
  # Before the map, so that nothing of it is differentiated.
  split, whole = jax.lax.stop_gradient((split, whole))
  if mesh.empty or mesh.size == 1:
    return f(*split, *whole)
  batch = split[0].shape[:1]
  rows = sharding.spec(("batch",), batch, mesh)
  none = jax.sharding.PartitionSpec()
  return jax.shard_map(
      f,
      in_specs=(rows,) * len(split) + (none,) * len(whole),
      out_specs=rows,
      check_vma=False,
  )(*split, *whole)


def decode(codes: jax.Array, codebooks: jax.Array) -> jax.Array:
  """The vectors that codes stand for.

  Args:
    codes: i32[..., Q]; negative ones stand for zeros.
    codebooks: [Q, K, D].

  Returns:
    [..., D] in the dtype of the codebooks, which receive gradients.
  """

  def add(total: jax.Array, level: Any) -> tuple[jax.Array, None]:
    return total + _rows(*level), None

  shape = *codes.shape[:-1], codebooks.shape[-1]
  zeros = jnp.zeros(shape, codebooks.dtype)
  return jax.lax.scan(add, zeros, (codebooks, jnp.moveaxis(codes, -1, 0)))[0]


def _rows(codebook: jax.Array, codes: jax.Array) -> jax.Array:
  """Rows of a codebook [K, D]; zeros for negative codes."""
  return jnp.where(codes[..., None] < 0, 0.0, codebook[codes])


def straight_through(x: jax.Array, quantized: jax.Array) -> jax.Array:
  """`quantized` to the bit, with the gradient of x (VQ-VAE, section 3.2)."""
  return jax.lax.stop_gradient(quantized) + (x - jax.lax.stop_gradient(x))


def squared_error(x: jax.Array, target: jax.Array) -> jax.Array:
  """f32[...], of x [..., D] against a constant; the gradient goes to x alone.

  With a quantizer's input for x and its output for the target that is the
  commitment loss, with their places exchanged the codebook loss.
  """
  target = jax.lax.stop_gradient(target).astype(jnp.float32)
  return jnp.square(x.astype(jnp.float32) - target).sum(axis=-1)


def commitment(
    x: jax.Array, codebooks: jax.Array, codes: jax.Array
) -> jax.Array:
  """What every level of a residual quantizer leaves over of x, squared.

  Each level is told the rest of the one before as a constant but for x, so
  that the gradient is not lost behind the first (audiocraft's correction).

  Args:
    x: [..., D].
    codebooks: [Q, K, D].
    codes: i32[..., Q].

  Returns:
    f32[..., Q], 0 at unused levels; the gradient goes to x alone.
  """

  def one_level(rest: jax.Array, level: Any) -> tuple[jax.Array, jax.Array]:
    codebook, code = level
    rest = rest - _rows(codebook, code)
    error = jnp.square(rest).sum(axis=-1)
    return rest, jnp.where(code < 0, 0.0, error)

  codebooks = jax.lax.stop_gradient(codebooks).astype(jnp.float32)
  levels = codebooks, jnp.moveaxis(codes, -1, 0)
  errors = jax.lax.scan(one_level, x.astype(jnp.float32), levels)[1]
  return jnp.moveaxis(errors, 0, -1)


def sample_active(
    rng: jax.Array, batch: int, levels: int, share: float
) -> jax.Array:
  """Quantizer dropout: how many levels each example of a batch uses.

  Args:
    rng: a PRNG key.
    batch: B.
    levels: Q.
    share: of the examples for which the number is drawn from 1 .. Q; the others
      use all (DAC: 0.5; SoundStream, section III-C: 1).

  Returns:
    i32[B].
  """
  drawn = jax.random.randint(rng, (batch,), 1, levels + 1)
  return jnp.where(jnp.arange(batch) < int(share * batch), drawn, levels)


# Codebooks as moving averages of what falls on them.


@flax.struct.dataclass
class Codebooks:
  """Codebooks that follow the means of their cells.

  Attributes:
    rows: f32[Q, K, D], the codebooks: `sums / counts`.
    counts: f32[Q, K], moving average of a batch's weight on each code.
    sums: f32[Q, K, D], moving average of its weighted sum.
  """

  rows: jax.Array
  counts: jax.Array
  sums: jax.Array


class Statistics(NamedTuple):
  """What codebooks learn from a batch.

  Attributes:
    counts: f32[Q, K], the weight that fell on each code.
    sums: f32[Q, K, D], its weighted sum.
    samples: f32[Q, K, D], vectors that the level was given, drawn at random.
  """

  counts: jax.Array
  sums: jax.Array
  samples: jax.Array


def statistics(
    rng: jax.Array,
    x: jax.Array,
    codebooks: jax.Array,
    codes: jax.Array,
    weight: jax.Array | None = None,
) -> Statistics:
  """Collects what the codebooks of a residual quantizer learn from a batch.

  Args:
    rng: a PRNG key.
    x: [..., D].
    codebooks: [Q, K, D].
    codes: i32[..., Q], of x under these codebooks.
    weight: f32[...], of the vectors; by default 1. Those of weight 0 (padding)
      are never sampled.
  """
  count, dim = codebooks.shape[1:]
  rest = jax.lax.stop_gradient(x).reshape(-1, dim).astype(jnp.float32)
  weight = jnp.ones(len(rest)) if weight is None else weight.reshape(-1)

  def one_level(rest: jax.Array, level: Any) -> tuple[jax.Array, Statistics]:
    codebook, codes, rng = level
    counts, sums = vq_lookup.code_statistics(rest, codes, count, weight)
    samples = rest[_sample(rng, jnp.where(codes < 0, 0.0, weight), count)]
    rest = rest - _rows(codebook, codes)
    return rest, Statistics(counts, sums, samples)

  codes = codes.reshape(len(rest), -1).T
  levels = codebooks, codes, jax.random.split(rng, len(codes))
  return jax.lax.scan(one_level, rest, levels)[1]


def _sample(rng: jax.Array, weight: jax.Array, count: int) -> jax.Array:
  """i32[count], rows drawn in proportion to their weight, f32[N].

  At even steps through the cumulative weight: equal weights give different
  rows where there are enough, and no count x N matrix of draws is made.
  """
  edges = jnp.cumsum(weight)
  steps = jnp.arange(count) + jax.random.uniform(rng)
  # Rounding must not reach past the last row that has a weight.
  at = jnp.minimum(steps / count * edges[-1], jnp.nextafter(edges[-1], 0.0))
  return jnp.searchsorted(edges, at, side="right")


def learn(
    codebooks: Codebooks,
    batch: Statistics,
    *,
    decay: float,
    dead_below: float,
) -> Codebooks:
  """Moves codebooks towards the means of a batch and replaces dead codes.

  A code whose average count falls below a share of its level's mean becomes a
  vector that the level was given, with the mean for a count (Mimi's rule). A
  level that has never learnt has dead codes only: its first batch draws them
  all. Level q begins a batch after level q - 1, since before that it is not
  given what it will be; until then its rows are zeros and change nothing. A
  level that no vector of the batch uses stays as it is.

  Args:
    codebooks: before the batch; all zeros at the start of training.
    batch: its statistics.
    decay: of the moving averages, per batch (EnCodec and Mimi: 0.99).
    dead_below: share of the mean count below which a code is dead (Mimi: 0.1).

  Returns:
    The codebooks after the batch.
  """
  started = codebooks.counts.sum(axis=-1) > 0
  may_start = jnp.concatenate([jnp.ones(1, bool), started[:-1]])
  moves = (batch.counts.sum(axis=-1) > 0) & may_start
  average = lambda old, new: decay * old + (1 - decay) * new
  counts = average(codebooks.counts, batch.counts)
  sums = average(codebooks.sums, batch.sums)
  mean = jnp.where(started[:, None], counts, batch.counts).mean(
      axis=-1, keepdims=True
  )
  dead = ~started[:, None] | (counts < dead_below * mean)
  counts = jnp.where(dead, mean, counts)
  sums = jnp.where(dead[..., None], mean[..., None] * batch.samples, sums)
  rows = sums / jnp.maximum(counts, _LEAST_COUNT)[..., None]
  return jax.tree.map(
      lambda new, old: jnp.where(
          moves.reshape(-1, *(1,) * (new.ndim - 1)), new, old
      ),
      Codebooks(rows, counts, sums),
      codebooks,
  )


class Quantized(NamedTuple):
  """What a quantizer says of x [B, ..., D].

  Attributes:
    quantized: [B, ..., D], with the gradient of x.
    codes: i32[B, ..., Q], -1 at unused levels.
    commitment: f32[B, ..., Q]; see `commitment`.
  """

  quantized: jax.Array
  codes: jax.Array
  commitment: jax.Array


class ResidualQuantizer(nn.Module):
  """Stacked codebooks that learn as moving averages (SoundStream, EnCodec).

  They are variables of the collection "codebook", and learn exactly where a
  caller makes it mutable; that takes an rng of the same name. One level is
  plain vector quantization.

  Attributes:
    levels: Q.
    codes: K, in each codebook.
    features: D.
    decay: see `learn`.
    dead_below: see `learn`.
  """

  levels: int
  codes: int
  features: int
  decay: float = 0.99
  dead_below: float = 0.1

  def setup(self) -> None:
    """Declares the codebooks, all zeros."""
    matrix = self.levels, self.codes, self.features
    make = lambda name, shape: self.variable(
        COLLECTION, name, jnp.zeros, shape, jnp.float32
    )
    self.rows = make("rows", matrix)
    self.counts = make("counts", matrix[:2])
    self.sums = make("sums", matrix)

  def __call__(
      self,
      x: jax.Array,
      active: jax.Array | None = None,
      weight: jax.Array | None = None,
  ) -> Quantized:
    """Quantises [B, ..., D], and learns from it where that is asked for.

    Args:
      x: [B, ..., D].
      active: i32[B], how many levels each example uses; by default all.
      weight: f32[B, ...], of the vectors in what is learnt; by default 1.
    """
    rows = self.rows.value
    codes, quantized = residual(x, rows, active)
    if self.is_mutable_collection(COLLECTION) and not self.is_initializing():
      batch = statistics(self.make_rng(COLLECTION), x, rows, codes, weight)
      new = learn(
          Codebooks(rows, self.counts.value, self.sums.value),
          batch,
          decay=self.decay,
          dead_below=self.dead_below,
      )
      self.rows.value = new.rows
      self.counts.value = new.counts
      self.sums.value = new.sums
    return Quantized(
        straight_through(x, quantized), codes, commitment(x, rows, codes)
    )

  def decode(self, codes: jax.Array) -> jax.Array:
    """The vectors f32[..., D] of codes i32[..., q], of the first q levels."""
    return decode(codes, self.rows.value[: codes.shape[-1]])
