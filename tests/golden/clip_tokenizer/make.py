"""Makes this directory: a small vocabulary, and ids by transformers.

Needs transformers; run from the repository's root:
`python tests/golden/clip_tokenizer/make.py`.
"""

import json
import pathlib

import transformers

from mmjax.data import tokenizers

CORPUS = (
    "A photo of two dogs running through the snow, and it's not the first one.",
    "They're sure we'll see what I've seen; he'd say \"don't\" and I'm done.",
    "The price rose from 1,234.50 to 99 in 2021 (about 12%).",
    "Über den Wolken, naïve café, façade, Ångström, crème brûlée.",
    "Привет, мир! Как дела у собаки?",
    "写真には赤い七が写っている。东京塔 한국어 텍스트",
    "مرحبا بالعالم नमस्ते दुनिया",
    "photography photographer photos photographic photograph",
)
TEXTS = (
    "",
    "a photo of a dog.",
    "A PHOTO   of\ta\n dog!!",
    "it's they're we'll I've he'd don't I'm 'tis rock'n'roll ''quoted''",
    "12345 3.14159 1st 2nd x2 v1.0-beta ½ ² Ⅷ",
    "naïve café façade Ångström cre\u0300me bru\u0302le\u0301e",
    "Привет, МИР",
    "写真には赤い七。 한국어 नमस्ते مرحبا",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and ♥ → ∞",
    "fish &amp; chips &amp;lt;b&amp;gt; caf&eacute; &#39;n&#39; more",
    "â€œbrokenâ€\x9d schÃ¶n â€” and “curly” ‘quotes’",
    "zero\u200bwidth non\u00a0breaking full\u3000width ＡＢＣ １２３",
    "<|startoftext|> inside <|endoftext|> out",
    "snake_case CamelCase http://example.com/?q=1&x=2 #tag @user $5 50%",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "\x00control\x1b[31m and \ufffd \U0001f6d1",
)


def main() -> None:
  here = pathlib.Path(__file__).parent
  ours = tokenizers.ClipTokenizer.train(CORPUS, 800)
  ours.save_pretrained(here)
  theirs = transformers.CLIPTokenizer.from_pretrained(here)
  # transformers repairs no text: it gets what is repaired already.
  ids = [theirs(tokenizers.clean(text))["input_ids"] for text in TEXTS]
  expected = {
      "transformers": transformers.__version__,
      "texts": [{"text": t, "ids": i} for t, i in zip(TEXTS, ids)],
  }
  text = json.dumps(expected, indent=1, ensure_ascii=True)
  (here / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
  main()
