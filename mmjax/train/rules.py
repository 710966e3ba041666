"""Which rule governs which parameter? Ordered regular expressions on paths."""

from collections.abc import Iterable, Sequence
import re

from mmjax import config


def assign(
    paths: Iterable[str],
    patterns: Sequence[str],
    where: str,
    *,
    partial: bool = False,
) -> dict[str, int]:
  """Gives each parameter the first pattern that matches its whole path.

  Args:
    paths: parameter paths such as "vision/encoder/cls".
    patterns: regular expressions, tried in order with `re.fullmatch`.
    where: name of the rules, for error messages.
    partial: whether paths may stay without a pattern; they are then left out.

  Returns:
    path -> index of its pattern.

  Raises:
    ValueError: naming all parameters without a rule and all rules that win no
      parameter, with both lists.
  """
  paths = sorted(paths)
  owner = {}
  for path in paths:
    for index, pattern in enumerate(patterns):
      if re.fullmatch(pattern, path):
        owner[path] = index
        break
  idle = [p for i, p in enumerate(patterns) if i not in set(owner.values())]
  bare = [p for p in paths if p not in owner and not partial]
  if idle or bare:
    faults = [
        f"  rule {pattern!r} wins no parameter"
        + config.nearest(pattern, paths)
        for pattern in idle
    ] + [f"  parameter {path!r} has no rule" for path in bare]
    raise ValueError(
        f"{where}: rules and parameters do not fit (rules match whole paths, "
        "the first match wins):\n"
        + "\n".join(faults)
        + f"\nrules: {list(patterns)}\nparameters:\n  "
        + "\n  ".join(paths)
    )
  return owner
