"""Writes the BLIP-2 checkpoints that transformers makes, with outputs.

Run with torch and transformers (5.23 wrote the files that are kept):

  python tests/golden/make_blip2.py

Every directory `blip2_*` beside this file but `blip2_lavis` is what
`save_pretrained` wrote, plus `golden.npz`. All have `in.image` (channels last)
and `in.tokens`; those that generate `in.source` (which soft prompt stands at a
token, -1 for none), `out.prompts`, `out.logits`, and the new tokens of
`generate`: `out.greedy` and `out.beam` (the best of three, 1 behind the end);
with a T5 `in.targets` too. `blip2_match` has `out.similarity` and
`out.verdict`. All parameters are drawn anew.

`blip2_lavis` holds one run of the official code (salesforce/LAVIS at 506965b)
with random weights: `Blip2Qformer.forward` with the multinomial draw of hard
negatives replaced by argmax. Its arrays have the names of that code;
`meta.json` has the sizes.
"""

from pathlib import Path
import shutil
from typing import Any

import make_llm
import make_t5
import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
# The last id stands where the picture does.
VOCAB, NEW, BEAMS, PAD, EOS = 40, 10, 3, 1, 2
VISION: dict[str, Any] = dict(
    image_size=8, patch_size=4, hidden_size=12, intermediate_size=20,
    num_hidden_layers=2, num_attention_heads=2,
)
QFORMER: dict[str, Any] = dict(
    vocab_size=30, hidden_size=12, num_hidden_layers=4, num_attention_heads=3,
    intermediate_size=20, max_position_embeddings=9,
)
OPT: dict[str, Any] = dict(
    model_type="opt", vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2,
    ffn_dim=24, num_attention_heads=4, word_embed_proj_dim=16,
    max_position_embeddings=64, pad_token_id=PAD, bos_token_id=EOS,
    eos_token_id=EOS,
)
T5: dict[str, Any] = dict(
    model_type="t5", vocab_size=VOCAB, d_model=16, d_kv=5, d_ff=24,
    num_layers=2, num_heads=3, decoder_start_token_id=0, pad_token_id=0,
    eos_token_id=EOS, dropout_rate=0.0, feed_forward_proj="gated-gelu",
    dense_act_fn="gelu", tie_word_embeddings=False,
)
CASES: dict[str, dict[str, Any]] = {
    "blip2_opt": dict(vision=VISION, qformer=QFORMER, text=OPT, queries=5),
    # Every layer looks at the picture; other activations, epsilons, no biases.
    "blip2_every": dict(
        vision=dict(
            VISION, patch_size=2, hidden_act="quick_gelu", layer_norm_eps=1e-3,
            qkv_bias=False,
        ),
        qformer=dict(
            QFORMER, num_hidden_layers=2, cross_attention_frequency=1,
            hidden_act="relu", layer_norm_eps=1e-3,
        ),
        text=dict(OPT, hidden_size=20, word_embed_proj_dim=20),
        queries=3,
    ),
    "blip2_t5": dict(
        vision=dict(VISION, num_hidden_layers=1), qformer=QFORMER, text=T5,
        queries=4,
    ),
    "blip2_match": dict(
        vision=VISION, qformer=QFORMER, text=OPT, queries=5, joint=7
    ),
}  # fmt: skip


def configured(
    vision: dict[str, Any],
    qformer: dict[str, Any],
    text: dict[str, Any],
    queries: int,
    joint: int = 0,
) -> transformers.Blip2Config:
  rest = dict(image_token_index=VOCAB - 1)
  if joint:
    qformer = dict(qformer, use_qformer_text_input=True)
    rest = dict(image_text_hidden_size=joint)
  return transformers.Blip2Config(
      vision_config=dict(vision),
      qformer_config=dict(qformer),
      text_config=dict(text),
      num_query_tokens=queries,
      **rest,
  )


def inputs(name: str, config: transformers.Blip2Config) -> dict[str, Any]:
  generator = make_llm.generator(name + " inputs")
  side, queries = config.vision_config.image_size, config.num_query_tokens
  text = torch.randint(3, VOCAB - 1, (2, 4), generator=generator)
  places = torch.full((2, queries), VOCAB - 1)
  return dict(
      image=torch.randn(2, 3, side, side, generator=generator),
      tokens=torch.cat([places, text], dim=1),
      question=torch.randint(1, 30, (2, 7), generator=generator),
      targets=torch.randint(3, VOCAB - 1, (2, 6), generator=generator),
  )


def generating(
    model: transformers.Blip2ForConditionalGeneration, given: dict[str, Any]
) -> dict[str, np.ndarray]:
  image, tokens = given["image"], given["tokens"]
  queries = model.config.num_query_tokens
  source = np.full(tokens.shape, -1, np.int32)
  source[:, :queries] = np.arange(queries)
  seq2seq = model.config.is_encoder_decoder
  words = dict(pixel_values=image, input_ids=tokens)
  words["attention_mask"] = torch.ones_like(tokens)
  more, arrays = {}, {}
  if seq2seq:
    targets = given["targets"]
    start = torch.zeros_like(targets[:, :1])
    more["decoder_input_ids"] = torch.cat([start, targets[:, :-1]], dim=1)
    arrays["in.targets"] = targets.int().numpy()
  rules = dict(do_sample=False, max_new_tokens=NEW)
  greedy = model.generate(**words, **rules)
  beam = model.generate(**words, **rules, num_beams=BEAMS, length_penalty=-1.0)
  new = slice(1, None) if seq2seq else slice(tokens.shape[1], None)
  return arrays | {
      "in.tokens": tokens.int().numpy(),
      "in.source": source,
      "out.prompts": model.get_image_features(image).pooler_output.numpy(),
      "out.logits": model(**words, **more).logits.numpy(),
      "out.greedy": padded(greedy[:, new]),
      "out.beam": padded(beam[:, new]),
  }


def padded(tokens: torch.Tensor) -> np.ndarray:
  """`NEW` tokens of each row, `PAD` behind the end."""
  found = np.full((len(tokens), NEW), PAD, np.int32)
  for row, ids in zip(found, tokens.tolist()):
    count = ids.index(EOS) + 1 if EOS in ids else len(ids)
    row[:count] = ids[:count]
  return found


def matching(
    model: transformers.Blip2ForImageTextRetrieval, given: dict[str, Any]
) -> dict[str, np.ndarray]:
  question = given["question"]
  question[1, 5:] = 0
  words = dict(
      pixel_values=given["image"],
      input_ids=question,
      attention_mask=(question != 0).long(),
  )
  score = lambda head: model(
      **words, use_image_text_matching_head=head
  ).logits_per_image.numpy()
  return {
      "in.tokens": question.int().numpy(),
      "out.similarity": score(False),
      "out.verdict": score(True),
  }


@torch.no_grad()
def make(name: str, **case: Any) -> None:
  config = configured(**case)
  match = "joint" in case
  model = (
      transformers.Blip2ForImageTextRetrieval
      if match
      else transformers.Blip2ForConditionalGeneration
  )(config).eval()
  if config.text_config.model_type == "t5" and not match:
    head = model.language_model.lm_head
    head.weight = torch.nn.Parameter(head.weight.clone())
    make_t5.redraw(model, name)
  else:
    make_llm.redraw(model, name)
  given = inputs(name, config)
  arrays = (matching if match else generating)(model, given)
  arrays["in.image"] = given["image"].permute(0, 2, 3, 1).numpy()
  directory = HERE / name
  shutil.rmtree(directory, ignore_errors=True)
  model.save_pretrained(directory)
  (directory / "generation_config.json").unlink(missing_ok=True)
  np.savez_compressed(directory / "golden.npz", **arrays)


if __name__ == "__main__":
  for key, value in CASES.items():
    make(key, **value)
