"""What does OpenFlamingo call Flamingo's parts? Configs and tensors.

OpenFlamingo keeps no config beside its weights, so the config.json is our own:
those of CLIP and of the decoder as transformers writes them, and numbers under
the names that OpenFlamingo's functions have for them.
"""

from collections.abc import Mapping
import dataclasses
import os
from typing import Any

import jax

from mmjax.models import clip, clip_layout, llm, llm_layout
from mmjax.nn import perceiver
from mmjax.weights import engine, layout, transforms
from mmjax.weights.layout import Ignore, Rule, Table
from mmjax.weights.source import open_source
from mmjax.weights.transforms import LINEAR, Transform

# The one table of the decoder that OpenFlamingo trained, for its new tokens.
EMBEDDING = "llm/embed/embedding"
# `[places, 1, D]` <-> our `[places, D]`.
_PLACES = Transform(
    lambda array, shape: array.reshape(shape), lambda array: array[:, None]
)
_RESAMPLER = dict(
    latents="num_latents",
    depth="depth",
    heads="heads",
    head_dim="dim_head",
    mlp="ff_inner",
    activation="activation",
    epsilon="epsilon",
    frames="max_num_frames",
    media="max_num_media",
)
_GATES = dict(
    heads="heads",
    head_dim="dim_head",
    mlp="ff_inner",
    activation="activation",
    epsilon="epsilon",
)


def attributes(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The attributes of the `Flamingo` that a config.json describes."""
  every = hf["cross_attn_every_n_layers"]
  gates, resampler = hf["cross_attn_config"], hf["perceiver_config"]
  return dict(
      vision=clip.encoder(**clip_layout.encoder_attributes(hf)),
      resampler=perceiver.Resampler(
          **{ours: resampler[theirs] for ours, theirs in _RESAMPLER.items()}
      ),
      llm=llm.Decoder(**llm_layout.attributes(hf["text_config"])),
      every=every,
      first=hf.get("cross_attn_first_layer", every - 1),
      select=hf.get("vision_select", "patches"),
      **{ours: gates[theirs] for ours, theirs in _GATES.items()},
  )


def config_of(system: Any) -> dict[str, Any]:
  """The config.json of a `Flamingo`."""
  return dict(
      architectures=["Flamingo"],
      model_type="flamingo",
      vision_config=clip_layout.encoder_config(system.vision),
      text_config=llm_layout.config_of(system.llm),
      perceiver_config={
          theirs: getattr(system.resampler, ours)
          for ours, theirs in _RESAMPLER.items()
      },
      cross_attn_config={
          theirs: getattr(system, ours) for ours, theirs in _GATES.items()
      },
      cross_attn_every_n_layers=system.every,
      cross_attn_first_layer=system.first,
      vision_select=system.select,
  )


def table(system: Any) -> Table:
  """OpenFlamingo's names, of which its files hold one or two a tensor."""
  return [
      *_vision_rules(),
      *_decoder_rules(system),
      *_resampler_rules(),
      *_all_gate_rules(system),
  ]


def trained_table(system: Any) -> list[Rule]:
  """The names in the files that OpenFlamingo released: what it trained."""
  words = [
      rule
      for rule in _decoder_rules(system)
      if isinstance(rule, Rule) and rule.target == EMBEDDING
  ]
  return [*_resampler_rules(), *_all_gate_rules(system), *words]


def from_official(
    system: Any,
    abstract: Mapping[str, Any],
    *,
    path: str | os.PathLike[str],
) -> dict[str, jax.Array]:
  """What OpenFlamingo trained, of a file as it releases them.

  For `Stage.imports`; tower and decoder come from their own checkpoints. The
  table of the decoder's tokens is taken where the file has it.

  Args:
    system: what is filled.
    abstract: path -> shape, dtype and sharding of its parameters.
    path: a `.safetensors` with the `state_dict`.

  Raises:
    ValueError: naming all tensors that do not fit.
  """
  source = open_source(path)
  table = trained_table(system)
  held = {
      name
      for rule in table
      if rule.target != EMBEDDING
      or rule.source in source.tensors
      for name in rule.paths
  }
  wanted = {name: leaf for name, leaf in abstract.items() if name in held}
  places = {name: leaf.sharding for name, leaf in wanted.items()}
  return engine.load(source, table, wanted, shardings=places)


def _vision_rules() -> list[Rule | Ignore]:
  """CLIP's official names, without what is behind its last block."""
  ours = "vision/encoder/"
  found: list[Rule | Ignore] = [
      Ignore(r"vision_encoder\.(ln_post\..*|proj)")
  ]
  for rule in clip_layout.official_table(None):
    if isinstance(rule, Rule) and rule.paths[0].startswith(ours):
      target = rule.target
      parts = (target,) if isinstance(target, str) else target
      parts = tuple(part.replace(ours, "vision/") for part in parts)
      found.append(
          dataclasses.replace(
              rule,
              source=rule.source.replace("visual.", "vision_encoder."),
              target=parts[0] if isinstance(target, str) else parts,
          )
      )
  return found


def _resampler_rules() -> list[Rule]:
  layer, block = "perceiver.layers.{i}", "resampler/blocks[i]"
  return [
      Rule("perceiver.latents", "resampler/latents"),
      Rule("perceiver.frame_embs", "resampler/frames"),
      Rule("perceiver.media_time_embs", "resampler/media", _PLACES),
      *layout.affine(f"{layer}.0.norm_media", f"{block}/features_norm"),
      *layout.affine(f"{layer}.0.norm_latents", f"{block}/attention_norm"),
      *_attention_rules(f"{layer}.0", f"{block}/attention"),
      *_mlp_rules(f"{layer}.1", block),
      *layout.affine("perceiver.norm", "resampler/norm"),
  ]


def _all_gate_rules(system: Any) -> list[Rule]:
  place = f"{{{system.every}i+{system.first}}}"
  newer = f"{_body(_decoder_rules(system))}.{place}.gated_cross_attn_layer"
  older = f"lang_encoder.gated_cross_attn_layers.{place}"
  return [
      *_gate_rules(newer),
      *(
          dataclasses.replace(rule, spare=True)
          for rule in _gate_rules(older)
      ),
  ]


def _gate_rules(source: str) -> list[Rule]:
  block = "gates[i]"
  return [
      *layout.affine(f"{source}.attn.norm", f"{block}/attention_norm"),
      *_attention_rules(f"{source}.attn", f"{block}/attention"),
      Rule(
          f"{source}.attn_gate",
          f"{block}/attention_gate",
          transforms.leading(1),
      ),
      *_mlp_rules(f"{source}.ff", block),
      Rule(f"{source}.ff_gate", f"{block}/mlp_gate", transforms.leading(1)),
  ]


def _attention_rules(source: str, target: str) -> list[Rule]:
  keys_and_values = (f"{target}/key/kernel", f"{target}/value/kernel")
  return [
      Rule(f"{source}.to_q.weight", f"{target}/query/kernel", LINEAR),
      Rule(f"{source}.to_kv.weight", keys_and_values, LINEAR),
      Rule(
          f"{source}.to_out.weight",
          f"{target}/out/kernel",
          transforms.linear(2),
      ),
  ]


def _mlp_rules(source: str, block: str) -> list[Rule]:
  return [
      *layout.affine(f"{source}.0", f"{block}/mlp_norm"),
      Rule(f"{source}.1.weight", f"{block}/mlp/up/kernel", LINEAR),
      Rule(f"{source}.3.weight", f"{block}/mlp/down/kernel", LINEAR),
  ]


def _decoder_rules(system: Any) -> list[Rule | Ignore]:
  """transformers' names, each block in the layer that OpenFlamingo put it."""
  rules = llm_layout.rules(
      system.llm,
      body="lang_encoder.model",
      head="lang_encoder.lm_head",
      target="llm/",
  )
  found = []
  for rule in rules:
    before, layers, after = rule.source.partition("layers.{i}.")
    if isinstance(rule, Rule) and layers:
      found.append(
          dataclasses.replace(
              rule, source=f"{before}{layers}decoder_layer.{after}"
          )
      )
      found.append(
          dataclasses.replace(
              rule,
              source=f"lang_encoder.old_decoder_blocks.{{i}}.{after}",
              spare=True,
          )
      )
    else:
      found.append(rule)
  return found


def _body(rules: list[Rule | Ignore]) -> str:
  """What the decoder's list of blocks is called."""
  names = (rule.source.partition(".{i}.decoder_layer.") for rule in rules)
  return next(before for before, found, _ in names if found)
