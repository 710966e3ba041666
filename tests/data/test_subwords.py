"""Language model tokenizers: one interface, whatever file they come from."""

import io
import json
import pathlib
import pickle

import numpy as np
import pytest
import sentencepiece
import tokenizers

from mmjax.data import subwords

TEXTS = [
    "", "which digit is red?", " two  spaces\n\n", "naïve 中文 🙂", "USER: a"
]  # fmt: skip


@pytest.fixture(scope="module")
def tinyworld():
  return subwords.load()


@pytest.fixture(scope="module")
def piece_bytes():
  """A sentencepiece model with LLaMA's settings."""
  sink = io.BytesIO()
  words = "a photo of the digit seven in red and what is shown USER ASSISTANT"
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([words, "is it red? yes: seven."] * 20),
      model_writer=sink,
      model_type="bpe",
      vocab_size=340,
      byte_fallback=True,
      remove_extra_whitespaces=False,
      normalization_rule_name="identity",
      hard_vocab_limit=False,
      minloglevel=2,
  )
  return sink.getvalue()


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request, tinyworld, piece_bytes):
  if request.param == "byte-level":
    return tinyworld
  return subwords.SentencePiece(piece_bytes)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
  ids = tokenizer.encode(text)
  assert all(type(i) is int and 0 <= i < tokenizer.vocabulary_size for i in ids)
  assert tokenizer.decode(np.asarray(ids, np.int32)) == text


def test_ids_are_the_library_s_own(piece_bytes):
  engine = sentencepiece.SentencePieceProcessor(model_proto=piece_bytes)
  ours = subwords.SentencePiece(piece_bytes)
  assert ours.encode("what is it") == engine.encode("what is it")
  assert (ours.special("<s>"), ours.special("</s>")) == (1, 2)
  assert ours.vocabulary_size == engine.get_piece_size()
  single = tokenizers.Tokenizer.from_file(str(subwords.tinyworld_file()))
  assert subwords.load().encode("a red 7") == single.encode("a red 7").ids


def test_text_never_yields_special_tokens(tokenizer):
  for name, i in tokenizer.specials.items():
    if name == "<unk>":
      continue
    ids = tokenizer.encode(f"a {name} b {name}")
    assert i not in ids
    assert tokenizer.decode(ids) == f"a {name} b {name}"
    assert tokenizer.decode([i, *tokenizer.encode("red"), i]) == "red"


def test_extra_specials_follow_the_last_id(piece_bytes):
  extra = ("<image>", "</s>", "[RET]")
  for plain, more in (
      (
          subwords.SentencePiece(piece_bytes),
          subwords.SentencePiece(piece_bytes, extra),
      ),
      (
          subwords.HuggingFace.train(["a b"], 270, ["</s>"]),
          subwords.HuggingFace(
              subwords.HuggingFace.train(["a b"], 270, ["</s>"]).__reduce__()[
                  1
              ][0],
              extra,
          ),
      ),
  ):
    size = plain.vocabulary_size
    assert more.special("<image>") == size
    assert more.special("[RET]") == size + 1
    assert more.special("</s>") == plain.special("</s>")
    assert more.vocabulary_size == size + 2
    assert more.special("[RET]") not in more.encode("a [RET] b")
    assert more.decode([*plain.encode("a"), size, size + 1]) == "a"


def test_unknown_names_and_ids(tokenizer):
  with pytest.raises(ValueError, match="no special token '</x>' .* '</s>'\\?"):
    tokenizer.special("</x>")
  size = tokenizer.vocabulary_size
  with pytest.raises(ValueError, match=rf"\[-1, {size}\] are not among"):
    tokenizer.decode([-1, 5, size])


def test_a_tokenizer_can_be_sent_to_another_process(tokenizer):
  again = pickle.loads(pickle.dumps(tokenizer))
  for text in (*TEXTS, "</s>"):
    assert again.encode(text) == tokenizer.encode(text)
  assert again.specials == tokenizer.specials


def test_files_and_directories(tmp_path, piece_bytes, tinyworld):
  tinyworld.save(tmp_path / "tokenizer.json")
  assert subwords.load(tmp_path).encode("red") == tinyworld.encode("red")
  both = subwords.load(str(tmp_path / "tokenizer.json"), extra=["<x>"])
  assert both.special("<x>") == tinyworld.vocabulary_size
  for name in ("tokenizer.model", "spiece.model"):
    directory = tmp_path / name.split(".")[0]
    directory.mkdir()
    (directory / name).write_bytes(piece_bytes)
    found = subwords.load(directory)
    assert found.encode("red") == subwords.load(directory / name).encode("red")


def test_a_pair_of_files_is_the_same_tokenizer(tmp_path, tinyworld):
  model = json.loads(subwords.tinyworld_file().read_text())["model"]
  merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
  (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
  (tmp_path / "merges.txt").write_text("\n".join(merges) + "\n")
  (tmp_path / "special_tokens_map.json").write_text(
      json.dumps({
          "eos_token": {"content": "</s>"},
          "pad_token": "<pad>",
          "additional_special_tokens": ["[RET]", {"content": "absent"}],
      })
  )
  found = subwords.load(tmp_path)
  names = ("<pad>", "</s>", "[RET]")
  assert found.specials == {name: tinyworld.special(name) for name in names}
  for text in TEXTS:
    assert found.encode(text) == tinyworld.encode(text)
  (tmp_path / "vocab.json").write_text("{")
  with pytest.raises(ValueError, match="vocab.json: damaged, .*byte-level BPE"):
    subwords.load(tmp_path)


def test_what_is_no_tokenizer_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="nothing.json: no such"):
    subwords.load(tmp_path / "nothing.json")
  (tmp_path / "readme.md").write_text("hello")
  with pytest.raises(
      FileNotFoundError, match="expected tokenizer.json, .* found readme.md"
  ):
    subwords.load(tmp_path)
  with pytest.raises(ValueError, match="readme.md: expected tokenizer.json"):
    subwords.load(tmp_path / "readme.md")
  for name, data in (
      ("tokenizer.json", b'{"model": {"type": "BPE"'),
      ("other.json", b"[]"),
      ("bad.json", b"\xff\xfe"),
      ("tokenizer.model", b"no protocol buffer"),
      ("empty.model", b""),
  ):
    path = pathlib.Path(tmp_path / name)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}: damaged, or not a tokeni"):
      subwords.load(path)


def test_training_is_repeatable_and_bounded():
  texts = ["low lower lowest", "new newer newest"] * 3
  one = subwords.HuggingFace.train(texts, 264, ["<s>", "</s>"])
  two = subwords.HuggingFace.train(texts, 264, ["<s>", "</s>"])
  assert one.vocabulary_size == 264
  assert one.encode("newest low") == two.encode("newest low")
  assert one.specials == {"<s>": 0, "</s>": 1}
  whole = subwords.HuggingFace.train(texts, 300, ["<s>", "</s>"])
  assert whole.vocabulary_size < 300
  assert len(whole.encode("low newest lower")) == 3
  with pytest.raises(ValueError, match="2 special tokens need 258"):
    subwords.HuggingFace.train(texts, 257, ["<s>", "</s>"])


def test_tables_of_another_vocabulary_are_refused(tinyworld):
  size = tinyworld.vocabulary_size
  for rows in (size, size + 100, size + subwords.PADDING):
    subwords.check_vocabulary(tinyworld, rows, "here")
  for rows in (size - 1, size + subwords.PADDING + 1):
    with pytest.raises(ValueError, match=f"here: .* {rows} rows, .* {size} id"):
      subwords.check_vocabulary(tinyworld, rows, "here")
