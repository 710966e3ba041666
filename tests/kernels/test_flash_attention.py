"""The jnp paths, the choice of an implementation, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.kernels import flash_attention as flash
from mmjax.kernels.intervals import LAST, Mask
from tests.kernels import reference

BATCH, DIM = 2, 32


def sequence(length):
  return np.arange(length, dtype=np.int32)[None]


def full(rng, queries, keys):
  del rng
  return Mask(0 * sequence(queries), 0 * sequence(keys), 0 * sequence(keys),
              "full")


def causal(rng, queries, keys):
  del rng, keys
  i = sequence(queries)
  return Mask(i, i, np.full_like(i, LAST), "causal")


def window(rng, queries, keys):
  del rng
  return Mask(sequence(queries), sequence(keys), sequence(keys) + 40)


def packed(rng, queries, keys):
  """Documents of other lengths in every row, causal inside."""
  del keys
  cuts = np.sort(rng.integers(0, queries, (BATCH, 3)))
  document = (sequence(queries)[..., None] >= cuts[:, None]).sum(-1)
  first = 10_000 * document + sequence(queries)
  last = 10_000 * (document + 1) - 1
  return Mask(*(np.int32(x) for x in (first, first, last)))


def gaps(rng, queries, keys):
  """Any intervals; some rows see nothing, some keys are never seen."""
  first = np.sort(rng.integers(0, 40, (BATCH, keys)))
  last = first + rng.integers(-1, 6, (BATCH, keys))
  block = np.sort(rng.integers(-3, 60, (BATCH, queries)))
  return Mask(*(np.int32(x) for x in (block, first, last)))


PATTERNS = [full, causal, window, packed, gaps]


def case(rng, queries, keys, heads, groups, make):
  q, k, v, dout = (
      rng.normal(size=(BATCH, length, n, DIM)).astype(np.float32)
      for length, n in (
          (queries, heads), (keys, groups), (keys, groups), (queries, heads)
      )
  )
  return q, k, v, dout, jax.tree.map(jnp.asarray, make(rng, queries, keys))


def distance(found, expected):
  """The largest error relative to the largest value; infinities agree."""
  found, expected = np.asarray(found, np.float64), np.asarray(expected)
  np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
  fine = np.isfinite(expected)
  scale = np.abs(expected[fine]).max(initial=1e-9)
  return np.abs(found[fine] - expected[fine]).max(initial=0.0) / scale


@pytest.mark.parametrize("implementation", ["chunked", "dense"])
@pytest.mark.parametrize("make", PATTERNS)
def test_output_and_gradients_are_those_of_the_definition(make, implementation):
  rng = np.random.default_rng(1)
  same = make in (causal, packed)
  q, k, v, dout, mask = case(rng, 300, 300 if same else 700, 4, 2, make)
  dlse = rng.normal(size=(BATCH, 4, 300)).astype(np.float32)
  out, lse, saved = reference.attention(q, k, v, reference.visible(mask), 0.2)
  dlse = np.where(np.isinf(lse), 0, dlse)
  expected = reference.grads(saved, 0.2, dout, dlse)

  @jax.jit
  def run(q, k, v, mask):
    found, pull = jax.vjp(
        lambda q, k, v: flash.flash_attention(
            q, k, v, mask, scale=0.2, implementation=implementation
        ),
        q, k, v,
    )
    return found, pull((dout, jnp.asarray(dlse)))

  found, grads = run(q, k, v, mask)
  assert distance(found[0], out) < 2e-6
  assert distance(found[1], lse) < 2e-6
  for name, a, b in zip("qkv", grads, expected):
    assert distance(a, b) < 2e-6, name
  empty = np.isinf(lse)
  assert not np.asarray(found[0]).swapaxes(1, 2)[empty].any()
  assert empty.any() == (make is gaps)


@pytest.mark.parametrize("heads,groups", [(4, 4), (4, 1), (8, 1)])
def test_groups_serve_consecutive_heads(heads, groups):
  rng = np.random.default_rng(2)
  q, k, v, _, mask = case(rng, 65, 65, heads, groups, causal)
  out, _, _ = reference.attention(q, k, v, reference.visible(mask), 0.1)
  for implementation in ("chunked", "dense"):
    found, _ = flash.flash_attention(
        q, k, v, mask, scale=0.1, implementation=implementation
    )
    assert distance(found, out) < 2e-6


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (2, 1), (1, 1)])
def test_softcap_and_bias(shape):
  rng = np.random.default_rng(3)
  q, k, v, dout, mask = case(rng, 300, 520, 4, 2, gaps)
  bias = rng.normal(size=(*shape, 300, 520)).astype(np.float32)
  args = reference.visible(mask), 0.5, 2.0, bias
  out, _, saved = reference.attention(q, k, v, *args)
  expected = reference.grads(saved, 0.5, dout)[:3]
  # The bias is added within the softcap, and summed where it is shared.
  ds = reference.grads(saved, 0.5, dout)[3]
  shared = tuple(axis for axis in (0, 1) if shape[axis] == 1)
  expected = (*expected, ds.sum(axis=shared, keepdims=True))
  for implementation in ("chunked", "dense"):
    found, pull = jax.vjp(
        lambda q, k, v, bias: flash.flash_attention(
            q, k, v, mask, scale=0.5, softcap=2.0, bias=bias,
            implementation=implementation,  # noqa: B023
        )[0],
        q, k, v, bias,
    )
    assert distance(found, out) < 2e-6
    for a, b in zip(pull(jnp.asarray(dout)), expected):
      assert distance(a, b) < 3e-6


def test_bfloat16_accumulates_in_float32():
  rng = np.random.default_rng(4)
  q, k, v, _, mask = case(rng, 64, 2000, 4, 2, full)
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
  seen = reference.visible(mask)
  out, lse, _ = reference.attention(*map(np.float64, (q, k, v)), seen, 0.2)
  found = flash.flash_attention(
      q, k, v, mask, scale=0.2, implementation="chunked"
  )
  assert found[0].dtype == jnp.bfloat16 and found[1].dtype == jnp.float32
  assert distance(found[0], out) < 2**-8  # Half a unit of the result's digits.
  assert distance(found[1], lse) < 1e-5


def test_memory_is_linear_in_the_length():
  def temporaries(length, implementation):
    x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
    mask = jax.eval_shape(lambda: causal(None, length, length))
    mask = Mask(mask.block, mask.first, mask.last, "causal")

    def loss(q, k, v, mask):
      return flash.flash_attention(
          q, k, v, mask, scale=0.1, implementation=implementation
      )[0].sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, mask).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(8192, "chunked") < 2.2 * temporaries(4096, "chunked")
  assert 8 * temporaries(4096, "chunked") < temporaries(4096, "dense")


def call(kind, length, **kwargs):
  shape = (1, length, 8, 64)
  return flash.Call(kind, shape, shape, kwargs.pop("dtype", jnp.bfloat16),
                    **kwargs)


def test_the_choice_and_its_reason():
  chosen = lambda *args, **kwargs: flash.choose(call(*args, **kwargs))
  assert chosen("cpu", 77).implementation == "dense"
  assert chosen("cpu", 4096).implementation == "chunked"
  assert "scores" in chosen("cpu", 4096).reason
  assert chosen("TPU v5 lite", 4096).implementation == "tpu"
  found = chosen("TPU v5 lite", 4096, bias=True)
  assert found.implementation == "chunked" and "bias" in found.reason
  hopper = "NVIDIA H100 80GB HBM3"
  assert chosen(hopper, 4096, pattern="causal").implementation == "cudnn"
  found = chosen(hopper, 4096)
  assert found.implementation == "gpu" and "full and causal" in found.reason
  found = chosen("NVIDIA A100-SXM4-40GB", 4096)
  assert found.implementation == "chunked" and "for Hopper" in found.reason
  tiled = flash.choose(call("cpu", 77), among=flash.TILED)
  assert tiled.implementation == "chunked"


@pytest.mark.parametrize(
    "kwargs,words",
    [
        (dict(implementation="fast"), "expected one of"),
        (dict(implementation="cudnn"), "cudnn cannot serve this"),
        (dict(k=(2, 5, 3, 8)), "no multiple of 3 groups"),
        (dict(k=(2, 5, 2, 16)), "B and D must agree"),
        (dict(v=(2, 6, 2, 8)), "expected the same"),
        (dict(dtype=jnp.int32), "expected float32 or bfloat16"),
        (dict(queries=4), r"mask.block is \(1, 4\)"),
        (dict(bias=jnp.zeros((3, 1, 3, 5))), "bias is"),
        (dict(softcap=0.0), "softcap is 0.0"),
    ],
)
def test_bad_arguments(kwargs, words):
  dtype = kwargs.pop("dtype", jnp.float32)
  shapes = dict(q=(2, 3, 4, 8), k=(2, 5, 2, 8))
  shapes["k"] = kwargs.pop("k", shapes["k"])
  shapes["v"] = kwargs.pop("v", shapes["k"])
  mask = full(None, kwargs.pop("queries", 3), 5)
  arrays = [jnp.zeros(shapes[name], dtype) for name in "qkv"]
  with pytest.raises(ValueError, match=words):
    flash.flash_attention(
        *arrays, jax.tree.map(jnp.asarray, mask), scale=1.0, **kwargs
    )


def test_nan_spreads_to_the_rows_that_see_it():
  rng = np.random.default_rng(5)
  q, k, v, _, mask = case(rng, 600, 600, 2, 2, causal)
  k = k.copy()
  k[:, 550] = np.nan
  for implementation in ("chunked", "dense"):
    found, _ = flash.flash_attention(
        q, k, v, mask, scale=0.1, implementation=implementation
    )
    bad = np.isnan(found).any(axis=(0, 2, 3))
    assert bad[550:].all() and not bad[:512].any()
