"""What does the official code call FROMAGe and its parts?

Its checkpoints keep only what was trained; beside them lie CLIP and OPT. A
directory of ours holds everything under the official names, and a config.json
with the official arguments (`model_args.json`) and the configs of the parts.
"""

from collections.abc import Mapping
import re
from typing import Any

from mmjax.models import clip_layout, llm_layout
from mmjax.weights import layout
from mmjax.weights.layout import Ignore, Rule, Table
from mmjax.weights.transforms import leading

ARCHITECTURE = "FromageModel"
# Of the official code: what the trained names begin with, with and without the
# wrapper that holds the bank of pictures.
_PREFIXES = ("model.", "")


def config_of(system: Any) -> dict[str, Any]:
  """The config.json of a `FROMAGe`."""
  return dict(
      architectures=[ARCHITECTURE],
      model_type="fromage",
      n_visual_tokens=system.slots,
      shared_emb_dim=system.joint,
      text_emb_layers=[-1],
      retrieval_token_idx=system.ret,
      vision_config=clip_layout.encoder_config(system.vision.encoder),
      text_config=llm_layout.config_of(system.llm),
  )


def attributes(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The numbers of a `FROMAGe`, from its config.json.

  Raises:
    ValueError: if states of other layers than the last are read.
  """
  if hf.get("text_emb_layers", [-1]) != [-1]:
    raise ValueError(
        f"text_emb_layers is {hf['text_emb_layers']}; expected [-1], the last"
    )
  return dict(
      ret=hf["retrieval_token_idx"],
      joint=hf["shared_emb_dim"],
      slots=hf["n_visual_tokens"],
  )


def trained_table(system: Any) -> Table:
  """The names of the official checkpoints, which hold no CLIP and no OPT."""
  del system  # The names are the same for every size.
  rules: list[Rule | Ignore] = [
      Rule("ret_input_embeddings.weight", "ret_row", leading(1))
  ]
  for prefix in _PREFIXES:
    rules += [
        Rule(f"{prefix}logit_scale", "logit_scale"),
        *layout.dense(f"{prefix}text_hidden_fcs.0.0", "text_joint"),
        *layout.dense(f"{prefix}visual_fc", "image_joint"),
        *layout.dense(f"{prefix}visual_embeddings", "words"),
    ]
  return rules


def table(system: Any) -> Table:
  """The names of the whole model, as its state dict has them."""
  rules = list(trained_table(system))
  for prefix in _PREFIXES:
    # transformers 4, and 5.
    for tower in ("visual_model.vision_model.", "visual_model."):
      rules += [
          *clip_layout.encoder_rules(f"{prefix}{tower}", "vision/encoder/"),
          *layout.affine(f"{prefix}{tower}post_layernorm", "vision/norm"),
      ]
    rules += [
        *llm_layout.rules(
            system.llm,
            body=f"{prefix}lm.model",
            head=f"{prefix}lm.lm_head",
            target="llm/",
        ),
        # A second name of the token table.
        Ignore(re.escape(f"{prefix}input_embeddings.weight")),
    ]
  return rules
