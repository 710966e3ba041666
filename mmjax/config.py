"""How does a config become objects? Import paths, keyword checks, arguments.

A config is an `ml_collections.ConfigDict`. Wherever it describes an object it
holds `type="package.module:Name"` and that callable's keyword arguments, so
there is no registry: what can be imported can be configured.
"""

from collections.abc import Callable, Iterable, Mapping
import difflib
import functools
import importlib
import inspect
from typing import Any

import ml_collections


def nearest(word: str, options: Iterable[str]) -> str:
  """`"; did you mean 'x'?"` for the option nearest to `word`, or nothing."""
  found = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
  return f"; did you mean {found[0]!r}?" if found else ""


def locate(path: str) -> Any:
  """Imports `"package.module:Name"`.

  Raises:
    ValueError: if the module or the name does not exist, with the nearest name.
  """
  module_name, _, name = path.partition(":")
  if not name:
    raise ValueError(f"type={path!r}: expected 'package.module:Name'")
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    raise ValueError(f"type={path!r}: {error}") from error
  if not hasattr(module, name):
    raise ValueError(
        f"type={path!r}: {module_name} has no {name!r}"
        + nearest(name, vars(module))
    )
  return getattr(module, name)


def check_keywords(
    target: Callable[..., Any], keywords: Iterable[str], where: str
) -> None:
  """Refuses keywords that `target` does not take, naming the nearest ones."""
  parameters = inspect.signature(target).parameters
  kinds = {p.kind for p in parameters.values()}
  if inspect.Parameter.VAR_KEYWORD in kinds:
    return
  # Linen adds `parent` and `name` to every module; no config sets them.
  valid = [name for name in parameters if name not in ("parent", "name")]
  wrong = [key for key in keywords if key not in valid]
  if wrong:
    lines = [f"{where}.{k}: unknown key{nearest(k, valid)}" for k in wrong]
    raise ValueError(
        "\n".join(lines) + f"\n{where} takes: {', '.join(valid)}"
    )


def freeze(value: Any) -> Any:
  """Turns config containers into hashable-friendly plain ones, recursively."""
  if isinstance(value, ml_collections.FieldReference):
    value = value.get()
  if isinstance(value, ml_collections.ConfigDict):
    value = {key: freeze(value[key]) for key in value}
  elif isinstance(value, Mapping):
    value = {key: freeze(item) for key, item in value.items()}
  elif isinstance(value, (list, tuple)):
    value = tuple(freeze(item) for item in value)
  return value


def build(node: Mapping[str, Any], where: str, **extra: Any) -> Any:
  """Calls the `type` of a config node with its other keys.

  Args:
    node: `{"type": "module:Name", **keywords}`; nested nodes with a `type` are
      built first.
    where: the node's place in the config, for error messages.
    **extra: further keyword arguments, not written in the config.
  """
  target, keywords = _resolve(node, where, extra)
  return target(**keywords)


def bind(node: Mapping[str, Any], where: str) -> Callable[..., Any]:
  """As `build`, but returns the callable with its keywords bound.

  The result keeps the attributes of the callable (`needs` of an objective).
  """
  target, keywords = _resolve(node, where, {})
  bound = functools.partial(target, **keywords)
  functools.update_wrapper(bound, target)
  return bound


def _resolve(
    node: Mapping[str, Any], where: str, extra: Mapping[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
  node = freeze(node)
  if "type" not in node:
    raise ValueError(f"{where}: needs type='package.module:Name'")
  target = locate(node["type"])
  keywords = {key: value for key, value in node.items() if key != "type"}
  check_keywords(target, keywords, where)
  for key, value in keywords.items():
    if isinstance(value, Mapping) and "type" in value:
      keywords[key] = build(value, f"{where}.{key}")
  return target, {**keywords, **extra}


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
  """Parses the part of `--config FILE:ARG` behind the colon.

  Args:
    arg: `"size=b32,stage=contrastive"`, or None.
    **defaults: the arguments that the config takes, with their default values;
      a value is cast to the type of its default.

  Returns:
    A locked ConfigDict with one entry per default.
  """
  values = dict(defaults)
  for item in filter(None, (arg or "").split(",")):
    key, separator, value = item.partition("=")
    if key not in defaults or not separator:
      raise ValueError(
          f"config argument {item!r}: expected key=value with a key of "
          f"{sorted(defaults)}{nearest(key, defaults)}"
      )
    kind = type(defaults[key])
    truth = value.lower() in ("1", "true")
    values[key] = truth if kind is bool else kind(value)
  return ml_collections.ConfigDict(values).lock()


def pick(table: Mapping[str, Any], key: str, what: str) -> Any:
  """`table[key]`, or an error that lists the valid keys and the nearest."""
  if key not in table:
    raise ValueError(
        f"{what} {key!r} is not one of {sorted(table)}{nearest(key, table)}"
    )
  return table[key]


def base() -> ml_collections.ConfigDict:
  """The top-level keys that every config of `configs/` fills in."""
  return ml_collections.ConfigDict(
      dict(
          # What is trained, and how: see `train.stage.Stage`.
          system={},
          objective={},
          weights={},
          optim=(),
          shadow=(),
          imports=(),
          steps=1000,
          batch_size=256,
          accumulate=1,
          frozen_dtype="float32",
          seed=0,
          # What it is fed: ({"source": {...}, "weight": 1.0}, ...).
          streams=(),
          # Processes that prepare batches (0: this one), and threads of each.
          loader_workers=0,
          loader_threads=2,
          # Where it runs: sizes of the mesh axes; -1 takes what is left.
          mesh=dict(data=-1, fsdp=1, tensor=1, context=1),
          # What is measured on the way: name -> {"type": ..., ...}.
          evals={},
          # Which copy of the parameters evaluators see.
          eval_shadow=False,
          # Steps between lines, evaluations and checkpoints (0: at the end).
          log_every=50,
          eval_every=0,
          checkpoint_every=500,
          keep_checkpoints=2,
          # Stop after so many steps in a row that were not finite.
          abort_after=10,
          # Go back where the loss jumps: see `train.spikes.Policy`.
          rewind=dict(spike=0.0, window=100, back=100, skip=100, most=3),
      )
  )
