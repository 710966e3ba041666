"""Writes the T5 checkpoints that transformers makes, with outputs.

Run with torch and transformers (5.23 wrote the files that are kept):

  python tests/golden/make_t5.py

Every directory `t5_*` beside this file is what `save_pretrained` wrote, plus
`golden.npz`: `in.tokens`, `in.count` (how many of them are no padding),
`in.targets` (what the decoder reads), `out.encoded`, `out.logits`,
`out.greedy` and `out.beam` (new tokens, 0 behind the end) with `out.scores`.
All parameters are drawn anew.
"""

from pathlib import Path
import shutil
from typing import Any

import make_llm
import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
VOCAB, LENGTH, NEW, BEAMS = 40, 13, 12, 3

SHARED: dict[str, Any] = dict(
    vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=36, num_layers=2, num_heads=4,
    decoder_start_token_id=0, dropout_rate=0.0,
)
CASES: dict[str, dict[str, Any]] = {
    # T5 1.0: the table read out again, scaled.
    "t5_first": dict(
        SHARED, feed_forward_proj="relu", tie_word_embeddings=True,
        relative_attention_num_buckets=8, relative_attention_max_distance=10,
    ),
    # T5 1.1 with heads that do not make up the width, in several files.
    "t5_gated": dict(
        SHARED, own_head=True, d_kv=5, num_layers=3, num_decoder_layers=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        save=dict(max_shard_size="30KB"),
    ),
    # The exact GELU, as BLIP-2 has it; the table read out, not scaled.
    "t5_exact": dict(
        SHARED, num_heads=3, layer_norm_epsilon=1e-3,
        feed_forward_proj="gated-gelu", dense_act_fn="gelu",
        tie_word_embeddings=False, relative_attention_num_buckets=16,
        relative_attention_max_distance=12,
    ),
}  # fmt: skip


@torch.no_grad()
def redraw(model: torch.nn.Module, name: str) -> None:
  """Draws all parameters anew; biases of positions so that they matter."""
  make_llm.redraw(model, name)
  for path, parameter in model.named_parameters():
    if "relative_attention_bias" in path:
      parameter.mul_(3)
    elif path.endswith((".q.weight", ".o.weight", ".wo.weight")):
      parameter.mul_(2)
    elif path in ("lm_head.weight", "shared.weight"):
      parameter.mul_(1.5)


@torch.no_grad()
def make(
    name: str,
    own_head: bool = False,
    save: dict[str, Any] | None = None,
    **config: Any,
) -> None:
  made = transformers.T5Config(**config)
  model = transformers.T5ForConditionalGeneration(made).eval()
  if own_head:  # transformers 5 ties the two unless a checkpoint has both.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
  redraw(model, name)
  generator = make_llm.generator(name + " tokens")
  draw = lambda length: torch.randint(
      2, VOCAB, (3, length), generator=generator
  )
  tokens, targets = draw(LENGTH), draw(9)
  targets[:, 0] = 0
  count = torch.tensor([LENGTH, 4, 9])
  there = (torch.arange(LENGTH) < count[:, None]).long()
  tokens = tokens * there
  inputs = dict(input_ids=tokens, attention_mask=there)
  encoded = model.encoder(**inputs).last_hidden_state
  greedy = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
  beam = model.generate(
      **inputs, do_sample=False, max_new_tokens=NEW, num_beams=BEAMS,
      num_return_sequences=BEAMS, length_penalty=0.6,
      return_dict_in_generate=True, output_scores=True,
  )  # fmt: skip
  arrays = {
      "in.tokens": tokens.int().numpy(),
      "in.count": count.int().numpy(),
      "in.targets": targets.int().numpy(),
      "out.encoded": encoded.numpy() * there[..., None].numpy(),
      "out.logits": model(**inputs, decoder_input_ids=targets).logits.numpy(),
      "out.greedy": _new(greedy),
      "out.beam": _new(beam.sequences).reshape(3, BEAMS, NEW),
      "out.scores": beam.sequences_scores.numpy().reshape(3, BEAMS),
  }
  directory = HERE / name
  shutil.rmtree(directory, ignore_errors=True)
  model.save_pretrained(directory, **(save or {}))
  (directory / "generation_config.json").unlink(missing_ok=True)
  np.savez_compressed(directory / "golden.npz", **arrays)


def _new(sequences: torch.Tensor) -> np.ndarray:
  """Without the first token, padded to `NEW`; 0 behind the end, which is 1."""
  found = np.zeros((len(sequences), NEW), np.int32)
  found[:, : sequences.shape[1] - 1] = sequences[:, 1:].numpy()
  ended = np.cumsum(found == 1, axis=1) - (found == 1) > 0
  return np.where(ended, 0, found)


if __name__ == "__main__":
  for key, value in CASES.items():
    make(key, **value)
