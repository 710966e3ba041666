"""How does one tensor of theirs become one array of ours, and back?

Every transform here only rearranges: on a memory-mapped file it is a chain of
numpy views, so that a process that needs a slice of a kernel reads that slice.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
  """A pair of pure functions, inverse to each other.

  Attributes:
    to_ours: (their array, our shape) -> our array.
    to_theirs: our array -> their array. It also tells their shape: the engine
      calls it on an array of our shape that takes no memory.
  """

  to_ours: Callable[[np.ndarray, Sequence[int]], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


def linear(inputs: int = 1) -> Transform:
  """torch's `[out, in]` matrix <-> our kernel `[*in, *out]`.

  Args:
    inputs: how many leading axes of our kernel are input: 2 for the output
      projection of attention, `[heads, head_dim, D]`.
  """

  def to_theirs(kernel: np.ndarray) -> np.ndarray:
    split = kernel.shape[:inputs], kernel.shape[inputs:]
    return kernel.reshape([math.prod(axes) for axes in split]).T

  return Transform(lambda matrix, shape: matrix.T.reshape(shape), to_theirs)


def leading(ones: int) -> Transform:
  """An array with `ones` leading axes of length 1 <-> one without them."""
  return Transform(
      lambda array, shape: array.reshape(shape),
      lambda array: array.reshape((1,) * ones + array.shape),
  )


IDENTITY = Transform(lambda array, shape: array, lambda array: array)
LINEAR = linear()
# A flat vector <-> our bias of any shape, such as `[heads, head_dim]`.
FLAT = Transform(
    lambda vector, shape: vector.reshape(shape),
    lambda array: array.reshape(array.size),
)
# torch's `[out, in, height, width]` <-> our `[height, width, in, out]`.
CONV2D = Transform(
    lambda kernel, shape: kernel.transpose(2, 3, 1, 0),
    lambda kernel: kernel.transpose(3, 2, 0, 1),
)
# A flat vector with as many zeros behind it <-> our bias: of the queries, in a
# fused bias of queries, keys and values whose keys have none. What stands there
# instead of zeros is dropped: it moves all scores of a query alike.
ZEROS_BEHIND = Transform(
    lambda vector, shape: vector[: vector.size // 2].reshape(shape),
    lambda array: np.concatenate([array.reshape(-1), array.reshape(-1) * 0]),
)
