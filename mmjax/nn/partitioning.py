"""How do parameters carry the logical axes that `sharding.py` maps?

Modules declare parameters by `param` and `declared`; `unbox` takes the boxes
off right after initialisation, so that training sees nothing but arrays.
"""

from collections.abc import Callable
from typing import Any

from flax import errors
import flax.linen as nn
import jax

Initializer = Callable[..., jax.Array]


def param(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    dtype: Any,
) -> jax.Array:
  """`module.param`, which does not trace `init` where there is a value.

  Flax traces the initializer of every parameter to compare shapes whenever a
  module is applied: half of the time that ImageBind takes to trace.

  Raises:
    flax.errors.ScopeParamShapeError: if the parameter has another shape.
  """
  if not module.has_variable("params", name):
    return module.param(name, init, shape, dtype)
  found = nn.unbox(module.get_variable("params", name))
  if found.shape != tuple(shape):
    raise errors.ScopeParamShapeError(
        name, module.scope.path_text, found.shape, shape
    )
  return found


def declared(init: Initializer, *names: str | None) -> Initializer:
  """An initializer whose parameter carries one logical axis per dimension."""
  return nn.with_logical_partitioning(init, names)


def unbox(boxed: Any) -> Any:
  """The tree of plain arrays (or ShapeDtypeStructs) of a boxed tree."""
  return nn.unbox(boxed)


def axes(boxed: Any) -> Any:
  """The tree of logical axis names of a boxed tree, `()` meaning replicated.

  Returns:
    A tree of the structure of `unbox(boxed)` with a tuple of names per leaf.
  """
  is_box = lambda x: isinstance(x, nn.Partitioned)

  def names(leaf: Any) -> tuple[str | None, ...]:
    return leaf.names if is_box(leaf) else (None,) * leaf.ndim

  return jax.tree.map(names, boxed, is_leaf=is_box)
