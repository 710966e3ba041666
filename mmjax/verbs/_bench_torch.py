"""How would a PyTorch user write the same step? The twins of `mmjax bench`.

The networks are written as is usual there: one fused projection for queries,
keys and values, `scaled_dot_product_attention`, a strided convolution for the
patches, the fused AdamW. Imported only where PyTorch is installed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import itertools
import pathlib
import re
from typing import Any

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

from mmjax import config as config_lib
from mmjax.models import clip, llm, vit
from mmjax.verbs import _bench_data, _bench_torch_llm

Params = Mapping[str, np.ndarray]
Inputs = Mapping[str, torch.Tensor]
# A parameter of a twin, the path of ours that fills it, and its value. The
# fused projection carries the path of the query's: one rule governs all three.
Source = tuple[nn.Parameter, str, np.ndarray]

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
_POOLS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "token": lambda tokens: tokens[:, 0],
    "gap": lambda tokens: tokens[:, 1:].mean(dim=1),
}


class _Block(nn.Module):
  """A pre-norm transformer block."""

  def __init__(self, spec: Any, causal: bool) -> None:
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
    """Maps f32[B, L, D] to f32[B, L, D]."""
    batch, length, width = x.shape
    qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
    x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
    return x + self.down(self.activation(self.up(self.norm2(x))))

  def sources(self, params: Params, path: str, i: int) -> Iterator[Source]:
    """What fills this block: slice i of the stacked leaves below `path`."""
    yield from _norm(self.norm1, params, f"{path}/attention_norm", i)
    parts = [f"{path}/attention/{name}" for name in ("query", "key", "value")]
    width = self.qkv.in_features
    kernels = [params[f"{p}/kernel"][i].reshape(width, -1).T for p in parts]
    biases = [params[f"{p}/bias"][i].ravel() for p in parts]
    yield self.qkv.weight, f"{parts[0]}/kernel", np.concatenate(kernels)
    yield self.qkv.bias, f"{parts[0]}/bias", np.concatenate(biases)
    yield from _linear(self.out, params, f"{path}/attention/out", i)
    yield from _norm(self.norm2, params, f"{path}/mlp_norm", i)
    yield from _linear(self.up, params, f"{path}/mlp/up", i)
    yield from _linear(self.down, params, f"{path}/mlp/down", i)


class _Encoder(nn.Module):
  """An image, channels first, as a row of tokens, class token first."""

  def __init__(self, spec: Any, patch_bias: bool, stem_norm: bool) -> None:
    super().__init__()
    side = spec.patch
    tokens = 1 + (spec.image[0] // side) * (spec.image[1] // side)
    self.patch = nn.Conv2d(3, spec.width, side, side, bias=patch_bias)
    self.cls = nn.Parameter(torch.zeros(spec.width))
    self.position = nn.Parameter(torch.zeros(tokens, spec.width))
    self.stem_norm = (
        nn.LayerNorm(spec.width, spec.epsilon) if stem_norm else nn.Identity()
    )
    self.blocks = nn.Sequential(
        *(_Block(spec, causal=False) for _ in range(spec.depth))
    )

  def forward(self, image: torch.Tensor) -> torch.Tensor:
    """Maps f32[B, 3, H, W] to f32[B, 1 + N, D]."""
    x = self.patch(image).flatten(2).transpose(1, 2)
    x = torch.cat([self.cls.expand(x.shape[0], 1, -1), x], dim=1)
    return self.blocks(self.stem_norm(x + self.position))

  def sources(self, params: Params, path: str) -> Iterator[Source]:
    """What fills this tower: the leaves below `path`."""
    kernel = params[f"{path}/patch/kernel"].transpose(3, 2, 0, 1)
    yield self.patch.weight, f"{path}/patch/kernel", kernel
    if self.patch.bias is not None:
      bias = f"{path}/patch/bias"
      yield self.patch.bias, bias, params[bias]
    yield self.cls, f"{path}/cls", params[f"{path}/cls"]
    table = f"{path}/position/table"
    yield self.position, table, params[table]
    if isinstance(self.stem_norm, nn.LayerNorm):
      yield from _norm(self.stem_norm, params, f"{path}/stem_norm")
    for i, block in enumerate(self.blocks):
      yield from block.sources(params, f"{path}/blocks", i)


class ViT(nn.Module):
  """The twin of a `vit.ViT` with a head and nothing before it."""

  def __init__(self, spec: vit.ViT) -> None:
    super().__init__()
    self.encoder = _Encoder(spec, patch_bias=True, stem_norm=False)
    self.norm = nn.LayerNorm(spec.width, spec.epsilon)
    self.head = nn.Linear(spec.width, spec.classes)
    self.pool = _POOLS[spec.pool]

  def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of f32[B, 3, H, W] against i64[B]."""
    pooled = self.pool(self.norm(self.encoder(image)))
    return F.cross_entropy(self.head(pooled), label)

  def sources(self, params: Params) -> Iterator[Source]:
    """What fills this network, from a flat dict of ours."""
    yield from self.encoder.sources(params, "encoder")
    yield from _norm(self.norm, params, "norm")
    yield from _linear(self.head, params, "head")


class CLIP(nn.Module):
  """The twin of `clip.CLIP` that reads texts at their highest id."""

  def __init__(self, spec: clip.CLIP) -> None:
    super().__init__()
    vision, text = spec.vision, spec.text
    self.vision = _Encoder(vision, patch_bias=False, stem_norm=True)
    self.vision_norm = nn.LayerNorm(vision.width, vision.epsilon)
    self.vision_projection = nn.Linear(vision.width, vision.embed, bias=False)
    self.embed = nn.Embedding(text.vocab, text.width)
    self.position = nn.Parameter(torch.zeros(text.length, text.width))
    self.text = nn.Sequential(
        *(_Block(text, causal=True) for _ in range(text.depth))
    )
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
    rows = F.cross_entropy(logits, labels)
    return (rows + F.cross_entropy(logits.t(), labels)) / 2

  def sources(self, params: Params) -> Iterator[Source]:
    """What fills this network, from a flat dict of ours."""
    yield from self.vision.sources(params, "vision/encoder")
    yield from _norm(self.vision_norm, params, "vision/norm")
    yield from _linear(self.vision_projection, params, "vision/projection")
    for parameter, path in (
        (self.embed.weight, "text/embed/embedding"),
        (self.position, "text/position/table"),
        (self.logit_scale, "logit_scale"),
    ):
      yield parameter, path, params[path]
    for i, block in enumerate(self.text):
      yield from block.sources(params, "text/blocks", i)
    yield from _norm(self.text_norm, params, "text/norm")
    yield from _linear(self.text_projection, params, "text/projection")


TWINS: Mapping[type, type[nn.Module]] = {
    vit.ViT: ViT,
    clip.CLIP: CLIP,
    llm.Decoder: _bench_torch_llm.Decoder,
}


def _linear(
    layer: nn.Linear, params: Params, path: str, index: Any = ...
) -> Iterator[Source]:
  kernel = params[f"{path}/kernel"][index].reshape(layer.in_features, -1)
  yield layer.weight, f"{path}/kernel", kernel.T
  if layer.bias is not None:
    yield layer.bias, f"{path}/bias", params[f"{path}/bias"][index]


def _norm(
    layer: nn.LayerNorm, params: Params, path: str, index: Any = ...
) -> Iterator[Source]:
  yield layer.weight, f"{path}/scale", params[f"{path}/scale"][index]
  yield layer.bias, f"{path}/bias", params[f"{path}/bias"][index]


def make_twin(system: Any, params: Params) -> nn.Module:
  """The network of `system` with the parameters `params`.

  Raises:
    ValueError: if a parameter of the twin was not filled.
  """
  model = TWINS[type(system)](system)
  rest = {id(parameter): name for name, parameter in model.named_parameters()}
  with torch.no_grad():
    for parameter, _, value in model.sources(params):
      parameter.copy_(torch.tensor(value).reshape(parameter.shape))
      del rest[id(parameter)]
  if rest:
    raise ValueError(f"parameters without a source: {sorted(rest.values())}")
  return model


def make_inputs(batch: Mapping[str, np.ndarray]) -> Inputs:
  """A batch as PyTorch likes it: channels first, indices in int64."""
  tensors = {key: torch.tensor(leaf) for key, leaf in batch.items()}
  return {
      key: leaf.permute(0, 3, 1, 2).contiguous() if leaf.ndim == 4
      else leaf if leaf.is_floating_point() else leaf.long()
      for key, leaf in tensors.items()
  }


def loss_and_norm(model: nn.Module, inputs: Inputs) -> tuple[float, float]:
  """The loss, and the global norm of its gradient."""
  loss = model(**inputs)
  grads = torch.autograd.grad(loss, list(model.parameters()))
  return loss.item(), torch.nn.utils.get_total_norm(grads).item()


def make_step(
    model: nn.Module,
    params: Params,
    inputs: Inputs,
    rules: Sequence[tuple[str, Mapping[str, Any]]],
    lr: float,
    compiled: bool,
) -> Callable[[], None]:
  """One train step as a function of nothing.

  Args:
    model: from `make_twin`.
    params: a flat dict of ours, for its shapes.
    inputs: from `make_inputs`.
    rules: (regex on our paths, arguments of `optim.adamw`), as in a config.
      They may differ in `maximum` only.
    lr: learning rate; a schedule costs nothing that could be measured.
    compiled: whether network and loss go through `torch.compile`.
  """
  decayed, others, bounded = [], [], []
  for parameter, path, _ in model.sources(params):
    rule = next(rule for regex, rule in rules if re.fullmatch(regex, path))
    decays = re.fullmatch(rule.get("decay", ".*kernel"), path)
    (decayed if decays else others).append(parameter)
    if "maximum" in rule:
      bounded.append((parameter, rule["maximum"]))
  rule = rules[-1][1]
  optimizer = torch.optim.AdamW(
      [
          dict(params=decayed, weight_decay=rule.get("weight_decay", 0.0)),
          dict(params=others, weight_decay=0.0),
      ],
      lr=lr,
      betas=(rule.get("b1", 0.9), rule.get("b2", 0.999)),
      eps=rule.get("eps", 1e-8),
      fused=True,
  )
  clip_norm = rule.get("clip")
  loss = torch.compile(model) if compiled else model

  def step() -> None:
    optimizer.zero_grad(set_to_none=True)
    loss(**inputs).backward()
    if clip_norm:
      torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    with torch.no_grad():
      for parameter, maximum in bounded:
        parameter.clamp_(max=maximum)

  return step


def contestants(
    config: Mapping[str, Any],
    params: Params,
    batch: Mapping[str, np.ndarray],
    threads: int,
) -> tuple[dict[str, Callable[[], None]], Any]:
  """The twins' steps, for a `_timing.Worker`.

  Args:
    config: a frozen one of ours.
    params: a flat dict of ours.
    batch: as ours.
    threads: to compute with.

  Returns:
    name -> step; and either None, for a system without a twin, or the loss and
    the gradient norm, and name -> why a contestant is missing.
  """
  torch.set_num_threads(threads)
  system = config_lib.build(config["system"], "config.system")
  if type(system) not in TWINS:
    return {}, None
  inputs = make_inputs(batch)
  found = loss_and_norm(make_twin(system, params), inputs)
  steps, missing = {}, {}
  for name, compiled in (("eager", False), ("compile", True)):
    try:
      step = make_step(
          make_twin(system, params),
          params,
          inputs,
          config["optim"],
          config["lr"],
          compiled,
      )
      step()
    except RuntimeError as error:  # torch.compile needs a C++ compiler.
      missing[name] = str(error).strip().splitlines()[0]
    else:
      steps[name] = step
  return steps, (found, missing)


def attention_contestants(
    pattern: str,
    interval: Sequence[np.ndarray],
    arrays: Sequence[np.ndarray],
    dtype: str,
    threads: int,
) -> tuple[dict[str, Callable[[], None]], Any]:
  """PyTorch's attention, for a `_timing.Worker`.

  Args:
    pattern: of the mask.
    interval: block i32[L], first i32[L] and last i32[L].
    arrays: q, k, v and the cotangent of the output, f32[B, L, H, D].
    dtype: to compute in.
    threads: to compute with.

  Returns:
    "NAME forward" and "NAME both" -> step; and name -> why one is missing.
  """
  from torch.nn.attention import flex_attention as flex

  torch.set_num_threads(threads)
  q, k, v, dout = (
      torch.tensor(x).to(getattr(torch, dtype)).transpose(1, 2).contiguous()
      for x in arrays
  )
  block, first, last = (torch.tensor(x) for x in interval)
  length = q.shape[2]
  seen = (first <= block[:, None]) & (block[:, None] <= last)

  def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    special = pattern in ("full", "causal")
    return F.scaled_dot_product_attention(
        q, k, v,
        attn_mask=None if special else seen,
        is_causal=pattern == "causal",
    )

  found, missing = {"sdpa": sdpa}, {}
  visible = flex.create_block_mask(
      lambda b, h, i, j: (first[j] <= block[i]) & (block[i] <= last[j]),
      None, None, length, length, device="cpu",
  )
  compiled = torch.compile(flex.flex_attention)
  found["flex"] = lambda q, k, v: compiled(q, k, v, block_mask=visible)
  steps = {}
  for name, attend in found.items():
    for passes in ("forward", "both"):
      step = _attention_step(attend, passes, q, k, v, dout)
      try:
        step()
      except Exception as error:  # Of the compiler, or no gradient on a CPU.
        missing[f"{name} {passes}"] = str(error).strip().splitlines()[0]
      else:
        steps[f"{name} {passes}"] = step
  return steps, missing


def _attention_step(
    attend: Callable[..., torch.Tensor],
    passes: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
) -> Callable[[], None]:
  def forward() -> None:
    with torch.no_grad():
      attend(q, k, v)

  leaves = [x.clone().requires_grad_() for x in (q, k, v)]

  def both() -> None:
    torch.autograd.grad(attend(*leaves), leaves, dout)

  return forward if passes == "forward" else both


def vq_contestants(
    x: np.ndarray, codebook: np.ndarray, threads: int
) -> tuple[dict[str, Callable[[], None]], Any]:
  """PyTorch's lookup, for a `_timing.Worker`.

  Args:
    x: f32[N, D].
    codebook: f32[K, D].
    threads: to compute with.

  Returns:
    "cdist" -> step; and None.
  """
  torch.set_num_threads(threads)
  rows, codes = torch.tensor(x), torch.tensor(codebook)

  def step() -> None:
    with torch.no_grad():
      torch.cdist(rows, codes).argmin(dim=1)

  return {"cdist": step}, None


# --- data ---------------------------------------------------------------------


class FileSet(torch.utils.data.Dataset):
  """The files of `_bench_data` in a folder, as a map-style data set."""

  def __init__(self, folder: str, name: str) -> None:
    ending, _, field = _bench_data.MEDIA[name]
    self.paths = sorted(pathlib.Path(folder).glob(f"*.{ending}"))
    self.ending, self.field = ending, field()

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
    path = self.paths[index]
    value = self.field({self.ending: path.read_bytes()})
    label = int(path.with_suffix(".cls").read_text())
    return torch.from_numpy(value), label


def data_contestants(
    folder: str, name: str, batch: int, cores: int, steps: Any
) -> tuple[dict[str, Callable[[], None]], None]:
  """PyTorch's DataLoader with and without workers; see `_bench_data.run`."""
  torch.set_num_threads(1)
  files = FileSet(folder, name)

  def endless(workers: int) -> Callable[[], None]:
    loader = torch.utils.data.DataLoader(
        files, batch, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0,
    )
    rows = (row for _ in itertools.count() for row in loader)
    return lambda: _bench_data.run(lambda: next(rows), steps)

  return {
      f"torch {workers} workers": endless(workers) for workers in (0, cores)
  }, None
