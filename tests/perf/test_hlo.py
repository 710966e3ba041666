"""Known collectives and traffic in small compiled programs, CPU and TPU."""

import importlib.util

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from mmjax.perf import hlo, topology

LENGTH = 5


def _array(*shape, dtype=jnp.float32, sharding=None):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def _compile(fn, *args):
  return jax.jit(fn).lower(*args).compile()


def _shifted(axis, size):
  return [(i, (i + 1) % size) for i in range(size)]


# The body of a shard_map over f32[4, 16] per device; what it must show, with
# the payload of one execution in bytes.
SHARD = 4 * 16 * 4
COLLECTIVES = {
    "all-reduce": (lambda c: lax.psum(c, "x"), ("x",), SHARD),
    "all-gather": (
        lambda c: c + lax.all_gather(c, "y").sum(0), ("y",), 2 * SHARD
    ),
    "reduce-scatter": (
        lambda c: c + lax.psum_scatter(c, "x", tiled=True), ("x",), SHARD
    ),
    "all-to-all": (
        lambda c: lax.all_to_all(c, "x", 0, 0, tiled=True), ("x",), SHARD
    ),
    "collective-permute": (
        lambda c: lax.ppermute(c, "x", _shifted("x", 4)), ("x",), SHARD
    ),
}


@pytest.mark.parametrize("looped", [True, False])
@pytest.mark.parametrize("op", COLLECTIVES)
def test_collectives_count_as_often_as_they_run(mesh, op, looped):
  body, axes, payload = COLLECTIVES[op]

  def inner(x):
    if not looped:
      return body(x)
    return lax.scan(lambda c, _: (body(c) * 0.5, None), x, length=LENGTH)[0]

  fn = jax.shard_map(
      inner, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False
  )
  program = hlo.Program(_compile(fn, _array(16, 16)).as_text())
  (found,) = program.collectives()
  times = LENGTH if looped else 1
  assert (found.op, found.network) == (op, "ici")
  assert (found.count, found.bytes) == (times, times * payload)
  assert found.axes(mesh.shape) == axes
  assert program.notes == ()


def test_nested_loops_multiply(mesh):
  def inner(x):
    def outer(c, _):
      return lax.fori_loop(0, 3, lambda _, c: lax.psum(c, "y") * 0.5, c), None

    return lax.scan(outer, x, length=LENGTH)[0]

  fn = jax.shard_map(
      inner, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
  )
  (found,) = hlo.Program(_compile(fn, _array(8)).as_text()).collectives()
  assert (found.count, found.bytes) == (3 * LENGTH, 3 * LENGTH * 8 * 4)


def test_unknown_loop_and_conditional_are_noted(mesh):
  def inner(x):
    x = lax.while_loop(
        lambda c: jnp.sum(c) < 5, lambda c: lax.psum(c, "x"), x
    )
    return lax.cond(jnp.sum(x) > 0, lambda c: lax.psum(c, "y"), jnp.sin, x)

  fn = jax.shard_map(
      inner, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
  )
  program = hlo.Program(_compile(fn, _array(8)).as_text())
  assert [c.count for c in program.collectives()] == [1, 1]
  assert len(program.notes) == 2


def test_bytes_of_shapes():
  assert hlo._bytes("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}") == 12
  assert hlo._bytes("(f32[4], pred[3], u32[])") == 16 + 3 + 4
  assert hlo._bytes("f8e4m3fn[7]{0}") == 7
  assert hlo._bytes("s4[8]{0}") == 4
  assert hlo._bytes("token[]") == 0
  assert hlo._hbm_bytes("(f32[4]{0:S(1)}, f32[2]{0})") == 8


TRAFFIC = {
    "mlp": (
        lambda x, w, v: jnp.tanh(x @ w) @ v, (64, 128), (128, 256), (256, 32)
    ),
    "softmax": (lambda x: jax.nn.softmax(x) @ x.T, (64, 128)),
    "gradient": (
        jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2)),
        (128, 64),
        (8, 128),
    ),
    "slice": (
        lambda x: jnp.tanh(lax.dynamic_slice(x, (3, 0), (4, 16))),
        (99, 16),
    ),
}


@pytest.mark.parametrize("name", TRAFFIC)
def test_traffic_equals_xlas_where_there_is_no_loop(name):
  fn, *shapes = TRAFFIC[name]
  compiled = _compile(fn, *(_array(*shape) for shape in shapes))
  expected = compiled.cost_analysis()["bytes accessed"]
  assert hlo.Program(compiled.as_text()).traffic() == expected


def test_traffic_of_a_scan_is_that_of_the_unrolled_loop():
  width = 128

  def scanned(x, stack):
    return lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, stack)[0]

  def unrolled(x, stack):
    for i in range(LENGTH):
      x = jnp.tanh(x @ stack[i])
    return x

  args = _array(64, width), _array(LENGTH, width, width)
  loop, flat = (
      hlo.Program(_compile(fn, *args).as_text()).traffic()
      for fn in (scanned, unrolled)
  )
  # The loop copies its carry; it must not read the whole stack every time.
  assert flat <= loop < 1.1 * flat


def test_memory(mesh):
  def fn(x, y):
    return x + y, jnp.sum(jnp.sort(x @ y))

  args = [_array(128, 128) for _ in range(2)]
  compiled = jax.jit(fn, donate_argnums=0).lower(*args).compile()
  found = hlo.memory(compiled)
  leaf = 128 * 128 * 4
  assert found.arguments == 2 * leaf
  assert found.outputs < leaf  # The sum took the place of x.
  assert found.temporaries >= leaf
  assert found.total == (
      found.arguments + found.outputs + found.temporaries + found.code
  )


# What only the TPU compiler writes: loops without a known trip count, one
# gather spread over three fusions, a scatter as a fused all-reduce, transfers
# between slices, buffers in on-chip memory S(1), slices in nested fusions.
TPU = """
HloModule toy, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%slice_inside (stack: f32[6,64], i: s32[]) -> f32[64] {
  %stack = f32[6,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,64]{1,0} dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,64}
  ROOT %flat = f32[64]{0} bitcast(%row)
}

%start (shard: f32[16]) -> (f32[16], f32[64]) {
  %shard = f32[16]{0} parameter(0)
  %gather = f32[64]{0} all-gather(%shard), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %began = (f32[16]{0}, f32[64]{0:S(1)}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (shard: f32[16], whole: f32[64], stack: f32[6,64], i: s32[]) -> (f32[64], f32[64]) {
  %shard = f32[16]{0} parameter(0)
  %whole = f32[64]{0} parameter(1)
  %stack = f32[6,64]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %gather = f32[64]{0} all-gather(%shard), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  %read = f32[64]{0} fusion(%stack, %i), kind=kLoop, calls=%slice_inside
  ROOT %both = (f32[64]{0}, f32[64]{0}) tuple(%read, %whole)
}

%scatter (full: f32[64]) -> f32[16] {
  %full = f32[64]{0} parameter(0)
  %zero = s32[] constant(0)
  %reduced = f32[64]{0} all-reduce(%full), channel_id=5, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %part = f32[16]{0} dynamic-slice(%reduced, %zero), dynamic_slice_sizes={16}
}

%body (carry: (s32[], f32[16], f32[6,64])) -> (s32[], f32[16], f32[6,64]) {
  %carry = (s32[], f32[16]{0:S(1)}, f32[6,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %shard = f32[16]{0:S(1)} get-tuple-element(%carry), index=1
  %stack = f32[6,64]{1,0} get-tuple-element(%carry), index=2
  %began = (f32[16]{0:S(1)}, f32[64]{0:S(1)}) fusion(%shard), kind=kCustom, calls=%start
  %whole = f32[64]{0:S(1)} get-tuple-element(%began), index=1
  %both = (f32[64]{0}, f32[64]{0:S(1)}) fusion(%shard, %whole, %stack, %i), kind=kOutput, calls=%meanwhile
  %read = f32[64]{0} get-tuple-element(%both), index=0
  %part = f32[16]{0:S(1)} fusion(%read), kind=kCustom, calls=%scatter
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[16]{0:S(1)}, f32[6,64]{1,0}) tuple(%next, %part, %stack)
}

%condition (carry: (s32[], f32[16], f32[6,64])) -> pred[] {
  %carry = (s32[], f32[16]{0:S(1)}, f32[6,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %end = s32[] constant(6)
  ROOT %test = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (shard: f32[16], stack: f32[6,64]) -> f32[16] {
  %shard = f32[16]{0:S(1)} parameter(0)
  %stack = f32[6,64]{1,0} parameter(1)
  %ahead = (f32[6,64]{1,0:S(1)}, f32[6,64]{1,0}, u32[]{:S(2)}) copy-start(%stack)
  %early = ((f32[6,64]{1,0}), f32[2,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%stack), slice={[0:2], [0:64]}
  %empty = f32[999]{0} custom-call(), custom_call_target="AllocateBuffer"
  %one = s32[] constant(1)
  %first = s32[] copy(%one)
  %carry = (s32[], f32[16]{0:S(1)}, f32[6,64]{1,0}) tuple(%first, %shard, /*index=2*/%stack)
  %loop = (s32[], f32[16]{0:S(1)}, f32[6,64]{1,0}) while(%carry), condition=%condition, body=%body
  %grad = f32[16]{0:S(1)} get-tuple-element(%loop), index=1
  %token = token[] after-all()
  %send = (f32[16]{0:S(1)}, u32[], token[]) send(%grad, %token), channel_id=7, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[16]{0}, u32[], token[]) recv(%token), channel_id=8, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=7
  %received = (f32[16]{0}, token[]) recv-done(%recv), channel_id=8
  ROOT %result = f32[16]{0} get-tuple-element(%received), index=0
}
"""  # noqa: E501


def test_what_the_tpu_compiler_writes():
  program = hlo.Program(TPU)
  found = {(c.op, c.network): c for c in program.collectives()}
  times = 6 - 1  # The loop's first iteration was peeled off.
  gather = found.pop(("all-gather", "ici"))
  assert (gather.count, gather.bytes) == (times, times * 64 * 4)
  scatter = found.pop(("reduce-scatter", "ici"))
  assert (scatter.count, scatter.bytes) == (times, times * 64 * 4)
  assert scatter.group == (0, 1, 2, 3)
  sent = found.pop(("all-reduce", "dcn"))
  assert (sent.count, sent.bytes, sent.group) == (1, 16 * 4, (1, 2))
  assert sent.axes({"data": 4}) == ()
  assert not found
  assert program.notes == ()
  # A row of the stack is read and written, then read again to be scattered;
  # beside that the loop counts: two numbers in, one out, and three to test.
  # All of the stack and two rows of it are fetched into on-chip memory.
  row, counter = 64 * 4, 4
  assert program.traffic() == times * (
      3 * row + counter + 3 * counter + 2 * counter + 1
  ) + 2 * counter + (6 + 2) * row


DECODE = """
HloModule decode, num_partitions=1

%set (old: f32[], new: f32[]) -> f32[] {
  %old = f32[] parameter(0)
  ROOT %new = f32[] parameter(1)
}

%write (cache: f32[8,512], where: s32[2,1], rows: f32[2,512]) -> f32[8,512] {
  %cache = f32[8,512]{1,0} parameter(0)
  %where = s32[2,1]{1,0} parameter(1)
  %rows = f32[2,512]{1,0} parameter(2)
  ROOT %written = f32[8,512]{1,0} scatter(%cache, %where, %rows), to_apply=%set
}

ENTRY %main (cache: f32[8,512], where: s32[2,1], rows: f32[2,512]) -> f32[512] {
  %cache = f32[8,512]{1,0} parameter(0)
  %where = s32[2,1]{1,0} parameter(1)
  %rows = f32[2,512]{1,0} parameter(2)
  %one = f32[8,512]{1,0} fusion(%cache, %where, %rows), kind=kCustom, calls=%write
  %two = f32[8,512]{1,0} scatter(%one, %where, %rows), to_apply=%set
  ROOT %read = f32[512]{0} custom-call(%two), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"9","bytes_accessed":"4096"}}}
}
"""  # noqa: E501


def test_a_cache_is_written_in_place_and_a_kernel_says_what_it_reads():
  rows, where = 2 * 512 * 4, 2 * 4
  fused = (rows + where) + rows  # Read, and written into the cache.
  alone = 2 * rows
  assert hlo.Program(DECODE).traffic() == fused + alone + 4096


def test_text_that_is_no_module():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.Program("HloModule nothing")


def _toy_step(name, sizes, depth=6, width=1024):
  """A scanned, rematerialised MLP's update on a (data, fsdp, tensor) mesh."""
  mesh = Mesh(
      topology.arrange(sizes, topology.devices(name)),
      ("data", "fsdp", "tensor"),
      axis_types=(AxisType.Auto,) * 3,
  )
  batch = NamedSharding(mesh, P(("data", "fsdp")))

  def loss(params, x):
    def layer(h, p):
      up, down = (k.astype(h.dtype) for k in p)
      h = h + jax.nn.gelu(h @ up) @ down
      return lax.with_sharding_constraint(h, batch), None

    h, _ = lax.scan(jax.checkpoint(layer), x, params)
    return jnp.mean(h.astype(jnp.float32) ** 2)

  def step(params, x):
    value, grads = jax.value_and_grad(loss)(params, x)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

  places = [
      NamedSharding(mesh, P(None, "fsdp", "tensor")),
      NamedSharding(mesh, P(None, "tensor", "fsdp")),
  ]
  shapes = (depth, width, 4 * width), (depth, 4 * width, width)
  params = [_array(*s, sharding=p) for s, p in zip(shapes, places)]
  x = _array(1024, width, dtype=jnp.bfloat16, sharding=batch)
  step = jax.jit(
      step,
      donate_argnums=0,
      out_shardings=(places, NamedSharding(mesh, P())),
  )
  return step.lower(params, x).compile(), mesh


def _find(program, op, network, axes, mesh):
  found = [
      c for c in program.collectives()
      if (c.op, c.network, c.axes(mesh.shape)) == (op, network, axes)
  ]
  assert found, program.collectives()
  return found[0]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"
)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("v5e:4x4", (2, 4, 2)),
        ("v5p:4x4x4", (4, 8, 2)),
        ("v5e:4x4*2", (2, 8, 2)),
    ],
)
def test_step_for_a_tpu(name, sizes):
  compiled, mesh = _toy_step(name, sizes)
  program = hlo.Program(compiled.as_text())
  assert program.notes == ()
  kernel = 1024 * 4096 * 2 // sizes[2]  # One kernel's tensor share, bfloat16.
  # Two kernels in six layers are gathered, forwards and backwards.
  gathered = _find(program, "all-gather", "ici", ("fsdp",), mesh)
  assert gathered.count == 6 * 4
  assert gathered.bytes == 24 * kernel
  # Their gradients are reduced over fsdp, scattered or, at times, whole.
  reduced = [
      c for c in program.collectives()
      if c.op in ("reduce-scatter", "all-reduce")
      and c.axes(mesh.shape) == ("fsdp",)
  ]
  assert sum(c.bytes for c in reduced) == pytest.approx(12 * kernel, rel=1e-3)
  # And over data: within the slice, or between the slices.
  network, axes = ("dcn", ()) if "*" in name else ("ici", ("data",))
  synced = _find(program, "all-reduce", network, axes, mesh)
  assert synced.bytes == pytest.approx(12 * kernel // sizes[1], rel=1e-3)
  found = hlo.memory(compiled)
  params = 2 * 6 * 1024 * 4096 * 4 // (sizes[1] * sizes[2])
  rows = 1024 * 1024 * 2 // (sizes[0] * sizes[1])
  assert found.arguments == pytest.approx(params + rows, rel=0.01)
  assert found.total < topology.parse(name).chip.hbm_bytes
