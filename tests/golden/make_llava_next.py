"""Writes the LLaVA-NeXT checkpoints that transformers makes, with outputs.

Run with torch and transformers (5.23 wrote the files that are kept):

  python tests/golden/make_llava_next.py

Every directory `llava_next_*` beside this file is what `save_pretrained` wrote,
plus `golden.npz`: for each picture i `in.picture.i` (u8[H, W, 3]), what the
processor makes of it, `in.tiles.i` (channels last), and `in.tokens.i`, in which
the last id stands for its features; `out.features.i` and `out.logits.i`. All
parameters are drawn anew.
"""

from pathlib import Path
import shutil
from typing import Any

import make_llava
import make_llm
import numpy as np
import torch
import transformers
from transformers.models.llava_next import image_processing_pil_llava_next

HERE = Path(__file__).parent
VOCAB = make_llava.VOCAB

# Sides of the pictures: of every grid, and with borders of every parity.
PICTURES = ((9, 17), (30, 7), (16, 16), (5, 40), (13, 11))
TEXT = dict(make_llava.TEXT, max_position_embeddings=256)
CASES: dict[str, dict[str, Any]] = {
    "llava_next_llama": dict(
        vision=make_llava.VISION, text=dict(TEXT, model_type="llama"),
        layer=-2, activation="gelu",
        pinpoints=[[8, 16], [16, 8], [16, 16], [24, 8], [8, 24]],
    ),
    "llava_next_mistral": dict(
        vision=dict(make_llava.VISION, patch_size=2, hidden_act="gelu"),
        text=dict(TEXT, model_type="mistral", num_key_value_heads=2),
        layer=-1, activation="gelu_pytorch_tanh",
        pinpoints=[[16, 8], [8, 24], [8, 8]],
    ),
    "llava_next_qwen2": dict(
        vision=dict(make_llava.VISION, num_hidden_layers=4),
        text=dict(TEXT, model_type="qwen2", num_key_value_heads=1),
        layer=-3, activation="gelu", pinpoints=[[24, 24], [16, 32], [32, 8]],
    ),
}  # fmt: skip


@torch.no_grad()
def make(
    name: str,
    vision: dict[str, Any],
    text: dict[str, Any],
    layer: int,
    activation: str,
    pinpoints: list[list[int]],
) -> None:
  config = transformers.LlavaNextConfig(
      vision_config=dict(vision),
      text_config=dict(text),
      image_token_index=VOCAB - 1,
      vision_feature_layer=layer,
      vision_feature_select_strategy="default",
      projector_hidden_act=activation,
      image_grid_pinpoints=pinpoints,
  )
  model = transformers.LlavaNextForConditionalGeneration(config).eval()
  make_llm.redraw(model, name)
  generator = make_llm.generator(name + " inputs")
  side = vision["image_size"]
  process = image_processing_pil_llava_next.LlavaNextImageProcessorPil(
      size={"shortest_edge": side},
      crop_size={"height": side, "width": side},
      image_grid_pinpoints=pinpoints,
  )
  arrays = {}
  for number, (height, width) in enumerate(PICTURES):
    picture = torch.randint(0, 256, (height, width, 3), generator=generator)
    picture = picture.to(torch.uint8).numpy()
    inputs = process(picture, return_tensors="pt")
    features = model.model.get_image_features(
        inputs["pixel_values"],
        inputs["image_sizes"],
        vision_feature_layer=layer,
        vision_feature_select_strategy="default",
    ).pooler_output[0]
    draw = lambda length: torch.randint(
        1, VOCAB - 1, (1, length), generator=generator
    )
    places = torch.full((1, len(features)), VOCAB - 1)
    tokens = torch.cat([draw(3), places, draw(4)], dim=1)
    out = model(
        input_ids=tokens,
        pixel_values=inputs["pixel_values"],
        image_sizes=inputs["image_sizes"],
    )
    tiles = inputs["pixel_values"][0].permute(0, 2, 3, 1)
    for key, value in {
        "in.picture": picture,
        "in.tiles": tiles.float().numpy(),
        "in.tokens": tokens[0].int().numpy(),
        "out.features": features.numpy(),
        "out.logits": out.logits[0].numpy(),
    }.items():
      arrays[f"{key}.{number}"] = value
  directory = HERE / name
  shutil.rmtree(directory, ignore_errors=True)
  model.save_pretrained(directory)
  (directory / "generation_config.json").unlink(missing_ok=True)
  np.savez_compressed(directory / "golden.npz", **arrays)


if __name__ == "__main__":
  for key, value in CASES.items():
    make(key, **value)
