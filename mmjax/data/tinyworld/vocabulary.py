"""Which words do TinyWorld's conversations have? Its byte-level BPE.

Every word of the corpus becomes one token, with and without a space before it,
and every special token that a template of `mmjax.data.templates` names is
there, so that any template can be tried on TinyWorld.
"""

from collections.abc import Iterator

from mmjax.data import subwords, templates
from mmjax.data.tinyworld import documents, questions, text

# More ids than the words need; training stops when all are whole.
_VOCABULARY_SIZE = 4096
# Examples of each task that hold all its words.
_EXAMPLES = 512


def specials() -> list[str]:
  """The special tokens of all templates; "<pad>" has id 0."""
  found = ["<pad>"]
  for template in templates.TEMPLATES.values():
    for parts in (
        template.begin,
        template.end,
        template.finish,
        *template.before.values(),
        *template.after.values(),
    ):
      found += [p for p in parts if isinstance(p, templates.Special)]
    found += template.picture
  return [str(name) for name in dict.fromkeys(found)]


def corpus() -> Iterator[str]:
  """Texts that hold every word of TinyWorld's conversations.

  Each comes twice: it may stand at a beginning, or after a space.
  """
  for said in _texts():
    yield said
    yield f" {said}"


def _texts() -> Iterator[str]:
  yield from text.corpus()
  for source in (
      questions.SceneCaptions("train"),
      questions.VisualQuestions("train"),
      questions.Dialogues("train"),
      documents.RetrievalDialogues("train"),
  ):
    for index in range(_EXAMPLES):
      for turn in source.conversation(index):
        yield turn.text.removeprefix(f"{templates.IMAGE}\n")
  for template in templates.TEMPLATES.values():
    if not template.picture:
      continue  # No words of its own; ids follow how often a text comes.
    yield template.system
    for parts in (*template.before.values(), *template.after.values()):
      yield from (p for p in parts if not isinstance(p, templates.Special))
  yield from text.NUMBERS
  yield from documents.WORDS


def train() -> subwords.HuggingFace:
  """The tokenizer that `subwords.load()` reads."""
  return subwords.HuggingFace.train(corpus(), _VOCABULARY_SIZE, specials())
