"""Flamingo beside OpenFlamingo and transformers' Idefics, where installed."""

import functools
import importlib.util
from pathlib import Path
import sys

import jax
import numpy as np
import pytest

from mmjax import pretrained
from mmjax.nn import cross, norm, perceiver, transformer
from mmjax.nn import mask as masks
from mmjax.weights import engine, layout, transforms
from mmjax.weights.layout import Rule

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_maker():
  """The module that wrote the goldens; skips without OpenFlamingo."""
  if importlib.util.find_spec("open_flamingo") is None:
    pytest.skip("OpenFlamingo is not installed")
  sys.path.insert(0, str(GOLDEN))
  try:
    import make_flamingo
  finally:
    sys.path.remove(str(GOLDEN))
  return make_flamingo


@pytest.mark.parametrize("name", ["both", "newer", "older"])
def test_exports_load_in_open_flamingo(name, tmp_path):
  maker = golden_maker()
  system, variables, _ = pretrained.from_pretrained(
      GOLDEN / f"flamingo_{name}"
  )
  pretrained.save_pretrained(tmp_path / "out", system, variables)
  from safetensors.torch import load_file

  case = maker.CASES[f"flamingo_{name}"]
  model = maker.build(
      case["text"],
      case["every"],
      maker.RESAMPLER | case.get("resampler", {}),
      maker.GATES | case.get("gates", {}),
  )
  missing, unexpected = model.load_state_dict(
      load_file(tmp_path / "out" / "model.safetensors"), strict=False
  )
  # Its second names, and what stands behind the tower's last block.
  second = ("gated_cross_attn_layers", "old_decoder_blocks")
  rest = [
      key
      for key in missing
      if not any(word in key for word in second)
      and not key.startswith(("vision_encoder.ln_post", "vision_encoder.proj"))
      and key != "lang_encoder.lm_head.weight"
  ]
  assert not rest and not unexpected
  with np.load(GOLDEN / f"flamingo_{name}" / "golden.npz") as arrays:
    arrays = dict(arrays)
  images = torch.tensor(arrays["in.images"]).permute(0, 1, 4, 2, 3)
  tokens = torch.tensor(arrays["in.tokens"]).long()
  with torch.no_grad():
    found = model(
        images[:, :, None], tokens, attention_mask=torch.ones_like(tokens)
    ).logits.numpy()
  expected = arrays["out.logits"]
  assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


class _Tensors:
  """The tensors of a torch module, as the engine reads them."""

  def __init__(self, module):
    self.path = type(module).__name__
    self.arrays = {k: v.numpy() for k, v in module.state_dict().items()}
    self.tensors = {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype)
        for k, v in self.arrays.items()
    }

  def read(self, name):
    return self.arrays[name]


def load(module, table, system, *inputs):
  """The parameters of ours with the values of theirs, redrawn."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in module.parameters():
      drawn = torch.randn(parameter.shape, generator=generator)
      parameter.copy_(
          drawn / parameter.shape[-1] ** 0.5 if parameter.ndim > 1
          else 0.5 + 0.3 * drawn
      )  # fmt: skip
  from flax import traverse_util

  from mmjax.nn import partitioning

  shapes = partitioning.unbox(
      jax.eval_shape(system.init, jax.random.key(0), *inputs)
  )["params"]
  flat = traverse_util.flatten_dict(shapes, sep="/")
  found = engine.load(_Tensors(module), table, flat)
  return {"params": traverse_util.unflatten_dict(found, sep="/")}


def attention_rules(source, target, names=("q", "k", "v", "o")):
  ours = ("query", "key", "value", "out")
  return [
      Rule(
          f"{source}.{theirs}_proj.weight",
          f"{target}/{mine}/kernel",
          transforms.linear(2 if mine == "out" else 1),
      )
      for theirs, mine in zip(names, ours)
  ]


def idefics(**changes):
  return transformers.IdeficsConfig(
      hidden_size=24, intermediate_size=40, num_attention_heads=4,
      alpha_type="float", attn_implementation="eager",
      vision_config=dict(embed_dim=12), **changes,
  )  # fmt: skip


@pytest.mark.parametrize(
    "depth,heads,head_dim,latents", [(2, 2, 5, 3), (1, 4, 8, 6), (3, 1, 7, 2)]
)
def test_resampler_is_that_of_idefics(depth, heads, head_dim, latents):
  from transformers.models.idefics import perceiver as theirs

  module = theirs.IdeficsPerceiverResampler(
      idefics(), 12, depth, heads, head_dim, latents
  ).eval()
  system = perceiver.Resampler(
      latents, depth, heads, head_dim, 48, activation="relu"
  )
  block, ours = "blocks.{i}", "blocks[i]"
  table = [
      Rule("latents", "latents"),
      *layout.affine("layer_norm", "norm"),
      *layout.affine(f"{block}.0.context_layer_norm", f"{ours}/features_norm"),
      *layout.affine(f"{block}.0.latents_layer_norm", f"{ours}/attention_norm"),
      *attention_rules(
          f"{block}.0", f"{ours}/attention", ("q", "k", "v", "output")
      ),
      *layout.affine(f"{block}.1.ln", f"{ours}/mlp_norm"),
      *layout.dense(f"{block}.1.fc", f"{ours}/mlp/up")[:1],
      *layout.dense(f"{block}.1.c_proj", f"{ours}/mlp/down")[:1],
  ]
  rng = np.random.default_rng(0)
  features = rng.normal(size=(2, 1, 1, 7, 12)).astype(np.float32)
  variables = load(module, table, system, features)
  with torch.no_grad():
    expected = module(torch.tensor(features[:, 0, 0])).numpy()
  found = system.apply(variables, features)[:, 0]
  assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("seed", range(3))
def test_gated_block_is_that_of_idefics(seed):
  """With the norms and MLPs of LLaMA, which Idefics has."""
  from transformers.models.idefics import modeling_idefics

  module = modeling_idefics.IdeficsGatedCrossAttentionLayer(idefics(), 0).eval()
  system = cross.GatedCrossBlock(
      attention=functools.partial(cross.CrossAttention, 4, 6),
      mlp=functools.partial(transformer.GatedMlp, 40, "silu", perceiver.INIT),
      norm=functools.partial(norm.RMSNorm, 1e-6),
  )
  table = [
      *attention_rules("cross_attn", "attention"),
      *layout.affine("input_layernorm", "attention_norm")[:1],
      *layout.affine("post_attention_layernorm", "mlp_norm")[:1],
      *(
          layout.dense(f"mlp.{name}_proj", f"mlp/{name}")[0]
          for name in ("gate", "up", "down")
      ),
      Rule("alpha_cross_attn", "attention_gate", transforms.leading(1)),
      Rule("alpha_dense", "mlp_gate", transforms.leading(1)),
  ]
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(2, 9, 24)).astype(np.float32)
  pictures = rng.normal(size=(2, 3 * 5, 12)).astype(np.float32)
  index = np.sort(rng.integers(-1, 3, (2, 9)), axis=1).astype(np.int32)
  mask = masks.media(index, 3, 5)
  variables = load(module, table, system, x, mask, pictures)
  seen = np.repeat(index[..., None] == np.arange(3), 5, axis=-1)
  hidden = torch.tensor(
      np.where(seen, 0.0, np.finfo(np.float32).min), dtype=torch.float32
  )
  with torch.no_grad():
    expected = module(
        torch.tensor(x),
        image_hidden_states=torch.tensor(pictures),
        image_attention_mask=hidden[:, None],
        cross_attention_gate=torch.tensor(index >= 0),
    ).numpy()
  found = system.apply(variables, x, mask, pictures)[0]
  assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
