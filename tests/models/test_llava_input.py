"""What is wrong with LLaVA's input is said before anything is compiled."""

from pathlib import Path

import numpy as np
import pytest

from mmjax import sharding, verbs
from mmjax.data.templates import IMAGE, Turn
from mmjax.train.plan import make_plan

CONFIG = str(Path(__file__).parents[2] / "configs/llava.py:stage=finetune")


class Talk:
  """One conversation, with or without a picture on either side."""

  def __init__(self, said: int, shown: int) -> None:
    self.said, self.shown = said, shown

  def __len__(self):
    return 1

  def conversation(self, index):
    return [Turn("user", IMAGE * self.said + "what?"), Turn("assistant", "one")]

  def pictures(self, index):
    return np.zeros((self.shown, 64, 64, 3), np.float32)

  def labels(self, index):
    return {}


def plan(**changes):
  """Plans LLaVA's second stage with one stream, changed in some places."""
  config = verbs.load_config(CONFIG)
  with config.unlocked():
    config.streams = config.streams[:1]
    source = config.streams[0]["source"]
    for key, value in changes.items():
      if key == "source":
        source["source"] = dict(type=f"{__name__}:Talk", **value)
      elif key == "vocab":
        config.system.llm.vocab = value
      else:
        source["formatter"][key] = value
    if source["source"].get("shown") == 0:
      source["key"] = "images"
  return make_plan(config, sharding.make_mesh({}))


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(source=dict(said=1, shown=0)), "1 <image> in the text, but 0"),
        (dict(source=dict(said=0, shown=1)), "0 <image> in the text, but 1"),
        (
            dict(source=dict(said=0, shown=0)),
            r"needs the batch keys .*lacks \['image'\]",
        ),
        (dict(length=60), "tokens does not fit length=60"),
        (
            dict(
                template=dict(type="mmjax.data.templates:load", name="vicunna")
            ),
            "did you mean 'vicuna'",
        ),
        (dict(vocab=700), "table of 700 rows, but the tokenizer has 758 ids"),
        (dict(vocab=32_000), "table of 32000 rows, but the tokenizer has 758"),
    ],
)
def test_one_clear_error(changes, message):
  with pytest.raises(ValueError, match=message):
    plan(**changes)


def test_what_is_right_is_planned():
  assert "next_token" in plan().metrics
