"""Conversations become examples, whatever is shown in them."""

import numpy as np
import pytest

from mmjax.data import batch as batch_lib
from mmjax.data import conversations, mixture, pack, subwords, templates

TOKENIZER = subwords.load()


class Talk:
  """Conversations that show `shown` pictures, each with its address."""

  def __init__(self, shown):
    self.shown = shown

  def __len__(self):
    return 5

  def conversation(self, index):
    shown = "<image>" * self.shown
    return [("user", f"{shown}a {'red ' * index}"), ("assistant", "seven")]

  def pictures(self, index):
    values = index + np.arange(self.shown, dtype=np.float32) / 10
    return np.ones((self.shown, 6, 8, 3), np.float32) * values.reshape(
        -1, 1, 1, 1
    )

  def answer(self, index):
    return "seven"

  def labels(self, index):
    return {"identity": np.int32(index)}


def written(shown, key="images", length=32):
  template = templates.load("chatml", system="")
  formatter = templates.Formatter(TOKENIZER, template, length, image_tokens=2)
  return conversations.Written(Talk(shown), formatter, key)


@pytest.mark.parametrize(
    "shown,key,shape",
    [(0, "images", None), (1, "image", (6, 8, 3)), (1, "images", (1, 6, 8, 3)),
     (3, "images", (3, 6, 8, 3))],
)  # fmt: skip
def test_examples_are_rows_of_the_alphabet(shown, key, shape):
  source = written(shown, key)
  example = source[2]
  batch_lib.check({k: v[None] for k, v in example.items()}, "written")
  assert ("image" in example or "images" in example) == bool(shown)
  if shown:
    assert example[key].shape == shape
    assert example[key].flat[0] == 2
  assert example["identity"] == 2
  # The anchor is the last token.
  assert example["segment"][example["anchor"]] == 1
  assert example["segment"].sum() == example["anchor"] + 1
  assert example["source"].max() == 2 * shown - 1


def test_a_prompt_is_the_example_without_its_answer():
  source = written(1)
  prompt, example = source.prompt(3), source[3]
  assert prompt.keys() == example.keys()
  count = prompt["segment"].sum()
  np.testing.assert_array_equal(
      prompt["tokens"][:count], example["tokens"][:count]
  )
  learned = example["tokens"][count:][example["weight"][count:] > 0]
  assert TOKENIZER.decode(learned) == source.answer(3) == "seven"
  assert not prompt["weight"].any() and not example["weight"][:count].any()
  np.testing.assert_array_equal(prompt["images"], example["images"])


def test_written_conversations_stream_and_pack():
  stream = mixture.batches([mixture.Stream(written(2))], batch_size=2, seed=0)
  batch = next(stream)
  assert batch["images"].shape == (2, 2, 6, 8, 3)
  source = written(2)
  packed = pack.Packed(source, length=64, slots=6)
  members = packed.members(0)
  assert len(members) > 1
  row = packed[0]
  for number, member in enumerate(members, 1):
    own = row["segment"] == number
    example = source[member]
    count = example["segment"].sum()
    np.testing.assert_array_equal(row["tokens"][own], example["tokens"][:count])
    shown = row["images"][2 * (number - 1) : 2 * number]
    np.testing.assert_array_equal(shown, example["images"])
    rows = row["source"][own]
    assert rows[rows >= 0].tolist() == list(range(4 * number - 4, 4 * number))


def test_bad_keys_are_refused():
  with pytest.raises(ValueError, match="key='picture': expected one of image"):
    written(1, "picture")
  with pytest.raises(ValueError, match="'image', but Talk shows 2 pictures"):
    written(2, "image")
