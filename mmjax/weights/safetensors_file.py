"""What does a safetensors file hold, and how is one written?"""

from collections.abc import Mapping
import math
import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

# Of arrays: numpy 1 has 32 dimensions at most, and counts bytes in 64 bits.
_RANK, _SIZE = 32, 2**60


class SafetensorsFile:
  """One file; opening it reads the header alone.

  Attributes:
    path: of the file.
    tensors: name -> `jax.ShapeDtypeStruct`.
  """

  def __init__(self, path: str | os.PathLike[str]) -> None:
    """Opens and checks a file.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if the file is truncated, its header is damaged, or it has a
        dtype or a shape that cannot be.
    """
    self.path = Path(path)
    try:
      self._file = safetensors.safe_open(self.path, framework="np")
    except safetensors.SafetensorError as error:
      raise ValueError(
          f"{self.path}: truncated, or no safetensors file ({error}); fetch "
          "it again"
      ) from error
    self.tensors = {}
    for name in self._file.keys():
      header = self._file.get_slice(name)
      code = header.get_dtype()
      if code not in _DTYPES:
        raise ValueError(
            f"{self.path}: tensor {name!r} has dtype {code}, not one of "
            f"{list(_DTYPES)}"
        )
      shape = tuple(header.get_shape())
      # With a 0 among them, the library lets any dimensions pass.
      if len(shape) > _RANK or math.prod(max(d, 1) for d in shape) >= _SIZE:
        raise ValueError(
            f"{self.path}: tensor {name!r} has a shape that no array can have: "
            f"{list(shape[:_RANK])}"
        )
      self.tensors[name] = jax.ShapeDtypeStruct(shape, _DTYPES[code])

  def read(self, name: str) -> np.ndarray:
    """One tensor, read at every call."""
    return self._file.get_tensor(name)


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a file.

  Args:
    path: of the file.
    tensors: name -> values.
    metadata: strings for the header; `{"format": "pt"}` marks torch's layout.

  Raises:
    ValueError: for a dtype that is unknown here.
  """
  known = set(_DTYPES.values())
  bad = [f"{n}: {x.dtype}" for n, x in tensors.items() if x.dtype not in known]
  if bad:
    raise ValueError(f"{path}: safetensors has no dtype for {', '.join(bad)}")
  # The library writes the memory of an array as it lies.
  rows = {name: np.asarray(x, order="C") for name, x in tensors.items()}
  safetensors.numpy.save_file(rows, path, metadata and dict(metadata))
