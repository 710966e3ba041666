"""The mesh, and the mapping of logical axes on it."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from mmjax import sharding


def test_the_mesh_fills_one_free_axis():
  mesh = sharding.make_mesh({"data": -1, "tensor": 2})
  assert dict(mesh.shape) == dict(data=4, fsdp=1, tensor=2, context=1)
  assert mesh.axis_names == sharding.AXES


@pytest.mark.parametrize(
    "shape,message",
    [
        ({"dat": 8}, r"unknown axes \['dat'\]"),
        ({"data": 3}, "needs a product of 8 devices"),
        ({"data": -1, "tensor": 3}, "needs a product of 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
        ({"data": 0}, "must be positive"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(shape, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(shape)


def test_a_mesh_axis_is_used_once_and_divides():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  spec = lambda *args: sharding.spec(*args, mesh)
  assert spec(("embed", "mlp"), (8, 6)) == P(("fsdp",), ("tensor",))
  assert spec(("batch", "embed"), (8, 8)) == P(("data", "fsdp"), None)
  # 6 is divisible by data but not by data x fsdp; embed may then have fsdp.
  assert spec(("batch", "embed"), (6, 8)) == P(("data",), ("fsdp",))
  assert spec(("embed", "vocab"), (8, 5)) == P(("fsdp",), None)
  assert spec((None, "heads"), (8, 2)) == P(None, ("tensor",))
  with pytest.raises(ValueError, match="do not name shape"):
    spec(("embed",), (2, 2))
  with pytest.raises(KeyError):
    spec(("embedding",), (2,))


def test_constrain_needs_no_mesh_and_obeys_one():
  x = jnp.zeros((8, 4))
  assert sharding.constrain(x, "batch", "mlp") is x
  mesh = sharding.make_mesh({"data": 4, "tensor": 2})
  with jax.set_mesh(mesh):
    y = jax.jit(lambda x: sharding.constrain(x, "batch", "mlp"))(x)
  assert y.sharding.spec == P(("data",), ("tensor",))


def test_parts_of_a_batch_are_strided_and_merge_back():
  rows = {"x": jnp.arange(16).reshape(8, 2)}
  parts = sharding.split_rows(rows, 2)
  assert parts["x"][:, :, 0].tolist() == [[0, 4, 8, 12], [2, 6, 10, 14]]
  assert (sharding.merge_rows(parts)["x"] == rows["x"]).all()


def test_splitting_a_batch_moves_nothing_between_devices():
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
  with jax.set_mesh(mesh):
    x = jax.device_put(jnp.zeros((64, 3)), sharding.batch_sharding(mesh))
    step = lambda x: sharding.merge_rows(sharding.split_rows(x, 4) * 2)
    text = jax.jit(step).lower(x).compile().as_text()
  assert "all-" not in text and "collective-permute" not in text
