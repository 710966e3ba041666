"""Templates against transformers: its tokenizers, its masks of what is learned.

Skipped where transformers is not installed.
"""

import io
import json

import pytest
import sentencepiece

from mmjax.data import subwords, templates

TURNS = [
    ("user", "<image>\nwhich digit is red?"),
    ("assistant", "seven, below it."),
    ("user", "and the blue one?"),
    ("assistant", "red"),
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)


def test_chatml_is_transformers_own():
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("jinja2")
  ours = subwords.load()
  theirs = transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(subwords.tinyworld_file())
  )
  found = theirs.apply_chat_template(
      [
          {"role": "system", "content": templates.load("chatml").system},
          *({"role": role, "content": text} for role, text in TURNS),
      ],
      chat_template=CHATML,
      return_dict=True,
      return_assistant_tokens_mask=True,
  )
  document = templates.Formatter(ours, "chatml", 200).document(TURNS, 1)
  assert document.tokens.tolist() == found["input_ids"]
  assert document.weight.tolist() == found["assistant_masks"]


def test_vicuna_is_what_llama_s_tokenizer_makes_of_llava_s_string(tmp_path):
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("google.protobuf")  # It reads sentencepiece with it.
  system = templates.load("vicuna").system
  sink = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([system, *(text for _, text in TURNS)] * 20),
      model_writer=sink,
      model_type="bpe",
      vocab_size=450,
      byte_fallback=True,
      remove_extra_whitespaces=False,
      normalization_rule_name="identity",
      hard_vocab_limit=False,
      minloglevel=2,
  )
  (tmp_path / "tokenizer.model").write_bytes(sink.getvalue())
  config = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
  ours = subwords.load(tmp_path / "tokenizer.model", extra=["<image>"])
  before, after = (
      f"{system} USER: <image>\nwhich digit is red? ASSISTANT: seven, below "
      "it.</s>USER: and the blue one? ASSISTANT: red</s>"
  ).split("<image>")
  ids = lambda text: theirs(text, add_special_tokens=False)["input_ids"]
  document = templates.Formatter(ours, "vicuna", 400).document(TURNS, 1)
  assert document.tokens.tolist() == [
      1, *ids(before), ours.special("<image>"), *ids(after)
  ]  # fmt: skip
  learned = document.tokens[document.weight == 1].tolist()
  pieces = "".join(theirs.convert_ids_to_tokens(learned))
  assert pieces.replace("▁", " ") == " seven, below it.</s> red</s>"
