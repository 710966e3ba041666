"""Flamingo (Alayrac et al. 2022): `configs/flamingo.py:size=tiny`.

Sizes: see `mmjax.models.flamingo.SIZES`. Stage: `train`, on a mixture of
interleaved documents and captioned pictures, whose losses are summed in every
step (section 2.4); the resampler and the gated blocks learn, the tower and the
decoder do not. At size `tiny` a third data set joins them: episodes that define
invented words by examples, for the few-shot learning that the paper's web pages
bring about at their scale.
"""

from typing import Any

import ml_collections

from mmjax import config as config_lib
from mmjax.models import flamingo

SIZES = tuple(flamingo.SIZES)
STAGES = ("train",)

_TINYWORLD = "mmjax.data.tinyworld:"
# Pictures that a row may show, at any size: eight examples and a question.
_SLOTS = 9


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Arguments.

  Args:
    arg: size; stage; vision, a run of `configs/clip.py` or a directory as
      transformers saves a CLIP; llm, a run of `configs/llm.py` or a directory
      of a decoder; trained, a file of OpenFlamingo's; init, a run of this file
      to go on from.
  """
  arg = config_lib.parse_arg(
      arg, size="tiny", stage="train", vision="", llm="", trained="", init=""
  )
  config = config_lib.base()
  size = config_lib.pick(flamingo.SIZES, arg.size, "size")
  config_lib.pick(dict.fromkeys(STAGES), arg.stage, "stage")
  config.system = dict(type="mmjax.models.flamingo:Flamingo", **size)
  sets = ("documents", "captions")
  # Of M3W and of ALIGN (appendix B.1).
  config.weights = dict(next_token_documents=1.0, next_token_captions=0.2)
  if arg.size == "tiny":
    sets = (*sets, "episodes")
    config.weights.update(next_token_captions=1.0, next_token_episodes=1.0)
    config.batch_size, config.steps = 32, 1200
    config.lr, config.warmup = 2e-3, 100
  else:
    # Constant after the warm-up. The batch is that of the documents' rows,
    # which hold several captions each.
    config.batch_size, config.steps = 2048, 500_000
    config.lr, config.warmup = 1e-4, 5000
    _scale(config)
  config.objective = dict(
      type="mmjax.models.flamingo:next_token",
      sets=sets,
      chunks=1 if arg.size == "tiny" else 8,
  )
  config.optim = (
      ("resampler/.*", _adam(config, 0.0, arg.size)),
      ("gates/.*", _adam(config, 0.1, arg.size)),
      (".*", None),
  )
  config.imports = _imports(arg)
  _data(config, arg.size)
  return config.lock()


def _adam(
    config: ml_collections.ConfigDict, decay: float, size: str
) -> dict[str, Any]:
  """AdamW, whose decay only the gated blocks know (appendix B.1.3)."""
  schedule = dict(
      type="mmjax.train.optim:cosine",
      peak=config.get_ref("lr"),
      steps=config.get_ref("steps"),
      warmup=config.get_ref("warmup"),
  )
  if size != "tiny":
    schedule["end"] = config.get_ref("lr")
  return dict(
      type="mmjax.train.optim:adamw",
      lr=schedule,
      weight_decay=decay,
      decay=".*kernel",
      clip=1.0,
  )


def _imports(arg: Any) -> tuple[dict[str, Any], ...]:
  """Where the parts that stay frozen come from."""
  if arg.init:
    return (dict(type="mmjax.train.imports:from_checkpoint", path=arg.init),)
  part = "mmjax.train.imports:from_part"
  found = []
  if arg.vision:
    source = dict(source="vision/encoder/", target="vision/")
    found.append(dict(type=part, path=arg.vision, **source))
  if arg.llm:
    # A decoder may lack rows for the tokens that OpenFlamingo adds.
    longer = "llm/(embed/embedding|head/kernel)"
    found.append(dict(type=part, path=arg.llm, target="llm/", longer=longer))
  if arg.trained:
    official = "mmjax.models.flamingo:from_official"
    found.append(dict(type=official, path=arg.trained))
  return tuple(found)


def _scale(config: ml_collections.ConfigDict) -> None:
  """What a model of billions of parameters needs besides."""
  config.mesh.update(data=1, fsdp=-1)
  config.frozen_dtype = "bfloat16"
  system = config.system
  for part in (system, system.vision, system.llm, system.resampler):
    part.dtype = "bfloat16"
    part.remat = "full"


def _data(config: ml_collections.ConfigDict, size: str) -> None:
  """TinyWorld's documents, captions and episodes, at any size."""
  length = 64 if size == "tiny" else 256
  template = dict(name="flamingo")
  if size == "tiny":
    # A text right behind its picture: what a tiny decoder can look up is what
    # stood next to it.
    template |= dict(before={}, answer="")
  formatter = dict(
      type="mmjax.data.templates:Formatter",
      tokenizer=dict(type="mmjax.data.subwords:load"),
      template=dict(type="mmjax.data.templates:load", **template),
      length=length,
  )

  def written(task: str, split: str, **options: Any) -> dict[str, Any]:
    side = config.system.vision.image[0]
    source = dict(type=_TINYWORLD + task, split=split, size=side, **options)
    return dict(
        type="mmjax.data.conversations:Written",
        source=source,
        formatter=formatter,
    )

  hands = dict(variety=1.8, warp=0.4)
  # Data set, share of the rows, documents in a row at most, what they are.
  streams = [
      ("documents", 0.2, 3, "InterleavedDocuments", dict(count=3)),
      ("captions", 0.4, _SLOTS, "InterleavedDocuments", dict(count=1)),
  ]
  if size == "tiny":
    streams += [
        ("episodes", 0.2, 1, "FewShot", dict(shots=_SLOTS - 1, ways=ways))
        for ways in (4, 8)
    ]
  config.streams = tuple(
      dict(
          source=dict(
              type="mmjax.data.pack:Filled",
              source=written(task, "train", **hands, **options),
              length=length,
              each=each,
              slots=_SLOTS,
          ),
          weight=share,
          transform=dict(
              type="mmjax.data.interleaved:Mark",
              kind=config.objective.sets.index(name),
              ahead=0.5 if name == "documents" else 0.0,
          ),
      )
      for name, share, each, task, options in streams
  )
  if size == "tiny":
    config.evals = dict(
        few_shot=dict(
            type="mmjax.evals.few_shot:FewShot",
            source=written("FewShot", "test", shots=_SLOTS - 1, ways=8),
            shots=(0, 4, 8),
            examples=386,
        ),
        examples=dict(
            type="mmjax.evals.rices:Rices",
            pool=written("NamedDigits", "train"),
            questions=written("NamedDigits", "test"),
        ),
    )
