"""The sigmoid loss against its dense definition, on one device and on many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.objectives import sigmoid
from tests.kernels import tpu

RNG = np.random.default_rng(0)


def example(batch=64, width=8):
  rows = RNG.normal(size=(2, batch, width))
  rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
  # Partners resemble each other, so that both kinds of pairs weigh.
  rows[1] = 0.5 * rows[0] + 0.5 * rows[1]
  left, right = rows.astype(np.float32)
  return left, right, np.float32(6.0), np.float32(-2.0)


def definition(left, right, scale, bias):
  """Value and gradients in float64, over the whole matrix."""
  left, right, scale, bias = (np.float64(x) for x in (left, right, scale, bias))
  logits = scale * left @ right.T + bias
  sign = 2 * np.eye(len(left)) - 1
  loss = np.log1p(np.exp(-sign * logits)).sum(axis=1).mean()
  slope = -sign / (1 + np.exp(sign * logits)) / len(left)
  return loss, (
      scale * slope @ right,
      scale * slope.T @ left,
      (slope * (left @ right.T)).sum(),
      slope.sum(),
  )


def ours(*arguments, columns):
  term = sigmoid.pairs(*arguments, columns=columns)["sigmoid"]
  return term.total / term.weight


def full(left, right, scale, bias):
  """As one writes it first: every device's rows against all texts."""
  left = sharding.constrain(left, "batch", None)
  logits = scale * left @ sharding.constrain(right, None, None).T + bias
  logits = sharding.constrain(logits, "batch", None)
  sign = 2 * jnp.eye(len(left)) - 1
  return -jax.nn.log_sigmoid(sign * logits).sum(axis=1).mean()


def check(found, expected):
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
          a, b, rtol=2e-5, atol=2e-6 * np.abs(b).max()
      ),
      found,
      expected,
  )


@pytest.mark.parametrize("batch,columns", [(64, 1000), (64, 16), (60, 7)])
def test_loss_and_gradients_on_one_device(batch, columns):
  arguments = example(batch)
  loss = functools.partial(ours, columns=columns)
  check(
      jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*arguments),
      definition(*arguments),
  )
  assert float(loss(*arguments)) == pytest.approx(
      definition(*arguments)[0], rel=1e-6
  )


@pytest.mark.parametrize("columns", [1000, 3])
@pytest.mark.parametrize(
    "shape",
    [
        dict(data=8),
        dict(fsdp=8),
        dict(data=2, fsdp=4),
        dict(data=2, fsdp=2, tensor=2),
        dict(fsdp=4, context=2),
        dict(tensor=8),
    ],
    ids=str,
)
def test_loss_and_gradients_on_eight_devices(shape, columns):
  arguments = example()
  mesh = sharding.make_mesh(shape)
  loss = functools.partial(ours, columns=columns)
  with jax.set_mesh(mesh):
    rows = jax.device_put(arguments[:2], sharding.batch_sharding(mesh))
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    check(step(*rows, *arguments[2:]), definition(*arguments))


def test_a_batch_that_the_mesh_does_not_divide():
  arguments = example(6)
  with jax.set_mesh(sharding.make_mesh(dict(data=4, fsdp=2))):
    loss = functools.partial(ours, columns=1000)
    check(
        jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*arguments),
        definition(*arguments),
    )


def test_the_gradient_is_that_of_finite_differences():
  """Of a multiple of the loss, so that the incoming gradient counts."""
  arguments = example(12)
  loss = lambda *x: 3 * ours(*x, columns=4)
  gradients = jax.grad(loss, (0, 1, 2, 3))(*arguments)
  step = jax.tree.map(lambda x: RNG.normal(size=np.shape(x)), arguments)
  slope = sum(np.vdot(g, s) for g, s in zip(gradients, step))
  ends = [
      definition(*(x + side * 1e-4 * s for x, s in zip(arguments, step)))[0]
      for side in (1, -1)
  ]
  assert slope == pytest.approx(3 * (ends[0] - ends[1]) / 2e-4, rel=1e-4)


def test_partners_and_strangers_are_told_apart():
  left = jnp.eye(4)
  loss = lambda right: float(ours(left, right, 20.0, -10.0, columns=2))
  assert loss(left) < 1e-3 < 10 < loss(left[::-1])


def program(loss, mesh, batch, width):
  """The compiled loss and gradients; nothing is computed."""
  place = sharding.batch_sharding(mesh)
  row = jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=place)
  whole = sharding.replicated(mesh)
  one = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
  with jax.set_mesh(mesh):
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    return step.lower(row, row, one, one).compile()


def test_no_device_holds_the_logits_or_a_row_of_them():
  mesh = sharding.make_mesh(dict(data=8))
  chunked = functools.partial(ours, columns=16)
  text = program(chunked, mesh, 256, 8).as_text()
  assert "f32[32,16]" in text
  for shape in ("f32[32,256]", "f32[32,32]", "f32[256,8]"):
    assert shape not in text, shape
  assert "f32[32,256]" in program(full, mesh, 256, 8).as_text()


@pytest.mark.slow
@tpu.needed
def test_memory_of_a_batch_of_32k_on_16_chips():
  """Temporaries of So400m's embeddings, chunked and full (measured)."""
  from mmjax.perf import topology

  mesh = sharding.make_mesh(
      dict(fsdp=16), topology.devices(topology.parse("v5e:4x4"))
  )
  temporaries = {
      name: program(loss, mesh, 32_768, 1152)
      .memory_analysis()
      .temp_size_in_bytes
      for name, loss in dict(
          chunked=functools.partial(ours, columns=1024), full=full
      ).items()
  }
  # The full form holds a device's rows of the matrix, the other one less than
  # one part of them (much of that in the chip's VMEM, which is not counted).
  rows = 32_768 // 16
  assert temporaries["full"] > rows * 32_768 * 4
  assert temporaries["chunked"] < rows * 4096 * 4
