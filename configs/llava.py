"""LLaVA (Liu et al. 2023) and LLaVA-1.5 (2024): `size=v1.5_7b,stage=align`.

Sizes: see `mmjax.models.llava.SIZES`. Stages: `align`, in which the projector
alone learns to put pictures into words, and `finetune`, in which the language
model learns to talk about them; the tower stays frozen (section 4.2 of the
paper; appendix of LLaVA-1.5, table 9).
"""

import functools
from typing import Any

import ml_collections

from mmjax import config as config_lib
from mmjax.models import llava

SIZES = tuple(llava.SIZES)
STAGES = ("align", "finetune")

# (pictures, batch, peak learning rate) of each stage, by version.
_RECIPES = {
    "tiny": dict(align=(153_600, 128, 2e-3), finetune=(768_000, 128, 2e-3)),
    "v1": dict(align=(595_375, 128, 2e-3), finetune=(3 * 157_712, 32, 2e-5)),
    "v1.5": dict(align=(558_128, 256, 1e-3), finetune=(665_298, 128, 2e-5)),
}
# What is trained: the first pattern that matches a parameter decides.
_LIVE = {
    "align": ("projector/.*",),
    "finetune": ("projector/.*", "llm/.*"),
}
# What is talked about in each stage: (source, weight). The second is LLaVA's
# mixture of questions, conversations and descriptions.
_QUESTIONS = dict(type="VisualQuestions")
_CAPTIONS = dict(type="SceneCaptions", counts=(1, 2, 3, 4))
_TALK: dict[str, tuple[tuple[dict[str, Any], float], ...]] = {
    "align": ((_CAPTIONS, 1.0),),
    "finetune": (
        (dict(_QUESTIONS, exchanges=4), 3.0),
        (dict(type="Dialogues"), 0.5),
        (_CAPTIONS, 1.0),
    ),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Arguments.

  Args:
    arg: size; stage; vision and llm, where the two parts come from: a run of
      configs/clip.py and one of configs/llm.py, or directories as transformers
      saves them; init, where all comes from: a run directory (of `align` for
      `finetune`), or a directory of LLaVA's as transformers saves one.
  """
  arg = config_lib.parse_arg(
      arg, size="tiny", stage="align", vision="", llm="", init=""
  )
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
  config.imports = _imports(arg)
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


def _imports(arg: Any) -> tuple[dict[str, Any], ...]:
  """The whole, or its parts: CLIP without its last block, and a decoder."""
  found: list[dict[str, Any]] = []
  if arg.vision:
    found.append(
        dict(
            type="mmjax.train.imports:from_part",
            path=arg.vision,
            source="vision/encoder/",
            target="vision/",
            deeper="vision/blocks/.*",
        )
    )
  if arg.llm:
    found.append(
        dict(
            type="mmjax.train.imports:from_part", path=arg.llm, target="llm/"
        )
    )
  if arg.init:
    found.append(
        dict(type="mmjax.train.imports:from_checkpoint", path=arg.init)
    )
  return tuple(found)


def _data(config: ml_collections.ConfigDict, arg: Any) -> None:
  """Captions to align, questions to fine-tune: TinyWorld's, at any size."""
  tower = config.system.vision
  patches = (tower.image[0] // tower.patch) ** 2
  tiny = arg.size == "tiny"
  # Vicuna's opening would be a third of what the tiny model reads.
  vicuna = dict(name="vicuna", system="") if tiny else dict(name="vicuna")
  template = dict(name="plain") if arg.stage == "align" else vicuna
  length = patches + (48 if arg.stage == "align" else 80) if tiny else 2048
  # The published sizes speak with TinyWorld's few words here, too.
  rows = config.system.llm.get_ref("vocab") if tiny else None
  written = functools.partial(_written, patches, rows)
  hand = dict(split="train", size=tower.image[0], variety=1.8, warp=0.4)
  config.streams = tuple(
      dict(
          source=written(source | hand, template, length),
          weight=weight,
      )
      for source, weight in _TALK[arg.stage]
  )
  test = dict(split="test", size=tower.image[0])
  config.evals = dict(
      questions=dict(
          type="mmjax.evals.answers:Answers",
          source=written(_QUESTIONS | test, vicuna, patches + 32),
      ),
      captions=dict(
          type="mmjax.evals.answers:Answers",
          source=written(_CAPTIONS | test, template, patches + 32),
          scores=("scene",),
          examples=256,
          max_new=48,
      ),
  ) if tiny else {}  # fmt: skip


def _written(
    patches: int,
    rows: Any,
    source: dict[str, Any],
    template: dict[str, Any],
    length: int,
) -> dict[str, Any]:
  """Conversations of TinyWorld, as LLaVA reads them."""
  return dict(
      type="mmjax.data.conversations:Written",
      source=dict(source, type=f"mmjax.data.tinyworld:{source['type']}"),
      formatter=dict(
          type="mmjax.data.templates:Formatter",
          tokenizer=dict(type="mmjax.data.subwords:load"),
          template=dict(type="mmjax.data.templates:load", **template),
          length=length,
          image_tokens=patches,
          truncate=True,
          rows=rows,
      ),
      key="image",
  )
