"""Parameters of other runs and of public checkpoints."""

import functools
import pathlib
import types

import jax
import numpy as np
import pytest

from mmjax import pretrained
from mmjax.models import clip, vit
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


# --- parts -------------------------------------------------------------------


def part_of(tree, prefix):
  """The abstract parameters of a larger system that holds `tree`."""
  return {f"{prefix}{path}": leaf for path, leaf in tree.items()}


def rest_of(tree, prefix):
  return {p[len(prefix) :]: v for p, v in tree.items() if p.startswith(prefix)}


def holder(**parts):
  """A system of named parts; only its fields are looked at."""
  return types.SimpleNamespace(**parts)


def test_a_part_of_a_run_gets_other_names(tmp_path):
  donor, state, _ = vit_state(8)
  save(tmp_path, state)
  encoder = rest_of(vit_state(8)[2], "encoder/")
  abstract = part_of(encoder, "vision/") | {"head/bias": encoder["cls"]}
  found = imports.from_part(
      holder(vision=donor),
      abstract,
      path=str(tmp_path),
      source="encoder/",
      target="vision/",
  )
  assert set(found) == set(part_of(encoder, "vision/"))
  for path in encoder:
    np.testing.assert_array_equal(
        found[f"vision/{path}"], state.live[f"encoder/{path}"]
    )
    assert found[f"vision/{path}"].sharding == encoder[path].sharding


def test_a_part_may_take_first_blocks_other_grids_and_fewer_rows(tmp_path):
  donor, state, _ = vit_state(8)
  save(tmp_path, state)
  stored = rest_of(state.live, "encoder/")
  _, _, abstract = vit_state(16)
  abstract = rest_of(abstract, "encoder/")
  kernel = "blocks/mlp/up/kernel"
  abstract[kernel] = abstract[kernel].update(shape=(0, WIDTH, 8))
  cls = next(p for p in abstract if p.startswith("cls"))
  longer = stored[cls].shape[0] + 2
  abstract[cls] = abstract[cls].update(shape=(longer, *stored[cls].shape[1:]))
  take = functools.partial(
      imports.from_part, donor, abstract, path=str(tmp_path), source="encoder/"
  )
  with pytest.raises(ValueError) as error:
    take()
  assert f"{kernel}: (1, 8, 8) there, (0, 8, 8) here" in str(error.value)
  assert f"{cls}: " in str(error.value)
  found = take(deeper="blocks/.*", longer="cls.*")
  assert found[kernel].shape == (0, WIDTH, 8)
  rows = np.asarray(stored[cls])
  np.testing.assert_array_equal(found[cls][: longer - 2], rows)
  np.testing.assert_allclose(found[cls][-1], rows.mean(axis=0), rtol=1e-6)
  whole = imports.from_checkpoint(
      donor, vit_state(16)[2], path=str(tmp_path), skip="head/.*"
  )
  table = "position/table"
  np.testing.assert_array_equal(found[table], whole[f"encoder/{table}"])


def test_a_part_is_the_one_that_was_evaluated(tmp_path):
  donor, state, abstract = vit_state(8)
  shadow = {p: v + 1 for p, v in state.live.items() if p.startswith("head/")}
  save(tmp_path, state.replace(shadow=shadow))
  take = functools.partial(
      imports.from_part, donor, abstract, path=str(tmp_path)
  )
  np.testing.assert_array_equal(
      take()["head/bias"], state.live["head/bias"]
  )
  imports.checkpoint.write_json(
      tmp_path / "config.json", {"eval_shadow": True}
  )
  found = take()
  np.testing.assert_array_equal(found["head/bias"], shadow["head/bias"])
  cls = next(p for p in found if p.startswith("encoder/cls"))
  np.testing.assert_array_equal(found[cls], state.live[cls])


def test_a_part_of_a_public_directory():
  path = GOLDEN / "clip_quick"
  donor, abstract = golden("clip_quick")
  tower = rest_of(abstract, "vision/encoder/")
  encoder = clip.encoder(
      **{
          field: getattr(donor.vision, field)
          for field in ("image", "patch", "width", "heads", "mlp", "activation")
      },
      depth=donor.vision.depth - 1,
  )
  shallow = {
      path: leaf.update(shape=(encoder.depth, *leaf.shape[1:]))
      if path.startswith("blocks/")
      else leaf
      for path, leaf in tower.items()
  }
  take = functools.partial(
      imports.from_part,
      abstract=part_of(shallow, "eye/"),
      path=str(path),
      source="vision/encoder/",
      target="eye/",
  )
  found = take(holder(eye=encoder), deeper="eye/blocks/.*")
  whole = imports.checkpoint.flat(
      pretrained.from_pretrained(str(path)).variables["params"]
  )
  for name, leaf in shallow.items():
    np.testing.assert_array_equal(
        found[f"eye/{name}"], whole[f"vision/encoder/{name}"][: leaf.shape[0]]
        if name.startswith("blocks/")
        else whole[f"vision/encoder/{name}"],
    )
  with pytest.raises(ValueError) as error:
    take(holder(eye=encoder))
  assert "config.system.eye.depth" in str(error.value)
  other = encoder.clone(activation="relu")
  with pytest.raises(ValueError, match="eye.activation: 'quick_gelu' there"):
    take(holder(eye=other), deeper="eye/blocks/.*")


def test_a_part_lists_both_sides(tmp_path):
  system, state, abstract = vit_state(8)
  save(tmp_path, state)
  take = functools.partial(
      imports.from_part, system, abstract, path=str(tmp_path)
  )
  with pytest.raises(ValueError) as error:
    take(source="head/", target="encoder/")
  assert "encoder/cls" in str(error.value) and "missing" in str(error.value)
  assert "encoder/kernel: no use for it here" in str(error.value)
  with pytest.raises(ValueError) as error:
    take(source="tower/")
  assert "0 there with source='tower/'" in str(error.value)
  assert "encoder/, head/" in str(error.value)
