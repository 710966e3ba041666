"""Where is a token? Rotary position embeddings, and how they are stretched.

A head's dimensions are taken in pairs, and pair i of a token at position p is
turned by the angle p * theta ** (-2i / D) (Su et al. 2021, section 3.4.2), so
that products of queries and keys depend on the distance alone.
"""

import dataclasses
import math
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# Which dimensions are a pair: (i, i + D / 2), as in LLaMA, Qwen and all that
# transformers calls `rotate_half`; or (2i, 2i + 1), as in the paper and Helium.
LAYOUTS = ("half", "interleaved")


class Scaling(Protocol):
  """How a model reads further than it was first trained to."""

  @property
  def gain(self) -> float:
    """What the cosines and sines are multiplied by."""
    ...

  def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
    """New frequencies f64[D / 2], in radians per position."""
    ...


@dataclasses.dataclass(frozen=True)
class Interpolated:
  """All positions are squeezed (Chen et al. 2023); "linear" in configs.

  Attributes:
    factor: how many times further.
  """

  factor: float
  gain = 1.0

  def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
    """See `Scaling`."""
    del theta
    return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3:
  """Slow pairs are squeezed, fast ones kept (LLaMA 3.1 and later).

  Attributes:
    factor: how many times further.
    length: positions that the model was first trained to.
    low: pairs that turn less than this often in `length` are squeezed;
    high: those that turn more often than this are kept; between the two the
      frequencies go over smoothly.
  """

  factor: float
  length: int
  low: float
  high: float
  gain = 1.0

  def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
    """See `Scaling`."""
    del theta
    turns = self.length * frequencies / (2 * math.pi)
    kept = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Yarn:
  """As `Llama3` along the pairs, with sharper attention (Peng et al. 2023).

  Attributes:
    factor: how many times further.
    length: positions that the model was first trained to.
    fast: pairs that turn more often than this in `length` are kept;
    slow: those that turn less often than this are squeezed (section 3.2).
    attention: the gain; by default 0.1 ln(factor) + 1 (section 3.4).
  """

  factor: float
  length: int
  fast: float = 32.0
  slow: float = 1.0
  attention: float | None = None

  @property
  def gain(self) -> float:
    """See `Scaling`."""
    if self.attention is not None:
      return self.attention
    return 0.1 * math.log(max(self.factor, 1.0)) + 1.0

  def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
    """See `Scaling`."""
    count = len(frequencies)
    # The pair that turns `turns` times, as a real number.
    pair = lambda turns: (
        count * math.log(self.length / (turns * 2 * math.pi)) / math.log(theta)
    )
    low = max(math.floor(pair(self.fast)), 0)
    high = min(math.ceil(pair(self.slow)), 2 * count - 1)
    # Without pairs between the two the step from one to the other is sharp.
    width = high - low or 0.001
    squeezed = np.clip((np.arange(count) - low) / width, 0.0, 1.0)
    return (
        (1 - squeezed) * frequencies + squeezed * frequencies / self.factor
    )


@flax.struct.dataclass
class Rotation:
  """The turns of one batch of tokens; call it on queries and on keys.

  Attributes:
    cos: f32[B or 1, L, D / 2].
    sin: f32[B or 1, L, D / 2].
    layout: one of `LAYOUTS`.
  """

  cos: jax.Array
  sin: jax.Array
  layout: str = flax.struct.field(pytree_node=False)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Turns [B, L, H, D], in float32; the result has the dtype of x."""
    half = x.shape[-1] // 2
    pairs = (2, half) if self.layout == "half" else (half, 2)
    axis = -2 if self.layout == "half" else -1
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], *pairs)
    a, b = (jax.lax.index_in_dim(y, i, axis, keepdims=False) for i in range(2))
    cos, sin = self.cos[:, :, None], self.sin[:, :, None]
    y = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=axis)
    return y.reshape(x.shape).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions of a model.

  Attributes:
    theta: the base of the frequencies.
    layout: one of `LAYOUTS`.
    scaling: for contexts longer than those of the first training.
    sections: for positions of several axes (M-RoPE of Qwen2-VL, Wang et al.
      2024, section 2.1: time, height, width): how many pairs, from the first
      one on, follow each axis.
  """

  theta: float = 10_000.0
  layout: str = "half"
  scaling: Scaling | None = None
  sections: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    if self.layout not in LAYOUTS:
      raise ValueError(
          f"rope: layout={self.layout!r}, expected one of {list(LAYOUTS)}"
      )

  def frequencies(self, dim: int) -> np.ndarray:
    """f64[dim / 2], in radians per position, for heads of `dim`.

    Raises:
      ValueError: for an odd number of dimensions.
    """
    if dim % 2:
      raise ValueError(f"rope: heads of {dim} dimensions, expected pairs")
    frequencies = self.theta ** (-np.arange(0, dim, 2) / dim)
    if self.scaling is None:
      return frequencies
    return self.scaling.stretch(frequencies, self.theta)

  def rotation(self, position: jax.Array, dim: int) -> Rotation:
    """The turns of tokens.

    Args:
      position: i32[B or 1, L], or i32[B or 1, L, A] with one of A axes for each
        of the `sections`.
      dim: dimensions of a head.

    Raises:
      ValueError: if the positions do not fit the sections, or those the heads.
    """
    frequencies = self.frequencies(dim)
    if position.ndim == 3:
      axes = len(self.sections)
      if position.shape[-1] != axes or sum(self.sections) != dim // 2:
        raise ValueError(
            f"rope: positions {position.shape} with sections {self.sections}; "
            f"expected [B, L, {axes}] and sections that add up to {dim // 2}"
        )
      position = position[..., np.repeat(np.arange(axes), self.sections)]
    else:
      position = position[..., None]
    angle = position.astype(jnp.float32) * frequencies.astype(np.float32)
    gain = 1.0 if self.scaling is None else self.scaling.gain
    return Rotation(gain * jnp.cos(angle), gain * jnp.sin(angle), self.layout)
