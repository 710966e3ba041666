"""Writes the decoder checkpoints that transformers makes, with outputs.

Run with torch and transformers (5.23 wrote the files that are kept):

  python tests/golden/make_llm.py

Every directory `llm_*` beside this file is what `save_pretrained` wrote, plus
`golden.npz` with `in.tokens`, `out.logits` and `out.hidden`, the last hidden
states after the final norm. The configs are small and differ in everything that
a config can say; all parameters are drawn anew.
"""

import hashlib
from pathlib import Path
import shutil
from typing import Any

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
LENGTH = 14

SHARED: dict[str, Any] = dict(
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=2,
    intermediate_size=36,
    pad_token_id=0,
)
CASES: dict[str, dict[str, Any]] = {
    # Three query heads a group, heads wider than width / heads, stretched
    # positions, biases, in several files.
    "llm_llama": dict(
        kind="Llama",
        **SHARED,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=6,
        attention_bias=True,
        mlp_bias=True,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500.0,
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
        save=dict(max_shard_size="20KB"),
    ),
    "llm_qwen2": dict(
        kind="Qwen2",
        **SHARED,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
        dtype="bfloat16",
    ),
    "llm_yarn": dict(
        kind="Qwen2",
        **SHARED | dict(num_hidden_layers=1),
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=100.0,
            factor=4.0,
            original_max_position_embeddings=8,
        ),
    ),
    "llm_helium": dict(
        kind="Helium",
        **SHARED,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=8,
        dtype="float16",
    ),
    "llm_opt": dict(
        kind="OPT",
        vocab_size=40,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=36,
        max_position_embeddings=LENGTH,
    ),
    # As OPT-350m: a narrow table and norms behind the sums.
    "llm_opt_post": dict(
        kind="OPT",
        vocab_size=40,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=36,
        max_position_embeddings=32,
        do_layer_norm_before=False,
        word_embed_proj_dim=12,
        dtype="float16",
    ),
}


def generator(name: str) -> torch.Generator:
  """A generator of its own for every name: order does not matter."""
  digest = hashlib.sha256(name.encode()).digest()
  return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@torch.no_grad()
def redraw(
    model: torch.nn.Module, name: str, dtype: str = "float32"
) -> None:
  """Draws all parameters anew, rounded to a dtype."""
  for path, parameter in model.named_parameters():
    value = torch.randn(parameter.shape, generator=generator(name + path))
    if parameter.ndim > 1:
      value *= 1.2 / parameter.shape[1] ** 0.5
    else:
      value = (1.0 if path.endswith("weight") else 0.0) + 0.3 * value
    parameter.copy_(value.to(getattr(torch, dtype)))


@torch.no_grad()
def make(
    name: str,
    kind: str,
    dtype: str = "float32",
    save: dict[str, Any] | None = None,
    **config: Any,
) -> None:
  made = getattr(transformers, f"{kind}Config")(**config)
  model = getattr(transformers, f"{kind}ForCausalLM")(made)
  # Rounded to the dtype of the file, then run in float32: a model that was
  # cast as a whole would keep rounded rotary frequencies.
  redraw(model, name, dtype)
  model.eval()
  tokens = torch.randint(
      0, made.vocab_size, (2, LENGTH), generator=generator(name + " tokens")
  )
  body = model.model.decoder if kind == "OPT" else model.model
  arrays = {
      "in.tokens": tokens.int().numpy(),
      "out.logits": model(tokens).logits.numpy(),
      "out.hidden": body(tokens).last_hidden_state.numpy(),
  }
  directory = HERE / name
  shutil.rmtree(directory, ignore_errors=True)
  model.to(getattr(torch, dtype)).save_pretrained(directory, **(save or {}))
  (directory / "generation_config.json").unlink(missing_ok=True)
  np.savez_compressed(directory / "golden.npz", **arrays)


if __name__ == "__main__":
  for key, value in CASES.items():
    make(key, **value)
