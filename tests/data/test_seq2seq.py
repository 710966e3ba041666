"""What is read and what is written: answers, beginnings of them, holes."""

import numpy as np
import pytest

from mmjax.data import batch, pack, subwords, templates
from mmjax.data.conversations import Written
from mmjax.data.seq2seq import Answered, Corrupted
from mmjax.data.tinyworld import SceneCaptions, VisualQuestions

TOKENIZER = subwords.load()


def written(source, template="vicuna", **kwargs):
  formatter = templates.Formatter(TOKENIZER, template, 120, **kwargs)
  return Written(source, formatter, key="image")


def ids(row):
  return row[row >= 0].tolist()


def test_an_answer_follows_what_the_encoder_reads():
  source = written(VisualQuestions("test"), image_tokens=4)
  for index in range(5):
    example = Answered(source, 6)[index]
    whole, prompt = source[index], source.prompt(index)
    count = np.count_nonzero(example["segment"])
    assert set(example) == {"tokens", "segment", "source", "targets", "image"}
    np.testing.assert_array_equal(example["tokens"], prompt["tokens"])
    np.testing.assert_array_equal(example["source"], prompt["source"])
    joined = [*example["tokens"][:count], *ids(example["targets"])]
    assert joined == whole["tokens"][whole["segment"] > 0].tolist()
    assert TOKENIZER.decode(ids(example["targets"])).strip() == source.answer(
        index
    )
  batch.check({key: x[None] for key, x in example.items()}, "answers")


def test_the_encoder_may_read_a_beginning_of_the_answer():
  source = written(SceneCaptions("test"), "plain", image_tokens=4)
  begun = Answered(source, 40, begun=1.0)
  given = []
  for index in range(40):
    example, whole = begun[index], source[index]
    count = np.count_nonzero(example["segment"])
    joined = [*example["tokens"][:count], *ids(example["targets"])]
    assert joined == whole["tokens"][whole["segment"] > 0].tolist()
    assert len(ids(example["targets"])) >= 1
    given.append(count - 5)  # The start and the picture.
  assert min(given) == 0 and len(set(given)) > 8
  again = begun[3]["tokens"]
  np.testing.assert_array_equal(again, begun[3]["tokens"])


class Texts:
  """Documents of 1, 2, ... tokens that count from 100."""

  def __init__(self, sizes=()):
    self.sizes = sizes

  def __len__(self):
    return 60

  def document(self, index):
    count = index + 2
    none = np.full(count, -1, np.int32)
    tokens = np.arange(100, 100 + count, dtype=np.int32)
    return pack.Document(
        tokens, np.ones(count, np.float32), none, none, self.sizes
    )


def test_holes_and_what_was_in_them_make_the_text():
  source = Corrupted(Texts(), 64, 32, marker=999, end=1)
  hidden = []
  for index in range(len(source)):
    example = source[index]
    read = example["tokens"][example["segment"] > 0].tolist()
    written = ids(example["targets"])
    assert read.pop() == 1 and written.pop() == 1
    holes = sum(token > 900 for token in read)
    markers = [999 - n for n in range(holes)]
    assert [t for t in read if t > 900] == markers
    assert [t for t in written if t > 900] == markers
    filled = []
    for token in read:
      if token <= 900:
        filled.append(token)
        continue
      begin = written.index(token) + 1
      end = written.index(token - 1) if token - 1 in written else None
      filled += written[begin:end]
    assert filled == list(range(100, 102 + index))
    hidden.append(len(written) - holes)
    assert hidden[-1] == max(1, round((index + 2) * 0.15))
    assert holes == max(1, round(hidden[-1] / 3))
  firsts = {int(Corrupted(Texts(), 64, 32, 999, 1, seed=s)[50]["tokens"][0])
            for s in range(30)}  # fmt: skip
  assert firsts == {100}  # A text never begins with a hole.


def test_a_long_text_is_cut():
  example = Corrupted(Texts(), 20, 32, marker=999, end=1)[50]
  read = example["tokens"][example["segment"] > 0]
  kept = len(read) + len(ids(example["targets"])) - 2
  holes = sum(token > 900 for token in read)
  assert kept - 2 * holes == 19 and read[-1] == 1


def test_what_cannot_be_is_refused():
  source = written(VisualQuestions("test"))
  with pytest.raises(ValueError, match="target_length=0, begun=0.0"):
    Answered(source, 0)
  with pytest.raises(ValueError, match="begun=2"):
    Answered(source, 4, begun=2.0)
  with pytest.raises(ValueError, match="2 ids to write.*target_length=1"):
    Answered(source, 1)[0]
  with pytest.raises(ValueError, match="density=0"):
    Corrupted(Texts(), 20, 20, 999, 1, density=0.0)
  with pytest.raises(ValueError, match="shows 1 pictures"):
    Corrupted(Texts((4,)), 20, 20, 999, 1)[0]
