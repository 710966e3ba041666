"""SigLIP 2's recipe: what each loss sees, when it acts, what is left of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config, pretrained
from mmjax.models import siglip, siglip2_training
from mmjax.nn import partitioning
from mmjax.objectives.term import Context

RNG = np.random.default_rng(0)
OPTIONS = dict(begin=10, side=16, views_per_image=2)


@pytest.fixture(scope="module")
def tiny():
  size = siglip2_training.SIZES["tiny"]
  system = config.build(
      dict(type="mmjax.models.siglip2_training:SigLIP2", **size), "system"
  )
  image = jnp.asarray(RNG.uniform(-1, 1, (8, 32, 32, 3)), jnp.float32)
  tokens = RNG.integers(1, 1000, (8, 16)).astype(np.int32)
  tokens[:, 11:] = 0
  init = jax.jit(
      lambda *x: partitioning.unbox(system.init(jax.random.key(0), *x))
  )
  return system, init(image, tokens), image, jnp.asarray(tokens)


@pytest.fixture(scope="module")
def losses(tiny):
  """`(params, teacher, step, chunks) -> ratios, mutables`, compiled once."""
  system, found, image, tokens = tiny

  @functools.partial(jax.jit, static_argnames=("chunks", "caption_chunks"))
  def run(params, teacher, step, **chunks):
    context = Context(step, jax.random.key(1), teacher)
    terms, mutables = siglip2_training.train(
        system,
        found | {"params": params},
        {"image": image, "tokens": tokens},
        context,
        **OPTIONS,
        **chunks,
    )
    return {k: t.total / t.weight for k, t in terms.items()}, mutables

  return run


def test_there_is_a_teacher_from_its_step_on(tiny, losses):
  _, found, _, _ = tiny
  params = found["params"]
  before, centres_before = losses(params, params, 9)
  after, centres = losses(params, params, 10)
  assert before["local"] == before["hidden"] == 0
  # Without a choice yet, all 256 prototypes are nearly alike to the student.
  for name in ("local", "hidden"):
    assert float(after[name]) == pytest.approx(np.log(256), rel=0.2)
  for name in ("sigmoid", "caption"):
    np.testing.assert_allclose(before[name], after[name], rtol=1e-6)
  assert float(before["caption"]) == pytest.approx(np.log(1024), rel=0.2)
  for name, old in centres_before["centres"].items():
    np.testing.assert_array_equal(old, np.zeros(256))
    assert np.abs(centres["centres"][name]).max() > 0


def test_the_centre_is_a_running_mean_of_the_teachers_logits(tiny, losses):
  system, found, image, _ = tiny
  teacher = jax.tree.map(lambda x: 1.1 * x, found["params"])
  _, mutables = losses(found["params"], teacher, 10)
  run = lambda x, method: system.apply(
      found | {"params": teacher}, x, method=method
  )
  embed = jax.jit(lambda x: run(x, "encode_image").embed)(image)
  expected = 0.1 * run(embed, "project_image").mean(axis=0)
  np.testing.assert_allclose(
      mutables["centres"]["image"], expected, atol=1e-6
  )


@pytest.mark.slow
def test_chunks_change_neither_loss_nor_gradient(tiny, losses):
  """Chance belongs to the rows, not to the chunks."""
  _, found, _, _ = tiny
  params = found["params"]

  def total(params, **chunks):
    return sum(losses(params, found["params"], 10, **chunks)[0].values())

  whole = jax.value_and_grad(total)(params)
  parts = jax.value_and_grad(
      functools.partial(total, chunks=2, caption_chunks=4)
  )(params)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
          a, b, rtol=1e-4, atol=2e-6 + 1e-4 * np.abs(b).max()
      ),
      parts,
      whole,
  )


@pytest.mark.slow
def test_only_the_student_learns(tiny, losses):
  _, found, _, _ = tiny
  params = found["params"]
  value = lambda params, teacher: (
      lambda terms: terms["local"] + terms["hidden"]
  )(losses(params, teacher, 10)[0])
  student, teacher = jax.grad(value, (0, 1))(params, params)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(teacher))
  for part in ("vision", "image_projector", "patch_projector"):
    for path, leaf in jax.tree.leaves_with_path(student[part]):
      assert np.any(leaf), (part, jax.tree_util.keystr(path))
  assert np.any(student["hidden_token"])
  for part in ("text", "decoder", "vocabulary"):
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(student[part]))


def test_a_caption_is_read_from_before_and_from_the_image(tiny):
  system, found, image, tokens = tiny
  decode = jax.jit(
      lambda tokens, parallel, image: system.apply(
          found,
          tokens,
          parallel,
          system.apply(found, image, method="encode_image").tokens,
          method="decode",
      )
  )
  parallel = jnp.arange(8) < 4
  base = decode(tokens, parallel, image)
  moved = np.abs(decode(tokens.at[:, 5].add(1), parallel, image) - base)
  moved = moved.max(axis=2)
  np.testing.assert_array_equal(moved[:4], 0)  # These see no word.
  assert (moved[4:, :6] < 1e-5).all() and (moved[4:, 6:] > 1e-5).all()
  other = decode(tokens, parallel, image[::-1])
  assert (np.abs(other - base).max(axis=2) > 1e-4).all()


def test_what_is_deployed_is_siglip(tiny, tmp_path):
  system, found, image, tokens = tiny
  towers, variables = siglip2_training.deployed(system, found)
  pretrained.save_pretrained(tmp_path / "out", towers, variables)
  again = pretrained.from_pretrained(tmp_path / "out")
  assert isinstance(again.system, siglip.SigLIP)
  run = lambda system: jax.jit(system.apply)
  expected = run(system)(found, image, tokens)
  for a, b in zip(run(again.system)(again.variables, image, tokens), expected):
    np.testing.assert_allclose(a, b, atol=1e-6)
