"""What does transformers call a decoder and its parts? Configs and tensors.

For `models.llm.Decoder`, and for every system that holds one: its directories
have the same tensors behind a prefix, and the same config as one of its parts.
"""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

from mmjax import config
from mmjax.nn import linear, position, rope
from mmjax.weights import layout
from mmjax.weights.layout import Ignore, Rule, Table
from mmjax.weights.transforms import LINEAR

# Where a config.json is silent, transformers takes these (`LlamaConfig`,
# `Qwen2Config`, `HeliumConfig`, `OPTConfig`, `MistralConfig`).
_ROTARY: dict[str, Any] = dict(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    head_dim=None,
    hidden_act="silu",
    initializer_range=0.02,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    rope_theta=1e4,
)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _ROTARY | dict(
        vocab_size=32_000,
        intermediate_size=11_008,
        max_position_embeddings=2048,
    ),
    "Qwen2ForCausalLM": _ROTARY | dict(
        vocab_size=151_936,
        intermediate_size=22_016,
        max_position_embeddings=32_768,
    ),
    "HeliumForCausalLM": _ROTARY | dict(
        vocab_size=48_000,
        hidden_size=2560,
        intermediate_size=7040,
        num_hidden_layers=24,
        num_attention_heads=20,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-8,
        rope_theta=1e5,
    ),
    "OPTForCausalLM": dict(
        vocab_size=50_272,
        hidden_size=768,
        num_hidden_layers=12,
        ffn_dim=3072,
        max_position_embeddings=2048,
        do_layer_norm_before=True,
        word_embed_proj_dim=None,
        num_attention_heads=12,
        activation_function="relu",
        init_std=0.02,
        enable_bias=True,
        tie_word_embeddings=True,
    ),
    # Read only: without its window it is LLaMA's network, and written as such.
    "MistralForCausalLM": _ROTARY | dict(
        vocab_size=32_000,
        intermediate_size=14_336,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        sliding_window=4096,
    ),
}
ARCHITECTURES = tuple(_DEFAULTS)
_MODEL_TYPES = ("llama", "qwen2", "helium", "opt", "mistral")

# OPT's layer norms take PyTorch's default.
_TORCH_EPSILON = 1e-5


def attributes(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The attributes of the `Decoder` that a config.json describes.

  Args:
    hf: of one of `ARCHITECTURES`, named by `architectures` or `model_type`.

  Raises:
    ValueError: for another architecture, or something in the config that the
      decoder has not.
  """
  architecture = _architecture(hf)
  hf = _DEFAULTS[architecture] | dict(hf)
  opt = architecture == "OPTForCausalLM"
  found = _read_opt(hf) if opt else _read_rotary(hf, architecture)
  config.pick(linear.ACTIVATIONS, found["activation"], "activation")
  return found


def _architecture(hf: Mapping[str, Any]) -> str:
  kinds = dict(zip(_MODEL_TYPES, ARCHITECTURES))
  named = (hf.get("architectures") or [kinds.get(hf.get("model_type"))])[0]
  config.pick(_DEFAULTS, named, "architecture")
  return named


def _read_rotary(hf: Mapping[str, Any], architecture: str) -> dict[str, Any]:
  """LLaMA, Qwen2, Helium and Mistral."""
  heads, width = hf["num_attention_heads"], hf["hidden_size"]
  window = hf.get("sliding_window")
  if (
      architecture == "MistralForCausalLM"
      and window is not None
      and window < hf["max_position_embeddings"]
  ):
    raise ValueError(
        f"sliding_window={window} of {hf['max_position_embeddings']} positions:"
        " expected null, or as many"
    )
  layers = set(hf.get("layer_types") or ["full_attention"])
  if hf.get("use_sliding_window") or layers != {"full_attention"}:
    raise ValueError(
        f"use_sliding_window={hf.get('use_sliding_window')}, layer_types="
        f"{sorted(layers)}: expected full attention in all layers"
    )
  biases = {"mlp"} if hf["mlp_bias"] else set()
  layout_of_pairs = "half"
  if architecture == "Qwen2ForCausalLM":
    biases = {"qkv"}
  elif architecture == "HeliumForCausalLM":
    layout_of_pairs = "interleaved"
    if hf["attention_bias"]:
      biases.add("qkv")
  elif hf["attention_bias"]:
    biases |= {"qkv", "out"}
  return dict(
      vocab=hf["vocab_size"],
      width=width,
      depth=hf["num_hidden_layers"],
      heads=heads,
      mlp=hf["intermediate_size"],
      length=hf["max_position_embeddings"],
      position=_rope(hf, layout_of_pairs),
      groups=hf["num_key_value_heads"] or heads,
      head_dim=hf["head_dim"] or width // heads,
      table=width,
      norms="rms",
      epsilon=hf["rms_norm_eps"],
      order="pre",
      mlp_kind="gated",
      activation=hf["hidden_act"],
      biases=tuple(sorted(biases)),
      readout="tied" if hf["tie_word_embeddings"] else "own",
      std=hf["initializer_range"],
  )


def _read_opt(hf: Mapping[str, Any]) -> dict[str, Any]:
  pre = hf["do_layer_norm_before"]
  if not hf.get("layer_norm_elementwise_affine", True) or (
      pre and hf.get("_remove_final_layer_norm", False)
  ):
    raise ValueError(
        "layer_norm_elementwise_affine is false or _remove_final_layer_norm is "
        "true; expected norms with parameters, and one behind the last block"
    )
  width, heads, std = (
      hf[k] for k in ("hidden_size", "num_attention_heads", "init_std")
  )
  length = hf["max_position_embeddings"]
  return dict(
      vocab=hf["vocab_size"],
      width=width,
      depth=hf["num_hidden_layers"],
      heads=heads,
      mlp=hf["ffn_dim"],
      length=length,
      position=position.LearnedPositions(length, std=std),
      groups=heads,
      head_dim=width // heads,
      table=hf["word_embed_proj_dim"] or width,
      norms="layer",
      epsilon=_TORCH_EPSILON,
      order="pre" if pre else "post",
      mlp_kind="plain",
      activation=hf["activation_function"],
      biases=("mlp", "out", "qkv") if hf["enable_bias"] else (),
      readout="tied" if hf["tie_word_embeddings"] else "own",
      std=std,
  )


def _rope(hf: Mapping[str, Any], layout_of_pairs: str) -> rope.Rope:
  """Of a config in the words of transformers 4 or 5."""
  words = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
  theta = words.pop("rope_theta", hf["rope_theta"])
  old_kind = words.pop("type", "default")
  kind = words.pop("rope_type", old_kind)
  partial = words.pop("partial_rotary_factor", 1.0)
  if kind in ("llama3", "yarn"):
    words.setdefault(
        "original_max_position_embeddings", hf["max_position_embeddings"]
    )
  plain = kind == "default"
  make, names = (None, {}) if plain else _SCALINGS.get(kind, (None, {}))
  if not (plain or make) or partial != 1.0 or set(words) - set(names):
    raise ValueError(
        f"rope {kind!r} with {sorted(words)}, partial_rotary_factor={partial}: "
        f"expected 'default' or one of {sorted(_SCALINGS)}, of whole heads"
        + (f", with {sorted(names)}" if names else "")
    )
  scaling = make and make(**{names[w]: value for w, value in words.items()})
  return rope.Rope(theta, layout_of_pairs, scaling)


# rope_type -> what it makes, and their words for its attributes.
_SCALINGS: dict[str, tuple[Any, dict[str, str]]] = {
    "linear": (rope.Interpolated, dict(factor="factor")),
    "llama3": (
        rope.Llama3,
        dict(
            factor="factor",
            original_max_position_embeddings="length",
            low_freq_factor="low",
            high_freq_factor="high",
        ),
    ),
    "yarn": (
        rope.Yarn,
        dict(
            factor="factor",
            original_max_position_embeddings="length",
            beta_fast="fast",
            beta_slow="slow",
            attention_factor="attention",
        ),
    ),
}


def config_of(system: Any) -> dict[str, Any]:
  """The config.json of a `Decoder`.

  Raises:
    ValueError: for one that none of `ARCHITECTURES` can say.
  """
  mine = {f.name: getattr(system, f.name) for f in dataclasses.fields(system)}
  mine |= dict(
      groups=system.groups or system.heads,
      head_dim=system.head_dim or system.width // system.heads,
      table=system.table or system.width,
      biases=tuple(sorted(system.biases)),
  )
  architecture = _family(system)
  opt = architecture == "OPTForCausalLM"
  made = dict(
      architectures=[architecture],
      model_type=_MODEL_TYPES[ARCHITECTURES.index(architecture)],
      vocab_size=system.vocab,
      hidden_size=system.width,
      num_hidden_layers=system.depth,
      num_attention_heads=system.heads,
      max_position_embeddings=system.length,
      tie_word_embeddings=system.readout == "tied",
      **(_write_opt if opt else _write_rotary)(mine),
  )
  wrong = [
      f"{key}={mine[key]!r} (expected {value!r})"
      for key, value in attributes(made).items()
      if mine[key] != value
  ]
  if wrong:
    raise ValueError(
        f"transformers' {architecture} cannot say: " + ", ".join(wrong)
    )
  return made


def _family(system: Any) -> str:
  if not isinstance(system.position, rope.Rope):
    return "OPTForCausalLM"
  if system.position.layout == "interleaved":
    return "HeliumForCausalLM"
  if set(system.biases) == {"qkv"}:
    return "Qwen2ForCausalLM"
  return "LlamaForCausalLM"


def _write_rotary(mine: Mapping[str, Any]) -> dict[str, Any]:
  position = mine["position"]
  scaling = None
  for kind, (make, names) in _SCALINGS.items():
    if isinstance(position.scaling, make):
      values = {
          word: getattr(position.scaling, name) for word, name in names.items()
      }
      scaling = {"rope_type": kind} | {
          word: value for word, value in values.items() if value is not None
      }
  # Spelled as in transformers 4, which 5 understands too.
  return dict(
      intermediate_size=mine["mlp"],
      num_key_value_heads=mine["groups"],
      head_dim=mine["head_dim"],
      hidden_act=mine["activation"],
      initializer_range=mine["std"],
      rms_norm_eps=mine["epsilon"],
      attention_bias="qkv" in mine["biases"],
      mlp_bias="mlp" in mine["biases"],
      rope_theta=position.theta,
      rope_scaling=scaling,
  )


def _write_opt(mine: Mapping[str, Any]) -> dict[str, Any]:
  return dict(
      ffn_dim=mine["mlp"],
      do_layer_norm_before=mine["order"] == "pre",
      word_embed_proj_dim=mine["table"],
      activation_function=mine["activation"],
      init_std=mine["std"],
      enable_bias=bool(mine["biases"]),
  )


def table(system: Any) -> Table:
  """The names of transformers, and of OPT's shards without `model.`."""
  found = rules(system)
  if _family(system) == "OPTForCausalLM":
    found += rules(system, body="", head=None)
  return found


def rules(
    system: Any,
    *,
    body: str = "model",
    head: str | None = "lm_head",
    target: str = "",
) -> list[Rule | Ignore]:
  """Rules for a `Decoder`, alone or as a part of something.

  Args:
    system: the decoder.
    body: what the names of its tensors begin with.
    head: the name of its head; None for no rules about it.
    target: what our paths begin with, ending in a slash if not empty.
  """
  prefix = body and f"{body}."
  if _family(system) == "OPTForCausalLM":
    prefix += "decoder."
    found = _opt_rules(prefix, target)
  else:
    found = _rotary_rules(prefix, target)
  found.append(
      Rule(f"{prefix}embed_tokens.weight", f"{target}embed/embedding")
  )
  if head is not None and system.readout == "own":
    found.append(Rule(f"{head}.weight", f"{target}head/kernel", LINEAR))
  elif head is not None:
    # A second copy of the table, which some checkpoints keep.
    found.append(Ignore(re.escape(f"{head}.weight")))
  return found


def _rotary_rules(prefix: str, target: str) -> list[Rule | Ignore]:
  layer, block = f"{prefix}layers.{{i}}", f"{target}blocks[i]"
  names = dict(query="q", key="k", value="v")
  return [
      *layout.affine(f"{layer}.input_layernorm", f"{block}/attention_norm"),
      *(
          rule
          for ours, theirs in names.items()
          for rule in layout.dense(
              f"{layer}.self_attn.{theirs}_proj", f"{block}/attention/{ours}"
          )
      ),
      *layout.dense(
          f"{layer}.self_attn.o_proj", f"{block}/attention/out", inputs=2
      ),
      *layout.affine(f"{layer}.post_attention_layernorm", f"{block}/mlp_norm"),
      *(
          rule
          for part in ("gate", "up", "down")
          for rule in layout.dense(
              f"{layer}.mlp.{part}_proj", f"{block}/mlp/{part}"
          )
      ),
      *layout.affine(f"{prefix}norm", f"{target}norm"),
      Ignore(rf"{re.escape(prefix)}(layers\.\d+\.self_attn\.)?rotary_emb\..*"),
  ]


def _opt_rules(prefix: str, target: str) -> list[Rule | Ignore]:
  return [
      *layout.block(
          f"{prefix}layers.{{i}}",
          f"{target}blocks[i]",
          norms=("self_attn_layer_norm", "final_layer_norm"),
          attention=tuple(
              f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")
          ),
          mlp=("fc1", "fc2"),
      ),
      Rule(f"{prefix}embed_positions.weight", f"{target}position/table"),
      *layout.affine(f"{prefix}final_layer_norm", f"{target}norm"),
      *(
          layout.dense(f"{prefix}project_{way}", f"{target}project_{way}")[0]
          for way in ("in", "out")
      ),
  ]
