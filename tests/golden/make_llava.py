"""Writes the LLaVA checkpoints that transformers makes, with outputs.

Run with torch and transformers (5.23 wrote the files that are kept):

  python tests/golden/make_llava.py

Every directory `llava_*` beside this file is what `save_pretrained` wrote, plus
`golden.npz` with `in.image` (channels last), `in.tokens`, `in.source` (which
vector of the picture stands at a token, -1 for none), `out.projected`,
`out.logits`, and what `generate` adds: `out.greedy` and `out.beam`, padded with
0 behind an end. All parameters are drawn anew.
"""

from pathlib import Path
import shutil
from typing import Any

import make_llm
import numpy as np
import torch
import transformers

HERE = Path(__file__).parent

# The last id stands where the picture does.
VOCAB = 40
VISION: dict[str, Any] = dict(
    model_type="clip_vision_model", image_size=8, patch_size=4, hidden_size=12,
    intermediate_size=20, num_hidden_layers=3, num_attention_heads=2,
)
TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, intermediate_size=24,
    num_attention_heads=4, max_position_embeddings=64, pad_token_id=0,
)
# So many ids end an answer that some rows end early.
ENDS = (1, 2, 3, 4, 5)
MAX_NEW = 10
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {}, "beam": dict(num_beams=3)
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llava_plain": dict(
        vision=VISION, text=dict(TEXT, model_type="llama"), layer=-2,
        select="default", activation="gelu",
    ),
    "llava_full": dict(
        vision=dict(VISION, hidden_act="gelu", layer_norm_eps=1e-3),
        text=dict(
            TEXT, model_type="llama", num_key_value_heads=2, rms_norm_eps=1e-3
        ),
        layer=-1, select="full", activation="gelu_pytorch_tanh",
    ),
    "llava_qwen2": dict(
        vision=dict(VISION, num_hidden_layers=4, patch_size=2),
        text=dict(TEXT, model_type="qwen2", num_key_value_heads=1),
        layer=-3, select="default", activation="gelu",
    ),
}  # fmt: skip


@torch.no_grad()
def make(
    name: str,
    vision: dict[str, Any],
    text: dict[str, Any],
    layer: int,
    select: str,
    activation: str,
) -> None:
  config = transformers.LlavaConfig(
      vision_config=dict(vision),
      text_config=dict(text),
      image_token_index=VOCAB - 1,
      vision_feature_layer=layer,
      vision_feature_select_strategy=select,
      projector_hidden_act=activation,
  )
  model = transformers.LlavaForConditionalGeneration(config).eval()
  make_llm.redraw(model, name)
  generator = make_llm.generator(name + " inputs")
  patches = (vision["image_size"] // vision["patch_size"]) ** 2
  seen = patches + (select == "full")
  draw = lambda length: torch.randint(
      1, VOCAB - 1, (2, length), generator=generator
  )
  places = torch.full((2, seen), VOCAB - 1)
  tokens = torch.cat([draw(3), places, draw(6)], dim=1)
  source = np.full(tokens.shape, -1, np.int32)
  source[:, 3 : 3 + seen] = np.arange(seen)
  image = torch.randn(
      2, 3, vision["image_size"], vision["image_size"], generator=generator
  )
  kept = []
  model.model.multi_modal_projector.register_forward_hook(
      lambda module, inputs, output: kept.append(output)
  )
  out = model(input_ids=tokens, pixel_values=image)
  written = {}
  for search, options in SEARCHES.items():
    found = model.generate(
        input_ids=tokens,
        pixel_values=image,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=MAX_NEW,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=list(ENDS),
        **options,
    )
    written[f"out.{search}"] = found[:, tokens.shape[1] :].int().numpy()
  directory = HERE / name
  shutil.rmtree(directory, ignore_errors=True)
  model.save_pretrained(directory)
  (directory / "generation_config.json").unlink(missing_ok=True)
  np.savez_compressed(
      directory / "golden.npz",
      **{
          "in.image": image.permute(0, 2, 3, 1).numpy(),
          "in.tokens": tokens.int().numpy(),
          "in.source": source,
          "out.projected": kept[0].reshape(2, seen, -1).numpy(),
          "out.logits": out.logits.numpy(),
          **written,
      },
  )


if __name__ == "__main__":
  for key, value in CASES.items():
    make(key, **value)
