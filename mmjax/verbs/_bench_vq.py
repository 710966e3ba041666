"""mmjax bench vq [--cases ROWS:CODES:DIM[:LEVELS],...] [--json FILE]

Measures the vector-quantizer lookup on the first device of this machine, with
LEVELS the residual one. The alternatives: the N x K matrix of distances and its
argmin; with levels, one `vq_lookup` for each of them; on a CPU where PyTorch is
installed, its `cdist` and argmin. MiB are the temporaries of the compiled
program; "wrong" is the share of rows whose code is further away, in float64,
than the nearest by more than rounding.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
import re
import statistics
from typing import Any, NamedTuple

from absl import flags
import numpy as np

from mmjax.verbs import _timing

Row = dict[str, Any]

TWINS = "mmjax.verbs._bench_torch:vq_contestants"

# Rows that codes are checked for, and the distance that rounding may cost,
# relative to the square of the norm of a row.
_SAMPLE = 512
_ROUNDING = 1e-5


class Case(NamedTuple):
  """One problem; `levels` is 0 for a plain lookup."""

  rows: int
  codes: int
  dim: int
  levels: int


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  flags.DEFINE_list(
      "cases",
      ["65536:1024:128", "4096:16384:8", "16384:2048:256", "16384:1024:128:8"],
      "what to measure: ROWS:CODES:DIM or ROWS:CODES:DIM:LEVELS",
      flag_values=values,
  )


def prepare(values: flags.FlagValues) -> list[Case]:
  """The problems of --cases.

  Raises:
    ValueError: if one is not of its form.
  """
  cases = []
  number = r"([1-9]\d*)"
  for text in values.cases:
    found = re.fullmatch(rf"{number}:{number}:{number}(?::{number})?", text)
    if found is None:
      raise ValueError(
          f"--cases: {text!r}: expected ROWS:CODES:DIM or "
          "ROWS:CODES:DIM:LEVELS"
      )
    cases.append(Case(*(int(x or 0) for x in found.groups())))
  return cases


def rows(
    cases: list[Case], values: flags.FlagValues, report: Mapping[str, Any]
) -> Iterator[Row]:
  """The rows of the table, as they are measured."""
  for case in cases:
    for row in measure(case, values.rounds, values.patience):
      yield row | {"share": row["flop_rate"] / report["peak"]}


def measure(case: Case, rounds: int, patience: float) -> Iterator[Row]:
  """Measures one problem."""
  import jax
  import jax.numpy as jnp

  rng = np.random.default_rng(0)
  levels = max(case.levels, 1)
  # Each level of a residual quantizer is finer than the one before.
  fineness = 0.7 ** np.arange(levels)[:, None, None]
  shape = levels, case.codes, case.dim
  books = (rng.normal(size=shape) * fineness).astype(np.float32)
  x = rng.normal(size=(case.rows, case.dim)).astype(np.float32)
  arrays = jnp.asarray(x), jnp.asarray(books)
  turns, facts = {}, {}
  for name, search in implementations(case).items():
    compiled = jax.jit(search).lower(*arrays).compile()
    codes = np.asarray(compiled(*arrays)).reshape(case.rows, levels)
    facts[name] = {
        "bytes": compiled.memory_analysis().temp_size_in_bytes,
        "wrong": wrong(x, books, codes),
    }
    step = functools.partial(
        lambda run: jax.block_until_ready(run(*arrays)), compiled
    )
    turns[name] = functools.partial(_timing.turn, step)
  worker = None
  if (
      _timing.version("torch")
      and jax.default_backend() == "cpu"
      and not case.levels
  ):
    worker = _timing.Worker(TWINS, x, books[0], _timing.threads())
    turns |= worker.turns
  try:
    seconds, others = _timing.interleave(turns, rounds, patience)
  finally:
    if worker is not None:
      worker.close()
  medians = {name: statistics.median(s) for name, s in seconds.items()}
  flops = 2 * case.rows * case.codes * case.dim * levels
  for name, median in medians.items():
    yield {
        "case": ":".join(str(x) for x in case if x), "name": name,
        "seconds": median, "spread": _timing.spread(seconds[name]),
        "slower": median / medians["mmjax"], "flop_rate": flops / median,
        "others": others, **facts.get(name, {"bytes": None, "wrong": None}),
    }


def implementations(case: Case) -> dict[str, Callable[..., Any]]:
  """Name -> codes(x, books [Q, K, D]), ours first."""
  import jax.numpy as jnp

  from mmjax.kernels import vq_lookup as vq

  if case.levels:
    def lookups(x: Any, books: Any) -> Any:
      codes = []
      for book in books:
        index, _ = vq.vq_lookup(x, book)
        x = x - book[index]
        codes.append(index)
      return jnp.stack(codes, axis=1)

    return {
        "mmjax": lambda x, books: vq.residual_vq(x, books)[0],
        "lookups": lookups,
    }

  def matrix(x: Any, books: Any) -> Any:
    book = books[0]
    norms = jnp.square(x).sum(1)[:, None] + jnp.square(book).sum(1)
    return jnp.argmin(norms - 2 * x @ book.T, axis=1)

  return {
      "mmjax": lambda x, books: vq.vq_lookup(x, books[0])[0],
      "matrix": matrix,
  }


def wrong(x: np.ndarray, books: np.ndarray, codes: np.ndarray) -> float:
  """The share of some rows that have a wrong code at some level."""
  places = np.linspace(0, len(x) - 1, min(_SAMPLE, len(x))).astype(int)
  rest = x[places].astype(np.float64)
  slack = _ROUNDING * np.square(rest).sum(axis=1)
  bad = np.zeros(len(places), bool)
  for level, book in enumerate(books.astype(np.float64)):
    distances = (
        np.square(rest).sum(1)[:, None] + np.square(book).sum(1)
        - 2 * rest @ book.T
    )
    chosen = codes[places, level]
    found = np.take_along_axis(distances, chosen[:, None], axis=1)[:, 0]
    bad |= found > distances.min(axis=1) + slack
    rest = rest - book[chosen]
  return float(bad.mean())


def heading() -> str:
  """The names of the columns."""
  return (
      f"{'case':20}  {'by':10}{'ms':>9}{'spread':>8}{'slower':>8}"
      f"{'GFLOP/s':>9}{'of peak':>8}{'MiB':>9}{'wrong':>8}"
  )


def line(row: Row) -> str:
  """One row of the table; `slower` is relative to ours."""
  mib = "-" if row["bytes"] is None else f"{row['bytes'] / 2**20:,.1f}"
  wrong_ = "-" if row["wrong"] is None else f"{row['wrong']:.1%}"
  busy = f"  others used {row['others']:.1f} cores"
  return (
      f"{row['case']:20}  {row['name']:10}{1e3 * row['seconds']:9.1f}"
      f"{row['spread']:8.0%}{row['slower']:7.2f}x"
      f"{row['flop_rate'] / 1e9:9,.0f}{row['share']:8.0%}{mib:>9}{wrong_:>8}"
      + (busy if row["others"] > _timing.QUIET else "")
  )
