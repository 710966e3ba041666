"""Writes what transformers' `generate` and its logits processors give.

Run with torch and transformers (5.23 wrote the files that are kept):

  python tests/golden/make_generate.py

The model of `generate_table` is a table [V, V, V] of the logits that follow
two tokens, so that the test can have the very same model without weights. The
cases of `cases.json` hold the arguments and, per prompt, the new tokens (and
the scores of all hypotheses of a beam search). `generate_processors.npz` holds
logits and what each processor makes of them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.generation import logits_process
from transformers.modeling_outputs import CausalLMOutput

HERE = Path(__file__).parent
VOCABULARY = 24
MAX_NEW = 12
SEED = 7

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy_eos": dict(eos_token_id=[3]),
    "greedy_two_eos": dict(eos_token_id=[3, 11]),
    "greedy_penalty": dict(repetition_penalty=1.4, eos_token_id=[3]),
    "greedy_penalty_below": dict(repetition_penalty=0.7, eos_token_id=[3]),
    "beam": dict(num_beams=3),
    "beam_eos": dict(num_beams=3, eos_token_id=[3]),
    "beam_two_eos": dict(num_beams=4, eos_token_id=[3, 11]),
    "beam_three_eos": dict(num_beams=2, eos_token_id=[3, 11, 20]),
    "beam_early": dict(num_beams=3, eos_token_id=[3, 11], early_stopping=True),
    "beam_never": dict(
        num_beams=3, eos_token_id=[3, 11], early_stopping="never"
    ),
    "beam_never_long": dict(
        num_beams=2,
        eos_token_id=list(range(1, 16)),
        early_stopping="never",
        length_penalty=2.0,
    ),
    "beam_many_eos": dict(
        num_beams=2, eos_token_id=list(range(1, 16)), length_penalty=2.0
    ),
    "beam_never_short": dict(
        num_beams=3,
        eos_token_id=[3, 11],
        early_stopping="never",
        length_penalty=-1.0,
    ),
    "beam_long": dict(num_beams=3, eos_token_id=[3, 11], length_penalty=2.0),
    "beam_short": dict(num_beams=3, eos_token_id=[3, 11], length_penalty=-0.5),
    "beam_sum": dict(num_beams=5, eos_token_id=[3, 11], length_penalty=0.0),
    "beam_penalty": dict(
        num_beams=4, eos_token_id=[3, 11], repetition_penalty=1.3
    ),
    "beam_penalty_early": dict(
        num_beams=2,
        eos_token_id=[3],
        repetition_penalty=1.8,
        early_stopping=True,
        length_penalty=0.6,
    ),
    "beam_one_token": dict(num_beams=3, eos_token_id=[3], max_new_tokens=1),
}


class Table(transformers.PreTrainedModel, transformers.GenerationMixin):
  """Logits of the next token are a function of the last two."""

  config_class = transformers.PretrainedConfig

  def __init__(
      self, config: transformers.PretrainedConfig, table: torch.Tensor
  ) -> None:
    super().__init__(config)
    self.table = torch.nn.Parameter(table)
    self.post_init()

  def forward(
      self, input_ids: torch.Tensor, **_: Any
  ) -> CausalLMOutput:
    """Logits [B, L, V]; the token before the first one is 0."""
    before = torch.nn.functional.pad(input_ids[:, :-1], (1, 0))
    return CausalLMOutput(logits=self.table[before, input_ids])

  def prepare_inputs_for_generation(
      self, input_ids: torch.Tensor, **_: Any
  ) -> dict[str, Any]:
    """All tokens, every time: there is no cache."""
    return {"input_ids": input_ids}


def make_table(rng: np.random.Generator) -> np.ndarray:
  """Peaked enough to tell hypotheses apart, with likely endings."""
  table = rng.normal(0, 1.5, (VOCABULARY,) * 3).astype(np.float16)
  table[:, :, [3, 11]] += np.float16(0.8)
  return table


def make_cases(table: np.ndarray) -> dict[str, Any]:
  """New tokens, and scores for beams, of every case and prompt."""
  config = transformers.PretrainedConfig(
      vocab_size=VOCABULARY, use_cache=False, is_encoder_decoder=False
  )
  model = Table(config, torch.from_numpy(table.astype(np.float32))).eval()
  rng = np.random.default_rng(SEED + 1)
  prompts = [
      rng.integers(4, VOCABULARY, size).tolist() for size in (2, 5, 1, 7, 3, 4)
  ]
  cases = {}
  for name, case in CASES.items():
    arguments = dict(max_new_tokens=MAX_NEW) | case
    beams = arguments.get("num_beams", 1)
    answers = []
    for prompt in prompts:
      out = model.generate(
          torch.tensor([prompt]),
          do_sample=False,
          use_cache=False,
          pad_token_id=0,
          return_dict_in_generate=True,
          output_scores=True,
          num_return_sequences=beams,
          **arguments,
      )
      tokens = out.sequences[:, len(prompt) :].tolist()
      scores = out.sequences_scores.tolist() if beams > 1 else None
      answers.append({"tokens": tokens, "scores": scores})
    cases[name] = {"arguments": arguments, "answers": answers}
  return {"prompts": prompts, "cases": cases}


def make_processors(rng: np.random.Generator) -> dict[str, np.ndarray]:
  """Logits, seen tokens, and the result of each processor and of a chain."""
  logits = rng.normal(0, 3, (6, 50)).astype(np.float32)
  logits[1] *= 4  # Almost certain.
  logits[2] *= 0.01  # Almost uniform.
  ids = rng.integers(0, 50, (6, 12))
  lib = logits_process
  processors = {
      "repetition_penalty_1.3": lib.RepetitionPenaltyLogitsProcessor(1.3),
      "repetition_penalty_0.8": lib.RepetitionPenaltyLogitsProcessor(0.8),
      "temperature_0.7": lib.TemperatureLogitsWarper(0.7),
      "top_k_1": lib.TopKLogitsWarper(1),
      "top_k_10": lib.TopKLogitsWarper(10),
      "top_k_80": lib.TopKLogitsWarper(80),
      "top_p_0.01": lib.TopPLogitsWarper(0.01),
      "top_p_0.5": lib.TopPLogitsWarper(0.5),
      "top_p_0.95": lib.TopPLogitsWarper(0.95),
      "min_p_0.05": lib.MinPLogitsWarper(0.05),
      "min_p_0.9": lib.MinPLogitsWarper(0.9),
  }
  chain = [
      processors["repetition_penalty_1.3"],
      processors["temperature_0.7"],
      lib.TopKLogitsWarper(15),
      lib.TopPLogitsWarper(0.9),
      processors["min_p_0.05"],
  ]
  scores, tokens = torch.from_numpy(logits), torch.from_numpy(ids)
  out = {"in.logits": logits, "in.ids": ids.astype(np.int32)}
  for name, processor in processors.items():
    out[f"out.{name}"] = processor(tokens, scores.clone()).numpy()
  chained = scores.clone()
  for processor in chain:
    chained = processor(tokens, chained)
  out["out.chain"] = chained.numpy()
  guidance = lib.ClassifierFreeGuidanceLogitsProcessor(2.5)
  out["out.guidance_2.5"] = guidance(tokens[:3], scores).numpy()
  return out


def main() -> None:
  """Writes both fixtures beside this file."""
  rng = np.random.default_rng(SEED)
  folder = HERE / "generate_table"
  folder.mkdir(exist_ok=True)
  table = make_table(rng)
  np.savez_compressed(folder / "table.npz", table=table)
  text = json.dumps(make_cases(table), separators=(",", ":"))
  (folder / "cases.json").write_text(text.replace('"cases"', '\n"cases"')
                                     .replace('"arguments"', '\n"arguments"')
                                     + "\n")  # fmt: skip
  np.savez_compressed(
      HERE / "generate_processors.npz", **make_processors(rng)
  )


if __name__ == "__main__":
  main()
