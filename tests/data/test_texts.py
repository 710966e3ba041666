"""Texts for text towers, by hand and as transformers cuts them."""

import io

import numpy as np
import pytest
import sentencepiece

from mmjax.data import texts

CORPUS = ["a small red seven on white", "der kleine Hund läuft", "猫が寝ている"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(CORPUS * 20),
      model_writer=model,
      vocab_size=70,
      model_type="unigram",
      hard_vocab_limit=False,
      add_dummy_prefix=True,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      eos_piece="</s>",
      pad_piece="<pad>",
      minloglevel=2,
  )
  path = tmp_path_factory.mktemp("texts") / "spiece.model"
  path.write_bytes(model.getvalue())
  return path


def test_rows_end_and_are_padded(vocabulary):
  make = lambda **options: texts.Texts(
      str(vocabulary), length=12, end="</s>", **options
  )
  row = make().encode("A small  Red")
  assert row.shape == (12,) and row.dtype == np.int32
  end = row.tolist().index(1)
  assert (row[end + 1 :] == 0).all() and (row[:end] > 2).all()
  # The end repeated, as SigLIP has it; no punctuation; small letters.
  sticky = make(pad="</s>", punctuation=False)
  np.testing.assert_array_equal(
      sticky.encode(["a  small, RED!", "a small red"])[0],
      np.where(row == 0, 1, row),
  )
  # A text that is too long loses its end, not its mark.
  long = make().encode(" ".join(CORPUS))
  assert long[-1] == 1 and (long[:-1] > 2).all()
  other = make().encode(["der kleine hund", "猫が寝ている"])
  assert other.shape == (2, 12) and (other[0] != other[1]).any()
  assert make().vocabulary_size == sticky.vocabulary_size


def test_what_is_refused(vocabulary):
  with pytest.raises(ValueError, match="no special token '<eos>'"):
    texts.Texts(str(vocabulary))
  with pytest.raises(ValueError, match="length=1"):
    texts.Texts(str(vocabulary), length=1, end="</s>")
  with pytest.raises(ValueError, match="table of 32000 rows"):
    texts.Texts(str(vocabulary), end="</s>", rows=32_000)


def test_ids_are_those_of_transformers(vocabulary):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.SiglipTokenizer(str(vocabulary), pad_token="</s>")
  ours = texts.Texts(
      str(vocabulary), 24, end="</s>", pad="</s>", punctuation=False
  )
  for text in (*CORPUS, "A small,  red SEVEN!", "läuft?"):
    expected = theirs(
        text, padding="max_length", max_length=24, truncation=True
    )["input_ids"]
    assert ours.encode(text).tolist() == expected
