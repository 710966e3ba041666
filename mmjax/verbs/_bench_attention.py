"""mmjax bench attention [--cases PATTERN:LENGTH:HEADS:DIM,...] [--json FILE]

Measures attention on the first device of this machine, forward alone and with
its gradients. The alternatives: all scores at once, `jax.nn`'s own (also
through cuDNN on a GPU), the splash attention that ships with JAX on a TPU and,
on a CPU where PyTorch is installed, its `scaled_dot_product_attention` and
compiled FlexAttention. GFLOP/s count visible pairs only; MiB are the
temporaries of the compiled program; the error is that of the output, against
float64, relative to the largest value. --paper measures nothing, and says what
the TPU kernels cost by the model that chose their tiles.
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

# Rows of one head that the error is measured on.
_SAMPLE = 64

TWINS = "mmjax.verbs._bench_torch:attention_contestants"


class Case(NamedTuple):
  """One problem: self-attention of `heads` heads, batch 1."""

  pattern: str
  length: int
  heads: int
  dim: int


def _packed(length: int) -> np.ndarray:
  """Documents of mixed lengths, about eight, the same every time."""
  rng = np.random.default_rng(0)
  ends = np.sort(rng.choice(np.arange(1, length), 7, replace=False))
  return np.searchsorted(ends, np.arange(length), side="right")


def _scales(length: int) -> list[int]:
  """VAR's ten scales, stretched to a length."""
  sides = np.array([1, 2, 3, 4, 5, 6, 8, 10, 13, 16]) ** 2
  ends = np.round(np.cumsum(sides) * length / sides.sum()).astype(int)
  return [int(x) for x in np.diff(ends, prepend=0) if x]


# Pattern -> length -> mask; the functions of `nn.mask`, imported late.
PATTERNS: Mapping[str, Callable[[Any, int], Any]] = {
    "full": lambda masks, length: masks.full(length),
    "causal": lambda masks, length: masks.causal(length),
    "window": lambda masks, length: masks.window(length, max(1, length // 16)),
    "packed": lambda masks, length: masks.packed(
        masks.causal(length), _packed(length)
    ),
    "var": lambda masks, length: masks.scales(_scales(length)),
    "chunks": lambda masks, length: masks.chunks(length, max(1, length // 32)),
}


def define(values: flags.FlagValues) -> None:
  """Declares the flags."""
  flags.DEFINE_list(
      "cases",
      ["causal:4096:4:64", "full:2048:4:64", "packed:4096:4:64",
       "window:4096:4:64", "var:4096:4:64"],
      f"what to measure: PATTERN:LENGTH:HEADS:DIM; patterns {list(PATTERNS)}",
      flag_values=values,
  )
  flags.DEFINE_enum(
      "dtype", "float32", ["float32", "bfloat16"], "of q, k and v",
      flag_values=values,
  )
  flags.DEFINE_boolean(
      "paper", False, "say what the TPU kernels cost on paper",
      flag_values=values,
  )


def prepare(values: flags.FlagValues) -> list[Case]:
  """The problems of --cases.

  Raises:
    ValueError: if one is not of its form.
  """
  cases = []
  for text in values.cases:
    found = re.fullmatch(r"(\w+):([1-9]\d*):([1-9]\d*):([1-9]\d*)", text)
    if found is None or found[1] not in PATTERNS:
      raise ValueError(
          f"--cases: {text!r}: expected PATTERN:LENGTH:HEADS:DIM with a "
          f"pattern of {list(PATTERNS)}"
      )
    cases.append(Case(found[1], *(int(x) for x in found.groups()[1:])))
  return cases


def rows(
    cases: list[Case], values: flags.FlagValues, report: Mapping[str, Any]
) -> Iterator[Row]:
  """The rows of the table, as they are measured."""
  for case in cases:
    if values.paper:
      yield from on_paper(case)
      continue
    for row in measure(case, values.dtype, values.rounds, values.patience):
      yield row | {"share": row["flop_rate"] / report["peak"]}


def on_paper(case: Case) -> Iterator[Row]:
  """What a forward and a backward pass in bfloat16 cost, by chip."""
  from mmjax.kernels import _flash_tpu_tiles as model
  from mmjax.nn import mask as masks

  mask = PATTERNS[case.pattern](masks, case.length)
  for kind in model.CORES:
    found = model.on_paper(kind, mask, case.heads, case.dim)
    yield {"case": ":".join(map(str, case)), "chip": kind, **found._asdict()}


def measure(
    case: Case, dtype: str, rounds: int, patience: float
) -> Iterator[Row]:
  """Measures one problem: the forward pass, then both passes."""
  import jax
  import jax.numpy as jnp

  from mmjax.kernels import intervals
  from mmjax.nn import mask as masks

  mask = PATTERNS[case.pattern](masks, case.length)
  rng = np.random.default_rng(0)
  shape = 1, case.length, case.heads, case.dim
  q, k, v, dout = (
      rng.normal(size=shape).astype(np.float32) for _ in range(4)
  )
  (pairs,) = intervals.visible_pairs(mask).tolist()
  worker = None
  if _timing.version("torch") and jax.default_backend() == "cpu":
    interval = [np.asarray(x)[0] for x in (mask.block, mask.first, mask.last)]
    worker = _timing.Worker(
        TWINS, case.pattern, interval, (q, k, v, dout), dtype,
        _timing.threads(),
    )
  arrays = tuple(jnp.asarray(x, dtype) for x in (q, k, v, dout))
  expected = sample(q, k, v, mask)
  try:
    for passes in ("forward", "both"):
      turns, facts = {}, {}
      for name, attend in implementations(mask, case).items():
        step, facts[name] = _compiled(attend, passes, arrays, expected)
        turns[name] = functools.partial(_timing.turn, step)
      if worker is not None:
        turns |= {
            name.removesuffix(f" {passes}"): turn
            for name, turn in worker.turns.items()
            if name.endswith(passes)
        }
      seconds, others = _timing.interleave(turns, rounds, patience)
      medians = {name: statistics.median(s) for name, s in seconds.items()}
      # Two products forward, five backward.
      flops = 2 * case.dim * pairs * case.heads * (2 if passes == "forward"
                                                   else 7)
      for name, median in medians.items():
        yield {
            "case": ":".join(map(str, case)), "dtype": dtype,
            "passes": passes, "name": name, "seconds": median,
            "spread": _timing.spread(seconds[name]),
            "slower": median / medians["mmjax"],
            "flop_rate": flops / median,
            "others": others,
            **facts.get(name, {"bytes": None, "error": None}),
        }
  finally:
    if worker is not None:
      worker.close()


def implementations(mask: Any, case: Case) -> dict[str, Callable[..., Any]]:
  """Name -> attention(q, k, v), ours first."""
  import jax

  from mmjax.kernels import flash_attention as flash

  scale = case.dim**-0.5

  def ours(implementation: str | None) -> Callable[..., Any]:
    return lambda q, k, v: flash.flash_attention(
        q, k, v, mask, scale=scale, implementation=implementation
    )[0]

  def library(implementation: str) -> Callable[..., Any]:
    special = mask.pattern != "interval"
    return lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v,
        scale=scale,
        is_causal=mask.pattern == "causal",
        mask=None if special else mask.dense()[:, None],
        implementation=implementation,
    )

  found = {"mmjax": ours(None), "dense": ours("dense"),
           "jax.nn": library("xla")}
  backend = jax.default_backend()
  if backend == "gpu":
    found["cudnn"] = library("cudnn")
  if backend == "tpu" and mask.pattern != "interval":
    found["splash"] = _splash(mask.pattern, case, scale)
  return found


def _splash(pattern: str, case: Case, scale: float) -> Callable[..., Any]:
  """The splash attention of JAX; its masks are static."""
  import jax
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as static,
  )

  shape = case.length, case.length
  one = static.CausalMask(shape) if pattern == "causal" else static.FullMask(
      shape
  )
  kernel = kernels.make_splash_mha_single_device(
      static.MultiHeadMask([one] * case.heads)
  )
  turn = lambda x: x.swapaxes(1, 2)
  return lambda q, k, v: turn(
      jax.vmap(kernel)(turn(q) * scale, turn(k), turn(v))
  )


def _compiled(
    attend: Callable[..., Any],
    passes: str,
    arrays: tuple[Any, ...],
    expected: tuple[np.ndarray, np.ndarray],
) -> tuple[Callable[[], None], dict[str, Any]]:
  """A step, and the bytes and the error of its program."""
  import jax

  def both(q: Any, k: Any, v: Any, dout: Any) -> Any:
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(dout)

  run = both if passes == "both" else lambda q, k, v, dout: (attend(q, k, v),)
  compiled = jax.jit(run).lower(*arrays).compile()
  places, values = expected
  out = np.asarray(compiled(*arrays)[0], np.float64)[0, places, 0]
  return lambda: jax.block_until_ready(compiled(*arrays)), {
      "bytes": compiled.memory_analysis().temp_size_in_bytes,
      "error": float(np.abs(out - values).max() / np.abs(values).max()),
  }


def sample(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: Any
) -> tuple[np.ndarray, np.ndarray]:
  """Some rows of the first head, and their output in float64."""
  length, dim = q.shape[1], q.shape[3]
  places = np.unique(np.linspace(0, length - 1, _SAMPLE).astype(int))
  block = np.asarray(mask.block)[0, places, None]
  seen = (np.asarray(mask.first) <= block) & (block <= np.asarray(mask.last))
  q, k, v = (x[0, :, 0].astype(np.float64) for x in (q, k, v))
  s = np.where(seen, q[places] @ k.T * dim**-0.5, -np.inf)
  p = np.exp(s - s.max(axis=1, keepdims=True))
  return places, p @ v / p.sum(axis=1, keepdims=True)


def heading() -> str:
  """The names of the columns."""
  return (
      f"{'case':20}{'passes':8}  {'by':10}{'ms':>9}{'spread':>8}{'slower':>8}"
      f"{'GFLOP/s':>9}{'of peak':>8}{'MiB':>9}{'error':>9}"
  )


def _paper_line(row: Row) -> str:
  return (
      f"{row['case']:20}on paper  {row['chip']:12}"
      f"{row['visited']:,} of {row['tiles']:,} tiles, "
      f"{row['nbytes'] / 2**30:.1f} GiB, VMEM {row['vmem'] / 2**20:.1f} MiB, "
      f"{1e3 * row['seconds']:.2f} ms, {row['share']:.0%} of peak"
  )


def line(row: Row) -> str:
  """One row of the table; `slower` is relative to ours."""
  if "chip" in row:
    return _paper_line(row)
  mib = "-" if row["bytes"] is None else f"{row['bytes'] / 2**20:,.1f}"
  error = "-" if row["error"] is None else f"{row['error']:.0e}"
  busy = f"  others used {row['others']:.1f} cores"
  return (
      f"{row['case']:20}{row['passes']:8}  {row['name']:10}"
      f"{1e3 * row['seconds']:9.1f}{row['spread']:8.0%}{row['slower']:7.2f}x"
      f"{row['flop_rate'] / 1e9:9,.0f}{row['share']:8.0%}{mib:>9}{error:>9}"
      + (busy if row["others"] > _timing.QUIET else "")
  )
