"""LLaVA (Liu et al. 2023) and LLaVA-1.5 (2024): `size=v1.5_7b,stage=align`.

Sizes: see `mmjax.models.llava.SIZES`. Stages: `align`, in which the projector
alone learns to put pictures into words, and `finetune`, in which the language
model learns to talk about them; the tower stays frozen (section 4.2 of the
paper; appendix of LLaVA-1.5, table 9).
"""

from typing import Any

import ml_collections

from mmjax import config as config_lib
from mmjax.models import llava

SIZES = tuple(llava.SIZES)
STAGES = ("align", "finetune")

# (pictures, batch, peak learning rate) of each stage, by version.
_RECIPES = {
    "tiny": dict(align=(128_000, 64, 2e-3), finetune=(256_000, 64, 1e-3)),
    "v1": dict(align=(595_375, 128, 2e-3), finetune=(3 * 157_712, 32, 2e-5)),
    "v1.5": dict(align=(558_128, 256, 1e-3), finetune=(665_298, 128, 2e-5)),
}
# What is trained: the first pattern that matches a parameter decides.
_LIVE = {
    "align": ("projector/.*",),
    "finetune": ("projector/.*", "llm/.*"),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Arguments.

  Args:
    arg: size; stage; init, what to start from: a run directory (of `align` for
      `finetune`), or a directory as transformers saves one.
  """
  arg = config_lib.parse_arg(arg, size="tiny", stage="align", init="")
  config = config_lib.base()
  size = config_lib.pick(llava.SIZES, arg.size, "size")
  live = config_lib.pick(_LIVE, arg.stage, "stage")
  config.system = dict(type="mmjax.models.llava:LLaVA", **size)
  config.objective = dict(type="mmjax.models.llava:answer")
  config.weights = dict(next_token=1.0)
  pictures, config.batch_size, config.lr = _RECIPES[arg.size.split("_")[0]][
      arg.stage
  ]
  config.steps = -(-pictures // config.batch_size)
  config.warmup = max(1, round(0.03 * config.steps))
  adam = dict(
      type="mmjax.train.optim:adamw",
      lr=dict(
          type="mmjax.train.optim:cosine",
          peak=config.get_ref("lr"),
          steps=config.get_ref("steps"),
          warmup=config.get_ref("warmup"),
      ),
      clip=1.0,
  )
  config.optim = (*((pattern, adam) for pattern in live), (".*", None))
  if arg.size != "tiny":
    _scale(config)
  if arg.init:
    config.imports = (
        dict(type="mmjax.train.imports:from_checkpoint", path=arg.init),
    )
  _data(config, arg)
  return config.lock()


def _scale(config: ml_collections.ConfigDict) -> None:
  """What a model of billions of parameters needs besides."""
  config.mesh.update(data=1, fsdp=-1)
  config.system.dtype = "bfloat16"
  config.objective.chunks = 8
  for part in (config.system.vision, config.system.llm):
    part.dtype = "bfloat16"
    part.remat = "full"


def _data(config: ml_collections.ConfigDict, arg: Any) -> None:
  """Captions to align, questions to fine-tune: TinyWorld's, at any size."""
  tower = config.system.vision
  side = tower.image[0]
  task, template = {
      "align": ("SceneCaptions", "plain"),
      "finetune": ("VisualQuestions", "vicuna"),
  }[arg.stage]
  formatter = dict(
      type="mmjax.data.templates:Formatter",
      tokenizer=dict(type="mmjax.data.subwords:load"),
      template=template,
      length=160 if arg.size == "tiny" else 2048,
      image_tokens=(side // tower.patch) ** 2,
  )
  config.streams = (
      dict(
          source=dict(
              type="mmjax.data.conversations:Written",
              source=dict(
                  type=f"mmjax.data.tinyworld:{task}",
                  split="train",
                  size=side,
              ),
              formatter=formatter,
              key="image",
          ),
          weight=1.0,
      ),
  )
