"""mmjax export --workdir DIR --out DIRECTORY [--step N] [--dtype D]

Writes the parameters of a run as a directory that transformers loads:
config.json and model.safetensors (several with an index above 5 GB), and the
tokenizer where the config has one.
"""

from collections.abc import Sequence

from absl import flags

from mmjax import verbs


def main(argv: Sequence[str]) -> int:
  """Runs the verb; see `mmjax.verbs` for the exit codes."""
  return verbs.run(__doc__, argv, _define, _export)


def _define(values: flags.FlagValues, argv: Sequence[str]) -> None:
  del argv
  verbs.define_workdir(values)
  flags.DEFINE_string(
      "out", None, "directory to write; it must not exist", flag_values=values
  )
  flags.mark_flag_as_required("out", flag_values=values)
  flags.DEFINE_integer(
      "step", None, "step of the checkpoint", flag_values=values
  )
  flags.DEFINE_enum(
      "dtype",
      "float32",
      ["float32", "bfloat16", "float16"],
      "of the floating tensors",
      flag_values=values,
  )
  flags.DEFINE_boolean(
      "shadow",
      False,
      "write the shadow parameters (EMA) where the run has them",
      flag_values=values,
  )


def _export(values: flags.FlagValues) -> int:
  import jax  # Slow, and --help of a verb does not need it.

  from mmjax import config as config_lib
  from mmjax import pretrained
  from mmjax.train import checkpoint, loop

  folder = checkpoint.run_directory(values.workdir)
  config = checkpoint.stored_config(folder)
  plan, step, variables = loop.restore_run(
      config, folder, values.step, values.shadow
  )
  tokenizer = config["streams"][0]["source"].get("tokenizer")
  pretrained.save_pretrained(
      values.out,
      plan.stage.system,
      variables,
      dtype=jax.numpy.dtype(values.dtype),
      tokenizer=tokenizer and config_lib.build(tokenizer, "tokenizer"),
  )
  print(f"{values.out}: step {step:,}")
  return verbs.DONE
