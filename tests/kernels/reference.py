"""Attention and its gradients from the definition, in float64 and dense."""

import numpy as np


def visible(mask):
  """bool[B or 1, Q, K], from the words of the definition."""
  block, first, last = map(np.asarray, (mask.block, mask.first, mask.last))
  batch = max(block.shape[0], first.shape[0], last.shape[0])
  row = lambda x, n: x[n if x.shape[0] > 1 else 0]
  return np.stack([
      (row(first, n) <= b) & (b <= row(last, n))
      for n in range(batch)
      for b in [row(block, n)[:, None]]
  ])


def attention(q, k, v, seen, scale, softcap=None, bias=None):
  """Output [B, Q, H, D] and log-sum-exp [B, H, Q]; also what `grads` needs."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  ratio = q.shape[2] // k.shape[2]
  k, v = np.repeat(k, ratio, axis=2), np.repeat(v, ratio, axis=2)
  s = scale * np.einsum("bqhd,bkhd->bhqk", q, k)
  if bias is not None:
    s = s + np.asarray(bias, np.float64)
  slope = np.ones_like(s)
  if softcap is not None:
    s = softcap * np.tanh(s / softcap)
    slope = 1 - (s / softcap) ** 2
  s = np.where(seen[:, None], s, -np.inf)
  top = s.max(axis=-1, keepdims=True)
  e = np.exp(s - np.where(np.isinf(top), 0, top))
  total = e.sum(axis=-1, keepdims=True)
  p = e / np.where(total == 0, 1, total)
  with np.errstate(divide="ignore"):
    lse = np.log(total[..., 0]) + np.where(np.isinf(top), 0, top)[..., 0]
  return np.einsum("bhqk,bkhd->bqhd", p, v), lse, (q, k, v, p, slope, ratio)


def grads(saved, scale, dout, dlse=0.0):
  """Gradients of q, k, v and of a dense bias."""
  q, k, v, p, slope, ratio = saved
  dout = np.asarray(dout, np.float64)
  dp = np.einsum("bqhd,bkhd->bhqk", dout, v)
  ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * slope
  ds += p * slope * np.asarray(dlse, np.float64)[..., None]
  fold = lambda x: x.reshape(*x.shape[:2], -1, ratio, x.shape[3]).sum(axis=3)
  return (
      scale * np.einsum("bhqk,bkhd->bqhd", ds, k),
      fold(scale * np.einsum("bhqk,bqhd->bkhd", ds, q)),
      fold(np.einsum("bhqk,bqhd->bkhd", p, dout)),
      ds,
  )


def results(q, k, v, dout, mask, scale, softcap=None):
  """Everything that kernels compute, by name."""
  seen = visible(mask)
  out, lse, saved = attention(q, k, v, seen, scale, softcap)
  dq, dk, dv, _ = grads(saved, scale, dout)
  return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
