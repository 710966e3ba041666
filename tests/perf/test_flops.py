"""Counts against closed forms, brute force and XLA's own count."""

import itertools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np
import pytest

from mmjax.perf import flops


def _array(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def _mlp_params(depth, width):
  return [_array(width, width) for _ in range(depth)]


def _mlp(params, x):
  for kernel in params:
    x = jnp.tanh(x @ kernel)
  return x


def _loss(params, x):
  return jnp.sum(_mlp(params, x) ** 2)


def test_matrix_product_by_dtype():
  def fn(x, y):
    return jnp.einsum("bij,bjk->bik", x, x), y @ y

  got = flops.count(fn, _array(3, 5, 5, dtype=jnp.bfloat16), _array(7, 7))
  assert got.by_primitive == {"dot_general": 2 * 3 * 5**3 + 2 * 7**3}
  assert got.by_dtype == {"bfloat16": 2 * 3 * 5**3, "float32": 2 * 7**3}


def test_transformer_layer_closed_form():
  batch, length, width, heads = 2, 10, 12, 3
  kernels = {
      "qkv": _array(3, width, heads, width // heads),
      "out": _array(heads, width // heads, width),
      "up": _array(width, 4 * width),
      "down": _array(4 * width, width),
  }

  def layer(p, x):
    q, k, v = jnp.einsum("bld,cdhe->cblhe", x, p["qkv"])
    weights = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k))
    y = jnp.einsum("bhqk,bkhe->bqhe", weights, v)
    x = x + jnp.einsum("bqhe,hed->bqd", y, p["out"])
    return x + jax.nn.gelu(x @ p["up"]) @ p["down"]

  x = _array(batch, length, width)
  dense = 24 * batch * length * width**2
  attention = 4 * batch * length**2 * width
  assert flops.count(layer, kernels, x).total == dense + attention
  # The gradient with respect to parameters and input: two more per product.
  grad = jax.value_and_grad(lambda p, x: jnp.sum(layer(p, x)), (0, 1))
  assert flops.count(grad, kernels, x).total == 3 * (dense + attention)


def test_gradient_of_dense_net_skips_the_first_input():
  depth, width, batch = 4, 8, 16
  params, x = _mlp_params(depth, width), _array(batch, width)
  layer = 2 * batch * width**2
  assert flops.count(_mlp, params, x).total == depth * layer
  got = flops.count(jax.value_and_grad(_loss), params, x)
  assert got.total == 3 * depth * layer - layer
  assert got.rematerialised == 0


def test_scan_equals_unrolled():
  depth, width = 5, 8
  params, x = _mlp_params(depth, width), _array(4, width)

  def scanned(stack, x):
    return jnp.sum(
        jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, stack)[0] ** 2
    )

  stack = _array(depth, width, width)
  unrolled = flops.count(_loss, params, x)
  got = flops.count(scanned, stack, x)
  assert got.by_primitive == unrolled.by_primitive
  # Inside a scan the first layer cannot know that nobody needs its input's
  # gradient, so all layers cost three.
  grad = flops.count(jax.grad(scanned), stack, x)
  assert grad.total == 3 * got.total


@pytest.mark.parametrize("nested", [False, True])
def test_remat_adds_forwards_that_the_model_does_not_need(nested):
  depth, width, batch = 3, 8, 4
  params, x = _mlp_params(depth, width), _array(batch, width)

  def layer(x, kernel):
    return jnp.tanh(x @ kernel)

  if nested:
    layer = jax.checkpoint(layer)

  @jax.checkpoint
  def net(params, x):
    for kernel in params:
      x = layer(x, kernel)
    return x

  def loss(params, x):
    return jnp.sum(net(params, x) ** 2)

  got = flops.count(jax.value_and_grad(loss), params, x)
  plain = flops.count(jax.value_and_grad(_loss), params, x)
  assert plain.total == got.model
  # Nested, the outer checkpoint makes the input of each layer again and the
  # inner ones each layer; nobody asks the outer one for the last output.
  layers = 2 * depth - 1 if nested else depth
  assert got.rematerialised == layers * 2 * batch * width**2


def test_remat_inside_a_scan():
  depth, width = 5, 8

  def loss(stack, x):
    def body(h, kernel):
      h = jnp.tanh(h @ kernel)
      return jnp.tanh(h @ kernel), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, stack)[0] ** 2)

  args = _array(depth, width, width), _array(4, width)
  got = flops.count(jax.value_and_grad(loss), *args)
  forward = depth * 2 * 2 * 4 * width**2
  assert (got.model, got.rematerialised) == (3 * forward, forward)


def _brute_force_conv(x, kernel, **options):
  """Multiplications by a real input element, counted by convolving ones."""
  ones = jax.lax.conv_general_dilated(jnp.ones(x), jnp.ones(kernel), **options)
  return 2 * float(jnp.sum(ones))


CONVS = {
    "valid": ((2, 3, 9), (4, 3, 3), dict(padding="VALID")),
    "same": ((2, 3, 9), (4, 3, 4), dict(padding="SAME")),
    "causal": ((1, 2, 7), (4, 2, 3), dict(padding=[(2, 0)])),
    "stride": ((2, 3, 9, 8), (4, 3, 3, 2), dict(padding="SAME", stride=2)),
    "dilated": ((1, 3, 11), (4, 3, 3), dict(padding="SAME", rhs_dilation=3)),
    "transposed": ((1, 3, 5), (4, 3, 4), dict(padding=[(2, 2)], holes=2)),
    "depthwise": ((2, 6, 9), (6, 1, 3), dict(padding="SAME", groups=6)),
    "cropped": ((1, 1, 9), (1, 1, 3), dict(padding=[(-1, -2)])),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolution(name):
  x, kernel, given = CONVS[name]
  dims = len(x) - 2
  options = dict(
      window_strides=(given.get("stride", 1),) * dims,
      padding=given["padding"],
      lhs_dilation=(given.get("holes", 1),) * dims,
      rhs_dilation=(given.get("rhs_dilation", 1),) * dims,
      feature_group_count=given.get("groups", 1),
  )

  def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, **options)

  expected = _brute_force_conv(x, kernel, **options)
  args = _array(*x), _array(*kernel)
  assert flops.count(conv, *args).total == expected
  # The three convolutions of a training step visit the same triples of
  # output, tap and input.
  step = jax.value_and_grad(lambda x, k: jnp.sum(conv(x, k) ** 2), (0, 1))
  assert flops.count(step, *args).total == 3 * expected


def test_convolution_against_xla():
  def conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, window_strides=(2, 2), padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

  args = _array(2, 17, 16, 3), _array(5, 4, 3, 8)
  xla = jax.jit(conv).lower(*args).cost_analysis()["flops"]
  assert flops.count(conv, *args).total == xla


def test_ragged_dot_multiplies_each_row_once():
  rows, inner, outer, groups = 10, 4, 6, 3
  args = _array(rows, inner), _array(groups, inner, outer)
  sizes = jnp.array([3, 0, 7])

  def fn(x, kernel):
    return jnp.sum(jax.lax.ragged_dot(x, kernel, sizes))

  once = 2 * rows * inner * outer
  assert flops.count(fn, *args).by_primitive == {"ragged_dot_general": once}
  assert flops.count(jax.value_and_grad(fn, (0, 1)), *args).total == 3 * once


def _loop(x, start, stop, step=1):
  return jax.lax.while_loop(
      lambda c: c[0] < stop, lambda c: (c[0] + step, c[1] @ c[1]), (start, x)
  )


def test_while_loop_of_known_and_unknown_length():
  x = _array(4, 4)
  once = 2 * 4**3
  known = flops.count(lambda x: _loop(x, 2, 7), x)
  assert (known.total, known.notes) == (5 * once, ())
  counted = flops.count(
      lambda x: jax.lax.fori_loop(0, jnp.int32(6), lambda _, c: c @ c, x), x
  )
  assert (counted.total, counted.notes) == (6 * once, ())
  assert flops.count(lambda x: _loop(x, 7, 2), x).total == 0
  for unknown in (
      flops.count(lambda x, n: _loop(x, 0, n), x, 3),
      flops.count(lambda x: _loop(x, 0, 8, step=2), x),
      flops.count(lambda x: jax.lax.while_loop(
          lambda c: jnp.sum(c) < 5, lambda c: c @ c, x), x),
      flops.count(lambda x: jax.lax.while_loop(
          lambda c: c[0] < c[1],
          lambda c: (c[0] + 1, c[1] - 1, c[2] @ c[2]), (0, 8, x)), x),
  ):
    assert unknown.total == once
    assert "unknown length" in unknown.notes[0]


def test_work_that_no_output_needs_is_not_counted():
  def fn(stack, x):
    def body(h, kernel):
      return jnp.tanh(h @ kernel), jnp.sum(h)

    _, sums = jax.lax.scan(body, x, stack)
    sizes = jax.lax.scan(lambda c, k: (c, (k @ k, k[0, 0])), 0.0, stack)[1][1]
    return sums[0] * 0, sizes

  width, depth = 8, 5
  got = flops.count(fn, _array(depth, width, width), _array(4, width))
  # The sums need the layers; `k @ k` of the second scan is never used.
  assert got.total == depth * 2 * 4 * width**2


def test_cond_takes_the_dearest_branch():
  def fn(p, x):
    return jax.lax.switch(
        p, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x
    )

  assert flops.count(fn, 1, _array(4, 4)).total == 2 * 2 * 4**3


def test_calls_and_custom_rules_are_followed():
  @jax.custom_vjp
  def square(x):
    return x @ x

  square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
  fn = jax.jit(lambda x: jnp.sum(square(jax.jit(jax.nn.relu)(x))))
  once = 2 * 4**3
  assert flops.count(fn, _array(4, 4)).total == once
  assert flops.count(jax.value_and_grad(fn), _array(4, 4)).total == 3 * once


@pytest.mark.parametrize("axes", [("x",), ("x", "y")])
def test_shard_map_counts_every_device(axes):
  mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
  spec = PartitionSpec(axes)
  fn = jax.shard_map(
      lambda x, k: x @ k, mesh=mesh, in_specs=(spec, PartitionSpec()),
      out_specs=spec, axis_names=set(axes),
  )
  got = flops.count(fn, _array(16, 4), _array(4, 8))
  assert got.total == 2 * 16 * 4 * 8


def test_pallas_kernel_with_and_without_declared_cost():
  def kernel(x, y, out):
    out[...] = x[...] @ y[...]

  def call(cost):
    return pl.pallas_call(
        kernel,
        out_shape=_array(8, 8),
        grid=(2,),
        in_specs=[
            pl.BlockSpec((4, 8), lambda i: (i, 0)),
            pl.BlockSpec((8, 8), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((4, 8), lambda i: (i, 0)),
        cost_estimate=cost,
    )

  args = _array(8, 8), _array(8, 8)
  assert flops.count(call(None), *args).total == 2 * 8**3
  cost = pl.CostEstimate(flops=123, transcendentals=7, bytes_accessed=1)
  got = flops.count(call(cost), *args)
  assert got.by_primitive == {"pallas_call": 123}
  assert got.elementwise == 7


def test_elementwise_counts_reads_of_reductions_and_no_moves():
  def fn(x):
    return jnp.sum(jnp.exp(x.T.reshape(-1)))

  assert flops.count(fn, _array(3, 4)).elementwise == 12 + 12


def test_valid_taps_against_brute_force():
  for size, kernel, stride, pad, lhs, rhs in itertools.product(
      (4, 7), (1, 3), (1, 2), (-1, 0, 2), (1, 2), (1, 3)
  ):
    x = np.zeros((size - 1) * lhs + 1)
    x[::lhs] = 1
    out = max(0, (len(x) + 2 * pad - (kernel - 1) * rhs - 1) // stride + 1)
    positions = [
        o * stride + k * rhs - pad for o in range(out) for k in range(kernel)
    ]
    expected = sum(x[p] for p in positions if 0 <= p < len(x))
    got = flops._valid_taps(size, kernel, out, stride, pad, lhs, rhs)
    assert got == expected
