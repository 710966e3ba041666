"""mmjax: landmark multimodal models in JAX, on shared parts."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["from_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
  """Imports the public functions when they are asked for: JAX is slow to."""
  if name in __all__:
    import importlib

    return getattr(importlib.import_module("mmjax.pretrained"), name)
  raise AttributeError(f"module 'mmjax' has no attribute {name!r}")
