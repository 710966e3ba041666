"""Plans, the loop, and what happens when a run goes wrong or is killed."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.train import checkpoint, loop, plan
from tests.train import toy_run

ROOT = pathlib.Path(__file__).parents[2]


def make_config(**changes):
  config = toy_run.get_config()
  for path, value in changes.items():
    node = config
    *parents, key = path.split(".")
    for parent in parents:
      node = node[parent]
    with node.unlocked():
      node[key] = value
  return config


def stream(**source):
  type_ = "tests.train.toy_run:Blobs"
  return (dict(source=dict(type=type_, **source), weight=1.0),)


def parameters(folder, step):
  """The stored state of a run, on the host."""
  abstract = make(make_config()).state
  with checkpoint.Checkpoints(folder) as checkpoints:
    found = checkpoints.restore(abstract, step)
  return jax.tree.map(np.asarray, checkpoint.to_tree(found))


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def lines(folder):
  text = (folder / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run, and what it printed."""
  folder = tmp_path_factory.mktemp("whole")
  return folder, loop.train(make_config(), folder, profile=(2, 3))


# --- plans --------------------------------------------------------------------


def make(config, devices=8):
  mesh = sharding.make_mesh(config["mesh"], jax.devices()[:devices])
  return plan.make_plan(config, mesh)


def test_a_plan_says_what_would_run():
  found = make(make_config())
  assert found.batch["image"].shape == (16, 4, 4, 3)
  assert found.batch["label"].dtype == jnp.int32
  assert plan.count(found.parameters) == 48 * 16 + 16 + 16 * 4 + 4
  assert found.metrics == (
      "accuracy", "cross_entropy", "grad_norm", "loss", "skipped",
      "skipped_in_a_row",
  )
  assert "852 parameters, 852 trained, 0 frozen" in plan.summary(found)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(batch_size=12), "not divisible by the 8 parts"),
        (dict(streams=stream(keys=("image",))), r"lacks \['label'\]"),
        (dict(streams=()), "at least one stream"),
        (dict(streams=stream(siez=3)), "did you mean 'size'"),
        (dict(weights=dict(cros=1.0)), r"no term \['cros'\]"),
        (dict(optim=(("body/.*", None),)), "'head/kernel' has no rule"),
        (dict(mesh=dict(data=3)), "product of 8 devices"),
    ],
)
def test_faults_come_before_anything_is_written(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    loop.train(make_config(**changes), tmp_path / "run")
  assert not list((tmp_path / "run").iterdir())


def test_streams_must_agree(tmp_path):
  streams = stream() + stream()
  streams[1]["source"]["type"] = "tests.train.test_loop:Wider"
  with pytest.raises(ValueError, match=r"shapes than config.streams\[0\]"):
    make(make_config(streams=streams))


class Wider(toy_run.Blobs):

  def __getitem__(self, index):
    example = super().__getitem__(index)
    return example | {"image": np.tile(example["image"], (2, 2, 1))}


def test_imports_must_fit():
  def give(system, abstract):
    return {"head/bias": jnp.zeros(7), "haed/bias": jnp.zeros(4)}

  found = make(make_config())
  found.stage.imports.append(give)
  with pytest.raises(ValueError) as error:
    plan.first_state(found)
  assert "head/bias: (7,), expected (4,)" in str(error.value)
  assert "haed/bias: (4,), expected no such parameter" in str(error.value)


def test_imports_replace_what_is_drawn():
  kernel = jnp.arange(64.0).reshape(16, 4)
  found = make(make_config())
  found.stage.imports.append(lambda *_: {"head/kernel": kernel})
  with jax.set_mesh(found.mesh):
    state = plan.first_state(found)
  np.testing.assert_array_equal(state.live["head/kernel"], kernel)
  np.testing.assert_array_equal(state.shadow["head/kernel"], kernel)
  assert np.std(state.live["body/kernel"]) > 0


def test_a_trace_window_must_meet_the_run(tmp_path):
  with pytest.raises(ValueError, match="none of the steps .* 1 to 12"):
    loop.train(make_config(), tmp_path, profile=(13, 20))


# --- whole runs ---------------------------------------------------------------


def test_a_run_leaves_everything_behind(whole):
  folder, results = whole
  assert results == json.loads((folder / "results.json").read_text())
  assert results["steps"] == 12 and results["parameters"] == 852
  assert results["train_seconds"] > 0 and "head_norm" in results
  steps = [line["step"] for line in lines(folder)]
  assert steps == [4, 8, 12, 12]
  assert lines(folder)[0]["cross_entropy"] == lines(folder)[0]["loss"]
  assert lines(folder)[2]["loss"] < lines(folder)[0]["loss"]
  assert (folder / "figures" / "head_grey_12.png").exists()
  assert list((folder / "tensorboard").iterdir())
  assert list((folder / "profile").rglob("*.xplane.pb"))
  kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
  assert kept == ["12", "8"]


def test_a_complete_run_is_not_repeated(whole, capsys):
  folder, results = whole
  assert loop.train(make_config(), folder) == results
  assert "is complete" in capsys.readouterr().out
  with pytest.raises(ValueError, match="beyond config.steps=8"):
    loop.train(make_config(steps=8), folder, allow=["steps"])


def test_more_steps_continue_a_run_and_evaluate_on_the_way(
    tmp_path, whole, capsys
):
  folder, _ = whole
  loop.train(make_config(steps=8), tmp_path)
  config = make_config(eval_every=10)
  results = loop.train(config, tmp_path, allow=["steps"])
  assert "from step 8" in capsys.readouterr().out
  assert_same(parameters(tmp_path, 12), parameters(folder, 12))
  assert results["steps"] == 12
  assert [line["step"] for line in lines(tmp_path)] == [4, 8, 8, 10, 12, 12]


def test_evaluate_run_reads_either_copy_of_the_parameters(whole):
  folder, results = whole
  step, scalars, figures = loop.evaluate_run(make_config(), folder)
  assert step == 12 and figures["head/grey"].shape == (2, 3, 3)
  assert scalars["head/norm"] == pytest.approx(results["head_norm"])
  _, slow, _ = loop.evaluate_run(make_config(eval_shadow=True), folder)
  shadow = parameters(folder, 12)["shadow"]["head"]["kernel"]
  assert slow["head/norm"] == pytest.approx(np.linalg.norm(shadow))
  assert slow["head/norm"] != pytest.approx(scalars["head/norm"], rel=1e-4)


# --- steps that are not finite ------------------------------------------------


def test_bad_batches_change_nothing_and_are_counted():
  found = make(make_config())
  good = np.stack([toy_run.Blobs()[i]["image"] for i in range(16)])
  label = np.arange(16, dtype=np.int32) % 4
  with jax.set_mesh(found.mesh):
    state, metrics = found.step(
        plan.first_state(found), {"image": good, "label": label}
    )
    before = jax.tree.map(np.array, checkpoint.to_tree(state))
    for count in (1, 2):
      batch = {"image": good * np.nan, "label": label}
      state, metrics = found.step(state, batch)
      assert int(metrics["skipped_in_a_row"]) == count
    after = jax.tree.map(np.array, checkpoint.to_tree(state))
    state, metrics = found.step(state, {"image": good, "label": label})
  assert int(metrics["skipped"]) == 2
  assert int(metrics["skipped_in_a_row"]) == 0
  for part in ("live", "opt", "shadow"):
    assert_same(after[part], before[part])
  moved = np.asarray(state.live["head/kernel"])
  assert np.any(moved != before["live"]["head"]["kernel"])


def test_too_many_bad_steps_stop_the_run(tmp_path):
  config = make_config(abort_after=3, log_every=1, streams=stream(bad=True))
  with pytest.raises(loop.NotFiniteError, match="step 3: 3 steps in a row"):
    loop.train(config, tmp_path)
  assert [line["skipped"] for line in lines(tmp_path)] == [1, 2]
  assert lines(tmp_path)[0]["loss"] is None


# --- killed and stopped runs --------------------------------------------------


def start(folder):
  return subprocess.Popen(
      [
          sys.executable, "-m", "mmjax", "train",
          "--config", "tests/train/toy_run.py", "--workdir", str(folder),
      ],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  )


def wait_for(path, process):
  for _ in range(1200):
    if path.exists() or process.poll() is not None:
      break
    time.sleep(0.05)
  if not path.exists():
    process.kill()
  assert path.exists(), process.communicate()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_continues_bit_exactly(
    tmp_path, whole, signum, monkeypatch
):
  folder, _ = whole
  gate, run = tmp_path / "gate", tmp_path / "run"
  monkeypatch.setenv(toy_run.GATE, str(gate))
  process = start(run)
  wait_for(run / "checkpoints" / "4", process)
  process.send_signal(signum)
  gate.touch()
  _, errors = process.communicate(timeout=60)
  with checkpoint.Checkpoints(run) as checkpoints:
    stopped = checkpoints.newest()
  assert 4 <= stopped < 12
  if signum == signal.SIGTERM:
    assert process.returncode == 143, errors
    assert f"saved step {stopped}" in errors
  loop.train(make_config(), run)
  assert_same(parameters(run, 12), parameters(folder, 12))
  assert [line["step"] for line in lines(run)] == [4, 8, 12, 12]
