"""Quantizers against numpy: gradients, statistics, learning, sharding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.nn import quantize

Q, K, D = 3, 8, 5


def draw(seed, *shape):
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape).astype(np.float32)


def test_nearest_keeps_the_shape_of_a_batch():
  x, codebook = draw(0, 2, 3, 4, D), draw(1, K, D)
  expected = np.square(x[..., None, :] - codebook).sum(axis=-1).argmin(axis=-1)
  np.testing.assert_array_equal(quantize.nearest(x, codebook), expected)
  cosine = (x @ codebook.T / np.linalg.norm(codebook, axis=1)).argmax(axis=-1)
  assert (cosine != expected).any()
  np.testing.assert_array_equal(
      quantize.nearest(x, codebook, "cosine"), cosine
  )


def test_codes_stand_for_what_was_quantised():
  x, codebooks = draw(2, 4, 6, D), draw(3, Q, K, D)
  active = np.array([3, 0, 2, 1], np.int32)
  codes, quantized = quantize.residual(x, codebooks, active)
  assert codes.shape == (4, 6, Q)
  used = np.arange(Q) < active[:, None, None]
  np.testing.assert_array_equal(codes >= 0, np.broadcast_to(used, codes.shape))
  np.testing.assert_allclose(
      quantize.decode(codes, codebooks), quantized, rtol=1e-6
  )
  np.testing.assert_array_equal(quantized[1], 0)
  # Without a number all levels are used.
  full, _ = quantize.residual(x, codebooks)
  assert full.min() >= 0
  np.testing.assert_array_equal(full[0], codes[0])


def test_decoding_differentiates_the_rows_that_it_read():
  codebooks = draw(4, Q, K, D)
  codes = jnp.array([[1, 2, -1], [1, 0, 7]])
  grads = jax.grad(lambda c: quantize.decode(codes, c).sum())(codebooks)
  hits = np.zeros((Q, K))
  np.add.at(hits, ([0, 0, 1, 1, 2], [1, 1, 2, 0, 7]), 1)
  np.testing.assert_array_equal(grads, np.repeat(hits[..., None], D, axis=-1))


def test_straight_through_is_exact_and_passes_gradients_to_its_input():
  x, quantized = draw(5, 4, D), draw(6, 4, D) * 1e6
  np.testing.assert_array_equal(
      quantize.straight_through(x, quantized), quantized
  )
  cotangent = draw(7, 4, D)
  grads = jax.grad(
      lambda x, q: (quantize.straight_through(x, q) * cotangent).sum(), (0, 1)
  )(x, quantized)
  np.testing.assert_array_equal(grads[0], cotangent)
  np.testing.assert_array_equal(grads[1], 0)


def test_squared_error_moves_its_first_argument_only():
  x, target = draw(8, 4, D), draw(9, 4, D)
  error = quantize.squared_error(x, target)
  np.testing.assert_allclose(error, np.square(x - target).sum(-1), rtol=1e-6)
  grads = jax.grad(
      lambda x, t: quantize.squared_error(x, t).sum(), (0, 1)
  )(x, target)
  np.testing.assert_allclose(grads[0], 2 * (x - target), rtol=1e-6)
  np.testing.assert_array_equal(grads[1], 0)


def test_commitment_reaches_the_input_from_every_level():
  x, codebooks = draw(10, 4, 6, D), draw(11, Q, K, D)
  active = np.array([3, 2, 1, 0], np.int32)
  codes, _ = quantize.residual(x, codebooks, active)
  rests = np.stack(
      [
          x - quantize.decode(codes[..., : q + 1], codebooks[: q + 1])
          for q in range(Q)
      ],
      axis=-2,
  ) * (np.asarray(codes) >= 0)[..., None]
  np.testing.assert_allclose(
      quantize.commitment(x, codebooks, codes),
      np.square(rests).sum(axis=-1),
      rtol=1e-5,
      atol=1e-6,
  )
  weights = draw(12, 4, 6, Q)
  grads = jax.grad(
      lambda x, c: (quantize.commitment(x, c, codes) * weights).sum(), (0, 1)
  )(x, codebooks)
  np.testing.assert_allclose(
      grads[0],
      (2 * rests * weights[..., None]).sum(axis=-2),
      rtol=1e-5,
      atol=1e-5,
  )
  np.testing.assert_array_equal(grads[1], 0)


def test_a_share_of_the_examples_uses_fewer_levels():
  active = np.asarray(
      quantize.sample_active(jax.random.key(0), 4000, 4, share=0.5)
  )
  np.testing.assert_array_equal(active[2000:], 4)
  counts = np.bincount(active[:2000], minlength=5)
  assert counts[0] == 0 and len(counts) == 5
  np.testing.assert_allclose(counts[1:], 500, rtol=0.2)


def test_statistics_are_those_of_every_level():
  x, codebooks = draw(13, 2, 50, D), draw(14, Q, K, D)
  active = np.array([3, 1], np.int32)
  codes, _ = quantize.residual(x, codebooks, active)
  weight = np.abs(draw(15, 2, 50))
  found = jax.jit(quantize.statistics)(
      jax.random.key(0), x, codebooks, codes, weight
  )
  rest = x.reshape(-1, D).astype(np.float64)
  flat = np.asarray(codes).reshape(-1, Q)
  for q in range(Q):
    one_hot = (flat[:, q, None] == np.arange(K)) * weight.reshape(-1, 1)
    np.testing.assert_allclose(found.counts[q], one_hot.sum(0), rtol=1e-5)
    np.testing.assert_allclose(found.sums[q], one_hot.T @ rest, atol=1e-4)
    # The samples are rests of rows that use the level.
    given = rest[flat[:, q] >= 0]
    away = np.abs(found.samples[q][:, None] - given).max(axis=-1).min(axis=1)
    assert away.max() < 1e-5
    rest -= np.where(flat[:, q, None] < 0, 0, codebooks[q][flat[:, q]])


def test_samples_are_different_rows_of_positive_weight():
  weight = np.ones(1000, np.float32)
  weight[::2] = weight[-300:] = 0
  rows = np.asarray(quantize._sample(jax.random.key(0), weight, 350))
  assert (weight[rows] > 0).all()
  assert len(set(rows)) == len(rows) == weight.sum()
  # In proportion to the weights.
  weight = np.arange(4, dtype=np.float32)
  rows = np.asarray(quantize._sample(jax.random.key(1), weight, 600))
  np.testing.assert_allclose(np.bincount(rows), weight * 100, atol=1)


def _batch(seed, used=Q):
  """Statistics of a batch in which the first `used` levels were used."""
  counts = np.abs(draw(seed, Q, K)) * 10 + 1
  counts[used:] = 0
  sums = draw(seed + 1, Q, K, D) * counts[..., None]
  return quantize.Statistics(counts, sums, draw(seed + 2, Q, K, D))


def _books(seed):
  counts = np.abs(draw(seed, Q, K)) * 10 + 1
  sums = draw(seed + 1, Q, K, D)
  return quantize.Codebooks(sums / counts[..., None], counts, sums)


def test_learning_is_a_moving_average():
  books, batch = _books(20), _batch(30)
  new = quantize.learn(books, batch, decay=0.9, dead_below=0.0)
  counts = 0.9 * books.counts + 0.1 * batch.counts
  sums = 0.9 * books.sums + 0.1 * batch.sums
  np.testing.assert_allclose(new.counts, counts, rtol=1e-6)
  np.testing.assert_allclose(new.sums, sums, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
      new.rows, sums / counts[..., None], rtol=1e-5, atol=1e-6
  )


def test_dead_codes_become_samples_with_the_mean_count():
  books, batch = _books(40), _batch(50)
  books.counts[1, 4] = books.counts[2, 0] = 0.01
  batch.counts[1, 4] = batch.counts[2, 0] = 0
  new = quantize.learn(books, batch, decay=0.9, dead_below=0.1)
  moved = 0.9 * books.counts + 0.1 * batch.counts
  mean = moved.mean(axis=1)
  dead = moved < 0.1 * mean[:, None]
  assert dead.sum() == 2
  np.testing.assert_allclose(new.rows[dead], batch.samples[dead], rtol=1e-5)
  np.testing.assert_allclose(new.counts[1, 4], mean[1], rtol=1e-6)
  # Their next average weighs the sample as much as any other code's mean.
  np.testing.assert_allclose(
      new.sums[dead],
      batch.samples[dead] * new.counts[dead][:, None],
      rtol=1e-5,
  )
  np.testing.assert_allclose(new.counts[~dead], moved[~dead], rtol=1e-6)


def test_levels_start_one_batch_after_another():
  zeros = jax.tree.map(np.zeros_like, _books(0))
  books = zeros
  for step in range(Q):
    batch = _batch(60 + step)
    books = quantize.learn(books, batch, decay=0.9, dead_below=0.1)
    np.testing.assert_allclose(
        books.rows[step], batch.samples[step], rtol=1e-5
    )
    np.testing.assert_allclose(
        books.counts[step], batch.counts[step].mean(), rtol=1e-5
    )
    assert not np.any(books.rows[step + 1 :])
    assert not np.any(books.counts[step + 1 :])


def test_a_level_without_vectors_stays_as_it_is():
  books = _books(70)
  new = quantize.learn(books, _batch(80, used=1), decay=0.9, dead_below=0.1)
  jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a[1:], b[1:]), new, books
  )
  assert np.all(np.asarray(new.counts[0]) != books.counts[0])


def _learner(**changes):
  module = quantize.ResidualQuantizer(
      levels=2, codes=K, features=D, decay=0.8, **changes
  )
  variables = module.init(jax.random.key(0), jnp.zeros((1, 1, D)))

  def step(variables, x, rng, active=None, weight=None):
    return module.apply(
        variables, x, active, weight,
        mutable=[quantize.COLLECTION], rngs={quantize.COLLECTION: rng},
    )

  return module, variables, jax.jit(step)


def test_the_module_learns_the_clusters_of_its_input():
  rng = np.random.default_rng(90)
  coarse = 10 * rng.normal(size=(K, D))
  fine = rng.normal(size=(K, D))

  def sample():
    a, b = rng.integers(0, K, (2, 16, 8))
    return (coarse[a] + fine[b]).astype(np.float32)

  batches = [sample() for _ in range(60)]
  x = sample()

  def learnt(dead_below):
    module, variables, step = _learner(dead_below=dead_below)
    for i, batch in enumerate(batches):
      out, variables = step(variables, batch, jax.random.key(i))
      # Zeros quantise to zeros, until the first batch has been seen.
      assert np.any(out.quantized) == (i > 0)
    return module, variables, module.apply(variables, x)

  used = lambda out: [len(np.unique(out.codes[..., q])) for q in range(2)]
  error = lambda quantized: np.square(quantized - x).mean()
  _, _, without = learnt(0.0)
  module, variables, out = learnt(0.1)
  assert used(out) == [K, K] != used(without)
  assert error(out.quantized) < 0.6 * error(without.quantized)
  assert error(out.quantized) < 0.005 * np.square(x).mean()
  # What it decodes is what it quantised; fewer levels give less.
  decode = lambda codes: module.apply(variables, codes, method="decode")
  np.testing.assert_allclose(decode(out.codes), out.quantized, rtol=1e-6)
  part = decode(out.codes[..., :1])
  assert error(part) > error(out.quantized)
  for q, quantized in enumerate((part, out.quantized)):
    np.testing.assert_allclose(
        out.commitment[..., q],
        np.square(quantized - x).sum(axis=-1),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_module_learns_only_where_asked():
  module, variables, step = _learner()
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(variables))
  x = draw(91, 4, 6, D)
  out, variables = step(variables, x, jax.random.key(0))
  assert jax.tree.structure(variables) == jax.tree.structure(
      module.init(jax.random.key(0), x)
  )
  again = module.apply(variables, x)
  assert np.any(again.quantized) and not np.any(out.quantized)
  with pytest.raises(Exception, match="codebook"):
    module.apply(variables, x, mutable=[quantize.COLLECTION])


def test_padding_teaches_nothing():
  _, variables, step = _learner()
  x = draw(92, 4, 6, D)
  weight = np.ones((4, 6), np.float32)
  weight[:, 4:] = 0
  spoilt = x.copy()
  spoilt[:, 4:] = 1e3
  for i in range(3):
    rng = jax.random.key(i)
    _, clean = step(variables, x, rng, None, weight)
    _, variables = step(variables, spoilt, rng, None, weight)
    jax.tree.map(np.testing.assert_array_equal, clean, variables)
  assert np.any(variables[quantize.COLLECTION]["rows"][1])


def test_gradients_pass_the_module():
  module, variables, step = _learner()
  x = draw(93, 4, 6, D)
  for i in range(2):
    _, variables = step(variables, x, jax.random.key(i))

  def loss(x):
    out = module.apply(variables, x)
    return jnp.square(out.quantized).sum(), out.quantized

  grads, quantized = jax.grad(loss, has_aux=True)(x)
  np.testing.assert_allclose(grads, 2 * quantized, rtol=1e-6)


def test_statistics_are_exact_on_eight_devices():
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
  module, one, step = _learner()
  many = jax.device_put(one, sharding.replicated(mesh))
  for i in range(4):
    x = draw(100 + i, 16, 100, D)
    active = np.arange(16, dtype=np.int32) % 3
    rng = jax.random.key(i)
    expected, one = step(one, x, rng, active)
    with jax.set_mesh(mesh):
      placed = jax.device_put((x, active), sharding.batch_sharding(mesh))
      found, many = step(many, placed[0], rng, placed[1])
    np.testing.assert_array_equal(found.codes, expected.codes)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        many, one,
    )
  # Every device looks its own rows up; nobody gathers vectors.
  with jax.set_mesh(mesh):
    text = step.lower(many, placed[0], rng, placed[1]).compile().as_text()
  assert " all-reduce(" in text
  gathered = re.findall(r"= (\S+) all-gather\(", text)
  assert not [shape for shape in gathered if f",{D}]" in shape]
  assert np.any(one[quantize.COLLECTION]["counts"])
