"""mmjax import --config FILE[:ARGUMENTS] --source PATH --workdir DIR [--skip R]

Makes a run directory at step 0 whose parameters are those of a public
checkpoint: a directory as transformers saves one, or a file with the names of
the official code (.npz for ViT, .safetensors for CLIP). `mmjax evaluate` and
`mmjax train` go on from there. Every tensor is checked before any is read.
"""

from collections.abc import Sequence
import functools

from absl import flags

from mmjax import verbs


def main(argv: Sequence[str]) -> int:
  """Runs the verb; see `mmjax.verbs` for the exit codes."""
  return verbs.run(__doc__, argv, _define, _import)


def _define(values: flags.FlagValues, argv: Sequence[str]) -> None:
  verbs.define_config(values, argv)
  verbs.define_workdir(values)
  verbs.define_runtime(values)
  flags.DEFINE_string(
      "source", None, "directory or file of the checkpoint", flag_values=values
  )
  flags.mark_flag_as_required("source", flag_values=values)
  flags.DEFINE_string(
      "skip",
      None,
      "pattern of whole parameter paths that are drawn at random instead",
      flag_values=values,
  )


def _import(values: flags.FlagValues) -> int:
  verbs.start_runtime(values)
  from mmjax.train import imports, loop  # Behind the set-up of JAX.

  give = functools.partial(
      imports.from_checkpoint, path=values.source, skip=values.skip
  )
  count = loop.begin(values.config, values.workdir, give)
  if loop.is_first():
    print(f"{values.workdir}: step 0 with {count:,} parameters")
  return verbs.DONE
