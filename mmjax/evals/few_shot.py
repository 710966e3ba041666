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

from mmjax.data.conversations import Written
from mmjax.data.templates import IMAGE, Turn
from mmjax.evals import answers, figures, run
from mmjax.sampling import autoregressive, decoding

_PAPER, _INK, _LINE = (255, 255, 255), (30, 30, 30), (40, 90, 200)


class FewShot:
  """Answers behind several numbers of examples: `exact_<n>`, `choice_<n>`.

  An answer is written greedily (`exact`), and chosen as the likeliest of those
  that its episode knows (`choice`, the paper's closed-ended tasks).

  Attributes:
    source: episodes whose conversation is pictures and words by turns, the
      question last; they show at least as many examples as are asked for, of
      which the nearest to the question are taken.
    shots: numbers of examples.
    examples: how many episodes are asked; all by default.
    blind: examples of which only the text is shown where there are no others,
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
    wrong = [n for n in (*shots, blind) if not 0 <= n <= most]
    if wrong:
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
    wanted = [self.source.answer(i) for i in range(self.examples)]
    metrics, written = {}, []
    for count in self.shots:
      prompts = _Prompts(self.source, count, self.blind, self.examples)
      written, chosen = self._ask(system, variables, prompts)
      right = lambda found: float(np.mean([a == b for a, b in found]))
      metrics[f"exact_{count}"] = right(zip(written, wanted))
      metrics[f"choice_{count}"] = right(zip(chosen, wanted))
    rows = range(min(16, self.examples))
    grid = figures.captioned_grid(
        [self.source.pictures(i)[-1] for i in rows],
        [f"{written[i]} ({wanted[i]})" for i in rows],
        [written[i] == wanted[i] for i in rows],
    )
    curves = {
        name: [metrics[f"{name}_{count}"] for count in self.shots]
        for name in ("exact", "choice")
    }
    return metrics, {"curve": curve(self.shots, curves), "answers": grid}

  def _ask(
      self, system: Any, variables: Any, prompts: "_Prompts"
  ) -> tuple[list[str], list[str]]:
    """The answers that are written, and those that are chosen."""
    formatter = self.source.formatter
    settings = decoding.Decoding(self.max_new, stop=formatter.ends())
    options = [prompts.options(i) for i in range(self.examples)]
    # Every prompt ends as the others do, and so do its answers begin.
    words = sorted({word for own in options for word in own})
    ids = {word: prompts.ids(0, word) for word in words}
    index = {word: number for number, word in enumerate(words)}
    length = max(map(len, ids.values()))
    table = np.zeros((len(words), length), np.int32)
    for word, row in index.items():
      table[row, : len(ids[word])] = ids[word]
    lengths = np.asarray([len(ids[word]) for word in words], np.int32)

    def answer(variables: Any, batch: Any) -> dict[str, Any]:
      steps = answers.writer(system, variables, batch, self.max_new)
      found, _ = autoregressive.generate(
          **steps._asdict(), decoding=settings
      )
      scores = log_likelihood(system, variables, batch, table, lengths)
      return dict(tokens=found.tokens, count=found.lengths, scores=scores)

    found = run.map_source(answer, variables, prompts, self.batch_size)
    written = [
        formatter.read(tokens[:count].tolist())
        for tokens, count in zip(found["tokens"], found["count"], strict=True)
    ]
    chosen = [
        max(own, key=lambda word: scores[index[word]])
        for own, scores in zip(options, found["scores"], strict=True)
    ]
    return written, chosen


class _Prompts:
  """Questions behind so many of their examples."""

  def __init__(
      self, source: Written, shots: int, blind: int, count: int
  ) -> None:
    self._source = source
    self._shots = shots
    self._blind = blind
    self._count = count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    turns = self._turns(index)[:-1]
    shown = self._shots + 1
    example = self._source.formatter.prompt(turns, shown)
    example["images"] = self._source.pictures(index)[-shown:]
    return example

  def options(self, index: int) -> list[str]:
    """The answers that the whole episode knows."""
    turns = self._source.source.conversation(index)
    return sorted({turn.text for turn in turns if turn.role == "assistant"})

  def ids(self, index: int, answer: str) -> list[int]:
    """The tokens of an answer behind a prompt, its end included."""
    formatter = self._source.formatter
    turns = [*self._turns(index)[:-1], Turn("assistant", answer)]
    count = lambda row: int((row["segment"] > 0).sum())
    begin = count(formatter.prompt(turns[:-1], self._shots + 1))
    row = formatter.row(turns, self._shots + 1)
    return row["tokens"][begin : count(row)].tolist()

  def _turns(self, index: int) -> list[Turn]:
    turns = list(self._source.source.conversation(index))
    if self._shots:
      return turns[-2 * (self._shots + 1) :]
    told = turns[-2 * (self._blind + 1) : -2]
    return [
        turn._replace(text=turn.text.replace(IMAGE, "")) for turn in told
    ] + turns[-2:]


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
  count = (batch["segment"] > 0).sum(axis=1).astype(jnp.int32)
  state = system.init_state(prompts, batch["tokens"].shape[1] + width)
  first, state = system.apply(
      variables, dict(batch), state, count, method="prefill"
  )
  last = jnp.clip(count - 1, 0, first.shape[1] - 1)[:, None, None]
  first = jnp.take_along_axis(first, last, axis=1)

  def score(option: tuple[jax.Array, jax.Array]) -> jax.Array:
    tokens, real = option
    tokens = jnp.broadcast_to(tokens, (prompts, width))
    rest, _ = system.apply(
        variables, tokens, state, jnp.full(prompts, real), method="reply"
    )
    logits = jnp.concatenate([first, rest[:, :-1]], axis=1)
    found = jnp.take_along_axis(
        jax.nn.log_softmax(logits.astype(jnp.float32)), tokens[..., None], -1
    )
    return jnp.where(jnp.arange(width) < real, found[..., 0], 0).sum(axis=1)

  pairs = jnp.asarray(options), jnp.asarray(lengths, jnp.int32)
  return jax.lax.map(score, pairs).T


def curve(
    places: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    side: int = 320,
) -> np.ndarray:
  """Shares over the number of examples, u8[side, side, 3]."""
  font, margin = ImageFont.load_default(12), 40
  sheet = Image.new("RGB", (side, side), _PAPER)
  draw = ImageDraw.Draw(sheet)
  span = side - 2 * margin
  most = max(*places, 1)
  at = lambda x, y: (margin + span * x / most, side - margin - span * y)
  for share in (0.0, 0.25, 0.5, 0.75, 1.0):
    draw.line((at(0, share), at(most, share)), (225, 225, 225))
    draw.text((6, at(0, share)[1] - 7), f"{share:.2f}", _INK, font)
  for place in places:
    draw.text((at(place, 0)[0] - 4, side - margin + 6), f"{place}", _INK, font)
  for number, (name, shares) in enumerate(curves.items()):
    points = [at(x, y) for x, y in zip(places, shares, strict=True)]
    tone = tuple(c + number * 90 for c in _LINE)
    draw.line(points, tone, 2)
    draw.text((points[-1][0] - 38, points[-1][1] + 4 + 14 * number), name, tone,
              font)  # fmt: skip
  draw.text((margin, side - 18), "examples in the prompt", _INK, font)
  return np.asarray(sheet)
