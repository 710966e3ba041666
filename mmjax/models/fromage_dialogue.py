"""How does FROMAGe answer with words and pictures?

It writes until it says [RET]; the state there is looked up among the pictures
of a bank, the one that is found is shown to it, and it writes on.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models.fromage import FROMAGe
from mmjax.sampling import autoregressive, processors
from mmjax.sampling.autoregressive import GREEDY, Sampling
from mmjax.sampling.decoding import Decoding
from mmjax.sampling.retrieval import Index


class Said(NamedTuple):
  """A part of an answer.

  Attributes:
    tokens: what is said, without [RET].
    picture: its index in the bank, of what is shown then; None for nothing.
  """

  tokens: list[int]
  picture: int | None


class Prompt(NamedTuple):
  """What is read at once.

  Attributes:
    tokens: i32[L].
    source: i32[L], see `FROMAGe.embeddings`.
    images: f32[N, H, W, 3]; N may be 0.
  """

  tokens: np.ndarray
  source: np.ndarray
  images: np.ndarray


@dataclasses.dataclass(frozen=True)
class Style:
  """How it answers.

  Attributes:
    decoding: the tokens of an answer, and what ends it.
    sampling: how they are chosen.
    ret_scale: the logit of [RET] is multiplied by it; above 1 it shows more.
    min_words: tokens before the first [RET] may come.
    max_pictures: the answer ends with the picture of this number.
  """

  decoding: Decoding
  sampling: Sampling = GREEDY
  ret_scale: float = 1.0
  min_words: int = 0
  max_pictures: int = 1

  def __post_init__(self) -> None:
    if self.min_words < 0 or self.max_pictures < 0:
      raise ValueError(
          f"min_words={self.min_words}, max_pictures={self.max_pictures}: "
          "expected 0 or more"
      )

  def before(self, ret: int, quiet: bool) -> Decoding:
    """The decoding up to the next [RET], or, if `quiet`, without one."""
    change = processors.Scaled(ret, self.ret_scale)
    if quiet:
      change = processors.Forbidden(ret)
    return dataclasses.replace(
        self.decoding,
        eos=(*self.decoding.eos, ret),
        processors=(*self.decoding.processors, change),
    )


class Dialogue:
  """Answers of one system, with pictures of one bank."""

  def __init__(
      self,
      system: FROMAGe,
      variables: Any,
      bank: Sequence[np.ndarray],
      index: Index | None = None,
  ) -> None:
    """Joins a system and a bank.

    Args:
      system: FROMAGe.
      variables: of it.
      bank: pictures f32[H, W, 3], read one by one when they are shown.
      index: of their places in the joint space; they are looked at now where
        it is not given.

    Raises:
      ValueError: if the index is of another bank.
    """
    self._system = system
    self._bank = bank
    embed = jax.jit(
        lambda variables, image: system.apply(
            variables, image, method="embed_image"
        )
    )
    if index is None:
      index = Index(
          np.concatenate([embed(variables, image[None]) for image in bank])
      )
    if index.count != len(bank):
      raise ValueError(
          f"an index of {index.count} vectors, a bank of {len(bank)} pictures"
      )
    self._index = index

    def seek(variables: Any, state: Any) -> tuple[jax.Array, Any]:
      return system.apply(variables, state, method="seek")

    def step(variables: Any, tokens: Any, valid: Any, state: Any) -> Any:
      return system.apply(variables, tokens, state, valid, method="reply")

    def prefill(bound: Any, tokens: Any, valid: Any, state: Any) -> Any:
      variables, rest = bound
      batch = dict(rest, tokens=tokens)
      return system.apply(variables, batch, state, valid, method="prefill")

    self._seek = jax.tree_util.Partial(
        jax.jit(seek, donate_argnums=1), variables
    )
    self._step = jax.tree_util.Partial(step, variables)
    self._prefill, self._variables = prefill, variables

  def answer(
      self, prompt: Prompt, style: Style, key: jax.Array | None = None
  ) -> list[Said]:
    """Answers a prompt.

    Args:
      prompt: words and pictures, not padded.
      style: how.
      key: a PRNG key, where tokens are drawn.

    Returns:
      Words and pictures by turns; no picture twice.

    Raises:
      ValueError: for more pictures than the bank has, and as
        `sampling.autoregressive.generate`.
    """
    if style.max_pictures > len(self._bank):
      raise ValueError(
          f"max_pictures={style.max_pictures}: the bank has {len(self._bank)}"
      )
    said: list[Said] = []
    words: list[int] = []
    shown: list[int] = []
    most, endings = style.decoding.max_new, style.decoding.endings
    left, turn = most, 0
    state = self._system.init_state(1, self._room(prompt, style))
    while left:
      quiet = left
      if style.max_pictures:
        quiet = min(left, max(style.min_words - (most - left), 0))
      new, state = self._write(
          prompt,
          state,
          style.before(self._system.ret, quiet=quiet > 0),
          style.sampling,
          quiet or left,
          None if key is None else jax.random.fold_in(key, turn),
      )
      words += new
      left -= len(new)
      turn += 1
      if new[-1] == self._system.ret:
        picture, state = self._look_up(state, shown, style.max_pictures)
        said.append(Said(words[:-1], picture))
        shown.append(picture)
        words = []
        if len(shown) == style.max_pictures:
          break
        prompt = self._shown(picture)
      elif any(words[-len(end) :] == list(end) for end in endings):
        break
      else:  # It may ask for a picture from now on.
        prompt = Prompt(np.array(new[-1:]), np.array([-1]), np.zeros(0))
    return said + ([Said(words, None)] if words else [])

  def _room(self, prompt: Prompt, style: Style) -> int:
    """Tokens that the decoder may come to see."""
    pictures = style.max_pictures * self._system.slots
    return len(prompt.tokens) + style.decoding.max_new + pictures

  def _write(
      self,
      prompt: Prompt,
      state: Any,
      decoding: Decoding,
      sampling: Sampling,
      limit: int,
      key: jax.Array | None,
  ) -> tuple[list[int], Any]:
    """The next tokens, up to an ending, a [RET], or the limit."""
    rest = {}
    if len(prompt.images):
      rest = dict(
          images=jnp.asarray(prompt.images[None]),
          source=jnp.asarray(prompt.source[None]),
      )
    found, state = autoregressive.generate(
        self._step,
        state,
        prompt.tokens[None],
        np.array([len(prompt.tokens)]),
        decoding,
        sampling,
        key=key,
        limit=np.array([limit]),
        prefill=jax.tree_util.Partial(self._prefill, (self._variables, rest)),
    )
    return np.asarray(found.tokens)[0, : int(found.lengths[0])].tolist(), state

  def _look_up(
      self, state: Any, shown: list[int], most: int
  ) -> tuple[int, Any]:
    """The picture that [RET] asks for, of those that were not shown."""
    query, state = self._seek(state)
    exclude = np.full((1, most - 1), -1)
    exclude[0, : len(shown)] = shown
    _, found = self._index.search(query, 1, exclude)
    return int(found[0, 0]), state

  def _shown(self, picture: int) -> Prompt:
    """A picture of the bank, to be read."""
    slots = np.arange(self._system.slots)
    return Prompt(np.zeros_like(slots), slots, self._bank[picture][None])
