"""Compiles for one chip of a TPU that is not there."""

import importlib.util

import jax
import numpy as np
import pytest

needed = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"
)

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}


def compile_for(chip, run, *arguments, donate=()):
  """`run` compiled for arguments with shapes and dtypes."""
  from mmjax.perf import topology

  target = topology.devices(CHIPS[chip])[0]
  place = jax.sharding.SingleDeviceSharding(target)
  placed = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      arguments,
  )
  mesh = jax.sharding.Mesh(
      np.array([target]), ("x",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  with jax.set_mesh(mesh):
    return jax.jit(run, donate_argnums=donate).lower(*placed).compile()
