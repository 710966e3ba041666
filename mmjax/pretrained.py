"""How do a directory of Hugging Face's form and a system become each other?

`from_pretrained` finds the paper's file that knows the directory's
architecture, `save_pretrained` the one that the system comes from; each such
file holds a `LAYOUT`.
"""

from collections.abc import Iterator, Mapping
import contextlib
import functools
import importlib
import itertools
import json
import os
from pathlib import Path
import pkgutil
import shutil
import sys
from typing import Any, NamedTuple, Protocol

from flax import traverse_util
import jax
from jax.sharding import Mesh
import numpy as np

from mmjax import models, sharding
from mmjax.nn import partitioning
from mmjax.weights import engine, safetensors_file
from mmjax.weights.layout import Layout
from mmjax.weights.source import INDEX, WEIGHTS, TensorSource, open_source

CONFIG = "config.json"


class Pretrained(NamedTuple):
  """What `from_pretrained` returns.

  Attributes:
    system: the Linen module.
    variables: for `system.apply`, `{"params": nested dict of arrays}`.
    config: the directory's config.json.
  """

  system: Any
  variables: dict[str, Any]
  config: dict[str, Any]


class Tokenizer(Protocol):
  """Anything that writes the files of a tokenizer."""

  def save_pretrained(self, directory: str) -> Any:
    """Writes into an existing directory."""
    ...


def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> Pretrained:
  """Reads `config.json` and `*.safetensors`, of a model of any size.

  Args:
    directory: a local directory, as `transformers` saves one.
    dtype: of the floating parameters; float32 by default.
    mesh: where the parameters go, each straight into its shards; by default
      to one device.

  Returns:
    The system, its variables and the config.

  Raises:
    FileNotFoundError: if the config or the weights are not there.
    ValueError: for an unknown architecture, a damaged file, a pickle, or
      tensors that do not fit the config, all named.
  """
  system, layout, source, config = open_directory(directory)
  shapes, axes = abstract_params(layout, system)
  params = engine.load(
      source,
      layout.table(system),
      shapes,
      shardings=mesh and sharding.shardings(axes, shapes, mesh),
      dtype=dtype,
  )
  nested = traverse_util.unflatten_dict(params, sep="/")
  return Pretrained(system, {"params": nested}, config)


def open_directory(
    directory: str | os.PathLike[str],
) -> tuple[Any, Layout, TensorSource, dict[str, Any]]:
  """Reads what a directory holds; no tensor yet.

  Returns:
    The system that its config describes, the layout of both, the tensors, and
    the config.

  Raises:
    As `from_pretrained`.
  """
  directory = Path(directory)
  config = _read_config(directory)
  layout = _find_layout(directory, config)
  source = open_source(directory)
  try:
    system = layout.system(config, source.tensors)
    abstract_params(layout, system)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{directory / CONFIG}: {error}") from error
  return system, layout, source, config


def save_pretrained(
    directory: str | os.PathLike[str],
    system: Any,
    variables: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer: Tokenizer | None = None,
) -> None:
  """Writes a directory that `transformers` and `from_pretrained` load.

  It appears whole or not at all: everything is written beside it first.

  Args:
    directory: must not exist, or be empty.
    system: a module of a paper's file that has a `LAYOUT`.
    variables: `{"params": nested dict of arrays}`.
    config: the config.json to keep, such as the one `from_pretrained` gave
      with its label names; it must describe `system`. By default one is made.
    dtype: of the floating tensors; by default each keeps its own.
    max_shard_bytes: above it the tensors go into several files and an index.
    tokenizer: its files are written too.

  Raises:
    FileExistsError: if the directory holds anything.
    ValueError: if transformers has no words for this system, if `variables`
      or `config` do not belong to it, or if a value does not fit `dtype`.
  """
  directory = Path(directory)
  layout = _layout_of(system)
  params = _check_params(layout, system, variables)
  table = layout.table(system)
  specs = engine.describe(table, params, dtype=dtype)
  config = _check_config(layout, system, config, specs)
  shards = _split(specs, max_shard_bytes)
  tensors = engine.dump(table, params, dtype=dtype)
  with _new_directory(directory) as unfinished:
    _write_json(unfinished / CONFIG, config)
    for name, part in shards.items():
      safetensors_file.write(
          unfinished / name,
          dict(itertools.islice(tensors, len(part))),
          {"format": "pt"},
      )
    if len(shards) > 1:
      _write_json(unfinished / INDEX, _index(shards))
    if tokenizer is not None:
      tokenizer.save_pretrained(str(unfinished))


def _read_config(directory: Path) -> dict[str, Any]:
  path = directory / CONFIG
  if not path.is_file():
    raise FileNotFoundError(
        f"{path}: not there; expected a local directory with {CONFIG} and "
        f"{WEIGHTS}"
    )
  try:
    config = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: not JSON: {error}") from error
  if not isinstance(config, dict):
    raise ValueError(f"{path}: expected a JSON object")
  return config


def _find_layout(directory: Path, config: Mapping[str, Any]) -> Layout:
  """The layout for the architecture that a config names."""
  layouts = {
      architecture: module.LAYOUT
      for name in sorted(m.name for m in pkgutil.iter_modules(models.__path__))
      if hasattr(
          module := importlib.import_module(f"{models.__name__}.{name}"),
          "LAYOUT",
      )
      for architecture in module.LAYOUT.architectures
  }
  named = config.get("architectures")
  if (
      not isinstance(named, list)
      or len(named) != 1
      or str(named[0]) not in layouts
  ):
    raise ValueError(
        f"{directory / CONFIG}: architectures is {named}; expected a list of "
        f"one of {sorted(layouts)}"
    )
  return layouts[named[0]]


def _layout_of(system: Any) -> Layout:
  module = sys.modules[type(system).__module__]
  if not hasattr(module, "LAYOUT"):
    raise ValueError(
        f"{type(system).__name__} of {module.__name__} has no form in "
        f"transformers: the module defines no LAYOUT"
    )
  return module.LAYOUT


@functools.lru_cache(maxsize=4)  # To trace a system takes seconds.
def abstract_params(
    layout: Layout, system: Any
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, tuple[Any, ...]]]:
  """Shapes and logical axes of a system's parameters; nothing is computed.

  Returns:
    path -> shape and dtype, and path -> one logical axis per dimension.
  """
  boxed = jax.eval_shape(
      system.init, jax.random.key(0), **layout.inputs(system)
  )["params"]
  flat = lambda tree: traverse_util.flatten_dict(tree, sep="/")
  return flat(partitioning.unbox(boxed)), flat(partitioning.axes(boxed))


def _check_params(
    layout: Layout, system: Any, variables: Mapping[str, Any]
) -> dict[str, Any]:
  """The parameters by path, after a comparison with what the system has."""
  expected, _ = abstract_params(layout, system)
  if set(variables) != {"params"}:
    raise ValueError(
        f"variables: expected 'params' alone, got {sorted(variables)}"
    )
  params = traverse_util.flatten_dict(variables["params"], sep="/")
  lines = _differences(
      {path: tuple(leaf.shape) for path, leaf in expected.items()},
      {path: tuple(leaf.shape) for path, leaf in params.items()},
  )
  if lines:
    raise ValueError(
        f"variables are not those of this {type(system).__name__}:\n{lines}"
    )
  return params


def _differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> str:
  return "\n".join(
      f"  {key}: expected {expected.get(key)}, got {got.get(key)}"
      for key in sorted(expected.keys() | got.keys())
      if expected.get(key) != got.get(key)
  )


def _check_config(
    layout: Layout,
    system: Any,
    config: Mapping[str, Any] | None,
    specs: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, Any]:
  """The config to write: the given one, if it describes the system."""
  described = layout.config(system)
  if config is not None:
    flat = lambda tree: traverse_util.flatten_dict(tree, sep=".")
    given = layout.config(layout.system(config, specs))
    lines = _differences(flat(described), flat(given))
    if lines:
      raise ValueError(
          f"config does not describe the system; correct it, or leave it out "
          f"to have one made:\n{lines}"
      )
    described = {k: v for k, v in config.items() if k != "torch_dtype"}
  # Reference implementations take the dtype of the first floating tensor.
  floating = [
      spec.dtype.name
      for spec in specs.values()
      if jax.dtypes.issubdtype(spec.dtype, np.floating)
  ]
  return described | {"dtype": floating[0]}


def _split(
    specs: Mapping[str, jax.ShapeDtypeStruct], limit: int
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """File name -> its tensors; a file exceeds `limit` only for one tensor."""
  parts: list[dict[str, jax.ShapeDtypeStruct]] = [{}]
  filled = 0
  for name, spec in specs.items():
    if parts[-1] and filled + _nbytes(spec) > limit:
      parts.append({})
      filled = 0
    parts[-1][name] = spec
    filled += _nbytes(spec)
  if len(parts) == 1:
    return {WEIGHTS: parts[0]}
  stem, suffix = os.path.splitext(WEIGHTS)
  return {
      f"{stem}-{i:05d}-of-{len(parts):05d}{suffix}": part
      for i, part in enumerate(parts, start=1)
  }


def _index(
    shards: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]],
) -> dict[str, Any]:
  size = sum(_nbytes(s) for part in shards.values() for s in part.values())
  return {
      "metadata": {"total_size": size},
      "weight_map": {
          name: shard for shard, part in shards.items() for name in part
      },
  }


def _nbytes(spec: jax.ShapeDtypeStruct) -> int:
  return spec.size * spec.dtype.itemsize


def _write_json(path: Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def _new_directory(directory: Path) -> Iterator[Path]:
  """Gives a directory to write into, which becomes `directory` at the end."""
  directory = directory.resolve()
  if directory.exists() and (
      not directory.is_dir() or any(directory.iterdir())
  ):
    raise FileExistsError(
        f"{directory}: holds something already; give a new directory"
    )
  directory.parent.mkdir(parents=True, exist_ok=True)
  unfinished = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
  unfinished.mkdir()
  try:
    yield unfinished
    # Atomic; an empty directory in the way is replaced.
    unfinished.rename(directory)
  except BaseException:
    shutil.rmtree(unfinished, ignore_errors=True)
    raise
