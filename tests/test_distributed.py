"""Two processes with two devices each train like one process with four."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from mmjax.train import peers
from tests.train import toy_run

pytestmark = pytest.mark.alone

ROOT = pathlib.Path(__file__).parents[1]
HOST = str(ROOT / "launch" / "host.sh")
TRAIN = (sys.executable, "-m", "mmjax", "train")


def free_port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def start(folder, devices, *flags, command=TRAIN, **environ):
  environ = os.environ | environ | {
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
      "MMJAX_COMMAND": " ".join(TRAIN[:-1]),
      "MMJAX_PAUSE": "0",
  }
  return subprocess.Popen(
      [
          *command,
          "--config", "tests/train/toy_run.py", "--workdir", str(folder),
          # A process reads as many rows a batch as the gate reckons with.
          "--config.batch_size=32",
          "--config.log_every=1",
          "--compilation_cache=", *flags,
      ],
      cwd=ROOT,
      env=environ,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  )


def start_pair(folder, *flags, command=TRAIN, **environ):
  coordinator = f"--coordinator=localhost:{free_port()}"
  return [
      start(
          folder, 2, "--config.mesh.fsdp=2", coordinator, "--num_processes=2",
          f"--process_id={i}", *flags, command=command, **environ,
      )
      for i in range(2)
  ]


def finish(processes, *codes):
  """Waits for processes, and returns what each printed: (output, errors)."""
  try:
    results = [process.communicate(timeout=400) for process in processes]
  finally:
    for process in processes:
      process.kill()
  codes = codes or (0,) * len(processes)
  for process, code, (_, errors) in zip(processes, codes, results):
    assert process.returncode == code, errors
  return results


def wait_for(path, seconds=90):
  deadline = time.time() + seconds
  while not path.exists() and time.time() < deadline:
    time.sleep(0.05)
  assert path.exists()


def losses(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return [line["loss"] for line in found if "loss" in line]


def norm(folder):
  return json.loads((folder / "results.json").read_text())["head_norm"]


def assert_alike(folder, one):
  assert len(losses(folder)) == 12
  np.testing.assert_allclose(losses(folder), losses(one), rtol=1e-5)
  assert norm(folder) == pytest.approx(norm(one), rel=1e-5)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """The run of one process with one device."""
  folder = tmp_path_factory.mktemp("one")
  finish([start(folder, 1)])
  return folder


@pytest.fixture
def gate(tmp_path, monkeypatch):
  monkeypatch.setenv(toy_run.GATE, str(tmp_path / "gate"))
  return tmp_path / "gate"


@pytest.mark.slow
def test_processes_stop_together_and_go_on_in_other_numbers(
    tmp_path, one, gate
):
  # SIGTERM at one process, in the middle of the run, stops and saves both.
  two = tmp_path / "two"
  processes = start_pair(two)
  wait_for(two / "checkpoints" / "4")
  processes[1].send_signal(signal.SIGTERM)
  gate.touch()
  results = finish(processes, 143, 143)
  saved = {re.search(r"saved step (\d+)", err)[1] for _, err in results}
  assert len(saved) == 1 and 4 <= int(*saved) < 12
  alone = tmp_path / "alone"
  shutil.copytree(two, alone)
  (first, _), (second, _) = finish(start_pair(two))
  assert "step 12/12" in first and "step" not in second
  assert_alike(two, one)
  ((output, _),) = finish(
      [start(alone, 8, "--config.mesh.fsdp=2", "--config.mesh.tensor=2")]
  )
  assert f"from step {saved.pop()}" in output
  assert_alike(alone, one)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_whose_peer_is_killed_stops_and_says_so(
    tmp_path, gate, victim
):
  processes = start_pair(tmp_path / "run")
  wait_for(tmp_path / "run" / "checkpoints" / "4")
  processes[victim].kill()
  begin = time.time()
  other = 1 - victim
  _, errors = processes[other].communicate(timeout=peers.SILENCE)
  processes[victim].communicate()
  assert time.time() - begin < 15
  if victim == 1:
    assert processes[other].returncode == peers.LOST, errors
    assert f"process 0 stops: process 1 ({socket.gethostname()})" in errors
  else:  # The library below may be first to see that its service is gone.
    assert processes[other].returncode in (peers.LOST, -signal.SIGABRT)


def child_of(process):
  """The process that a script has started."""
  folder = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}")
  return int((folder / "children").read_text().split()[0])


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc").exists(), reason="needs Linux")
def test_hosts_of_a_pod_go_on_after_one_is_killed(tmp_path, one, gate):
  run = tmp_path / "run"
  hosts = start_pair(run, command=(HOST,))
  wait_for(run / "checkpoints" / "4")
  os.kill(child_of(hosts[1]), signal.SIGKILL)
  gate.touch()
  (_, first), (_, second) = finish(hosts)
  assert "attempt 1 of 4: stopped, because another process" in first
  assert "attempt 1 of 4: killed; often there is not enough memory" in second
  for errors in (first, second):
    assert "attempt 2 of 4: training is complete" in errors
  assert_alike(run, one)


@pytest.mark.slow
def test_a_host_that_never_comes_ends_the_job(tmp_path):
  run = tmp_path / "run"
  port = free_port()
  host = start(
      run, 2, f"--coordinator=localhost:{port}", "--num_processes=2",
      "--process_id=0", "--join_timeout=5", command=(HOST,), MMJAX_ATTEMPTS="1",
  )
  ((_, errors),) = finish([host], 134)
  assert "gave up: process 0 ended, or not all processes came" in errors


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_the_job(tmp_path):
  """Only the first one writes pictures, and cannot."""
  run = tmp_path / "run"
  run.mkdir()
  (run / "figures").write_text("in the way")
  processes = start_pair(run, "--config.eval_every=3")
  (_, first), (_, second) = finish(processes, 1, peers.LOST)
  assert "error: " in first and "figures" in first
  assert "process 1 stops: process 0 (" in second and "figures" in second
