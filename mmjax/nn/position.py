"""Learned position tables, and how they follow a change of resolution."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.nn.partitioning import Initializer, declared, param


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
  """Keys' cubic convolution kernel; a = -0.75 is PyTorch's and OpenCV's."""
  d = np.abs(distance)
  near = ((a + 2) * d - (a + 3)) * d * d + 1
  far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
  return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _linear(distance: np.ndarray) -> np.ndarray:
  return np.maximum(1 - np.abs(distance), 0.0)


def resampling_matrix(old: int, new: int, method: str) -> np.ndarray:
  """The matrix f64[new, old] that resamples one dimension of a grid.

  Args:
    old: number of samples given.
    new: number of samples wanted.
    method: "zoom", linear with the corner samples aligned, as the official ViT
      code resamples positions (`scipy.ndimage.zoom`, order 1); or "bicubic",
      cubic with half-pixel centres and clamped borders, as PyTorch and so
      Hugging Face's ViT and CLIP do.

  Raises:
    ValueError: for another method.
  """
  index = np.arange(new, dtype=np.float64)
  if method == "zoom":
    centre = index * ((old - 1) / (new - 1) if new > 1 else 0.0)
    taps, kernel = np.arange(0, 2), _linear
  elif method == "bicubic":
    centre = (index + 0.5) * (old / new) - 0.5
    taps, kernel = np.arange(-1, 3), _cubic
  else:
    raise ValueError(f"resampling {method!r}: expected 'zoom' or 'bicubic'")
  source = np.floor(centre)[:, None].astype(int) + taps
  matrix = np.zeros((new, old))
  rows = np.broadcast_to(np.arange(new)[:, None], source.shape)
  # Taps beyond the border read the border sample.
  np.add.at(
      matrix,
      (rows, source.clip(0, old - 1)),
      kernel(centre[:, None] - source),
  )
  return matrix


def resample_grid(
    table: jax.Array,
    old: Sequence[int],
    new: Sequence[int],
    method: str,
) -> jax.Array:
  """Resamples a row-major table [H * W, D] from grid `old` to grid `new`."""
  if tuple(old) == tuple(new):
    return table
  rows = jnp.asarray(resampling_matrix(old[0], new[0], method), table.dtype)
  columns = jnp.asarray(resampling_matrix(old[1], new[1], method), table.dtype)
  grid = table.reshape(*old, table.shape[-1])
  grid = jnp.einsum("ih,hwd,jw->ijd", rows, grid, columns)
  return grid.reshape(-1, table.shape[-1])


class GridPositions(nn.Module):
  """Learned positions of a patch grid behind some prefix tokens (ViT).

  Attributes:
    grid: (rows, columns) that the table was made for.
    prefix: number of tokens before the grid (the class token). They keep their
      rows when the grid is resampled.
    table_init: of the table.
    resample: method of `resampling_matrix` for images of another grid.
  """

  grid: Sequence[int]
  prefix: int
  table_init: Initializer
  resample: str

  @nn.compact
  def __call__(self, features: int, grid: Sequence[int]) -> jax.Array:
    """The positions f32[prefix + rows * columns, features] of `grid`."""
    rows = self.prefix + int(np.prod(self.grid))
    table = param(
        self,
        "table",
        declared(self.table_init, "position", "embed"),
        (rows, features),
        jnp.float32,
    )
    patches = resample_grid(
        table[self.prefix :], self.grid, grid, self.resample
    )
    return jnp.concatenate([table[: self.prefix], patches])


class SequencePositions(nn.Module):
  """Learned absolute positions of a sequence.

  Attributes:
    length: number of positions.
    table_init: of the table.
  """

  length: int
  table_init: Initializer

  @nn.compact
  def __call__(self, features: int, length: int) -> jax.Array:
    """The first `length` positions, f32[length, features].

    Raises:
      ValueError: if the sequence is longer than the table.
    """
    if length > self.length:
      raise ValueError(
          f"sequence of {length} tokens: the model has {self.length} positions"
      )
    table = param(
        self,
        "table",
        declared(self.table_init, "position", "embed"),
        (self.length, features),
        jnp.float32,
    )
    return table[:length]


def triangle_weights(
    index: jax.Array, new: jax.Array, old: int
) -> jax.Array:
  """How each old sample counts for a new one, with traced sizes.

  Linear interpolation with half-pixel centres whose triangle widens as it
  shrinks a grid: PyTorch's antialiased "bilinear", and PIL's.

  Args:
    index: i32[...], which of the new samples.
    new: i32[...], how many new samples there are.
    old: how many old ones.

  Returns:
    f32[..., old], rows that sum to 1.
  """
  scale = (old / new.astype(jnp.float32))[..., None]
  centre = (index[..., None] + 0.5) * scale
  distance = jnp.abs(jnp.arange(old) + 0.5 - centre)
  weights = jnp.maximum(1 - distance / jnp.maximum(scale, 1), 0)
  return weights / weights.sum(axis=-1, keepdims=True)


class FlexPositions(nn.Module):
  """A table of grid positions, resampled for each image of a batch.

  The positions of NaFlex (SigLIP 2, Tschannen et al. 2025, section 2.4.2). A
  grid is data, so images of many shapes share a program: resampling is one
  product with the table.

  Attributes:
    grid: (rows, columns) of the table.
    table_init: of the table.
  """

  grid: Sequence[int]
  table_init: Initializer

  @nn.compact
  def __call__(
      self, features: int, grid: jax.Array, length: int
  ) -> jax.Array:
    """Positions of row-major patches.

    Args:
      features: D.
      grid: i32[B, 2], rows and columns of each image, at most N patches.
      length: N.

    Returns:
      f32[B, N, D]; behind its last patch an image repeats the first position.
    """
    table = param(
        self,
        "table",
        declared(self.table_init, "position", "embed"),
        (int(np.prod(self.grid)), features),
        jnp.float32,
    )
    rows, columns = grid[:, :1], grid[:, 1:]
    slot = jnp.arange(length)
    slot = jnp.where(slot < rows * columns, slot, 0)
    weights = jnp.einsum(
        "bni,bnj->bnij",
        triangle_weights(slot // columns, rows, self.grid[0]),
        triangle_weights(slot % columns, columns, self.grid[1]),
    )
    return weights.reshape(*slot.shape, -1) @ table


class LearnedPositions(nn.Module):
  """A table of positions, of which the first rows belong to padding (OPT).

  Attributes:
    length: number of positions.
    offset: the row of position 0.
    std: of the table at its initialisation.
  """

  length: int
  offset: int = 2
  std: float = 0.02

  @nn.compact
  def __call__(self, position: jax.Array, features: int) -> jax.Array:
    """The rows f32[B or 1, L, features] of i32[B or 1, L]."""
    table = param(
        self,
        "table",
        declared(nn.initializers.normal(self.std), "position", "embed"),
        (self.length + self.offset, features),
        jnp.float32,
    )
    # Padding behind the end of the table is to be finite, whatever it is.
    return jnp.take(table, position + self.offset, axis=0, mode="clip")
