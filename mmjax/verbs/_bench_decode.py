"""mmjax bench decode [--cases SIZE:BATCH:PROMPT:NEW,...] [--json FILE]

Measures greedy decoding of a decoder with random parameters on the first
device of this machine: reading BATCH prompts of PROMPT tokens and writing NEW
tokens to each. SIZE is one of `mmjax.models.llm`. On a CPU where transformers
and PyTorch are installed, its `generate` has the same parameters and prompts,
after a check that it writes the same tokens: with its usual cache ("dynamic"),
with a static one, and with a static one whose forward pass went through
torch.compile ("compile").
"""

from collections.abc import Iterator, Mapping
import functools
import re
import statistics
import tempfile
from typing import Any, NamedTuple

from absl import flags
import numpy as np

from mmjax import config as config_lib
from mmjax.verbs import _timing

Row = dict[str, Any]

TWINS = "mmjax.verbs._bench_torch_llm:decode_contestants"


class Case(NamedTuple):
  """One problem; the numbers are tokens, but for the batch."""

  size: str
  batch: int
  prompt: int
  new: int


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  flags.DEFINE_list(
      "cases",
      ["tiny:1:64:64", "tiny:16:64:64", "small:1:64:64", "small:8:64:64"],
      "what to measure: SIZE:BATCH:PROMPT:NEW",
      flag_values=values,
  )


def prepare(values: flags.FlagValues) -> list[Case]:
  """The problems of --cases.

  Raises:
    ValueError: if one is not of its form, or its size does not exist.
  """
  from mmjax.models import llm  # Slow, and --help does not need it.

  cases = []
  for text in values.cases:
    found = re.fullmatch(r"([\w.]+)" + r":([1-9]\d*)" * 3, text)
    if found is None:
      raise ValueError(f"--cases: {text!r}: expected SIZE:BATCH:PROMPT:NEW")
    config_lib.pick(llm.SIZES, found[1], "--cases: size")
    cases.append(Case(found[1], *(int(x) for x in found.groups()[1:])))
  return cases


def rows(
    cases: list[Case], values: flags.FlagValues, report: Mapping[str, Any]
) -> Iterator[Row]:
  """The rows of the table, as they are measured."""
  del report  # Decoding is bound by memory: no share of the peak says much.
  for case in cases:
    yield from measure(case, values.rounds, values.patience)


def measure(case: Case, rounds: int, patience: float) -> Iterator[Row]:
  """Measures one problem.

  Raises:
    ValueError: if `generate` writes other tokens.
  """
  import jax

  from mmjax.models import llm

  system = config_lib.build(
      dict(llm.SIZES[case.size], type="mmjax.models.llm:Decoder"), "size"
  )
  tokens = np.random.default_rng(0).integers(
      1, system.vocab, (case.batch, case.prompt), np.int32
  )
  variables = _variables(system, tokens)
  ours, written = _ours(system, variables, tokens, case.new)
  turns = {"mmjax": functools.partial(_timing.turn, ours)}
  worker = None
  if (
      _timing.version("torch")
      and _timing.version("transformers")
      and jax.default_backend() == "cpu"
  ):
    worker = _worker(system, variables, tokens, written)
    turns |= worker.turns
  try:
    seconds, others = _timing.interleave(turns, rounds, patience)
  finally:
    if worker is not None:
      worker.close()
  medians = {name: statistics.median(s) for name, s in seconds.items()}
  for name, median in medians.items():
    yield {
        "case": ":".join(map(str, case)), "name": name, "seconds": median,
        "spread": _timing.spread(seconds[name]),
        "slower": median / medians["mmjax"],
        "tokens_per_second": case.batch * case.new / median,
        "others": others,
    }


def _variables(system: Any, tokens: np.ndarray) -> Any:
  """Random parameters, under which texts do not repeat one token."""
  import jax

  from mmjax.nn import partitioning

  init = jax.jit(system.init)(jax.random.key(0), tokens[:, :2])
  return jax.tree.map(lambda x: 2 * x, partitioning.unbox(init))


def _ours(
    system: Any, variables: Any, tokens: np.ndarray, new: int
) -> tuple[_timing.Step, np.ndarray]:
  """Our step, and what it writes: i32[B, new]."""
  import jax

  from mmjax.evals import answers
  from mmjax.sampling import autoregressive
  from mmjax.sampling.decoding import Decoding

  batch = {"tokens": tokens, "segment": np.ones_like(tokens)}

  def generate() -> jax.Array:
    steps = answers.writer(system, variables, batch, new)
    found, _ = autoregressive.generate(
        **steps._asdict(), decoding=Decoding(new)
    )
    return jax.block_until_ready(found.tokens)

  return lambda: (generate(), None)[1], np.asarray(generate())


def _worker(
    system: Any, variables: Any, tokens: np.ndarray, written: np.ndarray
) -> _timing.Worker:
  """PyTorch's contestants, which read our parameters from a directory."""
  from mmjax import pretrained

  with tempfile.TemporaryDirectory() as folder:
    directory = f"{folder}/model"
    pretrained.save_pretrained(directory, system, variables)
    worker = _timing.Worker(
        TWINS,
        directory,
        tokens,
        written.shape[1],
        _timing.threads(),
        # The processes of torch.compile.
        daemon=False,
    )
  texts, missing = worker.facts
  for name, reason in missing.items():
    print(f"no {name}: {reason}")
  for name, text in texts.items():
    if not np.array_equal(text, written):
      worker.close()
      at = int(np.argmax((text != written).any(axis=0)))
      raise ValueError(
          f"{name} of transformers writes another token {at}: the decoders are "
          "not the same, and a comparison would say nothing"
      )
  return worker


def heading() -> str:
  """The names of the columns."""
  return (
      f"{'case':22}  {'by':10}{'ms':>9}{'spread':>8}{'slower':>8}"
      f"{'tokens/s':>10}"
  )


def line(row: Row) -> str:
  """One row of the table; `slower` is relative to ours."""
  busy = f"  others used {row['others']:.1f} cores"
  return (
      f"{row['case']:22}  {row['name']:10}{1e3 * row['seconds']:9.1f}"
      f"{row['spread']:8.0%}{row['slower']:7.2f}x"
      f"{row['tokens_per_second']:10,.0f}"
      + (busy if row["others"] > _timing.QUIET else "")
  )
