"""How does text become ids? CLIP's byte-pair encoding, over `tokenizers`.

The scheme is that of Radford et al. 2021, section 2.4: text is repaired and
lower-cased, cut into words, numerals and runs of signs, written as bytes, and
merged pair by pair. A piece ends in `</w>`. Ids are counted in this order: 256
bytes, 256 bytes that end a piece, one id a merge, start, end. The end of a text
is therefore its largest id, which CLIP's pooling relies on.
"""

from collections.abc import Iterable, Mapping, Sequence
import gzip
import html
import importlib.resources
import json
import pathlib
from typing import Self, TypedDict, Unpack

import ftfy
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

START = "<|startoftext|>"
END = "<|endoftext|>"
SUFFIX = "</w>"
LENGTH = 77
OPENAI_VOCABULARY = 49408

_VOCABULARY_FILE = "vocab.json"
_MERGES_FILE = "merges.txt"
_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_MERGES_HEADER = "#version: 0.2"
_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)

Merges = Sequence[tuple[str, str]]


class Options(TypedDict, total=False):
  """Keyword arguments that every constructor of `ClipTokenizer` takes."""

  length: int
  truncate: bool
  pad_id: int


def clean(text: str) -> str:
  """Repairs broken Unicode, resolves HTML, collapses spaces, lower-cases."""
  if not _is_plain(text):
    # Twice, because text scraped from pages is often escaped twice.
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return " ".join(text.split()).lower()


class ClipTokenizer:
  """Text to fixed-length ids and back.

  Attributes:
    length: ids a text, start, end and padding included.
    vocabulary: token to id.
    merges: the pairs, in the order in which they apply.
    start_id, end_id, pad_id: ids of the special tokens; OpenAI pads with 0.
    truncate: whether a text that is too long is cut, or an error.
  """

  def __init__(
      self,
      merges: Merges,
      *,
      vocabulary: Mapping[str, int] | None = None,
      length: int = LENGTH,
      truncate: bool = False,
      pad_id: int = 0,
  ) -> None:
    """Builds a tokenizer.

    Args:
      merges: pairs of tokens, the most frequent first.
      vocabulary: token to id; by default as the module describes.
      length: ids a text, at least 3.
      truncate: cut what is too long (the last id stays the end), or raise.
      pad_id: the id that follows the end.

    Raises:
      ValueError: if the vocabulary has no start, or an end that is not its
        largest id, or `length` or `pad_id` cannot be.
    """
    self.merges = tuple((left, right) for left, right in merges)
    self.vocabulary = dict(vocabulary or _count(self.merges))
    missing = [token for token in (START, END) if token not in self.vocabulary]
    if missing:
      raise ValueError(f"vocabulary lacks {' and '.join(missing)}")
    self.start_id = self.vocabulary[START]
    self.end_id = self.vocabulary[END]
    largest = max(self.vocabulary.values())
    if self.end_id != largest:
      raise ValueError(
          f"{END} has id {self.end_id}, but the largest id is {largest}: CLIP "
          "reads a text's feature where its largest id stands"
      )
    if length < 3:
      raise ValueError(f"length={length}: start, end and one token need 3")
    if not 0 <= pad_id <= largest:
      raise ValueError(f"pad_id={pad_id}: expected an id from 0 to {largest}")
    self.length = length
    self.truncate = truncate
    self.pad_id = pad_id
    self._tokens = {i: token for token, i in self.vocabulary.items()}
    self._bytes = {c: b for b, c in enumerate(_byte_letters())}
    self._engine = tokenizers.Tokenizer(
        models.BPE(
            self.vocabulary,
            list(self.merges),
            unk_token=END,
            end_of_word_suffix=SUFFIX,
        )
    )
    self._engine.pre_tokenizer = _pre_tokenizer()
    self._engine.add_special_tokens([START, END])

  @property
  def vocabulary_size(self) -> int:
    """One more than the largest id: rows of an embedding table."""
    return self.end_id + 1

  def encode(self, text: str | Sequence[str]) -> np.ndarray:
    """Ids of one text, i32[L], or of several, i32[B, L]: start, text, end, pad.

    Raises:
      ValueError: if a text is too long and `truncate` is off; it names all.
    """
    texts = [text] if isinstance(text, str) else list(text)
    # One by one: a batch would start threads, which the callers have already.
    rows = [
        self._engine.encode(clean(t), add_special_tokens=False).ids
        for t in texts
    ]
    room = self.length - 2
    if not self.truncate and any(len(row) > room for row in rows):
      lines = [
          f"\n  {len(row)} tokens: {t[:60]!r}"
          for row, t in zip(rows, texts, strict=True)
          if len(row) > room
      ]
      raise ValueError(
          f"text longer than the {room} tokens that length={self.length} "
          f"leaves between start and end:{''.join(lines)}\n"
          "Shorten it, or make the tokenizer longer or with truncate=True."
      )
    ids = np.full((len(rows), self.length), self.pad_id, np.int32)
    ids[:, 0] = self.start_id
    for out, row in zip(ids, rows, strict=True):
      kept = row[:room]
      out[1 : 1 + len(kept)] = kept
      out[1 + len(kept)] = self.end_id
    return ids[0] if isinstance(text, str) else ids

  def decode(self, ids: np.ndarray | Sequence[int]) -> str:
    """The text of one row of ids, i32[L], up to its end, a space a piece.

    Raises:
      ValueError: if an id is not in the vocabulary.
    """
    ids = [int(i) for i in ids]
    if self.end_id in ids:
      ids = ids[: ids.index(self.end_id)]
    unknown = sorted({i for i in ids if i not in self._tokens})
    if unknown:
      raise ValueError(
          f"ids {unknown} are not among the {len(self._tokens)} of the "
          "vocabulary"
      )
    pieces = "".join(self._tokens[i] for i in ids if i != self.start_id)
    words = [
        bytes(self._bytes[c] for c in word).decode("utf-8", errors="replace")
        for word in pieces.split(SUFFIX)
    ]
    return " ".join(words).strip()

  def save_pretrained(self, directory: str | pathlib.Path) -> None:
    """Writes an HF directory, which transformers' CLIPTokenizer reads too.

    There the padding is the end token, as in OpenAI's own HF directories: a pad
    of 0 would make a special token of "!".
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": self.length,
        "bos_token": START,
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), END),
    }
    _write_json(directory / _VOCABULARY_FILE, self.vocabulary)
    _write_json(directory / _CONFIG_FILE, config)
    write_merges(directory / _MERGES_FILE, self.merges)

  @classmethod
  def from_openai(
      cls,
      path: str | pathlib.Path,
      *,
      vocabulary_size: int = OPENAI_VOCABULARY,
      **options: Unpack[Options],
  ) -> Self:
    """Reads OpenAI's `bpe_simple_vocab_16e6.txt.gz`, of which CLIP uses a part.

    Args:
      path: the file: gzip, one header line, then one merge a line.
      vocabulary_size: ids to make, special ones included.
      **options: `length`, `truncate`, `pad_id`.

    Raises:
      ValueError: if the file holds too few merges.
    """
    merges = _parse_merges(gzip.decompress(pathlib.Path(path).read_bytes()))
    wanted = vocabulary_size - 2 * 256 - 2
    if len(merges) < wanted:
      raise ValueError(
          f"{path}: {len(merges)} merges, but a vocabulary of "
          f"{vocabulary_size} ids needs {wanted}"
      )
    return cls(merges[:wanted], **options)

  @classmethod
  def from_directory(
      cls, directory: str | pathlib.Path, **options: Unpack[Options]
  ) -> Self:
    """Reads an HF directory: `vocab.json` + `merges.txt`, or `tokenizer.json`.

    Args:
      directory: of a CLIP checkpoint, or written by `save`.
      **options: `length` (by default what `tokenizer_config.json` says, else
        77), `truncate`, `pad_id`.

    Raises:
      FileNotFoundError: if neither form is there.
      ValueError: if `tokenizer.json` holds something else than a BPE.
    """
    directory = pathlib.Path(directory)
    config = directory / _CONFIG_FILE
    if "length" not in options and config.exists():
      limit = _read_json(config).get("model_max_length", LENGTH)
      # Where no limit is known, HF writes 1e30.
      options["length"] = int(limit) if limit < 2**20 else LENGTH
    single = directory / _TOKENIZER_FILE
    pair = (directory / _VOCABULARY_FILE, directory / _MERGES_FILE)
    if all(path.exists() for path in pair):
      vocabulary = _read_json(pair[0])
      merges = _parse_merges(pair[1].read_bytes())
    elif single.exists():
      model = _read_json(single).get("model", {})
      if model.get("type") != "BPE":
        raise ValueError(
            f"{single}: expected a BPE model, found {model.get('type')!r}"
        )
      vocabulary = model["vocab"]
      # Older files write a merge as one string, newer ones as a pair.
      merges = [
          merge.split(" ") if isinstance(merge, str) else merge
          for merge in model["merges"]
      ]
    else:
      raise FileNotFoundError(
          f"{directory}: no tokenizer: expected {_VOCABULARY_FILE} and "
          f"{_MERGES_FILE}, or {_TOKENIZER_FILE}"
      )
    return cls(merges, vocabulary=vocabulary, **options)

  @classmethod
  def tinyworld(cls, **options: Unpack[Options]) -> Self:
    """TinyWorld's own small vocabulary: one id for each of its words.

    `python -m mmjax.data.tinyworld vocabulary` writes it anew.
    """
    return cls(_parse_merges(tinyworld_merges().read_bytes()), **options)

  @classmethod
  def train(
      cls,
      texts: Iterable[str],
      vocabulary_size: int,
      **options: Unpack[Options],
  ) -> Self:
    """Learns merges from `texts`; the same texts give the same merges.

    Args:
      texts: any number of texts.
      vocabulary_size: ids at most; fewer where the texts have no more pairs.
      **options: `length`, `truncate`, `pad_id`.

    Raises:
      ValueError: if not even the bytes and the special tokens fit.
    """
    wanted = vocabulary_size - 2 * 256 - 2
    if wanted < 0:
      raise ValueError(
          f"vocabulary_size={vocabulary_size}: 512 bytes and 2 special tokens "
          "need 514"
      )
    engine = tokenizers.Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    engine.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * 256 + wanted,
        end_of_word_suffix=SUFFIX,
        initial_alphabet=_byte_letters(),
        # The trainer breaks ties by the ids of letters. It counts the letters
        # that end a piece in the order of a hash table, unless they come first.
        special_tokens=[letter + SUFFIX for letter in _byte_letters()],
        show_progress=False,
    )
    engine.train_from_iterator(map(clean, texts), trainer)
    return cls(json.loads(engine.to_str())["model"]["merges"], **options)


def load(
    path: str | None = None, **options: Unpack[Options]
) -> ClipTokenizer:
  """A tokenizer from wherever `path` points.

  Args:
    path: an HF directory, OpenAI's merges file, or None for TinyWorld's.
    **options: `length`, `truncate`, `pad_id`.
  """
  if path is None:
    return ClipTokenizer.tinyworld(**options)
  if pathlib.Path(path).is_dir():
    return ClipTokenizer.from_directory(path, **options)
  return ClipTokenizer.from_openai(path, **options)


def tinyworld_merges() -> pathlib.Path:
  """The file of TinyWorld's merges, beside the package's code."""
  return pathlib.Path(
      str(importlib.resources.files("mmjax.data") / "assets/tinyworld_bpe.txt")
  )


def write_merges(path: pathlib.Path, merges: Merges) -> None:
  """Writes merges as HF does: a header, then one pair a line."""
  lines = [_MERGES_HEADER, *(f"{left} {right}" for left, right in merges)]
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _parse_merges(data: bytes) -> list[tuple[str, str]]:
  # Not splitlines: byte letters include characters that it takes for line ends.
  lines = data.decode("utf-8").split("\n")[1:]
  return [tuple(line.split(" ")) for line in lines if line]


def _is_plain(text: str) -> bool:
  # What ftfy and HTML could change has controls, "&" or other than ASCII.
  return text.isascii() and text.isprintable() and "&" not in text


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
  pieces = tokenizers.Regex(_PIECES)
  return pre_tokenizers.Sequence([
      pre_tokenizers.Split(pieces, behavior="removed", invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])


def _byte_letters() -> list[str]:
  """The printable letter that stands for each byte, by byte.

  Bytes that print in Latin-1 stand for themselves; the others take the letters
  from U+0100 on, in order.
  """
  own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = iter(range(0x100, 0x200))
  return [chr(b) if b in own else chr(next(others)) for b in range(256)]


def _count(merges: Merges) -> dict[str, int]:
  letters = _byte_letters()
  # OpenAI counts the bytes that stand for themselves first.
  letters.sort(key=lambda letter: (ord(letter) >= 0x100, ord(letter)))
  tokens = letters + [letter + SUFFIX for letter in letters]
  tokens += ["".join(merge) for merge in merges] + [START, END]
  # Two merges may spell one token; it keeps its first id.
  return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def _read_json(path: pathlib.Path) -> dict:
  return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: pathlib.Path, value: Mapping) -> None:
  text = json.dumps(value, ensure_ascii=False, indent=2)
  path.write_text(text + "\n", encoding="utf-8")
