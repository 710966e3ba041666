"""CLIP (Radford et al. 2021): `configs/clip.py:size=b32`.

Sizes: see `mmjax.models.clip.SIZES`. Stages: `contrastive` (section 2.5, tables
18 and 19) and, for l14_336, `highres` (one more epoch at 336 pixels); for
tiny64, `highres` goes from single digits (a run of size=tiny) to scenes.
"""

from typing import Any

import ml_collections

from mmjax import config as config_lib
from mmjax.data import tinyworld
from mmjax.models import clip

SIZES = tuple(clip.SIZES)
STAGES = ("contrastive", "highres")

_PEAK = {
    "tiny": 2e-3, "tiny64": 1e-3,
    "b32": 5e-4, "b16": 5e-4, "l14": 4e-4, "l14_336": 2e-5,
}  # fmt: skip
# In how many parts the towers see a batch of 32,768; so many that 16 chips of
# 16 GB are enough. Fewer are faster where there is more memory.
_CHUNKS = {"b32": 4, "b16": 8, "l14": 32, "l14_336": 64}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Arguments: size; stage; init, a run directory whose parameters to take."""
  arg = config_lib.parse_arg(arg, size="tiny", stage="contrastive", init="")
  config = config_lib.base()
  size = config_lib.pick(clip.SIZES, arg.size, "size")
  config_lib.pick(dict.fromkeys(STAGES), arg.stage, "stage")
  if arg.stage == "highres" and arg.size not in ("l14_336", "tiny64"):
    raise ValueError(
        "stage=highres belongs to size=l14_336 (section 3.2) and tiny64"
    )
  config.system = dict(type="mmjax.models.clip:CLIP", **size)
  config.objective = dict(type="mmjax.models.clip:contrast")
  config.weights = dict(contrastive=1.0)

  config.lr = _PEAK[arg.size]
  if arg.size.startswith("tiny"):
    config.batch_size, config.warmup = 128, 100
    config.steps = 2400
    if arg.size == "tiny64":
      config.batch_size, config.steps = 64, 6000
    adam = dict(b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.1)
    # Not in the paper: the mean of the last steps reads new hands better.
    config.shadow, config.eval_shadow = ((".*", 0.995),), True
  else:
    # Table 18: 32 epochs of 400M pairs; tables 19 and 20.
    epochs = 1 if arg.stage == "highres" else 32
    config.batch_size, config.warmup = 32_768, 2000
    config.steps = epochs * 400_000_000 // 32_768
    adam = dict(b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2)
    config.objective.chunks = _CHUNKS[arg.size]
    # Parameters in shards: whole ones would take 5 GB of every chip.
    config.mesh.update(data=1, fsdp=-1)
    for tower in (config.system.vision, config.system.text):
      tower.dtype = "bfloat16"
      tower.remat = "dots"
  adam |= dict(
      type="mmjax.train.optim:adamw",
      lr=dict(
          type="mmjax.train.optim:cosine",
          peak=config.get_ref("lr"),
          steps=config.get_ref("steps"),
          warmup=config.get_ref("warmup"),
      ),
      # "All weights that are not gains or biases."
      decay=".*(kernel|embedding|table)",
  )
  config.optim = (
      ("logit_scale", dict(adam, maximum=clip.MAX_LOGIT_SCALE)),
      (".*", adam),
  )
  if arg.init:
    config.imports = (_import(arg.size, arg.init),)
  _data(config, arg.size)
  return config.lock()


def _import(size: str, path: str) -> dict[str, Any]:
  """All of a run, or of one of single digits for a tower of scenes."""
  if size != "tiny64":
    return dict(type="mmjax.train.imports:from_checkpoint", path=path)
  return dict(
      type="mmjax.train.imports:from_part",
      path=path,
      longer="text/position/table",
  )


def _data(config: ml_collections.ConfigDict, size: str) -> None:
  """TinyWorld's digits, for `tiny64` scenes too; and what is measured."""
  data = dict(
      size=config.system.vision.image[0],
      tokenizer=dict(
          type="mmjax.data.tokenizers:load",
          length=config.system.text.length,
      ),
  )
  task = "Phrases" if size == "tiny64" else "CaptionedDigits"
  config.streams = (
      dict(
          source=dict(
              type=f"mmjax.data.tinyworld:{task}",
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
  )
