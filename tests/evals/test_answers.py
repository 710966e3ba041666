"""Greedy answers: written by a system that is known, and scored."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.data import conversations, subwords, templates
from mmjax.data.templates import IMAGE, Turn
from mmjax.data.tinyworld import questions, text
from mmjax.evals import answers, captions
from mmjax.models import llm
from mmjax.nn import rope

SAID = {
    "what?": "seven",
    "how many?": "two of them",
    "and now, where is it?": "left",
}


class Talk:
  """Conversations whose answers are fixed; a picture where there is one."""

  def __init__(self, shown):
    self.shown = shown

  def __len__(self):
    return len(SAID)

  def conversation(self, index):
    asked = list(SAID)[index]
    picture = f"{IMAGE}\n" * self.shown
    return [Turn("user", f"{picture}{asked}"), Turn("assistant", SAID[asked])]

  def pictures(self, index):
    return np.full((self.shown, 8, 8, 3), index / 4, np.float32)

  def answer(self, index):
    return list(SAID.values())[index]

  def kind(self, index):
    return "place" if index == 2 else "thing"

  def labels(self, index):
    return {}


def talk(shown=0, template="vicuna", length=80):
  formatter = templates.Formatter(subwords.load(), template, length)
  return conversations.Written(Talk(shown), formatter, "images")


class Parrot(nn.Module):
  """Says what a table holds for the sum of the prompt's ids, token by token."""

  vocab: int = 1024

  def setup(self):
    self.table = self.param("table", nn.initializers.zeros, (1, 1))

  @nn.nowrap
  def init_state(self, batch, slots):
    return {key: jnp.zeros(batch, jnp.int32) for key in ("row", "at")}

  def prefill(self, batch, state, count):
    real = jnp.arange(batch["tokens"].shape[1]) < count[:, None]
    total = jnp.where(real, batch["tokens"], 0).sum(axis=1)
    row = (self.keys == total[:, None]).argmax(axis=1)
    return self._say(row, state["at"], count > 0)

  def reply(self, tokens, state, count):
    return self._say(state["row"], state["at"], count > 0)

  @property
  def keys(self):
    source = talk()
    rows = [source.prompt(i)["tokens"].sum() for i in range(len(source))]
    return jnp.asarray(rows)[None]

  @property
  def replies(self):
    source = talk()
    rows = np.zeros((len(source), 8), np.int32)
    for i in range(len(source)):
      row = source[i]
      ids = row["tokens"][row["weight"] > 0]
      rows[i, : len(ids)] = ids
    return jnp.asarray(rows)

  def _say(self, row, at, moves):
    ids = self.replies[row, at]
    logits = jax.nn.one_hot(ids, self.vocab)[:, None] + 0 * self.table[0, 0]
    return logits, {"row": row, "at": at + moves}


def test_answers_are_read_and_scored_by_kind():
  evaluator = answers.Answers(talk(), max_new=6, batch_size=2)
  variables = {"params": {"table": jnp.zeros((1, 1))}}
  assert evaluator.write(Parrot(), variables) == list(SAID.values())
  metrics, pictures = evaluator(Parrot(), variables)
  assert metrics == {"exact": 1, "exact_place": 1, "exact_thing": 1}
  assert pictures == {}


def test_an_answer_that_does_not_end_is_cut():
  evaluator = answers.Answers(talk(), max_new=2)
  variables = {"params": {"table": jnp.zeros((1, 1))}}
  found = evaluator.write(Parrot(), variables)
  assert found == ["seven", "two of", "left"]
  metrics, _ = evaluator(Parrot(), variables)
  assert metrics["exact"] == pytest.approx(2 / 3)
  assert metrics["exact_thing"] == 0.5


def test_a_decoder_writes_what_it_scores_highest():
  system = llm.Decoder(
      vocab=1024, width=16, depth=1, heads=2, mlp=16, length=100,
      position=rope.Rope(1e4), std=1.0,
  )  # fmt: skip
  source = talk()
  variables = jax.jit(system.init)(
      jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
  )
  found = answers.Answers(source, max_new=3).write(system, variables)
  apply = jax.jit(lambda tokens: system.apply(variables, tokens)[0])
  for index in range(len(source)):
    prompt = source.prompt(index)
    tokens, count = prompt["tokens"].copy(), int(prompt["segment"].sum())
    ids = []
    for _ in range(3):
      logits = apply(tokens[None])[0, count - 1]
      ids.append(int(logits.argmax()))
      tokens[count], count = ids[-1], count + 1
      if (ids[-1],) in source.formatter.ends():
        break
    assert source.formatter.read(ids) == found[index]


def test_pictures_stand_above_questions_and_answers():
  evaluator = answers.Answers(talk(shown=1), max_new=6)
  figure = evaluator._figure(["seven", "no", "left"], list(SAID.values()))
  assert figure["answers"].ndim == 3


def test_an_answer_ends_where_the_template_says():
  for name in ("vicuna", "plain", "opt", "flamingo", "chatml"):
    source = talk(template=name)
    for index in range(len(source)):
      row = source[index]
      ids = row["tokens"][row["weight"] > 0].tolist()
      (end,) = source.formatter.ends()
      assert tuple(ids[-len(end) :]) == end
      assert source.formatter.read([*ids, 44, 45]) == source.answer(index)


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match="did you mean 'exact'"):
    answers.Answers(talk(), scores=("exakt",))
  with pytest.raises(ValueError, match="expected 1 to 3"):
    answers.Answers(talk(), examples=4)


def test_scene_captions_are_scored_by_what_they_say():
  source = questions.SceneCaptions("test", counts=(1, 2, 3))
  wanted = [source.answer(i) for i in range(20)]
  assert set(captions.scene(wanted, wanted).values()) == {1.0}
  said = "a photo of a red seven to the left of a blue two."
  true = "a photo of a blue two to the right of a red one."
  assert captions.scene([said], [true]) == dict(
      scene=0, layout=1, digits=0.5, colours=1
  )
  found = captions.scene(["a red"], [true])
  assert set(found.values()) == {0.0}
  more = captions.scene(["a red seven."], ["a red one above a red seven."])
  assert more == dict(scene=0, layout=0, digits=0, colours=0.5)


def test_looks_are_scored_where_they_are_named():
  found = captions.look(
      ["a huge red 7.", "a red seven.", "a red blue two."],
      ["a large red seven.", "a blue seven on navy.", "a red two."],
  )
  assert found == dict(
      digit=1, size=1, colour=pytest.approx(1 / 3), ground=0
  )
  look = text.Look(size=1, colour=2, digit=3, ground=0)
  assert text.read_look(text.digit_caption(look)) == look._asdict()


def test_overlap_of_captions_is_that_of_the_papers():
  found = captions.bleu(["a b c d e"], ["a b c d f"])
  # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours.
  assert found["bleu"] == pytest.approx(100 * 0.2**0.25, rel=1e-5)
  assert captions.bleu(["a b c d"], ["a b c d"])["bleu"] == pytest.approx(100)
  # All words are equally rare. Of the first, the single words agree by half; of
  # the second, single words and pairs in full; none has three words.
  found = captions.cider(["a x", "C d"], ["a b", "c d"])
  assert found["cider"] == pytest.approx(10 * (0.5 / 4 + 2 / 4) / 2)


@pytest.mark.parametrize("score", ["bleu", "cider"])
def test_a_score_without_its_library_says_what_to_install(score, monkeypatch):
  for name in ("sacrebleu", "pycocoevalcap.cider.cider"):
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(ValueError, match=f"'{score}' needs .*pip install"):
    getattr(captions, score)(["a"], ["a"])
