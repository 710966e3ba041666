"""mmjax evaluate --workdir DIR [--step N] [--config FILE[:ARGUMENTS]]

Runs the evaluators of a config on a checkpoint of the run in DIR: the newest
one, and the config of the run itself, unless flags say otherwise. Prints a
table and writes DIR/eval.json and DIR/figures/.
"""

from collections.abc import Sequence

from absl import flags

from mmjax import verbs


def main(argv: Sequence[str]) -> int:
  """Runs the verb; see `mmjax.verbs` for the exit codes."""
  return verbs.run(__doc__, argv, _define, _evaluate)


def _define(values: flags.FlagValues, argv: Sequence[str]) -> None:
  verbs.define_config(values, argv, required=False)
  verbs.define_workdir(values)
  verbs.define_runtime(values)
  flags.DEFINE_integer(
      "step", None, "step of the checkpoint", flag_values=values
  )


def _evaluate(values: flags.FlagValues) -> int:
  verbs.start_runtime(values)
  from mmjax.train import checkpoint, loop, metrics  # Behind the set-up.

  folder = checkpoint.run_directory(values.workdir)
  config = values.config or checkpoint.stored_config(folder)
  step, results, figures = loop.evaluate_run(config, folder, values.step)
  if loop.is_first():
    checkpoint.write_json(folder / "eval.json", {"step": step} | results)
    metrics.write_figures(folder / "figures", step, figures)
    print(f"step {step:,}\n{metrics.table(results)}")
  return verbs.DONE
