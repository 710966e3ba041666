"""mmjax bench train|decode|attention|vq|data|checkpoint [flags]

Measures on the devices of this machine, and compares with what else is
installed. The contestants of a row take turns in one run, so that a slow minute
of the machine is slow for all of them, and rounds in which other processes were
busy are repeated. PyTorch runs in a process of its own. Use taskset to choose
the cores; `mmjax bench WHAT --help` says more of each.
"""

from collections.abc import Sequence
import functools
import importlib
import json
import pathlib
import types
from typing import Any

from absl import flags

from mmjax import verbs

# What can be measured, by module: each has `define(values)`, `prepare(values)`,
# which refuses wrong flags before anything starts, `rows(prepared, values,
# report)`, `heading()` and `line(row)`.
WHAT = {
    "train": "mmjax.verbs._bench_train",
    "decode": "mmjax.verbs._bench_decode",
    "attention": "mmjax.verbs._bench_attention",
    "vq": "mmjax.verbs._bench_vq",
    "data": "mmjax.verbs._bench_data",
    "checkpoint": "mmjax.verbs._bench_checkpoint",
}


def main(argv: Sequence[str]) -> int:
  """Runs the verb; see `mmjax.verbs` for the exit codes."""
  if not argv or argv[0] not in WHAT:
    rest = [word for word in argv if word.startswith("-")]
    return verbs.run(__doc__, rest, lambda *unused: None, _refuse)
  table = importlib.import_module(WHAT[argv[0]])
  define = functools.partial(_define, table)
  return verbs.run(
      table.__doc__, argv[1:], define, functools.partial(_bench, table)
  )


def _refuse(values: flags.FlagValues) -> int:
  del values
  raise ValueError(f"say what to measure: mmjax bench {'|'.join(WHAT)} [flags]")


def _define(
    table: types.ModuleType, values: flags.FlagValues, argv: Sequence[str]
) -> None:
  del argv
  table.define(values)
  flags.DEFINE_integer(
      "rounds",
      10,
      "turns of each contestant",
      lower_bound=2,
      flag_values=values,
  )
  flags.DEFINE_float(
      "patience",
      60.0,
      "seconds to spend on a row in search of quiet rounds",
      flag_values=values,
  )
  flags.DEFINE_string(
      "json", None, "file to write all numbers to", flag_values=values
  )
  verbs.define_runtime(values)


def _bench(table: types.ModuleType, values: flags.FlagValues) -> int:
  prepared = table.prepare(values)
  verbs.start_runtime(values)
  report = environment(values.dtype if "dtype" in values else "float32")
  print(f"{heading(report)}\n{table.heading()}", flush=True)
  for row in table.rows(prepared, values, report):
    print(table.line(row), flush=True)
    report["rows"].append(row)
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(report, indent=2) + "\n")
  return verbs.DONE


def environment(dtype: str = "float32") -> dict[str, Any]:
  """Where the rows of a report are measured.

  `peak` is in FLOP/s of products of `dtype`; on a CPU, as measured, of float32.
  """
  import jax

  from mmjax.perf import chips
  from mmjax.verbs import _timing

  kind, count = jax.devices()[0].device_kind, jax.device_count()
  chip = chips.from_device_kind(kind)
  return {
      "device": kind,
      "devices": count,
      "threads": _timing.threads(),
      "jax": jax.__version__,
      "torch": _timing.version("torch"),
      "peak": chip.peak(dtype) * count if chip else _timing.product_rate(),
      "rows": [],
  }


def heading(report: dict[str, Any]) -> str:
  """What stands above a table."""
  torch = f", torch {report['torch']}" if report["torch"] else ""
  return (
      f"{report['devices']} x {report['device']}, {report['threads']} threads, "
      f"jax {report['jax']}{torch}; peak {report['peak'] / 1e9:,.0f} GFLOP/s"
  )
