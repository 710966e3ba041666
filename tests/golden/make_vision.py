"""Writes the ViT and CLIP checkpoints that transformers makes, with outputs.

Run with torch and transformers (5.23 wrote the files that are kept):

  python tests/golden/make_vision.py

Every directory `vit_*` and `clip_*` beside this file is what `save_pretrained`
wrote, plus `golden.npz` with inputs (`in.*`) and outputs (`out.*`). Images are
stored as [B, H, W, C]. The configs are small and differ in everything that a
config can say; all parameters are drawn anew, since fresh models have biases of
zero and scales of one, which would hide mistakes.
"""

import hashlib
from pathlib import Path
import shutil
from typing import Any

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent

VIT: dict[str, dict[str, Any]] = {
    "vit_classifier": dict(
        architecture="ViTForImageClassification",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        id2label={i: f"digit {i}" for i in range(5)},
    ),
    # Odd, oblong grid; pooler of another width; saved in several shards.
    "vit_pooler": dict(
        architecture="ViTModel",
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=80,
        image_size=[20, 28],
        patch_size=4,
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
        pooler_output_size=20,
        save=dict(max_shard_size="100KB"),
    ),
    # Grey images, no query, key and value biases, saved in bfloat16.
    "vit_grey": dict(
        architecture="ViTForImageClassification",
        hidden_size=40,
        num_hidden_layers=1,
        num_attention_heads=5,
        intermediate_size=24,
        image_size=18,
        patch_size=6,
        num_channels=1,
        num_labels=2,
        hidden_act="silu",
        qkv_bias=False,
        layer_norm_eps=1e-3,
        dtype="bfloat16",
    ),
}

CLIP: dict[str, dict[str, Any]] = {
    "clip_quick": dict(
        projection_dim=20,
        vision_config=dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        ),
        text_config=dict(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=48,
            vocab_size=99,
            max_position_embeddings=16,
            eos_token_id=98,
        ),
    ),
    # Other activations and epsilons in each tower, the end-of-text id in the
    # middle of the vocabulary, saved in several shards.
    "clip_gelu": dict(
        projection_dim=40,
        vision_config=dict(
            hidden_size=36,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=50,
            image_size=28,
            patch_size=7,
            hidden_act="gelu",
            layer_norm_eps=1e-3,
        ),
        text_config=dict(
            hidden_size=56,
            num_hidden_layers=1,
            num_attention_heads=7,
            intermediate_size=30,
            vocab_size=70,
            max_position_embeddings=11,
            eos_token_id=33,
            hidden_act="gelu_new",
            layer_norm_eps=1e-6,
        ),
        save=dict(max_shard_size="60KB"),
    ),
    # The end-of-text id of the early configs, which means the highest id;
    # saved in float16.
    "clip_legacy": dict(
        projection_dim=16,
        vision_config=dict(
            hidden_size=30,
            num_hidden_layers=1,
            num_attention_heads=5,
            intermediate_size=44,
            image_size=48,
            patch_size=16,
            hidden_act="quick_gelu",
        ),
        text_config=dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=60,
            max_position_embeddings=9,
            eos_token_id=2,
            hidden_act="gelu",
        ),
        dtype="float16",
    ),
}


def generator(name: str) -> torch.Generator:
  """A generator of its own for every name: order does not matter."""
  digest = hashlib.sha256(name.encode()).digest()
  return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: str) -> None:
  """Draws every parameter at a scale that keeps activations near one."""
  kinds = {
      f"{prefix}.{name}".lstrip("."): (type(part), name)
      for prefix, part in module.named_modules()
      for name, _ in part.named_parameters(recurse=False)
  }
  for path, parameter in module.named_parameters():
    kind, name = kinds[path]
    noise = torch.randn(parameter.shape, generator=generator(seed + path))
    if name == "logit_scale":
      value = 1.5 + 0.1 * noise
    elif kind is torch.nn.LayerNorm and name == "weight":
      value = 1 + 0.2 * noise
    elif kind in (torch.nn.Linear, torch.nn.Conv2d) and name == "weight":
      value = 1.5 * noise / parameter[0].numel() ** 0.5
    else:
      value = 0.4 * noise
    parameter.copy_(value)


def finish(
    name: str, model: Any, dtype: str, save: dict[str, Any]
) -> Path:
  """Randomises, rounds to the dtype of the file, and saves the model."""
  randomize(model, name)
  model.eval().to(getattr(torch, dtype))
  directory = HERE / name
  shutil.rmtree(directory, ignore_errors=True)
  model.save_pretrained(directory, **save)
  model.float()
  return directory


def draw_image(name: str, config: Any) -> torch.Tensor:
  size = config.image_size
  height, width = (size, size) if isinstance(size, int) else size
  shape = 3, config.num_channels, height, width
  return torch.rand(shape, generator=generator(name + " image")) * 2 - 1


def draw_tokens(name: str, config: Any) -> torch.Tensor:
  """Texts of different lengths, the end-of-text id repeated as padding."""
  length = config.max_position_embeddings
  tokens = torch.randint(
      3,
      config.vocab_size - 1,
      (3, length),
      generator=generator(name + " tokens"),
  )
  eos = config.eos_token_id
  if eos == 2:
    end, padding = config.vocab_size - 1, 0
  else:
    end = padding = eos
  tokens[tokens == end] = 3
  for row in range(3):
    tokens[row, length - 1 - 2 * row :] = padding
    tokens[row, length - 1 - 2 * row] = end
  return tokens


def write(
    directory: Path,
    inputs: dict[str, torch.Tensor],
    outputs: dict[str, torch.Tensor],
) -> None:
  inputs = dict(inputs, image=inputs["image"].permute(0, 2, 3, 1))
  arrays = {f"in.{k}": v.numpy() for k, v in inputs.items()}
  arrays |= {f"out.{k}": v.numpy() for k, v in outputs.items()}
  np.savez_compressed(directory / "golden.npz", **arrays)


@torch.no_grad()
def make_vit(
    name: str,
    architecture: str,
    dtype: str = "float32",
    save: dict[str, Any] | None = None,
    **config: Any,
) -> None:
  model = getattr(transformers, architecture)(transformers.ViTConfig(**config))
  directory = finish(name, model, dtype, save or {})
  image = draw_image(name, model.config)
  trunk = getattr(model, "vit", model)(pixel_values=image)
  outputs = {"tokens": trunk.last_hidden_state}
  if architecture == "ViTModel":
    outputs["pooled"] = trunk.pooler_output
  else:
    outputs["pooled"] = trunk.last_hidden_state[:, 0]
    outputs["logits"] = model(pixel_values=image).logits
  write(directory, {"image": image}, outputs)


@torch.no_grad()
def make_clip(
    name: str,
    dtype: str = "float32",
    save: dict[str, Any] | None = None,
    **config: Any,
) -> None:
  model = transformers.CLIPModel(transformers.CLIPConfig(**config))
  directory = finish(name, model, dtype, save or {})
  image = draw_image(name, model.config.vision_config)
  tokens = draw_tokens(name, model.config.text_config)
  both = model(pixel_values=image, input_ids=tokens, return_loss=True)
  vision = model.vision_model(pixel_values=image)
  text = model.text_model(input_ids=tokens)
  outputs = {
      "image_tokens": vision.last_hidden_state,
      "image_pooled": vision.pooler_output,
      "image_projected": model.visual_projection(vision.pooler_output),
      "text_tokens": text.last_hidden_state,
      "text_pooled": text.pooler_output,
      "text_projected": model.text_projection(text.pooler_output),
      "image_embed": both.image_embeds,
      "text_embed": both.text_embeds,
      "logits_per_image": both.logits_per_image,
      "loss": both.loss,
  }
  write(directory, {"image": image, "tokens": tokens.int()}, outputs)


if __name__ == "__main__":
  for key, value in VIT.items():
    make_vit(key, **value)
  for key, value in CLIP.items():
    make_clip(key, **value)
