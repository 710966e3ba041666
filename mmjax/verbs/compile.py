"""mmjax compile --config FILE[:ARGUMENTS] --topology CHIP:SHAPE[*SLICES]

Compiles a step of a config for TPU slices that this machine does not have, and
says whether it fits, what it moves and how fast it can be: the train step, the
inference step on a batch, or the step that decodes one token of every row
behind a full cache, its parameters in bfloat16. Nothing is allocated. Needs
libtpu. Topologies: v5e:4x4, v5p:4x4x4, v6e:16x16, v4:2x2x4; two slices:
v5e:4x4*2. Exit codes: 0 it fits, 1 wrong input, 4 it does not fit.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
import time
from typing import Any

from absl import flags

from mmjax import verbs

DOES_NOT_FIT = 4

Report = dict[str, Any]


def main(argv: Sequence[str]) -> int:
  """Runs the verb; see `mmjax.verbs` for the other exit codes."""
  return verbs.run(__doc__, argv, _define, _compile)


def _define(values: flags.FlagValues, argv: Sequence[str]) -> None:
  verbs.define_config(values, argv)
  flags.DEFINE_string(
      "topology",
      None,
      "CHIP:SHAPE or CHIP:SHAPE*SLICES, as v5e:4x4 or v5p:4x4x4*2",
      flag_values=values,
  )
  flags.mark_flag_as_required("topology", flag_values=values)
  flags.DEFINE_enum(
      "what",
      "train",
      list(_STEPS),
      "the step to compile",
      flag_values=values,
  )
  flags.DEFINE_integer(
      "slots",
      None,
      "tokens a row of the cache that decode reads; by default those of a row "
      "of the batch",
      lower_bound=1,
      flag_values=values,
  )
  flags.DEFINE_string(
      "json", None, "file to write all numbers to", flag_values=values
  )


def _compile(values: flags.FlagValues) -> int:
  import jax  # Slow, and --help does not need it.

  # The chips of this machine, if it has any, are left alone.
  jax.config.update("jax_platforms", "cpu")
  report = analyse(
      values.config, values.topology, values.what, values.slots
  )
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(report, indent=2) + "\n")
  print(text(report))
  return verbs.DONE if report["fits"] else DOES_NOT_FIT


def analyse(
    config: Mapping[str, Any],
    topology: str,
    what: str,
    slots: int | None = None,
) -> Report:
  """Compiles a step and measures the program.

  Args:
    config: see `mmjax.config.base`.
    topology: see `mmjax.perf.topology.parse`.
    what: "train", "inference" or "decode".
    slots: of the cache that "decode" reads, see the flag.

  Returns:
    A dict for JSON: bytes and FLOPs as numbers, times in seconds. A program
    that does not fit has no `memory`, `collectives` and `estimate`.

  Raises:
    ValueError: for a wrong config, topology or mesh, for a system that does not
      write where it should decode, or without libtpu.
  """
  import jax

  from mmjax import sharding
  from mmjax.perf import flops
  from mmjax.perf import topology as topologies
  from mmjax.train.plan import compile_for, make_plan

  slices = topologies.parse(topology)
  try:
    devices = topologies.devices(slices)
  except RuntimeError as error:
    raise ValueError(str(error)) from error
  sizes = sharding.fill_mesh_shape(config["mesh"], len(devices))
  mesh = jax.sharding.Mesh(
      topologies.arrange(tuple(sizes.values()), devices),
      tuple(sizes),
      axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
  )
  plan = make_plan(config, mesh)
  if slots is not None and what != "decode":
    raise ValueError(f"--slots belongs to --what=decode, not to {what}")
  with jax.set_mesh(mesh):
    step, arguments, kinds = _STEPS[what](plan, slots)
  report: Report = dict(
      system=type(plan.stage.system).__name__,
      what=what,
      topology=str(slices),
      devices=len(devices),
      mesh=sizes,
      batch_size=plan.stage.batch_size,
      hbm=slices.chip.hbm_bytes,
      kinds=kinds,
  )
  with jax.set_mesh(mesh):
    work = flops.count(step, *arguments)
    report["flops"] = dict(
        total=work.total,
        per_device=work.total / len(devices),
        rematerialised=work.rematerialised,
        elementwise=work.elementwise,
        by_dtype=dict(work.by_dtype),
    )
    report["notes"] = list(work.notes)
    begin = time.perf_counter()
    try:
      compiled = compile_for(mesh, step.lower(*arguments))
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return report | dict(fits=False, error=str(error))
  report["compile_seconds"] = time.perf_counter() - begin
  return report | _measure(compiled, work, slices, mesh, report["notes"])


Step = tuple[Callable[..., Any], tuple[Any, ...], Report]


def _train(plan: Any, slots: None) -> Step:
  """The step of the training loop, its arguments, and their bytes by kind."""
  from mmjax.train.state import bytes_per_device

  state = plan.state
  parts = {
      "parameters, trained": state.live,
      "parameters, frozen": state.frozen,
      "optimizer": state.opt,
      "shadow": state.shadow,
      "mutables": state.mutables,
      "batch": plan.batch,
  }
  kinds = {kind: bytes_per_device(part) for kind, part in parts.items()}
  return plan.step, (state, plan.batch), kinds


def _inference(plan: Any, slots: None) -> Step:
  """`system.apply` on the inputs of a batch, likewise."""
  import jax

  from mmjax.train.state import bytes_per_device, inputs

  variables = plan.state.variables()
  batch = inputs(plan.stage.system, plan.batch)
  kinds = {
      "parameters": bytes_per_device(plan.parameters),
      "mutables": bytes_per_device(plan.state.mutables),
      "batch": bytes_per_device(batch),
  }

  def apply(variables: Any, batch: Any) -> Any:
    return plan.stage.system.apply(variables, **batch)

  return jax.jit(apply), (variables, batch), kinds


def _decode(plan: Any, slots: int | None) -> Step:
  """One token of every row, as `evals.answers` says systems write."""
  import jax
  import jax.numpy as jnp

  from mmjax import sharding
  from mmjax.train.state import bytes_per_device

  system, rows = plan.stage.system, plan.stage.batch_size
  if not hasattr(system, "reply"):
    raise ValueError(
        f"--what=decode: {type(system).__name__} does not write: it has no "
        "`reply` (mmjax/evals/answers.py)"
    )
  if slots is None:
    slots = plan.batch["tokens"].shape[1]
  begin = jax.jit(lambda: system.init_state(rows, slots))
  # The state says by itself how it is sharded, but only once compiled.
  state = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=place
      ),
      jax.eval_shape(begin),
      begin.lower().compile().output_shardings,
  )
  served = lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, jnp.bfloat16, sharding=leaf.sharding
  )
  variables = jax.tree.map(served, plan.state.variables())
  place = sharding.batch_sharding(plan.mesh)
  tokens, count = (
      jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
      for shape in ((rows, 1), (rows,))
  )
  kinds = {
      "parameters": bytes_per_device(variables),
      "cache": bytes_per_device(state),
  }

  def reply(variables: Any, tokens: Any, state: Any, count: Any) -> Any:
    logits, state = system.apply(
        variables, tokens, state, count, method="reply"
    )
    return logits[:, -1].argmax(axis=-1), state

  # What this step does not read, a tower, lies in memory all the same.
  step = jax.jit(reply, donate_argnums=2, keep_unused=True)
  return step, (variables, tokens, state, count), kinds


_STEPS: dict[str, Callable[[Any, Any], Step]] = {
    "train": _train,
    "inference": _inference,
    "decode": _decode,
}


def _measure(
    compiled: Any, work: Any, slices: Any, mesh: Any, notes: Sequence[str]
) -> Report:
  """Memory, collectives and time of a compiled program."""
  from mmjax.perf import hlo, roofline

  program = hlo.Program(compiled.as_text())
  memory = hlo.memory(compiled)
  collectives = program.collectives()
  traffic = program.traffic()
  time = roofline.estimate(
      flops={d: n / mesh.size for d, n in work.by_dtype.items()},
      rematerialised=work.rematerialised / max(work.total, 1),
      hbm_bytes=traffic,
      collectives=collectives,
      topology=slices,
      mesh=mesh,
  )
  return dict(
      fits=memory.total <= slices.chip.hbm_bytes,
      memory=dict(
          arguments=memory.arguments,
          outputs=memory.outputs,
          temporaries=memory.temporaries,
          code=memory.code,
          total=memory.total,
      ),
      traffic=traffic,
      collectives=[
          dict(
              op=c.op,
              network=c.network,
              axes=list(c.axes(mesh.shape)),
              group=len(c.group),
              count=c.count,
              bytes=c.bytes,
              seconds=roofline.collective_seconds(c, slices, mesh),
          )
          for c in collectives
      ],
      estimate=dict(
          compute=time.compute,
          memory=time.memory,
          ici=time.ici,
          dcn=time.dcn,
          best=time.best,
          worst=time.worst,
          bound=time.bound,
          mfu_best=time.mfu(time.best),
          mfu_worst=time.mfu(time.worst),
      ),
      notes=[*notes, *program.notes],
  )


# --- text ---------------------------------------------------------------------


def text(report: Report) -> str:
  """The report as a person reads it."""
  axes = " x ".join(f"{k} {n}" for k, n in report["mesh"].items() if n > 1)
  work = report["flops"]
  again = work["rematerialised"] / max(work["total"], 1)
  lines = [
      f"{report['system']}, {report['what']} step of "
      f"{report['batch_size']:,} examples on {report['topology']}: "
      f"{report['devices']} devices ({axes or 'one'})",
      "",
      *_memory_lines(report),
      "",
      "matrix products of a step",
      _line("all devices", _work(work["total"])),
      _line("per device", _work(work["per_device"])),
      _line("rematerialised", f"{again:.1%}"),
  ]
  if "estimate" in report:
    lines += ["", *_collective_lines(report), "", *_time_lines(report)]
  lines += [f"note: {note}" for note in report["notes"]]
  lines += ["", _verdict(report)]
  return "\n".join(lines)


def _line(name: str, value: str, remark: str = "") -> str:
  return f"  {name:<22}{value:>12}   {remark}".rstrip()


def _scaled(value: float, units: Sequence[str], step: float = 1e3) -> str:
  """A number in the largest of the units, each `step` of the one before."""
  for unit in units:
    if abs(value) < step or unit == units[-1]:
      break
    value /= step
  return f"{value:,.2f} {unit}"


def _memory(count: float) -> str:
  return _scaled(count, ("B", "KiB", "MiB", "GiB"), 1024)


def _sent(count: float) -> str:
  return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def _work(count: float) -> str:
  return _scaled(count / 1e6, ("MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def _duration(seconds: float) -> str:
  return _scaled(seconds * 1e6, ("us", "ms", "s"))


def _memory_lines(report: Report) -> list[str]:
  lines = ["memory of a device"]
  kinds = report["kinds"]
  lines += [
      _line(kind, _memory(count)) for kind, count in kinds.items() if count
  ]
  if "memory" in report:
    memory, limit = report["memory"], report["hbm"]
    padding = memory["arguments"] - sum(kinds.values())
    share = f"{memory['total'] / limit:.1%} of {_memory(limit)}"
    lines += [
        _line("padding, counters", _memory(padding)),
        _line("temporaries", _memory(memory["temporaries"])),
        _line("outputs", _memory(memory["outputs"])),
        _line("program", _memory(memory["code"])),
        _line("total", _memory(memory["total"]), share),
    ]
  return lines


def _collective_lines(report: Report) -> list[str]:
  lines = ["collectives of a step, on a device"]
  for found in report["collectives"]:
    where = ", ".join(found["axes"]) or f"{found['group']} slices"
    lines.append(
        f"  {found['op']:<22}{_sent(found['bytes']):>12} "
        f"{_duration(found['seconds']):>12} {found['count']:>6} x   "
        f"{found['network']} over {where}"
    )
  return lines if len(lines) > 1 else ["no collectives"]


def _time_lines(report: Report) -> list[str]:
  time = report["estimate"]

  def rate(name: str) -> str:
    speed = report["batch_size"] / time[name]
    unit = "tokens" if report["what"] == "decode" else "examples"
    return f"MFU {time[f'mfu_{name}']:.0%}, {speed:,.0f} {unit}/s"

  return [
      "time of a step at the chip's published rates",
      _line("matrix units", _duration(time["compute"])),
      _line("HBM", _duration(time["memory"]), _sent(report["traffic"])),
      _line("links (ICI)", _duration(time["ici"])),
      _line("between slices (DCN)", _duration(time["dcn"])),
      _line(
          "if all overlap",
          _duration(time["best"]),
          f"{rate('best')}; bound by {time['bound']}",
      ),
      _line("if nothing overlaps", _duration(time["worst"]), rate("worst")),
  ]


def _verdict(report: Report) -> str:
  if report["fits"]:
    return f"fits (compiled in {report['compile_seconds']:.0f} s)"
  if "error" in report:
    return f"does not fit: {report['error'].splitlines()[0]}"
  return "does not fit"
