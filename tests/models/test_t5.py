"""T5: goldens of transformers, published sizes, memory, the objective."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config, pretrained, sharding
from mmjax.evals import answers
from mmjax.models import t5
from mmjax.nn import cache, partitioning
from mmjax.sampling import autoregressive, beam
from mmjax.sampling.decoding import Decoding
from mmjax.weights import source

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("t5_first", "t5_gated", "t5_exact")
# Those of xl and xxl are in the paper's release; the others follow from widths
# and depths.
PARAMETERS = {
    "tiny": 972_640,
    "v1_small": 60_506_624,
    "v1_base": 222_903_552,
    "v1_large": 737_668_096,
    "v1_3b": 2_851_598_336,
    "v1_11b": 11_307_321_344,
    "small": 76_961_152,
    "base": 247_577_856,
    "large": 783_150_080,
    "xl": 2_849_757_184,
    "xxl": 11_135_332_352,
}
SMALL = t5.T5(
    vocab=30, width=24, encoder_depth=2, decoder_depth=2, heads=4, head_dim=5,
    mlp=20, buckets=8, longest=12,
)  # fmt: skip
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 30, (3, 11), np.int32)
TARGETS = RNG.integers(1, 30, (3, 8), np.int32)
COUNT = np.array([11, 4, 7], np.int32)
SEGMENT = (np.arange(11) < COUNT[:, None]).astype(np.int32)


def close(found, expected, tolerance=2e-5):
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape
  assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def build(name):
  size = dict(t5.SIZES[name], type="mmjax.models.t5:T5")
  return config.build(size, "system")


@functools.cache
@functools.cache
def golden(name):
  system, variables, _ = pretrained.from_pretrained(GOLDEN / name)
  with np.load(GOLDEN / name / "golden.npz") as arrays:
    return system, variables, dict(arrays)


@functools.cache
def drawn():
  """The small system with parameters off their first values."""
  variables = partitioning.unbox(
      jax.jit(SMALL.init)(jax.random.key(0), TOKENS, TARGETS)
  )
  rng = np.random.default_rng(1)
  noise = lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape))
  return jax.tree.map(noise, variables)


@functools.cache
def whole():
  """Logits of TARGETS in one call without state."""
  return jax.jit(SMALL.apply)(drawn(), TOKENS, TARGETS, SEGMENT)


def test_published_sizes():
  assert PARAMETERS.keys() == t5.SIZES.keys()
  for name in t5.SIZES:
    system = build(name)
    shapes, _ = pretrained.abstract_params(t5.LAYOUT, system)
    assert sum(x.size for x in shapes.values()) == PARAMETERS[name], name
    written = json.loads(json.dumps(t5.LAYOUT.config(system)))
    assert t5.LAYOUT.system(written, []) == system


@functools.partial(jax.jit, static_argnums=0)
def encode(system, variables, tokens, count):
  return system.apply(variables, tokens, count=count, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def decode(system, variables, tokens, seen, seen_count, state, count):
  return system.apply(
      variables, tokens, seen, seen_count, state, count, method="decode"
  )


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_transformers(name):
  system, variables, arrays = golden(name)
  count = arrays["in.count"]
  seen = encode(system, variables, arrays["in.tokens"], count)
  there = np.arange(seen.shape[1]) < count[:, None]
  close(seen * there[..., None], arrays["out.encoded"])
  logits, state = decode(
      system, variables, arrays["in.targets"], seen, count, None, None
  )
  close(logits, arrays["out.logits"])
  assert state is None


def prompts(system, variables, arrays):
  """What both engines take."""
  new = arrays["out.greedy"].shape[1]
  tokens, count = arrays["in.tokens"], arrays["in.count"]
  segment = (np.arange(tokens.shape[1]) < count[:, None]).astype(np.int32)
  steps = answers.writer(
      system, variables, dict(tokens=tokens, segment=segment), new
  )
  return steps._asdict() | dict(decoding=Decoding(max_new=new, eos=(1,)))


@pytest.mark.parametrize("name", CASES)
def test_greedy_texts_are_those_of_transformers(name):
  system, variables, arrays = golden(name)
  found, _ = autoregressive.generate(**prompts(system, variables, arrays))
  np.testing.assert_array_equal(found.tokens, arrays["out.greedy"])


@pytest.mark.parametrize("name", ["t5_gated", "t5_exact"])
def test_beams_are_those_of_transformers(name):
  system, variables, arrays = golden(name)
  width = arrays["out.scores"].shape[1]
  found = beam.beam_search(
      reorder=cache.reordered,
      beam=beam.Beam(width, 0.6),
      **prompts(system, variables, arrays),
  )
  np.testing.assert_array_equal(found.tokens, arrays["out.beam"])
  np.testing.assert_allclose(found.scores, arrays["out.scores"], atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_keeps_every_bit(name, tmp_path):
  system, variables, _ = golden(name)
  found = pretrained.from_pretrained(GOLDEN / name).config
  pretrained.save_pretrained(
      tmp_path / "out", system, variables, config=found
  )
  theirs, ours = map(source.open_source, (GOLDEN / name, tmp_path / "out"))
  assert set(theirs.tensors) == set(ours.tensors)
  for tensor in theirs.tensors:
    np.testing.assert_array_equal(theirs.read(tensor), ours.read(tensor))
  pretrained.save_pretrained(tmp_path / "made", system, variables)
  assert pretrained.from_pretrained(tmp_path / "made").system == system


def test_configs_in_the_words_of_old_and_new_releases():
  read = lambda own_head=False, **words: t5.t5_layout.attributes(
      words, own_head
  )
  old = read(d_model=16, feed_forward_proj="gated-gelu",
             tie_word_embeddings=False)  # fmt: skip
  new = read(d_model=16, feed_forward_proj="gated-gelu", own_head=True,
             scale_decoder_outputs=False)  # fmt: skip
  assert old == new
  assert (old["readout"], old["logit_scale"]) == ("own", 1.0)
  assert old["activation"] == "gelu_new"
  first = read(d_model=16)
  assert (first["readout"], first["logit_scale"]) == ("tied", 0.25)
  assert (first["mlp_kind"], first["activation"]) == ("plain", "relu")
  with pytest.raises(ValueError, match="feed_forward_proj is 'double-relu'"):
    read(feed_forward_proj="double-relu")
  with pytest.raises(ValueError, match="activation 'gated'"):
    read(feed_forward_proj="gated-gated")
  with pytest.raises(ValueError, match="logit_scale is 0.3"):
    t5.LAYOUT.config(SMALL.clone(logit_scale=0.3))


@pytest.mark.parametrize("ragged", [False, True])
def test_chunks_with_state_equal_the_whole_without(ragged):
  """Rows whose inputs differ in length, then texts that do."""
  variables, expected = drawn(), whole()
  inputs = np.asarray(t5.opened(SMALL, TARGETS))
  seen = encode(SMALL, variables, TOKENS, COUNT)
  first, state = (seen, COUNT), SMALL.init_state(3, 8, 11)
  at = np.zeros(3, np.int32)
  full = [np.full(3, 3), *[np.ones(3, int)] * 5]
  uneven = np.array([[3, 1, 2], [1, 0, 1], [0, 1, 1]])
  for counts in uneven if ragged else full:
    size = 3 if first[0] is not None else 1
    part = np.full((3, size), 29, np.int32)
    for row, (begins, count) in enumerate(zip(at, counts)):
      part[row, :count] = inputs[row, begins : begins + count]
    logits, state = decode(SMALL, variables, part, *first, state, counts)
    for row, (begins, count) in enumerate(zip(at, counts)):
      if count:
        close(logits[row, :count], expected[row, begins : begins + count])
    at, first = at + counts, (None, None)
    np.testing.assert_array_equal(state.own.length, at)
    np.testing.assert_array_equal(state.seen.length, COUNT)


def test_padding_is_seen_by_nobody():
  variables, count = drawn(), COUNT[1:2]
  run = jax.jit(SMALL.apply)
  found = run(variables, TOKENS[1:2, : count[0]], TARGETS[1:2])
  close(found, whole()[1:2])
  other = np.where(SEGMENT == 0, 1 + TOKENS % 5, TOKENS)
  close(run(variables, other, TARGETS, SEGMENT), whole(), 1e-6)


def test_soft_prompts_stand_for_their_tokens():
  variables = drawn()
  vectors = SMALL.apply(variables, TOKENS, method="embeddings")
  run = jax.jit(functools.partial(SMALL.apply, method="encode"))
  found = run(variables, embeddings=vectors, count=COUNT)
  close(found, encode(SMALL, variables, TOKENS, COUNT), 1e-6)


BATCH = dict(tokens=TOKENS, segment=SEGMENT, targets=TARGETS)


@pytest.mark.parametrize("chunks", [1, 4])
def test_the_objective_is_the_surprise_of_the_targets(chunks):
  targets = np.where(np.arange(8) < np.array([[8], [3], [5]]), TARGETS, -1)
  run = jax.jit(lambda *args: t5.write(SMALL, *args, None, chunks))
  terms, mutables = run(drawn(), BATCH | dict(targets=targets))
  log_probs = jax.nn.log_softmax(whole())
  picked = jnp.take_along_axis(log_probs, TARGETS[..., None], 2)[..., 0]
  expected = -np.asarray(picked)[targets >= 0].sum()
  term = terms["next_token"]
  assert float(term.weight) == 16 and mutables == {}
  assert float(term.total) == pytest.approx(float(expected), rel=1e-5)


def gradient(system, variables, batch):
  def loss(params):
    terms, _ = t5.write(system, {"params": params}, batch, None)
    return terms["next_token"].total / terms["next_token"].weight

  return jax.jit(jax.grad(loss))(variables["params"])


@pytest.mark.slow
def test_recomputing_and_sharding_change_no_gradient():
  variables = drawn()
  batch = {key: np.concatenate([x, x])[:4] for key, x in BATCH.items()}
  expected = gradient(SMALL, variables, batch)
  same = lambda a, b: close(a, b, 1e-4)
  again = gradient(SMALL.clone(remat="full"), variables, batch)
  jax.tree.map(same, again, expected)
  with jax.set_mesh(sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))):
    found = gradient(SMALL, variables, batch)
  jax.tree.map(same, found, expected)


def test_half_precision_keeps_logits_in_float32():
  system = SMALL.clone(dtype="bfloat16")
  found = jax.jit(system.apply)(drawn(), TOKENS, TARGETS, SEGMENT)
  assert found.dtype == jnp.float32
  close(found, whole(), 0.1)


@pytest.mark.parametrize(
    "changes,method,call,message",
    [
        ({}, "encode", {}, "either tokens or embeddings"),
        (
            {}, "encode", dict(embeddings=np.zeros((1, 2, 23))),
            "width 23: the model's tokens have 24",
        ),
        ({}, "decode", dict(tokens=TARGETS), "expected `seen`"),
        (
            dict(readout="tide"), "encode", dict(tokens=TOKENS),
            "did you mean 'tied'",
        ),
        (
            dict(mlp_kind="gate"), "encode", dict(tokens=TOKENS),
            "did you mean 'gated'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(changes, method, call, message):
  with pytest.raises(ValueError, match=message):
    SMALL.clone(**changes).apply(drawn(), method=method, **call)
