"""The Hopper kernels, interpreted and lowered, against dense attention."""

import dataclasses
import functools
import importlib.util
import re
from typing import Any

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.kernels import _flash_gpu, _warpgroups, intervals
from mmjax.kernels.intervals import LAST, Mask
from tests.kernels import reference

Q, K = 130, 200

HOPPER = """
  platform_name: "CUDA"
  device_description_str: "NVIDIA H100 80GB HBM3"
  runtime_version { major: 12 minor: 9 }
  dnn_version_info { major: 9 minor: 8 }
  gpu_device_info {
    cuda_compute_capability { major: 9 }
    core_count: 132
    fpus_per_core: 128
    threads_per_warp: 32
    threads_per_block_limit: 1024
    threads_per_core_limit: 2048
    block_dim_limit_x: 2147483647
    block_dim_limit_y: 65535
    block_dim_limit_z: 65535
    registers_per_core_limit: 65536
    registers_per_block_limit: 65536
    shared_memory_per_core: 233472
    shared_memory_per_block: 49152
    shared_memory_per_block_optin: 232448
    l2_cache_size: 52428800
    device_memory_size: 84978434048
    memory_bandwidth: 3352320000000
    clock_rate_ghz: 1.98
  }
"""


pytestmark = pytest.mark.usefixtures("compile_once")


@functools.partial(jax.jit, static_argnames=("scale", "softcap"))
def interpreted(q, k, v, mask, dout, scale, softcap=None) -> dict[str, Any]:
  options = dict(scale=scale, softcap=softcap, interpret=True)
  out, lse = _flash_gpu.forward(q, k, v, mask, **options)
  delta = jnp.einsum(
      "bqhd,bqhd->bhq", out, dout, preferred_element_type=jnp.float32
  )
  empty = jnp.isneginf(lse)
  dq, dk, dv = _flash_gpu.backward(
      q, k, v, mask, jnp.where(empty, jnp.inf, lse), delta, dout, **options
  )
  return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def tensors(batch=1, queries=Q, keys=K, heads=1, groups=1, dim=32, dtype="f4"):
  rng = np.random.default_rng(0)
  shapes = (
      (batch, queries, heads, dim), (batch, keys, groups, dim),
      (batch, keys, groups, dim), (batch, queries, heads, dim),
  )
  return [jnp.asarray(rng.normal(size=s), jnp.dtype(dtype)) for s in shapes]


def check(arguments, mask, tolerance, softcap=None) -> None:
  """Compares with the definition, relative to the largest number."""
  q, k, v, dout = arguments
  scale = q.shape[-1] ** -0.5
  expected = reference.results(q, k, v, dout, mask, scale, softcap)
  found = interpreted(q, k, v, mask, dout, scale, softcap)
  for name, x in found.items():
    x, want = np.asarray(x, np.float64), expected[name]
    finite = np.isfinite(want)
    np.testing.assert_array_equal(x[~finite], want[~finite], err_msg=name)
    error = np.abs(x[finite] - want[finite]).max(initial=0)
    assert error <= tolerance * np.abs(want[finite]).max(initial=1), name


def make_mask(block, first, last) -> Mask:
  row = lambda x: jnp.asarray(np.asarray(x, np.int32)[None])
  return Mask(row(block), row(first), row(last))


def masks() -> dict[str, Mask]:
  i, j = np.arange(Q), np.arange(K)
  rng = np.random.default_rng(1)
  ends = np.array([0, 30, 100, 170, 200])
  document = lambda x: np.searchsorted(ends, x, side="right") - 1
  scale = lambda x: np.sqrt(x).astype(int)
  first = rng.integers(0, Q, K)
  return {
      "full": make_mask(0 * i, 0 * j, 0 * j),
      "causal": make_mask(i + K - Q, j, j * 0 + LAST),
      "window": make_mask(i, j, j + 20),
      "packed": make_mask(
          i, np.maximum(j, ends[document(j)]), ends[document(j) + 1] - 1
      ),
      "scales": make_mask(scale(i), scale(j), j * 0 + LAST),
      "look-back": make_mask(i // 16, j // 16 - 1, j // 16 + 2),
      "empty rows": make_mask(i, j + 70, j + 90),
      "nothing": make_mask(i, 0 * j + 5, 0 * j + 4),
      "random": make_mask(
          rng.integers(0, Q, Q), first, first + rng.integers(-2, Q, K)
      ),
  }


@pytest.mark.parametrize("name", masks())
def test_every_pattern_equals_dense_attention(name):
  check(tensors(), masks()[name], 2e-6)


def test_heads_read_their_group():
  arguments = tensors(queries=70, keys=90, heads=4, groups=2)
  mask = make_mask(np.arange(70), np.arange(90) - 20, np.full(90, LAST))
  check(arguments, mask, 2e-6)


def test_each_row_of_a_batch_has_its_mask():
  block = jnp.stack([jnp.arange(70), jnp.full((70,), 3)]).astype(jnp.int32)
  first = jnp.arange(90, dtype=jnp.int32)[None]
  check(
      tensors(batch=2, queries=70, keys=90),
      Mask(block, first, first + 40),
      2e-6,
  )


def test_softcap():
  arguments = [x * 3 for x in tensors(queries=70, keys=90)]
  mask = make_mask(np.arange(70), np.arange(90) - 20, np.full(90, LAST))
  check(arguments, mask, 4e-6, softcap=5.0)


# Head sizes above 128 have one worker backward, and a kernel for dk and for dv.
@pytest.mark.parametrize("dim", [128, 160])
def test_head_sizes(dim):
  arguments = tensors(queries=70, keys=90, dim=dim)
  mask = make_mask(np.arange(70), np.arange(90), np.full(90, LAST))
  check(arguments, mask, 2e-6)


def test_bfloat16():
  arguments = tensors(queries=70, keys=90, dim=64, dtype="bfloat16")
  mask = make_mask(np.arange(70), np.arange(90) - 20, np.full(90, LAST))
  check(arguments, mask, 1e-2)


def test_hidden_tiles_are_not_read():
  q, k, v, dout = tensors(queries=128, keys=384, dim=64)
  # Keys 128 to 255 are a tile forward, and two backward.
  hole = jnp.full((1, 128, 1, 64), jnp.nan)
  k_hole = k.at[:, 128:256].set(hole)
  v_hole = v.at[:, 128:256].set(hole)
  first = np.where((np.arange(384) // 128) == 1, 7, 0)
  mask = make_mask(np.zeros(128), first, first)
  scale = 0.125
  expected = reference.results(q, k, v, dout, mask, scale)
  found = interpreted(q, k_hole, v_hole, mask, dout, scale)
  for name in ("out", "lse", "dq"):
    np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
  assert not np.asarray(found["dk"])[:, 128:256].any()
  assert not np.asarray(found["dv"])[:, 128:256].any()


@pytest.mark.slow
@pytest.mark.xfail(
    jax.__version_info__ >= (0, 12),
    reason="the detector of jax 0.12 calls the read of a worker and the copy "
    "that waits for its release a race; that of 0.10 does not",
    strict=False,
)
def test_the_threads_do_not_race(monkeypatch, capfd):
  params = dataclasses.replace(
      _warpgroups._interpret_params(), detect_races=True
  )
  monkeypatch.setattr(_warpgroups, "_interpret_params", lambda: params)
  # More tiles than slots, so that slots are used again.
  q, k, v, dout = tensors(queries=128, keys=512, dim=64)
  mask = make_mask(np.arange(128) + 300, np.arange(512), np.full(512, LAST))
  # Not through the cache of `interpreted`, which knows no other parameters.
  found = interpreted.__wrapped__(q, k, v, mask, dout, 0.125)
  jax.block_until_ready(found)
  assert "RACE" not in capfd.readouterr().out


def test_visits():
  hidden, partial, whole = intervals.HIDDEN, intervals.PARTIAL, intervals.WHOLE
  states = jnp.asarray([[
      [hidden, partial, hidden],
      [whole, hidden, partial],
      [hidden, hidden, hidden],
      [whole, whole, whole],
  ]])
  visits = _warpgroups.visits(states)
  np.testing.assert_array_equal(visits.start, [[3, 1, 0, 2]])
  np.testing.assert_array_equal(visits.count, [[1, 2, 0, 3]])
  tiles = np.asarray(visits.tile[0])
  assert tiles[0, 0] == 2
  np.testing.assert_array_equal(tiles[1, :2], [1, 4])
  np.testing.assert_array_equal(tiles[3], [1, 3, 5])


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_scores_are_products_times_scale(scale):
  x = jnp.linspace(-300.0, 300.0, 1001)
  unit = _flash_gpu._unit(scale, None)
  assert unit > 0
  exponents = np.asarray(_flash_gpu._scores(x, scale, None)) * unit
  np.testing.assert_allclose(exponents * np.log(2), x * scale, rtol=1e-6)


def test_softcapped_scores_and_their_slope():
  x = jnp.linspace(-300.0, 300.0, 1001)
  scores = _flash_gpu._scores(x, 0.5, 10.0)
  tanh = np.tanh(np.asarray(x, np.float64) * 0.05)
  exponents = np.asarray(scores) * _flash_gpu._unit(0.5, 10.0)
  np.testing.assert_allclose(exponents * np.log(2), 10 * tanh, atol=1e-5)
  slope = _flash_gpu._slope(scores, 10.0)
  np.testing.assert_allclose(slope, 1 - tanh**2, atol=1e-6)


LOWERED = [
    # batch, queries, keys, heads, groups, dim, softcap, dtype
    (2, 512, 512, 4, 2, 64, None, jnp.bfloat16),
    (1, 300, 1000, 8, 1, 128, 30.0, jnp.bfloat16),
    (1, 256, 256, 2, 2, 80, None, jnp.float16),
    (1, 256, 384, 2, 1, 192, None, jnp.bfloat16),
    (1, 256, 384, 2, 1, 256, 50.0, jnp.bfloat16),
    (3, 1, 77, 2, 1, 32, None, jnp.bfloat16),
]


@pytest.mark.parametrize("case", LOWERED, ids=str)
def test_lowers_for_cuda(case):
  batch, queries, keys, heads, groups, dim, softcap, dtype = case
  real = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  q, k = real(batch, queries, heads, dim), real(batch, keys, groups, dim)
  row = lambda length: jax.ShapeDtypeStruct((batch, length), jnp.int32)
  mask = Mask(row(queries), row(keys), row(keys))
  lse = jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)
  options = dict(scale=0.1, softcap=softcap, interpret=False)
  export = lambda f: jax.export.export(
      jax.jit(functools.partial(f, **options)), platforms=["cuda"]
  )
  forward = export(_flash_gpu.forward)(q, k, k, mask)
  assert [x.shape for x in forward.out_avals] == [q.shape, lse.shape]
  assert forward.mlir_module().count("mosaic_gpu") >= 1
  backward = export(_flash_gpu.backward)(q, k, k, mask, lse, lse, q)
  assert [x.shape for x in backward.out_avals] == [q.shape, k.shape, k.shape]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda12") is None
    or importlib.util.find_spec("nvidia.cuda_nvcc") is None,
    reason="no jax-cuda12-plugin, jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12",
)
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_compiles_for_hopper(dim, monkeypatch, capfd):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
  topology = topologies.get_topology_desc(
      platform="cuda", topology="1x1x1", target_config=HOPPER
  )
  mesh = jax.sharding.Mesh(np.asarray(topology.devices[:1]), "x")
  everywhere = jax.sharding.NamedSharding(mesh, jax.P())
  real = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
      shape, dtype, sharding=everywhere
  )
  q, k = real(2, 512, 4, dim), real(2, 640, 2, dim)
  row = lambda length: real(2, length, dtype=jnp.int32)
  mask = Mask(row(512), row(640), row(640))
  lse = real(2, 4, 512, dtype=jnp.float32)
  options = dict(scale=0.1, softcap=50.0, interpret=False)
  for f, arguments in (
      (_flash_gpu.forward, (q, k, k, mask)),
      (_flash_gpu.backward, (q, k, k, mask, lse, lse, q)),
  ):
    jax.jit(functools.partial(f, **options)).lower(*arguments).compile()
  printed = "".join(capfd.readouterr())
  spilled = re.findall(r"stack frame, (\d+) bytes spill stores", printed)
  assert len(spilled) == (3 if dim <= 128 else 4), printed
  assert max(map(int, spilled)) <= 256, printed


@pytest.mark.parametrize("dim", range(64, 257, 64))
def test_shared_memory_holds_every_kernel(dim):
  q, k, v, dout = tensors(queries=128, keys=128, dim=dim, dtype="bfloat16")
  mask = make_mask(np.zeros(128), np.zeros(128), np.zeros(128))
  lse = jnp.zeros((1, 1, 128))
  arguments = q, k, v, mask, lse, lse, dout, 1.0, None
  jobs = [
      _flash_gpu._forward_job(q, k, v, mask, 1.0, None),
      _flash_gpu._queries_job(*arguments),
      _flash_gpu._keys_job(*arguments, ("dk",)),
      _flash_gpu._keys_job(*arguments, ("dv",)),
  ]
  for job in jobs:
    scratch = _warpgroups.scratch_of(job)
    buffers = jax.tree.leaves((scratch.own, scratch.streams, scratch.stages))
    taken = sum(np.prod(x.shape) * x.dtype.itemsize for x in buffers)
    assert taken <= 227 * 1024, job.name


def test_refusal():
  shape = (1, 128, 2, 64)
  assert _flash_gpu.refusal(shape, jnp.bfloat16) == ""
  assert _flash_gpu.refusal(shape, jnp.dtype("float16")) == ""
  assert "float32" in _flash_gpu.refusal(shape, jnp.float32)
  assert "320" in _flash_gpu.refusal((1, 128, 2, 320), jnp.bfloat16)
