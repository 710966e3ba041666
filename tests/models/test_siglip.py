"""SigLIP and NaFlex: sizes, goldens of transformers, what is seen."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config, pretrained
from mmjax.models import siglip, siglip2
from mmjax.nn import partitioning, position
from mmjax.objectives.term import Context
from mmjax.weights import source

GOLDEN = Path(__file__).parents[1] / "golden"
FIXED = ("siglip_square", "siglip_rest", "siglip_two")
FLEX = ("siglip_naflex", "siglip_naflex_wide", "siglip_naflex_loose")
RNG = np.random.default_rng(0)
CONTEXT = Context(jnp.int32(0), jax.random.key(0), None)


def golden(name):
  arrays = np.load(GOLDEN / name / "golden.npz")
  return tuple(
      {key[len(kind) :]: arrays[key] for key in arrays if key.startswith(kind)}
      for kind in ("in.", "out.")
  )


def worst(found, expected):
  return np.abs(found - expected).max() / np.abs(expected).max()


def outputs(system, variables, inputs):
  pictures = {key: value for key, value in inputs.items() if key != "tokens"}
  image = system.apply(variables, **pictures, method="encode_image")
  text = system.apply(variables, inputs["tokens"], method="encode_text")
  pair = system.apply(variables, **inputs)
  found = {
      "image_tokens": image.tokens,
      "image_pooled": image.embed,
      "text_tokens": text.tokens,
      "text_pooled": text.embed,
      "image_embed": pair.image,
      "text_embed": pair.text,
      "logits_per_image": pair.scale * pair.image @ pair.text.T + pair.bias,
  }
  paper = siglip if "image" in inputs else siglip2
  terms, _ = paper.contrast(system, variables, inputs, CONTEXT)
  loss = terms["sigmoid"].total / terms["sigmoid"].weight
  return found | {"loss": loss}


@pytest.mark.parametrize("name", FIXED + FLEX)
def test_outputs_are_those_of_the_reference(name):
  system, variables, found = pretrained.from_pretrained(GOLDEN / name)
  assert found == json.loads((GOLDEN / name / "config.json").read_text())
  inputs, expected = golden(name)
  with jax.default_matmul_precision("highest"):
    found = jax.jit(lambda v, x: outputs(system, v, x))(variables, inputs)
  assert set(found) == set(expected)
  for key, array in expected.items():
    assert found[key].shape == array.shape, key
    assert worst(found[key], array) < 1e-4, key


@pytest.mark.parametrize("name", FIXED + FLEX)
def test_round_trip_keeps_every_bit(name, tmp_path):
  system, variables, found = pretrained.from_pretrained(GOLDEN / name)
  pretrained.save_pretrained(
      tmp_path / "out", system, variables, config=found, dtype=found["dtype"]
  )
  ours, theirs = (
      source.open_source(folder) for folder in (tmp_path / "out", GOLDEN / name)
  )
  assert set(ours.tensors) == set(theirs.tensors)
  for tensor in theirs.tensors:
    np.testing.assert_array_equal(ours.read(tensor), theirs.read(tensor))
  pretrained.save_pretrained(tmp_path / "made", system, variables)
  assert pretrained.from_pretrained(tmp_path / "made").system == system


@pytest.mark.parametrize("changes,message", [
    (dict(patch_size=[4, 2]), "square patches"),
    (dict(num_channels=1), "square patches of 3 channels"),
    (dict(num_patches=35), "num_patches is 35"),
    (dict(hidden_act="mish"), "vision hidden_act 'mish'"),
])
def test_configs_that_are_refused(changes, message):
  hf = json.loads((GOLDEN / "siglip_naflex" / "config.json").read_text())
  hf["vision_config"] |= changes
  with pytest.raises(ValueError, match=message):
    siglip2.LAYOUT.system(hf, [])


def build(size):
  return config.build(
      dict(type="mmjax.models.siglip:SigLIP", **size), "system"
  )


def shapes(system):
  inputs = siglip.LAYOUT.inputs(system)
  init = lambda **x: partitioning.unbox(system.init(jax.random.key(0), **x))
  return jax.eval_shape(init, **inputs)["params"]


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def expected_count(size):
  """Every kernel and bias of the paper's towers, counted by formula."""
  def stack(tower, depth):
    d, m = tower["width"], tower["mlp"]
    return depth * (4 * d * (d + 1) + 2 * d * m + m + d + 4 * d)

  vision, text = size["vision"], size["text"]
  d, p = vision["width"], vision["patch"]
  patches = (vision["image"][0] // p) ** 2
  # Probe, attention, norm and MLP of the head: a block with one norm less.
  head = stack(vision, 1) - 2 * d + d
  image = d * (3 * p * p + 1) + patches * d + stack(vision, vision["depth"])
  image += 2 * d + head
  d = text["width"]
  words = (text["vocab"] + text["length"]) * d + stack(text, text["depth"])
  words += 2 * d + (d + 1) * text["embed"]
  return image, words


@pytest.mark.parametrize("size", siglip.SIZES)
def test_published_sizes(size):
  found = shapes(build(siglip.SIZES[size]))
  image, words = expected_count(siglip.SIZES[size])
  assert count(found["vision"]) == image
  assert count(found["text"]) == words
  assert count(found) == image + words + 2
  if size == "so400m14_384":
    assert image == 428_225_600  # As published.


@pytest.fixture(scope="module")
def tiny():
  system = build(siglip.SIZES["tiny"])
  image = jnp.asarray(RNG.uniform(-1, 1, (4, 32, 32, 3)), jnp.float32)
  tokens = jnp.asarray(RNG.integers(1, 1000, (4, 16)), jnp.int32)
  init = jax.jit(
      lambda *x: partitioning.unbox(system.init(jax.random.key(0), *x))
  )
  return system, init(image, tokens), image, tokens


def test_initialisation(tiny):
  system, found, image, tokens = tiny
  params = found["params"]
  deviations = {
      "words": (params["text"]["embed"]["embedding"], 64**-0.5),
      "text positions": (params["text"]["position"]["table"], 64**-0.5),
      "image positions": (
          params["vision"]["encoder"]["position"]["table"], 96**-0.5
      ),
      "patch": (params["vision"]["encoder"]["patch"]["kernel"], 192**-0.5),
      "probe": (params["vision"]["pool"]["probe"], (2 / 97) ** 0.5),
      "head": (params["text"]["head"]["kernel"], 64**-0.5),
  }
  for name, (leaf, std) in deviations.items():
    assert np.std(leaf) == pytest.approx(std, rel=0.15), name
  pairs = jax.jit(system.apply)(found, image, tokens)
  assert float(pairs.scale) == pytest.approx(10)
  assert float(pairs.bias) == pytest.approx(-10)
  for rows in (pairs.image, pairs.text):
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)


def test_text_is_bidirectional_and_read_at_its_last_position(tiny):
  system, found, _, tokens = tiny
  encode = lambda t: system.apply(found, t, method="encode_text")
  features = encode(tokens)
  head = found["params"]["text"]["head"]
  np.testing.assert_allclose(
      features.tokens[:, -1] @ head["kernel"] + head["bias"],
      features.embed,
      atol=1e-5,
  )
  changed = encode(tokens.at[:, 9].add(1))
  assert np.abs(changed.tokens - features.tokens).min(axis=(0, 2)).max() > 0
  assert np.abs(changed.tokens[:, 0] - features.tokens[:, 0]).max() > 1e-3


def test_pixels_beyond_the_last_patch_are_not_seen(tiny):
  system, found, image, _ = tiny
  encode = lambda x: system.apply(found, x, method="encode_image").embed
  larger = jnp.pad(image, ((0, 0), (0, 5), (0, 7), (0, 0)), constant_values=9.0)
  np.testing.assert_array_equal(encode(larger), encode(image))


def test_hidden_patches_are_not_seen(tiny):
  system, found, image, _ = tiny
  vision, params = system.vision, {"params": found["params"]["vision"]}
  hidden = jnp.zeros((4, 16), bool).at[:, 5].set(True)
  token = jnp.linspace(-1, 1, 96)
  embed = lambda x: vision.apply(params, x, hidden, token).embed
  # Patch 5 of a grid of 4 x 4 is row 1, column 1.
  changed = image.at[:, 8:16, 8:16].set(0.3)
  np.testing.assert_array_equal(embed(changed), embed(image))
  assert worst(vision.apply(params, image).embed, embed(image)) > 1e-3
  assert worst(vision.apply(params, changed, hidden, 2 * token).embed,
               embed(image)) > 1e-3


def test_the_objective_starts_at_the_price_of_its_bias(tiny):
  """With -10 every partner costs about 10 nats, a stranger about none."""
  system, found, image, tokens = tiny
  batch = {"image": image, "tokens": tokens}
  terms, mutables = siglip.contrast(system, found, batch, CONTEXT)
  loss = float(terms["sigmoid"].total / terms["sigmoid"].weight)
  pairs = system.apply(found, image, tokens)
  logits = pairs.scale * pairs.image @ pairs.text.T + pairs.bias
  sign = 2 * np.eye(4) - 1
  expected = np.log1p(np.exp(-sign * np.float64(logits))).sum(axis=1).mean()
  assert mutables == {} and loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_chunks_change_memory_and_not_the_gradient(tiny):
  system, found, image, tokens = tiny
  image = jnp.tile(image, (4, 1, 1, 1)) + RNG.normal(size=(16, 1, 1, 1))
  batch = {
      "image": image.astype(jnp.float32), "tokens": jnp.tile(tokens, (4, 1))
  }

  def loss(params, chunks):
    terms, _ = siglip.contrast(
        system, {"params": params}, batch, CONTEXT, chunks
    )
    return terms["sigmoid"].total / terms["sigmoid"].weight

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


def naflex():
  system, variables, _ = pretrained.from_pretrained(GOLDEN / "siglip_naflex")
  return system, variables, golden("siglip_naflex")[0]


def test_padding_of_patches_is_not_seen():
  system, variables, inputs = naflex()
  encode = jax.jit(
      lambda p, g: system.apply(variables, p, g, method="encode_image")
  )
  patches, grid = inputs["patches"], inputs["grid"]
  base = encode(patches, grid)
  filled = np.arange(patches.shape[1]) < grid.prod(axis=1)[:, None]
  assert not filled.all()
  noisy = np.where(filled[..., None], patches, np.float32(7.0))
  np.testing.assert_allclose(encode(noisy, grid).embed, base.embed, atol=1e-5)
  longer = np.pad(patches, ((0, 0), (0, 11), (0, 0)))
  np.testing.assert_allclose(encode(longer, grid).embed, base.embed, atol=1e-5)


def test_naflex_on_its_own_grid_is_the_tower_of_fixed_size():
  """The same parameters see the same image in both forms."""
  system, variables, _ = naflex()
  flex = system.vision
  shape = {
      name: getattr(flex, name)
      for name in ("patch", "width", "depth", "heads", "mlp")
  }
  fixed = siglip.ImageTower(image=(24, 24), **shape)
  params = variables["params"]["vision"]
  image = RNG.uniform(-1, 1, (2, 24, 24, 3)).astype(np.float32)
  patches = image.reshape(2, 6, 4, 6, 4, 3).swapaxes(2, 3).reshape(2, 36, 48)
  grid = np.full((2, 2), 6, np.int32)
  found = flex.apply({"params": params}, patches, grid)
  encoder = dict(params["encoder"])
  kernel = encoder["patch"]["kernel"].reshape(4, 4, 3, -1)
  encoder["patch"] = dict(encoder["patch"], kernel=kernel)
  expected = fixed.apply({"params": dict(params, encoder=encoder)}, image)
  assert worst(found.tokens, expected.tokens) < 1e-5
  assert worst(found.embed, expected.embed) < 1e-5


@pytest.mark.parametrize("old,new", [(6, 6), (6, 4), (5, 13), (16, 3), (4, 1)])
def test_triangle_weights_are_those_of_an_antialiased_resize(old, new):
  weights = position.triangle_weights(
      jnp.arange(new), jnp.full(new, new), old
  )
  np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-6)
  expected = jax.image.resize(np.eye(old), (new, old), "linear")
  np.testing.assert_allclose(weights, expected, atol=1e-6)
