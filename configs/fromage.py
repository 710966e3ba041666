"""FROMAGe (Koh et al. 2023): `configs/fromage.py:size=opt6.7b`.

Sizes: see `mmjax.models.fromage.SIZES`. Stage: `ground`, in which three linear
maps and the row of [RET] are trained between a frozen CLIP and a frozen OPT
(section 4.1 and the official code's arguments).
"""

from typing import Any

import ml_collections

from mmjax import config as config_lib
from mmjax.models import fromage

SIZES = tuple(fromage.SIZES)
STAGES = ("ground",)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Arguments.

  Args:
    arg: size; stage; vision and llm, the runs or transformers directories of
      CLIP and of the language model; trained, a `.safetensors` or `.npz` with
      the official names of what is trained here; init, a run whose parameters
      to take.
  """
  arg = config_lib.parse_arg(
      arg, size="tiny", stage="ground", vision="", llm="", trained="", init=""
  )
  config = config_lib.base()
  size = config_lib.pick(fromage.SIZES, arg.size, "size")
  config_lib.pick(dict.fromkeys(STAGES), arg.stage, "stage")
  config.system = dict(type="mmjax.models.fromage:FROMAGe", **size)
  config.objective = dict(type="mmjax.models.fromage:ground")
  config.weights = dict(caption=1.0, text=1.0, contrastive=1.0)
  # Rows of two pairs each. The batch of the paper is 180 pairs; here it is the
  # next number of rows that splits over 16 devices.
  if arg.size == "tiny":
    config.batch_size, config.steps, config.lr = 64, 1500, 3e-3
  else:
    config.batch_size, config.steps, config.lr = 96, 20_000, 3e-4
    _scale(config)
  config.warmup = 100
  config.optim = (
      ("(vision|llm)/.*", None),
      (
          ".*",
          dict(
              type="mmjax.train.optim:adamw",
              lr=dict(
                  type="mmjax.train.optim:cosine",
                  peak=config.get_ref("lr"),
                  steps=config.get_ref("steps"),
                  warmup=config.get_ref("warmup"),
              )
              if arg.size == "tiny"
              # A tenth after the last epoch: it does not fall in these steps.
              else dict(
                  type="mmjax.train.optim:linear",
                  peak=config.get_ref("lr"),
                  steps=config.get_ref("steps"),
                  warmup=config.get_ref("warmup"),
                  end=config.get_ref("lr"),
              ),
              b1=0.9,
              b2=0.95,
              clip=1.0,
              like_rows=dict(ret_row="llm/embed/embedding"),
          ),
      ),
  )
  config.imports = tuple(_imports(arg))
  _data(config)
  return config.lock()


def _scale(config: ml_collections.ConfigDict) -> None:
  """What a model of billions of parameters needs besides."""
  config.mesh.update(data=1, fsdp=-1)
  config.frozen_dtype = "bfloat16"
  config.system.dtype = "bfloat16"
  config.objective.chunks = 4
  for part in (config.system.vision, config.system.llm):
    part.dtype, part.remat = "bfloat16", "full"


def _imports(arg: Any) -> list[dict[str, Any]]:
  found = []
  part = "mmjax.train.imports:from_part"
  if arg.init:
    found.append(
        dict(type="mmjax.train.imports:from_checkpoint", path=arg.init)
    )
  if arg.vision:
    found += [
        dict(type=part, path=arg.vision, source=name, target=name)
        for name in ("vision/encoder/", "vision/norm/")
    ]
  if arg.llm:
    # OPT's table has rows that no token has; those behind [RET] are left out.
    table = "llm/embed/embedding"
    cut = {} if arg.size == "tiny" else dict(deeper=table, longer=table)
    found.append(dict(type=part, path=arg.llm, target="llm/", **cut))
  if arg.trained:
    found.append(
        dict(type="mmjax.models.fromage:from_official", path=arg.trained)
    )
  return found


def _data(config: ml_collections.ConfigDict) -> None:
  """Dialogues that lead to pictures, at any size."""
  side = config.system.vision.image[0]
  length = 48
  formatter = lambda template: dict(
      type="mmjax.data.templates:Formatter",
      tokenizer=dict(type="mmjax.data.subwords:load"),
      template=template,
      length=length,
      image_tokens=config.system.slots,
  )
  config.streams = (
      dict(
          source=dict(
              type="mmjax.data.grounding:Grounding",
              source=dict(
                  type="mmjax.data.tinyworld:RetrievalDialogues",
                  split="train",
                  size=side,
                  variety=1.8,
                  warp=0.4,
              ),
              caption=formatter("fromage_caption"),
              search=formatter("fromage_retrieval"),
              length=4 * length,
          ),
          weight=1.0,
      ),
  )
  config.evals = dict(
      retrieval=dict(
          type="mmjax.evals.dialogue_retrieval:DialogueRetrieval",
          source=dict(
              type="mmjax.data.conversations:Written",
              source=dict(
                  type="mmjax.data.tinyworld:dialogue_retrieval_set",
                  split="test",
                  size=side,
              ),
              formatter=formatter("fromage_retrieval"),
          ),
      ),
  )
