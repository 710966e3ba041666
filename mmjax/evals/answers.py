"""What does a system answer when it is shown and asked? Greedily, and scored.

Any system that writes can be evaluated. It has three methods beside `__call__`,
in which B is the rows of a batch, L the tokens of the longest prompt, T those
of a step, and V the vocabulary:

  init_state(batch, slots) -> state
    (`nn.nowrap`) An empty state for `batch` rows of at most `slots` tokens, the
    placeholders of pictures counted. What a picture takes besides (queries in
    front of the text, keys for cross-attention) the system adds by itself. No
    array stands in it twice, for it is donated.

  prefill(batch, state, count) -> (logits f32[B, L or 1, V], state)
    Reads the prompts. `batch` has the keys of `Written.prompt`, pictures
    included: `tokens` i32[B, L] padded on the right, `source`, `media`,
    `segment`, `position`, and `image` or `images`. `count` i32[B] says how many
    tokens of each prompt are real. The logits at `count - 1`, or the only ones,
    predict what follows.

  reply(tokens i32[B, T], state, count) -> (logits f32[B, T or 1, V], state)
    Goes on behind what the state holds. Rows whose `count` is 0 have ended;
    they leave their part of the state alone.

`writer` makes of them what the engines of `mmjax.sampling` take.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import config as config_lib
from mmjax.data.conversations import Written
from mmjax.evals import captions, figures, run
from mmjax.sampling import autoregressive, decoding, processors


class Writer(Protocol):
  """A system that writes; the module says what its methods do."""

  def init_state(self, batch: int, slots: int) -> Any:
    """An empty state."""
    ...

  def prefill(
      self, batch: Mapping[str, jax.Array], state: Any, count: jax.Array
  ) -> tuple[jax.Array, Any]:
    """Reads prompts."""
    ...

  def reply(
      self, tokens: jax.Array, state: Any, count: jax.Array
  ) -> tuple[jax.Array, Any]:
    """Goes on behind what the state holds."""
    ...


class Steps(NamedTuple):
  """A system as `sampling` takes it: `generate(**steps._asdict(), ...)`.

  Attributes:
    step: reads the next tokens.
    prefill: reads the prompts.
    state: to be donated.
    tokens: i32[B, L], the prompts.
    valid: i32[B], how many of their tokens are real.
  """

  step: Callable[..., Any]
  prefill: Callable[..., Any]
  state: Any
  tokens: jax.Array
  valid: jax.Array


def writer(
    system: Any, variables: Any, batch: Mapping[str, jax.Array], max_new: int
) -> Steps:
  """Binds a system that writes to its variables and to prompts.

  Args:
    system: a `Writer`.
    variables: of the system.
    batch: what `prefill` reads; `segment` is 1 on the tokens of each prompt.
    max_new: tokens to be written at most.
  """
  tokens = batch["tokens"]
  step, prefill = _functions(system)
  return Steps(
      step=jax.tree_util.Partial(step, variables),
      prefill=jax.tree_util.Partial(prefill, (variables, dict(batch))),
      state=system.init_state(len(tokens), tokens.shape[1] + max_new),
      tokens=tokens,
      valid=(batch["segment"] > 0).sum(axis=1).astype(jnp.int32),
  )


@functools.lru_cache(maxsize=8)
def _functions(system: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """The step and the prefill of a system: the same ones, compiled once."""

  def step(variables: Any, tokens: Any, valid: Any, state: Any) -> Any:
    return system.apply(variables, tokens, state, valid, method="reply")

  def prefill(
      bound: tuple[Any, Any], tokens: Any, valid: Any, state: Any
  ) -> Any:
    variables, batch = bound
    batch = dict(batch, tokens=tokens)
    return system.apply(variables, batch, state, valid, method="prefill")

  return step, prefill


def exact(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
  """The share of answers that are right letter by letter."""
  return {"exact": float(np.mean([a == b for a, b in zip(written, wanted)]))}


# What can be said of a set of answers: (written, wanted) -> figures.
SCORES: dict[str, Callable[..., dict[str, float]]] = {
    "exact": exact,
    "scene": captions.scene,
    "look": captions.look,
    "bleu": captions.bleu,
    "cider": captions.cider,
}


class Answers:
  """Greedy answers to the last question of conversations, and their scores.

  Attributes:
    source: conversations, written for the system.
    scores: names in `SCORES`.
    examples: how many of the source are asked; all by default.
    max_new: tokens that an answer may have, its end included.
    batch_size: global batch.
    shown: pictures in the figure.
  """

  def __init__(
      self,
      source: Written,
      scores: Sequence[str] = ("exact",),
      examples: int | None = None,
      max_new: int = 8,
      batch_size: int = 64,
      shown: int = 16,
  ) -> None:
    """Raises ValueError for a score that there is not, or no example."""
    self.scores = {
        name: config_lib.pick(SCORES, name, "scores") for name in scores
    }
    self.source = source
    self.examples = len(source) if examples is None else examples
    if not 1 <= self.examples <= len(source):
      raise ValueError(
          f"examples={examples}: expected 1 to {len(source)}, which the source "
          "has"
      )
    self.max_new = max_new
    self.batch_size = batch_size
    self.shown = shown

  def write(self, system: Any, variables: Any) -> list[str]:
    """The answers, in order."""
    formatter = self.source.formatter
    settings = decoding.Decoding(
        self.max_new,
        stop=formatter.ends(),
        processors=[processors.Known(formatter.tokenizer.vocabulary_size)],
    )

    def generate(variables: Any, batch: Any) -> dict[str, Any]:
      steps = writer(system, variables, batch, self.max_new)
      found, _ = autoregressive.generate(
          **steps._asdict(), decoding=settings
      )
      return {"tokens": found.tokens, "count": found.lengths}

    prompts = Prompts(self.source, self.examples)
    found = run.map_source(generate, variables, prompts, self.batch_size)
    return [
        formatter.read(tokens[:count].tolist())
        for tokens, count in zip(found["tokens"], found["count"], strict=True)
    ]

  def __call__(
      self, system: Any, variables: Any
  ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns the scores, those of each kind of question, and a figure.

    `<score>` is of all answers; where the source has `kind(i)`,
    `<score>_<kind>` is of those to one kind of question.
    """
    written = self.write(system, variables)
    wanted = [self.source.answer(i) for i in range(self.examples)]
    metrics = self._score(written, wanted)
    kind = getattr(self.source.source, "kind", None)
    if kind is not None:
      kinds = [kind(i) for i in range(self.examples)]
      for name in sorted(set(kinds)):
        own = [i for i, other in enumerate(kinds) if other == name]
        found = self._score([written[i] for i in own], [wanted[i] for i in own])
        metrics |= {f"{score}_{name}": value for score, value in found.items()}
    return metrics, self._figure(written, wanted)

  def _score(
      self, written: Sequence[str], wanted: Sequence[str]
  ) -> dict[str, float]:
    metrics = {}
    for score in self.scores.values():
      metrics |= score(written, wanted)
    return metrics

  def _figure(
      self, written: Sequence[str], wanted: Sequence[str]
  ) -> dict[str, np.ndarray]:
    """The first pictures above the question and the answer."""
    if not self.source.source.shown:
      return {}
    rows = range(min(self.shown, self.examples))
    asked = [self.source.question(i) for i in rows]
    return {
        "answers": figures.captioned_grid(
            [self.source.pictures(i)[-1] for i in rows],
            [f"{asked[i]} {written[i]}".strip() for i in rows],
            [written[i] == wanted[i] for i in rows],
        )
    }


class Prompts:
  """The first prompts of a source."""

  def __init__(self, source: Written, count: int) -> None:
    self._source = source
    self._count = count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return self._source.prompt(index)
