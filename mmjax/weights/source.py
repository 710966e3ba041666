"""Where do foreign tensors come from? Files and directories, never pickles.

A source knows the name, shape and dtype of all its tensors before it reads one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
import json
import math
import os
from pathlib import Path
from typing import IO, Protocol
import zipfile

import jax
import numpy as np

from mmjax.weights.safetensors_file import SafetensorsFile

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class TensorSource(Protocol):
  """Named tensors.

  Attributes:
    path: where they are, for messages.
    tensors: name -> `jax.ShapeDtypeStruct`.
  """

  path: Path
  tensors: Mapping[str, jax.ShapeDtypeStruct]

  def read(self, name: str) -> np.ndarray:
    """The values of one tensor, as a view of the file where it allows one."""
    ...


class ShardedSource:
  """Several safetensors files under one directory, as one source."""

  def __init__(self, path: Path, files: Iterable[SafetensorsFile]) -> None:
    """Joins files.

    Args:
      path: their directory.
      files: the files.

    Raises:
      ValueError: if two of them hold a tensor of the same name.
    """
    self.path = path
    self._file = {}
    names: Counter[str] = Counter()
    for file in files:
      names.update(list(file.tensors))
      self._file.update(dict.fromkeys(file.tensors, file))
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
      raise ValueError(f"{path}: more than one shard holds {', '.join(twice)}")
    self.tensors = {
        name: file.tensors[name] for name, file in self._file.items()
    }

  def read(self, name: str) -> np.ndarray:
    """A read-only view of one tensor."""
    return self._file[name].read(name)


class NpzSource:
  """A NumPy `.npz` archive, such as Google's ViT checkpoints."""

  def __init__(self, path: str | os.PathLike[str]) -> None:
    """Opens an archive and reads the headers of its arrays.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if the archive is damaged, or if an array is a pickle.
    """
    self.path = Path(path)
    try:
      with zipfile.ZipFile(self.path) as archive:
        self.tensors = _npy_headers(archive)
      self._arrays = np.load(self.path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
      raise ValueError(f"{self.path}: unreadable archive: {error}") from error
    pickled = [n for n, spec in self.tensors.items() if spec.dtype.hasobject]
    if pickled:
      raise ValueError(
          f"{self.path}: {', '.join(pickled)} hold Python objects, that is, a "
          f"pickle, which can run any code when it is loaded"
      )

  def read(self, name: str) -> np.ndarray:
    """One array, read anew at every call.

    Raises:
      ValueError: if its bytes are damaged.
    """
    try:
      return self._arrays[name]
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
      raise ValueError(f"{self.path}: {name!r} is damaged: {error}") from error


def _npy_headers(archive: zipfile.ZipFile) -> dict[str, jax.ShapeDtypeStruct]:
  """Name -> shape and dtype of the arrays of an archive.

  Raises:
    ValueError: if a member is no array or hides another one, or if its header
      tells of another size than the archive: reading allocates what it tells.
  """
  found = {}
  for member in archive.infolist():
    name = member.filename.removesuffix(".npy")
    if name == member.filename or name in found:
      raise ValueError(f"{member.filename!r} is no array, or is there twice")
    with archive.open(member) as file:
      spec = _npy_header(file)
      size = math.prod(spec.shape) * spec.dtype.itemsize
      rest = member.file_size - file.tell()
    if min(spec.shape, default=0) < 0 or size != rest:
      if not spec.dtype.hasobject:  # That is refused for what it is.
        raise ValueError(
            f"{name!r} has {rest:,} bytes, and a header for {spec.dtype}"
            f"{list(spec.shape)}"
        )
    found[name] = spec
  return found


def _npy_header(file: IO[bytes]) -> jax.ShapeDtypeStruct:
  version = np.lib.format.read_magic(file)
  reader = (
      np.lib.format.read_array_header_1_0
      if version == (1, 0)
      else np.lib.format.read_array_header_2_0
  )
  shape, _, dtype = reader(file)
  return jax.ShapeDtypeStruct(shape, dtype)


def open_source(path: str | os.PathLike[str]) -> TensorSource:
  """Opens a directory of Hugging Face's form, a safetensors or an npz file.

  Raises:
    FileNotFoundError: if nothing is there, or no safetensors.
    ValueError: for a pickle, with the way to convert it; for damaged files.
  """
  path = Path(path)
  if path.is_dir():
    return _open_directory(path)
  if path.suffix in PICKLES:
    raise ValueError(_refusal(path))
  if path.suffix == ".npz":
    return NpzSource(path)
  return SafetensorsFile(path)


def _open_directory(directory: Path) -> TensorSource:
  if (directory / WEIGHTS).exists():
    return SafetensorsFile(directory / WEIGHTS)
  if (directory / INDEX).exists():
    return _open_shards(directory)
  pickles = sorted(p for p in directory.iterdir() if p.suffix in PICKLES)
  if pickles:
    raise ValueError(_refusal(pickles[0]))
  raise FileNotFoundError(f"{directory}: holds neither {WEIGHTS} nor {INDEX}")


def _open_shards(directory: Path) -> ShardedSource:
  """Opens the shards that an index names."""
  index = directory / INDEX
  try:
    shard_of = dict(json.loads(index.read_bytes())["weight_map"])
    shards = sorted(set(map(os.fspath, shard_of.values())))
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(
        f"{index}: expected a JSON object with a 'weight_map' from tensors to "
        f"files; got {error!r}"
    ) from error
  outside = [s for s in shards if s in ("", "..") or Path(s).name != s]
  if outside:
    raise ValueError(
        f"{index}: shards must be files beside the index, not {outside}"
    )
  absent = [s for s in shards if not (directory / s).is_file()]
  if absent:
    raise FileNotFoundError(
        f"{directory}: {INDEX} names shards that are not there: "
        f"{', '.join(absent)}"
    )
  files = {s: SafetensorsFile(directory / s) for s in shards}
  lost = [
      f"{name} in {shard}"
      for name, shard in shard_of.items()
      if name not in files[shard].tensors
  ]
  if lost:
    raise ValueError(
        f"{directory}: {INDEX} names tensors that their shards do not hold: "
        f"{', '.join(lost)}"
    )
  return ShardedSource(directory, files.values())


def _refusal(path: Path) -> str:
  return f"""\
{path} is a pickle, which can run any code when it is loaded; it is not read.
Convert it once, where torch is installed:

  import torch, safetensors.torch
  state = torch.load("{path}", map_location="cpu", weights_only=True)
  state = {{k: v.clone(memory_format=torch.contiguous_format)
           for k, v in state.items()}}
  safetensors.torch.save_file(state, "{path.with_name(WEIGHTS)}")

For a TorchScript archive, such as OpenAI's CLIP, the second line is
  state = torch.jit.load("{path}", map_location="cpu").state_dict()"""
