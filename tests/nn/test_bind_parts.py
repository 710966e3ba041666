"""Overlapping patches, learned keys, low-rank updates, blocks left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import attention, linear, mask, partitioning, transformer

RNG = np.random.default_rng(0)


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def drawn(module, *args):
  """The parameters of a module, off their first values."""
  variables = partitioning.unbox(module.init(jax.random.key(0), *args))
  return jax.tree.map(lambda x: x + 0.3 * draw(*x.shape), variables)


@pytest.mark.parametrize("stride", [3, 5, 7])
def test_overlapping_patches_are_a_convolution(stride):
  image = draw(2, 19, 24, 2)
  module = linear.PatchEmbed(5, 6, stride=stride)
  variables = drawn(module, image)
  found = module.apply(variables, image)
  kernel, bias = (variables["params"][k] for k in ("kernel", "bias"))
  expected = jax.lax.conv_general_dilated(
      image,
      kernel,
      (stride, stride),
      "VALID",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  np.testing.assert_allclose(found, expected + bias, atol=1e-5)
  with pytest.raises(ValueError, match="19x24"):
    linear.PatchEmbed(5, 6).init(jax.random.key(0), image)


def test_all_tokens_see_one_learned_key_and_value_besides():
  x, length, heads = draw(2, 5, 6), 5, 2
  module = attention.Attention(heads, extra_init=linear.normal(1.0))
  see = mask.full(length, length + 1)
  variables = drawn(module, x, see)
  found = module.apply(variables, x, see)
  params = jax.tree.map(np.float64, variables["params"])

  def project(name):
    part = params[name]
    return np.einsum("bld,dhk->blhk", x, part["kernel"]) + part["bias"]

  q, k, v = (project(name) for name in ("query", "key", "value"))
  append = lambda part, name: np.concatenate(
      [part, np.broadcast_to(params[name], (2, 1, heads, 3))], axis=1
  )
  k, v = append(k, "extra_key"), append(v, "extra_value")
  scores = np.einsum("bqhd,bkhd->bhqk", q, k) * 3**-0.5
  weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
  y = np.einsum("bhqk,bkhd->bqhd", weights, v)
  expected = np.einsum("bqhd,hde->bqe", y, params["out"]["kernel"])
  np.testing.assert_allclose(
      found, expected + params["out"]["bias"], atol=1e-5
  )


def test_paths_are_dropped_by_rows_at_their_rate():
  block = transformer.Block(2, 8, "gelu", 1e-6)
  x = jnp.asarray(draw(400, 3, 4))
  see = mask.full(3)
  variables = drawn(block, x, see)
  whole, _ = block.apply(variables, x, see)
  apply = jax.jit(
      lambda skip, key: block.apply(
          variables, x, see, skip, rngs={"dropout": key}
      )[0]
  )
  np.testing.assert_allclose(
      apply(0.0, jax.random.key(1)), whole, atol=2e-5
  )
  # Without an rng the rate has no effect.
  np.testing.assert_array_equal(block.apply(variables, x, see, 0.5)[0], whole)
  rate = 0.25
  dropped = apply(rate, jax.random.key(1))
  # Rows that leave out both halves are as they came.
  same = np.isclose(dropped, x, atol=1e-6).all(axis=(1, 2))
  assert same.mean() == pytest.approx(rate**2, abs=0.04)


def test_what_is_kept_grows_by_what_is_dropped():
  class Half(transformer.nn.Module):

    def __call__(self, x):
      return transformer.drop_path(self, x, jnp.float32(0.4))

  x = jnp.ones((4000, 2, 3))
  found = Half().apply({}, x, rngs={"dropout": jax.random.key(0)})
  values = np.unique(found)
  np.testing.assert_allclose(values, [0, 1 / 0.6], rtol=1e-6)
  assert float(found.mean()) == pytest.approx(1.0, abs=0.05)
  # A row is kept or dropped as a whole.
  assert np.all(found == found[:, :1, :1])


def test_a_low_rank_update_starts_at_nothing_and_adds_its_product():
  x = draw(3, 4, 2, 5)
  plain = linear.Linear((3, 2), ("heads", "head_dim", None, None))
  low = plain.clone(rank=2)
  params = partitioning.unbox(low.init(jax.random.key(0), x))["params"]
  kept = {"params": {k: params[k] for k in ("kernel", "bias")}}
  np.testing.assert_array_equal(
      low.apply({"params": params}, x), plain.apply(kept, x)
  )
  params = {k: v + draw(*v.shape) for k, v in params.items()}
  update = (params["low_in"] @ params["low_out"]).reshape(2, 5, 3, 2)
  whole = {"kernel": params["kernel"] + update, "bias": params["bias"]}
  np.testing.assert_allclose(
      low.apply({"params": params}, x),
      plain.apply({"params": whole}, x),
      atol=1e-5,
  )


def test_all_kernels_of_a_block_have_updates_of_its_rank():
  inits = transformer.BlockInit(rank=3)
  block = transformer.Block(2, 8, "gelu", 1e-6, inits)
  params = partitioning.unbox(
      block.init(jax.random.key(0), draw(1, 3, 4), mask.full(3))
  )["params"]
  flat = jax.tree_util.tree_leaves_with_path(params)
  names = [jax.tree_util.keystr(path) for path, _ in flat]
  assert sum("low_in" in name for name in names) == 6
  assert sum("kernel" in name for name in names) == 6
