"""The command `mmjax train`, killed again and again, and on full disks."""

import hashlib
import os
import pathlib
import random
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mmjax import sharding
from mmjax.train import checkpoint, plan
from tests.train import toy_run
from tests.train.test_loop import lines

pytestmark = pytest.mark.alone

ROOT = pathlib.Path(__file__).parents[2]
KILLS, EVERY = 20, 10


def start(folder, steps, *flags):
  return subprocess.Popen(
      [
          sys.executable, "-m", "mmjax", "train",
          "--config", "tests/train/toy_run.py", "--workdir", str(folder),
          f"--config.steps={steps}", f"--config.checkpoint_every={EVERY}",
          f"--config.log_every={EVERY}", *flags,
      ],
      cwd=ROOT,
      env=os.environ | {"XLA_FLAGS": ""},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  )


def train(folder, steps, *flags):
  process = start(folder, steps, *flags)
  output, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors
  return output


def newest(folder):
  with checkpoint.Checkpoints(folder) as checkpoints:
    return checkpoints.newest()


def digest(folder, step):
  """One digest of a state, its RNG, its optimizer and its place in the data."""
  mesh = sharding.make_mesh({}, jax.devices()[:1])
  state = plan.make_plan(toy_run.get_config(), mesh).state
  with checkpoint.Checkpoints(folder) as checkpoints:
    found = checkpoint.to_tree(checkpoints.restore(state, step))
    data, _ = checkpoints.read_json(step)
  total = hashlib.sha256(repr(data).encode())
  for path, leaf in sorted(checkpoint.flat(found).items()):
    total.update(path.encode() + np.asarray(leaf).tobytes())
  return total.hexdigest()


def kill_in_a_save(process, folder, rng):
  """Kills in the middle of a save; says whether it was one."""
  skip = rng.randrange(4)
  while process.poll() is None:
    drafts = list(folder.glob("checkpoints/*.orbax-checkpoint-tmp"))
    if drafts and skip == 0:
      break
    skip -= bool(drafts)
    time.sleep(0.001)
  process.kill()
  process.communicate()
  return bool(list(folder.glob("checkpoints/*.orbax-checkpoint-tmp")))


def kill_at_random(process, rng):
  for line in process.stdout:
    if line.startswith("compiled"):
      break
  time.sleep(rng.uniform(0, 0.7))
  process.kill()
  process.communicate()


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path):
  rng, run, in_saves = random.Random(0), tmp_path / "run", 0
  for kill in range(KILLS):
    process = start(run, 1_000_000)
    if kill % 2:
      in_saves += kill_in_a_save(process, run, rng)
    else:
      kill_at_random(process, rng)
  assert in_saves >= KILLS // 4
  steps = newest(run) + 20
  assert steps > 20
  output = train(run, steps, "--allow=steps")
  assert "damaged" not in output and not (run / "damaged").exists()
  train(tmp_path / "whole", steps)
  assert digest(run, steps) == digest(tmp_path / "whole", steps)
  logged = [line["step"] for line in lines(run)]
  assert logged == [*range(EVERY, steps + 1, EVERY), steps]
  losses = [
      [line.get("loss") for line in lines(folder)]
      for folder in (run, tmp_path / "whole")
  ]
  assert losses[0] == losses[1]


@pytest.fixture
def small_disk(tmp_path):
  """A directory on a file system of its own that holds 400 kB."""
  place = tmp_path / "disk"
  place.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("may not mount a file system here")
  yield place
  subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_run_on_a_disk_that_fills_up_ends_and_goes_on(small_disk, tmp_path):
  run, filler = small_disk / "run", small_disk / "filler"
  train(run, EVERY)
  free = os.statvfs(small_disk)
  filler.write_bytes(bytes(free.f_bavail * free.f_frsize - 30_000))
  process = start(run, 500, "--allow=steps")
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 1, errors
  assert re.search("error: .*(cannot write|No space left)", errors), errors
  stopped = newest(run)
  assert EVERY <= stopped < 500
  filler.unlink()
  train(run, 2 * stopped, "--allow=steps")
  train(tmp_path / "whole", 2 * stopped)
  assert digest(run, 2 * stopped) == digest(tmp_path / "whole", 2 * stopped)
