"""Writes the SigLIP and SigLIP 2 checkpoints of transformers, with outputs.

Run with torch and transformers (5.23 wrote the files that are kept):

  python tests/golden/make_siglip.py

Every directory `siglip_*` beside this file is what `save_pretrained` wrote,
plus `golden.npz` with inputs (`in.*`) and outputs (`out.*`), in the names and
shapes of `mmjax`. The configs are small and differ in everything that a config
can say; all parameters are drawn anew (see `make_vision.py`).
"""

from typing import Any

from make_vision import draw_image, finish, generator
import numpy as np
import torch
import transformers

# Of one size, `SiglipModel`; SigLIP 2 of fixed resolution differs from SigLIP
# in its vocabulary alone.
FIXED: dict[str, dict[str, Any]] = {
    "siglip_square": dict(
        vision_config=dict(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            image_size=16,
            patch_size=4,
        ),
        text_config=dict(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=20,
            vocab_size=60,
            max_position_embeddings=16,
        ),
    ),
    # A rest of pixels that no patch covers; towers of two widths; saved in
    # float16 and shards.
    "siglip_rest": dict(
        vision_config=dict(
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=3,
            intermediate_size=26,
            image_size=19,
            patch_size=5,
            hidden_act="gelu",
            layer_norm_eps=1e-3,
        ),
        text_config=dict(
            hidden_size=15,
            num_hidden_layers=3,
            num_attention_heads=5,
            intermediate_size=17,
            vocab_size=41,
            max_position_embeddings=9,
            projection_size=24,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        ),
        dtype="float16",
        save=dict(max_shard_size="10KB"),
    ),
    # A large vocabulary, as SigLIP 2 has; saved in bfloat16.
    "siglip_two": dict(
        vision_config=dict(
            hidden_size=18,
            num_hidden_layers=2,
            num_attention_heads=6,
            intermediate_size=20,
            image_size=12,
            patch_size=3,
        ),
        text_config=dict(
            hidden_size=18,
            num_hidden_layers=1,
            num_attention_heads=3,
            intermediate_size=30,
            vocab_size=300,
            max_position_embeddings=8,
        ),
        dtype="bfloat16",
    ),
}

# NaFlex, `Siglip2Model`. `grids` are rows and columns of each image's patches,
# `slots` the patches that every image is padded to.
NAFLEX: dict[str, dict[str, Any]] = {
    "siglip_naflex": dict(
        grids=[[4, 6], [3, 5], [6, 4]],
        slots=24,
        vision_config=dict(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            patch_size=4,
            num_patches=36,
        ),
        text_config=dict(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=20,
            vocab_size=50,
            max_position_embeddings=12,
        ),
        dtype="bfloat16",
    ),
    # Grids that are larger and smaller than the table, one row among them.
    "siglip_naflex_wide": dict(
        grids=[[8, 5], [2, 9], [5, 5], [1, 40]],
        slots=40,
        vision_config=dict(
            hidden_size=18,
            num_hidden_layers=1,
            num_attention_heads=3,
            intermediate_size=30,
            patch_size=3,
            num_patches=25,
            hidden_act="gelu",
            layer_norm_eps=1e-4,
        ),
        text_config=dict(
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=6,
            intermediate_size=20,
            vocab_size=40,
            max_position_embeddings=7,
            projection_size=18,
            hidden_act="gelu_new",
            layer_norm_eps=1e-3,
        ),
    ),
    # More slots than any image fills; saved in float16 and shards.
    "siglip_naflex_loose": dict(
        grids=[[3, 3], [1, 1], [2, 7]],
        slots=21,
        vision_config=dict(
            hidden_size=20,
            num_hidden_layers=3,
            num_attention_heads=5,
            intermediate_size=22,
            patch_size=2,
            num_patches=16,
        ),
        text_config=dict(
            hidden_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=14,
            vocab_size=40,
            max_position_embeddings=10,
        ),
        dtype="float16",
        save=dict(max_shard_size="10KB"),
    ),
}


def draw_tokens(name: str, config: Any, rows: int) -> torch.Tensor:
  """Texts of different lengths, padded with 1 up to the last position."""
  length = config.max_position_embeddings
  tokens = torch.randint(
      2,
      config.vocab_size,
      (rows, length),
      generator=generator(name + " tokens"),
  )
  for row in range(rows):
    tokens[row, length - 1 - row :] = 1
  return tokens


def outputs_of(both: Any) -> dict[str, torch.Tensor]:
  return {
      "image_tokens": both.vision_model_output.last_hidden_state,
      "image_pooled": both.vision_model_output.pooler_output,
      "text_tokens": both.text_model_output.last_hidden_state,
      "text_pooled": both.text_model_output.pooler_output,
      "image_embed": both.image_embeds,
      "text_embed": both.text_embeds,
      "logits_per_image": both.logits_per_image,
      "loss": both.loss,
  }


def write(
    name: str, directory: Any, model: Any, inputs: dict[str, torch.Tensor],
    **theirs: Any,
) -> None:
  """Runs the model and keeps what went in and what came out."""
  rows = len(theirs["pixel_values"])
  tokens = draw_tokens(name, model.config.text_config, rows)
  both = model(input_ids=tokens, return_loss=True, **theirs)
  inputs = inputs | {"tokens": tokens.int()}
  arrays = {f"in.{k}": v.numpy() for k, v in inputs.items()}
  arrays |= {f"out.{k}": v.numpy() for k, v in outputs_of(both).items()}
  np.savez_compressed(directory / "golden.npz", **arrays)


@torch.no_grad()
def make_fixed(
    name: str,
    dtype: str = "float32",
    save: dict[str, Any] | None = None,
    **config: Any,
) -> None:
  model = transformers.SiglipModel(transformers.SiglipConfig(**config))
  directory = finish(name, model, dtype, save or {})
  image = draw_image(name, model.config.vision_config)
  inputs = {"image": image.permute(0, 2, 3, 1)}
  write(name, directory, model, inputs, pixel_values=image)


@torch.no_grad()
def make_naflex(
    name: str,
    grids: list[list[int]],
    slots: int,
    dtype: str = "float32",
    save: dict[str, Any] | None = None,
    **config: Any,
) -> None:
  model = transformers.Siglip2Model(transformers.Siglip2Config(**config))
  directory = finish(name, model, dtype, save or {})
  grid = torch.tensor(grids)
  filled = torch.arange(slots) < grid.prod(dim=1, keepdim=True)
  shape = len(grids), slots, 3 * model.config.vision_config.patch_size**2
  patches = torch.rand(shape, generator=generator(name + " image")) * 2 - 1
  patches = patches * filled[..., None]
  write(
      name,
      directory,
      model,
      {"patches": patches, "grid": grid.int()},
      pixel_values=patches,
      pixel_attention_mask=filled.long(),
      spatial_shapes=grid,
  )


if __name__ == "__main__":
  for key, value in FIXED.items():
    make_fixed(key, **value)
  for key, value in NAFLEX.items():
    make_naflex(key, **value)
