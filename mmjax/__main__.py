"""The command `mmjax <verb>`, also `python -m mmjax <verb>`."""

from collections.abc import Sequence
import importlib
import sys

from mmjax.config import nearest

# A verb's module is imported only when it runs: help is immediate.
VERBS = {
    "train": ("train", "train a config, or continue a run"),
    "evaluate": ("evaluate", "run the evaluators on a checkpoint"),
    "sample": ("sample", "show pictures, ask, and talk in the terminal"),
    "config": ("config", "show a config in full and check it"),
    "systems": ("systems", "list systems, sizes, parameters and stages"),
    "compile": ("compile", "compile a config for TPUs without owning any"),
    "import": ("import_", "turn a public checkpoint into a run"),
    "export": ("export", "write a run as a public checkpoint"),
    "data": ("data", "look at data on disk, or convert it"),
    "bench": ("bench", "measure training speed"),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Dispatches to a verb and returns its exit code."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if not argv or argv[0] in ("help", "-h", "--help"):
    print(usage())
    return 0 if argv else 1
  verb, *rest = argv
  if verb not in VERBS:
    print(
        f"error: unknown verb {verb!r}{nearest(verb, VERBS)}\n{usage()}",
        file=sys.stderr,
    )
    return 1
  module = importlib.import_module(f"mmjax.verbs.{VERBS[verb][0]}")
  return module.main(rest)


def usage() -> str:
  """One line per verb."""
  lines = [f"  {verb:9} {text}" for verb, (_, text) in VERBS.items()]
  return "\n".join([
      "usage: mmjax <verb> [flags]; mmjax <verb> --help lists its flags",
      *lines,
  ])


if __name__ == "__main__":
  sys.exit(main())
