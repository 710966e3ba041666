"""The question that a part of a system reads for itself."""

import numpy as np

from mmjax.data import batch, subwords, templates
from mmjax.data.asked import Asked
from mmjax.data.conversations import Written
from mmjax.data.tinyworld import VisualQuestions
from mmjax.data.tokenizers import ClipTokenizer


def test_the_question_comes_with_examples_and_prompts():
  questions = VisualQuestions("test", length=8)
  tokenizer = ClipTokenizer.tinyworld(length=32)
  asked = Asked(questions, tokenizer)
  formatter = templates.Formatter(subwords.load(), "vicuna", 120)
  written = Written(asked, formatter, key="image")
  assert len(written) == 8 and asked.kind(3) == questions.kind(3)
  for index in range(8):
    text = questions.questions(index)[-1].text
    for example in (written[index], written.prompt(index)):
      np.testing.assert_array_equal(
          example["question"], tokenizer.encode(text)
      )
    assert written.answer(index) == questions.answer(index)
  batch.check({key: x[None] for key, x in written[0].items()}, "asked")
