"""Does a system learn from the examples in its prompt? (Flamingo, section 3.1)

An example is a picture with its answer. More of them before a question should
make its answer better, without any training.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmjax.data.batch import Example
from mmjax.data.conversations import Conversations, Written
from mmjax.data.templates import IMAGE, Turn
from mmjax.evals import answers, run

_PAPER, _INK, _GRID = (255, 255, 255), (30, 30, 30), (225, 225, 225)
_TONES = ((40, 90, 200), (200, 110, 40))


class FewShot:
  """Answers behind several numbers of examples: `exact_<n>`, `choice_<n>`.

  An answer is written greedily (`exact`), and chosen as the likeliest of those
  that its episode knows (`choice`, the paper's closed-ended tasks).

  Attributes:
    source: episodes of pictures and answers by turns, the question last.
    shots: numbers of examples: the last ones of each episode.
    examples: how many episodes are asked; all by default.
    blind: examples of which only the text is told where there are no others,
      to say what an answer looks like (section 3.1 of the paper).
    max_new: tokens that an answer may have, its end included.
    batch_size: global batch.
  """

  def __init__(
      self,
      source: Written,
      shots: Sequence[int] = (0, 4, 8),
      examples: int | None = None,
      blind: int = 2,
      max_new: int = 8,
      batch_size: int = 32,
  ) -> None:
    """Raises ValueError for more examples than the episodes have."""
    most = source.source.shown - 1
    if not shots or not all(0 <= n <= most for n in (*shots, blind)):
      raise ValueError(
          f"shots={tuple(shots)}, blind={blind}: expected 0 to {most}, the "
          f"examples of an episode"
      )
    self.source = source
    self.shots = tuple(shots)
    self.examples = len(source) if examples is None else examples
    self.blind = blind
    self.max_new = max_new
    self.batch_size = batch_size

  def __call__(
      self, system: Any, variables: Any
  ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns the scores, their curve, and the questions with most examples."""
    metrics, pictures = {}, {}
    for count in self.shots:
      asked = self.behind(count)
      evaluator = answers.Answers(
          asked,
          examples=self.examples,
          max_new=self.max_new,
          batch_size=self.batch_size,
      )
      found, pictures = evaluator(system, variables)
      metrics[f"exact_{count}"] = found["exact"]
      chosen = self._choose(system, variables, asked)
      wanted = [asked.answer(i) for i in range(self.examples)]
      metrics[f"choice_{count}"] = answers.exact(chosen, wanted)["exact"]
    curves = {
        name: [metrics[f"{name}_{count}"] for count in self.shots]
        for name in ("exact", "choice")
    }
    return metrics, {"curve": curve(self.shots, curves)} | pictures

  def behind(self, shots: int) -> Written:
    """The questions behind so many examples."""
    episodes = _Behind(self.source.source, shots, self.blind)
    return Written(episodes, self.source.formatter)

  def _choose(
      self, system: Any, variables: Any, asked: Written
  ) -> list[str]:
    """The likeliest of the answers that each whole episode knows."""
    known = [_known(self.source, i) for i in range(self.examples)]
    words = sorted(set().union(*known))
    # Every prompt ends as the others do, and so do its answers begin.
    ids = [answer_ids(asked, 0, word) for word in words]
    lengths = np.asarray([len(own) for own in ids], np.int32)
    options = np.zeros((len(words), lengths.max()), np.int32)
    for row, own in zip(options, ids, strict=True):
      row[: len(own)] = own

    def score(variables: Any, batch: Any) -> dict[str, Any]:
      found = log_likelihood(system, variables, batch, options, lengths)
      return {"scores": found}

    prompts = answers.Prompts(asked, self.examples)
    found = run.map_source(score, variables, prompts, self.batch_size)
    places = [[words.index(word) for word in own] for own in known]
    return [
        words[max(own, key=scores.__getitem__)]
        for own, scores in zip(places, found["scores"], strict=True)
    ]


class _Behind:
  """Episodes cut to the question and the last examples before it."""

  def __init__(self, source: Conversations, shots: int, blind: int) -> None:
    self._source = source
    self._blind = 0 if shots else blind
    self.shown = shots + 1

  def __len__(self) -> int:
    return len(self._source)

  def conversation(self, index: int) -> list[Turn]:
    turns = [Turn(*turn) for turn in self._source.conversation(index)]
    shown = turns[-2 * self.shown :]
    told = turns[-2 * (self.shown + self._blind) : -2 * self.shown]
    hide = lambda turn: turn._replace(text=turn.text.replace(IMAGE, ""))
    return [*map(hide, told), *shown]

  def pictures(self, index: int) -> np.ndarray:
    return self._source.pictures(index)[-self.shown :]

  def answer(self, index: int) -> str:
    return self._source.answer(index)

  def labels(self, index: int) -> Example:
    return self._source.labels(index)


def _known(source: Written, index: int) -> set[str]:
  """The answers of a whole episode."""
  turns = (Turn(*turn) for turn in source.source.conversation(index))
  return {turn.text for turn in turns if turn.role == "assistant"}


def answer_ids(asked: Written, index: int, answer: str) -> list[int]:
  """The tokens of an answer behind a prompt, its end included."""
  shown = asked.source.shown
  turns = asked.source.conversation(index)[:-1]
  prompt = asked.formatter.prompt(turns, shown)
  whole = asked.formatter.row([*turns, Turn("assistant", answer)], shown)
  begin, end = ((row["segment"] > 0).sum() for row in (prompt, whole))
  return whole["tokens"][begin:end].tolist()


def log_likelihood(
    system: Any,
    variables: Any,
    batch: Mapping[str, jax.Array],
    options: np.ndarray,
    lengths: np.ndarray,
) -> jax.Array:
  """How likely each answer is behind each prompt, in nats.

  The prompts and their pictures are read once.

  Args:
    system: see `evals.answers.Writer`.
    variables: of the system.
    batch: what its `prefill` reads; `segment` is 1 on the prompts.
    options: i32[K, T], tokens of the answers.
    lengths: i32[K], how many of them are real, at least 1.

  Returns:
    f32[B, K].
  """
  prompts, width = len(batch["tokens"]), options.shape[1]
  steps = answers.writer(system, variables, batch, width)
  first, state = steps.prefill(steps.tokens, steps.valid, steps.state)
  last = jnp.clip(steps.valid - 1, 0, first.shape[1] - 1)[:, None, None]
  first = jnp.take_along_axis(first, last, axis=1)

  def score(option: tuple[jax.Array, jax.Array]) -> jax.Array:
    tokens, real = option
    tokens = jnp.broadcast_to(tokens, (prompts, width))
    rest, _ = steps.step(tokens, jnp.full(prompts, real), state)
    logits = jnp.concatenate([first, rest[:, :-1]], axis=1)
    found = jnp.take_along_axis(
        jax.nn.log_softmax(logits.astype(jnp.float32)), tokens[..., None], -1
    )
    return jnp.where(jnp.arange(width) < real, found[..., 0], 0).sum(axis=1)

  pairs = jnp.asarray(options), jnp.asarray(lengths, jnp.int32)
  return jax.lax.map(score, pairs).T


def curve(
    places: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    side: int = 320,
) -> np.ndarray:
  """Shares over the number of examples, u8[side, side, 3]."""
  font, margin = ImageFont.load_default(12), 40
  sheet = Image.new("RGB", (side, side), _PAPER)
  draw = ImageDraw.Draw(sheet)
  span, most = side - 2 * margin, max(*places, 1)
  at = lambda x, y: (margin + span * x / most, side - margin - span * y)
  for share in (0.0, 0.25, 0.5, 0.75, 1.0):
    draw.line((at(0, share), at(most, share)), _GRID)
    draw.text((6, at(0, share)[1] - 7), f"{share:.2f}", _INK, font)
  for place in places:
    x, y = at(place, 0)
    draw.text((x - 4, y + 6), f"{place}", _INK, font)
  for number, (name, shares) in enumerate(curves.items()):
    points = [at(x, y) for x, y in zip(places, shares, strict=True)]
    tone = _TONES[number % len(_TONES)]
    draw.line(points, tone, 2)
    draw.text((margin + 6, margin + 16 * number), name, tone, font)
  draw.text((margin, side - 18), "examples in the prompt", _INK, font)
  return np.asarray(sheet)
