"""What do transformers and the official code call CLIP and its parts?

For `models.clip.CLIP`, and for every system that looks through its image tower.
"""

from collections.abc import Mapping
import re
from typing import Any

from mmjax import config
from mmjax.nn import linear
from mmjax.weights import layout
from mmjax.weights.layout import Rule, Table
from mmjax.weights.transforms import CONV2D, FLAT, LINEAR

# Where a config.json is silent, transformers takes these (`CLIPTextConfig`,
# `CLIPVisionConfig`, `CLIPConfig`).
_TOWER: dict[str, Any] = dict(
    num_hidden_layers=12, hidden_act="quick_gelu", layer_norm_eps=1e-5
)
_TEXT = _TOWER | dict(
    vocab_size=49408,
    hidden_size=512,
    intermediate_size=2048,
    num_attention_heads=8,
    max_position_embeddings=77,
    eos_token_id=49407,
)
_VISION = _TOWER | dict(
    hidden_size=768,
    intermediate_size=3072,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=32,
)
_PROJECTION = 512
# transformers reads this end-of-text id, which early configs give by mistake,
# as "the highest id".
_HIGHEST = 2


def _tower(
    hf: Mapping[str, Any], kind: str, defaults: Mapping[str, Any]
) -> dict[str, Any]:
  """The config of one tower, defaults included."""
  tower = {**defaults, **(hf.get(f"{kind}_config") or {})}
  # The first configs held a second, decisive copy.
  if hf.get(f"{kind}_config_dict") is not None:
    tower |= {**defaults, **hf[f"{kind}_config_dict"]}
  config.pick(linear.ACTIVATIONS, tower["hidden_act"], f"{kind} hidden_act")
  return tower


def encoder_attributes(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The arguments of `clip.encoder` that the `vision_config` of `hf` describes.

  Raises:
    ValueError: for patches that are not square, or of other than 3 channels.
  """
  vision = _tower(hf, "vision", _VISION)
  return dict(
      image=layout.pair(vision["image_size"]),
      patch=layout.square_patch(vision),
      **layout.tower_attributes(vision),
  )


def vision_attributes(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The attributes of the `ImageTower` of a config.json."""
  embed = hf.get("projection_dim", _PROJECTION)
  return dict(embed=embed, **encoder_attributes(hf))


def text_attributes(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The attributes of the `TextTower` of a config.json."""
  text = _tower(hf, "text", _TEXT)
  eos = text["eos_token_id"]
  return dict(
      embed=hf.get("projection_dim", _PROJECTION),
      vocab=text["vocab_size"],
      length=text["max_position_embeddings"],
      eot=None if eos == _HIGHEST else eos,
      **layout.tower_attributes(text),
  )


def encoder_config(tower: Any) -> dict[str, Any]:
  """The `vision_config` of an `ImageTower` or a `clip.encoder`.

  Raises:
    ValueError: for pictures that are not square.
  """
  if tower.image[0] != tower.image[1]:
    raise ValueError(
        f"transformers' CLIP takes square images, not {tuple(tower.image)}"
    )
  return dict(
      model_type="clip_vision_model",
      image_size=tower.image[0],
      patch_size=tower.patch,
      num_channels=3,
      **layout.tower_config(tower),
  )


def config_of(system: Any) -> dict[str, Any]:
  """The config.json of a `CLIP`."""
  vision, text = system.vision, system.text
  return dict(
      architectures=["CLIPModel"],
      model_type="clip",
      projection_dim=vision.embed,
      vision_config=dict(projection_dim=vision.embed, **encoder_config(vision)),
      text_config=dict(
          model_type="clip_text_model",
          vocab_size=text.vocab,
          max_position_embeddings=text.length,
          eos_token_id=_HIGHEST if text.eot is None else text.eot,
          bos_token_id=None,  # Known to the tokenizer, not to the system.
          pad_token_id=None,
          projection_dim=text.embed,
          **layout.tower_config(text),
      ),
  )


def encoder_rules(source: str, target: str) -> list[Rule | layout.Ignore]:
  """Rules for `clip.encoder`, `pre_layrnorm` included.

  Args:
    source: what the names of its tensors begin with, ending in a dot.
    target: its path, ending in a slash.
  """
  embeddings = f"{source}embeddings"
  return [
      Rule(f"{embeddings}.class_embedding", f"{target}cls"),
      Rule(
          f"{embeddings}.patch_embedding.weight",
          f"{target}patch/kernel",
          CONV2D,
      ),
      Rule(
          f"{embeddings}.position_embedding.weight", f"{target}position/table"
      ),
      *layout.affine(f"{source}pre_layrnorm", f"{target}stem_norm"),
      *layout.tower_block(source, target),
      layout.Ignore(rf"{re.escape(embeddings)}\.position_ids"),
  ]


def table(system: Any) -> Table:
  """The names of transformers."""
  del system  # The names are the same for every size.
  embeddings = "text_model.embeddings"
  return [
      *encoder_rules("vision_model.", "vision/encoder/"),
      *layout.affine("vision_model.post_layernorm", "vision/norm"),
      Rule(f"{embeddings}.token_embedding.weight", "text/embed/embedding"),
      Rule(f"{embeddings}.position_embedding.weight", "text/position/table"),
      *layout.tower_block("text_model.", "text/"),
      *layout.affine("text_model.final_layer_norm", "text/norm"),
      Rule("visual_projection.weight", "vision/projection/kernel", LINEAR),
      Rule("text_projection.weight", "text/projection/kernel", LINEAR),
      Rule("logit_scale", "logit_scale"),
      layout.Ignore(rf"{re.escape(embeddings)}\.position_ids"),
  ]


def official_table(system: Any) -> Table:
  """The names of the official code, whose last projections are as ours."""
  del system  # The names are the same for every size.
  rules = [
      Rule("visual.class_embedding", "vision/encoder/cls"),
      Rule("visual.conv1.weight", "vision/encoder/patch/kernel", CONV2D),
      Rule("visual.positional_embedding", "vision/encoder/position/table"),
      Rule("token_embedding.weight", "text/embed/embedding"),
      Rule("positional_embedding", "text/position/table"),
      Rule("logit_scale", "logit_scale"),
      *layout.affine("visual.ln_pre", "vision/encoder/stem_norm"),
      *layout.affine("visual.ln_post", "vision/norm"),
      *layout.affine("ln_final", "text/norm"),
      Rule("visual.proj", "vision/projection/kernel"),
      Rule("text_projection", "text/projection/kernel"),
      # Numbers that the official archives keep beside the weights.
      layout.Ignore("input_resolution|context_length|vocab_size"),
  ]
  for tower, blocks in (("visual.", "vision/encoder"), ("", "text")):
    layer = f"{tower}transformer.resblocks.{{i}}"
    block = f"{blocks}/blocks[i]"
    qkv = [f"{block}/attention/{name}" for name in ("query", "key", "value")]
    kernels = tuple(f"{part}/kernel" for part in qkv)
    biases = tuple(f"{part}/bias" for part in qkv)
    rules += [
        *layout.affine(f"{layer}.ln_1", f"{block}/attention_norm"),
        Rule(f"{layer}.attn.in_proj_weight", kernels, LINEAR),
        Rule(f"{layer}.attn.in_proj_bias", biases, FLAT),
        *layout.dense(f"{layer}.attn.out_proj", f"{block}/attention/out", 2),
        *layout.affine(f"{layer}.ln_2", f"{block}/mlp_norm"),
        *layout.dense(f"{layer}.mlp.c_fc", f"{block}/mlp/up"),
        *layout.dense(f"{layer}.mlp.c_proj", f"{block}/mlp/down"),
    ]
  return rules
