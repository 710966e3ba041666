"""Parameters: drawn once, with the axes of their dimensions."""

from collections.abc import Callable

from flax import errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import partitioning


class Scale(nn.Module):
  """Multiplies by a parameter, and says when it is drawn."""

  note: Callable[..., None]
  width: int = 3

  @nn.compact
  def __call__(self, x):
    def init(rng, shape, dtype):
      self.note(shape)
      return jax.random.normal(rng, shape, dtype)

    scale = partitioning.param(
        self,
        "scale",
        partitioning.declared(init, "embed"),
        (self.width,),
        jnp.float32,
    )
    return x * scale


def test_what_has_a_value_is_not_drawn_again():
  drawn = []
  system = Scale(drawn.append)
  boxed = system.init(jax.random.key(0), jnp.ones(3))
  assert partitioning.axes(boxed["params"]) == {"scale": ("embed",)}
  assert drawn == [(3,)]
  variables = partitioning.unbox(boxed)
  found = jax.jit(system.apply)(variables, jnp.full(3, 2.0))
  np.testing.assert_array_equal(found, 2 * variables["params"]["scale"])
  # Boxed ones may be applied too, as Flax's own.
  np.testing.assert_array_equal(system.apply(boxed, jnp.full(3, 2.0)), found)
  assert drawn == [(3,)]


def test_another_shape_and_no_value_are_refused():
  variables = {"params": {"scale": np.ones(4, np.float32)}}
  with pytest.raises(errors.ScopeParamShapeError, match=r"scale.*\(4,\)"):
    Scale(print).apply(variables, jnp.ones(3))
  with pytest.raises(errors.ScopeParamNotFoundError):
    Scale(print).apply({"params": {"other": np.ones(3)}}, jnp.ones(3))
