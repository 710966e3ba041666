"""What survives a run, and how does it go on?

A run directory holds `config.json` and `checkpoints/<step>/`, each with the
train state, the state of the data iterator and a few facts about the run.
"""

from collections.abc import Iterable, Mapping
import json
import os
import pathlib
import re
from typing import Any

import jax
import orbax.checkpoint as ocp

from mmjax import config as config_lib
from mmjax.train.state import TrainState, flat, nest

# Config keys that change neither the mathematics nor the data: a run may be
# continued with other values. Everything else needs the user's word.
FREE_KEYS = (
    "abort_after",
    "checkpoint_every",
    "eval_every",
    "eval_shadow",
    "evals",
    "keep_checkpoints",
    "loader_threads",
    "log_every",
    "mesh",
)


# --- the run directory --------------------------------------------------------


def run_directory(path: str | os.PathLike[str]) -> pathlib.Path:
  """The absolute path of a run directory."""
  return pathlib.Path(path).expanduser().resolve()


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
  """A config as plain JSON values, references replaced by their values."""
  return json.loads(json.dumps(config_lib.freeze(config)))


def leaves(value: Any, where: str = "") -> dict[str, Any]:
  """A JSON value as `{"optim[0].lr": leaf}`."""
  if isinstance(value, Mapping) and value:
    dot = f"{where}." if where else ""
    items = {f"{dot}{key}": item for key, item in value.items()}
  elif isinstance(value, list) and value:
    items = {f"{where}[{i}]": item for i, item in enumerate(value)}
  else:
    return {where: value}
  found = {}
  for path, item in items.items():
    found |= leaves(item, path)
  return found


def check_workdir(
    workdir: pathlib.Path, config: Mapping[str, Any], allow: Iterable[str] = ()
) -> None:
  """Refuses a directory that cannot be written or that holds another run.

  Args:
    workdir: the run directory; it is made if it does not exist.
    config: the config to run.
    allow: top-level config keys that may differ, beside `FREE_KEYS`.

  Raises:
    ValueError: listing the differing keys with both values, or saying that the
      directory cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f"workdir {workdir}: cannot make it: {error}") from error
  if not os.access(workdir, os.W_OK | os.X_OK):
    raise ValueError(f"workdir {workdir}: no permission to write there")
  if not (workdir / "config.json").exists():
    return
  old, new = leaves(stored_config(workdir)), leaves(resolved(config))
  free = {*FREE_KEYS, *allow}
  differing = [
      f"  {key}: {old.get(key, 'absent')!r} there, "
      f"{new.get(key, 'absent')!r} here"
      for key in sorted(old.keys() | new.keys())
      if old.get(key, "absent") != new.get(key, "absent")
      and re.split(r"[.\[]", key)[0] not in free
  ]
  if differing:
    raise ValueError(
        f"workdir {workdir} holds a run of another config:\n"
        + "\n".join(differing)
        + "\nTake another --workdir, or name the top-level keys that may "
        "differ in --allow"
    )


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file at once: a reader finds the old one or the new one."""
  draft = path.with_name(path.name + ".tmp")
  draft.write_text(json.dumps(value, indent=2) + "\n")
  draft.replace(path)


def stored_config(workdir: pathlib.Path) -> dict[str, Any]:
  """The config of a run.

  Raises:
    FileNotFoundError: if `workdir` is no run directory.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise FileNotFoundError(
        f"{workdir} is no run directory: it has no config.json"
    )
  return json.loads(path.read_text())


# --- checkpoints --------------------------------------------------------------


def to_tree(state: TrainState) -> dict[str, Any]:
  """A state as nested dicts of strings.

  What is stored then depends neither on the classes of the optimizer library
  nor on how the storage library treats a "/" inside a key.
  """
  paths, _ = jax.tree_util.tree_flatten_with_path(state)
  return nest({_path(keys): leaf for keys, leaf in paths})


def from_tree(abstract: TrainState, tree: Mapping[str, Any]) -> TrainState:
  """The inverse of `to_tree`, for a state of the structure of `abstract`."""
  leaves = flat(tree)
  return jax.tree_util.tree_map_with_path(
      lambda keys, _: leaves[_path(keys)], abstract
  )


def _path(keys: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(keys, simple=True, separator="/")


class Checkpoints:
  """The checkpoints of a run, written in the background.

  Close it, or use it in a `with` statement: only then is the last one whole.
  """

  def __init__(self, workdir: pathlib.Path, keep: int | None = None) -> None:
    """Opens the checkpoints of a run.

    Args:
      workdir: the run directory.
      keep: how many of the newest to keep; all by default.
    """
    self._folder = workdir / "checkpoints"
    self._manager = ocp.CheckpointManager(
        self._folder,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True
        ),
        item_handlers={
            "state": ocp.PyTreeCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "facts": ocp.JsonCheckpointHandler(),
        },
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *unused: Any) -> None:
    self._manager.close()

  def newest(self) -> int | None:
    """The step of the newest checkpoint, or None."""
    return self._manager.latest_step()

  def step(self, step: int | None = None) -> int:
    """`step`, or that of the newest checkpoint.

    Raises:
      FileNotFoundError: if there is no such checkpoint, naming those there are.
    """
    steps = sorted(self._manager.all_steps())
    if step is None and steps:
      return steps[-1]
    if step not in steps:
      wanted = "a checkpoint" + ("" if step is None else f" of step {step}")
      raise FileNotFoundError(
          f"{self._folder}: expected {wanted}, found steps {steps}"
      )
    return step

  def save(
      self,
      step: int,
      state: TrainState,
      data: Any,
      facts: Mapping[str, Any],
  ) -> None:
    """Writes a checkpoint; it returns when the state may be donated.

    Args:
      step: steps taken.
      state: after `step` steps.
      data: JSON, the state of the data iterator, the same on all processes.
      facts: JSON, anything else.
    """
    if step == self.newest():
      return
    self._manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.PyTreeSave(to_tree(state)),
            data=ocp.args.JsonSave(data),
            facts=ocp.args.JsonSave(dict(facts)),
        ),
        force=True,
    )

  def wait(self) -> None:
    """Returns when the last checkpoint is whole."""
    self._manager.wait_until_finished()

  def restore(self, abstract: TrainState, step: int) -> TrainState:
    """Reads a state straight into the shardings of `abstract`.

    Args:
      abstract: leaves are ShapeDtypeStructs with shardings, of any mesh. Parts
        that are empty here (`opt`, say) are not read.
      step: of the checkpoint.

    Raises:
      ValueError: naming all missing and misshaped leaves.
    """
    wanted, stored = flat(to_tree(abstract)), self.shapes(step)
    found = faults(wanted, stored)
    if found:
      raise ValueError(
          f"{self._folder / str(step)} does not fit the config:\n"
          + "\n".join(found)
      )
    return from_tree(abstract, nest(self.read(wanted, step)))

  def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
    """path -> shape of the stored leaves.

    Raises:
      ValueError: if the checkpoint names files outside its directory.
    """
    check_closed(self._folder / str(step) / "state")
    stored = self._manager.item_metadata(step)["state"].tree
    return {path: tuple(leaf.shape) for path, leaf in flat(stored).items()}

  def read(
      self, wanted: Mapping[str, jax.ShapeDtypeStruct], step: int
  ) -> dict[str, jax.Array]:
    """Reads the leaves of some stored paths."""
    tree = nest(wanted)
    args = ocp.args.PyTreeRestore(
        item=tree,
        restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
        partial_restore=True,
    )
    found = self._manager.restore(step, args=ocp.args.Composite(state=args))
    return flat(found["state"])

  def read_json(self, step: int) -> tuple[Any, dict[str, Any]]:
    """The `data` and the `facts` of `save`."""
    found = self._manager.restore(
        step,
        args=ocp.args.Composite(
            data=ocp.args.JsonRestore(), facts=ocp.args.JsonRestore()
        ),
    )
    return found["data"], found["facts"]


def faults(
    wanted: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]
) -> list[str]:
  """One line for every leaf that is missing or has another shape."""
  return [f"  {path}: missing" for path in wanted if path not in stored] + [
      f"  {path}: {stored[path]} there, {tuple(leaf.shape)} here"
      for path, leaf in wanted.items()
      if path in stored and stored[path] != tuple(leaf.shape)
  ]


def check_closed(folder: pathlib.Path) -> None:
  """Refuses a checkpoint whose keys or links lead outside its directory.

  Keys of the metadata become parts of file paths, so an absolute one, or one
  with "..", would make the storage library read any file.
  """
  metadata = json.loads((folder / "_METADATA").read_text())
  keys = {
      str(part["key"])
      for entry in metadata["tree_metadata"].values()
      for part in entry["key_metadata"]
  }
  bad = sorted(k for k in keys if "/" in k or "\\" in k or k in ("", ".", ".."))
  bad += sorted(str(p) for p in folder.rglob("*") if p.is_symlink())
  if bad:
    raise ValueError(
        f"{folder}: refused, these keys or links may lead outside of it: {bad}"
    )
