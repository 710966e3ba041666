"""What survives a run, and how does it go on?

A run directory holds `config.json` and `checkpoints/<step>/`, each with the
train state, the state of the data iterator, a few facts about the run and the
digests of its files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from mmjax import config as config_lib
from mmjax.train import integrity
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
    "loader_workers",
    "log_every",
    "mesh",
    "rewind",
)

# How the storage library calls a checkpoint that is not whole yet.
_DRAFT = ".orbax-checkpoint-tmp"


# Replicas share the writing of an array where each has that many bytes of it.
_SLICE = 2**20


def _handlers() -> Any:
  """How leaves of the state are written.

  By default the library cuts every array, however small, into a slice for each
  replica, and compiles a program for each cut: the first save of a small model
  on several devices takes about as long as the compilation of the step.
  """
  kinds = ocp.type_handlers
  return kinds.create_type_handler_registry(
      (np.ndarray, kinds.NumpyHandler()),
      (
          jax.Array,
          kinds.ArrayHandler(min_slice_bytes_for_replica_parallel=_SLICE),
      ),
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
  try:
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as error:
    raise ValueError(
        f"workdir {workdir}: cannot write there: {error}"
    ) from error
  if not (workdir / "config.json").exists():
    return
  # A key that is newer than the run has had its default.
  stored = resolved(config_lib.base()) | stored_config(workdir)
  old, new = leaves(stored), leaves(resolved(config))
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
  try:
    draft.write_text(json.dumps(value, indent=2) + "\n")
  except OSError as error:  # Of a full disk it does not say where.
    raise OSError(error.errno, error.strerror, str(path)) from error
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


class CheckpointError(OSError):
  """A checkpoint could not be written; those before it are whole."""


class Checkpoints:
  """The checkpoints of a run, written in the background.

  Close it, or use it in a `with` statement: only then is the last one whole.
  A checkpoint is verified before anything of it is read.
  """

  def __init__(self, workdir: pathlib.Path, keep: int | None = None) -> None:
    """Opens the checkpoints of a run.

    Args:
      workdir: the run directory.
      keep: how many of the newest to keep; all by default.
    """
    self._folder = workdir / "checkpoints"
    self._verified: set[int] = set()
    self._saving: int | None = None
    self._manager = ocp.CheckpointManager(
        self._folder,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # Called by one process, before a checkpoint gets its final name.
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._seal
            ),
        ),
        item_handlers={
            "state": ocp.PyTreeCheckpointHandler(
                type_handler_registry=_handlers()
            ),
            "data": ocp.JsonCheckpointHandler(),
            "facts": ocp.JsonCheckpointHandler(),
        },
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused: Any) -> None:
    try:
      with self._writing():
        self._manager.close()
    except CheckpointError:
      if kind is None:  # Else there is an error already, and it came first.
        raise

  def newest(self) -> int | None:
    """The step of the newest checkpoint, or None; it may be damaged."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """The steps of all checkpoints, in order."""
    return sorted(self._manager.all_steps())

  def step(self, step: int | None = None) -> int:
    """`step`, or that of the newest checkpoint.

    Raises:
      FileNotFoundError: if there is no such checkpoint, naming those there are.
    """
    steps = self.steps()
    if step is None and steps:
      return steps[-1]
    if step not in steps:
      wanted = "a checkpoint" + ("" if step is None else f" of step {step}")
      raise FileNotFoundError(
          f"{self._folder}: expected {wanted}, found steps {steps}"
      )
    return step

  def recover(self, say: Callable[[str], None] = print) -> int | None:
    """Makes a run ready to go on from whatever a killed one left.

    Damaged checkpoints behind the newest whole one move to `damaged/`, as they
    are, and unfinished ones are removed. To be called by all processes, and by
    nobody else while a run writes here.

    Args:
      say: is told what moved.

    Returns:
      The step of the newest whole checkpoint, or None if there never was one.

    Raises:
      ValueError: if there are checkpoints and none is whole; then nothing is
        touched.
    """
    whole = _once(lambda: self._sort_out(say))
    self._manager.reload()
    return None if whole == _NONE else whole

  def _sort_out(self, say: Callable[[str], None]) -> int:
    damaged: dict[int, str] = {}
    for step in reversed(self.steps()):
      try:
        self._verify(step)
        break
      except ValueError as error:
        damaged[step] = str(error)
    else:
      step = _NONE
    if damaged and step == _NONE:
      raise ValueError(
          "\n".join(damaged.values())
          + f"\nNo checkpoint of {self._folder} is whole, and nothing was "
          "written there. Bring one back from a copy, or take another --workdir"
      )
    for bad, why in damaged.items():
      place = _free(self._folder.parent / "damaged" / str(bad))
      place.parent.mkdir(exist_ok=True)
      (self._folder / str(bad)).rename(place)
      say(f"{why}\nIt is now {place}; going back to step {step:,}")
    for draft in self._folder.glob(f"*{_DRAFT}*"):
      shutil.rmtree(draft)
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

    Raises:
      CheckpointError: if this one, or the one before, cannot be written.
    """
    if step == self.newest():
      return
    with self._writing():
      # The checkpoint before may still be on its way.
      self._manager.wait_until_finished()
      self._saving = step
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
    """Returns when the last checkpoint is whole; raises as `save` does."""
    with self._writing():
      self._manager.wait_until_finished()

  def delete(self, step: int) -> None:
    """Removes a checkpoint."""
    self._manager.delete(step)
    self._verified.discard(step)

  def _seal(self) -> None:
    (draft,) = self._folder.glob(f"{self._saving}{_DRAFT}*")
    integrity.write_digests(pathlib.Path(draft))

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Says of any failure what it means for the run."""
    try:
      yield
    except Exception as error:  # The storage library has no type of its own.
      raise CheckpointError(
          f"{self._folder / str(self._saving)}: cannot write this checkpoint: "
          f"{_first_line(error)}\nThose before it are whole: make room, and "
          "the same command continues from there"
      ) from error

  def _verify(self, step: int) -> None:
    """Refuses a checkpoint that is damaged or leaves its directory."""
    if step in self._verified:
      return
    folder = self._folder / str(step)
    integrity.check_closed(folder)
    found = integrity.damage(folder)
    if found:
      raise ValueError(f"{folder} is damaged: {'; '.join(found)}")
    self._verified.add(step)

  def _check(self, step: int) -> None:
    """`_verify` by one process, on behalf of all."""
    _once(lambda: self._verify(step) or step)

  def restore(self, abstract: TrainState, step: int) -> TrainState:
    """Reads a state straight into the shardings of `abstract`.

    Args:
      abstract: leaves are ShapeDtypeStructs with shardings, of any mesh. Parts
        that are empty here (`opt`, say) are not read.
      step: of the checkpoint.

    Raises:
      ValueError: naming all missing and misshaped leaves, or what is damaged.
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
      ValueError: if the checkpoint is damaged, or names files outside its
        directory.
    """
    self._check(step)
    stored = self._manager.item_metadata(step)["state"].tree
    return {path: tuple(leaf.shape) for path, leaf in flat(stored).items()}

  def read(
      self, wanted: Mapping[str, jax.ShapeDtypeStruct], step: int
  ) -> dict[str, jax.Array]:
    """Reads the leaves of some stored paths."""
    self._check(step)
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
    self._check(step)
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


# Answers beside the number of a step.
_NONE, _FAILED = -1, -2


def _once(function: Callable[[], int]) -> int:
  """What a function returns, or raises, on the first process; on all."""
  answer, error = _FAILED, None
  if jax.process_index() == 0:
    try:
      answer = function()
    except ValueError as found:
      error = found
  answer = int(multihost_utils.broadcast_one_to_all(np.int32(answer)))
  if answer == _FAILED:
    raise error or ValueError("checkpoint refused; process 0 says why")
  return answer


def _free(path: pathlib.Path) -> pathlib.Path:
  """`path`, or the first of `path-1`, `path-2`... that does not exist."""
  number, found = 0, path
  while found.exists():
    number += 1
    found = path.with_name(f"{path.name}-{number}")
  return found


def _first_line(error: BaseException) -> str:
  return (str(error) or repr(error)).splitlines()[0]
