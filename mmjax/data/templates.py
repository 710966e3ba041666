"""How does a conversation become tokens, and which of them are learned?

A template says what stands around the turns. What the assistant must produce,
its answers and the tokens that end them, has weight 1; all else has weight 0.
Text between special tokens and pictures is tokenized in one go, so that ids are
those of the whole string, as the references have them.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
import re
from typing import Any, NamedTuple

import numpy as np

from mmjax.config import nearest
from mmjax.data import pack, subwords
from mmjax.data.batch import Example
from mmjax.data.pack import Document
from mmjax.data.subwords import Tokenizer

# Stands for a picture inside the text of a turn.
IMAGE = "<image>"
ROLES = ("system", "user", "assistant")


class Special(str):
  """The name of a special token, told apart from mere text."""


Parts = tuple[str | Special, ...]


class Turn(NamedTuple):
  """What one side says.

  Attributes:
    role: one of `ROLES`.
    text: with an `IMAGE` wherever a picture stands.
    weight: how much the loss at an answer counts; other roles' never does.
  """

  role: str
  text: str
  weight: float = 1.0


Conversation = Sequence[Turn | tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Template:
  """What stands around the turns of a conversation.

  Attributes:
    before: role to what stands before a turn's text.
    after: role to what stands after it (and after the end of an answer).
    begin: what opens a conversation.
    answer: opens an answer, as its part; text, or a special token.
    end: ends an answer, as its part.
    finish: ends a conversation.
    system: the text of a system turn where a conversation has none; "" for no
      such turn.
    picture: special tokens that stand for a picture; () where a model takes
      pictures apart from its text.
    placeholder: the one of them that is repeated once for every row of the
      picture's features.
    mute: roles of whose turns only the pictures are kept.
  """

  before: Mapping[str, Parts] = dataclasses.field(default_factory=dict)
  after: Mapping[str, Parts] = dataclasses.field(default_factory=dict)
  begin: Parts = ()
  answer: str = ""
  end: Parts = ()
  finish: Parts = ()
  system: str = ""
  picture: tuple[str, ...] = (IMAGE,)
  placeholder: str = IMAGE
  mute: tuple[str, ...] = ()


_CHATML = Template(
    before={
        role: (Special("<|im_start|>"), f"{role}\n") for role in ROLES
    },
    after={
        "system": (Special("<|im_end|>"), "\n"),
        "user": (Special("<|im_end|>"), "\n"),
        "assistant": ("\n",),
    },
    end=(Special("<|im_end|>"),),
    system="You are a helpful assistant.",
)

TEMPLATES: dict[str, Template] = {
    # Qwen2; Qwen2.5 has another system turn.
    "chatml": _CHATML,
    # Qwen2-VL and Qwen2.5-VL.
    "chatml_vision": dataclasses.replace(
        _CHATML,
        picture=("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
        placeholder="<|image_pad|>",
    ),
    # Vicuna v1.1 and later; LLaVA's "v1", with which LLaVA 1.5 is tuned.
    "vicuna": Template(
        begin=(Special("<s>"),),
        before={"user": ("USER: ",), "assistant": ("ASSISTANT:",)},
        after={"system": (" ",), "user": (" ",)},
        answer=" ",
        end=(Special("</s>"),),
        system=(
            "A chat between a curious user and an artificial intelligence "
            "assistant. The assistant gives helpful, detailed, and polite "
            "answers to the user's questions."
        ),
    ),
    # The first stage of LLaVA: pictures and captions, no instruction.
    "plain": Template(
        begin=(Special("<s>"),), end=("\n",), mute=("system", "user")
    ),
    # BLIP-2 with OPT: the picture comes before the start of the text.
    "opt": Template(
        before={"assistant": (Special("</s>"),)},
        end=("\n",),
        placeholder="<pad>",
        picture=("<pad>",),
        mute=("system", "user"),
    ),
    # T5 and Flan-T5, whose encoder reads the instruction and its end.
    "t5": Template(
        after={"system": ("\n",), "user": (Special("</s>"),)},
        end=(Special("</s>"),),
        picture=(),
        placeholder="",
    ),
    # BLIP-2 with FlanT5, whose encoder reads the picture and what follows it.
    "blip2_t5": Template(
        end=(Special("</s>"),),
        placeholder="<pad>",
        picture=("<pad>",),
        mute=("system", "user"),
    ),
    # FROMAGe predicts the start of a caption too, and not the [RET] behind it.
    "fromage_caption": Template(
        answer=Special("</s>"),
        placeholder="<pad>",
        picture=("<pad>",),
        mute=("system", "user"),
    ),
    "fromage_retrieval": Template(
        begin=(Special("</s>"),),
        after={"system": ("\n",), "user": ("\n",)},
        end=(Special("[RET]"),),
        placeholder="<pad>",
        picture=("<pad>",),
    ),
    # OpenFlamingo: the chunk that follows a picture ends in a token.
    "flamingo": Template(
        begin=(Special("<s>"),),
        before={"assistant": ("Output:",)},
        answer=" ",
        end=(Special("<|endofchunk|>"),),
    ),
}


def load(name: str, **changes: Any) -> Template:
  """A template of `TEMPLATES`, with fields replaced.

  Raises:
    ValueError: if there is no such template or field; it names the nearest.
  """
  if name not in TEMPLATES:
    raise ValueError(
        f"template {name!r} is none of {', '.join(TEMPLATES)}"
        f"{nearest(name, TEMPLATES)}"
    )
  fields = [field.name for field in dataclasses.fields(Template)]
  for key in changes:
    if key not in fields:
      raise ValueError(
          f"{key!r} is no field of a template: expected one of "
          f"{', '.join(fields)}{nearest(key, fields)}"
      )
  return dataclasses.replace(TEMPLATES[name], **changes)


class _Picture:
  """A picture that stands between texts."""


class _Piece(NamedTuple):
  """What a conversation is made of, in order."""

  content: str | Special | _Picture
  weight: float


@dataclasses.dataclass(frozen=True)
class Formatter:
  """Writes conversations as rows of a batch.

  Attributes:
    tokenizer: of the language model.
    template: what stands around turns, or its name in `TEMPLATES`.
    length: tokens of a row, L.
    image_tokens: rows of features that a picture has.
    truncate: whether a conversation that is too long loses its last exchanges,
      or is an error. It always ends where an answer does, and keeps at least
      one; its pictures stay in the batch, shown or not.
    pad_id: the token behind the end.
    rows: of the model's embedding table, to be compared with the tokenizer.
  """

  tokenizer: Tokenizer
  template: Template | str
  length: int
  image_tokens: int = 1
  truncate: bool = False
  pad_id: int = 0
  rows: int | None = None

  def __post_init__(self) -> None:
    if self.rows is not None:
      subwords.check_vocabulary(self.tokenizer, self.rows, "the model")
    if isinstance(self.template, str):
      object.__setattr__(self, "template", load(self.template))
    if self.length < 1 or self.image_tokens < 1:
      raise ValueError(
          f"length={self.length}, image_tokens={self.image_tokens}: expected "
          "at least 1"
      )
    self._check_specials()

  def row(
      self, conversation: Conversation, images: int | Sequence[int]
  ) -> Example:
    """A row of one conversation; the keys are those of `pack.row`.

    Args:
      conversation: turns, of which the first may be the system's.
      images: pictures that the example has, or the rows of features of each.

    Raises:
      ValueError: for a role that is unknown or out of place, more or fewer
        pictures than placeholders, or a conversation that is too long.
    """
    document = self.document(conversation, images)
    return pack.row([document], self.length, self.pad_id)

  def prompt(
      self, conversation: Conversation, images: int | Sequence[int]
  ) -> Example:
    """A row that ends where the assistant's next answer would begin.

    `segment` is 1 on its tokens; all weights are 0.

    Args:
      conversation: turns, the last of which is not the assistant's.
      images: as for `row`.

    Raises:
      ValueError: as `row`; it is never truncated.
    """
    sizes = self._sizes(images)
    turns = self._turns(conversation, len(sizes))
    if turns[-1].role == "assistant":
      raise ValueError(
          "the prompt ends with an answer; leave it out to have it asked for"
      )
    pieces = list(self._pieces(turns))
    pieces += [
        _Piece(part, 0.0) for part in self.template.before.get("assistant", ())
    ]
    document = self._encode(pieces, sizes)
    if len(document.tokens) > self.length:
      raise ValueError(
          f"a prompt of {len(document.tokens)} tokens does not fit "
          f"length={self.length}: {_excerpt(turns)}"
      )
    document = document._replace(weight=np.zeros_like(document.weight))
    return pack.row([document], self.length, self.pad_id)

  def ends(self) -> tuple[tuple[int, ...], ...]:
    """The ids that end an answer, as `sampling.Decoding.stop` takes them."""
    ids: list[int] = []
    for part in self.template.end:
      if isinstance(part, Special):
        ids.append(self.tokenizer.special(part))
      else:
        ids += self.tokenizer.encode(part)
    return (tuple(ids),) if ids else ()

  def read(self, ids: Sequence[int]) -> str:
    """The text of an answer, without its end and what comes behind."""
    ids = list(ids)
    for end in self.ends():
      for begin in range(len(ids) - len(end) + 1):
        if tuple(ids[begin : begin + len(end)]) == end:
          ids = ids[:begin]
          break
    return self.tokenizer.decode(ids).strip()

  def document(
      self,
      conversation: Conversation,
      images: int | Sequence[int],
  ) -> Document:
    """A conversation of at most `length` tokens, not padded.

    Args:
      conversation: as for `row`.
      images: as for `row`.

    Raises:
      ValueError: as `row`.
    """
    sizes = self._sizes(images)
    turns = self._turns(conversation, len(sizes))
    document = self._write(turns, sizes)
    if len(document.tokens) <= self.length:
      return document
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if self.truncate:
      for last in reversed(answers[:-1]):
        shorter = self._write(turns[: last + 1], sizes)
        if len(shorter.tokens) <= self.length:
          return shorter
    advice = (
        "not even its first exchange fits"
        if self.truncate
        else "make rows longer, or let truncate=True drop its last exchanges"
    )
    raise ValueError(
        f"a conversation of {len(document.tokens)} tokens does not fit "
        f"length={self.length}: {advice}: {_excerpt(turns)}"
    )

  def _sizes(self, images: int | Sequence[int]) -> tuple[int, ...]:
    """The rows of features of each picture."""
    if isinstance(images, int):
      return (self.image_tokens,) * images
    return tuple(images)

  def _check_specials(self) -> None:
    template = self.template
    names = [*template.picture]
    for parts in (
        template.begin,
        template.end,
        template.finish,
        (template.answer,),
        *template.before.values(),
        *template.after.values(),
    ):
      names += [part for part in parts if isinstance(part, Special)]
    lacking = [n for n in names if n not in self.tokenizer.specials]
    if lacking:
      raise ValueError(
          "the tokenizer lacks special tokens of the template: "
          f"{', '.join(dict.fromkeys(lacking))}. It has "
          f"{', '.join(list(self.tokenizer.specials)[:16])}. Load it with "
          "extra=[...] if the model has rows for them, or take another template"
      )
    if template.picture and template.placeholder not in template.picture:
      raise ValueError(
          f"placeholder {template.placeholder!r} is not part of "
          f"picture={template.picture}"
      )

  def _turns(self, conversation: Conversation, images: int) -> list[Turn]:
    """The turns, checked, with the template's own system turn."""
    turns = [Turn(*turn) for turn in conversation]
    faults = [] if turns else ["no turns"]
    for number, turn in enumerate(turns):
      if turn.role not in ROLES:
        faults.append(
            f"turn {number} has the role {turn.role!r}, none of "
            f"{', '.join(ROLES)}{nearest(turn.role, ROLES)}"
        )
      elif turn.role == "system" and number:
        faults.append(f"turn {number} is the system's, which may be first only")
    shown = sum(turn.text.count(IMAGE) for turn in turns)
    if shown != images:
      faults.append(
          f"{shown} {IMAGE} in the text, but {images} pictures: each needs the "
          "other"
      )
    if faults:
      raise ValueError(f"{'; '.join(faults)}: {_excerpt(turns)}")
    if self.template.system and turns[0].role != "system":
      turns.insert(0, Turn("system", self.template.system))
    return turns

  def _write(self, turns: list[Turn], sizes: tuple[int, ...]) -> Document:
    pieces = list(self._pieces(turns))
    pieces += [_Piece(part, 0.0) for part in self.template.finish]
    return self._encode(pieces, sizes)

  def _pieces(self, turns: list[Turn]) -> Iterator[_Piece]:
    template = self.template
    outer = lambda parts: (_Piece(part, 0.0) for part in parts)
    yield from outer(template.begin)
    for turn in turns:
      weight = turn.weight if turn.role == "assistant" else 0.0
      if turn.role not in template.mute:
        yield from outer(template.before.get(turn.role, ()))
      if turn.role == "assistant":
        yield _Piece(template.answer, weight)
      texts = turn.text.split(IMAGE)
      for number, text in enumerate(texts):
        if number:
          # These models read pictures, and draw none.
          yield _Piece(_Picture(), 0.0)
        if turn.role not in template.mute:
          yield _Piece(text, weight)
      if turn.role == "assistant":
        yield from (_Piece(part, weight) for part in template.end)
      if turn.role not in template.mute:
        yield from outer(template.after.get(turn.role, ()))

  def _encode(
      self, pieces: Sequence[_Piece], sizes: tuple[int, ...]
  ) -> Document:
    tokens: list[int] = []
    weight: list[float] = []
    source: list[int] = []
    media: list[int] = []
    shown, features = -1, 0
    is_text = lambda piece: type(piece.content) is str
    for of_text, group in itertools.groupby(pieces, is_text):
      if of_text:
        ids, weights = self._encode_text(list(group))
        tokens += ids
        weight += weights
        source += [-1] * len(ids)
        media += [shown] * len(ids)
        continue
      for piece in group:
        if isinstance(piece.content, Special):
          ids, rows = [self.tokenizer.special(piece.content)], [-1]
        else:
          shown += 1
          ids, rows = self._show(sizes[shown], features)
          features += sizes[shown]
        tokens += ids
        weight += [piece.weight] * len(ids)
        source += rows
        media += [shown] * len(ids)
    weights = np.asarray(weight, np.float32)
    weights[:1] = 0.0  # Nothing comes before the first token.
    return Document(
        np.asarray(tokens, np.int32),
        weights,
        np.asarray(source, np.int32),
        np.asarray(media, np.int32),
        sizes,
    )

  def _encode_text(
      self, pieces: Sequence[_Piece]
  ) -> tuple[list[int], list[float]]:
    """Ids and weights of neighbouring texts, tokenized as one.

    A text begins at the first token that the text before it alone would not
    have had: what a model sees as its prompt, it has seen in training.
    """
    spans = [
        ("".join(piece.content for piece in group), weight)
        for weight, group in itertools.groupby(pieces, lambda p: p.weight)
    ]
    spans = [(text, weight) for text, weight in spans if text]
    if not spans:
      return [], []
    ids = self.tokenizer.encode("".join(text for text, _ in spans))
    weights = [spans[-1][1]] * len(ids)
    # From the back, so that an earlier span takes what is its own.
    for last in range(len(spans) - 1, 0, -1):
      alone = self.tokenizer.encode("".join(text for text, _ in spans[:last]))
      agree = itertools.takewhile(lambda p: p[0] == p[1], zip(alone, ids))
      count = sum(1 for _ in agree)
      weights[:count] = [spans[last - 1][1]] * count
    return ids, weights

  def _show(self, size: int, begin: int) -> tuple[list[int], list[int]]:
    """Tokens of a picture of `size` rows of features, and those rows."""
    tokens: list[int] = []
    rows: list[int] = []
    for name in self.template.picture:
      slots = name == self.template.placeholder
      count = size if slots else 1
      tokens += [self.tokenizer.special(name)] * count
      rows += range(begin, begin + size) if slots else [-1]
    return tokens, rows


def _excerpt(turns: Sequence[Turn]) -> str:
  text = " / ".join(f"{turn.role}: {turn.text}" for turn in turns)
  return repr(re.sub(r"\s+", " ", text)[:120])
