"""Two processes with two devices each train like one process with four."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.train import toy_run

ROOT = pathlib.Path(__file__).parents[1]


def free_port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def start(folder, devices, *flags):
  environ = dict(os.environ)
  environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
      [
          sys.executable, "-m", "mmjax", "train",
          "--config", "tests/train/toy_run.py", "--workdir", str(folder),
          # A process reads as many rows a batch as the gate reckons with.
          "--config.batch_size=32", "--config.mesh.fsdp=2",
          "--config.log_every=1",
          "--compilation_cache=", *flags,
      ],
      cwd=ROOT,
      env=environ,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  )


def start_pair(folder):
  coordinator = f"--coordinator=localhost:{free_port()}"
  return [
      start(folder, 2, coordinator, "--num_processes=2", f"--process_id={i}")
      for i in range(2)
  ]


def finish(processes, code=0):
  """Waits for processes, and returns what each printed: (output, errors)."""
  try:
    results = [process.communicate(timeout=400) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (_, errors) in zip(processes, results):
    assert process.returncode == code, errors
  return results


def losses(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return [line["loss"] for line in found if "loss" in line]


@pytest.mark.slow
def test_two_processes_train_stop_and_continue_like_one(tmp_path, monkeypatch):
  one, two, gate = tmp_path / "one", tmp_path / "two", tmp_path / "gate"
  finish([start(one, 4)])
  # SIGTERM at one process, in the middle of the run, stops and saves both.
  monkeypatch.setenv(toy_run.GATE, str(gate))
  processes = start_pair(two)
  deadline = time.time() + 60
  while not (two / "checkpoints" / "4").exists() and time.time() < deadline:
    time.sleep(0.05)
  processes[1].send_signal(signal.SIGTERM)
  gate.touch()
  results = finish(processes, code=143)
  saved = {re.search(r"saved step (\d+)", err)[1] for _, err in results}
  assert len(saved) == 1 and 4 <= int(*saved) < 12
  (first, _), (second, _) = finish(start_pair(two))
  assert "step 12/12" in first and "step" not in second
  assert len(losses(two)) == 12
  np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
  norms = [
      json.loads((folder / "results.json").read_text())["head_norm"]
      for folder in (one, two)
  ]
  assert norms[0] == pytest.approx(norms[1], rel=1e-5)
