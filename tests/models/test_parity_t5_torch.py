"""T5 both ways against transformers, where it is installed.

Imports, exports and texts of random configs; the stored goldens in `test_t5`
need no PyTorch.
"""

import jax
import numpy as np
import pytest

from mmjax import pretrained
from mmjax.evals import answers
from mmjax.nn import cache
from mmjax.sampling import autoregressive, beam
from mmjax.sampling.decoding import Decoding

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NEW = 10


def pick(rng, *options):
  return options[rng.integers(len(options))]


@torch.no_grad()
def random_model(rng):
  """A model of transformers with parameters drawn anew."""
  scaled = bool(rng.integers(2))
  act = pick(rng, "relu", "gated-gelu", "gated-silu", "gelu")
  model = transformers.T5ForConditionalGeneration(
      transformers.T5Config(
          vocab_size=int(rng.integers(30, 50)),
          d_model=int(rng.integers(10, 30)),
          d_kv=int(rng.integers(3, 9)),
          d_ff=int(rng.integers(8, 40)),
          num_layers=int(rng.integers(2, 4)),
          num_decoder_layers=int(rng.integers(1, 3)),
          num_heads=int(rng.integers(1, 5)),
          relative_attention_num_buckets=pick(rng, 4, 8, 32),
          relative_attention_max_distance=pick(rng, 20, 128),
          layer_norm_epsilon=pick(rng, 1e-6, 1e-3),
          feed_forward_proj=act,
          tie_word_embeddings=scaled,
          decoder_start_token_id=0,
          **pick(rng, {}, dict(dense_act_fn="gelu")),
      )
  ).eval()
  if not scaled and rng.integers(2):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
  for path, parameter in model.named_parameters():
    noise = rng.normal(size=parameter.shape)
    if parameter.ndim == 1:
      value = 1 + 0.2 * noise
    else:
      value = 1.5 * noise / np.sqrt(parameter.shape[1])
    if "relative" in path:
      value = 2 * noise
    parameter.copy_(torch.from_numpy(np.asarray(value)))
  return model


def prompts(rng, vocab):
  tokens = rng.integers(2, vocab, (3, 40)).astype(np.int32)
  count = np.array([40, 7, 23], np.int32)
  return tokens, (np.arange(40) < count[:, None]).astype(np.int32)


@torch.no_grad()
def their_logits(model, tokens, there, targets):
  begun = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  return model(
      input_ids=torch.from_numpy(tokens).long(),
      attention_mask=torch.from_numpy(there).long(),
      decoder_input_ids=torch.from_numpy(begun).long(),
  ).logits.numpy()


def check(found, expected):
  assert found.shape == expected.shape
  assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("seed", range(3))
def test_import_and_export(seed, tmp_path):
  rng = np.random.default_rng(seed)
  model = random_model(rng)
  model.save_pretrained(
      tmp_path / "theirs", max_shard_size=pick(rng, "5KB", "1GB")
  )
  system, variables, _ = pretrained.from_pretrained(tmp_path / "theirs")
  tokens, there = prompts(rng, system.vocab)
  targets = rng.integers(1, system.vocab, (3, 30)).astype(np.int32)
  run = jax.jit(system.apply)
  check(
      run(variables, tokens, targets, there),
      their_logits(model, tokens, there, targets),
  )
  fresh = jax.tree.map(
      lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), variables
  )
  pretrained.save_pretrained(tmp_path / "ours", system, fresh)
  again, report = type(model).from_pretrained(
      tmp_path / "ours", output_loading_info=True
  )
  assert not any(report.values()), report
  check(
      run(fresh, tokens, targets, there),
      their_logits(again.eval(), tokens, there, targets),
  )


@pytest.mark.parametrize("seed", [3, 4])
def test_texts(seed, tmp_path):
  """Greedy and beam search, rows of uneven prompts."""
  rng = np.random.default_rng(seed)
  model = random_model(rng)
  model.save_pretrained(tmp_path)
  system, variables, _ = pretrained.from_pretrained(tmp_path)
  tokens, there = prompts(rng, system.vocab)
  words = dict(
      input_ids=torch.from_numpy(tokens).long(),
      attention_mask=torch.from_numpy(there).long(),
      do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
  )  # fmt: skip
  expected = model.generate(**words)[:, 1:].numpy()
  batch = dict(tokens=tokens, segment=there)
  steps = answers.writer(system, variables, batch, NEW)._asdict()
  beams = beam.beam_search(
      reorder=cache.reordered, beam=beam.Beam(3, 0.8), **steps,
      decoding=Decoding(NEW, processors=[_never_one]),
  )  # fmt: skip
  greedy, _ = autoregressive.generate(
      **steps, decoding=Decoding(NEW, processors=[_never_one])
  )
  np.testing.assert_array_equal(greedy.tokens, expected)
  expected = model.generate(**words, num_beams=3, length_penalty=0.8)
  np.testing.assert_array_equal(beams.tokens[:, 0], expected[:, 1:].numpy())


def _never_one(logits, seen):
  """Their `min_new_tokens`: no end before all tokens are there."""
  del seen
  return logits.at[:, 1].set(-np.inf)
