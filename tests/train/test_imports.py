"""Parameters of other runs and of public checkpoints."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from mmjax import pretrained
from mmjax.models import vit
from mmjax.nn import position
from mmjax.train import imports
from mmjax.train.state import make_init
from tests.train import toys
from tests.train.test_checkpoint import fill, mesh, save

# Sides and width of the small ViTs.
PATCH, WIDTH = 4, 8
GOLDEN = pathlib.Path(__file__).parent.parent / "golden"



def vit_state(side, classes=3, **kwargs):
  """A small ViT, a state of it, and its abstract parameters."""
  system = vit.ViT(
      image=(side, side),
      patch=PATCH,
      width=WIDTH,
      depth=1,
      heads=2,
      mlp=8,
      classes=classes,
      **kwargs,
  )
  stage = toys.stage(
      "contrastive",
      system=system,
      objective=vit.classify,
      weights={"cross_entropy": 1.0},
  )
  batch = {
      "image": np.zeros((8, side, side, 3), np.float32),
      "label": np.zeros(8, np.int32),
  }
  _, abstract = make_init(stage, batch, mesh(data=2))
  return system, fill(abstract), abstract.live


def test_a_run_takes_parameters_and_resamples_positions(tmp_path):
  _, state, _ = vit_state(8)
  save(tmp_path, state)
  system, _, abstract = vit_state(16, classes=5)
  found = imports.from_checkpoint(
      system, abstract, path=str(tmp_path), skip="head/.*"
  )
  assert set(found) == {p for p in abstract if not p.startswith("head/")}
  table = "encoder/position/table"
  old = np.asarray(state.live[table])
  np.testing.assert_array_equal(found[table][0], old[0])
  matrix = position.resampling_matrix(2, 4, "zoom")
  grid = old[1:].reshape(2, 2, WIDTH).astype(np.float64)
  expected = np.einsum("ih,hwd,jw->ijd", matrix, grid, matrix)
  np.testing.assert_allclose(
      found[table][1:], expected.reshape(16, WIDTH), atol=1e-4
  )
  for path in set(found) - {table}:
    np.testing.assert_array_equal(found[path], state.live[path])
    assert found[path].sharding == abstract[path].sharding


def test_a_run_lists_every_misfit(tmp_path):
  _, state, _ = vit_state(8, pre_logits=6)
  save(tmp_path, state)
  system, _, abstract = vit_state(8, classes=5)
  abstract = abstract | {"extra/bias": abstract["head/bias"]}
  with pytest.raises(ValueError) as error:
    imports.from_checkpoint(system, abstract, path=str(tmp_path))
  text = str(error.value)
  assert "extra/bias: missing" in text
  assert "head/bias: (3,) there, (5,) here" in text
  assert "pre_logits/kernel: no use for it here" in text


def test_a_run_needs_a_run_and_a_skip_that_matches(tmp_path):
  system, state, abstract = vit_state(8)
  take = functools.partial(imports.from_checkpoint, system, abstract)
  with pytest.raises(FileNotFoundError, match="expected a local directory"):
    take(path=str(tmp_path))
  save(tmp_path, state)
  with pytest.raises(ValueError, match="matches no parameter"):
    take(path=str(tmp_path), skip="haed/.*")
  with pytest.raises(FileNotFoundError, match=r"step 9, found steps \[3\]"):
    take(path=str(tmp_path), step=9)


def golden(name, **changes):
  """The system of a golden directory, and its abstract parameters."""
  system, layout, _, _ = pretrained.open_directory(GOLDEN / name)
  system = system.clone(**changes)
  shapes, _ = pretrained.abstract_params(layout, system)
  place = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec())
  return system, {
      path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
      for path, leaf in shapes.items()
  }


def test_a_public_directory_gives_what_from_pretrained_gives():
  system, abstract = golden("vit_classifier")
  path = str(GOLDEN / "vit_classifier")
  found = imports.from_checkpoint(system, abstract, path=path)
  params = pretrained.from_pretrained(path).variables["params"]
  expected = imports.checkpoint.flat(params)
  assert set(found) == set(expected)
  for path in found:
    np.testing.assert_array_equal(found[path], expected[path])


def test_a_public_directory_of_another_network_is_refused():
  system, abstract = golden("vit_classifier", activation="relu", epsilon=1e-3)
  with pytest.raises(ValueError) as error:
    imports.from_checkpoint(
        system, abstract, path=str(GOLDEN / "vit_classifier")
    )
  text = str(error.value)
  assert "config.system.activation: 'gelu' there, 'relu' here" in text
  assert "config.system.epsilon" in text


def test_a_head_may_be_left_out():
  system, abstract = golden("vit_classifier", classes=3)
  take = functools.partial(
      imports.from_checkpoint,
      system,
      abstract,
      path=str(GOLDEN / "vit_classifier"),
  )
  with pytest.raises(ValueError, match="head/kernel: .* there, .* here"):
    take()
  found = take(skip="head/.*")
  assert set(found) == {p for p in abstract if not p.startswith("head/")}


def test_a_path_that_is_nothing_says_what_it_may_be(tmp_path):
  system, abstract = golden("vit_classifier")
  with pytest.raises(FileNotFoundError, match="run directory, a transformers"):
    imports.from_checkpoint(system, abstract, path=str(tmp_path / "absent"))
