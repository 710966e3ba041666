"""Every config, size and stage: text, construction, training on a mesh.

Golden texts are in tests/golden/configs; MMJAX_UPDATE_GOLDEN=1 rewrites them.
"""

import itertools
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from mmjax import sharding, verbs
from mmjax.data import mixture
from mmjax.train import checkpoint, loop
from mmjax.train.plan import first_state, make_plan
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
  """All variants; but for the last size of a stage they are slow."""
  found = variants()
  sizes = {}
  for variant in found:
    module, size, stage = variant.values
    sizes.setdefault((module.__file__, stage), []).append(size)
  for number, variant in enumerate(found):
    module, size, stage = variant.values
    own = sizes[module.__file__, stage]
    if size != own[-1]:
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


def small(module, stage):
  """A stage at its tiny size, a few steps of a few examples on 8 devices."""
  config = module.get_config(f"size=tiny,stage={stage}")
  with config.unlocked():
    config.evals = {}
  config.update(
      steps=4, batch_size=8, log_every=1, checkpoint_every=2, loader_threads=0
  )
  config.mesh.update(data=2, fsdp=2, tensor=2)
  return config


@pytest.mark.slow
@pytest.mark.parametrize("module,size,stage", variants("tiny".__eq__))
def test_runs_resume_exactly_and_have_the_losses_of_one_device(
    module, size, stage, tmp_path, monkeypatch
):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  loop.train(config := small(module, stage), whole)
  # What a run leaves that is killed after its first checkpoint.
  shutil.copytree(whole, parts, ignore=shutil.ignore_patterns("4", "results*"))
  with monkeypatch.context() as patch:
    # A run that began anew would come to the same end.
    patch.delattr(loop, "first_state")
    loop.train(config, parts)
  # On one device: a run may go on there too.
  plan = make_plan(config, sharding.make_mesh({}, jax.devices()[:1]))

  def state(folder, step):
    with checkpoint.Checkpoints(folder) as checkpoints:
      return checkpoints.restore(plan.state, step)

  last = state(whole, 4)
  equal = np.testing.assert_array_equal
  jax.tree.map(equal, last, state(parts, 4))
  before = state(whole, 2)
  jax.tree.map(equal, last.frozen, before.frozen)
  assert any(np.any(leaf != before.live[p]) for p, leaf in last.live.items())

  rows = map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
  losses = [row["loss"] for row in rows if "loss" in row]
  assert len(losses) == 4
  # Half of them: rounding grows with the steps.
  np.testing.assert_allclose(losses[:2], first_losses(plan, 2), rtol=5e-5)


def first_losses(plan, steps):
  """Those of a run, without its loop."""
  batches = mixture.batches(
      plan.streams, batch_size=plan.stage.batch_size, seed=0, threads=0
  )
  found = []
  with jax.set_mesh(plan.mesh):
    state = first_state(plan)
    for rows in itertools.islice(batches, steps):
      batch = {
          key: jax.device_put(rows[key], leaf.sharding)
          for key, leaf in plan.batch.items()
      }
      state, metrics = plan.step(state, batch)
      found.append(float(metrics["loss"]))
  return found
