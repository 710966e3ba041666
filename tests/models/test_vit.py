"""ViT: published sizes, initialisation, pooling, resolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models import vit
from mmjax.nn import partitioning
from mmjax.objectives.term import Context

# Table 1 of the paper rounds these; B/16 is the count of the official code.
PARAMETERS = {
    "tiny": 468_778,
    "ti16": 5_717_416,
    "s32": 22_878_952,
    "s16": 22_050_664,
    "b32": 88_224_232,
    "b16": 86_567_656,
    "b8": 86_576_872,
    "l32": 306_535_400,
    "l16": 304_326_632,
    "h14": 632_045_800,
}


def variables(system, image):
  init = lambda x: partitioning.unbox(system.init(jax.random.key(0), x))
  return jax.jit(init)(image)


@pytest.mark.parametrize("size", vit.SIZES)
def test_published_sizes(size):
  system = vit.ViT(**vit.SIZES[size])
  image = jax.ShapeDtypeStruct((1, *system.image, 3), jnp.float32)
  shapes = jax.eval_shape(lambda x: variables(system, x), image)
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert count == PARAMETERS[size]


def small(**changes):
  fields = dict(
      image=(16, 24), patch=8, width=12, depth=2, heads=2, mlp=24, classes=5
  )
  return vit.ViT(**(fields | changes))


def test_the_first_loss_is_that_of_a_guess():
  """The head starts at zero (paper, appendix B.1.1)."""
  system = small()
  image = np.random.default_rng(0).normal(size=(4, 16, 24, 3))
  batch = {"image": jnp.asarray(image, jnp.float32), "label": jnp.arange(4)}
  context = Context(jnp.int32(0), jax.random.key(0), None)
  terms, _ = vit.classify(
      system, variables(system, batch["image"]), batch, context
  )
  loss = terms["cross_entropy"].total / terms["cross_entropy"].weight
  assert float(loss) == pytest.approx(np.log(5), rel=1e-6)


def test_initialisation():
  system = small(width=64, mlp=128)
  params = variables(system, jnp.zeros((1, 16, 24, 3)))["params"]
  encoder = params["encoder"]
  assert not np.any(encoder["cls"]) and not np.any(params["head"]["kernel"])
  assert np.std(encoder["position"]["table"]) == pytest.approx(0.02, rel=0.1)
  blocks = encoder["blocks"]
  query = blocks["attention"]["query"]["kernel"]
  assert query.shape == (2, 64, 2, 32)
  assert np.abs(query).max() <= np.sqrt(6 / 128)
  assert 0 < np.abs(blocks["mlp"]["up"]["bias"]).max() < 1e-5


def test_pooling_and_the_layer_before_the_head():
  image = jnp.asarray(
      np.random.default_rng(0).normal(size=(2, 16, 24, 3)), jnp.float32
  )
  system = small(pool="gap", pre_logits=7, classes=0)
  found = variables(system, image)
  output = system.apply(found, image)
  assert output.logits is None and output.tokens.shape == (2, 7, 12)
  layer = found["params"]["pre_logits"]
  expected = np.tanh(
      np.asarray(output.tokens)[:, 1:].mean(axis=1) @ layer["kernel"]
      + layer["bias"]
  )
  np.testing.assert_allclose(output.pooled, expected, atol=1e-5)
  plain = small(classes=0)
  output = plain.apply(variables(plain, image), image)
  np.testing.assert_array_equal(output.pooled, output.tokens[:, 0])
  with pytest.raises(ValueError, match="pool 'map' is not one of"):
    variables(small(pool="map"), image)


def test_another_resolution_resamples_the_positions():
  system = small()
  found = variables(system, jnp.zeros((1, 16, 24, 3)))
  output = system.apply(found, jnp.zeros((1, 32, 32, 3)))
  assert output.tokens.shape == (1, 17, 12)
  with pytest.raises(AssertionError):
    system.apply(found, jnp.zeros((1, 16, 24, 1)))
