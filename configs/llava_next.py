"""LLaVA-NeXT (Liu et al. 2024): `configs/llava_next.py:size=v1.6_vicuna_7b`.

Sizes: see `mmjax.models.llava_next.SIZES`. Stages: `align`, in which the
projector and the end of a line learn, and `finetune`, in which everything does,
the tower slowest (the report's table of hyper-parameters; its data are those of
LLaVA-1.5 and of documents and charts).
"""

import functools
from typing import Any

import ml_collections

from mmjax import config as config_lib
from mmjax.models import llava_next

SIZES = tuple(llava_next.SIZES)
STAGES = ("align", "finetune")

# (pictures, batch, peak learning rate) of each stage.
_RECIPES = {
    "tiny": dict(align=(19_200, 32, 2e-3), finetune=(38_400, 32, 1e-3)),
    "v1.6": dict(align=(558_128, 256, 1e-3), finetune=(760_000, 128, 1e-5)),
}
_TOWER_LR = 2e-6
# What is trained: the first pattern that matches a parameter decides.
_LIVE = {
    "align": ("newline", "base/projector/.*"),
    "finetune": ("newline", "base/projector/.*", "base/llm/.*"),
}
_CAPTIONS = dict(type="SceneCaptions", counts=(1, 2, 3, 4))
_TALK: dict[str, tuple[tuple[dict[str, Any], float], ...]] = {
    "align": ((_CAPTIONS, 1.0),),
    "finetune": (
        (dict(type="VisualQuestions", exchanges=4), 3.0),
        (dict(type="Dialogues"), 0.5),
        (_CAPTIONS, 0.5),
    ),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Arguments.

  Args:
    arg: size; stage; vision and llm, where the two parts come from: a run of
      configs/clip.py and one of configs/llm.py, or directories as transformers
      saves them; init, where all comes from: a run directory (of `align` for
      `finetune`), or a directory of LLaVA-NeXT's as transformers saves one.
  """
  arg = config_lib.parse_arg(
      arg, size="tiny", stage="align", vision="", llm="", init=""
  )
  config = config_lib.base()
  size = config_lib.pick(llava_next.SIZES, arg.size, "size")
  live = config_lib.pick(_LIVE, arg.stage, "stage")
  config.system = dict(type="mmjax.models.llava_next:LLaVANext", **size)
  config.objective = dict(type="mmjax.models.llava_next:answer")
  config.weights = dict(next_token=1.0)
  pictures, config.batch_size, config.lr = _RECIPES[arg.size.split("_")[0]][
      arg.stage
  ]
  config.steps = -(-pictures // config.batch_size)
  config.warmup = max(1, round(0.03 * config.steps))

  def adam(peak: Any) -> dict[str, Any]:
    return dict(
        type="mmjax.train.optim:adamw",
        lr=dict(
            type="mmjax.train.optim:cosine",
            peak=peak,
            steps=config.get_ref("steps"),
            warmup=config.get_ref("warmup"),
        ),
        clip=1.0,
    )

  peak = config.get_ref("lr")
  tower = None
  if arg.size != "tiny":
    _scale(config)
    if arg.stage == "finetune":
      tower = adam(_TOWER_LR)
  config.optim = (
      *((pattern, adam(peak)) for pattern in live), (".*", tower)
  )  # fmt: skip
  config.imports = _imports(arg)
  _data(config, arg)
  return config.lock()


def _scale(config: ml_collections.ConfigDict) -> None:
  """What a model of billions of parameters needs besides."""
  config.mesh.update(data=1, fsdp=-1)
  config.system.base.dtype = "bfloat16"
  config.objective.chunks = 8
  for part in (config.system.base.vision, config.system.base.llm):
    part.dtype = "bfloat16"
    part.remat = "full"


def _imports(arg: Any) -> tuple[dict[str, Any], ...]:
  """The whole, or its parts: CLIP without its last block, and a decoder."""
  part = functools.partial(dict, type="mmjax.train.imports:from_part")
  found = []
  if arg.vision:
    found.append(
        part(
            path=arg.vision,
            source="vision/encoder/",
            target="base/vision/",
            deeper="base/vision/blocks/.*",
        )
    )
  if arg.llm:
    found.append(part(path=arg.llm, target="base/llm/"))
  if arg.init:
    found.append(
        dict(type="mmjax.train.imports:from_checkpoint", path=arg.init)
    )
  return tuple(found)


def _data(config: ml_collections.ConfigDict, arg: Any) -> None:
  """TinyWorld's scenes, twice as wide as a tile, at any size."""
  tower = config.system.base.vision
  side = 2 * tower.image[0]
  tiny = arg.size == "tiny"
  vicuna = dict(name="vicuna", system="") if tiny else dict(name="vicuna")
  template = dict(name="plain") if arg.stage == "align" else vicuna
  grids = dict(
      type="mmjax.data.anyres:Grids",
      side=tower.image[0],
      patch=tower.patch,
      pinpoints=config.system.pinpoints,
  )
  # A square of four tiles: the whole, and lines with their ends.
  line = side // tower.patch
  rows = line**2 // 4 + line * (line + 1)
  written = functools.partial(
      _written, grids, config.system.base.llm.get_ref("vocab") if tiny else None
  )
  length = rows + (48 if arg.stage == "align" else 80) if tiny else 4096
  hand = dict(split="train", size=side, variety=1.8, warp=0.4)
  config.streams = tuple(
      dict(source=written(source | hand, template, length), weight=weight)
      for source, weight in _TALK[arg.stage]
  )
  asked = dict(type="VisualQuestions", split="test", size=side)
  config.evals = dict(
      questions=dict(
          type="mmjax.evals.answers:Answers",
          source=written(asked, vicuna, rows + 32),
      ),
  ) if tiny else {}  # fmt: skip


def _written(
    grids: dict[str, Any],
    rows: Any,
    source: dict[str, Any],
    template: dict[str, Any],
    length: int,
) -> dict[str, Any]:
  """Conversations of TinyWorld, as LLaVA-NeXT reads and sees them."""
  return dict(
      type="mmjax.data.anyres:Tiled",
      source=dict(source, type=f"mmjax.data.tinyworld:{source['type']}"),
      formatter=dict(
          type="mmjax.data.templates:Formatter",
          tokenizer=dict(type="mmjax.data.subwords:load"),
          template=dict(type="mmjax.data.templates:load", **template),
          length=length,
          truncate=True,
          rows=rows,
      ),
      grids=grids,
  )
