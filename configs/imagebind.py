"""ImageBind (Girdhar et al. 2023): `configs/imagebind.py:size=tiny,stage=bind`.

Sizes: see `mmjax.models.imagebind.SIZES`. Stages: `align`, pictures and text as
in CLIP (tiny only: the paper takes OpenCLIP's towers), and `bind`, which binds
speech, depth, heat and movement to pictures while the towers of pictures and
text stay frozen (section 3.2, appendix B). Not in the paper: `lora`, which goes
on from `bind` with low-rank updates alone (Hu et al. 2022).
"""

import ml_collections

from mmjax import config as config_lib
from mmjax.data import tinyworld
from mmjax.data.tinyworld import text
from mmjax.models import imagebind

SIZES = tuple(imagebind.SIZES)
STAGES = ("align", "bind", "lora")

# (batch, steps, warm-up, peak learning rate) of each stage. The paper trains
# each pair apart, for 64 epochs (8 for movement) of its own data; here all are
# trained at once, for as long as speech is there.
_RECIPES = {
    "tiny": dict(
        align=(128, 2000, 100, 2e-3),
        bind=(128, 800, 100, 2e-3),
        lora=(128, 400, 20, 2e-3),
    ),
    "huge": dict(
        bind=(2048, 64 * 2_000_000 // 2048, 2 * 2_000_000 // 2048, 1.6e-3),
        lora=(512, 5000, 100, 2e-4),
    ),
}
# What is trained.
_LIVE = {
    "align": "(vision|text)/.*|text_scale",
    "bind": "(audio|depth|thermal|imu)/.*",
    "lora": ".*/low_(in|out)",
}
_RANK = 4
# What a stage does not take from the one before: these begin anew.
_SKIP = {
    "align": None,
    "bind": "(audio|depth|thermal|imu)/.*",
    "lora": ".*/low_(in|out)",
}
_WEIGHTS = {
    "align": dict(text=1.0),
    "bind": dict.fromkeys(imagebind.BOUND, 1.0),
    "lora": dict.fromkeys(imagebind.BOUND, 1.0),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Arguments.

  Args:
    arg: size; stage; init, what to start from: for `bind` a run of `align`, for
      `lora` one of `bind`; or a checkpoint with the official names.
  """
  arg = config_lib.parse_arg(arg, size="tiny", stage="bind", init="")
  config = config_lib.base()
  size = config_lib.pick(imagebind.SIZES, arg.size, "size")
  live = config_lib.pick(_LIVE, arg.stage, "stage")
  if arg.stage not in _RECIPES[arg.size]:
    raise ValueError(
        f"stage={arg.stage} belongs to size=tiny: the paper has the towers of "
        "OpenCLIP ViT-H/14 instead"
    )
  config.system = dict(type="mmjax.models.imagebind:ImageBind", **size)
  if arg.stage == "lora":
    for name in ("audio", "depth", "thermal", "imu"):
      config.system[name].rank = _RANK
  compared = "align" if arg.stage == "align" else "bind"
  config.objective = dict(type=f"mmjax.models.imagebind:{compared}")
  config.weights = _WEIGHTS[arg.stage]
  recipe = _RECIPES[arg.size][arg.stage]
  config.batch_size, config.steps, config.warmup, config.lr = recipe
  adam = dict(
      type="mmjax.train.optim:adamw",
      lr=dict(
          type="mmjax.train.optim:cosine",
          peak=config.get_ref("lr"),
          steps=config.get_ref("steps"),
          warmup=config.get_ref("warmup"),
      ),
      b1=0.9,
      b2=0.98 if arg.stage == "align" else 0.95,
      weight_decay=0.1 if arg.size == "tiny" else 0.2,
      decay=".*(kernel|embedding|table)",
  )
  config.optim = ((live, adam), (".*", None))
  if arg.size == "tiny":
    # Not in the paper: the mean of the last steps reads new hands better.
    config.shadow, config.eval_shadow = ((".*", 0.995),), True
  else:
    config.mesh.update(data=1, fsdp=-1)
    for name in ("vision", "text", "audio", "depth", "thermal", "imu"):
      tower = config.system[name]
      tower.dtype, tower.remat = "bfloat16", "full"
      if "stem" in tower:
        tower.stem.dtype = "bfloat16"
  if arg.init:
    config.imports = (
        dict(
            type="mmjax.train.imports:from_checkpoint",
            path=arg.init,
            skip=_SKIP[arg.stage],
        ),
    )
  _data(config, arg.stage)
  return config.lock()


def _data(config: ml_collections.ConfigDict, stage: str) -> None:
  """Captioned digits, and digits with all their companions."""
  vision, audio, imu = (
      config.system[name] for name in ("vision", "audio", "imu")
  )
  side = vision.grid[0] * vision.stem.patch
  bands, frames = (
      (windows - 1) * audio.stem.stride + audio.stem.patch
      for windows in audio.grid
  )
  tokenizer = dict(
      type="mmjax.data.tokenizers:load", length=config.system.text.length
  )
  seen = dict(size=side, tokenizer=tokenizer)
  strays = dict(split="train", variety=1.8, warp=0.4)
  zero_shot = dict(
      type="mmjax.evals.zero_shot:ZeroShot",
      source=dict(
          type="mmjax.data.tinyworld:Classification", split="test", size=side
      ),
      tokenizer=tokenizer,
      classes=tinyworld.CLASSES,
      templates=tinyworld.TEMPLATES,
      batch_size=config.batch_size,
  )
  if stage == "align":
    source = dict(type="mmjax.data.tinyworld:CaptionedDigits", **strays, **seen)
    config.evals = dict(
        zero_shot=zero_shot,
        retrieval=dict(
            type="mmjax.evals.retrieval:Retrieval",
            source=dict(
                type="mmjax.data.tinyworld:retrieval_set", split="test", **seen
            ),
            batch_size=config.batch_size,
        ),
    )
  else:
    here = "mmjax.data.tinyworld.senses"
    seen.update(mel=(frames, bands), samples=imu.grid[0] * imu.stem.patch)
    source = dict(
        type=f"{here}:Senses", frames=0, masked=bands // 8, **strays, **seen
    )
    test = dict(split="test", **seen)
    config.evals = dict(
        emergent=dict(
            type="mmjax.evals.emergent:Emergent",
            source=dict(type=f"{here}:Senses", **test),
            zero_shot=zero_shot,
            senses=("image", "video", *imagebind.BOUND),
            pairs=(
                ("mel", "image"), ("mel", "depth"), ("depth", "thermal"),
                ("imu", "mel"), ("thermal", "imu"),
            ),
            batch_size=config.batch_size,
        ),
        arithmetic=dict(
            type="mmjax.evals.emergent:Arithmetic",
            source=dict(type=f"{here}:sensed_looks", n=320, frames=0, **test),
            colours=text.COLOURS,
            batch_size=config.batch_size,
        ),
    )  # fmt: skip
  config.streams = (dict(source=source, weight=1.0),)
