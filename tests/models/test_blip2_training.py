"""The stages of BLIP-2's config: what is trained, frozen and handed on."""

import pathlib

from flax import traverse_util
import jax
import numpy as np
import pytest

from mmjax import sharding, verbs
from mmjax.data import mixture
from mmjax.train import loop
from mmjax.train.plan import first_state, make_plan

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = verbs.load_module(str(ROOT / "configs" / "blip2.py"))


def small(**arguments):
  """A stage at its tiny size, of few steps."""
  text = ",".join(f"{key}={value}" for key, value in arguments.items())
  config = CONFIGS.get_config(text)
  with config.unlocked():
    config.evals = {}
  config.update(steps=2, batch_size=8, loader_threads=0)
  return config


def planned(config):
  return make_plan(config, sharding.make_mesh({}, jax.devices()[:1]))


@pytest.mark.slow
def test_what_is_frozen_stays_bit_by_bit():
  config = small(stage="decode")
  plan = planned(config)
  batches = mixture.batches(plan.streams, batch_size=8, seed=0, threads=0)
  with jax.set_mesh(plan.mesh):
    state = first_state(plan)
    live, frozen = jax.device_get((state.live, state.frozen))
    for _ in range(2):
      rows = next(batches)
      batch = {
          key: jax.device_put(rows[key], leaf.sharding)
          for key, leaf in plan.batch.items()
      }
      state, found = plan.step(state, batch)
  assert np.isfinite(found["loss"])
  assert {path.split("/")[0] for path in frozen} == {"vision", "llm"}
  for path, before in frozen.items():
    np.testing.assert_array_equal(state.frozen[path], before)
  still = [p for p, x in live.items() if np.array_equal(x, state.live[p])]
  # A bias of keys changes nothing, so nothing changes it but rounding.
  assert not [path for path in still if "/key/bias" not in path]


@pytest.mark.parametrize(
    "stage, frozen",
    [
        ("qformer", {"model/vision"}),
        ("decode", {"vision", "llm"}),
        ("t5", {"vision", "llm"}),
        ("vqa", {"vision", "llm"}),
    ],
)
def test_what_each_stage_trains(stage, frozen):
  plan = planned(small(stage=stage))
  for path in plan.parameters:
    stays = any(path.startswith(f"{part}/") for part in frozen)
    assert (path in plan.state.frozen) == stays, path
  reads = any("text_mlp" in path for path in plan.parameters)
  assert reads == (stage in ("qformer", "vqa"))


def flat(variables):
  return traverse_util.flatten_dict(variables["params"], sep="/")


@pytest.mark.slow
def test_stages_hand_on_what_they_have_learned(tmp_path):
  nothing = lambda system, abstract: {}
  first, second = str(tmp_path / "first"), str(tmp_path / "second")
  config = small(stage="qformer")
  loop.begin(config, first, nothing)
  _, _, learned = loop.restore_run(config, tmp_path / "first", 0, False)
  learned = {
      path.removeprefix("model/"): leaf for path, leaf in flat(learned).items()
  }

  def agree(found, expected, parts):
    for path, leaf in found.items():
      if path.startswith(parts):
        np.testing.assert_array_equal(leaf, expected[path], path)

  config = small(stage="decode", stage1=first)
  loop.begin(config, second, nothing)
  _, _, decoding = loop.restore_run(config, tmp_path / "second", 0, False)
  agree(flat(decoding), learned, ("vision", "qformer/"))
  plan = planned(small(stage="vqa", stage1=first, stage2=second))
  with jax.set_mesh(plan.mesh):
    asking = flat(first_state(plan).variables(False))
  assert any("text_mlp" in path for path in asking)
  agree(asking, learned, ("vision", "qformer/"))
  agree(asking, flat(decoding), ("projection/", "llm/"))
