"""The lookup, as a CPU runs it, against brute force in float64."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.kernels import vq_lookup as vq


def distances(x, codebook, metric="euclidean"):
  """f64[N, K], by definition."""
  x, codebook = (np.asarray(a).astype(np.float64) for a in (x, codebook))
  if metric == "euclidean":
    return np.square(x[:, None] - codebook).sum(axis=-1)
  dots = x @ codebook.T
  lengths = np.outer(*(np.linalg.norm(a, axis=1) for a in (x, codebook)))
  zeros = np.zeros_like(dots)
  return 1 - np.divide(dots, lengths, out=zeros, where=lengths > 0)


def check_lookup(x, codebook, metric="euclidean", implementation=None):
  index, distance = jax.jit(
      lambda x, codebook: vq.vq_lookup(
          x, codebook, metric=metric, implementation=implementation
      )
  )(x, codebook)
  expected = distances(x, codebook, metric)
  lowest = expected.min(axis=1)
  assert index.shape == distance.shape == (len(x),)
  assert index.dtype == jnp.int32 and distance.dtype == jnp.float32
  chosen = expected[np.arange(len(x)), index]
  # What float32 tells apart in the scores that are compared.
  resolution = 1e-6 if metric == "cosine" else 2e-6 * np.abs(expected).max()
  np.testing.assert_allclose(chosen, lowest, atol=resolution)
  np.testing.assert_allclose(distance, chosen, rtol=2e-6, atol=1e-6)
  clear = np.partition(expected, 1, axis=1)[:, 1] - lowest > 2 * resolution
  np.testing.assert_array_equal(index[clear], expected.argmin(axis=1)[clear])


def check_residual(x, codebooks, active, implementation=None):
  codes, quantized = jax.jit(
      lambda *args: vq.residual_vq(*args, implementation=implementation)
  )(x, codebooks, active)
  levels = len(codebooks)
  assert codes.shape == (len(x), levels) and codes.dtype == jnp.int32
  assert quantized.dtype == x.dtype
  if active is None:
    active = np.full(len(x), levels)
  rest = np.asarray(x).astype(np.float64)
  for level, codebook in enumerate(codebooks):
    live = level < active
    code = np.asarray(codes)[:, level]
    assert np.all((code == -1) == ~live)
    expected = distances(rest, codebook)
    chosen = expected[np.arange(len(x)), code]
    np.testing.assert_allclose(
        chosen[live], expected.min(axis=1)[live], atol=2e-6 * expected.max()
    )
    rest -= np.where(live[:, None], np.float64(np.asarray(codebook)[code]), 0)
  total = np.asarray(x).astype(np.float64) - rest
  precision = 1e-5 if x.dtype == np.float32 else 2**-7
  np.testing.assert_allclose(
      quantized.astype(np.float32), total, rtol=precision, atol=1e-5
  )
  return codes, quantized


def draw(seed, *shapes, dtype=np.float32):
  rng = np.random.default_rng(seed)
  draws = [rng.normal(size=shape).astype(dtype) for shape in shapes]
  return draws if len(draws) > 1 else draws[0]


SIZES = [(50, 16, 4), (37, 1, 7), (1030, 513, 33), (64, 5000, 8), (13, 17, 300)]


@pytest.mark.parametrize("metric", vq.METRICS)
@pytest.mark.parametrize("rows,count,dim", SIZES)
def test_lookup_finds_the_nearest(rows, count, dim, metric):
  if count == 1:  # No second best: the only one is right.
    x, codebook = draw(0, (rows, dim), (count, dim))
    assert not np.any(vq.vq_lookup(x, codebook, metric=metric)[0])
    return
  check_lookup(*draw(0, (rows, dim), (count, dim)), metric)


@pytest.mark.parametrize("metric", vq.METRICS)
@pytest.mark.parametrize("dtypes", [("bfloat16",) * 2, ("bfloat16", "float32")])
def test_bfloat16_is_multiplied_exactly(metric, dtypes):
  x, codebook = draw(1, (200, 24), (100, 24))
  check_lookup(
      jnp.asarray(x, dtypes[0]), jnp.asarray(codebook, dtypes[1]), metric
  )


def test_distance_keeps_the_digits_that_the_expanded_form_loses():
  codebook = draw(2, (64, 16)) + 1000
  x = codebook[::-1] + draw(3, (64, 16)) * 0.05
  index, distance = vq.vq_lookup(x, codebook)
  expected = distances(x, codebook)
  np.testing.assert_array_equal(index, np.arange(64)[::-1])
  np.testing.assert_allclose(distance, expected.min(axis=1), rtol=1e-5)


def check_ties(implementation=None):
  # Small integers: every score is exact, and equal where it should be.
  rng = np.random.default_rng(4)
  x = rng.integers(-2, 3, (700, 5)).astype(np.float32)
  codebook = rng.integers(-2, 3, (1100, 5)).astype(np.float32)
  index, distance = vq.vq_lookup(x, codebook, implementation=implementation)
  expected = distances(x, codebook)
  lowest = expected.min(axis=1, keepdims=True)
  assert ((expected == lowest).sum(axis=1) > 1).any()
  np.testing.assert_array_equal(index, expected.argmin(axis=1))
  np.testing.assert_array_equal(distance, expected.min(axis=1))


def test_ties_go_to_the_lowest_index():
  check_ties()
  codebook = np.tile(draw(5, (1, 40)), (1030, 1))
  assert not vq.vq_lookup(draw(6, (20, 40)), codebook)[0].any()


def check_zeros_and_nans(implementation=None):
  x, codebook = draw(7, (6, 8), (20, 8))
  codebook[3] = 0
  x[1] = 0
  x[2, 5] = np.nan
  look = lambda metric: vq.vq_lookup(
      x, codebook, metric=metric, implementation=implementation
  )
  index, distance = look("cosine")
  expected = distances(x, codebook, "cosine")
  others = [0, 3, 4, 5]
  np.testing.assert_array_equal(
      np.asarray(index)[others], expected[others].argmin(axis=1)
  )
  # Everything is at a right angle to zeros.
  assert index[1] == 0 and distance[1] == 1
  assert index[2] == 0 and np.isnan(distance[2])
  index, distance = look("euclidean")
  assert index[1] == 3 and distance[1] == 0
  assert index[2] == 0 and np.isnan(distance[2])
  assert np.isfinite(distance).sum() == 5
  # A codebook of nothing but zeros: all equally far.
  zeros = np.zeros_like(codebook)
  index, distance = vq.vq_lookup(
      x[3:], zeros, metric="cosine", implementation=implementation
  )
  np.testing.assert_array_equal(index, 0)
  np.testing.assert_array_equal(distance, 1)


def test_zeros_and_nans():
  check_zeros_and_nans()


def test_cosine_at_the_ends_of_the_range_of_a_float():
  x, codebook = draw(8, (30, 8), (20, 8))
  scale = np.float32(10.0) ** np.linspace(-30, 30, 20)[:, None]
  plain = vq.vq_lookup(x, codebook, metric="cosine")
  scaled = vq.vq_lookup(
      x * np.float32(1e-25), (codebook * scale).astype(np.float32),
      metric="cosine",
  )
  np.testing.assert_array_equal(plain[0], scaled[0])
  np.testing.assert_allclose(plain[1], scaled[1], atol=1e-6)


@pytest.mark.parametrize("with_active", [False, True])
@pytest.mark.parametrize("rows,count,dim,dtype", [
    (1030, 40, 12, "float32"), (50, 700, 33, "float32"), (64, 16, 8, "bfloat16")
])
def test_residual_takes_the_nearest_to_the_rest(
    rows, count, dim, dtype, with_active
):
  x, codebooks = draw(9, (rows, dim), (4, count, dim))
  codebooks *= np.array([1, 0.7, 0.5, 0.3], np.float32)[:, None, None]
  # From none to more than there are.
  active = np.arange(rows, dtype=np.int32) % 6 if with_active else None
  check_residual(jnp.asarray(x, dtype), codebooks, active)


def test_one_level_is_a_lookup():
  x, codebook = draw(10, (100, 9), (30, 9))
  codes, quantized = vq.residual_vq(x, codebook[None])
  index, _ = vq.vq_lookup(x, codebook)
  np.testing.assert_array_equal(codes[:, 0], index)
  np.testing.assert_array_equal(quantized, codebook[index])


def test_a_nan_stays_in_its_row():
  x, codebooks = draw(11, (20, 6), (3, 16, 6))
  spoilt = x.copy()
  spoilt[4, 2] = np.nan
  want, got = vq.residual_vq(x, codebooks), vq.residual_vq(spoilt, codebooks)
  others = np.arange(20) != 4
  for a, b in zip(want, got):
    np.testing.assert_array_equal(a[others], b[others])
  assert not np.any(got[0][4])


def test_results_are_constants():
  x, codebook = draw(12, (20, 6), (16, 6))
  grads = jax.grad(
      lambda x, c: vq.vq_lookup(x, c)[1].sum()
      + vq.residual_vq(x, c[None])[1].sum(),
      argnums=(0, 1),
  )(x, codebook)
  assert not np.any(grads[0]) and not np.any(grads[1])


RESIDUAL_VQ = jax.jit(vq.residual_vq)


@settings(max_examples=20, deadline=None)
@given(
    data=st.data(),
    shape=st.sampled_from([(5, 3, 2), (9, 20, 1), (1, 4, 3)]),
)
def test_integers_are_quantised_exactly(data, shape):
  rows, count, dim = shape
  numbers = lambda *shape: np.reshape(
      data.draw(st.lists(
          st.integers(-4, 4),
          min_size=math.prod(shape),
          max_size=math.prod(shape),
      )),
      shape,
  ).astype(np.float32)
  x, codebooks = numbers(rows, dim), numbers(2, count, dim)
  active = np.abs(numbers(rows)).astype(np.int32)
  codes, quantized = RESIDUAL_VQ(x, codebooks, active)
  total = np.zeros_like(x)
  for level in range(2):
    code = distances(x - total, codebooks[level]).argmin(axis=1)
    live = level < active
    np.testing.assert_array_equal(codes[:, level], np.where(live, code, -1))
    total += np.where(live[:, None], codebooks[level][code], 0)
  np.testing.assert_array_equal(quantized, total)


def _compiled(f, *shapes):
  args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  return jax.jit(f).lower(*args).compile()


def test_memory_is_linear():
  """No N x K matrix: at most an eighth of what materialising it takes."""
  shapes = (65536, 128), (1024, 128)

  def materialised(x, codebook):
    d = jnp.square(codebook).sum(axis=1) - 2 * x @ codebook.T
    return d.argmin(axis=1), d.min(axis=1)

  temporary = lambda f, *shapes: (
      _compiled(f, *shapes).memory_analysis().temp_size_in_bytes
  )
  lookup = temporary(vq.vq_lookup, *shapes)
  assert 8 * lookup <= temporary(materialised, *shapes)
  # The number of rows and of codes does not matter, nor that of levels.
  large = temporary(vq.vq_lookup, (2**20, 128), (2**15, 128))
  outputs_and_norms = 2 * 4 * 2**20 + 4 * 2**15
  assert large - lookup <= 1.01 * outputs_and_norms
  residual = temporary(vq.residual_vq, shapes[0], (8, 1024, 128))
  # Its outputs are made in place or once more, and in no other multiple.
  assert residual <= lookup + 4 * 65536 * (128 + 2 * 8) + 2**20


@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_are_sums_over_the_rows_of_each_code(weighted):
  rng = np.random.default_rng(13)
  x = rng.normal(size=(200, 6))
  index = rng.integers(-1, 7, 200)
  weight = rng.uniform(size=200) if weighted else None
  counts, sums = jax.jit(vq.code_statistics, static_argnums=2)(
      jnp.float32(x), jnp.int32(index), 9,
      None if weight is None else jnp.float32(weight),
  )
  one_hot = (index[:, None] == np.arange(9)) * (
      np.ones(200) if weight is None else weight
  )[:, None]
  np.testing.assert_allclose(counts, one_hot.sum(axis=0), rtol=1e-5)
  np.testing.assert_allclose(sums, one_hot.T @ x, rtol=1e-5, atol=1e-5)
  assert counts.dtype == sums.dtype == jnp.float32


def test_choice():
  call = lambda kind, *shape: vq.Call(kind, shape)
  assert vq.choose(call("cpu", 1024, 128)).implementation == "chunked"
  tpu = "TPU v5 lite"
  assert vq.choose(call(tpu, 1024, 128)).implementation == "tpu"
  assert vq.choose(call(tpu, 8, 1024, 128)).implementation == "tpu"
  large = vq.choose(call(tpu, 32, 2048, 256))
  assert large.implementation == "scan"
  assert "not tpu: the codebooks take 64.0 MiB on chip" in large.reason
  # A v4 has a quarter of the memory of a v5 on chip.
  assert vq.choose(call("TPU v4", 8, 2048, 256)).implementation == "scan"
  wide = vq.choose(call(tpu, 4, 64, 2048))
  assert wide.implementation == "chunked"
  assert "not scan: the kernels take at most 1024" in wide.reason


@pytest.mark.parametrize("shape,implementation,message", [
    ((16, 8), "cuda", "implementation='cuda'; expected one of"),
    ((16, 8), "scan", "one codebook has no levels"),
    ((16, 2048), "tpu", "at most 1024 dimensions"),
    ((64, 2048, 1024), "tpu", "512.0 MiB on chip"),
])
def test_what_cannot_be_served_is_refused(shape, implementation, message):
  with pytest.raises(ValueError, match=message):
    vq.choose(vq.Call("cpu", shape), implementation)


@pytest.mark.parametrize("x,codebook,message", [
    ((4, 2, 8), (16, 8), r"expected \[N, D\] and \[K, D\]"),
    ((4, 8), (2, 16, 8), r"expected \[N, D\] and \[K, D\]"),
    ((4, 7), (16, 8), "D must agree"),
    ((4, 8), (0, 8), "holds nothing"),
    ((0, 8), (4, 8), "holds nothing"),
])
def test_shapes_that_do_not_fit_are_refused(x, codebook, message):
  with pytest.raises(ValueError, match=message):
    vq.vq_lookup(jnp.zeros(x), jnp.zeros(codebook))


def test_all_faults_come_at_once():
  with pytest.raises(ValueError) as error:
    vq.residual_vq(jnp.zeros((4, 8), jnp.int32), jnp.zeros((2, 0, 9)))
  for message in (
      "x is int32, expected float32 or bfloat16",
      "codebooks is (2, 0, 9), which holds nothing",
      "D must agree",
  ):
    assert message in str(error.value)


def test_other_bad_arguments_are_refused():
  x, codebook = jnp.zeros((4, 8)), jnp.zeros((16, 8))
  with pytest.raises(ValueError, match=r"metric='dot'; expected one of"):
    vq.vq_lookup(x, codebook, metric="dot")
  with pytest.raises(ValueError, match=r"active is float32\[3\], expected"):
    vq.residual_vq(x, codebook[None], jnp.zeros(3))
  with pytest.raises(ValueError, match="index \\(3,\\)"):
    vq.code_statistics(x, jnp.zeros(3, jnp.int32), 16)
