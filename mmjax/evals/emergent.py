"""Do senses meet that were never paired? (ImageBind, sections 4.1 to 4.4)"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.evals import figures, run
from mmjax.evals.zero_shot import ZeroShot, unit


def embeddings(
    system: Any,
    variables: Any,
    source: Any,
    senses: Sequence[str],
    batch_size: int,
) -> dict[str, np.ndarray]:
  """Unit embeddings f32[n, E] of every sense of all examples, and `label`.

  Args:
    system: called with batch keys, returns an attribute for each sense.
    variables: of the system.
    source: examples with the keys `senses` and `label`.
    senses: keys of the batch.
    batch_size: global batch.
  """

  def embed(variables: Any, batch: Any) -> dict[str, Any]:
    given = {sense: batch[sense] for sense in senses}
    found = system.apply(variables, **given)
    return {sense: getattr(found, sense) for sense in senses}

  found = run.map_source(embed, variables, source, batch_size)
  return found | {sense: unit(found[sense]) for sense in senses}


class Emergent:
  """What each sense tells to text, and to the other senses.

  Attributes:
    source: examples with the keys `senses` and `label`, and `said(i)`.
    zero_shot: has `classifier(system, variables)`, unit rows of the classes,
      and their names as `classes`.
    senses: keys of the batch.
    pairs: (query, gallery) of senses to retrieve between.
    shown: queries in the figure.
    batch_size: global batch.
  """

  def __init__(
      self,
      source: Any,
      zero_shot: ZeroShot,
      senses: Sequence[str],
      pairs: Sequence[tuple[str, str]] = (),
      shown: int = 16,
      batch_size: int = 256,
  ) -> None:
    self.source = source
    self.zero_shot = zero_shot
    self.senses = senses
    self.pairs = pairs
    self.shown = shown
    self.batch_size = batch_size

  def __call__(
      self, system: Any, variables: Any
  ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Classifies and retrieves.

    Returns:
      `<sense>_top1`, zero-shot through text; `<query>_to_<gallery>`, how often
      the nearest of the gallery has the query's label; confusion matrices of
      all senses, and the nearest pictures to what was said.
    """
    found = embeddings(
        system, variables, self.source, self.senses, self.batch_size
    )
    label = found["label"]
    classes = self.zero_shot.classifier(system, variables)
    metrics, shown = {}, {}
    for sense in self.senses:
      guess = (found[sense] @ classes.T).argmax(axis=1)
      metrics[f"{sense}_top1"] = float((guess == label).mean())
      shown[sense] = figures.confusion(label, guess, self.zero_shot.classes)
    for query, gallery in self.pairs:
      best = (found[query] @ found[gallery].T).argmax(axis=1)
      right = label[best] == label
      metrics[f"{query}_to_{gallery}"] = float(right.mean())
      if (query, gallery) == ("mel", "image"):
        count = range(min(self.shown, len(best)))
        shown["said"] = figures.captioned_grid(
            [self.source[int(best[i])]["image"] for i in count],
            [f"'{self.source.said(i)[0]}'" for i in count],
            [bool(right[i]) for i in count],
        )
    return metrics, shown


class Arithmetic:
  """Adds speech to a picture, and looks for a picture that has both.

  A picture of one digit plus the speech of another: the nearest picture should
  have the colour of the one and the digit of the other. As in analogies of
  words, pictures of the first digit in its colour are no answers.

  Attributes:
    source: examples with `image`, `mel` and `label`; `look(i)` has `colour` and
      `digit`, `said(i)` the words.
    colours: names of the colours; speech that names one is left out.
    shown: sums in the figure.
    batch_size: global batch.
  """

  def __init__(
      self,
      source: Any,
      colours: Sequence[str],
      shown: int = 16,
      batch_size: int = 256,
  ) -> None:
    self.source = source
    self.colours = colours
    self.shown = shown
    self.batch_size = batch_size

  def __call__(
      self, system: Any, variables: Any
  ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns `both`, `digit` and `colour`: shares of answers that are right.

    And the answers, with the sums below.
    """
    found = embeddings(
        system, variables, self.source, ("image", "mel"), self.batch_size
    )
    count = len(self.source)
    looks = [self.source.look(i) for i in range(count)]
    colour = np.array([look.colour for look in looks])
    digit = np.array([look.digit for look in looks])
    said = [self.source.said(i)[0] for i in range(count)]
    plain = [
        i for i in range(count) if self.colours[colour[i]] not in said[i]
    ]
    sums = [
        (i, j)
        for i in range(count)
        if digit[i] != digit[j := plain[i % len(plain)]]
        and np.any((colour == colour[i]) & (digit == digit[j]))
    ]
    first, second = np.array(sums).T
    query = unit(found["image"][first] + found["mel"][second])
    scores = query @ found["image"].T
    same = (colour == colour[first, None]) & (digit == digit[first, None])
    best = np.where(same, -np.inf, scores).argmax(axis=1)
    right = dict(
        colour=colour[best] == colour[first], digit=digit[best] == digit[second]
    )
    right["both"] = right["colour"] & right["digit"]
    shown = range(min(self.shown, len(sums)))
    figure = figures.captioned_grid(
        [self.source[int(best[i])]["image"] for i in shown],
        [
            f"{self.colours[colour[first[i]]]} {digit[first[i]]} + "
            f"'{said[second[i]]}'"
            for i in shown
        ],
        [bool(right["both"][i]) for i in shown],
    )
    metrics = {name: float(share.mean()) for name, share in right.items()}
    return metrics, {"sums": figure}
