"""The resampler against float64 arithmetic; times between those learned."""

import jax
import numpy as np
import pytest

from mmjax.nn import partitioning, perceiver


def build(**changes):
  size = dict(
      latents=3, depth=2, heads=2, head_dim=5, mlp=16, frames=3, media=4
  )
  system = perceiver.Resampler(**size | changes)
  rng = np.random.default_rng(0)
  features = rng.normal(size=(2, 2, 3, 4, 8)).astype(np.float32)
  params = partitioning.unbox(system.init(jax.random.key(0), features))
  noise = lambda x: np.float32(x + 0.3 * rng.normal(size=x.shape))
  return system, jax.tree.map(noise, params), features


def layer_norm(x, p):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def by_hand(params, features, activation):
  """One medium at a time, head by head."""
  p = jax.tree.map(np.float64, params)["params"]
  batch, count, time, _, _ = features.shape
  out = np.zeros((batch, count, *p["latents"].shape))
  for b in range(batch):
    for n in range(count):
      x = np.float64(features[b, n]) + p["frames"][:time, None]
      x = (x + p["media"][n]).reshape(-1, x.shape[-1])
      latents = p["latents"]
      for layer in range(len(p["blocks"]["mlp"]["up"]["kernel"])):
        q = jax.tree.map(lambda a: a[layer], p["blocks"])  # noqa: B023
        y = layer_norm(latents, q["attention_norm"])
        other = np.concatenate([layer_norm(x, q["features_norm"]), y])
        for head in range(q["attention"]["query"]["kernel"].shape[1]):
          project = lambda x, name: (
              x @ q["attention"][name]["kernel"][:, head]  # noqa: B023
          )
          scores = project(y, "query") @ project(other, "key").T
          scores = np.exp(scores / np.sqrt(5))
          seen = scores / scores.sum(-1, keepdims=True)
          latents = latents + seen @ project(other, "value") @ (
              q["attention"]["out"]["kernel"][head]
          )
        y = layer_norm(latents, q["mlp_norm"]) @ q["mlp"]["up"]["kernel"]
        latents = latents + activation(y) @ q["mlp"]["down"]["kernel"]
      out[b, n] = layer_norm(latents, p["norm"])
  return out


def test_is_what_the_paper_says():
  system, params, features = build()
  found = system.apply(params, features)
  expected = by_hand(params, features, lambda x: np.maximum(x, 0) ** 2)
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_times_are_the_first_or_lie_between():
  table = np.array([[0.0], [1.0], [4.0]], np.float32)
  at = lambda count: perceiver._at_times(table, count)[:, 0]
  np.testing.assert_array_equal(at(2), [0, 1])
  np.testing.assert_allclose(at(5), [0, 0.5, 1, 2.5, 4])
  np.testing.assert_array_equal(perceiver._at_times(table[:1], 3), [[0]] * 3)


def test_a_picture_is_a_film_of_one_frame_and_places_end():
  system, params, features = build()
  whole = system.apply(params, features)
  # Each medium by itself, but for its place.
  other = features.copy()
  other[:, 1] = 0
  np.testing.assert_allclose(
      system.apply(params, other)[:, 0], whole[:, 0], atol=1e-6
  )
  with pytest.raises(ValueError, match="5 media: .* places for 4"):
    system.apply(params, np.zeros((1, 5, 1, 4, 8), np.float32))
