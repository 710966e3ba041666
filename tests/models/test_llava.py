"""LLaVA: goldens of transformers, pictures in their places, memory, stages."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config, pretrained
from mmjax.evals import answers
from mmjax.models import llava
from mmjax.nn import cache, partitioning
from mmjax.objectives.term import Context
from mmjax.sampling import autoregressive, beam, decoding

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("llava_plain", "llava_full", "llava_qwen2")


def build(name):
  size = dict(llava.SIZES[name], type="mmjax.models.llava:LLaVA")
  return config.build(size, "system")


def close(found, expected, tolerance=1e-5):
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape
  assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@functools.cache
def golden(name):
  system, variables, _ = pretrained.from_pretrained(GOLDEN / name)
  with np.load(GOLDEN / name / "golden.npz") as arrays:
    arrays = dict(arrays)
  inputs = [arrays[f"in.{key}"] for key in ("image", "tokens", "source")]
  return system, variables, inputs, arrays


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_transformers(name):
  system, variables, inputs, arrays = golden(name)
  projected = system.apply(variables, inputs[0], method="encode")
  close(projected, arrays["out.projected"])
  logits, state = jax.jit(system.apply)(variables, *inputs)
  close(logits, arrays["out.logits"])
  assert state is None


# The ids that end an answer, as in the script that wrote the goldens.
SETTINGS = decoding.Decoding(10, eos=(1, 2, 3, 4, 5))


def steps(system, variables, image, tokens, source, count=None):
  """The prompts of a batch, as the engines take them."""
  rows, length = tokens.shape
  count = np.full(rows, length) if count is None else np.asarray(count)
  segment = (np.arange(length) < count[:, None]).astype(np.int32)
  batch = dict(image=image, tokens=tokens, source=source, segment=segment)
  found = answers.writer(system, variables, batch, SETTINGS.max_new)
  return found._asdict()


def same(tokens, lengths, expected):
  """Equal up to and with the end of each row, and as long."""
  for ours, length, theirs in zip(tokens, lengths, expected, strict=True):
    np.testing.assert_array_equal(ours[:length], theirs[:length])
    ends = np.isin(theirs, SETTINGS.eos)
    assert length == (ends.argmax() + 1 if ends.any() else len(theirs))


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_are_those_of_transformers(name):
  system, variables, inputs, arrays = golden(name)
  found, _ = autoregressive.generate(
      **steps(system, variables, *inputs), decoding=SETTINGS
  )
  same(found.tokens, found.lengths, arrays["out.greedy"])


@pytest.mark.parametrize(
    "name",
    [CASES[0], *(pytest.param(c, marks=pytest.mark.slow) for c in CASES[1:])],
)
def test_the_best_of_three_beams_is_that_of_transformers(name):
  system, variables, inputs, arrays = golden(name)
  best = beam.beam_search(
      **steps(system, variables, *inputs),
      reorder=cache.reordered,
      decoding=SETTINGS,
      beam=beam.Beam(3),
  )
  same(best.tokens[:, 0], best.lengths[:, 0], arrays["out.beam"])


def test_a_row_writes_the_same_whatever_stands_beside_and_behind_it():
  system, variables, (image, tokens, source), _ = golden("llava_plain")
  count = np.array([tokens.shape[1], tokens.shape[1] - 3])
  write = lambda image, tokens, source, count: autoregressive.generate(
      **steps(system, variables, image, tokens, source, count),
      decoding=SETTINGS,
  )[0]
  whole = write(image, tokens, source, count)
  other = np.where(np.arange(tokens.shape[1]) < count[:, None], tokens, 7)
  for row in (0, 1):
    twice = [row, row]
    alone = write(image[twice], other[twice], source[twice], count[twice])
    for copy in (0, 1):
      np.testing.assert_array_equal(whole.tokens[row], alone.tokens[copy])
      assert whole.lengths[row] == alone.lengths[copy]


@pytest.mark.parametrize("name", CASES)
def test_export_is_read_back(name, tmp_path):
  system, variables, inputs, arrays = golden(name)
  pretrained.save_pretrained(tmp_path / "out", system, variables)
  again, restored, written = pretrained.from_pretrained(tmp_path / "out")
  assert written["vision_feature_layer"] == -1
  close(again.apply(restored, *inputs)[0], arrays["out.logits"])


def test_published_sizes():
  # CLIP L/14 without its last block and norm, the projector, and Vicuna.
  towers = {224: 256 + 1, 336: 576 + 1}
  block = 4 * (1024**2 + 1024) + 2 * 4096 * 1024 + 4096 + 1024 + 4 * 1024
  vision = lambda side: (
      14 * 14 * 3 * 1024 + 1024 + towers[side] * 1024 + 2 * 1024 + 23 * block
  )
  vicuna = {4096: 6_738_415_616, 5120: 13_015_864_320}
  expected = {
      "v1_7b": (224, 4096, False), "v1_13b": (224, 5120, False),
      "v1.5_7b": (336, 4096, True), "v1.5_13b": (336, 5120, True),
  }
  for name, (side, width, hidden) in expected.items():
    projector = 1025 * width + (width + 1) * width * hidden
    shapes, _ = pretrained.abstract_params(llava.LAYOUT, build(name))
    assert sum(x.size for x in shapes.values()) == (
        vision(side) + projector + vicuna[width]
    ), name


def drawn():
  """The tiny system with parameters off their first values, and inputs."""
  system = build("tiny")
  rng = np.random.default_rng(0)
  image = rng.normal(size=(2, 64, 64, 3)).astype(np.float32)
  tokens = rng.integers(1, 1000, (2, 80)).astype(np.int32)
  source = np.full((2, 80), -1, np.int32)
  source[0, 3:67], source[1, 10:74] = np.arange(64), np.arange(64)
  variables = partitioning.unbox(
      jax.jit(system.init)(jax.random.key(0), image, tokens, source)
  )
  noise = lambda x: np.float32(x + 0.05 * rng.normal(size=x.shape))
  return system, jax.tree.map(noise, variables), image, tokens, source


def test_pictures_stand_in_their_places():
  system, variables, image, tokens, source = drawn()
  found = system.apply(variables, image, tokens, source, method="embeddings")
  media = system.apply(variables, image, method="encode")
  words = variables["params"]["llm"]["embed"]["embedding"][tokens]
  for b, at in ((0, slice(3, 67)), (1, slice(10, 74))):
    np.testing.assert_array_equal(found[b, at], media[b])
    text = source[b] < 0
    np.testing.assert_array_equal(found[b][text], words[b][text])
  # What id a placeholder has does not matter, one outside the table included.
  other = np.where(source < 0, tokens, -200)
  np.testing.assert_array_equal(
      system.apply(variables, image, other, source)[0],
      system.apply(variables, image, tokens, source)[0],
  )


def test_several_pictures_are_one_row_of_vectors():
  system, variables, image, _, _ = drawn()
  pair = np.stack([image, image[::-1]], axis=1)
  found = system.apply(variables, pair, method="encode")
  one = system.apply(variables, image, method="encode")
  np.testing.assert_allclose(found[:, :64], one, atol=1e-6)
  np.testing.assert_allclose(found[:, 64:], one[::-1], atol=1e-6)


def test_a_dialogue_goes_on_from_its_state():
  system, variables, image, tokens, source = drawn()
  whole, _ = system.apply(variables, image, tokens, source)
  # Rows of 75 and 77 tokens, then the rest one by one.
  count = np.array([75, 77], np.int32)
  state = system.init_state(2, 90)
  prompt, state = jax.jit(system.apply)(
      variables, image, tokens, source, state=state, count=count
  )
  np.testing.assert_allclose(prompt[:, :75], whole[:, :75], atol=2e-5)
  reply = jax.jit(lambda *args: system.apply(variables, *args, method="reply"))
  for step in range(3):
    at = count + step
    logits, state = reply(tokens[np.arange(2), at][:, None], state)
    np.testing.assert_allclose(
        logits[:, 0], whole[np.arange(2), at], atol=2e-5
    )


def test_only_answers_count():
  system, variables, image, tokens, source = drawn()
  weight = np.zeros((2, 80), np.float32)
  weight[0, 70:74], weight[1, 78:] = 1, 1
  batch = dict(image=image, tokens=tokens, source=source, weight=weight)
  context = Context(jnp.int32(0), jax.random.key(0), None)
  answer = jax.jit(lambda *args: llava.answer(system, *args, context))
  terms, mutables = answer(variables, batch)
  logits, _ = jax.jit(system.apply)(variables, image, tokens, source)
  log_probs = jax.nn.log_softmax(logits[:, :-1])
  chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
  (name,) = [name for name in terms if name != "accuracy"]
  assert float(terms[name].weight) == 6 and mutables == {}
  assert float(terms[name].total) == pytest.approx(
      float(-(chosen * weight[:, 1:]).sum()), rel=1e-5
  )


def test_configs_that_are_refused():
  hf = pretrained.from_pretrained(GOLDEN / "llava_plain").config
  read = lambda **changes: llava.LAYOUT.system(hf | changes, [])
  with pytest.raises(ValueError, match="one layer of 3"):
    read(vision_feature_layer=[-2, -3])
  with pytest.raises(ValueError, match="one layer of 3"):
    read(vision_feature_layer=-5)
  with pytest.raises(ValueError, match="vision_feature_select_strategy"):
    read(vision_feature_select_strategy="cls")
  system = read()
  with pytest.raises(ValueError, match="two layers"):
    llava.LAYOUT.config(system.clone(hidden=None))
