"""The verb bench: whose turn is it, what is counted, what is refused."""

import functools
import itertools
import json
import os
import pathlib
import statistics
import time

import jax
import numpy as np
import pytest

from mmjax import config as config_lib
from mmjax import sharding
from mmjax.__main__ import main
from mmjax.perf import chips
from mmjax.train import plan as plan_lib
from mmjax.verbs import _bench_train, _timing, bench

ROOT = pathlib.Path(__file__).parents[2]

# The real configs of the smallest sizes, made smaller.
CONFIG = """
from mmjax import verbs

def get_config(arg):
  config = verbs.load_config("{root}/configs/{system}.py:size=tiny")
  towers = [config.system.get(name) for name in ("vision", "text")]
  for tower in towers if all(towers) else [config.system]:
    tower.update(depth=2, width=32, heads=2, mlp=64)
  config.system.unlock()
  if arg == "size=heavy":
    config.system.update(dropout=0.1, dtype="bfloat16", remat="full")
    config.objective.update(smoothing=0.1)
  return config
"""


@pytest.fixture
def configs(tmp_path, monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  for system in ("vit", "clip"):
    text = CONFIG.format(root=ROOT, system=system)
    (tmp_path / f"{system}.py").write_text(text)
  monkeypatch.setattr(_timing, "TURN_SECONDS", 0.0)
  monkeypatch.setattr(_timing, "TURN_STEPS", 1)
  yield tmp_path
  jax.config.update("jax_compilation_cache_dir", before)


def run(configs, *argv):
  return main([
      "bench", "train", f"--configs={configs}", "--rounds=2", "--patience=0",
      "--compilation_cache=", *argv,
  ])


def test_the_peak_is_that_of_the_dtype(monkeypatch):
  monkeypatch.setattr(chips, "from_device_kind", lambda _: chips.CHIPS["h200"])
  peak = lambda dtype: bench.environment(dtype)["peak"] / jax.device_count()
  assert peak("bfloat16") == 989.4e12
  assert peak("float32") == pytest.approx(989.4e12 / 2)


def test_rows_of_ours(configs, capsys, monkeypatch):
  monkeypatch.setattr(_timing, "version", lambda package: None)
  monkeypatch.setattr(_timing, "product_rate", lambda: 5e10)
  path = configs / "out.json"
  assert run(configs, "--sizes=vit:tiny:8", f"--json={path}") == 0
  report = json.loads(path.read_text())
  assert report["torch"] is None and report["peak"] == 5e10
  (row,) = report["rows"]
  assert (row["size"], row["batch"], row["step"]) == ("vit:tiny:8", 8, "mmjax")
  assert row["slower"] == 1.0
  assert row["seconds"] == statistics.median(row["rounds"])
  assert row["examples_per_second"] == pytest.approx(8 / row["seconds"])
  # Products of the forward pass; the backward pass has two for each of them,
  # but none for the gradient of the pixels.
  tokens, width, mlp = 17, 32, 64
  block = 2 * tokens * (4 * width**2 + 2 * width * mlp)
  block += 4 * tokens**2 * width
  flops = 8 * (
      2 * 3 * block + 2 * 2 * 16 * (8 * 8 * 3) * width + 3 * 2 * width * 10
  )
  assert row["flop_rate"] * row["seconds"] == pytest.approx(flops)
  assert row["share"] == pytest.approx(row["flop_rate"] / 5e10)
  heading, columns, line = capsys.readouterr().out.splitlines()
  assert "torch" not in heading and "50 GFLOP/s" in heading
  assert columns.split()[:3] == ["size", "batch", "step"]
  assert line.split()[:3] == ["vit:tiny:8", "8", "mmjax"]


def test_a_config_is_made_plain(configs):
  config = _bench_train.load(str(configs), "vit:heavy", 16)
  assert (config.batch_size, config.accumulate, config.shadow) == (16, 1, ())
  system = config.system
  assert (system.dropout, system.dtype, system.remat) == (0, "float32", "none")
  assert config.objective.smoothing == 0


def test_turns(monkeypatch):
  """Round robin by a clock that steps alone move, disturbed rounds repeated."""
  now, log = [0.0], []
  # Seconds of each step. The first of a turn does not count.
  scripts = {
      "a": itertools.cycle([9.0, 1.0, 3.0, 2.0]),
      "b": itertools.cycle([9.0, 5.0, 5.0, 8.0]),
  }
  # CPU seconds of others during each turn: the second round is disturbed.
  others = iter([0.0, 0.05, 3.0, 0.0, 0.0, 0.0])
  machine = [0.0]

  def contestant(name):
    def step():
      log.append(name)
      now[0] += next(scripts[name])
    return step

  def cpu_seconds():
    # Called at the start and at the end of a turn.
    cpu_seconds.calls += 1
    if cpu_seconds.calls % 2 == 0:
      machine[0] += next(others)
    return machine[0] + now[0], now[0]

  cpu_seconds.calls = 0
  monkeypatch.setattr(_timing, "TURN_SECONDS", 0.0)
  monkeypatch.setattr(_timing, "TURN_STEPS", 3)
  monkeypatch.setattr(_timing, "cpu_seconds", cpu_seconds)
  monkeypatch.setattr(_timing.time, "perf_counter", lambda: now[0])
  turns = {
      name: functools.partial(_timing.turn, contestant(name))
      for name in scripts
  }
  found, busy = _timing.interleave(turns, 2, 1000.0)
  assert log == (["a"] * 4 + ["b"] * 4) * 3
  assert found == {"a": [2.0, 2.0], "b": [5.0, 5.0]}
  assert busy == pytest.approx(0.05 / 18)  # b's turn takes 5 + 5 + 8 seconds.


def test_turns_end_when_patience_does(monkeypatch):
  """With others always busy, the quietest rounds count."""
  busy = iter([4.0, 2.0, 3.0, 1.0])
  clock = iter([0.0, 1.0, 2.0, 99.0])
  monkeypatch.setattr(_timing.time, "perf_counter", lambda: next(clock))
  found, others = _timing.interleave(
      {"a": lambda: (1.0, next(busy))}, 2, 10.0
  )
  assert found == {"a": [1.0, 1.0]} and others == 2.0
  assert list(busy) == []


def test_spread():
  assert _timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)


def test_cpu_seconds(tmp_path):
  stat = tmp_path / "stat"
  stat.write_text("cpu  100 20 30 9999 8888 4 5 41 7 7\ncpu0 1 1 1 1\n")
  machine, mine = _timing.cpu_seconds(str(stat))
  assert machine == pytest.approx(200 / _timing.os.sysconf("SC_CLK_TCK"))
  alone, mine_later = _timing.cpu_seconds(str(tmp_path / "none"))
  assert alone == mine_later >= mine > 0


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "mmjax bench train|decode|attention|vq"),
        (["sing"], "mmjax bench train|decode|attention|vq"),
        (["train", "--sizes=vit"], "'vit': expected SYSTEM:SIZE"),
        (["train", "--sizes=vit:tiny:0"], "expected SYSTEM:SIZE"),
        (["train", "--sizes=vit:tiny:8:8"], "expected SYSTEM:SIZE"),
        (["train", "--sizes=vit:tny"], "did you mean 'tiny'"),
        (["train", "--sizes=bit:tiny"], "there is no file"),
        (["train", "--batch=0"], "batch"),
        (["train", "--round=3"], "did you mean 'rounds'"),
    ],
)
def test_what_is_refused(argv, message, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert main(["bench", *argv]) == 1
  assert message in capsys.readouterr().err


def test_unlike_networks_are_refused():
  _bench_train.check_agreement((2.0, 0.5), (2.0001, 0.50001))
  with pytest.raises(ValueError, match="the loss is 2 here and 2.001"):
    _bench_train.check_agreement((2.0, 0.5), (2.001, 0.5))
  with pytest.raises(ValueError, match="gradient norm"):
    _bench_train.check_agreement((2.0, 0.5), (2.0, float("nan")))


@pytest.mark.parametrize("system", ["vit", "clip"])
def test_twins_are_the_same_networks(system, configs, capsys):
  """The check inside the verb passes."""
  pytest.importorskip("torch")
  path = configs / "out.json"
  code = run(configs, f"--sizes={system}:tiny:8", f"--json={path}")
  captured = capsys.readouterr()
  assert code == 0, captured.err
  rows = json.loads(path.read_text())["rows"]
  assert [row["step"] for row in rows][:2] == ["mmjax", "eager"]
  # Without a C++ compiler one row is lost, and said to be.
  assert len(rows) == 3 or "no torch.compile: " in captured.out
  assert rows[1]["slower"] == pytest.approx(
      rows[1]["seconds"] / rows[0]["seconds"]
  )


def contestants_of_a_test(seconds):
  """What a worker of the next test runs."""
  if seconds < 0:
    raise RuntimeError("no time")
  steps = {"nap": lambda: time.sleep(seconds), "end": lambda: os._exit(3)}
  return steps, "fact"


def test_a_worker_takes_turns_elsewhere(monkeypatch):
  monkeypatch.setattr(_timing, "TURN_SECONDS", 0.0)
  target = f"{__name__}:contestants_of_a_test"
  worker = _timing.Worker(target, 0.02)
  assert worker.facts == "fact"
  median, others = worker.turns["nap"]()
  assert median >= 0.02 and others >= 0
  with pytest.raises(ValueError, match="died: 3"):
    worker.turns["end"]()
  with pytest.raises(ValueError, match="RuntimeError: no time"):
    _timing.Worker(target, -1.0)


def test_twins_train_alike(configs):
  """Three steps of both optimizers give the same parameters."""
  pytest.importorskip("torch")
  from mmjax.verbs import _bench_torch as twins

  config = _bench_train.load(str(configs), "clip:tiny", 8)
  config.steps = 10**9  # The schedule stays at its peak.
  mesh = sharding.make_mesh()
  rng = np.random.default_rng(0)
  with jax.set_mesh(mesh):
    plan = plan_lib.make_plan(config, mesh)
    batch = {
        key: rng.integers(0, 1024, leaf.shape, "i4")
        if leaf.dtype == np.int32
        else rng.normal(size=leaf.shape).astype("f4")
        for key, leaf in plan.batch.items()
    }
    state = plan.init(jax.numpy.int32(0), {})
    params = {path: np.array(leaf) for path, leaf in state.live.items()}
    params["logit_scale"] += 2.1  # Above its maximum.
    state = state.replace(live=jax.tree.map(jax.numpy.array, params))
    model = twins.make_twin(plan.stage.system, params)
    theirs = twins.make_step(
        model, params, twins.make_inputs(batch),
        config_lib.freeze(config.optim), config.lr, compiled=False,
    )
    for _ in range(3):
      state, _ = plan.step(state, batch)
      theirs()
  after = {path: np.asarray(leaf) for path, leaf in state.live.items()}
  for parameter, path, value in model.sources(after):
    found = parameter.detach().numpy().reshape(value.shape)
    if path.endswith("query/bias"):
      # Keys' biases have no gradient but rounding errors.
      found, value = (np.delete(x.reshape(3, -1), 1, 0) for x in (found, value))
    error = abs(found - value)
    # Adam divides by the size of a gradient, which magnifies rounding errors of
    # single ones; a wrong hyperparameter moves all.
    assert error.max() < 1e-4 and error.mean() < 5e-6, (path, error)
  path = "text/projection/kernel"
  assert abs(after[path] - params[path]).mean() > config.lr
  assert after["logit_scale"] <= np.log(100) + 1e-6
