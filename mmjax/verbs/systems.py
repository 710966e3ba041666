"""mmjax systems [--configs DIR]

Lists what the configs of DIR describe: every system with its sizes, the number
of its parameters, and the stages that it can be trained in.
"""

from collections.abc import Iterator, Sequence
import pathlib
from typing import Any

from absl import flags

from mmjax import verbs


def main(argv: Sequence[str]) -> int:
  """Runs the verb; see `mmjax.verbs` for the exit codes."""
  return verbs.run(__doc__, argv, _define, _systems)


def _define(values: flags.FlagValues, argv: Sequence[str]) -> None:
  del argv
  flags.DEFINE_string(
      "configs", "configs", "directory of config files", flag_values=values
  )


def _systems(values: flags.FlagValues) -> int:
  folder = pathlib.Path(values.configs)
  if not folder.is_dir():
    raise FileNotFoundError(f"--configs={folder}: there is no such directory")
  print(f"{'config':14}{'size':10}{'parameters':>14}  stages")
  for path in sorted(folder.glob("*.py")):
    for size, parameters, stages in rows(path):
      print(f"{path.stem:14}{size:10}{parameters:>14,}  {', '.join(stages)}")
  return verbs.DONE


def rows(path: pathlib.Path) -> Iterator[tuple[str, int, Sequence[str]]]:
  """(size, parameters, stages) of each size of a config file.

  Nothing is computed: parameters are counted by their abstract shapes.
  """
  module = verbs.load_module(str(path))
  for size in module.SIZES:
    config = module.get_config(f"size={size}")
    yield size, parameters(config), stages(module, size)


def stages(module: Any, size: str) -> list[str]:
  """The stages that a config file offers for one of its sizes."""

  def offered(stage: str) -> bool:
    try:
      module.get_config(f"size={size},stage={stage}")
    except ValueError:
      return False
    return True

  return [stage for stage in module.STAGES if offered(stage)]


def parameters(config: Any) -> int:
  """The number of parameters of a config's system."""
  import jax  # Slow, and --help does not need it.

  from mmjax import config as config_lib
  from mmjax.nn import partitioning
  from mmjax.train import state

  system = config_lib.build(config.system, "config.system")
  source = config_lib.build(config.streams[0]["source"], "config.streams[0]")
  example = {key: leaf[None] for key, leaf in source[0].items()}
  boxed = state.boxed_variables(system, example)
  shapes = partitioning.unbox(boxed)["params"]
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))
