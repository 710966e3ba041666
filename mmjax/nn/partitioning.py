"""How do parameters carry the logical axes that `sharding.py` maps?

Modules declare parameters through `declared`; `unbox` takes the boxes off right
after initialisation, so that training sees nothing but arrays.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

Initializer = Callable[..., jax.Array]


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
