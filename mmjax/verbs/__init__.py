"""What do all verbs share? Flags of their own, and errors of one line.

A verb is a module with `main(argv) -> exit code`. Exit codes:

  0    done
  1    the command, the config or some input is wrong; one message says how
  3    training stopped: too many steps in a row were not finite, or the loss
       jumped too often
  4    a compiled step does not fit the memory of the chips
  5    another process of the job has ended; the state is that of the last
       checkpoint
  130  SIGINT stopped training; the state is saved
  143  SIGTERM stopped training; the state is saved
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import ctypes
import importlib.util
import os
import pathlib
import re
import sys
import types
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags

from mmjax import config as config_lib

DONE, WRONG, NOT_FINITE = 0, 1, 3


def run(
    usage: str,
    argv: Sequence[str],
    define: Callable[[flags.FlagValues, Sequence[str]], None],
    body: Callable[[flags.FlagValues], int],
) -> int:
  """Parses a verb's flags and runs it.

  Args:
    usage: printed by --help, above the flags.
    argv: the arguments behind the verb.
    define: `(values, argv)`, declares the verb's flags in `values`.
    body: what the verb does with the parsed flags; it returns the exit code.

  Returns:
    The exit code. Errors about the input become one message on stderr; with
    --debug they are raised.
  """
  values = flags.FlagValues()
  flags.DEFINE_boolean(
      "debug", False, "raise errors with a traceback", flag_values=values
  )
  debug = "--debug" in argv
  try:
    define(values, argv)
    if {"--help", "-h"} & set(argv):
      print(f"{usage.strip()}\n{values.get_help(include_special_flags=False)}")
      return DONE
    _parse(values, argv)
    return body(values)
  except (ValueError, OSError) as error:
    if debug:
      raise
    print(f"error: {error}", file=sys.stderr)
    return WRONG


def _parse(values: flags.FlagValues, argv: Sequence[str]) -> None:
  """Parses `argv`; whatever is wrong becomes a ValueError."""
  try:
    rest = values(["mmjax", *argv])[1:]
  except flags.UnrecognizedFlagError as error:
    near = config_lib.nearest(error.flagname, values)
    raise ValueError(f"unknown flag --{error.flagname}{near}") from error
  except flags.Error as error:
    raise ValueError(str(error)) from error
  if rest:
    raise ValueError(f"unexpected arguments {rest}; flags begin with --")


def load_module(path: str) -> types.ModuleType:
  """Runs a config file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it defines no `get_config`.
  """
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(f"--config: there is no file {path}")
  spec = importlib.util.spec_from_file_location("config", path)
  if spec is None:
    raise ValueError(f"--config: {path} is no Python file")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"--config: {path} defines no get_config")
  return module


def load_config(spec: str) -> ml_collections.ConfigDict:
  """Runs `get_config` of `FILE[:ARGUMENTS]`; see `load_module`."""
  path, *arguments = spec.split(":", 1)
  return load_module(path).get_config(*arguments)


def check_overrides(
    config: Mapping[str, Any], argv: Sequence[str]
) -> None:
  """Refuses `--config.KEY` flags whose key the config lacks."""
  valid = set(_paths(config_lib.freeze(config)))
  given = [re.match(r"--?(?:no)?config\.([^=]+)", word) for word in argv]
  wrong = [found[1] for found in given if found and found[1] not in valid]
  if wrong:
    raise ValueError("\n".join(
        f"--config.{key}: unknown key{config_lib.nearest(key, valid)}; "
        "`mmjax config` prints all keys"
        for key in wrong
    ))


def _paths(node: Any, where: str = "") -> Iterator[str]:
  """The places in a config, inner ones included: `optim[0][1].lr`."""
  if where:
    yield where
  if isinstance(node, Mapping):
    for key, value in node.items():
      yield from _paths(value, f"{where}.{key}" if where else key)
  elif isinstance(node, tuple):
    for i, value in enumerate(node):
      yield from _paths(value, f"{where}[{i}]")


def define_config(
    values: flags.FlagValues, argv: Sequence[str], required: bool = True
) -> None:
  """Declares `--config FILE[:ARGUMENTS]` and `--config.KEY=VALUE`.

  What the flags library says of a bad config is hard to read, so the config is
  loaded and checked here before.
  """
  for i, word in enumerate(argv):
    name, _, spec = word.partition("=")
    if name.lstrip("-") == "config":
      spec = spec or "".join(argv[i + 1 : i + 2])
      check_overrides(load_config(spec), argv)
  config_flags.DEFINE_config_file(
      "config",
      None,
      "config file and its arguments, configs/clip.py:size=b32; keys of the "
      "config are flags too: --config.steps=100",
      lock_config=True,
      sys_argv=["mmjax", *argv],
      flag_values=values,
  )
  if required:
    flags.mark_flag_as_required("config", flag_values=values)


def define_workdir(values: flags.FlagValues) -> None:
  """Declares `--workdir`."""
  flags.DEFINE_string(
      "workdir", None, "directory of the run", flag_values=values
  )
  flags.mark_flag_as_required("workdir", flag_values=values)


def define_runtime(values: flags.FlagValues) -> None:
  """Declares the flags that `start_runtime` reads."""
  flags.DEFINE_string(
      "compilation_cache",
      default_cache(os.environ),
      "directory where compiled programs are kept; empty for none",
      flag_values=values,
  )
  flags.DEFINE_boolean(
      "distributed",
      False,
      "join the other processes first; a TPU pod or Slurm is found out, other "
      "clusters need the next three flags",
      flag_values=values,
  )
  flags.DEFINE_string(
      "coordinator", None, "host:port of process 0", flag_values=values
  )
  flags.DEFINE_integer(
      "num_processes", None, "number of processes", flag_values=values
  )
  flags.DEFINE_integer(
      "process_id", None, "number of this process", flag_values=values
  )
  flags.DEFINE_integer(
      "join_timeout",
      300,
      "seconds to wait for the other processes to come",
      flag_values=values,
  )


def default_cache(environ: Mapping[str, str]) -> str:
  """Where compiled programs are kept unless a flag says otherwise."""
  if "JAX_COMPILATION_CACHE_DIR" in environ:
    return environ["JAX_COMPILATION_CACHE_DIR"]
  home = environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return str(pathlib.Path(home) / "mmjax" / "compiled")


def keep_memory() -> None:
  """Tells glibc to keep freed memory; elsewhere it does nothing.

  XLA:CPU asks for the temporaries of a step anew at every step. By default
  large blocks go back to the kernel, and each of their pages costs a fault
  when it is used again.
  """
  # M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h.
  options = {-8: 1, -4: 0, -1: -1}
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return
  for option, value in options.items():
    mallopt(option, value)


def start_runtime(values: flags.FlagValues) -> None:
  """Sets up JAX; nothing may have used a device before.

  Raises:
    ValueError: if only some of the flags of a cluster are given.
  """
  keep_memory()
  import jax  # Slow, and --help of a verb does not need it.

  jax.config.update("jax_compilation_cache_dir", values.compilation_cache)
  cluster: dict[str, Any] = dict(
      coordinator_address=values.coordinator,
      num_processes=values.num_processes,
      process_id=values.process_id,
  )
  missing = [key for key, value in cluster.items() if value is None]
  if 0 < len(missing) < len(cluster):
    raise ValueError(
        "--coordinator, --num_processes and --process_id belong together"
    )
  if values.distributed or not missing:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        **cluster, initialization_timeout=values.join_timeout
    )
