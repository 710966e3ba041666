"""Rows of captions and searches."""

import numpy as np
import pytest

from mmjax.data import batch as batch_lib
from mmjax.data import grounding, subwords, templates
from mmjax.data.tinyworld import RetrievalDialogues

SOURCE = RetrievalDialogues("train", length=7)
TOKENIZER = subwords.load()
SLOTS, LENGTH = 2, 200


def rows(join):
  make = lambda name: templates.Formatter(
      TOKENIZER, name, 64, image_tokens=SLOTS
  )
  return grounding.Grounding(
      SOURCE, make("fromage_caption"), make("fromage_retrieval"), LENGTH, join
  )


@pytest.mark.parametrize("join", [0.0, 1.0])
def test_every_text_stands_behind_its_picture_and_alone(join):
  source = rows(join)
  assert len(source) == 3
  row = source[1]
  batch_lib.check({key: value[None] for key, value in row.items()}, "row")
  texts = [TOKENIZER.encode(SOURCE.answer(index)) for index in (2, 3)]
  begin, ret = TOKENIZER.special("</s>"), TOKENIZER.special("[RET]")
  at = 0
  for n, text in enumerate(texts):
    count = SLOTS + 1 + len(text)
    part = slice(at, at + count)
    assert row["source"][part].tolist() == [
        *range(n * SLOTS, (n + 1) * SLOTS), *[-1] * (len(text) + 1)
    ]  # fmt: skip
    assert row["tokens"][at + SLOTS : at + count].tolist() == [begin, *text]
    assert (row["media"][part] == n).all()
    assert row["weight"][part].tolist() == [0.0] * SLOTS + [1.0] * (
        len(text) + 1
    )
    assert (row["segment"][part] == (1 if join else n + 1)).all()
    assert row["position"][at] == (at if join else 0)
    at += count
  for n, text in enumerate(texts):
    count = len(text) + 2
    part = slice(at, at + count)
    assert row["tokens"][part].tolist() == [begin, *text, ret]
    assert row["weight"][part].tolist() == [0.0] + [1.0] * (len(text) + 1)
    assert (row["media"][part] == -1).all()
    assert (row["source"][part] == -1).all()
    assert row["anchors"][n] == at + count - 1
    at += count
    np.testing.assert_array_equal(
        row["images"][n], SOURCE.labels(2 + n)["image"]
    )
  assert (row["segment"][at:] == 0).all()


def test_half_of_the_captions_are_joined():
  source = grounding.Grounding(
      RetrievalDialogues("train", length=400),
      templates.Formatter(TOKENIZER, "fromage_caption", 64),
      templates.Formatter(TOKENIZER, "fromage_retrieval", 64),
      LENGTH,
  )
  kinds = [source[index]["segment"].max() for index in range(200)]
  assert set(kinds) == {3, 4} and 70 < kinds.count(3) < 130
  with pytest.raises(IndexError, match="200"):
    source[200]


def test_what_is_refused():
  with pytest.raises(ValueError, match="join=2"):
    rows(2)
