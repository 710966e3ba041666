"""What do transformers and the official code call BLIP-2 and its parts?

For `models.blip2` and `models.blip2_pretrain`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from mmjax import config
from mmjax.models import clip_layout, llm_layout, t5_layout
from mmjax.nn import linear
from mmjax.weights import layout
from mmjax.weights.layout import Ignore, Rule, Table
from mmjax.weights.transforms import CONV2D, FLAT, LINEAR, ZEROS_BEHIND, leading

# Where a config.json is silent, transformers takes these (`Blip2VisionConfig`,
# `Blip2QFormerConfig`, `Blip2Config`).
_VISION: dict[str, Any] = dict(
    hidden_size=1408,
    intermediate_size=6144,
    num_hidden_layers=39,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
    num_channels=3,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    qkv_bias=True,
)
_QFORMER: dict[str, Any] = dict(
    vocab_size=30_522,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    hidden_act="gelu",
    hidden_dropout_prob=0.1,
    max_position_embeddings=512,
    initializer_range=0.02,
    layer_norm_eps=1e-12,
    cross_attention_frequency=2,
)
_QUERIES, _JOINT = 32, 256
# Their word -> ours, of a Q-Former.
_SAME = dict(
    vocab_size="vocab",
    hidden_size="width",
    num_hidden_layers="depth",
    num_attention_heads="heads",
    intermediate_size="mlp",
    hidden_act="activation",
    hidden_dropout_prob="dropout",
    max_position_embeddings="length",
    initializer_range="std",
    layer_norm_eps="epsilon",
    cross_attention_frequency="every",
)


def vision_attributes(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The arguments of `blip2.eva` that a config.json describes.

  Raises:
    ValueError: for patches that are not square, or of other than 3 channels.
  """
  vision = _VISION | dict(hf.get("vision_config") or {})
  config.pick(linear.ACTIVATIONS, vision["hidden_act"], "vision hidden_act")
  return dict(
      image=layout.pair(vision["image_size"]),
      patch=layout.square_patch(vision),
      biased=("query", "value") if vision["qkv_bias"] else (),
      **layout.tower_attributes(vision),
  )


def qformer_attributes(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The attributes of the `QFormer` that a config.json describes."""
  former = _QFORMER | dict(hf.get("qformer_config") or {})
  config.pick(linear.ACTIVATIONS, former["hidden_act"], "qformer hidden_act")
  return dict(
      queries=hf.get("num_query_tokens", _QUERIES),
      **{ours: former[theirs] for theirs, ours in _SAME.items()},
  )


def joint_width(hf: Mapping[str, Any]) -> int:
  """E of an `ImageText`."""
  return hf.get("image_text_hidden_size", _JOINT)


def _common_config(system: Any) -> dict[str, Any]:
  """What the config.json of all systems has.

  Raises:
    ValueError: for what transformers has no words for.
  """
  vision, former = system.vision, system.qformer
  faults = []
  if vision.stem_norm is not None or vision.patch_bias_init is None:
    faults.append("its encoder is CLIP's, expected EVA's")
  if vision.image[0] != vision.image[1]:
    faults.append(f"its images are {tuple(vision.image)}, expected squares")
  if vision.epsilon != system.vision_epsilon:
    faults.append(
        f"vision_epsilon is {system.vision_epsilon}, expected that of the "
        f"encoder, {vision.epsilon}"
    )
  if faults:
    raise ValueError("transformers has no such BLIP-2: " + "; ".join(faults))
  return dict(
      model_type="blip-2",
      num_query_tokens=former.queries,
      vision_config=dict(
          model_type="blip_2_vision_model",
          image_size=vision.image[0],
          patch_size=vision.patch,
          qkv_bias=bool(vision.inits.biased),
          **layout.tower_config(vision),
      ),
      qformer_config=dict(
          model_type="blip_2_qformer",
          encoder_hidden_size=vision.width,
          **{theirs: getattr(former, ours) for theirs, ours in _SAME.items()},
      ),
  )


def retrieval_config(system: Any) -> dict[str, Any]:
  """The config.json of an `ImageText`.

  Raises:
    ValueError: for a system with a part that transformers has not.
  """
  if not hasattr(system, "embed"):
    raise ValueError(
        "transformers has no words for BLIP-2 that writes in its first stage; "
        "export the `model` of this Pretraining, with its parameters"
    )
  found = _common_config(system)
  found["qformer_config"]["use_qformer_text_input"] = True
  return found | dict(
      architectures=["Blip2ForImageTextRetrieval"],
      image_text_hidden_size=system.embed,
  )


def generation_config(system: Any) -> dict[str, Any]:
  """The config.json of a `BLIP2` or a `BLIP2T5`."""
  seq2seq = hasattr(system.llm, "encoder_depth")
  text = (t5_layout if seq2seq else llm_layout).config_of(system.llm)
  return _common_config(system) | dict(
      architectures=["Blip2ForConditionalGeneration"],
      text_config=text,
      use_decoder_only_language_model=not seq2seq,
      # The last id of the vocabulary: no text has it in the released models.
      image_token_index=system.llm.vocab - 1,
      tie_word_embeddings=system.llm.readout == "tied",
  )


def _vision_rules(
    source: str,
    block: str,
    names: Mapping[str, str],
    bias: tuple[Rule, ...],
) -> list[Rule]:
  """Rules for `blip2.eva`.

  Args:
    source: what the names of its tensors begin with.
    block: the name of a block behind it, a template.
    names: of its tensors behind `source`, and of parts of a block.
    bias: rules for the biases of queries and values.
  """
  ours, block = "vision/blocks[i]", source + block
  kernels = tuple(
      f"{ours}/attention/{part}/kernel" for part in ("query", "key", "value")
  )
  return [
      Rule(f"{source}{names['cls']}", "vision/cls", leading(2)),
      Rule(f"{source}{names['place']}", "vision/position/table", leading(1)),
      Rule(f"{source}{names['patch']}.weight", "vision/patch/kernel", CONV2D),
      Rule(f"{source}{names['patch']}.bias", "vision/patch/bias"),
      *layout.affine(f"{block}.{names['norm']}1", f"{ours}/attention_norm"),
      *layout.affine(f"{block}.{names['norm']}2", f"{ours}/mlp_norm"),
      Rule(f"{block}.{names['attention']}.qkv.weight", kernels, LINEAR),
      *bias,
      *layout.dense(
          f"{block}.{names['attention']}.{names['out']}",
          f"{ours}/attention/out",
          inputs=2,
      ),
      *layout.dense(f"{block}.mlp.fc1", f"{ours}/mlp/up"),
      *layout.dense(f"{block}.mlp.fc2", f"{ours}/mlp/down"),
  ]


_QUERY_BIAS = "vision/blocks[i]/attention/query/bias"
_VALUE_BIAS = "vision/blocks[i]/attention/value/bias"


def _qformer_rules(
    former: Any, source: str, inner: str
) -> list[Rule | Ignore]:
  """Rules for a `QFormer` without its embeddings and its head.

  Args:
    former: the QFormer.
    source: what the names of its tensors begin with, ending in a dot.
    inner: what an attention is called within itself.
  """
  attentions = dict(attention="attention", crossattention="cross")
  rules = []
  for number in range(former.every):
    layer = f"{source}encoder.layer.{{{former.every}i+{number}}}"
    block = f"qformer/blocks[i]/layer_{number}"
    for theirs, ours in attentions.items():
      for part in ("query", "key", "value"):
        rules += layout.dense(
            f"{layer}.{theirs}.{inner}.{part}", f"{block}/{ours}/{part}"
        )
      output = f"{layer}.{theirs}.output"
      rules += layout.dense(f"{output}.dense", f"{block}/{ours}/out", inputs=2)
      rules += layout.affine(f"{output}.LayerNorm", f"{block}/{ours}_norm")
    for suffix, ours in (("_query", "query_mlp"), ("", "text_mlp")):
      output = f"{layer}.output{suffix}"
      rules += layout.dense(
          f"{layer}.intermediate{suffix}.dense", f"{block}/{ours}/up"
      )
      rules += layout.dense(f"{output}.dense", f"{block}/{ours}/down")
      rules += layout.affine(f"{output}.LayerNorm", f"{block}/{ours}_norm")
  return rules


def _common_rules(system: Any) -> list[Rule | Ignore]:
  """Encoder and Q-Former as transformers calls them."""
  attention = "vision_model.encoder.layers.{i}.self_attn"
  return [
      *_vision_rules(
          "vision_model.",
          "encoder.layers.{i}",
          dict(
              cls="embeddings.class_embedding",
              place="embeddings.position_embedding",
              patch="embeddings.patch_embedding",
              norm="layer_norm",
              attention="self_attn",
              out="projection",
          ),
          (
              Rule(
                  f"{attention}.qkv.bias",
                  (_QUERY_BIAS, _VALUE_BIAS),
                  (ZEROS_BEHIND, FLAT),
              ),
          ),
      ),
      *layout.affine("vision_model.post_layernorm", "vision_norm"),
      Rule("query_tokens", "qformer/query", leading(1)),
      *layout.affine("qformer.layernorm", "qformer/norm"),
      *_qformer_rules(system.qformer, "qformer.", "attention"),
  ]


def retrieval_table(system: Any) -> Table:
  """The names of transformers, of an `ImageText`."""
  words = "embeddings.word_embeddings.weight"
  places = "embeddings.position_embeddings.weight"
  return [
      *_common_rules(system),
      Rule(words, "qformer/embed/embedding"),
      Rule(places, "qformer/position/table"),
      *layout.dense("vision_projection", "vision_projection"),
      *layout.dense("text_projection", "text_projection"),
      *layout.dense("itm_head", "match_head"),
      Ignore(r"embeddings\.position_ids"),
  ]


def generation_table(system: Any) -> Table:
  """The names of transformers, of a `BLIP2` or a `BLIP2T5`."""
  return [
      *_common_rules(system),
      *layout.dense("language_projection", "projection"),
      *_language_rules(system, "language_model"),
  ]


def _language_rules(system: Any, source: str) -> list[Rule | Ignore]:
  if hasattr(system.llm, "encoder_depth"):
    return t5_layout.rules(system.llm, prefix=f"{source}.", target="llm/")
  return llm_layout.rules(
      system.llm,
      body=f"{source}.model",
      head=f"{source}.lm_head",
      target="llm/",
  )


def _official_eva() -> list[Rule]:
  """An encoder of EVA as the official code calls it."""
  attention = "visual_encoder.blocks.{i}.attn"
  return _vision_rules(
      "visual_encoder.",
      "blocks.{i}",
      dict(
          cls="cls_token",
          place="pos_embed",
          patch="patch_embed.proj",
          norm="norm",
          attention="attn",
          out="proj",
      ),
      (
          Rule(f"{attention}.q_bias", _QUERY_BIAS, FLAT),
          Rule(f"{attention}.v_bias", _VALUE_BIAS, FLAT),
      ),
  )


def _official_clip() -> list[Rule]:
  """An encoder of CLIP as the official code calls it: as OpenAI's does."""
  tower, found = "vision/encoder/", []
  for rule in clip_layout.official_table(None):
    if isinstance(rule, Rule) and all(p.startswith(tower) for p in rule.paths):
      single = isinstance(rule.target, str)
      targets = [
          "vision/" + target.removeprefix(tower)
          for target in ([rule.target] if single else rule.target)
      ]
      found.append(
          dataclasses.replace(
              rule,
              source=rule.source.replace("visual.", "visual_encoder.", 1),
              target=targets[0] if single else tuple(targets),
          )
      )
  return found


def _official_rules(system: Any) -> list[Rule | Ignore]:
  """Encoder and Q-Former as the official code calls them."""
  source, clips = "Qformer.bert.", system.vision.stem_norm is not None
  return [
      *(_official_clip() if clips else _official_eva()),
      *layout.affine("ln_vision", "vision_norm"),
      Rule("query_tokens", "qformer/query", leading(1)),
      *layout.affine(f"{source}embeddings.LayerNorm", "qformer/norm"),
      *_qformer_rules(system.qformer, source, "self"),
      Ignore(r"Qformer\.bert\.embeddings\.position_ids"),
  ]


def official_pretraining(system: Any) -> Table:
  """The names of the official code, of a `Pretraining`."""
  source, head = "Qformer.bert.embeddings.", "Qformer.cls.predictions"
  rules = [
      *_official_rules(system.model),
      Rule(f"{source}word_embeddings.weight", "qformer/embed/embedding"),
      Rule(f"{source}position_embeddings.weight", "qformer/position/table"),
      *layout.dense(f"{head}.transform.dense", "qformer/transform"),
      *layout.affine(f"{head}.transform.LayerNorm", "qformer/transform_norm"),
      Rule(f"{head}.bias", "qformer/bias/bias"),
      *layout.dense("vision_proj", "vision_projection"),
      *layout.dense("text_proj", "text_projection"),
      *layout.dense("itm_head", "match_head"),
  ]
  return [
      *layout.below(rules, "model/"),
      Rule("temp", "temperature"),
      # Copies of the word embeddings and of the bias.
      Ignore(r"Qformer\.cls\.predictions\.decoder\.(weight|bias)"),
  ]


def official_generation(system: Any) -> Table:
  """The names of the official code, of a `BLIP2` or a `BLIP2T5`.

  Its files often lack the language model, which they keep frozen.
  """
  kind = "t5" if hasattr(system.llm, "encoder_depth") else "opt"
  return [
      *_official_rules(system),
      *layout.dense(f"{kind}_proj", "projection"),
      *_language_rules(system, f"{kind}_model"),
  ]
