"""Decoders: goldens of transformers, published sizes, state, objectives."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config, pretrained, sharding
from mmjax.models import llm
from mmjax.nn import mask as masks
from mmjax.nn import partitioning, position, rope
from mmjax.weights import safetensors_file, source

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = (
    "llm_llama", "llm_qwen2", "llm_yarn", "llm_helium", "llm_opt",
    "llm_opt_post",
)  # fmt: skip
# OPT-6.7B, LLaMA and Qwen2.5 are stated by their papers or configs; the others
# follow from widths and depths.
PARAMETERS = {
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_33b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3.2_1b": 1_235_814_400,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_1.5b": 1_543_714_304,
    "qwen2.5_3b": 3_085_938_688,
    "qwen2.5_7b": 7_615_616_512,
    "qwen2.5_14b": 14_770_033_664,
    "qwen2.5_32b": 32_763_876_352,
    "qwen2.5_72b": 72_706_203_648,
    "opt_125m": 125_239_296,
    "opt_350m": 331_196_416,
    "opt_1.3b": 1_315_758_080,
    "opt_2.7b": 2_651_596_800,
    "opt_6.7b": 6_658_473_984,
    "opt_13b": 12_853_473_280,
    "opt_30b": 29_974_540_288,
    "opt_66b": 65_719_701_504,
    "opt_175b": 174_604_468_224,
    "helium_2b": 2_172_643_840,
    "helium_7b": 6_839_078_912,
    "tiny": 602_976,
    "small": 58_073_600,
}
SMALL = dict(vocab=30, width=24, depth=2, heads=4, mlp=20, length=64)
FAMILIES = {
    "llama": llm.Decoder(**SMALL, position=rope.Rope()),
    "qwen2": llm.Decoder(
        **SMALL, position=rope.Rope(1e6), groups=2, head_dim=10,
        biases=("qkv",), readout="tied",
    ),
    "helium": llm.Decoder(
        **SMALL, position=rope.Rope(1e5, "interleaved"), epsilon=1e-8
    ),
    "opt": llm.Decoder(
        **SMALL, position=position.LearnedPositions(64), norms="layer",
        mlp_kind="plain", activation="relu", biases=llm.BIASES, readout="tied",
    ),
    "opt_post": llm.Decoder(
        **SMALL, position=position.LearnedPositions(64), norms="layer",
        mlp_kind="plain", activation="relu", biases=llm.BIASES, readout="tied",
        order="post", table=16,
    ),
}  # fmt: skip
LENGTH = 24
TOKENS = np.random.default_rng(0).integers(0, 30, (3, LENGTH), np.int32)


@functools.cache
def drawn(name, **changes):
  """A family with parameters none of which is at its first value."""
  system = FAMILIES[name].clone(**changes)
  variables = jax.jit(system.init)(jax.random.key(0), TOKENS)
  variables = partitioning.unbox(variables)
  rng = np.random.default_rng(1)
  noise = lambda x: np.float32(x + 0.2 * rng.normal(size=x.shape))
  return system, jax.tree.map(noise, variables)


@functools.cache
def whole(name):
  """Logits of TOKENS in one call without state."""
  system, variables = drawn(name)
  logits, state = jax.jit(system.apply)(variables, TOKENS)
  assert state is None
  return logits


def close(found, expected, tolerance=2e-5):
  expected = np.asarray(expected)
  assert found.shape == expected.shape
  assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def build(size):
  return config.build(dict(type="mmjax.models.llm:Decoder", **size), "system")


def test_published_sizes():
  assert PARAMETERS.keys() == llm.SIZES.keys()
  for name, size in llm.SIZES.items():
    shapes, _ = pretrained.abstract_params(llm.LAYOUT, build(size))
    assert sum(x.size for x in shapes.values()) == PARAMETERS[name], name


def test_published_sizes_are_what_their_configs_say():
  for name, size in llm.SIZES.items():
    system = build(size)
    written = llm.LAYOUT.config(system)
    unpublished = name in ("tiny", "small")
    assert unpublished or name.startswith(written["model_type"])
    again = llm.LAYOUT.system(json.loads(json.dumps(written)), [])
    assert llm.LAYOUT.config(again) == written
    assert again.position == system.position


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_reference(name):
  system, variables, _ = pretrained.from_pretrained(GOLDEN / name)
  golden = np.load(GOLDEN / name / "golden.npz")
  run = jax.jit(functools.partial(system.apply, method="hidden"))
  with jax.default_matmul_precision("highest"):
    hidden, _ = run(variables, golden["in.tokens"])
    logits = system.apply(variables, hidden, method="logits")
  close(hidden, golden["out.hidden"], 1e-4)
  close(logits, golden["out.logits"], 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_keeps_every_bit(name, tmp_path):
  system, variables, found = pretrained.from_pretrained(GOLDEN / name)
  pretrained.save_pretrained(
      tmp_path / "out", system, variables, config=found, dtype=found["dtype"]
  )
  theirs, ours = map(source.open_source, (GOLDEN / name, tmp_path / "out"))
  assert set(theirs.tensors) == set(ours.tensors)
  for tensor in theirs.tensors:
    np.testing.assert_array_equal(theirs.read(tensor), ours.read(tensor))
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written == found
  pretrained.save_pretrained(tmp_path / "made", system, variables)
  assert pretrained.from_pretrained(tmp_path / "made").system == system


def test_opt_files_may_lack_the_prefix_and_hold_the_table_twice(tmp_path):
  theirs = source.open_source(GOLDEN / "llm_opt")
  bare = {name[len("model.") :]: theirs.read(name) for name in theirs.tensors}
  bare["lm_head.weight"] = bare["decoder.embed_tokens.weight"]
  safetensors_file.write(tmp_path / "model.safetensors", bare, {})
  (tmp_path / "config.json").write_bytes(
      (GOLDEN / "llm_opt" / "config.json").read_bytes()
  )
  found = pretrained.from_pretrained(tmp_path).variables
  expected = pretrained.from_pretrained(GOLDEN / "llm_opt").variables
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_with_state_equal_the_whole_without(name):
  system, variables = drawn(name)
  step = jax.jit(
      lambda tokens, state: system.apply(variables, tokens, state=state)
  )
  for sizes in ([1] * LENGTH, [3, 18, 3], [18, *[1] * 6]):
    state = system.init_state(3, LENGTH)
    parts, at = [], 0
    for size in sizes:
      logits, state = step(TOKENS[:, at : at + size], state)
      parts.append(logits)
      at += size
    np.testing.assert_array_equal(state.length, [LENGTH] * 3)
    close(jnp.concatenate(parts, axis=1), whole(name))


@pytest.mark.parametrize("name", ["qwen2", "opt"])
def test_ragged_rows_equal_each_row_alone(name):
  """Prompts of 2, 7 and 5 tokens, then two more calls of uneven counts."""
  system, variables = drawn(name)
  step = jax.jit(
      lambda tokens, state, count: system.apply(
          variables, tokens, state=state, count=count
      )
  )
  state = system.init_state(3, 32)
  begin = np.zeros(3, np.int32)
  for counts in ([2, 7, 5], [1, 1, 1], [0, 7, 4], [1, 1, 1]):
    counts = np.array(counts)
    rows = np.full((3, 7 if max(counts) > 1 else 1), 29, np.int32)
    for row, (at, count) in enumerate(zip(begin, counts)):
      rows[row, :count] = TOKENS[row, at : at + count]
    logits, state = step(rows, state, counts)
    for row, (at, count) in enumerate(zip(begin, counts)):
      if count:
        close(logits[row, :count], whole(name)[row, at : at + count])
    begin += counts
    np.testing.assert_array_equal(state.length, begin)


def test_a_step_writes_its_state_in_place():
  system = FAMILIES["qwen2"].clone(depth=16)
  variables = jax.eval_shape(
      lambda: partitioning.unbox(system.init(jax.random.key(0), TOKENS))
  )
  state = jax.eval_shape(lambda: system.init_state(3, 2048))
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  step = jax.jit(
      lambda variables, tokens, state: system.apply(
          variables, tokens, state=state
      ),
      donate_argnums=2,
  )
  for count in (1, 20):
    tokens = jax.ShapeDtypeStruct((3, count), jnp.int32)
    memory = step.lower(variables, tokens, state).compile().memory_analysis()
    assert memory.alias_size_in_bytes == size
    # Many tokens attend to a copy of one layer.
    assert memory.temp_size_in_bytes < 0.5 * size


@pytest.mark.parametrize("name", ["llama", "opt_post"])
def test_embeddings_stand_for_their_tokens(name):
  system, variables = drawn(name)
  vectors = system.apply(variables, TOKENS, method="embeddings")
  assert vectors.shape == (3, LENGTH, system.table or system.width)
  found, _ = jax.jit(system.apply)(variables, embeddings=vectors)
  close(found, whole(name))


def test_a_mask_of_the_caller_and_positions_of_several_axes():
  system, variables = drawn("llama")
  full, _ = jax.jit(system.apply)(
      variables, TOKENS, mask=masks.full(LENGTH)
  )
  causal = whole("llama")
  assert not np.allclose(full[:, 0], causal[:, 0], atol=1e-2)
  three = system.clone(position=rope.Rope(sections=(1, 1, 1)))
  place = np.broadcast_to(np.arange(LENGTH)[:, None], (1, LENGTH, 3))
  run = jax.jit(three.apply)
  found, _ = run(variables, TOKENS, position=place)
  close(found, causal)
  moved = place + np.array([0, 3, 0]) * (place > 4)
  found, _ = run(variables, TOKENS, position=moved)
  assert not np.allclose(found, causal, atol=1e-2)


def test_half_precision_keeps_logits_and_parameters_in_float32():
  system, variables = drawn("qwen2", dtype="bfloat16")
  state = system.init_state(3, LENGTH)
  assert state.k.dtype == jnp.bfloat16
  found, state = jax.jit(system.apply)(variables, TOKENS, state=state)
  assert found.dtype == jnp.float32 and state.k.dtype == jnp.bfloat16
  close(found, whole("qwen2"), 0.05)
  shapes = jax.eval_shape(system.init, jax.random.key(0), TOKENS)
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


BATCH = {
    "tokens": TOKENS,
    "weight": np.float32(np.random.default_rng(2).random((3, LENGTH))),
}


def mean(objective, system, params, batch, **kwargs):
  terms, mutables = objective(
      system, {"params": params}, batch, None, **kwargs
  )
  assert mutables == {}
  term = terms["next_token"]
  return term.total / term.weight


@pytest.mark.parametrize("chunks", [1, 5])
def test_the_objective_is_the_weighted_surprise(chunks):
  system, variables = drawn("opt_post")
  logits = np.float64(whole("opt_post")[:, :-1])
  logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  picked = np.take_along_axis(logits, TOKENS[:, 1:, None], 2)[..., 0]
  expected = -np.average(picked, weights=BATCH["weight"][:, 1:])
  found = mean(
      llm.next_token, system, variables["params"], BATCH, chunks=chunks
  )
  assert float(found) == pytest.approx(expected, rel=1e-5)


def test_packed_rows_cost_what_their_documents_cost():
  system, variables = drawn("llama")
  split = 10
  segment = np.repeat([[1, 2]], [split, LENGTH - split], axis=1)
  place = np.concatenate([np.arange(split), np.arange(LENGTH - split)])
  batch = dict(
      tokens=TOKENS[:1],
      weight=BATCH["weight"][:1],
      segment=segment.astype(np.int32),
      position=place[None].astype(np.int32),
  )
  run = lambda objective, **kwargs: jax.jit(
      lambda batch: objective(system, variables, batch, None, **kwargs)[0]
  )
  packed = run(llm.next_token_packed, chunks=3)(batch)
  total = weight = 0.0
  for part in (slice(0, split), slice(split, None)):
    alone = {key: batch[key][:, part] for key in ("tokens", "weight")}
    terms = run(llm.next_token)(alone)
    total += terms["next_token"].total
    weight += terms["next_token"].weight
  np.testing.assert_allclose(packed["next_token"].total, total, rtol=1e-5)
  np.testing.assert_allclose(packed["next_token"].weight, weight, rtol=1e-6)


def test_recomputing_changes_no_gradient():
  system, variables = drawn("qwen2")

  def gradient(system, chunks):
    loss = lambda p: mean(llm.next_token, system, p, BATCH, chunks=chunks)
    return jax.jit(jax.grad(loss))(variables["params"])

  jax.tree.map(
      lambda a, b: close(a, b, 1e-4),
      gradient(system.clone(remat="full"), 4),
      gradient(system, 1),
  )


def test_eight_devices_compute_what_one_does():
  """Logits with a state, and the gradient of the objective."""
  system, variables = drawn("qwen2")
  batch = {key: np.concatenate([x, x])[:4] for key, x in BATCH.items()}

  def logits(params, tokens):
    state = system.init_state(4, LENGTH)
    return system.apply({"params": params}, tokens, state=state)[0]

  def gradient(params, batch):
    loss = lambda p: mean(llm.next_token, system, p, batch, chunks=3)
    return jax.grad(loss)(params)

  params = variables["params"]
  expected = jax.jit(gradient)(params, batch)
  with jax.set_mesh(sharding.make_mesh(dict(fsdp=2, tensor=2, context=2))):
    found = jax.jit(gradient)(params, batch)
    cached = jax.jit(logits)(params, batch["tokens"])
  jax.tree.map(
      lambda a, b: close(np.asarray(a), b, 1e-4), found, expected
  )
  once = np.concatenate([whole("qwen2")] * 2)[:4]
  close(np.asarray(cached), once)


@pytest.mark.parametrize(
    "changes,call,message",
    [
        ({}, dict(tokens=TOKENS, embeddings=TOKENS), "either tokens or"),
        ({}, {}, "either tokens or"),
        (
            {},
            dict(embeddings=np.zeros((1, 2, 23))),
            "width 23: the model's tokens have 24",
        ),
        (dict(length=20), dict(tokens=TOKENS), "24 tokens: .* made for 20"),
        (dict(groups=3), dict(tokens=TOKENS), "not divisible by 3 groups"),
        (dict(heads=5), dict(tokens=TOKENS), "24 is not divisible by 5"),
        (dict(norms="rsm"), dict(tokens=TOKENS), "did you mean 'rms'"),
        (dict(readout="tide"), dict(tokens=TOKENS), "did you mean 'tied'"),
        (dict(biases=("qk",)), dict(tokens=TOKENS), "did you mean 'qkv'"),
    ],
)
def test_what_cannot_be_is_refused(changes, call, message):
  system, variables = drawn("llama")
  with pytest.raises(ValueError, match=message):
    system.clone(**changes).apply(variables, **call)


def test_more_tokens_than_slots_are_refused():
  system, variables = drawn("llama")
  with pytest.raises(ValueError, match="24 queries do not fit 20 slots"):
    system.apply(variables, TOKENS, state=system.init_state(3, 20))


@pytest.mark.parametrize(
    "name,words,message",
    [
        ("llm_qwen2", dict(use_sliding_window=True), "full attention"),
        ("llm_llama", dict(rope_scaling=dict(type="longrope")), "longrope"),
        ("llm_llama", dict(hidden_act="swish"), "activation 'swish'"),
        (
            "llm_qwen2",
            dict(rope_scaling=dict(type="default", mrope_section=[1, 1, 1])),
            "mrope_section",
        ),
        ("llm_opt", dict(_remove_final_layer_norm=True), "behind the last"),
        (
            "llm_yarn",
            dict(rope_scaling=dict(type="yarn", factor=2.0, mscale=0.7)),
            "mscale",
        ),
    ],
)
def test_configs_of_other_networks_are_refused(name, words, message):
  found = json.loads((GOLDEN / name / "config.json").read_text())
  with pytest.raises(ValueError, match=message):
    llm.LAYOUT.system(found | words, [])


def test_decoders_that_transformers_has_not_are_refused():
  for name, change, message in (
      ("helium", dict(order="post"), "order='post'"),
      ("opt", dict(epsilon=1e-6), "epsilon=1e-06"),
      ("qwen2", dict(position=rope.Rope(sections=(1, 2, 2))), "position"),
  ):
    system = FAMILIES[name].clone(**change)
    with pytest.raises(ValueError, match=message):
      llm.LAYOUT.config(system)
