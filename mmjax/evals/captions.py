"""How much of a caption is right? By what TinyWorld reads, and by overlap."""

from collections.abc import Sequence
import importlib
from typing import Any

import numpy as np

from mmjax.data.tinyworld import text


def scene(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
  """What captions of scenes say: shares of all that the scenes hold.

  Returns:
    `scene`, the share of captions that say everything right, and `digits`,
    `colours` and `layout` of what is said in its place.
  """
  whole, layout, digits, colours = [], [], [], []
  for said, true in zip(written, wanted, strict=True):
    said, true = text.read_scene(said), text.read_scene(true)
    if true is None:
      raise ValueError("a wanted caption describes no scene")
    whole.append(said == true)
    layout.append(said is not None and said.layout == true.layout)
    for field, found in (("digits", digits), ("colours", colours)):
      ours = getattr(said, field, ())
      theirs = getattr(true, field)
      # What is missing is wrong; what is too much counts against the layout.
      ours = (*ours, *(None,) * len(theirs))
      found += [a == b for a, b in zip(ours, theirs)]
  parts = dict(scene=whole, layout=layout, digits=digits, colours=colours)
  return {name: float(np.mean(found)) for name, found in parts.items()}


def look(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
  """What captions of one digit say, where the wanted ones say it.

  Returns:
    `digit`, `colour`, `size` and `ground`: of the captions that were to name
    it, the share that name it rightly and only so.
  """
  found: dict[str, list[bool]] = {}
  for said, true in zip(written, wanted, strict=True):
    said, true = text.read_look(said), text.read_look(true)
    for name, value in true.items():
      found.setdefault(name, []).append(said.get(name) == value)
  return {name: float(np.mean(right)) for name, right in found.items()}


def bleu(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
  """BLEU-4 (Papineni et al. 2002) of the whole set, 0 to 100, by sacrebleu.

  Raises:
    ValueError: if sacrebleu is not there.
  """
  sacrebleu = _library("sacrebleu", "bleu")
  found = sacrebleu.corpus_bleu(list(written), [list(wanted)])
  return {"bleu": float(found.score)}


def cider(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
  """CIDEr-D (Vedantam et al. 2015) over the set, 0 to 10, by pycocoevalcap.

  Words are what stands between spaces, in lower case; how rare one is says the
  set of wanted captions.

  Raises:
    ValueError: if pycocoevalcap is not there.
  """
  scorer = _library("pycocoevalcap.cider.cider", "cider").Cider()
  split = lambda texts: {i: [t.lower()] for i, t in enumerate(texts)}
  score, _ = scorer.compute_score(split(wanted), split(written))
  return {"cider": float(score)}


def _library(name: str, score: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    package = name.partition(".")[0]
    raise ValueError(
        f"the score '{score}' needs {package}: pip install {package}, or "
        'pip install "mmjax[captions]"'
    ) from error
