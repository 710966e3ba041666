"""The verb bench data: what is read, what it costs."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from mmjax.__main__ import main
from mmjax.data import sources
from mmjax.verbs import _bench_data, _timing


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  pytest.importorskip("pyarrow")
  return _bench_data.lay_out(tmp_path_factory.mktemp("bench"), "jpeg", 8)


def test_every_form_holds_the_same_files(places):
  forms = {"folder", "webdataset", "parquet", "arrayrecord"}
  assert forms <= set(places)
  field, found = _bench_data.jpeg_field(), {}
  for form, place in places.items():
    split = "train" if form == "tfds" else None
    records = sources.open_records(place, split)
    assert len(records) == 8
    found[form] = field(records[5])
  assert found["folder"].shape == (224, 224, 3)
  for image in found.values():
    np.testing.assert_array_equal(image, found["folder"])


def test_loaders_give_whole_batches(places):
  loaders = _bench_data.contestants(places, "jpeg", 4, 2)
  assert {f"mmjax {form}" for form in places} <= set(loaders)
  for name, one in loaders.items():
    if name.startswith("mmjax"):
      batch = one()
      assert batch["image"].shape == (4, 224, 224, 3), name
      assert len(set(batch["label"].tolist())) == 4
    else:
      one()


def test_files_are_what_they_are_called():
  wave = _bench_data.wav_field()({"wav": _bench_data.make_wav(1)})
  assert wave.shape == (32000,) and 0.2 < abs(wave).max() < 1
  assert 2e4 < len(_bench_data.make_jpeg(1)) < 2e5


def test_a_step_is_several_batches_and_counted():
  steps, log = multiprocessing.Value("q", 0), []
  _bench_data.run(lambda: log.append(1), steps)
  assert len(log) == _bench_data.STEP and steps.value == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_cpu_seconds_are_those_of_the_children_too():
  before = _bench_data.cpu_seconds(os.getpid())
  program = (
      "import time\n"
      "while time.process_time() < 0.5: pass\n"
      "print(flush=True)\n"
      "input()"
  )
  child = subprocess.Popen(
      [sys.executable, "-c", program], stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
  )
  child.stdout.readline()
  found = _bench_data.cpu_seconds(os.getpid()) - before
  alone = _bench_data.cpu_seconds(child.pid)
  child.communicate(b"\n")
  assert 0.45 <= alone <= found + 0.05 < 2
  assert _bench_data.cpu_seconds(child.pid) == 0


def test_the_cost_of_a_step(monkeypatch):
  clock, steps = [0.0], multiprocessing.Value("q", 0)
  monkeypatch.setattr(_bench_data, "cpu_seconds", lambda process: clock[0])
  monkeypatch.setattr(time, "sleep", lambda seconds: None)

  def turn():
    steps.value += 3
    clock[0] += 6.0
    return 1.0, 0.0

  meter = _bench_data.Meter(steps)
  measured = meter.counted("one", turn, 1)
  assert measured() == (1.0, 0.0) and measured() == (1.0, 0.0)
  assert meter.spent == {"one": [2.0, 2.0]}


def test_rows_compare_with_the_best_of_pytorch():
  step = _bench_data.STEP * 10
  seconds = {"mmjax": [step, step], "torch 0": [2.0 * step] * 2,
             "torch 2": [4.0 * step] * 2}
  spent = {"mmjax": [step], "torch 0": [1.5 * step], "torch 2": [3.0 * step]}
  rows = list(_bench_data._rows_of("wav", 10, 2, seconds, spent, 0.0))
  assert [row["of_torch"] for row in rows] == [2.0, 1.0, 0.5]
  assert [row["cpu_of_torch"] for row in rows] == [1.5, 1.0, 0.5]
  assert rows[0]["per_core"] == 0.5
  alone = {"mmjax": [1.0, 1.0]}
  (row,) = _bench_data._rows_of("wav", 1, 1, alone, alone, 0.0)
  assert math.isnan(row["of_torch"]) and "nan" in _bench_data.line(row)


@pytest.mark.slow
def test_a_whole_run(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(_timing, "TURN_SECONDS", 0.0)
  monkeypatch.setattr(_timing, "TURN_STEPS", 1)
  path = tmp_path / "out.json"
  code = main([
      "bench", "data", "--media=wav", "--files=16", "--batch=4", "--rounds=2",
      "--patience=0", f"--json={path}", "--compilation_cache=",
  ])
  captured = capsys.readouterr()
  assert code == 0, captured.err
  rows = json.loads(path.read_text())["rows"]
  loaders = [row["loader"] for row in rows]
  assert loaders[0] == "mmjax folder"
  assert any(name.startswith("torch") for name in loaders) == bool(
      _timing.version("torch")
  )


@pytest.mark.parametrize(
    "flag,message",
    [
        ("--media=gif", "'gif' is not one of"),
        ("--files=3", "less than --batch"),
        ("--batch=0", "batch"),
    ],
)
def test_what_is_refused(flag, message, capsys):
  assert main(["bench", "data", flag]) == 1
  assert message in capsys.readouterr().err
