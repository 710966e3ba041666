"""Which examples help a question? Those whose pictures look like its own."""

from typing import Any

import numpy as np

from mmjax.data.batch import Example
from mmjax.data.conversations import Written
from mmjax.data.templates import Turn
from mmjax.evals import answers, figures, run


class Rices:
  """Examples that look like the question, against examples by chance.

  Retrieval-based in-context example selection (Yang et al. 2022; Flamingo,
  section 3.1). `rices` and `random` are the shares of right answers.

  Attributes:
    pool: what examples are chosen from, of one picture and answer each.
    questions: of the same form.
    shots: examples in a prompt.
    supports: how many of the pool there are to choose from.
    examples: how many questions are asked.
    max_new: tokens that an answer may have, its end included.
    batch_size: global batch.
  """

  def __init__(
      self,
      pool: Written,
      questions: Written,
      shots: int = 4,
      supports: int = 256,
      examples: int = 256,
      max_new: int = 8,
      batch_size: int = 32,
  ) -> None:
    """Raises ValueError for more of anything than there is."""
    fits = 1 <= shots <= supports <= len(pool)
    if not fits or not 1 <= examples <= len(questions):
      raise ValueError(
          f"shots={shots}, supports={supports}, examples={examples}: expected "
          f"1 <= shots <= supports <= {len(pool)}, and 1 to {len(questions)} "
          "examples"
      )
    self.pool = pool
    self.questions = questions
    self.shots = shots
    self.supports = supports
    self.examples = examples
    self.max_new = max_new
    self.batch_size = batch_size

  def __call__(
      self, system: Any, variables: Any
  ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns both shares, and some questions behind their examples.

    `system` is an `answers.Writer` with a method `look` besides, which gives
    f32[B, E] of f32[B, H, W, 3].
    """
    features = lambda source, count: run.map_source(
        lambda variables, batch: {
            "seen": system.apply(variables, batch["image"], method="look")
        },
        variables,
        _Pictures(source, count),
        self.batch_size,
    )["seen"]
    rng = np.random.default_rng(0)
    near = nearest(
        features(self.questions, self.examples),
        features(self.pool, self.supports),
        self.shots,
    )
    written = {}
    for name, chosen in (
        ("random", rng.integers(self.supports, size=near.shape)),
        ("rices", near),
    ):
      asked = Written(
          _Behind(self.pool, self.questions, chosen), self.questions.formatter
      )
      evaluator = answers.Answers(
          asked,
          examples=self.examples,
          max_new=self.max_new,
          batch_size=self.batch_size,
      )
      written[name] = evaluator.write(system, variables)
    wanted = [self.questions.answer(i) for i in range(self.examples)]
    metrics = {
        name: answers.exact(own, wanted)["exact"]
        for name, own in written.items()
    }
    return metrics, {"chosen": self._figure(near, written["rices"], wanted)}

  def _figure(
      self, near: np.ndarray, written: list[str], wanted: list[str]
  ) -> np.ndarray:
    """A row for each question: its examples, then itself."""
    pictures, captions, right = [], [], []
    for question, members in enumerate(near[:4].tolist()):
      pictures += [self.pool.pictures(member)[0] for member in members]
      captions += [self.pool.answer(member) for member in members]
      right += [True] * len(members)
      pictures.append(self.questions.pictures(question)[0])
      captions.append(f"{written[question]} ({wanted[question]})")
      right.append(written[question] == wanted[question])
    return figures.captioned_grid(pictures, captions, right, self.shots + 1)


def nearest(
    questions: np.ndarray, pool: np.ndarray, count: int
) -> np.ndarray:
  """The pictures of a pool that are most similar, the nearest last.

  Args:
    questions: f32[Q, E].
    pool: f32[S, E].
    count: how many, at most S.

  Returns:
    i64[Q, count], places in the pool.
  """
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  likeness = unit(questions) @ unit(pool).T
  return np.argsort(likeness, axis=1, kind="stable")[:, -count:]


class _Pictures:
  """The first pictures of a source."""

  def __init__(self, source: Written, count: int) -> None:
    self._source = source
    self._count = count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> Example:
    return {"image": self._source.pictures(index)[0]}


class _Behind:
  """Questions behind examples of a pool, as conversations."""

  def __init__(
      self, pool: Written, questions: Written, chosen: np.ndarray
  ) -> None:
    self._pool = pool
    self._questions = questions
    self._chosen = chosen.tolist()
    self.shown = chosen.shape[1] + 1

  def __len__(self) -> int:
    return len(self._chosen)

  def conversation(self, index: int) -> list[Turn]:
    examples = (
        turn
        for member in self._chosen[index]
        for turn in self._pool.source.conversation(member)
    )
    return [*examples, *self._questions.source.conversation(index)]

  def pictures(self, index: int) -> np.ndarray:
    examples = [self._pool.pictures(member) for member in self._chosen[index]]
    return np.concatenate([*examples, self._questions.pictures(index)])

  def answer(self, index: int) -> str:
    return self._questions.answer(index)

  def labels(self, index: int) -> Example:
    return self._questions.source.labels(index)
