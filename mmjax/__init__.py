"""mmjax: landmark multimodal models in JAX, on shared parts."""

__version__ = "0.1.0"
