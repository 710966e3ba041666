"""Encoder-decoders: T5, T5 1.1 and Flan-T5, `configs/t5.py:size=tiny`.

Sizes: see `mmjax.models.t5.SIZES`; Flan-T5 has those of T5 1.1. Stage:
`pretrain`, texts with holes (Raffel et al. 2020, section 3.1.4) and, at size
`tiny`, answers about descriptions that stand where multimodal systems show
pictures, as in Flan (Chung et al. 2022). The published sizes are here to be
compiled; their batch and steps are those of the paper's final models (section
3.7), their optimizer is AdamW instead of Adafactor.
"""

from typing import Any

import ml_collections

from mmjax import config as config_lib
from mmjax.models import t5

SIZES = tuple(t5.SIZES)
STAGES = ("pretrain",)

_TINYWORLD = "mmjax.data.tinyworld:"
_CAPTIONS = dict(type="SceneCaptions", counts=(1, 2, 3, 4))
_CAPTION = dict(name="blip2_t5", mute=())
_VICUNA = dict(name="vicuna", system="")
# What the encoder reads and the decoder goes on with: a source whose pictures
# are told, in which template, how often.
_ANSWERED: tuple[tuple[dict[str, Any], dict[str, Any], float], ...] = (
    (_CAPTIONS, _CAPTION, 3.0),
    (dict(type="VisualQuestions"), _VICUNA, 3.0),
    (dict(type="Dialogues"), _VICUNA, 1.0),
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Arguments: size; stage; init, a run or directory to start from."""
  arg = config_lib.parse_arg(arg, size="tiny", stage="pretrain", init="")
  config = config_lib.base()
  size = config_lib.pick(t5.SIZES, arg.size, "size")
  config_lib.pick(dict.fromkeys(STAGES), arg.stage, "stage")
  config.system = dict(type="mmjax.models.t5:T5", **size)
  config.objective = dict(type="mmjax.models.t5:write")
  config.weights = dict(next_token=1.0)
  if arg.size == "tiny":
    length, targets, config.lr, decay = 96, 48, 3e-3, 0.01
    config.batch_size, config.steps, config.warmup = 32, 2400, 100
  else:
    length, targets, config.lr, decay = 512, 128, 1e-3, 0.0
    config.batch_size, config.steps, config.warmup = 2048, 1_000_000, 10_000
    config.mesh.update(data=1, fsdp=-1)
    config.system.dtype, config.system.remat = "bfloat16", "full"
    config.objective.chunks = 4
  config.optim = ((
      ".*",
      dict(
          type="mmjax.train.optim:adamw",
          lr=dict(
              type="mmjax.train.optim:cosine",
              peak=config.get_ref("lr"),
              steps=config.get_ref("steps"),
              warmup=config.get_ref("warmup"),
          ),
          b1=0.9,
          b2=0.98,
          weight_decay=decay,
          decay=".*(kernel|embedding)",
          clip=1.0,
      ),
  ),)
  if arg.init:
    config.imports = (
        dict(type="mmjax.train.imports:from_checkpoint", path=arg.init),
    )
  config.streams = tuple(_streams(length, targets, config.system.vocab))
  if arg.size == "tiny":
    config.evals = _evals(length)
  return config.lock()


def _streams(length: int, targets: int, vocab: int) -> list[dict[str, Any]]:
  """Holes in captions that follow each other; captions and answers."""
  texts = dict(type="InterleavedDocuments")
  holes = dict(
      type="mmjax.data.seq2seq:Corrupted",
      source=_written(texts, dict(name="plain"), "train", 512),
      length=length,
      target_length=targets,
      # In the rows of the table behind those of the tokenizer.
      marker=vocab - 1,
      end=1,
  )
  answers = [
      dict(
          source=dict(
              type="mmjax.data.seq2seq:Answered",
              source=_written(source, template, "train", length),
              target_length=targets,
              begun=0.3 if template is _CAPTION else 0.0,
          ),
          weight=weight,
      )
      for source, template, weight in _ANSWERED
  ]
  return [dict(source=holes, weight=1.0), *answers]


def _written(
    source: dict[str, Any], template: dict[str, Any], split: str, length: int
) -> dict[str, Any]:
  """A source of TinyWorld with words in place of its pictures."""
  source = dict(source, type=_TINYWORLD + source["type"], split=split)
  return dict(
      type="mmjax.data.conversations:Written",
      source=dict(type=f"{_TINYWORLD}Told", source=source),
      formatter=dict(
          type="mmjax.data.templates:Formatter",
          tokenizer=dict(type="mmjax.data.subwords:load"),
          template=dict(type="mmjax.data.templates:load", **template),
          length=length,
      ),
  )


def _evals(length: int) -> dict[str, Any]:
  """Right captions of descriptions, and right answers about them."""
  asked = {
      "captions": (_CAPTIONS, _CAPTION, ("scene",), 48),
      "questions": (dict(type="VisualQuestions"), _VICUNA, ("exact",), 8),
      "dialogues": (dict(type="Dialogues"), _VICUNA, ("exact",), 8),
  }
  return {
      name: dict(
          type="mmjax.evals.answers:Answers",
          source=_written(source, template, "test", length),
          scores=scores,
          examples=512,
          max_new=new,
      )
      for name, (source, template, scores, new) in asked.items()
  }
