"""Run directories, checkpoints, and parameters of other runs."""

import json
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mmjax import config as config_lib
from mmjax import sharding
from mmjax.train import checkpoint
from mmjax.train.state import flat, make_init
from tests.train import toy_run, toys


def mesh(**shape):
  shape = shape or {"data": 1}
  count = math.prod(shape.values())
  return sharding.make_mesh(shape, jax.devices()[:count])


def fill(abstract):
  """Random numbers in the shapes and places of an abstract tree."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    value = rng.normal(0, 100, leaf.shape).astype(leaf.dtype)
    return jax.device_put(value, leaf.sharding)

  return jax.tree.map(draw, abstract)


def toy_state(kind, where):
  _, abstract = make_init(toys.stage(kind), toys.batch(kind), where)
  return fill(abstract), abstract


def save(folder, state, step=3):
  with checkpoint.Checkpoints(folder) as checkpoints:
    checkpoints.save(step, state, {"next": 7}, {"version": "x"})
  checkpoint.write_json(folder / "config.json", {})


def assert_equal(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("kind", ["codec", "preference"])
def test_a_state_returns_exactly_on_another_mesh(tmp_path, kind):
  state, _ = toy_state(kind, mesh(data=2))
  save(tmp_path, state)
  _, abstract = toy_state(kind, mesh(data=2, fsdp=2, tensor=2))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.newest() == checkpoints.step() == 3
    found = checkpoints.restore(abstract, 3)
    assert checkpoints.read_json(3) == ({"next": 7}, {"version": "x"})
  assert_equal(found, state)
  for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(abstract)):
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_saving_does_not_see_later_steps(tmp_path):
  state, abstract = toy_state("contrastive", mesh())
  expected = jax.tree.map(np.array, state)
  bump = jax.jit(
      lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0
  )
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {}, {})
    for _ in range(20):
      state = bump(state)
    checkpoints.wait()
    assert_equal(checkpoints.restore(abstract, 1), expected)


def test_parts_that_are_not_wanted_are_not_read(tmp_path):
  state, abstract = toy_state("preference", mesh())
  save(tmp_path, state)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    found = checkpoints.restore(abstract.replace(opt={}, shadow={}), 3)
  assert found.opt == {} and found.shadow == {}
  assert_equal(found.live, state.live)


def test_all_misfits_come_in_one_message(tmp_path):
  state, abstract = toy_state("contrastive", mesh())
  save(tmp_path, state)
  live = dict(abstract.live)
  live["image/bias"] = jax.ShapeDtypeStruct((3,), jnp.float32)
  live["new/bias"] = live["audio/bias"]
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError) as error:
      checkpoints.restore(abstract.replace(live=live), 3)
  assert "live/new/bias: missing" in str(error.value)
  assert "live/image/bias: (16,) there, (3,) here" in str(error.value)


def test_missing_checkpoints_are_named(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.newest() is None
    with pytest.raises(FileNotFoundError, match="expected a checkpoint, found"):
      checkpoints.step()
    with pytest.raises(FileNotFoundError, match=r"of step 5, found steps \[\]"):
      checkpoints.step(5)


@pytest.mark.parametrize("key", ["/etc/passwd", "..", "a/../../b"])
def test_a_checkpoint_that_leaves_its_directory_is_refused(tmp_path, key):
  state, abstract = toy_state("contrastive", mesh())
  save(tmp_path, state)
  file = tmp_path / "checkpoints" / "3" / "state" / "_METADATA"
  metadata = json.loads(file.read_text())
  entry = next(iter(metadata["tree_metadata"].values()))
  entry["key_metadata"][0]["key"] = key
  file.write_text(json.dumps(metadata))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match="refused") as error:
      checkpoints.restore(abstract, 3)
  assert repr(key) in str(error.value)


def test_a_linked_checkpoint_is_refused(tmp_path):
  state, abstract = toy_state("contrastive", mesh())
  save(tmp_path, state)
  (tmp_path / "checkpoints" / "3" / "state" / "link").symlink_to("/etc")
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match="refused"):
      checkpoints.restore(abstract, 3)


# --- the run directory --------------------------------------------------------


def with_values(**values):
  config = ml_collections.ConfigDict(toy_run.get_config())
  config.unlock()
  config.update(values)
  return config


def test_config_survives_json():
  config = toy_run.get_config()
  values = json.loads(json.dumps(checkpoint.resolved(config)))
  assert checkpoint.resolved(values) == checkpoint.resolved(config)
  assert config_lib.freeze(values["optim"]) == config_lib.freeze(config.optim)


def test_another_config_is_refused_and_free_keys_are_not(tmp_path):
  config = toy_run.get_config()
  checkpoint.write_json(
      tmp_path / "config.json", checkpoint.resolved(config)
  )
  free = with_values(log_every=1, mesh=dict(data=2), keep_checkpoints=9)
  checkpoint.check_workdir(tmp_path, free)
  other = with_values(seed=3)
  other.streams[0]["source"]["bad"] = True
  with pytest.raises(ValueError) as error:
    checkpoint.check_workdir(tmp_path, other)
  assert "seed: 0 there, 3 here" in str(error.value)
  assert "streams[0].source.bad: False there, True here" in str(error.value)
  checkpoint.check_workdir(tmp_path, other, ["seed", "streams"])


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
  file = tmp_path / "file"
  file.write_text("")
  with pytest.raises(ValueError, match="cannot make it"):
    checkpoint.check_workdir(file / "run", toy_run.get_config())



def test_stored_names_are_plain_and_nested():
  state, abstract = toy_state("contrastive", mesh())
  tree = checkpoint.to_tree(state)
  assert set(tree["live"]) == {"image", "audio"}
  assert_equal(checkpoint.from_tree(abstract, tree), state)
  assert all("." not in path for path in flat(tree))
