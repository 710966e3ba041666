"""mmjax train --config FILE[:ARGUMENTS] [--config.KEY=VALUE ...] --workdir DIR

Trains a config, or continues the run that is in DIR. DIR gets config.json,
checkpoints/, metrics.jsonl, tensorboard/, figures/ and, at the end,
results.json. SIGTERM and SIGINT (Ctrl-C) save before the process ends; the same
command continues. Exit codes: 0 done, 1 wrong input, 3 too many steps in a row
were not finite or too many losses jumped, 5 another process of the job ended,
130 SIGINT, 143 SIGTERM.
"""

from collections.abc import Sequence
import re
import sys

from absl import flags

from mmjax import verbs


def main(argv: Sequence[str]) -> int:
  """Runs the verb; see `mmjax.verbs` for the exit codes."""
  return verbs.run(__doc__, argv, _define, _train)


def _define(values: flags.FlagValues, argv: Sequence[str]) -> None:
  verbs.define_config(values, argv)
  verbs.define_workdir(values)
  verbs.define_runtime(values)
  flags.DEFINE_string(
      "profile",
      None,
      "FIRST:LAST, steps of a profiler trace in DIR/profile",
      flag_values=values,
  )
  flags.DEFINE_string(
      "wandb",
      None,
      "Weights & Biases project to log to as well",
      flag_values=values,
  )
  flags.DEFINE_list(
      "allow",
      [],
      "top-level config keys that may differ from those of the run in DIR",
      flag_values=values,
  )


def _train(values: flags.FlagValues) -> int:
  window = None
  if values.profile is not None:
    found = re.fullmatch(r"(\d+):(\d+)", values.profile)
    if found is None:
      raise ValueError(f"--profile={values.profile}: expected FIRST:LAST")
    window = int(found[1]), int(found[2])
  verbs.start_runtime(values)
  from mmjax.train import loop, metrics, stopper  # Behind the set-up of JAX.

  try:
    results = loop.train(
        values.config,
        values.workdir,
        profile=window,
        wandb=values.wandb,
        allow=values.allow,
    )
  except (loop.NotFiniteError, loop.UnstableError) as error:
    print(f"error: {error}", file=sys.stderr)
    return verbs.NOT_FINITE
  except stopper.InterruptedRun as stop:
    print(stop, file=sys.stderr)
    return 128 + stop.signal
  if loop.is_first():
    print(metrics.table(results))
  return verbs.DONE
