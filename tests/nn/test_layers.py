"""Linear layers, norms, positions and blocks against independent arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.special

from mmjax.nn import linear, mask, norm, partitioning, position, transformer

RNG = np.random.default_rng(0)


def init(module, *args):
  return jax.jit(
      lambda: partitioning.unbox(module.init(jax.random.key(0), *args))
  )()


def test_activations_follow_their_formulas():
  x = np.linspace(-4, 4, 41)
  erf = 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))
  tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  expected = {
      "gelu": erf,
      "gelu_new": tanh,
      "gelu_pytorch_tanh": tanh,
      "quick_gelu": x / (1 + np.exp(-1.702 * x)),
      "relu": np.maximum(x, 0),
      "relu2": np.maximum(x, 0) ** 2,
      "silu": x / (1 + np.exp(-x)),
      "tanh": np.tanh(x),
  }
  assert expected.keys() == linear.ACTIVATIONS.keys()
  for name, values in expected.items():
    y = linear.ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, values, atol=2e-6, err_msg=name)


def test_linear_contracts_as_many_dimensions_as_its_axes_say():
  x = RNG.normal(size=(2, 5, 3, 4)).astype(np.float32)
  layer = linear.Linear(6, linear.HEADS_TO_EMBED)
  variables = init(layer, x)
  kernel = variables["params"]["kernel"]
  assert kernel.shape == (3, 4, 6)
  np.testing.assert_allclose(
      layer.apply(variables, x),
      np.einsum("blhd,hde->ble", x, kernel),
      atol=1e-5,
  )


def test_kernels_are_drawn_for_the_flattened_matrix():
  layer = linear.Linear((8, 16), linear.EMBED_TO_HEADS)
  kernel = init(layer, jnp.zeros((1, 64)))["params"]["kernel"]
  bound = np.sqrt(6 / (64 + 8 * 16))
  assert 0.95 * bound < np.abs(kernel).max() <= bound


def test_patch_embedding_is_a_strided_convolution():
  image = RNG.normal(size=(2, 8, 12, 3)).astype(np.float32)
  layer = linear.PatchEmbed(4, 5)
  variables = init(layer, image)
  out = layer.apply(variables, image)
  expected = jax.lax.conv_general_dilated(
      image,
      variables["params"]["kernel"],
      (4, 4),
      "VALID",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  assert out.shape == (2, 2, 3, 5)
  np.testing.assert_allclose(out, expected, atol=1e-5)
  with pytest.raises(ValueError, match="10x12 pixels.*patch of 4"):
    layer.init(jax.random.key(0), jnp.zeros((1, 10, 12, 3)))


def test_layer_norm_in_float64():
  x = RNG.normal(2.0, 3.0, size=(4, 7))
  layer = norm.LayerNorm(1e-3)
  variables = {
      "params": {
          "scale": RNG.normal(size=7).astype(np.float32),
          "bias": RNG.normal(size=7).astype(np.float32),
      }
  }
  expected = (x - x.mean(1, keepdims=True)) / np.sqrt(
      x.var(1, keepdims=True) + 1e-3
  )
  expected = expected * variables["params"]["scale"]
  np.testing.assert_allclose(
      layer.apply(variables, jnp.asarray(x, jnp.float32)),
      expected + variables["params"]["bias"],
      atol=1e-5,
  )


@pytest.mark.parametrize("old,new", [(4, 7), (7, 4), (5, 10), (14, 24), (3, 1)])
def test_zoom_is_scipys(old, new):
  x = RNG.normal(size=(old, old, 2))
  expected = np.stack(
      [
          scipy.ndimage.zoom(x[..., c], new / old, order=1)
          for c in range(2)
      ],
      axis=-1,
  )
  out = position.resample_grid(
      jnp.asarray(x.reshape(-1, 2), jnp.float32), (old,) * 2, (new,) * 2, "zoom"
  )
  np.testing.assert_allclose(out.reshape(new, new, 2), expected, atol=1e-5)


def test_bicubic_is_pytorchs():
  """Values of torch 2.13 `interpolate(mode="bicubic", align_corners=False)`."""
  table = jnp.asarray([0.0, 1.0, 4.0, 9.0])
  up = position.resampling_matrix(4, 6, "bicubic") @ table
  down = position.resampling_matrix(4, 3, "bicubic") @ table
  np.testing.assert_allclose(
      up,
      [-0.0868056, 0.21875, 1.430555, 3.152778, 6.78125, 9.434028],
      atol=2e-5,
  )
  np.testing.assert_allclose(
      down, [0.0914350, 2.125, 8.334492], atol=2e-5
  )


def test_resampling_keeps_constants_and_the_prefix():
  layer = position.GridPositions((3, 4), 1, linear.normal(0.02), "bicubic")
  variables = init(layer, 5, (3, 4))
  table = variables["params"]["table"]
  assert table.shape == (13, 5)
  out = layer.apply(variables, 5, (6, 2))
  assert out.shape == (13, 5)
  np.testing.assert_array_equal(out[0], table[0])
  for method in ("zoom", "bicubic"):
    rows = position.resampling_matrix(5, 9, method).sum(axis=1)
    np.testing.assert_allclose(rows, 1.0, atol=1e-12)
  with pytest.raises(ValueError, match="expected 'zoom' or 'bicubic'"):
    position.resampling_matrix(3, 4, "nearest")


def test_a_sequence_longer_than_its_positions_is_refused():
  layer = position.SequencePositions(4, linear.normal(0.02))
  with pytest.raises(ValueError, match="5 tokens: the model has 4 positions"):
    layer.init(jax.random.key(0), 3, 5)


@pytest.mark.parametrize("remat", transformer.REMAT)
def test_a_scanned_stack_equals_its_blocks_one_by_one(remat):
  x = RNG.normal(size=(2, 5, 8)).astype(np.float32)
  fields = dict(heads=2, mlp=16, activation="gelu", epsilon=1e-5)
  stack = transformer.stacked(transformer.Block, 3, remat)(**fields)
  seen = mask.causal(5)
  variables = init(stack, x, seen)
  block = transformer.Block(**fields)

  def scanned(variables):
    return jnp.square(stack.apply(variables, x, seen)[0]).sum()

  def unrolled(variables):
    y = x
    for i in range(3):
      layer = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
      y, _ = block.apply(layer, y, seen)
    return jnp.square(y).sum()

  value, grads = jax.value_and_grad(scanned)(variables)
  expected, expected_grads = jax.value_and_grad(unrolled)(variables)
  assert value == pytest.approx(float(expected), rel=1e-5)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
      grads,
      expected_grads,
  )


def test_dropout_is_active_only_with_its_rng():
  x = RNG.normal(size=(1, 64, 8)).astype(np.float32)
  block = transformer.Block(2, 16, "gelu", 1e-5, dropout=0.5)
  variables = init(block, x, mask.full(64))
  plain = block.apply(variables, x, mask.full(64))[0]
  again = block.apply(variables, x, mask.full(64))[0]
  np.testing.assert_array_equal(plain, again)
  noisy = block.apply(
      variables, x, mask.full(64), rngs={"dropout": jax.random.key(1)}
  )[0]
  assert not np.allclose(plain, noisy)


def test_an_unknown_remat_names_the_known():
  with pytest.raises(ValueError, match="remat 'ful' is not one of.*'full'"):
    transformer.stacked(transformer.Block, 2, "ful")
