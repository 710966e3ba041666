"""How does text become the ids of a language model, and come back?

Two kinds of tokenizer behind one interface: those of the `tokenizers` library
(`tokenizer.json`, or `vocab.json` with `merges.txt`) and of `sentencepiece`
(`*.model`). Text never yields the id of a special token, whatever it says:
special tokens are asked for by name, so that nobody can end a turn by writing
its end. No pickle is read.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import importlib.resources
import itertools
import json
import pathlib
from typing import Protocol, Self

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmjax.config import nearest

TOKENIZER_FILE = "tokenizer.json"
# Rows that a published table has at most beyond the ids of its tokenizer.
PADDING = 1024
_PAIR = ("vocab.json", "merges.txt")
_SPECIALS_FILE = "special_tokens_map.json"
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")


class Tokenizer(Protocol):
  """What every tokenizer of a language model offers.

  Attributes:
    specials: name to id of the tokens that no text yields.
  """

  specials: Mapping[str, int]

  @property
  def vocabulary_size(self) -> int:
    """One more than the largest id: rows of an embedding table."""
    ...

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without special tokens around it."""
    ...

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids; special tokens are left out.

    Raises:
      ValueError: if an id is not in the vocabulary.
    """
    ...

  def special(self, name: str) -> int:
    """The id of a special token.

    Raises:
      ValueError: if there is none of that name; it says which there are.
    """
    ...


class HuggingFace:
  """A tokenizer of the `tokenizers` library."""

  def __init__(self, serialized: str, extra: Sequence[str] = ()) -> None:
    """Reads a tokenizer.

    Args:
      serialized: the text of a `tokenizer.json`.
      extra: special tokens to add where it lacks them; they get the ids behind
        its last.

    Raises:
      ValueError: if `serialized` is no tokenizer.
    """
    try:
      engine = tokenizers.Tokenizer.from_str(serialized)
    # The library raises bare exceptions.
    except Exception as error:
      raise ValueError(f"no tokenizer of HF's: {error}") from error
    engine.no_padding()
    engine.no_truncation()
    engine.add_special_tokens(list(extra))
    # A special token that is spelled out in a text is mere text.
    engine.encode_special_tokens = True
    self._engine = engine
    self._arguments = (serialized, tuple(extra))
    self._tokens = {i: t for t, i in engine.get_vocab().items()}
    self.specials = {
        token.content: i
        for i, token in engine.get_added_tokens_decoder().items()
        if token.special
    }

  def __reduce__(self) -> tuple[type, tuple]:
    # The library forgets `encode_special_tokens` on the way.
    return type(self), self._arguments

  @property
  def vocabulary_size(self) -> int:
    """See `Tokenizer`."""
    return max(self._tokens) + 1

  def encode(self, text: str) -> list[int]:
    """See `Tokenizer`."""
    return self._engine.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    """See `Tokenizer`."""
    ids = _known(ids, self._tokens.__contains__, len(self._tokens))
    return self._engine.decode(ids, skip_special_tokens=True)

  def special(self, name: str) -> int:
    """See `Tokenizer`."""
    return _look_up(name, self.specials)

  def save(self, path: str | pathlib.Path) -> None:
    """Writes a `tokenizer.json` that transformers reads too."""
    text = self._engine.to_str()
    pathlib.Path(path).write_text(text + "\n", encoding="utf-8")

  @classmethod
  def from_pair(
      cls, directory: pathlib.Path, extra: Sequence[str] = ()
  ) -> Self:
    """Reads GPT-2's two files, as OPT has them, with the map of its specials.

    Raises:
      ValueError: if a file is damaged.
    """
    vocabulary, merges = (directory / name for name in _PAIR)
    try:
      engine = tokenizers.Tokenizer(
          models.BPE.from_file(str(vocabulary), str(merges))
      )
    # The library raises bare exceptions.
    except Exception as error:
      raise ValueError(f"no byte-level BPE: {error}") from error
    _make_byte_level(engine)
    known = engine.get_vocab()
    named = directory / _SPECIALS_FILE
    if named.exists():
      names = []
      for value in json.loads(named.read_text(encoding="utf-8")).values():
        # A name, its description, or, for the additional ones, a list.
        for one in value if isinstance(value, list) else [value]:
          names.append(one["content"] if isinstance(one, dict) else one)
      engine.add_special_tokens(
          [name for name in dict.fromkeys(names) if name in known]
      )
    return cls(engine.to_str(), extra)

  @classmethod
  def train(
      cls,
      texts: Iterable[str],
      vocabulary_size: int,
      specials: Sequence[str],
  ) -> Self:
    """Learns a byte-level BPE; the same texts give the same tokenizer.

    Args:
      texts: any number of texts.
      vocabulary_size: ids at most; fewer where the texts have no more pairs.
      specials: names of the special tokens, which get the first ids.

    Raises:
      ValueError: if not even the bytes and the special tokens fit.
    """
    least = 256 + len(specials)
    if vocabulary_size < least:
      raise ValueError(
          f"vocabulary_size={vocabulary_size}: 256 bytes and {len(specials)} "
          f"special tokens need {least}"
      )
    engine = tokenizers.Tokenizer(models.BPE())
    _make_byte_level(engine)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    return cls(engine.to_str())


class SentencePiece:
  """A tokenizer of the `sentencepiece` library."""

  def __init__(self, serialized: bytes, extra: Sequence[str] = ()) -> None:
    """Reads a tokenizer.

    Args:
      serialized: the bytes of a `.model`.
      extra: as for `HuggingFace`.

    Raises:
      ValueError: if `serialized` is no tokenizer.
    """
    engine = sentencepiece.SentencePieceProcessor()
    try:
      # Not by the constructor, which takes no bytes at all for no model yet.
      engine.load_from_serialized_proto(serialized)
    except RuntimeError as error:
      raise ValueError(f"no sentencepiece model: {error}") from error
    self._engine = engine
    self._arguments = (serialized, tuple(extra))
    self._own = engine.get_piece_size()
    specials = {
        engine.id_to_piece(i): i
        for i in range(self._own)
        if engine.is_control(i) or engine.is_unknown(i)
    }
    added = itertools.count(self._own)
    for name in extra:
      if name not in specials:
        specials[name] = next(added)
    self.specials = specials

  def __reduce__(self) -> tuple[type, tuple]:
    return type(self), self._arguments

  @property
  def vocabulary_size(self) -> int:
    """See `Tokenizer`."""
    return max(self._own, *(i + 1 for i in self.specials.values()))

  def encode(self, text: str) -> list[int]:
    """See `Tokenizer`."""
    return self._engine.encode(text, out_type=int)

  def decode(self, ids: Iterable[int]) -> str:
    """See `Tokenizer`."""
    size = self.vocabulary_size
    ids = _known(ids, range(size).__contains__, size)
    special = set(self.specials.values())
    return self._engine.decode([i for i in ids if i not in special])

  def special(self, name: str) -> int:
    """See `Tokenizer`."""
    return _look_up(name, self.specials)


def load(
    path: str | pathlib.Path | None = None, extra: Sequence[str] = ()
) -> HuggingFace | SentencePiece:
  """A tokenizer from wherever `path` points.

  Args:
    path: a `tokenizer.json`, a sentencepiece `.model`, a directory with one of
      them or with `vocab.json` and `merges.txt`, or None for TinyWorld's.
    extra: special tokens to add where it lacks them ("<image>", "[RET]"); they
      get the ids behind its last.

  Raises:
    FileNotFoundError: if nothing is there.
    ValueError: if it is no tokenizer.
  """
  path = tinyworld_file() if path is None else pathlib.Path(path)
  if path.is_dir():
    path = _inside(path)
  elif not path.exists():
    raise FileNotFoundError(f"{path}: no such tokenizer")
  try:
    if path.name == _PAIR[0]:
      return HuggingFace.from_pair(path.parent, extra)
    if path.suffix == ".json":
      return HuggingFace(path.read_text(encoding="utf-8"), extra)
    if path.suffix == ".model":
      return SentencePiece(path.read_bytes(), extra)
  except ValueError as error:
    raise ValueError(f"{path}: damaged, or not a tokenizer: {error}") from error
  raise ValueError(
      f"{path}: expected {TOKENIZER_FILE}, a sentencepiece .model, or a "
      "directory that holds a tokenizer"
  )


def check_vocabulary(tokenizer: Tokenizer, rows: int, where: str) -> None:
  """Refuses a model whose embedding table is not of this tokenizer.

  Args:
    tokenizer: what makes the ids.
    rows: of the model's embedding table. Published tables are padded; more than
      `PADDING` rows without a token are taken for another vocabulary's.
    where: what holds the table; it opens the message.

  Raises:
    ValueError: if the table has fewer rows than ids, or far more.
  """
  size = tokenizer.vocabulary_size
  if not size <= rows <= size + PADDING:
    raise ValueError(
        f"{where}: an embedding table of {rows} rows, but the tokenizer has "
        f"{size} ids: expected {size} to {size + PADDING} rows. Take the "
        "tokenizer of this checkpoint"
    )


def tinyworld_file() -> pathlib.Path:
  """The file of TinyWorld's byte-level BPE, beside the package's code."""
  return pathlib.Path(
      str(importlib.resources.files("mmjax.data") / "assets/tinyworld_lm.json")
  )


def _inside(directory: pathlib.Path) -> pathlib.Path:
  if all((directory / name).exists() for name in _PAIR):
    pair = [_PAIR[0]]
  else:
    pair = []
  for name in (TOKENIZER_FILE, *_SENTENCEPIECE_FILES, *pair):
    if (directory / name).exists():
      return directory / name
  found = sorted(entry.name for entry in directory.iterdir())
  raise FileNotFoundError(
      f"{directory}: no tokenizer: expected {TOKENIZER_FILE}, "
      f"{', '.join(_SENTENCEPIECE_FILES)} or {' with '.join(_PAIR)}, found "
      f"{', '.join(found[:8]) or 'nothing'}"
  )


def _make_byte_level(engine: tokenizers.Tokenizer) -> None:
  """GPT-2's cut into words and bytes (Radford et al. 2019, section 2.2)."""
  engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  engine.decoder = decoders.ByteLevel()


def _known(
    ids: Iterable[int], is_known: Callable[[int], bool], size: int
) -> list[int]:
  ids = [int(i) for i in ids]
  unknown = sorted({i for i in ids if not is_known(i)})
  if unknown:
    raise ValueError(
        f"ids {unknown} are not among the {size} of the vocabulary"
    )
  return ids


def _look_up(name: str, specials: Mapping[str, int]) -> int:
  if name in specials:
    return specials[name]
  raise ValueError(
      f"no special token {name!r} among {', '.join(list(specials)[:16])} (load "
      f"with extra=[{name!r}] if the model has a row for it)"
      f"{nearest(name, specials)}"
  )
