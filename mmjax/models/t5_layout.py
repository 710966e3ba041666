"""What does transformers call a T5 and its parts? Config and tensors.

For `models.t5.T5`, and for every system that holds one: its directories have
the same tensors behind a prefix, and the same config as one of its parts.
"""

from collections.abc import Mapping
import math
from typing import Any

from mmjax import config
from mmjax.nn import linear
from mmjax.weights import layout
from mmjax.weights.layout import Ignore, Rule
from mmjax.weights.transforms import LINEAR

# The tensor of a head of its own.
HEAD = "lm_head.weight"

# Where a config.json is silent, transformers takes these (`T5Config`).
_DEFAULTS: dict[str, Any] = dict(
    vocab_size=32_128,
    d_model=512,
    d_kv=64,
    d_ff=2048,
    num_layers=6,
    num_decoder_layers=None,
    num_heads=8,
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    layer_norm_epsilon=1e-6,
    feed_forward_proj="relu",
    dense_act_fn=None,
    tie_word_embeddings=True,
    scale_decoder_outputs=None,
    decoder_start_token_id=0,
)
# Our attributes by the words of transformers.
_SAME = dict(
    vocab_size="vocab",
    d_model="width",
    d_kv="head_dim",
    d_ff="mlp",
    num_layers="encoder_depth",
    num_decoder_layers="decoder_depth",
    num_heads="heads",
    relative_attention_num_buckets="buckets",
    relative_attention_max_distance="longest",
    layer_norm_epsilon="epsilon",
    decoder_start_token_id="start",
)


def attributes(hf: Mapping[str, Any], own_head: bool) -> dict[str, Any]:
  """The attributes of the `T5` that a config.json describes.

  Args:
    hf: the config, or the `text_config` of a system that holds a T5.
    own_head: whether there is a tensor for the head. The config of
      transformers 5 does not say: its T5 is tied where the tensor is missing.

  Raises:
    ValueError: for something in the config that our T5 has not.
  """
  given = {key: hf[key] for key in _DEFAULTS if hf.get(key) is not None}
  hf = _DEFAULTS | given
  found = {ours: hf[theirs] for theirs, ours in _SAME.items()}
  if found["decoder_depth"] is None:
    found["decoder_depth"] = found["encoder_depth"]
  gate, _, name = hf["feed_forward_proj"].rpartition("-")
  if gate not in ("", "gated"):
    raise ValueError(
        f"feed_forward_proj is {hf['feed_forward_proj']!r}; expected an "
        "activation, alone or behind 'gated-'"
    )
  if gate and name == "gelu":
    name = "gelu_new"
  found["mlp_kind"] = "gated" if gate else "plain"
  found["activation"] = hf["dense_act_fn"] or name
  config.pick(linear.ACTIVATIONS, found["activation"], "activation")
  own = own_head or not hf["tie_word_embeddings"]
  found["readout"] = "own" if own else "tied"
  scaled = hf["scale_decoder_outputs"]
  if scaled is None:
    scaled = hf["tie_word_embeddings"]
  found["logit_scale"] = found["width"] ** -0.5 if scaled else 1.0
  return found


def config_of(system: Any) -> dict[str, Any]:
  """The config.json of a `T5`, which transformers 4 and 5 understand.

  Raises:
    ValueError: for an output scale that they have no word for.
  """
  scaled = not math.isclose(system.logit_scale, 1.0)
  usual = system.width**-0.5
  if scaled and not math.isclose(system.logit_scale, usual):
    raise ValueError(
        f"logit_scale is {system.logit_scale}: transformers' T5 has 1 or "
        f"width ** -0.5 = {usual}"
    )
  name = system.activation
  if system.mlp_kind == "gated":
    name = "gated-gelu" if name == "gelu_new" else f"gated-{name}"
  return dict(
      architectures=["T5ForConditionalGeneration"],
      model_type="t5",
      is_encoder_decoder=True,
      pad_token_id=system.start,
      feed_forward_proj=name,
      dense_act_fn=system.activation,
      tie_word_embeddings=system.readout == "tied",
      scale_decoder_outputs=scaled,
      **{theirs: getattr(system, ours) for theirs, ours in _SAME.items()},
  )


def rules(
    system: Any, *, prefix: str = "", target: str = ""
) -> list[Rule | Ignore]:
  """Rules for a `T5`, alone or as a part of something.

  Args:
    system: the T5.
    prefix: what the names of its tensors begin with, ending in a dot if not
      empty.
    target: what our paths begin with, ending in a slash if not empty.
  """
  found: list[Rule | Ignore] = [
      Rule(f"{prefix}shared.weight", f"{target}embed/embedding"),
      # Copies of the table, which some files keep.
      Ignore(rf"{prefix}(encoder|decoder)\.embed_tokens\.weight"),
      # A bias that old files have for the attention to the encoder; no release
      # of the model reads it.
      Ignore(rf"{prefix}decoder\..*\.EncDecAttention\.relative_.*"),
  ]
  if system.readout == "own":
    found.append(Rule(f"{prefix}{HEAD}", f"{target}head/kernel", LINEAR))
  gated = system.mlp_kind == "gated"
  for stack, cross in (("encoder", ()), ("decoder", ("cross",))):
    theirs, ours = f"{prefix}{stack}", f"{target}{stack}"
    block = f"{theirs}.block.{{i}}.layer"
    own = f"{theirs}.block.0.layer.0.SelfAttention"
    found += [
        Rule(f"{own}.relative_attention_bias.weight", f"{ours}/position/table"),
        Rule(f"{theirs}.final_layer_norm.weight", f"{ours}/norm/scale"),
    ]
    names = ("SelfAttention", "EncDecAttention")
    for number, part in enumerate(("attention", *cross)):
      found += _attention(
          f"{block}.{number}.{names[number]}", f"{ours}/blocks[i]/{part}"
      )
    for number, part in enumerate(("attention", *cross, "mlp")):
      found.append(
          Rule(
              f"{block}.{number}.layer_norm.weight",
              f"{ours}/blocks[i]/{part}_norm/scale",
          )
      )
    projections = dict(up="wi", down="wo")
    if gated:
      projections = dict(gate="wi_0", up="wi_1", down="wo")
    for mine, their in projections.items():
      found.append(
          Rule(
              f"{block}.{1 + len(cross)}.DenseReluDense.{their}.weight",
              f"{ours}/blocks[i]/mlp/{mine}/kernel",
              LINEAR,
          )
      )
  return found


def _attention(source: str, target: str) -> list[Rule]:
  """The four projections, none of which has a bias."""
  names = dict(query="q", key="k", value="v", out="o")
  return [
      layout.dense(
          f"{source}.{theirs}", f"{target}/{ours}", 2 if ours == "out" else 1
      )[0]
      for ours, theirs in names.items()
  ]
