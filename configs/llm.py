"""Language models alone: `configs/llm.py:size=tiny`.

Sizes: see `mmjax.models.llm.SIZES`. Stage: `pretrain`, on texts about TinyWorld
in which descriptions stand where multimodal systems show pictures. The
published sizes have the recipe of LLaMA 2 (Touvron et al. 2023b, section 2.2),
without its two trillion tokens.
"""

from typing import Any

import ml_collections

from mmjax import config as config_lib
from mmjax.models import llm

SIZES = tuple(llm.SIZES)
STAGES = ("pretrain",)

_TINYWORLD = "mmjax.data.tinyworld:"
_COUNTS = (1, 2, 3, 4)


def _told(
    task: str, digit_only: float = 0.0, **options: Any
) -> dict[str, Any]:
  """A task in words: descriptions stand for its pictures."""
  source = dict(type=task, **options)
  return dict(type="Told", digit_only=digit_only, source=source)


# Vicuna's opening would be a third of what is read here.
_VICUNA = dict(name="vicuna", system="")
_FLAMINGO = dict(name="flamingo", before={}, answer="")
# What is read, in which template, how often, and how many documents at most
# stand in a row of 256 tokens.
_TOLD: tuple[tuple[dict[str, Any], dict[str, Any], float, int], ...] = (
    # What stood before comes again, at once and by the word before it: nothing
    # teaches sooner to look there, which all answers below need.
    (dict(type="Echoes"), dict(name="plain", mute=()), 2.0, 24),
    (_told("FewShot", 1.0), dict(name="plain", mute=()), 1.0, 9),
    (_told("FewShot", 1.0), _FLAMINGO, 2.0, 9),
    # Captions one after the other, and dialogues.
    (_told("InterleavedDocuments"), dict(name="plain"), 0.25, 12),
    (_told("SceneCaptions", counts=_COUNTS), dict(name="opt"), 0.25, 24),
    (dict(type="RetrievalDialogues"), dict(name="opt"), 0.5, 10),
    # Captions behind what they describe.
    *(
        (
            _told("SceneCaptions", counts=_COUNTS), dict(name=name, mute=()),
            0.5, 10,
        )
        for name in ("plain", "opt")
    ),
    (_told("InterleavedDocuments"), _FLAMINGO, 0.5, 8),
    # Questions and answers: few tokens, and the most to learn.
    (dict(type="Quizzes", exchanges=6, weight=3.0), _VICUNA, 4.0, 3),
    (_told("VisualQuestions"), _VICUNA, 0.5, 8),
    (_told("Dialogues"), _VICUNA, 0.5, 5),
)  # fmt: skip


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Arguments: size; stage; init, a run or directory to start from."""
  arg = config_lib.parse_arg(arg, size="tiny", stage="pretrain", init="")
  config = config_lib.base()
  size = config_lib.pick(llm.SIZES, arg.size, "size")
  config_lib.pick(dict.fromkeys(STAGES), arg.stage, "stage")
  config.system = dict(type="mmjax.models.llm:Decoder", **size)
  config.objective = dict(type="mmjax.models.llm:next_token_packed")
  config.weights = dict(next_token=1.0)
  if arg.size == "tiny":
    length, decay, config.lr = 256, 0.01, 2e-3
    config.batch_size, config.steps, config.warmup = 32, 8000, 100
  else:
    length, decay, config.lr = min(4096, config.system.length), 0.1, 3e-4
    config.batch_size, config.steps, config.warmup = 1024, 500_000, 2000
    config.mesh.update(data=1, fsdp=-1)
    config.system.dtype, config.system.remat = "bfloat16", "full"
    config.objective.chunks = 8
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
          b2=0.95,
          weight_decay=decay,
          decay=".*(kernel|embedding|table)",
          clip=1.0,
      ),
  ),)
  if arg.init:
    config.imports = (
        dict(type="mmjax.train.imports:from_checkpoint", path=arg.init),
    )
  config.streams = tuple(
      dict(
          source=dict(
              type="mmjax.data.pack:Filled",
              source=_written(source, template, "train", length),
              length=length,
              each=each,
          ),
          weight=weight,
      )
      for source, template, weight, each in _TOLD
  )
  config.evals = _evals(length) if arg.size == "tiny" else {}
  return config.lock()


def _written(
    source: dict[str, Any], template: dict[str, Any], split: str, length: int
) -> dict[str, Any]:
  """The texts of a source of TinyWorld."""
  return dict(
      type="mmjax.data.conversations:Written",
      source=_placed(source, split),
      formatter=dict(
          type="mmjax.data.templates:Formatter",
          tokenizer=dict(type="mmjax.data.subwords:load"),
          template=dict(type="mmjax.data.templates:load", **template),
          length=length,
      ),
  )


def _placed(source: dict[str, Any], split: str) -> dict[str, Any]:
  source = dict(source, type=_TINYWORLD + source["type"])
  if "source" in source:
    return source | dict(source=_placed(source["source"], split))
  return source | dict(split=split)


def _evals(length: int) -> dict[str, Any]:
  """Right answers about descriptions, and right words in episodes."""
  asked = {
      "questions": (_told("VisualQuestions"), _VICUNA),
      "dialogues": (_told("Dialogues"), _VICUNA),
      "episodes": (_told("FewShot", 1.0), _FLAMINGO),
  }
  return {
      name: dict(
          type="mmjax.evals.answers:Answers",
          source=_written(source, template, "test", length),
          examples=512,
      )
      for name, (source, template) in asked.items()
  }
