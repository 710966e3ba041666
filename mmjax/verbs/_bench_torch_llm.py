"""How would a PyTorch user train and run a decoder? More twins of `bench`.

The network is written as is usual there, with `scaled_dot_product_attention`
and fused projections; decoding is transformers' `generate`. Imported only where
PyTorch is installed.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

Params = Mapping[str, np.ndarray]
Source = tuple[nn.Parameter, str, np.ndarray]


class _Block(nn.Module):
  """A pre-norm block with rotary positions and a gated MLP (LLaMA)."""

  def __init__(self, spec: Any) -> None:
    super().__init__()
    self.heads, self.groups = spec.heads, spec.groups or spec.heads
    self.dim = spec.head_dim or spec.width // spec.heads
    self.norm1 = nn.RMSNorm(spec.width, spec.epsilon)
    total = (self.heads + 2 * self.groups) * self.dim
    self.qkv = nn.Linear(spec.width, total, bias=False)
    self.out = nn.Linear(self.heads * self.dim, spec.width, bias=False)
    self.norm2 = nn.RMSNorm(spec.width, spec.epsilon)
    self.gate_up = nn.Linear(spec.width, 2 * spec.mlp, bias=False)
    self.down = nn.Linear(spec.mlp, spec.width, bias=False)

  def forward(
      self, x: torch.Tensor, mask: torch.Tensor, turn: torch.Tensor
  ) -> torch.Tensor:
    """Maps f32[B, L, D] to f32[B, L, D]."""
    batch, length, _ = x.shape
    qkv = self.qkv(self.norm1(x)).view(batch, length, -1, self.dim)
    q, k, v = qkv.transpose(1, 2).split(
        [self.heads, self.groups, self.groups], dim=1
    )
    y = F.scaled_dot_product_attention(
        _rotate(q, turn), _rotate(k, turn), v, attn_mask=mask,
        enable_gqa=self.groups < self.heads,
    )
    x = x + self.out(y.transpose(1, 2).reshape(batch, length, -1))
    gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
    return x + self.down(F.silu(gate) * up)

  def sources(self, params: Params, i: int) -> Iterator[Source]:
    """What fills this block: slice i of our stacked leaves."""

    def fused(*names: str) -> tuple[str, np.ndarray]:
      paths = [f"blocks/{name}/kernel" for name in names]
      kernels = [params[path][i] for path in paths]
      rows = [kernel.reshape(len(kernel), -1).T for kernel in kernels]
      return paths[0], np.concatenate(rows)

    parts = [f"attention/{name}" for name in ("query", "key", "value")]
    yield self.qkv.weight, *fused(*parts)
    path = "blocks/attention/out/kernel"
    kernel = params[path][i].reshape(self.out.in_features, -1)
    yield self.out.weight, path, kernel.T
    yield self.gate_up.weight, *fused("mlp/gate", "mlp/up")
    yield self.down.weight, *fused("mlp/down")
    for norm, name in ((self.norm1, "attention"), (self.norm2, "mlp")):
      path = f"blocks/{name}_norm/scale"
      yield norm.weight, path, params[path][i]


def _rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
  """Turns f32[B, H, L, D]; the halves of a head are pairs."""
  cos, sin = turn
  left, right = x.chunk(2, dim=-1)
  return x * cos + torch.cat([-right, left], dim=-1) * sin


class Decoder(nn.Module):
  """The twin of an `llm.Decoder` of LLaMA's kind."""

  def __init__(self, spec: Any) -> None:
    super().__init__()
    self.embed = nn.Embedding(spec.vocab, spec.width)
    self.blocks = nn.ModuleList(_Block(spec) for _ in range(spec.depth))
    self.norm = nn.RMSNorm(spec.width, spec.epsilon)
    self.head = nn.Linear(spec.width, spec.vocab, bias=False)
    dim = spec.head_dim or spec.width // spec.heads
    place = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    self.register_buffer("rates", spec.position.theta**-place)

  def forward(
      self,
      tokens: torch.Tensor,
      weight: torch.Tensor,
      segment: torch.Tensor,
      position: torch.Tensor,
      **unused: torch.Tensor,
  ) -> torch.Tensor:
    """The weighted cross-entropy of packed rows i64[B, L]."""
    length = tokens.shape[1]
    mask = segment[:, :, None] == segment[:, None, :]
    mask = mask & torch.ones(length, length, dtype=torch.bool).tril()
    angle = position[..., None].float() * self.rates
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    turn = torch.stack([angle.cos(), angle.sin()])
    x = self.embed(tokens)
    for block in self.blocks:
      x = block(x, mask[:, None], turn)
    logits = self.head(self.norm(x))[:, :-1]
    same = segment[:, 1:] == segment[:, :-1]
    weight = torch.where(same, weight[:, 1:], 0.0)
    loss = F.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return (loss * weight.flatten()).sum() / weight.sum()

  def sources(self, params: Params) -> Iterator[Source]:
    """What fills this network, from a flat dict of ours."""
    path = "embed/embedding"
    yield self.embed.weight, path, params[path]
    for i, block in enumerate(self.blocks):
      yield from block.sources(params, i)
    yield self.norm.weight, "norm/scale", params["norm/scale"]
    yield self.head.weight, "head/kernel", params["head/kernel"].T


def decode_contestants(
    directory: str, tokens: np.ndarray, new: int, threads: int
) -> tuple[dict[str, Callable[[], None]], Any]:
  """transformers' `generate`, for a `_timing.Worker`.

  Args:
    directory: of the model.
    tokens: i32[B, T], prompts.
    new: tokens to write.
    threads: to compute with.

  Returns:
    name -> step; name -> i32[B, new], what it writes, and name -> why one is
    missing.
  """
  import transformers

  torch.set_num_threads(threads)
  model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
  model.generation_config.eos_token_id = None
  prompt = torch.tensor(tokens).long()
  ones = torch.ones_like(prompt)
  eager = model.forward

  def write(cache: str | None, forward: Any) -> torch.Tensor:
    model.forward = forward
    words = {} if cache is None else {"cache_implementation": cache}
    found = model.generate(
        prompt, attention_mask=ones, do_sample=False, max_new_tokens=new,
        min_new_tokens=new, pad_token_id=0, **words,
    )  # fmt: skip
    return found[:, prompt.shape[1] :]

  steps, texts, missing = {}, {}, {}
  compiled = torch.compile(eager)
  for name, cache, forward in (
      ("dynamic", None, eager),
      ("static", "static", eager),
      ("compile", "static", compiled),
  ):
    step = lambda cache=cache, forward=forward: (write(cache, forward), None)[1]
    try:
      texts[name] = write(cache, forward).numpy()
    except Exception as error:  # torch.compile needs a C++ compiler.
      missing[name] = str(error).strip().splitlines()[0]
    else:
      steps[name] = step
  return steps, (texts, missing)
