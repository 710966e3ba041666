"""BLIP-2 (Li et al. 2023): `configs/blip2.py:size=opt2.7b,stage=decode`.

Sizes: see `mmjax.models.blip2.SIZES`. Stages:
- `qformer`, the first: contrast, matching and writing before a frozen encoder
  of pictures (section 3.1);
- `decode` and `t5`, the second: soft prompts of a frozen decoder, or of a
  frozen encoder-decoder that reads the beginning of a text and writes the rest
  (section 3.2);
- `vqa`, at size `tiny` only: questions, which the Q-Former reads too (section
  4.3; there the encoder of pictures is tuned as well, here it stays frozen).

A published size has the second stage of its language model. Hyper-parameters:
section 3.4; the last learning rate of the first stage is that of the official
code.
"""

from typing import Any

import ml_collections

from mmjax import config as config_lib
from mmjax.models import blip2

SIZES = tuple(blip2.SIZES)
STAGES = ("qformer", "decode", "t5", "vqa")

_MODEL = "mmjax.models.blip2:"
_FIRST = "mmjax.models.blip2_pretrain:"
_TINYWORLD = "mmjax.data.tinyworld:"
# The system and the objective of each stage, and the term that is trained.
_SECOND = {
    "decode": ("BLIP2", "describe"),
    "t5": ("BLIP2T5", "go_on"),
    "vqa": ("BLIP2", "describe"),
}
# (batch, steps, warm-up, peak and last learning rate) by stage.
_TINY = {
    "qformer": (64, 6000, 100, 2e-3, 0.0),
    "decode": (64, 5000, 60, 2e-3, 0.0),
    "t5": (64, 1200, 60, 2e-3, 0.0),
    "vqa": (64, 2000, 60, 2e-3, 0.0),
}
_PUBLISHED = {
    "qformer": (1680, 250_000, 2000, 1e-4, 1e-5),
    "decode": (1920, 80_000, 2000, 1e-4, 5e-5),
    "t5": (1520, 80_000, 2000, 1e-4, 5e-5),
}
# Of a Q-Former what the second stage has no use for: what reads and writes.
_WRITES = r"qformer/(transform|transform_norm|bias)/.*"
_READS = r"qformer/(embed|position)/.*|qformer/.*/text_mlp(_norm)?/.*"
_JUDGES = r"(vision_projection|text_projection|match_head)/.*"


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Arguments.

  Args:
    arg: size; stage; vision, a run of `configs/clip.py` or a directory as
      transformers saves a CLIP (of `qformer`, at size `tiny`); stage1, a run of
      `qformer`; stage2, a run of `decode` (of `vqa`); llm, a run of
      `configs/llm.py` or `configs/t5.py`, or a directory of such a model; init,
      a run of this stage or a public checkpoint of it to go on from.
  """
  arg = config_lib.parse_arg(
      arg, size="tiny", stage="qformer", vision="", stage1="", stage2="",
      llm="", init="",
  )  # fmt: skip
  config = config_lib.base()
  size = config_lib.pick(blip2.SIZES, arg.size, "size")
  tiny = arg.size == "tiny"
  recipe = config_lib.pick(
      _TINY if tiny else _PUBLISHED, arg.stage, "stage"
  )
  if arg.stage == "qformer":
    _first_stage(config, size)
  else:
    _second_stage(config, size, arg)
  config.batch_size, config.steps, config.warmup, config.lr, last = recipe
  if arg.size.startswith("vitl") and arg.stage == "qformer":
    config.batch_size = 2320
  adam = dict(
      type="mmjax.train.optim:adamw",
      lr=dict(
          type="mmjax.train.optim:cosine",
          peak=config.get_ref("lr"),
          steps=config.get_ref("steps"),
          warmup=config.get_ref("warmup"),
          end=last,
      ),
      b1=0.9,
      b2=0.98,
      weight_decay=0.05,
      decay=".*(kernel|embedding|table|qformer/query)",
  )
  config.optim = ((r"(model/vision|vision|llm)/.*", None), (".*", adam))
  if tiny and arg.stage == "qformer":
    # A few steps of that length would lead it below zero.
    config.optim = (("temperature", dict(adam, lr=1e-4)), *config.optim)
  config.imports = _imports(arg)
  if not tiny:
    _scale(config)
  _data(config, arg)
  return config.lock()


def _first_stage(
    config: ml_collections.ConfigDict, size: dict[str, Any]
) -> None:
  """A system that compares, matches and writes."""
  parts = {key: size[key] for key in ("vision", "qformer", "embed")
           if key in size}
  config.system = dict(
      type=f"{_FIRST}Pretraining",
      model=dict(type=f"{_FIRST}ImageText", **parts),
  )
  config.objective = dict(type=f"{_FIRST}represent")
  config.weights = dict(contrastive=1.0, matching=1.0, next_token=1.0)


def _second_stage(
    config: ml_collections.ConfigDict, size: dict[str, Any], arg: Any
) -> None:
  """A system with a language model."""
  kind, objective = _SECOND[arg.stage]
  llm = "t5" if arg.stage == "t5" else "llm"
  if llm not in size:
    offered = sorted({"t5", "llm"} & set(size))
    raise ValueError(
        f"stage={arg.stage} needs a size with {llm}, and size={arg.size} has "
        f"{offered}"
    )
  config.system = dict(
      type=_MODEL + kind,
      vision=size["vision"],
      qformer=size["qformer"],
      llm=size[llm],
  )
  config.objective = dict(type=_MODEL + objective)
  config.weights = dict(next_token=1.0)


def _imports(arg: Any) -> tuple[dict[str, Any], ...]:
  """Where the parts come from; of what two have, the later is taken."""
  if arg.init:
    return (dict(type="mmjax.train.imports:from_checkpoint", path=arg.init),)
  asks = arg.stage == "vqa"
  first = "|".join([_WRITES, _JUDGES, *([] if asks else [_READS])])
  parts = {
      "vision": dict(
          source="vision/encoder/",
          target="model/vision/",
          deeper="model/vision/blocks/.*",
      ),
      "stage1": dict(source="model/", skip=rf"(llm|projection)/.*|{first}"),
      "llm": dict(target="llm/"),
      "stage2": dict(skip=_READS),
  }
  return tuple(
      dict(type="mmjax.train.imports:from_part", path=arg[name], **part)
      for name, part in parts.items()
      if arg[name]
  )


def _scale(config: ml_collections.ConfigDict) -> None:
  """What a model of billions of parameters needs besides."""
  config.mesh.update(data=1, fsdp=-1)
  config.frozen_dtype = "bfloat16"
  config.objective.chunks = 8
  system = config.system
  system = system.get("model", system)
  system.dtype = "bfloat16"
  system.qformer.dropout = 0.1
  for part in ("vision", "qformer", "llm"):
    if part in system:
      system[part].dtype = "bfloat16"
      system[part].remat = "full"


def _data(config: ml_collections.ConfigDict, arg: Any) -> None:
  """Captions, or questions: TinyWorld's, at any size."""
  system = config.system.get("model", config.system)
  image = system.vision.get("image", (224, 224))
  if arg.stage == "qformer":
    config.streams = _captioned(config, arg, image[0])
  else:
    source = _conversations(config, arg, image[0])
    config.streams = (dict(source=source, weight=1.0),)


def _captioned(
    config: ml_collections.ConfigDict, arg: Any, side: int
) -> tuple[dict[str, Any], ...]:
  """Pictures with captions; a retrieval set of scenes that look alike."""
  tokenizer = dict(type="mmjax.data.tokenizers:load", length=32)
  options = dict(size=side, tokenizer=tokenizer)
  if arg.size == "tiny":
    config.evals = dict(
        retrieval=dict(
            type="mmjax.evals.matching:Reranked",
            source=dict(
                type=f"{_TINYWORLD}LookAlikes", split="test", **options
            ),
        )
    )
  options |= dict(split="train", variety=1.8)
  scenes = dict(type=f"{_TINYWORLD}CaptionedScenes", **options)
  # The web's pictures have doubles that differ in little; among scenes drawn at
  # random a bag of words is enough.
  alike = dict(
      type=f"{_TINYWORLD}LookAlikes", n=256, seed=1, length=2**20, **options
  )
  return dict(source=scenes, weight=0.5), dict(source=alike, weight=0.5)


def _conversations(
    config: ml_collections.ConfigDict, arg: Any, side: int
) -> dict[str, Any]:
  """Pictures to describe, or to answer questions about."""
  asks, reads = arg.stage == "vqa", arg.stage == "t5"
  template = dict(
      type="mmjax.data.templates:load",
      name="vicuna" if asks else "blip2_t5" if reads else "opt",
  )
  if arg.size == "tiny":
    # What these language models are used to: a prompt behind the picture, and
    # no opening.
    template |= dict(system="") if asks else dict(mute=())
  formatter = dict(
      type="mmjax.data.templates:Formatter",
      tokenizer=dict(type="mmjax.data.subwords:load"),
      template=template,
      length=128 if asks else 80,
      image_tokens=config.system.qformer.get("queries", 32),
  )

  def written(split: str, **options: Any) -> dict[str, Any]:
    task = "VisualQuestions" if asks else "SceneCaptions"
    source = dict(
        type=_TINYWORLD + task, split=split, size=side, **options
    )
    if asks:
      source = dict(
          type="mmjax.data.asked:Asked",
          source=source,
          tokenizer=dict(type="mmjax.data.tokenizers:load", length=32),
      )
    return dict(
        type="mmjax.data.conversations:Written",
        source=source,
        formatter=formatter,
        key="image",
    )

  if arg.size == "tiny":
    config.evals = dict(
        answers=dict(
            type="mmjax.evals.answers:Answers",
            source=written("test"),
            scores=("exact",) if asks else ("scene",),
            examples=512,
            max_new=8 if asks else 48,
        )
    )
  train = written("train", variety=1.8, warp=0.4)
  if reads:
    train = dict(
        type="mmjax.data.seq2seq:Answered",
        source=train,
        target_length=48,
        begun=0.5,
    )
  return train
