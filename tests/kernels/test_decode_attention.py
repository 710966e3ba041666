"""Decoding against the definition, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.kernels import decode_attention as decode
from mmjax.nn import mask as masks
from tests.kernels import reference, tpu
from tests.kernels.test_flash_attention import distance

IMPLEMENTATIONS = ["jnp", "tpu:interpret"]


LAYERS, LAYER = 3, 1


def cache(rng, batch, groups, slots, dim):
  """Keys and values of three layers."""
  shape = 2, LAYERS, batch, groups, slots, dim
  return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads,groups", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("count,slots,window", [
    (1, 1100, None), (3, 1024, None), (2, 77, None), (2, 600, 300),
])
def test_new_tokens_see_what_the_cache_holds(
    implementation, heads, groups, count, slots, window
):
  rng = np.random.default_rng(0)
  start = np.array([0, 40, slots - count], np.int32)
  k, v = cache(rng, 3, groups, slots, 32)
  q = rng.normal(size=(3, count, heads, 32)).astype(np.float32)
  mask = masks.cached(start, count, slots, window)
  # Row by row from the words: token i at position start + i sees the slots of
  # itself and of all before it, or of the last `window`.
  expected = np.zeros(q.shape)
  for b, n, h in np.ndindex(3, count, heads):
    end = start[b] + n + 1
    begin = 0 if window is None else max(0, end - window)
    keys, values = (
        x[LAYER, b, h // (heads // groups), begin:end] for x in (k, v)
    )
    p = np.exp(0.2 * keys.astype(np.float64) @ q[b, n, h])
    expected[b, n, h] = p @ values / p.sum()
  found = jax.jit(
      lambda q, k, v, mask: decode.decode_attention(
          q, k, v, LAYER, mask, scale=0.2, implementation=implementation
      )
  )(q, k, v, mask)
  assert distance(found, expected) < 2e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_softcap_and_rows_that_see_nothing(implementation):
  rng = np.random.default_rng(1)
  k, v = cache(rng, 2, 2, 600, 16)
  q = rng.normal(size=(2, 2, 4, 16)).astype(np.float32)
  mask = masks.padded(
      masks.cached(np.array([500, 9]), 2, 600),
      np.stack([np.arange(600) > 20, np.zeros(600, bool)]),
  )
  out, lse, _ = reference.attention(
      q, k[LAYER].swapaxes(1, 2), v[LAYER].swapaxes(1, 2),
      reference.visible(mask), 0.5, 3.0,
  )
  assert np.isinf(lse[1]).all() and np.isfinite(lse[0]).all()
  found = decode.decode_attention(
      q, jnp.asarray(k), jnp.asarray(v), LAYER, mask, scale=0.5, softcap=3.0,
      implementation=implementation,
  )
  assert distance(found, out) < 2e-6 and not np.asarray(found)[1].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tiles_behind_the_last_token_are_not_read(implementation):
  """They hold NaNs, which any arithmetic would spread."""
  rng = np.random.default_rng(2)
  k, v = cache(rng, 2, 1, 2048, 16)
  q = rng.normal(size=(2, 1, 2, 16)).astype(np.float32)
  mask = masks.cached(np.array([30, 1000]), 1, 2048)
  run = lambda: decode.decode_attention(
      q, jnp.asarray(k), jnp.asarray(v), LAYER, mask, scale=0.2,
      implementation=implementation,
  )
  clean = run()
  k[..., 1024:, :], v[..., 1024:, :] = np.nan, np.nan
  np.testing.assert_array_equal(run(), clean)


def layers_step(layers, slots, heads=8, groups=2):
  """A step over all layers, and the shapes of its arguments."""

  def step(k, v, x, start):
    mask = masks.cached(start, 1, slots)

    def one_layer(carry, layer):
      k, v, x = carry
      k = decode.append(k, x[:, :, :groups], layer, start)
      v = decode.append(v, x[:, :, -groups:], layer, start)
      x = x + decode.decode_attention(x, k, v, layer, mask, scale=0.1)
      return (k, v, x), None

    return jax.lax.scan(one_layer, (k, v, x), jnp.arange(layers))[0]

  shape = jax.ShapeDtypeStruct
  cache = shape((layers, 4, groups, slots, 128), jnp.float32)
  x = shape((4, 1, heads, 128), jnp.float32)
  return step, (cache, cache, x, shape((4,), jnp.int32))


def assert_in_place(compiled, cache):
  memory = compiled.memory_analysis()
  layer = 4 * cache.size // cache.shape[0]
  assert memory.alias_size_in_bytes >= 2 * layer * cache.shape[0]
  assert memory.temp_size_in_bytes < layer


def test_a_scan_over_layers_writes_in_place_and_copies_no_layer():
  step, shapes = layers_step(6, 4096)
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*shapes).compile()
  assert_in_place(compiled, shapes[0])


@pytest.mark.slow
@tpu.needed
def test_the_same_on_a_tpu():
  step, shapes = layers_step(6, 8192)
  compiled = tpu.compile_for("v5e", step, *shapes, donate=(0, 1))
  assert_in_place(compiled, shapes[0])


def test_append():
  rng = np.random.default_rng(3)
  k, _ = cache(rng, 2, 3, 10, 4)
  new = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
  found = decode.append(jnp.asarray(k), new, LAYER, np.array([0, 9], np.int32))
  expected = k.copy()
  expected[LAYER, 0, :, 0:2] = new[0].swapaxes(0, 1)
  # There is room for one token only.
  expected[LAYER, 1, :, 9] = new[1, 0]
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape,words", [
    ((1, 2, 3, 8, 16), "B and D must agree"),
    ((1, 2, 3, 8, 4), "4 heads are no multiple of 3"),
    ((1, 2, 2, 9, 4), "mask is of"),
    ((2, 2, 8, 4), "expected q"),
])
def test_bad_arguments(shape, words):
  q, k = jnp.zeros((2, 1, 4, 4)), jnp.zeros(shape)
  with pytest.raises(ValueError, match=words):
    decode.decode_attention(q, k, k, 0, masks.full(1, 8), scale=1.0)
  with pytest.raises(ValueError, match="expected one of"):
    k = jnp.zeros((1, 2, 2, 8, 4))
    decode.decode_attention(
        q, k, k, 0, masks.full(1, 8), scale=1.0, implementation="gpu"
    )


@pytest.mark.slow
@tpu.needed
@pytest.mark.parametrize("chip", sorted(tpu.CHIPS))
@pytest.mark.parametrize("slots,dim,dtype", [
    (32768, 128, jnp.bfloat16), (1100, 64, jnp.bfloat16),
    (77, 80, jnp.float32),
])
def test_compiles_for_tpus(chip, slots, dim, dtype):
  shape = jax.ShapeDtypeStruct
  kv = shape((4, 8, 2, slots, dim), dtype)
  q = shape((8, 1, 16, dim), dtype)

  def step(q, k, v, start):
    mask = masks.cached(start, 1, slots)
    return decode.decode_attention(q, k, v, 3, mask, scale=0.1)

  compiled = tpu.compile_for(chip, step, q, kv, kv, shape((8,), jnp.int32))
  assert "tpu_custom_call" in compiled.as_text()
  if dim % 128 == 0:  # Other caches XLA may lay out anew on their way.
    cache = 8 * 2 * slots * dim * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < cache / 4
