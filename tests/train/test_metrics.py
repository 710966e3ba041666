"""Writers, the meter and the progress line."""

import json
import sys
import types

import numpy as np
from PIL import Image
import pytest
import tensorboardX

from mmjax.train import metrics


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_hold_numbers_and_pictures(tmp_path):
  picture = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
  files = metrics.Files(tmp_path, 0)
  files.write(5, {"loss": 1.5, "bad": float("nan")}, {"eval/grid": picture})
  files.close()
  assert lines(tmp_path / "metrics.jsonl") == [
      {"step": 5, "loss": 1.5, "bad": None}
  ]
  found = Image.open(tmp_path / "figures" / "eval_grid_5.png")
  np.testing.assert_array_equal(np.asarray(found), picture)


def test_a_resumed_run_drops_what_it_will_take_again(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 4}\n{"step": 8}\n{"step": 12}\n{"step": 16, "lo')
  files = metrics.Files(tmp_path, 8)
  files.write(12, {"loss": 2.0}, {})
  files.close()
  assert lines(path) == [{"step": 4}, {"step": 8}, {"step": 12, "loss": 2.0}]


def test_tensorboard_events(tmp_path):
  from tensorboardX.proto import event_pb2

  writer = metrics.TensorBoard(tmp_path, 0)
  picture = np.zeros((2, 2, 3), np.uint8)
  writer.write(3, {"loss": 0.5}, {"grid": picture})
  writer.close()
  (file,) = (tmp_path / "tensorboard").iterdir()
  data, found = file.read_bytes(), {}
  while data:  # A record is a length, its checksum, the event, its checksum.
    size = int.from_bytes(data[:8], "little")
    event = event_pb2.Event.FromString(data[12 : 12 + size])
    data = data[16 + size :]
    for value in event.summary.value:
      found[value.tag] = (event.step, value.simple_value)
  assert found["loss"] == (3, 0.5) and found["grid"][0] == 3
  assert tensorboardX.__version__


def test_wandb_continues_the_same_run(tmp_path, monkeypatch):
  started, logged = [], []
  fake = types.ModuleType("wandb")

  def init(**kwargs):
    started.append(kwargs)
    return types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)),
        finish=lambda: logged.append("end"),
    )

  fake.init, fake.Image = init, lambda picture: ("picture", picture.shape)
  monkeypatch.setitem(sys.modules, "wandb", fake)
  for _ in range(2):
    writer = metrics.WeightsAndBiases("proj", tmp_path, {"steps": 3})
    writer.write(1, {"loss": 2.0}, {"grid": np.zeros((2, 2, 3), np.uint8)})
    writer.close()
  assert started[0]["project"] == "proj" and started[0]["resume"] == "allow"
  assert started[0]["id"] == started[1]["id"]
  values = {"loss": 2.0, "grid": ("picture", (2, 2, 3))}
  assert logged == [(1, values), "end"] * 2


def test_wandb_missing_says_how_to_install_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ValueError, match="pip install wandb"):
    metrics.import_wandb()


def test_meter_measures_windows_and_stands_still(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  meter = metrics.Meter(32, seconds=50.0, ideal=0.1)
  meter.start(10)
  now[0] += 4
  meter.wait(1.0)
  speed = meter.read(20)
  assert speed == pytest.approx(
      dict(examples_per_second=80, step_ms=400, data_wait=0.25, mfu=0.25)
  )
  meter.stop()
  now[0] += 1000  # An evaluation.
  meter.start()
  now[0] += 1
  assert meter.read(25) == pytest.approx(
      dict(examples_per_second=160, step_ms=200, data_wait=0, mfu=0.5)
  )
  assert meter.seconds == pytest.approx(55)


def test_progress_line():
  speed = dict(
      examples_per_second=12345.6, step_ms=120.0, data_wait=0.034, mfu=0.417
  )
  line = metrics.progress_line(1500, 2500, {"loss": 0.81234}, speed)
  assert line == (
      "step 1,500/2,500  loss 0.8123  12,346 examples/s  120 ms/step  "
      "data wait 3%  MFU 41.7%  ETA 2:00"
  )


@pytest.mark.parametrize(
    "seconds, text",
    [(5, "0:05"), (245, "4:05"), (3723, "1:02:03"), (262923, "3d 1:02:03")],
)
def test_duration(seconds, text):
  assert metrics.duration(seconds) == text
