"""SigLIP (Zhai et al. 2023) and SigLIP 2: `configs/siglip.py:size=b16`.

Stages: `sigmoid`, SigLIP, with the sizes of `mmjax.models.siglip.SIZES`; and
`siglip2` (Tschannen et al. 2025), with those of
`mmjax.models.siglip2_training.SIZES`: captions from the first step on, a
teacher in the last fifth.
"""

from typing import Any

import ml_collections

from mmjax import config as config_lib
from mmjax.data import tinyworld
from mmjax.models import siglip, siglip2_training

SIZES = tuple(dict.fromkeys((*siglip.SIZES, *siglip2_training.SIZES)))
STAGES = ("sigmoid", "siglip2")

_SYSTEMS = {
    "sigmoid": ("mmjax.models.siglip:SigLIP", siglip.SIZES),
    "siglip2": (
        "mmjax.models.siglip2_training:SigLIP2", siglip2_training.SIZES
    ),
}
# How each stage reads texts through a vocabulary of its own.
_TEXTS = {
    "sigmoid": dict(end="</s>", pad="</s>", punctuation=False),
    "siglip2": dict(end="<eos>", pad="<pad>"),
}
# In how many parts the towers see a batch of 32,768.
_CHUNKS = {
    "b32": 16, "b16": 16, "b16_256": 16, "l16": 64, "so400m14": 64,
    "so400m14_384": 128, "g16": 128,
}  # fmt: skip
# SigLIP 2, section 2.3: what both losses of the teacher are multiplied by.
_TEACHER = {
    "tiny": 0.25, "b32": 0.25, "b16": 0.25, "l16": 0.5, "so400m14": 1.0,
    "g16": 0.5,
}  # fmt: skip


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Arguments.

  Args:
    arg: size; stage, by default the first that has the size; text, the
      sentencepiece `.model` or `tokenizer.json` of the published vocabulary
      (English for `sigmoid`, of many languages for `siglip2`) in the place of
      TinyWorld's; init, a run directory whose parameters to take.
  """
  arg = config_lib.parse_arg(arg, size="tiny", stage="", text="", init="")
  config = config_lib.base()
  if not arg.stage:
    arg.unlock()
    arg.stage = "sigmoid" if arg.size in siglip.SIZES else "siglip2"
  system, sizes = config_lib.pick(_SYSTEMS, arg.stage, "stage")
  size = config_lib.pick(sizes, arg.size, f"size (stage={arg.stage})")
  config.system = dict(type=system, **size)
  config.objective = dict(type="mmjax.models.siglip:contrast")
  config.weights = dict(sigmoid=1.0)
  _optimize(config, arg)
  if arg.stage == "siglip2":
    _add_recipe(config, arg)
  if arg.init:
    config.imports = (
        dict(type="mmjax.train.imports:from_checkpoint", path=arg.init),
    )
  _feed(config, arg)
  return config.lock()


def _optimize(config: ml_collections.ConfigDict, arg: Any) -> None:
  config.lr = 1e-3
  if arg.size == "tiny":
    config.lr = 5e-4
    config.batch_size, config.steps, config.warmup = 64, 9600, 100
    # In a step the weights lose lr times the decay, about as much as CLIP's.
    adam = dict(b1=0.9, b2=0.95, weight_decay=0.3, clip=1.0)
    # Not in the paper: the mean of the last steps reads new hands better.
    config.shadow, config.eval_shadow = ((".*", 0.995),), True
  else:
    # SigLIP 2, section 2.1: 40B examples in batches of 32k.
    config.batch_size, config.warmup = 32_768, 20_000
    config.steps = 40_000_000_000 // 32_768
    adam = dict(b1=0.9, b2=0.95, weight_decay=1e-4, clip=1.0)
    config.objective.chunks = _CHUNKS[arg.size]
    # Parameters in shards: whole ones would take most of a chip.
    config.mesh.update(data=1, fsdp=-1)
    for name, part in config.system.items():
      if name != "type":
        part.dtype = "bfloat16"
      if name in ("vision", "text", "decoder"):
        part.remat = "dots"
  config.optim = (
      (
          ".*",
          dict(
              type="mmjax.train.optim:adamw",
              lr=dict(
                  type="mmjax.train.optim:cosine",
                  peak=config.get_ref("lr"),
                  steps=config.get_ref("steps"),
                  warmup=config.get_ref("warmup"),
              ),
              decay=".*(kernel|embedding|table)",
              **adam,
          ),
      ),
  )


def _add_recipe(config: ml_collections.ConfigDict, arg: Any) -> None:
  """The losses of SigLIP 2 beside the sigmoid one."""
  image, patch = config.system.vision.image[0], config.system.vision.patch
  length = config.system.text.length
  config.objective = dict(
      type="mmjax.models.siglip2_training:train",
      # The teacher comes at 80 % of training.
      begin=config.get_ref("steps") * 4 // 5,
      # DINO's crops of 96 of 224 pixels, in whole patches.
      side=round(image * 96 / 224 / patch) * patch,
      chunks=1 if arg.size == "tiny" else _CHUNKS[arg.size],
      # 256,000 logits a word.
      caption_chunks=1 if arg.size == "tiny" else length // 8,
  )
  factor = _TEACHER[arg.size]
  config.weights = dict(
      sigmoid=1.0, caption=1.0, local=1.0 * factor, hidden=2.5 * factor
  )
  if arg.size != "tiny":
    config.shadow = (
        ("(vision|image_projector|patch_projector)/.*", 0.996),
    )


def _feed(config: ml_collections.ConfigDict, arg: Any) -> None:
  """Streams and evaluators, of TinyWorld."""
  length = config.system.text.length
  tokenizer = dict(type="mmjax.data.tokenizers:load", length=length)
  if arg.text:
    tokenizer = dict(
        type="mmjax.data.texts:Texts",
        path=arg.text,
        length=length,
        rows=config.system.text.vocab,
        **_TEXTS[arg.stage],
    )
  data = dict(size=config.system.vision.image[0], tokenizer=tokenizer)
  config.streams = (
      dict(
          source=dict(
              type="mmjax.data.tinyworld:CaptionedDigits",
              split="train",
              variety=1.8,
              warp=0.4,
              **data,
          ),
          weight=1.0,
      ),
  )
  config.evals = dict(
      zero_shot=dict(
          type="mmjax.evals.zero_shot:ZeroShot",
          source=dict(
              type="mmjax.data.tinyworld:Classification",
              split="test",
              size=data["size"],
          ),
          tokenizer=data["tokenizer"],
          classes=tinyworld.CLASSES,
          templates=tinyworld.TEMPLATES,
          batch_size=config.batch_size,
      ),
      retrieval=dict(
          type="mmjax.evals.retrieval:Retrieval",
          source=dict(
              type="mmjax.data.tinyworld:retrieval_set", split="test", **data
          ),
          batch_size=config.batch_size,
      ),
      # Linear probes of patches: what SigLIP 2's recipe is for.
      dense=dict(
          type="mmjax.evals.probe:LinearProbe",
          train=dict(
              type="mmjax.data.tinyworld:SegmentedDigits",
              split="train",
              size=data["size"],
              length=1000,
          ),
          test=dict(
              type="mmjax.data.tinyworld:SegmentedDigits",
              split="test",
              size=data["size"],
              length=1000,
          ),
          patch=config.system.vision.patch,
          batch_size=config.batch_size,
      ),
  )
