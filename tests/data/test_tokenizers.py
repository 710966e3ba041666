"""CLIP's byte-pair encoding, against transformers and against a plain one."""

import gzip
import json
import pathlib
import pickle
import re

import numpy as np
import pytest

from mmjax.data import tokenizers
from mmjax.data.tokenizers import ClipTokenizer

GOLDEN = pathlib.Path(__file__).parent.parent / "golden/clip_tokenizer"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())["texts"]
TEXTS = [case["text"] for case in EXPECTED]


def letters():
  """The letters of the 256 bytes, counted as in Radford et al.'s code."""
  own = [*range(33, 127), *range(161, 173), *range(174, 256)]
  table = {byte: chr(byte) for byte in own}
  for byte in range(256):
    table.setdefault(byte, chr(256 + len(table) - len(own)))
  return table


def encode_plainly(text, merges):
  """Tokens of an ASCII text, by merging the best pair until none is left."""
  rank = {tuple(pair): k for k, pair in enumerate(merges)}
  table, out = letters(), []
  for piece in re.findall(
      r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()
  ):
    parts = [table[byte] for byte in piece.encode()]
    parts[-1] += "</w>"
    while True:
      pairs = [
          (rank[pair], k)
          for k, pair in enumerate(zip(parts, parts[1:]))
          if pair in rank
      ]
      if not pairs:
        break
      _, k = min(pairs)
      parts[k : k + 2] = [parts[k] + parts[k + 1]]
    out += parts
  return out


def write_openai(path, merges):
  lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
  path.write_bytes(gzip.compress("\n".join(lines).encode()))


@pytest.fixture(scope="module")
def golden():
  return ClipTokenizer.from_directory(GOLDEN, length=256)


@pytest.mark.parametrize("case", EXPECTED, ids=lambda c: ascii(c["text"])[:20])
def test_ids_are_those_of_transformers(golden, case):
  ids = golden.encode(case["text"])
  count = len(case["ids"])
  assert ids[:count].tolist() == case["ids"]
  assert ids.dtype == np.int32 and ids.shape == (256,)
  assert not ids[count:].any()


@pytest.mark.parametrize(
    "text",
    [t for t in TEXTS if tokenizers.clean(t).isascii() and "<|" not in t],
)
def test_ids_are_those_of_a_plain_encoder(golden, text):
  tokens = encode_plainly(tokenizers.clean(text), golden.merges)
  ids = [golden.vocabulary[token] for token in tokens]
  found = golden.encode(text)[1:]
  assert found[: len(ids)].tolist() == ids
  assert found[len(ids)] == golden.end_id


def test_ids_count_bytes_then_merges_then_specials(golden):
  order = sorted(golden.vocabulary, key=golden.vocabulary.get)
  single = list(letters().values())
  single.sort(key=lambda letter: (ord(letter) > 255, ord(letter)))
  assert order[:256] == single
  assert order[256:512] == [letter + "</w>" for letter in single]
  assert order[512:-2] == ["".join(pair) for pair in golden.merges]
  assert order[-2:] == ["<|startoftext|>", "<|endoftext|>"]
  # As in the published vocabulary, where "a" alone is 320.
  assert golden.vocabulary["a</w>"] == 320
  assert golden.end_id == max(golden.vocabulary.values())
  assert golden.vocabulary_size == len(order)


def test_a_batch_is_its_rows(golden):
  rows = golden.encode(TEXTS)
  assert rows.shape == (len(TEXTS), 256) and rows.dtype == np.int32
  np.testing.assert_array_equal(rows, [golden.encode(t) for t in TEXTS])
  assert golden.encode([]).shape == (0, 256)


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_clean_text_but_for_spaces(golden, text):
  solid = lambda t: re.sub(r"\s", "", t)
  expected = tokenizers.clean(text).split("<|startoftext|>")[-1]
  expected = expected.split("<|endoftext|>")[0]
  assert solid(golden.decode(golden.encode(text))) == solid(expected)


def test_decoding_stops_at_the_end_and_refuses_strange_ids(golden):
  ids = golden.encode("a photo of a dog")
  assert golden.decode(ids) == "a photo of a dog"
  assert golden.decode([golden.end_id, 9999]) == ""
  with pytest.raises(ValueError, match=r"ids \[-1, 9999\] are not among the"):
    golden.decode([5, 9999, -1])


@pytest.mark.parametrize(
    "text,expected",
    [
        ("  A\t b \n C ", "a b c"),
        ("&amp;amp; &lt;b&gt; &#233;", "& <b> é"),
        ("schÃ¶n", "schön"),
        ("“curly” ‘quotes’", "\"curly\" 'quotes'"),
        ("e\u0301", "é"),
        ("plain, ascii: (text) 'n' more!", "plain, ascii: (text) 'n' more!"),
    ],
)
def test_text_is_repaired(text, expected):
  assert tokenizers.clean(text) == expected


def test_what_is_too_long_is_an_error_that_names_all(golden):
  short = ClipTokenizer(golden.merges, length=5)
  assert short.encode("a a a").tolist()[-1] == short.end_id
  with pytest.raises(ValueError) as error:
    short.encode(["a", "a a a a", "a photo of a dog"])
  message = str(error.value)
  assert "longer than the 3 tokens that length=5 leaves" in message
  assert "4 tokens: 'a a a a'" in message
  assert "'a photo of a dog'" in message and "truncate=True" in message


def test_truncation_ends_with_the_end(golden):
  cut = ClipTokenizer(golden.merges, length=5, truncate=True)
  whole = golden.encode("a photo of a dog")
  ids = cut.encode("a photo of a dog")
  assert ids.tolist() == [*whole[:4], cut.end_id]


def test_padding_may_be_the_end(golden):
  padded = ClipTokenizer(golden.merges, length=6, pad_id=golden.end_id)
  assert padded.encode("a")[2:].tolist() == [padded.end_id] * 4


def test_a_saved_directory_reads_back(tmp_path):
  trained = ClipTokenizer.train(["hello hello world"] * 3, 520, length=9)
  trained.save_pretrained(tmp_path / "saved")
  again = ClipTokenizer.from_directory(tmp_path / "saved")
  assert again.length == 9 and again.vocabulary == trained.vocabulary
  assert again.merges == trained.merges
  assert trained.vocabulary_size == 520
  text = "hello wide world"
  np.testing.assert_array_equal(
      ClipTokenizer.from_directory(tmp_path / "saved", length=30).encode(text),
      ClipTokenizer(trained.merges, length=30).encode(text),
  )


@pytest.mark.parametrize("joined", [True, False])
def test_a_single_file_reads_as_the_pair_does(golden, tmp_path, joined):
  merges = [
      " ".join(pair) if joined else list(pair) for pair in golden.merges
  ]
  model = {"type": "BPE", "vocab": golden.vocabulary, "merges": merges}
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps({"model": model}))
  config = tmp_path / "tokenizer_config.json"
  config.write_text(json.dumps({"model_max_length": 10**30}))
  single = ClipTokenizer.from_directory(tmp_path)
  assert single.length == 77
  np.testing.assert_array_equal(
      single.encode("a photo of a dog"), golden.encode("a photo of a dog")[:77]
  )


def test_directories_without_a_tokenizer_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"expected vocab.json and merg"):
    ClipTokenizer.from_directory(tmp_path)
  (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
  with pytest.raises(ValueError, match="expected a BPE model, found 'Unigram'"):
    ClipTokenizer.from_directory(tmp_path)


def test_openais_file_gives_openais_ids(tmp_path):
  single = list(letters().values())
  merges = [(a, b) for a in single for b in single][:50000]
  write_openai(tmp_path / "bpe.txt.gz", merges)
  tokenizer = ClipTokenizer.from_openai(tmp_path / "bpe.txt.gz")
  assert tokenizer.vocabulary_size == 49408
  assert (tokenizer.start_id, tokenizer.end_id) == (49406, 49407)
  assert tokenizer.merges == tuple(merges[:48894])
  ids = tokenizer.encode("a")
  assert ids.shape == (77,)
  assert ids[:4].tolist() == [49406, 320, 49407, 0]
  write_openai(tmp_path / "few.txt.gz", merges[:10])
  with pytest.raises(ValueError, match="10 merges, but .* needs 48894"):
    ClipTokenizer.from_openai(tmp_path / "few.txt.gz")


def test_load_follows_the_path(golden, tmp_path):
  write_openai(tmp_path / "bpe.txt.gz", [("a", "b")] * 48894)
  assert tokenizers.load(str(GOLDEN)).merges == golden.merges
  assert tokenizers.load(length=12).length == 12
  assert tokenizers.load().merges == ClipTokenizer.tinyworld().merges
  openai = tokenizers.load(str(tmp_path / "bpe.txt.gz"), truncate=True)
  assert openai.truncate and openai.merges[0] == ("a", "b")


def test_training_is_deterministic_even_among_equals():
  # Every pair of letters comes as often as every other.
  texts = ["ab cd ef gh ij kl mn op qr st uv wx yz", "ba dc fe hg ji lk nm"]
  trained = [ClipTokenizer.train(iter(texts), 530) for _ in range(8)]
  assert len({tokenizer.merges for tokenizer in trained}) == 1
  assert trained[0].vocabulary_size == 530


def test_training_learns_the_words_of_the_texts():
  texts = ["the red seven", "a blue seven", "the small eight"] * 5
  tokenizer = ClipTokenizer.train(texts, 600)
  assert tokenizer.encode("seven")[2] == tokenizer.end_id
  with pytest.raises(ValueError, match="vocabulary_size=513: .* need 514"):
    ClipTokenizer.train(texts, 513)


def test_tokens_that_two_merges_spell_have_one_id():
  merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
  tokenizer = ClipTokenizer(merges)
  assert tokenizer.vocabulary["abc"] == 512 + 2
  assert tokenizer.end_id == 512 + 3 + 1


def test_a_vocabulary_must_have_its_ends():
  good = ClipTokenizer([]).vocabulary
  with pytest.raises(ValueError, match=r"lacks <\|startoftext\|> and"):
    ClipTokenizer([], vocabulary={"a": 0})
  with pytest.raises(ValueError, match="has id 513, but the largest id is 514"):
    ClipTokenizer([], vocabulary=good | {"more": 514})


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(length=2), "length=2: start, end and one token need 3"),
        (dict(pad_id=514), "pad_id=514: expected an id from 0 to 513"),
        (dict(pad_id=-1), "pad_id=-1"),
    ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    ClipTokenizer([], **options)


def test_a_tokenizer_can_be_sent_to_another_process(golden):
  again = pickle.loads(pickle.dumps(golden))
  np.testing.assert_array_equal(again.encode(TEXTS), golden.encode(TEXTS))
