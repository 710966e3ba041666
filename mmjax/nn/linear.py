"""Projections, embeddings and activations, each with its logical axes."""

from collections.abc import Callable, Sequence
import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import sharding
from mmjax.nn.partitioning import Initializer, declared, param

# Names follow Hugging Face's `hidden_act`, so that configs carry over.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

# The logical axes of kernels, from input to output dimensions.
EMBED_TO_HEADS = ("embed", "heads", "head_dim")
HEADS_TO_EMBED = ("heads", "head_dim", "embed")
EMBED_TO_MLP = ("embed", "mlp")
MLP_TO_EMBED = ("mlp", "embed")
EMBED_TO_VOCAB = ("embed", "vocab")
EMBED_TO_JOINT = ("embed", "joint")

ZEROS: Initializer = nn.initializers.zeros
XAVIER: Initializer = nn.initializers.xavier_uniform()
# Of each of queries, keys and values where PyTorch draws the three as one.
XAVIER_OF_THREE: Initializer = nn.initializers.variance_scaling(
    0.5, "fan_avg", "uniform"
)


def normal(std: float) -> Initializer:
  """Normal of the given standard deviation."""
  return nn.initializers.normal(std)


# PyTorch's default for linear and convolution kernels: U(-a, a) with
# a = fan_in ** -0.5.
FAN_IN_UNIFORM: Initializer = nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform"
)


class Linear(nn.Module):
  """A matrix product over the last input dimensions.

  Attributes:
    features: the output dimensions; the kernel is `[*inputs, *features]`, and
      as many trailing input dimensions are contracted as `axes` leaves over.
    axes: one logical axis per kernel dimension.
    kernel_init: drawn for the flattened `[inputs, outputs]` matrix, so that
      its fans are those of the matrix product.
    bias_init: None for no bias.
    dtype: of the computation; parameters stay in float32.
    rank: of an update of the kernel, kept as two factors `low_in` and
      `low_out` (LoRA, Hu et al. 2022, with alpha = rank); 0 for none. It is
      zero at first, so a trained kernel may be taken over as it is.
  """

  features: int | Sequence[int]
  axes: Sequence[str | None]
  kernel_init: Initializer = XAVIER
  bias_init: Initializer | None = ZEROS
  dtype: Any = jnp.float32
  rank: int = 0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[..., *inputs]` to `[..., *features]`."""
    single = isinstance(self.features, int)
    features = (self.features,) if single else tuple(self.features)
    contracted = len(self.axes) - len(features)
    inputs = x.shape[-contracted:]

    def flat_init(rng: jax.Array, shape: Any, dtype: Any) -> jax.Array:
      flat = math.prod(inputs), math.prod(features)
      return self.kernel_init(rng, flat, dtype).reshape(shape)

    kernel = param(
        self,
        "kernel",
        declared(flat_init, *self.axes),
        (*inputs, *features),
        jnp.float32,
    )
    x = x.astype(self.dtype)
    y = _contract(x, kernel.astype(self.dtype), contracted)
    if self.rank:
      first = param(
          self,
          "low_in",
          declared(FAN_IN_UNIFORM, self.axes[0], None),
          (math.prod(inputs), self.rank),
          jnp.float32,
      )
      second = param(
          self,
          "low_out",
          declared(ZEROS, None, self.axes[contracted]),
          (self.rank, math.prod(features)),
          jnp.float32,
      )
      low = _contract(
          x, first.astype(self.dtype).reshape(*inputs, -1), contracted
      )
      second = second.astype(self.dtype).reshape(-1, *features)
      y += _contract(low, second, 1)
    if self.bias_init is not None:
      bias = param(
          self,
          "bias",
          declared(self.bias_init, *self.axes[contracted:]),
          features,
          jnp.float32,
      )
      y += bias.astype(self.dtype)
    return y


def _contract(
    x: jax.Array, kernel: jax.Array, count: int, dtype: Any = None
) -> jax.Array:
  """`jnp.tensordot(x, kernel, count)`, as one product of two matrices.

  XLA:CPU runs that faster, forward and backward, than a product with several
  free dimensions. Rows cannot be merged where the sequence is sharded. The
  result has the given dtype, that of the factors by default.
  """
  if sharding.axis_size("context") > 1:
    return jnp.tensordot(x, kernel, count, preferred_element_type=dtype)
  rows, columns = x.shape[: x.ndim - count], kernel.shape[count:]
  inputs = math.prod(kernel.shape[:count])

  def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(
        x.reshape(-1, inputs),
        kernel.reshape(inputs, -1),
        preferred_element_type=dtype,
    ).reshape(*rows, *columns)

  # Kept for the backward pass is `x` itself, once for all that read it.
  return jax.checkpoint(product, prevent_cse=False)(x, kernel)


class PatchEmbed(nn.Module):
  """Cuts an image into patches and projects each (ViT, section 3.1).

  Equal to a convolution whose kernel is the patch, written as the one matrix
  product that it is.

  Attributes:
    patch: side of a patch, pixels.
    features: output width D.
    kernel_init: drawn for the flattened `[P * P * C, D]` matrix.
    bias_init: None for no bias.
    dtype: of the computation.
    stride: from patch to patch, pixels; None for patches side by side. What is
      left at the right and at the bottom is not read.
  """

  patch: int
  features: int
  kernel_init: Initializer = XAVIER
  bias_init: Initializer | None = ZEROS
  dtype: Any = jnp.float32
  stride: int | None = None

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """Maps f32[B, H, W, C] to [B, rows, columns, D].

    Raises:
      ValueError: if a side of the image is no multiple of the patch and there
        is no stride.
    """
    chex.assert_rank(image, 4)
    batch, height, width, channels = image.shape
    p = self.patch
    if self.stride is None and (height % p or width % p):
      raise ValueError(
          f"image of {height}x{width} pixels: both sides must be multiples of "
          f"the patch of {p}"
      )

    def flat_init(rng: jax.Array, shape: Any, dtype: Any) -> jax.Array:
      flat = p * p * channels, self.features
      return self.kernel_init(rng, flat, dtype).reshape(shape)

    kernel = param(
        self,
        "kernel",
        declared(flat_init, "patch", "patch", None, "embed"),
        (p, p, channels, self.features),
        jnp.float32,
    )
    if self.stride is None:
      x = image.reshape(batch, height // p, p, width // p, p, channels)
    else:
      starts = lambda side: jnp.arange(0, side - p + 1, self.stride)[:, None]
      x = image[:, starts(height) + jnp.arange(p)]
      x = x[:, :, :, starts(width) + jnp.arange(p)]
    x = x.transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(*x.shape[:3], p * p * channels).astype(self.dtype)
    y = _contract(x, kernel.reshape(-1, self.features).astype(self.dtype), 1)
    if self.bias_init is not None:
      bias = param(
          self,
          "bias",
          declared(self.bias_init, "embed"),
          (self.features,),
          jnp.float32,
      )
      y += bias.astype(self.dtype)
    return y


class Embed(nn.Module):
  """One vector per token id, to read it and, where tied, to write it.

  Attributes:
    vocab: number of rows V.
    features: width D.
    table_init: of the table.
    dtype: of the result.
  """

  vocab: int
  features: int
  table_init: Initializer = normal(0.02)
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Declares the table."""
    self.embedding = param(
        self,
        "embedding",
        declared(self.table_init, "vocab", "embed"),
        (self.vocab, self.features),
        jnp.float32,
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps i32[...] to [..., D]."""
    return jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Maps [B, L, D] to f32[B, L, V]."""
    return _logits(hidden, self.embedding.T, self.dtype)


class Head(nn.Module):
  """Scores of all tokens, with a matrix of its own.

  Attributes:
    vocab: number of tokens V.
    std: of the matrix at its initialisation.
    dtype: of the factors; the scores are float32.
  """

  vocab: int
  std: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, hidden: jax.Array) -> jax.Array:
    """Maps [B, L, E] to f32[B, L, V]."""
    kernel = param(
        self,
        "kernel",
        declared(normal(self.std), *EMBED_TO_VOCAB),
        (hidden.shape[-1], self.vocab),
        jnp.float32,
    )
    return _logits(hidden, kernel, self.dtype)


def _logits(hidden: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
  found = _contract(
      hidden.astype(dtype), kernel.astype(dtype), 1, jnp.float32
  )
  return sharding.constrain(found, "batch", "length", "vocab")
