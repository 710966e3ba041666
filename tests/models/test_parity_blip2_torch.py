"""BLIP-2 both ways against transformers, where it is installed.

Random configs; the stored goldens in `test_blip2` need no PyTorch.
"""

import jax
import numpy as np
import pytest

from mmjax import pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 45


def pick(rng, *options):
  return options[rng.integers(len(options))]


def vision_config(rng):
  heads, patch = int(rng.integers(1, 4)), pick(rng, 2, 4)
  return dict(
      image_size=8,
      patch_size=patch,
      hidden_size=heads * int(rng.integers(2, 7)),
      intermediate_size=int(rng.integers(5, 20)),
      num_hidden_layers=int(rng.integers(1, 4)),
      num_attention_heads=heads,
      hidden_act=pick(rng, "gelu", "quick_gelu"),
      layer_norm_eps=pick(rng, 1e-6, 1e-3),
      qkv_bias=bool(rng.integers(2)),
  )


def qformer_config(rng):
  heads, every = int(rng.integers(1, 4)), int(rng.integers(1, 4))
  return dict(
      vocab_size=int(rng.integers(20, 40)),
      hidden_size=heads * int(rng.integers(2, 7)),
      num_hidden_layers=every * int(rng.integers(1, 3)),
      num_attention_heads=heads,
      intermediate_size=int(rng.integers(5, 20)),
      hidden_act=pick(rng, "gelu", "relu"),
      max_position_embeddings=12,
      layer_norm_eps=pick(rng, 1e-12, 1e-3),
      cross_attention_frequency=every,
  )


def opt_config(rng):
  heads = int(rng.integers(1, 4))
  width = heads * int(rng.integers(2, 6))
  return dict(
      model_type="opt", vocab_size=VOCAB, hidden_size=width,
      word_embed_proj_dim=width, num_hidden_layers=2, ffn_dim=20,
      num_attention_heads=heads, max_position_embeddings=32, pad_token_id=1,
  )  # fmt: skip


def t5_config(rng):
  return dict(
      model_type="t5", vocab_size=VOCAB, d_model=int(rng.integers(8, 20)),
      d_kv=int(rng.integers(2, 6)), d_ff=18, num_layers=2,
      num_heads=int(rng.integers(1, 4)), decoder_start_token_id=0,
      pad_token_id=0, feed_forward_proj="gated-gelu",
      dense_act_fn=pick(rng, "gelu", "gelu_new"), tie_word_embeddings=False,
  )  # fmt: skip


def drawn(kind, rng):
  """A random model of transformers, with a config of its own."""
  matching = kind == "matching"
  former = qformer_config(rng) | dict(use_qformer_text_input=matching)
  text = t5_config(rng) if kind == "t5" else opt_config(rng)
  rest = dict(image_text_hidden_size=int(rng.integers(3, 9)))
  if not matching:
    rest["image_token_index"] = VOCAB - 1
  config = transformers.Blip2Config(
      vision_config=vision_config(rng), qformer_config=former,
      text_config=text, num_query_tokens=int(rng.integers(1, 6)), **rest,
  )  # fmt: skip
  model = (
      transformers.Blip2ForImageTextRetrieval
      if matching
      else transformers.Blip2ForConditionalGeneration
  )(config)
  if kind == "t5":  # transformers 5 ties the two unless a checkpoint has both.
    head = model.language_model.lm_head
    head.weight = torch.nn.Parameter(head.weight.clone())
  with torch.no_grad():
    for parameter in model.parameters():
      noise = rng.normal(size=parameter.shape)
      one = parameter.ndim == 1
      scale = 0.2 if one else 1.2 / np.sqrt(parameter.shape[-1])
      parameter.copy_(torch.from_numpy(np.asarray(one + scale * noise)))
  return model.eval()


def given(model, kind, rng):
  """Arguments for ours and for theirs."""
  image = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
  theirs = dict(pixel_values=torch.tensor(image).permute(0, 3, 1, 2))
  if kind == "matching":
    tokens = rng.integers(1, 20, (2, 9))
    tokens[1, 6:] = 0
    theirs |= dict(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(tokens != 0).long(),
    )
    return dict(image=image, tokens=tokens.astype(np.int32)), theirs
  queries = model.config.num_query_tokens
  tokens = rng.integers(2, VOCAB - 1, (2, queries + 5))
  tokens[:, :queries] = VOCAB - 1
  source = np.full(tokens.shape, -1, np.int32)
  source[:, :queries] = np.arange(queries)
  ours = dict(image=image, tokens=tokens.astype(np.int32), source=source)
  theirs["input_ids"] = torch.tensor(tokens)
  if kind == "t5":
    targets = rng.integers(2, VOCAB - 1, (2, 6))
    ours["targets"] = targets.astype(np.int32)
    theirs["decoder_input_ids"] = torch.tensor(
        np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    )
  return ours, theirs


@torch.no_grad()
def their_outputs(model, kind, theirs):
  if kind != "matching":
    return [model(**theirs).logits.numpy()]
  return [
      model(**theirs, use_image_text_matching_head=head)
      .logits_per_image.numpy()
      for head in (False, True)
  ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["opt", "t5", "matching"])
def test_both_ways(kind, seed, tmp_path):
  rng = np.random.default_rng((seed, len(kind)))
  model = drawn(kind, rng)
  ours, theirs = given(model, kind, rng)
  expected = their_outputs(model, kind, theirs)
  model.save_pretrained(tmp_path / "theirs")
  system, variables, _ = pretrained.from_pretrained(tmp_path / "theirs")
  with jax.default_matmul_precision("highest"):
    found = jax.jit(system.apply)(variables, **ours)
  if kind == "t5":
    found = [found]
  elif kind == "opt":
    found = found[:1]
  for a, b in zip(found, expected, strict=True):
    assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()

  pretrained.save_pretrained(tmp_path / "ours", system, variables)
  again, report = type(model).from_pretrained(
      tmp_path / "ours", output_loading_info=True
  )
  assert not report["missing_keys"] and not report["unexpected_keys"]
  for a, b in zip(
      their_outputs(again.eval(), kind, theirs), expected, strict=True
  ):
    assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()
