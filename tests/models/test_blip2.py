"""BLIP-2: goldens of transformers and of the official code, masks, stages."""

import collections
import functools
from pathlib import Path

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config, pretrained
from mmjax.models import blip2, blip2_pretrain, qformer
from mmjax.nn import cache, partitioning
from mmjax.objectives.term import Context
from mmjax.sampling import autoregressive, beam
from mmjax.sampling.decoding import Decoding
from mmjax.weights import engine, source

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("blip2_opt", "blip2_every", "blip2_t5")
# Behind the end of a row, and the end, in the goldens.
PAD, EOS = 1, 2
CONTEXT = Context(jnp.int32(0), jax.random.key(0), None)


def close(found, expected, tolerance=2e-5):
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape
  assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@functools.cache
@functools.cache
def golden(name):
  system, variables, _ = pretrained.from_pretrained(GOLDEN / name)
  with np.load(GOLDEN / name / "golden.npz") as arrays:
    arrays = dict(arrays)
  batch = {k[3:]: v for k, v in arrays.items() if k.startswith("in.")}
  return system, variables, batch, arrays


def scores(system, variables, batch):
  found = jax.jit(system.apply)(variables, **batch)
  return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_transformers(name):
  system, variables, batch, arrays = golden(name)
  prompts = jax.jit(functools.partial(system.apply, method="encode"))(
      variables, batch["image"]
  )
  close(prompts, arrays["out.prompts"])
  close(scores(system, variables, batch), arrays["out.logits"])


@pytest.mark.parametrize("name", CASES)
def test_export_is_read_back(name, tmp_path):
  system, variables, batch, arrays = golden(name)
  pretrained.save_pretrained(tmp_path / "out", system, variables)
  again, restored, _ = pretrained.from_pretrained(tmp_path / "out")
  assert blip2.LAYOUT.config(again) == blip2.LAYOUT.config(system)
  close(scores(again, restored, batch), arrays["out.logits"])


def prefill(bound, tokens, valid, state, *, system):
  variables, batch = bound
  batch = dict(batch, tokens=tokens)
  return system.apply(variables, batch, state, valid, method="prefill")


def step(variables, tokens, valid, state, *, system):
  return system.apply(variables, tokens, state, valid, method="reply")


def engine_arguments(system, variables, batch, new):
  rows, length = batch["tokens"].shape
  partial = lambda f, bound: jax.tree_util.Partial(
      functools.partial(f, system=system), bound
  )
  return dict(
      step=partial(step, variables),
      prefill=partial(prefill, (variables, batch)),
      state=system.init_state(rows, length + new),
      tokens=batch["tokens"],
      valid=np.full(rows, length),
      decoding=Decoding(new, eos=(EOS,), pad=PAD),
  )


@pytest.mark.parametrize("name", CASES)
def test_greedy_and_beam_are_those_of_transformers(name):
  system, variables, batch, arrays = golden(name)
  new = arrays["out.greedy"].shape[1]
  arguments = engine_arguments(system, variables, batch, new)
  found, _ = autoregressive.generate(**arguments)
  np.testing.assert_array_equal(found.tokens, arrays["out.greedy"])
  arguments = engine_arguments(system, variables, batch, new)
  best = beam.beam_search(
      reorder=cache.reordered, beam=beam.Beam(3, length_penalty=-1.0),
      **arguments,
  )
  np.testing.assert_array_equal(best.tokens[:, 0], arrays["out.beam"])


def test_matching_is_that_of_transformers(tmp_path):
  system, variables, batch, arrays = golden("blip2_match")
  found, verdict = jax.jit(system.apply)(variables, **batch)
  close(found, arrays["out.similarity"])
  close(verdict, arrays["out.verdict"])
  pretrained.save_pretrained(tmp_path / "out", system, variables)
  again, restored, _ = pretrained.from_pretrained(tmp_path / "out")
  assert blip2_pretrain.LAYOUT.config(again) == (
      blip2_pretrain.LAYOUT.config(system)
  )
  jax.tree.map(np.testing.assert_array_equal, restored, variables)


# --- the first stage ----------------------------------------------------------


@functools.cache
def official():
  """The official code's system, its parameters, and a run of it."""
  system = blip2_pretrain.Pretraining(
      blip2_pretrain.ImageText(
          vision=blip2.eva((16, 16), 4, 32, 2, 4, 64),
          qformer=qformer.QFormer(
              queries=5, width=24, depth=4, heads=4, mlp=48, vocab=70, length=40
          ),
          embed=16,
          vision_epsilon=1e-5,
      )
  )
  shapes, _ = pretrained.abstract_params(blip2_pretrain.LAYOUT, system)
  tensors = source.open_source(GOLDEN / "blip2_lavis" / "weights.safetensors")
  table = blip2_pretrain.official_table(system)
  params = engine.load(tensors, table, shapes)
  # Every tensor but the copies of the word embeddings comes back.
  for name, tensor in engine.dump(table, params):
    np.testing.assert_array_equal(tensor, tensors.read(name))
  arrays = {}
  for kind in ("inputs", "outputs"):
    with np.load(GOLDEN / "blip2_lavis" / f"{kind}.npz") as found:
      arrays |= dict(found)
  batch = dict(
      image=arrays["image"].transpose(0, 2, 3, 1),
      tokens=arrays["input_ids"].astype(np.int32),
      identity=np.arange(3, dtype=np.int32),
  )
  params = traverse_util.unflatten_dict(params, sep="/")
  return system, {"params": params}, batch, arrays


def ratio(term):
  return float(term.total / term.weight)


def test_the_first_stage_is_that_of_the_official_code():
  system, variables, batch, arrays = official()
  run = lambda method, *args: jax.jit(
      functools.partial(system.apply, method=method)
  )(variables, *args)
  seen = run("see", batch["image"])
  close(seen, arrays["hook.image_embeds"])
  close(
      run(lambda module, x: module.model.qformer(x)[0], seen),
      arrays["qformer_query_out"],
  )
  found, _, hidden = run("compare_and_write", seen, batch["tokens"])
  valid = batch["tokens"] != 0
  close(
      run("logits", hidden)[valid], arrays["itg_logits"][valid]
  )
  for way, names in ((found.T, "123"), (found, "456")):
    away = np.where(np.eye(3), -1e4, way)
    expected = np.stack([arrays[f"neg_weights.{n}"] for n in names])
    close(jax.nn.softmax(jnp.asarray(away)), expected)
  image, text = arrays["negatives"].reshape(2, 3)
  triples = run(
      "match",
      jnp.concatenate([seen, seen[image], seen]),
      np.concatenate([batch["tokens"]] * 2 + [batch["tokens"][text]]),
  )
  close(triples, arrays["itm_token_logits"])


def test_the_first_objective_is_that_of_the_official_code():
  system, variables, batch, arrays = official()
  hardest = lambda key, logits: logits.argmax(axis=-1)
  terms, mutables = jax.jit(
      functools.partial(blip2_pretrain.represent, system, draw=hardest)
  )(variables, batch, CONTEXT)
  assert mutables == {}
  for name, theirs in (
      ("contrastive", "itc"), ("matching", "itm"), ("next_token", "lm")
  ):
    expected = float(arrays[f"loss_{theirs}"])
    assert ratio(terms[name]) == pytest.approx(expected, rel=1e-5)


def test_vectors_do_not_depend_on_the_pass_that_makes_them():
  system, variables, batch, arrays = official()
  run = lambda method, *args: jax.jit(
      functools.partial(system.apply, method=method)
  )(variables, *args)
  seen, vectors = run("encode_image", batch["image"])
  text = run("encode_text", batch["tokens"])
  raw = arrays["text_feats_raw"]
  close(text, raw / np.linalg.norm(raw, axis=-1, keepdims=True))
  found, _, _ = run("compare_and_write", seen, batch["tokens"])
  close(blip2_pretrain.similarity(vectors, text) / 0.07, found)


def test_who_sees_whom_in_one_pass_for_two_losses():
  valid = np.array([[True, True, True], [True, True, False]])
  found = qformer.separate_and_written(2, 3, valid).dense()
  for row, there in zip(found, valid):
    expected = np.zeros((8, 8), bool)
    expected[:2, :2] = True  # Queries and nothing else.
    expected[2:5, 2:5] = there  # A text to compare sees itself.
    expected[5:, :2] = True  # One that is written sees queries
    expected[5:, 5:] = np.tril(np.ones((3, 3), bool)) & there  # and its past.
    np.testing.assert_array_equal(row, expected)


def test_pictures_of_one_identity_are_no_negatives_of_each_other():
  system, variables, batch, _ = official()
  seen = []
  represent = functools.partial(
      blip2_pretrain.represent, system, variables, context=CONTEXT,
      draw=lambda key, logits: seen.append(logits) or logits.argmax(axis=-1),
  )  # fmt: skip
  represent(batch=dict(batch, identity=np.array([4, 7, 4])))
  for logits in seen:
    hidden = np.asarray(logits) == -1e4
    np.testing.assert_array_equal(
        hidden, [[True, False, True], [False, True, False], [True, False, True]]
    )


# --- the second stage ---------------------------------------------------------


def build(name, llm="llm"):
  size = blip2.SIZES[name]
  kind = dict(llm="BLIP2", t5="BLIP2T5")[llm]
  node = dict(
      type=f"mmjax.models.blip2:{kind}", vision=size["vision"],
      qformer=size["qformer"], llm=size[llm],
  )
  return config.build(node, "system")


def test_published_sizes():
  # What is trained; table 2 of the paper has it in millions.
  trained = {
      "vitl_opt2.7b": 103_5, "vitl_flant5xl": 103_2, "opt2.7b": 107_1,
      "opt6.7b": 108_3, "flant5xl": 106_7, "flant5xxl": 108_3,
  }  # fmt: skip
  for name, millions in trained.items():
    llm = "t5" if "t5" in name else "llm"
    shapes, _ = pretrained.abstract_params(blip2.LAYOUT, build(name, llm))
    sizes = collections.Counter()
    for path, leaf in shapes.items():
      sizes[path.split("/")[0]] += leaf.size
    # EVA-CLIP g/14, or CLIP L/14, without its last block.
    vision = 290_581_504 if "vitl" in name else 985_894_528
    assert sizes.pop("vision") == vision
    del sizes["llm"]
    assert sizes.total() // 100_000 == millions, name
    assert not any("text" in path for path in shapes)


@functools.cache
def drawn():
  """The tiny system with parameters off their first values, and inputs."""
  system = build("tiny")
  rng = np.random.default_rng(0)
  batch = dict(
      image=rng.normal(size=(2, 64, 64, 3)).astype(np.float32),
      tokens=rng.integers(1, 1000, (2, 20)).astype(np.int32),
      source=np.full((2, 20), -1, np.int32),
      question=rng.integers(1, 1000, (2, 6)).astype(np.int32),
  )
  batch["source"][0, :16] = batch["source"][1, 2:18] = np.arange(16)
  variables = partitioning.unbox(
      jax.jit(system.init)(jax.random.key(0), **batch)
  )
  noise = lambda x: np.float32(x + 0.05 * rng.normal(size=x.shape))
  return system, jax.tree.map(noise, variables), batch


def test_soft_prompts_stand_in_their_places():
  system, variables, batch = drawn()
  run = lambda method, *args: jax.jit(
      functools.partial(system.apply, method=method)
  )(variables, *args)
  found = run("embeddings", *(batch[k] for k in ("image", "tokens", "source")))
  prompts = run("encode", batch["image"])
  np.testing.assert_array_equal(found[0, :16], prompts[0])
  np.testing.assert_array_equal(found[1, 2:18], prompts[1])
  words = variables["params"]["llm"]["embed"]["embedding"]
  np.testing.assert_array_equal(found[0, 16:], words[batch["tokens"][0, 16:]])
  # Several pictures follow each other.
  pair = np.stack([batch["image"], batch["image"][::-1]], axis=1)
  both = run("encode", pair)
  np.testing.assert_allclose(both[:, :16], prompts, atol=3e-6)
  np.testing.assert_allclose(both[:, 16:], prompts[::-1], atol=3e-6)


def test_a_question_changes_what_queries_look_for():
  system, variables, batch = drawn()
  encode = jax.jit(functools.partial(system.apply, method="encode"))
  plain = encode(variables, batch["image"])
  asked = encode(variables, batch["image"], batch["question"])
  assert np.abs(plain - asked).max() > 1e-2 * np.abs(plain).max()
  # Padding behind it is not seen.
  longer = np.pad(batch["question"], ((0, 0), (0, 3)))
  found = encode(variables, batch["image"], longer)
  np.testing.assert_allclose(found, asked, atol=2e-5)


def certain(name):
  """A golden without dropout."""
  system, variables, batch, _ = golden(name)
  system = system.clone(qformer=system.qformer.clone(dropout=0.0))
  return system, variables, dict(batch)


def test_objectives_count_what_is_to_be_written():
  system, variables, batch = certain("blip2_opt")
  batch = dict(batch, weight=np.float32(np.arange(9) > 6) * np.ones((2, 1)))
  terms, _ = jax.jit(functools.partial(blip2.describe, system))(
      variables, batch, CONTEXT
  )
  logits, _ = jax.jit(system.apply)(
      variables, *(batch[k] for k in ("image", "tokens", "source"))
  )
  log_probs = jax.nn.log_softmax(logits)
  chosen = np.take_along_axis(
      np.asarray(log_probs)[:, 6:8], batch["tokens"][:, 7:, None], axis=-1
  )
  assert float(terms["next_token"].weight) == 4
  assert ratio(terms["next_token"]) == pytest.approx(-chosen.mean(), rel=1e-5)

  system, variables, batch = certain("blip2_t5")
  batch["segment"] = np.ones_like(batch["tokens"])
  batch["segment"][0, 6:] = 0
  behind = np.arange(6) >= [[6], [4]]
  batch["targets"] = np.where(behind, -1, batch["targets"])
  terms, _ = jax.jit(functools.partial(blip2.go_on, system))(
      variables, batch, CONTEXT
  )
  log_probs = jax.nn.log_softmax(jax.jit(system.apply)(variables, **batch))
  chosen = np.take_along_axis(
      np.asarray(log_probs), np.maximum(batch["targets"], 0)[..., None], axis=-1
  )[..., 0]
  assert float(terms["next_token"].weight) == 6 + 4
  loss = -chosen[batch["targets"] >= 0].mean()
  assert ratio(terms["next_token"]) == pytest.approx(loss, rel=1e-5)


def test_official_names_of_a_clip_tower():
  system = build("vitl_opt2.7b")
  shapes, _ = pretrained.abstract_params(blip2.LAYOUT, system)
  names = engine.describe(blip2.official_table(system), shapes)
  for name, shape in {
      "visual_encoder.conv1.weight": (1024, 3, 14, 14),
      "visual_encoder.ln_pre.bias": (1024,),
      "visual_encoder.transformer.resblocks.22.attn.in_proj_weight":
          (3072, 1024),
      "Qformer.bert.encoder.layer.10.crossattention.self.key.weight":
          (768, 1024),
      "Qformer.bert.encoder.layer.11.output_query.dense.weight": (768, 3072),
      "opt_proj.weight": (2560, 768),
      "opt_model.model.decoder.layers.31.fc1.weight": (10_240, 2560),
  }.items():
    assert names[name].shape == shape


def test_what_is_refused():
  with pytest.raises(ValueError, match="depth=3 is no multiple of every=2"):
    former = qformer.QFormer(queries=2, width=8, depth=3, heads=2, mlp=8)
    former.init(jax.random.key(0), jnp.zeros((1, 4, 8)))
  system, variables, batch, _ = golden("blip2_match")
  with pytest.raises(ValueError, match="text of 10 tokens"):
    system.apply(variables, batch["image"], np.ones((2, 10), np.int32))
  with pytest.raises(ValueError, match="export the `model`"):
    blip2_pretrain.LAYOUT.config(official()[0])
  with pytest.raises(ValueError, match="CLIP's, expected EVA's"):
    blip2.LAYOUT.config(build("tiny"))
