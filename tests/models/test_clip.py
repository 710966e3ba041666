"""CLIP: published sizes, initialisation, pooling, temperature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config
from mmjax.models import clip
from mmjax.nn import partitioning
from mmjax.objectives.term import Context
from mmjax.train import optim

PARAMETERS = {
    "tiny": 644_801,
    "tiny64": 650_945,
    "b32": 151_277_313,
    "b16": 149_620_737,
    "l14": 427_616_513,
    "l14_336": 427_944_193,
}
RNG = np.random.default_rng(0)


def build(size):
  return config.build(dict(type="mmjax.models.clip:CLIP", **size), "system")


def variables(system, image, tokens):
  init = lambda *x: partitioning.unbox(system.init(jax.random.key(0), *x))
  return jax.jit(init)(image, tokens)


@pytest.mark.parametrize("size", clip.SIZES)
def test_published_sizes(size):
  system = build(clip.SIZES[size])
  shapes = jax.eval_shape(
      lambda *x: variables(system, *x),
      jax.ShapeDtypeStruct((1, *system.vision.image, 3), jnp.float32),
      jax.ShapeDtypeStruct((1, system.text.length), jnp.int32),
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert count == PARAMETERS[size]


@pytest.fixture(scope="module")
def tiny():
  system = build(clip.SIZES["tiny"])
  image = jnp.asarray(RNG.normal(size=(4, 32, 32, 3)), jnp.float32)
  tokens = jnp.asarray(RNG.integers(1, 1000, (4, 16)), jnp.int32)
  return system, variables(system, image, tokens), image, tokens


def test_rows_are_unit_and_the_temperature_starts_at_its_value(tiny):
  system, found, image, tokens = tiny
  output = system.apply(found, image, tokens)
  for rows in (output.image, output.text):
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
  assert float(output.scale) == pytest.approx(1 / 0.07, rel=1e-5)


def test_initialisation(tiny):
  _, found, _, _ = tiny
  text = found["params"]["text"]
  width, depth = 64, 2
  blocks = text["blocks"]
  expected = {
      "embed/embedding": (text["embed"]["embedding"], 0.02),
      "position": (text["position"]["table"], 0.01),
      "query": (blocks["attention"]["query"]["kernel"], width**-0.5),
      "out": (
          blocks["attention"]["out"]["kernel"], (width * 2 * depth) ** -0.5
      ),
      "up": (blocks["mlp"]["up"]["kernel"], (2 * width) ** -0.5),
      "down": (blocks["mlp"]["down"]["kernel"], (width * 2 * depth) ** -0.5),
      "projection": (text["projection"]["kernel"], width**-0.5),
  }
  for name, (leaf, std) in expected.items():
    assert np.std(leaf) == pytest.approx(std, rel=0.1), name


def test_text_is_causal_and_read_at_its_end(tiny):
  system, found, _, _ = tiny
  tokens = np.array(RNG.integers(1, 900, (1, 16)), np.int32)
  tokens[0, 9] = 1023  # The end of text is the highest id.
  encode = lambda t: system.apply(found, jnp.asarray(t), method="encode_text")
  features = encode(tokens)
  np.testing.assert_array_equal(features.pooled[0], features.tokens[0, 9])
  changed = tokens.copy()
  changed[0, 10:] = 7
  np.testing.assert_allclose(
      encode(changed).embed, features.embed, atol=1e-5
  )
  changed[0, 8] += 1
  assert not np.allclose(encode(changed).embed, features.embed, atol=1e-3)


def test_an_end_id_is_read_at_its_first_occurrence(tiny):
  system, found, _, tokens = tiny
  tokens = tokens.at[:, 3].set(5).at[:, 7].set(5)
  text = system.text.clone(eot=5)
  features = text.apply({"params": found["params"]["text"]}, tokens)
  first = np.asarray(tokens == 5).argmax(axis=1)
  np.testing.assert_array_equal(
      features.pooled, features.tokens[jnp.arange(4), first]
  )


def test_the_objective_starts_near_chance(tiny):
  system, found, image, tokens = tiny
  batch = {"image": image, "tokens": tokens}
  context = Context(jnp.int32(0), jax.random.key(0), None)
  terms, mutables = clip.contrast(system, found, batch, context)
  loss = terms["contrastive"].total / terms["contrastive"].weight
  assert mutables == {} and 0.5 < float(loss) < 5.0


def test_the_temperature_stays_below_its_bound_and_can_return():
  rule = optim.adamw(0.1, maximum=clip.MAX_LOGIT_SCALE)
  params = {"logit_scale": jnp.float32(clip.MAX_LOGIT_SCALE - 0.05)}
  state = rule.init(params)
  seen = []
  for gradient in [-1.0] * 3 + [4.0] * 12:
    updates, state = rule.update(
        {"logit_scale": jnp.float32(gradient)}, state, params
    )
    params = jax.tree.map(jnp.add, params, updates)
    seen.append(float(params["logit_scale"]))
  assert max(seen) <= clip.MAX_LOGIT_SCALE + 1e-6
  assert seen[2] == pytest.approx(clip.MAX_LOGIT_SCALE)
  assert seen[-1] < clip.MAX_LOGIT_SCALE - 0.1


@pytest.mark.slow
def test_chunks_change_memory_and_not_the_gradient(tiny):
  system, found, image, tokens = tiny
  image = jnp.tile(image, (4, 1, 1, 1)) + RNG.normal(size=(16, 1, 1, 1))
  batch = {
      "image": image.astype(jnp.float32), "tokens": jnp.tile(tokens, (4, 1))
  }
  context = Context(jnp.int32(0), jax.random.key(0), None)

  def loss(params, chunks):
    terms, _ = clip.contrast(system, {"params": params}, batch, context, chunks)
    return terms["contrastive"].total / terms["contrastive"].weight

  step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  whole, parts = (step.lower(found["params"], n).compile() for n in (1, 8))
  value, grads = whole(found["params"])
  value_parts, grads_parts = parts(found["params"])
  assert float(value) == pytest.approx(float(value_parts), rel=1e-6)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
          a, b, atol=2e-6 + 1e-4 * np.abs(b).max()
      ),
      grads_parts,
      grads,
  )
  memory = [f.memory_analysis().temp_size_in_bytes for f in (whole, parts)]
  assert memory[1] < 0.5 * memory[0]
