"""Every config, size and stage: text, construction, two steps and a resume.

Golden texts are in tests/golden/configs; MMJAX_UPDATE_GOLDEN=1 rewrites them.
"""

import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from mmjax import sharding, verbs
from mmjax.train import checkpoint, loop
from mmjax.train.plan import make_plan
from mmjax.verbs import config as config_verb
from mmjax.verbs import systems

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "configs"
FILES = sorted((ROOT / "configs").glob("*.py"))


def variants(keep=lambda size: True):
  found = []
  for path in FILES:
    module = verbs.load_module(str(path))
    for size in filter(keep, module.SIZES):
      found += [
          pytest.param(module, size, stage, id=f"{path.stem}-{size}-{stage}")
          for stage in systems.stages(module, size)
      ]
  return found


def is_tiny(size):
  return size == "tiny"


def trained(quick):
  """The variants that take steps; those of `quick` papers are not slow."""
  found = []
  for variant in variants(is_tiny):
    module, _, stage = variant.values
    paper = pathlib.Path(module.__file__).stem
    marks = [] if paper in quick else [pytest.mark.slow]
    found.append(pytest.param(*variant.values, id=variant.id, marks=marks))
  return found


@pytest.mark.parametrize("module,size,stage", variants())
def test_text_is_golden(module, size, stage):
  config = module.get_config(f"size={size},stage={stage}")
  name = pathlib.Path(module.__file__).stem
  path = GOLDEN / f"{name}-{size}-{stage}.yaml"
  text = config_verb.text(config)
  if os.environ.get("MMJAX_UPDATE_GOLDEN"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  assert text == path.read_text(), "MMJAX_UPDATE_GOLDEN=1 rewrites the texts"


def planned():
  """All variants; between a stage's first and last size they are slow."""
  found = variants()
  sizes = {}
  for variant in found:
    module, size, stage = variant.values
    sizes.setdefault((module.__file__, stage), []).append(size)
  for number, variant in enumerate(found):
    module, size, stage = variant.values
    own = sizes[module.__file__, stage]
    if size not in (own[0], own[-1]):
      found[number] = pytest.param(
          *variant.values, id=variant.id, marks=pytest.mark.slow
      )
  return found


@pytest.mark.parametrize("module,size,stage", planned())
def test_plan_fits_a_pod_and_shards_every_large_leaf(module, size, stage):
  """Nothing is allocated: rules, keys, shapes, mesh and shards are checked."""
  config = module.get_config(f"size={size},stage={stage}")
  mesh = jax.sharding.AbstractMesh(
      (2, 4, 2, 1),
      sharding.AXES,
      axis_types=(jax.sharding.AxisType.Auto,) * 4,
  )
  plan = make_plan(config, mesh)
  assert set(config.weights) <= set(plan.metrics)
  whole = [
      path
      for path, leaf in plan.parameters.items()
      if leaf.size >= sharding.SMALL_LEAF
      and leaf.sharding.shard_shape(leaf.shape) == leaf.shape
  ]
  assert not whole


def small(module, stage, workdir):
  """A stage at its tiny size, cut to a few steps of a few examples."""
  config = module.get_config(f"size=tiny,stage={stage}")
  with config.unlocked():
    config.evals = {}
  config.update(
      steps=4, batch_size=8, log_every=1, checkpoint_every=2, loader_threads=0
  )
  return config, workdir


# Two trainings each, of which a quick run takes those of three papers.
@pytest.mark.parametrize(
    "module,size,stage", trained(quick=("vit", "clip", "llava"))
)
def test_two_steps_then_a_resume_equal_four_steps(
    module, size, stage, tmp_path, monkeypatch
):
  config, whole = small(module, stage, tmp_path / "whole")
  loop.train(config, whole)
  # What a run leaves that is killed after its first checkpoint.
  config, parts = small(module, stage, tmp_path / "parts")
  shutil.copytree(whole, parts, ignore=shutil.ignore_patterns("4", "results*"))
  with monkeypatch.context() as patch:
    # A run that began anew would come to the same end.
    patch.delattr(loop, "first_state")
    loop.train(config, parts)
  plan = make_plan(config, sharding.make_mesh(config.mesh))

  def state(folder, step):
    with checkpoint.Checkpoints(folder) as checkpoints:
      return checkpoints.restore(plan.state, step)

  last = state(whole, 4)
  equal = np.testing.assert_array_equal
  jax.tree.map(equal, last, state(parts, 4))
  before = state(whole, 2)
  jax.tree.map(equal, last.frozen, before.frozen)
  assert any(np.any(leaf != before.live[p]) for p, leaf in last.live.items())


MESH = dict(data=2, fsdp=2, tensor=2)


# Two programs each, of which a quick run compiles those of one paper.
@pytest.mark.parametrize("module,size,stage", trained(quick=("clip",)))
def test_eight_devices_give_the_losses_of_one(module, size, stage):
  from mmjax.data import mixture
  from mmjax.train.plan import first_state, make_step

  losses = []
  for shape, devices in (({}, jax.devices()[:1]), (MESH, jax.devices())):
    config, _ = small(module, stage, None)
    mesh = sharding.make_mesh(shape, devices)
    plan = make_plan(config, mesh)
    batches = mixture.batches(
        plan.streams, batch_size=config.batch_size, seed=0, threads=0
    )
    with jax.set_mesh(mesh):
      state = first_state(plan)
      step = make_step(plan.stage, plan.state, mesh)
      found = []
      for _ in range(2):
        rows = next(batches)
        batch = {
            key: jax.device_put(rows[key], leaf.sharding)
            for key, leaf in plan.batch.items()
        }
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    losses.append(found)
  np.testing.assert_allclose(losses[1], losses[0], rtol=5e-5)
