"""Decoders both ways against transformers, where it is installed.

Imports, exports and cached decoding of random configs; the stored goldens in
`test_llm` need no PyTorch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 24
SCALINGS = (
    dict(rope_type="default"),
    dict(rope_type="linear", factor=3.0),
    dict(
        rope_type="llama3", factor=4.0, low_freq_factor=1.0,
        high_freq_factor=3.0, original_max_position_embeddings=16,
    ),
    dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=16,
        beta_fast=4.0, beta_slow=1.0,
    ),
    dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=16,
        attention_factor=1.3,
    ),
)  # fmt: skip


def pick(rng, *options):
  return options[rng.integers(len(options))]


def rotary_config(rng):
  groups, shared, half = (int(n) for n in rng.integers(1, 4, 3))
  heads = groups * shared
  return dict(
      vocab_size=int(rng.integers(30, 60)),
      hidden_size=heads * 4 * half,
      num_hidden_layers=int(rng.integers(1, 4)),
      num_attention_heads=heads,
      num_key_value_heads=groups,
      intermediate_size=int(rng.integers(8, 50)),
      hidden_act=pick(rng, "silu", "silu", "gelu"),
      rms_norm_eps=pick(rng, 1e-8, 1e-6, 1e-3),
      max_position_embeddings=64,
      tie_word_embeddings=bool(rng.integers(2)),
      rope_parameters=dict(
          pick(rng, *SCALINGS), rope_theta=pick(rng, 1e2, 1e4, 1e6)
      ),
      pad_token_id=0,
  )


def random_llama(rng):
  return transformers.LlamaForCausalLM(
      transformers.LlamaConfig(
          **rotary_config(rng),
          head_dim=2 * int(rng.integers(2, 6)),
          attention_bias=bool(rng.integers(2)),
          mlp_bias=bool(rng.integers(2)),
      )
  )


def random_qwen2(rng):
  return transformers.Qwen2ForCausalLM(
      transformers.Qwen2Config(**rotary_config(rng))
  )


def random_helium(rng):
  config = rotary_config(rng)
  return transformers.HeliumForCausalLM(
      transformers.HeliumConfig(
          **config,
          head_dim=config["hidden_size"] // config["num_attention_heads"],
          attention_bias=bool(rng.integers(2)),
          mlp_bias=bool(rng.integers(2)),
      )
  )


def random_opt(rng):
  heads = int(rng.integers(1, 5))
  width = heads * int(rng.integers(3, 9))
  return transformers.OPTForCausalLM(
      transformers.OPTConfig(
          vocab_size=int(rng.integers(30, 60)),
          hidden_size=width,
          num_hidden_layers=int(rng.integers(1, 4)),
          num_attention_heads=heads,
          ffn_dim=int(rng.integers(8, 50)),
          max_position_embeddings=LENGTH,
          do_layer_norm_before=bool(rng.integers(2)),
          word_embed_proj_dim=pick(rng, width, 10),
          activation_function=pick(rng, "relu", "gelu"),
          enable_bias=bool(rng.integers(4)),
          tie_word_embeddings=bool(rng.integers(2)),
      )
  )


FAMILIES = (random_llama, random_qwen2, random_helium, random_opt)


@torch.no_grad()
def randomize(model, rng):
  for parameter in model.parameters():
    noise = rng.normal(size=parameter.shape)
    if parameter.ndim == 1:
      value = 1 + 0.2 * noise
    else:
      value = 1.2 * noise / np.sqrt(parameter.shape[1])
    parameter.copy_(torch.from_numpy(np.asarray(value)))
  return model.eval()


@torch.no_grad()
def their_outputs(model, tokens):
  found = model(torch.from_numpy(tokens).long(), output_hidden_states=True)
  body = model.model.decoder if hasattr(model.model, "decoder") else model.model
  hidden = body(torch.from_numpy(tokens).long()).last_hidden_state
  return found.logits.numpy(), hidden.numpy()


@jax.default_matmul_precision("highest")
def our_outputs(system, variables, tokens):
  logits, _ = system.apply(variables, tokens)
  hidden, _ = system.apply(variables, tokens, method="hidden")
  return logits, hidden


@jax.default_matmul_precision("highest")
def our_decoding(system, variables, tokens, prompt):
  """All but the prompt one by one."""
  step = jax.jit(system.apply)
  state = system.init_state(*tokens.shape)
  logits, state = step(variables, tokens[:, :prompt], state=state)
  found = [logits]
  for i in range(prompt, tokens.shape[1]):
    logits, state = step(variables, tokens[:, i : i + 1], state=state)
    found.append(logits)
  return jnp.concatenate(found, axis=1)


def check(found, expected):
  assert found.shape == expected.shape
  worst = np.abs(found - expected).max() / np.abs(expected).max()
  assert worst < 1e-4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", FAMILIES)
def test_import_decoding_and_export(make, seed, tmp_path):
  rng = np.random.default_rng(seed)
  model = randomize(make(rng), rng)
  model.save_pretrained(
      tmp_path / "theirs", max_shard_size=pick(rng, "5KB", "1GB")
  )
  tokens = rng.integers(0, model.config.vocab_size, (3, LENGTH))
  tokens = tokens.astype(np.int32)
  system, variables, _ = pretrained.from_pretrained(tmp_path / "theirs")
  logits, hidden = their_outputs(model, tokens)
  for found, expected in zip(
      our_outputs(system, variables, tokens), (logits, hidden)
  ):
    check(found, expected)
  check(our_decoding(system, variables, tokens, 19), logits)
  fresh = jax.tree.map(
      lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), variables
  )
  pretrained.save_pretrained(
      tmp_path / "ours", system, fresh, max_shard_bytes=pick(rng, 5000, 10**9)
  )
  again, report = type(model).from_pretrained(
      tmp_path / "ours", output_loading_info=True
  )
  assert not any(report.values()), report
  assert again.config.architectures == [type(model).__name__]
  for found, expected in zip(
      our_outputs(system, fresh, tokens), their_outputs(again.eval(), tokens)
  ):
    check(found, expected)


@pytest.mark.parametrize("make", FAMILIES)
def test_embeddings_and_a_ragged_batch(make, tmp_path):
  """Their attention mask is our count: padding on the right is seen by none."""
  rng = np.random.default_rng(7)
  model = randomize(make(rng), rng)
  tokens = rng.integers(0, model.config.vocab_size, (2, 9)).astype(np.int32)
  attended = np.ones_like(tokens)
  attended[1, 5:] = 0
  ids = torch.from_numpy(tokens).long()
  with torch.no_grad():
    vectors = model.get_input_embeddings()(ids)
    expected = model(
        inputs_embeds=vectors, attention_mask=torch.from_numpy(attended)
    ).logits.numpy()
  model.save_pretrained(tmp_path)
  system, variables, _ = pretrained.from_pretrained(tmp_path)
  state = system.init_state(2, 12)
  with jax.default_matmul_precision("highest"):
    found, state = system.apply(
        variables,
        embeddings=vectors.numpy(),
        state=state,
        count=attended.sum(axis=1),
    )
  check(found[0], expected[0])
  check(found[1, :5], expected[1, :5])
  np.testing.assert_array_equal(state.length, [9, 5])


def test_the_made_config_means_the_same_to_transformers(tmp_path):
  for seed, make in enumerate(FAMILIES):
    rng = np.random.default_rng(seed)
    model = make(rng)
    model.save_pretrained(tmp_path / f"theirs{seed}")
    system, variables, _ = pretrained.from_pretrained(
        tmp_path / f"theirs{seed}"
    )
    pretrained.save_pretrained(tmp_path / f"ours{seed}", system, variables)
    again = transformers.AutoConfig.from_pretrained(tmp_path / f"ours{seed}")
    expected, found = model.config.to_dict(), again.to_dict()
    rope, made = (c.pop("rope_parameters", {}) for c in (expected, found))
    assert rope.items() <= made.items()  # It may say defaults aloud.
    changed = {k for k, v in expected.items() if found.get(k) != v}
    # Padding ids are known to the tokenizer alone.
    assert changed <= {"pad_token_id", "_name_or_path"}, changed
