"""How fast is the same step in PyTorch? The twins that `bench` measures against.

Each twin is the network as a PyTorch user writes it: fused query-key-value
projections, `scaled_dot_product_attention`, a convolution that patchifies. It
is imported only where PyTorch is installed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

from mmjax.models import clip
from mmjax.models import vit

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
_Params = Mapping[str, np.ndarray]


class _Block(nn.Module):
  """A pre-norm transformer block."""

  def __init__(self, spec: Any, causal: bool):
    super().__init__()
    self.heads, self.causal = spec.heads, causal
    self.activation = _ACTIVATIONS[spec.activation]
    self.norm1 = nn.LayerNorm(spec.width, spec.epsilon)
    self.qkv = nn.Linear(spec.width, 3 * spec.width)
    self.out = nn.Linear(spec.width, spec.width)
    self.norm2 = nn.LayerNorm(spec.width, spec.epsilon)
    self.up = nn.Linear(spec.width, spec.mlp)
    self.down = nn.Linear(spec.mlp, spec.width)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    batch, length, width = x.shape
    qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
    x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
    return x + self.down(self.activation(self.up(self.norm2(x))))


def _blocks(spec: Any, causal: bool) -> nn.Sequential:
  return nn.Sequential(*(_Block(spec, causal) for _ in range(spec.depth)))


class _Encoder(nn.Module):
  """An image, channels first, as a row of tokens, class token first."""

  def __init__(self, spec: Any, patch_bias: bool, stem_norm: bool):
    super().__init__()
    tokens = 1 + (spec.image[0] // spec.patch) * (spec.image[1] // spec.patch)
    self.patch = nn.Conv2d(
        3, spec.width, spec.patch, spec.patch, bias=patch_bias
    )
    self.cls = nn.Parameter(torch.zeros(spec.width))
    self.position = nn.Parameter(torch.zeros(tokens, spec.width))
    self.stem_norm = (
        nn.LayerNorm(spec.width, spec.epsilon) if stem_norm else nn.Identity()
    )
    self.blocks = _blocks(spec, causal=False)

  def forward(self, image: torch.Tensor) -> torch.Tensor:
    x = self.patch(image).flatten(2).transpose(1, 2)
    x = torch.cat([self.cls.expand(x.shape[0], 1, -1), x], dim=1)
    return self.blocks(self.stem_norm(x + self.position))


class ViT(nn.Module):
  """The twin of `vit.ViT` with a head and no dropout."""

  def __init__(self, spec: vit.ViT):
    super().__init__()
    self.encoder = _Encoder(spec, patch_bias=True, stem_norm=False)
    self.norm = nn.LayerNorm(spec.width, spec.epsilon)
    self.head = nn.Linear(spec.width, spec.classes)

  def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of f32[B, 3, H, W] against i64[B]."""
    logits = self.head(self.norm(self.encoder(image))[:, 0])
    return F.cross_entropy(logits, label)

  @torch.no_grad()
  def load(self, params: _Params) -> None:
    """Takes over the parameters of a `vit.ViT`, as a flat dict."""
    _load_encoder(self.encoder, params, "encoder")
    _load_norm(self.norm, params, "norm")
    _load_linear(self.head, params, "head")


class CLIP(nn.Module):
  """The twin of `clip.CLIP`."""

  def __init__(self, spec: clip.CLIP):
    super().__init__()
    vision, text = spec.vision, spec.text
    self.vision = _Encoder(vision, patch_bias=False, stem_norm=True)
    self.vision_norm = nn.LayerNorm(vision.width, vision.epsilon)
    self.vision_projection = nn.Linear(vision.width, vision.embed, bias=False)
    self.embed = nn.Embedding(text.vocab, text.width)
    self.position = nn.Parameter(torch.zeros(text.length, text.width))
    self.text = _blocks(text, causal=True)
    self.text_norm = nn.LayerNorm(text.width, text.epsilon)
    self.text_projection = nn.Linear(text.width, text.embed, bias=False)
    self.logit_scale = nn.Parameter(torch.zeros(()))

  def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The symmetric InfoNCE loss of f32[B, 3, H, W] and i64[B, L]."""
    pooled = self.vision_norm(self.vision(image)[:, 0])
    left = F.normalize(self.vision_projection(pooled), dim=-1)
    x = self.text_norm(self.text(self.embed(tokens) + self.position))
    pooled = x[torch.arange(x.shape[0]), tokens.argmax(dim=-1)]
    right = F.normalize(self.text_projection(pooled), dim=-1)
    logits = self.logit_scale.exp() * left @ right.t()
    labels = torch.arange(logits.shape[0])
    forward = F.cross_entropy(logits, labels)
    return (forward + F.cross_entropy(logits.t(), labels)) / 2

  @torch.no_grad()
  def load(self, params: _Params) -> None:
    """Takes over the parameters of a `clip.CLIP`, as a flat dict."""
    _load_encoder(self.vision, params, "vision/encoder")
    _load_norm(self.vision_norm, params, "vision/norm")
    _load_linear(self.vision_projection, params, "vision/projection")
    _copy(self.embed.weight, params["text/embed/embedding"])
    _copy(self.position, params["text/position/table"])
    _load_blocks(self.text, params, "text/blocks")
    _load_norm(self.text_norm, params, "text/norm")
    _load_linear(self.text_projection, params, "text/projection")
    _copy(self.logit_scale, params["logit_scale"])


def _copy(target: torch.Tensor, value: np.ndarray) -> None:
  target.copy_(torch.tensor(np.asarray(value)).reshape(target.shape))


def _load_linear(
    layer: nn.Linear, params: _Params, path: str, index: Any = ...
) -> None:
  kernel = params[f"{path}/kernel"][index]
  _copy(layer.weight, kernel.reshape(layer.in_features, -1).T)
  if layer.bias is not None:
    _copy(layer.bias, params[f"{path}/bias"][index])


def _load_norm(
    layer: nn.LayerNorm, params: _Params, path: str, index: Any = ...
) -> None:
  _copy(layer.weight, params[f"{path}/scale"][index])
  _copy(layer.bias, params[f"{path}/bias"][index])


def _load_blocks(blocks: nn.Sequential, params: _Params, path: str) -> None:
  for i, block in enumerate(blocks):
    _load_norm(block.norm1, params, f"{path}/attention_norm", i)
    names = [f"{path}/attention/{name}" for name in ("query", "key", "value")]
    width = block.qkv.in_features
    kernels = [params[f"{n}/kernel"][i].reshape(width, -1).T for n in names]
    _copy(block.qkv.weight, np.concatenate(kernels))
    _copy(
        block.qkv.bias,
        np.concatenate([params[f"{name}/bias"][i].ravel() for name in names]),
    )
    _load_linear(block.out, params, f"{path}/attention/out", i)
    _load_norm(block.norm2, params, f"{path}/mlp_norm", i)
    _load_linear(block.up, params, f"{path}/mlp/up", i)
    _load_linear(block.down, params, f"{path}/mlp/down", i)


def _load_encoder(encoder: _Encoder, params: _Params, path: str) -> None:
  kernel = params[f"{path}/patch/kernel"]
  _copy(encoder.patch.weight, kernel.transpose(3, 2, 0, 1))
  if encoder.patch.bias is not None:
    _copy(encoder.patch.bias, params[f"{path}/patch/bias"])
  _copy(encoder.cls, params[f"{path}/cls"])
  _copy(encoder.position, params[f"{path}/position/table"])
  if isinstance(encoder.stem_norm, nn.LayerNorm):
    _load_norm(encoder.stem_norm, params, f"{path}/stem_norm")
  _load_blocks(encoder.blocks, params, f"{path}/blocks")
