"""Templates: every token by hand, and whole strings as the references have."""

import io
import json
import pickle

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import sentencepiece
import tokenizers

from mmjax.data import batch as batch_lib
from mmjax.data import subwords, templates
from mmjax.data.templates import Formatter, Turn

TOKENIZER = subwords.load()
NAMES = {i: name for name, i in TOKENIZER.specials.items()}
QUESTION = [("user", "<image>\nwhich digit?"), ("assistant", "seven")]
VICUNA = templates.TEMPLATES["vicuna"].system


def formatter(template, length=160, **options):
  if isinstance(template, str) and template in ("chatml", "vicuna"):
    template = templates.load(template, system="")
  return Formatter(TOKENIZER, template, length, **options)


def spell(document):
  """Each token as text, with its weight."""
  return [
      (NAMES.get(int(i)) or TOKENIZER.decode([i]), float(w))
      for i, w in zip(document.tokens, document.weight)
  ]


def parse(text, tokenizer=TOKENIZER):
  """Ids of a whole string, its special tokens found by the library itself."""
  serialized, extra = tokenizer.__reduce__()[1]
  engine = tokenizers.Tokenizer.from_str(serialized)
  engine.add_special_tokens(list(extra))
  return engine.encode(text, add_special_tokens=False).ids


def test_chatml_token_by_token():
  document = formatter("chatml", image_tokens=2).document(QUESTION, 1)
  assert spell(document) == [
      ("<|im_start|>", 0), ("user", 0), ("\n", 0),
      ("<image>", 0), ("<image>", 0),
      ("\n", 0), ("which", 0), (" digit", 0), ("?", 0),
      ("<|im_end|>", 0), ("\n", 0),
      ("<|im_start|>", 0), ("assistant", 0), ("\n", 0),
      ("seven", 1), ("<|im_end|>", 1), ("\n", 0),
  ]  # fmt: skip
  assert document.source.tolist() == [-1] * 3 + [0, 1] + [-1] * 12
  assert document.media.tolist() == [-1] * 3 + [0] * 14


def test_vicuna_token_by_token():
  turns = [*QUESTION, ("user", "which colour?"), ("assistant", "red")]
  document = formatter("vicuna").document(turns, 1)
  assert spell(document) == [
      ("<s>", 0), ("USER", 0), (":", 0), (" ", 0), ("<image>", 0),
      ("\n", 0), ("which", 0), (" digit", 0), ("?", 0),
      (" ASSISTANT", 0), (":", 0), (" seven", 1), ("</s>", 1),
      ("USER", 0), (":", 0), (" which", 0), (" colour", 0), ("?", 0),
      (" ASSISTANT", 0), (":", 0), (" red", 1), ("</s>", 1),
  ]  # fmt: skip


def test_plain_token_by_token():
  turns = [("user", "<image>\ndescribe the picture."), ("assistant", "a red 7")]
  assert spell(formatter("plain").document(turns, 1)) == [
      ("<s>", 0), ("<image>", 0),
      ("a", 1), (" red", 1), (" 7", 1), ("\n", 1),
  ]  # fmt: skip


def test_captions_for_opt_token_by_token():
  turns = [("user", "<image>say it"), ("assistant", "a red 7")]
  opt = formatter("opt", image_tokens=2).document(turns, 1)
  assert spell(opt) == [
      ("<pad>", 0), ("<pad>", 0), ("</s>", 0),
      ("a", 1), (" red", 1), (" 7", 1), ("\n", 1),
  ]  # fmt: skip
  assert opt.source.tolist() == [0, 1, -1, -1, -1, -1, -1]
  caption = formatter("fromage_caption").document(turns, 1)
  assert spell(caption) == [
      ("<pad>", 0), ("</s>", 1), ("a", 1), (" red", 1), (" 7", 1),
  ]  # fmt: skip
  retrieval = formatter("fromage_retrieval").document(turns[1:], 0)
  assert spell(retrieval) == [
      ("</s>", 0), ("a", 1), (" red", 1), (" 7", 1), ("[RET]", 1),
  ]  # fmt: skip


def test_flamingo_token_by_token():
  turns = [
      ("user", "<image>"), ("assistant", "a red 7"),
      ("user", "<image>"), Turn("assistant", "bado", 0.0),
      ("user", "<image>"), Turn("assistant", "bado", 0.5),
  ]  # fmt: skip
  document = formatter("flamingo").document(turns, 3)
  said = lambda *words, weight: [
      ("Output", 0), (":", 0), *((w, weight) for w in words),
      ("<|endofchunk|>", weight),
  ]  # fmt: skip
  assert spell(document) == [
      ("<s>", 0),
      ("<image>", 0), *said(" a", " red", " 7", weight=1),
      ("<image>", 0), *said(" bado", weight=0),
      ("<image>", 0), *said(" bado", weight=0.5),
  ]  # fmt: skip
  assert document.media.tolist() == [-1] + [0] * 7 + [1] * 5 + [2] * 5
  assert document.source[document.source >= 0].tolist() == [0, 1, 2]


def test_the_whole_string_is_chatml_s():
  turns = [
      ("user", "<image>\nwhich digit is red?"),
      ("assistant", "seven"),
      ("user", "and blue?"),
      ("assistant", "a two, below it."),
  ]
  text = (
      "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
      "<|im_start|>user\n{}\nwhich digit is red?<|im_end|>\n"
      "<|im_start|>assistant\nseven<|im_end|>\n"
      "<|im_start|>user\nand blue?<|im_end|>\n"
      "<|im_start|>assistant\na two, below it.<|im_end|>\n"
  )
  for name, picture in (
      ("chatml", "<image>" * 3),
      ("chatml_vision", f"<|vision_start|>{'<|image_pad|>' * 3}<|vision_end|>"),
  ):
    document = Formatter(TOKENIZER, name, 160, 3).document(turns, 1)
    assert document.tokens.tolist() == parse(text.format(picture))
    own = [("system", "Be brief."), *turns]
    found = Formatter(TOKENIZER, name, 160, 3).document(own, 1)
    system = text.replace("You are a helpful assistant.", "Be brief.")
    assert found.tokens.tolist() == parse(system.format(picture))
    # What is asked for when the model answers.
    row = Formatter(TOKENIZER, name, 160, 3).prompt(turns[:1], 1)
    prompt = text.split("seven")[0].format(picture)
    assert row["tokens"][row["segment"] == 1].tolist() == parse(prompt)


def test_the_whole_string_is_vicuna_s():
  turns = [
      ("user", "<image>\nwhich digit is red?"),
      ("assistant", "seven"),
      ("user", "and blue?"),
      ("assistant", "a two."),
  ]
  text = (
      "<s>A chat between a curious user and an artificial intelligence "
      "assistant. The assistant gives helpful, detailed, and polite answers to "
      "the user's questions. USER: <image>\nwhich digit is red? ASSISTANT: "
      "seven</s>USER: and blue? ASSISTANT: a two.</s>"
  )
  document = Formatter(TOKENIZER, "vicuna", 160).document(turns, 1)
  assert document.tokens.tolist() == parse(text)
  row = Formatter(TOKENIZER, "vicuna", 160).prompt(turns[:3], 1)
  assert row["tokens"][row["segment"] == 1].tolist() == parse(
      text.removesuffix(" a two.</s>")
  )
  assert not row["weight"].any()


def test_sentencepiece_spaces_are_part_of_the_answer():
  sink = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(["USER: which digit ASSISTANT: seven red"] * 30),
      model_writer=sink,
      model_type="bpe",
      vocab_size=320,
      byte_fallback=True,
      remove_extra_whitespaces=False,
      normalization_rule_name="identity",
      hard_vocab_limit=False,
      minloglevel=2,
  )
  engine = sentencepiece.SentencePieceProcessor(model_proto=sink.getvalue())
  tokenizer = subwords.SentencePiece(sink.getvalue(), ["<image>"])
  template = templates.load("vicuna", system="")
  turns = [*QUESTION, ("user", "which digit?"), ("assistant", "red")]
  document = Formatter(tokenizer, template, 160).document(turns, 1)
  # LLaVA cuts a string at its pictures and at its ends, no further.
  expected = [
      1, *engine.encode("USER: "), tokenizer.special("<image>"),
      *engine.encode("\nwhich digit? ASSISTANT: seven"), 2,
      *engine.encode("USER: which digit? ASSISTANT: red"), 2,
  ]  # fmt: skip
  assert document.tokens.tolist() == expected
  learned = document.tokens[document.weight == 1].tolist()
  pieces = [engine.id_to_piece(i) for i in learned]
  assert pieces == ["▁seven", "</s>", "▁red", "</s>"]
  assert set(document.weight.tolist()) == {0.0, 1.0}


def test_text_that_spells_a_token_is_text():
  turns = [("user", "say <|im_end|>"), ("assistant", "<|im_start|>")]
  document = formatter("chatml").document(turns, 0)
  ends = [TOKENIZER.special(f"<|im_{side}|>") for side in ("start", "end")]
  assert [(document.tokens == i).sum() for i in ends] == [2, 2]
  answer = document.tokens[document.weight == 1][:-1]
  assert TOKENIZER.decode(answer) == "<|im_start|>"


# White space at the border of two texts may become one token with both, which
# is then learned whole.
WORDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda text: text == text.strip() and "<image>" not in text
)


@given(
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
    st.sampled_from(list(templates.TEMPLATES)),
    st.integers(0, 2),
)
@settings(max_examples=150, deadline=None)
def test_only_answers_and_their_ends_are_learned(exchanges, name, images):
  template = templates.load(name)
  write = Formatter(TOKENIZER, template, 4096, image_tokens=3)
  turns = []
  for number, (question, answer) in enumerate(exchanges):
    shown = "<image>" * images * (number == 0)
    turns += [("user", shown + question), ("assistant", answer)]
  document = write.document(turns, images)
  # The learned tokens, told apart by what is not learned between them.
  learned, run = [], []
  for token, weight in zip(document.tokens.tolist(), document.weight):
    assert weight in (0.0, 1.0)
    if weight:
      run.append(token)
    elif run:
      learned.append(run)
      run = []
  learned += [run] if run else []
  end = "".join(p for p in template.end if type(p) is str)
  special = isinstance(template.answer, templates.Special)
  opening = "" if special else template.answer
  expected = [opening + answer + end for _, answer in exchanges]
  if document.weight[0] == 0 and document.tokens[0] in NAMES:
    if len(learned) == len(expected):
      assert [TOKENIZER.decode(run) for run in learned] == expected
    else:  # No instruction between the captions: they run into each other.
      assert "user" in template.mute
      assert "".join(map(TOKENIZER.decode, learned)) == "".join(expected)
  ends = [p for p in template.end if isinstance(p, templates.Special)]
  for part in ends:
    assert all(run[-1] == TOKENIZER.special(part) for run in learned)
  # The pictures, in order.
  rows = document.source[document.source >= 0]
  # A template without a picture's tokens has no places for it either.
  shown = images if template.picture else 0
  assert rows.tolist() == list(range(3 * shown))
  # A prompt is what training showed before the last answer.
  row = write.prompt(turns[:-1], images)
  prompt = row["tokens"][row["segment"] == 1].tolist()
  assert document.tokens[: len(prompt)].tolist() == prompt
  assert document.weight[max(len(prompt), 1)] == 1


def test_a_row_has_the_keys_of_a_batch():
  row = formatter("chatml", length=32, image_tokens=4, pad_id=5).row(
      QUESTION, 1
  )
  batch_lib.check({key: value[None] for key, value in row.items()}, "row")
  count = row["segment"].sum()
  assert row["tokens"][count:].tolist() == [5] * (32 - count)
  assert row["position"][:count].tolist() == list(range(count))


def test_pictures_may_differ_in_size():
  turns = [("user", "<image> and <image>"), ("assistant", "red")]
  document = formatter("chatml").document(turns, (3, 2))
  assert document.sizes == (3, 2)
  assert document.source[document.source >= 0].tolist() == [0, 1, 2, 3, 4]
  shown = document.tokens == TOKENIZER.special("<image>")
  np.testing.assert_array_equal(shown, document.source >= 0)
  assert document.media[shown].tolist() == [0, 0, 0, 1, 1]


def test_pictures_may_stand_apart_from_the_text():
  template = templates.load("plain", picture=())
  document = formatter(template).document(QUESTION, 1)
  assert spell(document) == [("<s>", 0), ("seven", 1), ("\n", 1)]
  assert document.source.tolist() == [-1, -1, -1]


def test_what_is_too_long_is_an_error_or_loses_its_last_exchanges():
  turns = []
  for number, colour in enumerate(("red", "blue", "green")):
    turns += [("user", "<image>" * (number == 2) + "which digit?")]
    turns += [("assistant", colour)]
  whole = formatter("chatml").document(turns, 1)
  size = len(whole.tokens)
  assert len(formatter("chatml", size).document(turns, 1).tokens) == size
  with pytest.raises(ValueError, match=f"{size} tokens .* length={size - 1}"):
    formatter("chatml", size - 1).document(turns, 1)
  for length, kept in ((size - 1, 2), (size // 2, 1)):
    short = formatter("chatml", length, truncate=True).document(turns, 1)
    expected = formatter("chatml").document(turns[: 2 * kept], 0)
    np.testing.assert_array_equal(short.tokens, expected.tokens)
    assert short.sizes == (1,)
  with pytest.raises(ValueError, match="not even its first exchange fits"):
    formatter("chatml", 5, truncate=True).document(turns, 1)
  with pytest.raises(ValueError, match="a prompt of .* length=5: .*which"):
    formatter("chatml", 5, truncate=True).prompt(turns[:1], 0)


def test_bad_conversations_are_refused_with_all_faults():
  write = formatter("chatml")
  with pytest.raises(ValueError, match="1 <image> in the text, but 0 pictures"):
    write.row(QUESTION, 0)
  with pytest.raises(ValueError, match="0 <image> in the text, but 2 pictures"):
    write.row(QUESTION[1:], 2)
  turns = [("user", "a"), ("systm", "b"), ("system", "c"), ("asistant", "d")]
  with pytest.raises(ValueError) as error:
    write.row(turns, 1)
  for part in (
      "turn 1 has the role 'systm', none of system, user, assistant; did you "
      "mean 'system'?",
      "turn 2 is the system's, which may be first only",
      "turn 3 has the role 'asistant', none of system, user, assistant; did "
      "you mean 'assistant'?",
      "0 <image> in the text, but 1 pictures",
      "user: a",
  ):
    assert part in str(error.value)
  with pytest.raises(ValueError, match="no turns"):
    write.row([], 0)
  with pytest.raises(ValueError, match="ends with an answer"):
    write.prompt(QUESTION, 1)


def test_unknown_templates_and_fields_name_the_nearest():
  with pytest.raises(ValueError, match="template 'chatlm' .* mean 'chatml'"):
    templates.load("chatlm")
  with pytest.raises(ValueError, match="did you mean 'vicuna'"):
    Formatter(TOKENIZER, "vicunna", 8)
  with pytest.raises(ValueError, match="'sistem' is no .* mean 'system'"):
    templates.load("chatml", sistem="")
  with pytest.raises(ValueError, match="length=0, image_tokens=1"):
    Formatter(TOKENIZER, "plain", 0)
  with pytest.raises(ValueError, match="'<slot>' is not part of picture"):
    Formatter(TOKENIZER, templates.load("plain", placeholder="<slot>"), 8)


def test_a_tokenizer_without_the_specials_is_refused():
  small = subwords.HuggingFace.train(["a"], 260, ["<s>", "</s>"])
  with pytest.raises(ValueError) as error:
    Formatter(small, "flamingo", 8)
  message = str(error.value)
  assert "lacks special tokens of the template: <image>, <|endofc" in message
  assert "It has <s>, </s>" in message
  serialized = json.dumps(json.loads(small.__reduce__()[1][0]))
  more = subwords.HuggingFace(serialized, ["<image>", "<|endofchunk|>"])
  Formatter(more, "flamingo", 8)


def test_a_formatter_can_be_sent_to_another_process():
  write = Formatter(TOKENIZER, "vicuna", 160)
  again = pickle.loads(pickle.dumps(write))
  np.testing.assert_array_equal(
      again.row(QUESTION, 1)["tokens"], write.row(QUESTION, 1)["tokens"]
  )
  assert again.template.system == VICUNA
