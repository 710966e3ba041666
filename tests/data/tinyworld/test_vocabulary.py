"""TinyWorld's byte-level BPE: whole words, and the special tokens needed."""

import re

import pytest

from mmjax.data import conversations, subwords, templates
from mmjax.data.tinyworld import documents, questions, vocabulary

SOURCES = (
    questions.SceneCaptions, questions.VisualQuestions, questions.Dialogues,
    documents.InterleavedDocuments, documents.FewShot,
    documents.RetrievalDialogues,
)  # fmt: skip


def test_the_committed_tokenizer_is_what_the_corpus_teaches(tmp_path):
  vocabulary.train().save(tmp_path / "tokenizer.json")
  committed = subwords.tinyworld_file().read_bytes()
  assert (tmp_path / "tokenizer.json").read_bytes() == committed


@pytest.mark.parametrize("make", SOURCES)
def test_every_word_is_one_token_where_it_stands(make):
  tokenizer = subwords.load()
  source = make("test")
  for index in range(300):
    for turn in source.conversation(index):
      said = turn.text.removeprefix("<image>").lstrip("\n")
      pieces = re.findall(r"\w+|[^\w\s]+", said)
      # ChatML puts a line end before a turn, Vicuna a space.
      for before in ("", " ") if said else ():
        tokens = tokenizer.encode(before + said)
        assert len(tokens) == len(pieces), said


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_every_template_can_be_written(name):
  formatter = templates.Formatter(subwords.load(), name, 160)
  source = conversations.Written(questions.VisualQuestions("test"), formatter)
  example = source[0]
  answer = example["tokens"][example["weight"] > 0]
  assert formatter.tokenizer.decode(answer).strip() == source.answer(0)
