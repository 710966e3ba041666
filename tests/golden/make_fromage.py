"""Writes the FROMAGe checkpoints that the official code makes, with outputs.

Run with torch, transformers (5.23 wrote the files that are kept) and einops,
on a checkout of https://github.com/kohjingyu/fromage:

  python tests/golden/make_fromage.py CHECKOUT

Every directory `fromage_*` beside this file holds the state dict of the whole
model and [RET]'s row, as the official checkpoints keep it; a config.json with
the official arguments and the configs of both parts; and `golden.npz`:
`in.image`, `in.tokens`, `in.count` (with [RET]), what the model gives in each
mode (`caption.*`, `joined.*`, `text.*`), and greedy decoding behind a picture
and three tokens (`write.*`). All parameters are drawn anew.
"""

import itertools
import json
from pathlib import Path
import shutil
import sys
import types
from typing import Any

import make_llm
import numpy as np
from safetensors.torch import save_file
import torch
import transformers

HERE = Path(__file__).parent
VOCAB, BOS, PAD, RET = 40, 2, 1, 39
COUNTS = (9, 7, 5, 8)
VISION: dict[str, Any] = dict(
    model_type="clip_vision_model", image_size=8, patch_size=4, hidden_size=12,
    intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
)
TEXT: dict[str, Any] = dict(
    model_type="opt", vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2,
    ffn_dim=24, num_attention_heads=4, max_position_embeddings=64,
    pad_token_id=PAD, bos_token_id=BOS, eos_token_id=BOS, dropout=0.0,
)
CASES: dict[str, dict[str, Any]] = {
    "fromage_one": dict(vision=VISION, text=TEXT, slots=1, joint=10),
    "fromage_four": dict(
        vision=dict(VISION, hidden_act="gelu", layer_norm_eps=1e-3),
        text=dict(TEXT, activation_function="gelu", num_attention_heads=2),
        slots=4, joint=6,
    ),
    # As OPT-350m: a narrow table and norms behind the sums.
    "fromage_post": dict(
        vision=dict(VISION, patch_size=2, num_hidden_layers=1),
        text=dict(TEXT, do_layer_norm_before=False, word_embed_proj_dim=12),
        slots=2, joint=14,
    ),
}  # fmt: skip


class Words:
  """What the official model asks of its tokenizer."""

  cls_token_id = RET - 1
  pad_token_id = PAD
  eos_token_id = BOS

  def __len__(self) -> int:
    return VOCAB


def official(checkout: str) -> Any:
  """The official module, without what it needs to read pictures."""
  sys.path.insert(0, checkout)
  sys.modules["fromage.utils"] = types.SimpleNamespace(
      get_feature_extractor_for_model=lambda *args, **kwargs: None
  )
  from fromage import models

  return models


def build(
    models: Any, vision: dict[str, Any], text: dict[str, Any], slots: int,
    joint: int,
) -> Any:
  """The official model of small parts."""
  models.OPTForCausalLM = types.SimpleNamespace(
      from_pretrained=lambda name: transformers.OPTForCausalLM(
          transformers.OPTConfig(**text)
      )
  )
  models.CLIPVisionModel = types.SimpleNamespace(
      from_pretrained=lambda name: transformers.CLIPVisionModel(
          transformers.CLIPVisionConfig(**vision)
      )
  )
  args = types.SimpleNamespace(
      freeze_lm=True, freeze_vm=True, opt_version="facebook/opt",
      visual_encoder="clip", n_visual_tokens=slots, shared_emb_dim=joint,
      image_embed_dropout_prob=0.0, text_embed_dropout_prob=0.0,
      text_emb_layers=[-1], retrieval_token_idx=RET, task="captioning",
  )  # fmt: skip
  model = models.FromageModel(Words(), args)
  model.eval()  # It returns nothing.
  return model


@torch.no_grad()
def run(model: Any, name: str, size: int) -> dict[str, np.ndarray]:
  """Inputs and outputs of every mode."""
  generator = make_llm.generator(name + " inputs")
  image = torch.randn(len(COUNTS), 3, size, size, generator=generator)
  tokens = torch.full((len(COUNTS), max(COUNTS)), PAD)
  for row, count in enumerate(COUNTS):
    tokens[row, 1 : count - 1] = torch.randint(
        3, RET - 1, (count - 2,), generator=generator
    )
    tokens[row, 0], tokens[row, count - 1] = BOS, RET
  counts = torch.tensor(COUNTS)
  arrays = {
      "in.image": image.permute(0, 2, 3, 1),
      "in.tokens": tokens.int(),
      "in.count": counts.int(),
  }
  for mode, joined, key in (
      ("captioning", False, "caption"),
      ("captioning", True, "joined"),
      ("retrieval", False, "text"),
  ):
    # It moves the counts that it is given.
    output, labels, embedding, _, seen = model(
        image, tokens, counts.clone(), mode=mode, concat_captions=joined
    )
    arrays |= {
        f"{key}.loss": output.loss,
        f"{key}.logits": output.logits,
        f"{key}.labels": labels.int(),
        f"{key}.seen": seen,
    }
  arrays["text.embedding"] = embedding
  prompt = torch.cat(
      [
          model.get_visual_embs(image[:1], "captioning"),
          model.input_embeddings(tokens[:1, :3]),
      ],
      dim=1,
  )
  ids, embeddings, logits = model.generate(
      prompt, max_len=12, min_word_tokens=2, ret_scale_factor=1.3
  )
  arrays |= {
      "write.tokens": ids.int(),
      "write.embedding": embeddings[-1],
      "write.logits": torch.stack(logits, dim=1).clamp(min=-1e4),
  }
  return {key: np.asarray(value) for key, value in arrays.items()}


def make(models: Any, name: str, **case: Any) -> None:
  model = build(models, **case)
  # Until decoding meets [RET], and not at every step.
  for attempt in itertools.count():
    make_llm.redraw(model, f"{name} {attempt}")
    arrays = run(model, name, case["vision"]["image_size"])
    if 2 <= (arrays["write.tokens"][0] == RET).argmax() < 8:
      break
  directory = HERE / name
  shutil.rmtree(directory, ignore_errors=True)
  directory.mkdir()
  np.savez_compressed(directory / "golden.npz", **arrays)
  row = model.input_embeddings.weight[RET:].detach().clone()
  tensors = {
      f"model.{key}": value.clone()
      for key, value in model.state_dict().items()
  } | {"ret_input_embeddings.weight": row}
  save_file(tensors, directory / "model.safetensors")
  config = dict(
      architectures=["FromageModel"], model_type="fromage",
      n_visual_tokens=case["slots"], shared_emb_dim=case["joint"],
      text_emb_layers=[-1], retrieval_token_idx=RET,
      vision_config=case["vision"], text_config=case["text"],
  )  # fmt: skip
  (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
  code = official(sys.argv[1])
  for key, value in CASES.items():
    make(code, key, **value)
