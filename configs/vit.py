"""ViT (Dosovitskiy et al. 2021): `configs/vit.py:size=b16,stage=pretrain`.

Sizes: see `mmjax.models.vit.SIZES`. Stages: `pretrain` (appendix B.1, table 3)
and `finetune` (appendix B.1.1, table 4: higher resolution, a new zero head).
"""

from typing import Any

import ml_collections

from mmjax import config as config_lib
from mmjax.models import vit

SIZES = tuple(vit.SIZES)
STAGES = ("pretrain", "finetune")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Arguments: size; stage; init, what `finetune` starts from."""
  arg = config_lib.parse_arg(arg, size="tiny", stage="pretrain", init="")
  config = config_lib.base()
  size = dict(config_lib.pick(vit.SIZES, arg.size, "size"))
  functions = dict(zip(STAGES, (_pretrain, _finetune)))
  stage = config_lib.pick(functions, arg.stage, "stage")
  config.system = dict(type="mmjax.models.vit:ViT", **size)
  config.objective = dict(type="mmjax.models.vit:classify", smoothing=0.0)
  config.weights = dict(cross_entropy=1.0)
  stage(config, arg)
  side = config.system.image[0]
  config.streams = (
      dict(
          source=dict(
              type="mmjax.data.tinyworld:Classification",
              split="train",
              variety=2.5,
              warp=0.7,
              size=side,
          ),
          weight=1.0,
      ),
  )
  config.evals = dict(
      test=dict(
          type="mmjax.evals.classification:Accuracy",
          source=dict(
              type="mmjax.data.tinyworld:Classification",
              split="test",
              size=side,
          ),
          batch_size=config.batch_size,
      )
  )
  return config.lock()


def _adamw(
    config: ml_collections.ConfigDict, schedule: str, **kwargs: Any
) -> tuple:
  """One rule for all: AdamW with warm-up, decay on kernels only."""
  return (
      (
          ".*",
          dict(
              type="mmjax.train.optim:adamw",
              lr=dict(
                  type=f"mmjax.train.optim:{schedule}",
                  peak=config.get_ref("lr"),
                  steps=config.get_ref("steps"),
                  warmup=config.get_ref("warmup"),
              ),
              **kwargs,
          ),
      ),
  )


def _pretrain(config: ml_collections.ConfigDict, arg: Any) -> None:
  if arg.size == "tiny":
    config.batch_size, config.steps = 128, 5000
    config.lr, config.warmup = 2e-3, 100
    config.optim = _adamw(config, "cosine", weight_decay=0.1, clip=1.0)
    # Eleven writers are few: these help with the hands of the other three.
    config.system.pool = "gap"
    config.objective.smoothing = 0.1
    config.shadow, config.eval_shadow = ((".*", 0.995),), True
    return
  # Table 3, ImageNet-1k row: batch 4096, 300 epochs of 1,281,167 images.
  config.batch_size = 4096
  config.steps = 300 * 1_281_167 // 4096
  config.lr, config.warmup = 3e-3, 10_000
  config.optim = _adamw(config, "cosine", weight_decay=0.3, clip=1.0)
  config.system.dropout = 0.1
  config.system.dtype = "bfloat16"
  config.system.remat = "dots"


def _finetune(config: ml_collections.ConfigDict, arg: Any) -> None:
  # Appendix B.1.1: 384 pixels, or 518 where 14 must divide them.
  side = 64 if arg.size == "tiny" else 518 if "14" in arg.size else 384
  config.system.image = (side, side)
  config.batch_size = 64 if arg.size == "tiny" else 512
  config.steps = 200 if arg.size == "tiny" else 20_000
  config.lr = 0.01 if arg.size == "tiny" else 0.03
  config.warmup = 20 if arg.size == "tiny" else 500
  config.optim = (
      (
          ".*",
          dict(
              type="mmjax.train.optim:sgd",
              lr=dict(
                  type="mmjax.train.optim:cosine",
                  peak=config.get_ref("lr"),
                  steps=config.get_ref("steps"),
                  warmup=config.get_ref("warmup"),
              ),
              momentum=0.9,
              clip=1.0,
          ),
      ),
  )
  if arg.init:
    config.imports = (
        dict(
            type="mmjax.train.imports:from_checkpoint",
            path=arg.init,
            skip="head/.*|pre_logits/.*",
        ),
    )
