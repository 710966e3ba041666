"""Faults in the middle of a run: damage, full disks, broken data, spikes."""

import errno
import hashlib
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from mmjax.objectives.term import mean_term, objective
from mmjax.train import checkpoint, integrity, loop, metrics, spikes
from tests.train import test_loop, toy_run
from tests.train.test_loop import assert_same, lines, make_config, parameters

ROOT = pathlib.Path(__file__).parents[2]


def tree(folder):
  """Name -> digest of everything below a folder."""
  return {
      str(path.relative_to(folder)): hashlib.sha256(
          path.read_bytes()
      ).hexdigest()
      for path in folder.rglob("*")
      if path.is_file()
  }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run with checkpoints of the steps 4, 8 and 12."""
  folder = tmp_path_factory.mktemp("whole")
  loop.train(make_config(keep_checkpoints=9), folder)
  return folder


def copy(whole, folder):
  """The run as it stood at step 8."""
  shutil.copytree(whole, folder)
  shutil.rmtree(folder / "checkpoints" / "12")
  (folder / "results.json").unlink()
  return folder


# --- damage -------------------------------------------------------------------


def largest(folder):
  return max(
      (p for p in folder.rglob("*") if p.is_file()),
      key=lambda path: path.stat().st_size,
  )


def flip(folder):
  data = bytearray(largest(folder / "state").read_bytes())
  data[len(data) // 2] ^= 1
  largest(folder / "state").write_bytes(data)


def truncate(folder):
  path = largest(folder / "state")
  path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "flip": (flip, "changed"),
    "truncate": (truncate, "changed"),
    "missing": (
        lambda folder: (folder / "data" / "metadata").unlink(),
        "data/metadata: missing",
    ),
    "added": (
        lambda folder: (folder / "state" / "x").write_text("x"),
        "state/x: was not there",
    ),
    "digests": (
        lambda folder: (folder / integrity.DIGESTS).write_text("x"),
        "SHA256SUMS: unreadable",
    ),
    "metadata": (
        lambda folder: (folder / "state" / "_METADATA").write_text("{"),
        "expected the metadata",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_set_aside(tmp_path, whole, damage):
  run = copy(whole, tmp_path / "run")
  hurt, message = DAMAGES[damage]
  hurt(run / "checkpoints" / "8")
  before, said = tree(run / "checkpoints" / "8"), []
  with checkpoint.Checkpoints(run) as checkpoints:
    assert checkpoints.newest() == 8
    with pytest.raises(ValueError, match=message):
      checkpoints.read_json(8)
    assert checkpoints.recover(said.append) == checkpoints.newest() == 4
  assert message in said[0] and "going back to step 4" in said[0]
  assert tree(run / "damaged" / "8") == before


def test_a_run_goes_on_behind_a_damaged_checkpoint(tmp_path, whole, capsys):
  run = copy(whole, tmp_path / "run")
  (run / "damaged" / "8").mkdir(parents=True)
  flip(run / "checkpoints" / "8")
  before = tree(run / "checkpoints" / "8")
  loop.train(make_config(), run)
  assert "8 is damaged: state/" in capsys.readouterr().out
  assert tree(run / "damaged" / "8-1") == before
  assert_same(parameters(run, 12), parameters(whole, 12))
  assert [line["step"] for line in lines(run)] == [4, 8, 12, 12]


def test_nothing_is_written_where_no_checkpoint_is_whole(tmp_path, whole):
  run = copy(whole, tmp_path / "run")
  (run / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir()
  for step in ("4", "8"):
    flip(run / "checkpoints" / step)
  before = tree(run)
  with pytest.raises(ValueError, match="No checkpoint of .* is whole") as error:
    loop.train(make_config(), run)
  assert "checkpoints/4 is damaged" in str(error.value)
  assert "checkpoints/8 is damaged" in str(error.value)
  assert tree(run) == before
  assert (run / "checkpoints" / "12.orbax-checkpoint-tmp").exists()


def test_only_a_run_removes_unfinished_checkpoints(tmp_path, whole):
  run = copy(whole, tmp_path / "run")
  draft = run / "checkpoints" / "12.orbax-checkpoint-tmp"
  (draft / "state").mkdir(parents=True)
  loop.evaluate_run(make_config(), run)
  assert draft.exists()
  with checkpoint.Checkpoints(run) as checkpoints:
    assert checkpoints.recover() == 8
  assert not draft.exists()


def test_digests_are_those_of_sha256sum(whole):
  folder = whole / "checkpoints" / "8"
  names = []
  for line in (folder / integrity.DIGESTS).read_text().splitlines():
    digest, name = line.split("  ")
    names.append(name)
    data = (folder / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest
  assert {"data/metadata", "facts/metadata", "state/_METADATA"} <= {*names}
  assert integrity.damage(folder) == []


@pytest.mark.parametrize("place", ["data", "state/link", ""])
def test_links_out_of_a_checkpoint_are_refused(tmp_path, whole, place):
  run = copy(whole, tmp_path / "run")
  link = run / "checkpoints" / "8" / place
  if link.exists():
    link.rename(tmp_path / "outside")
  link.symlink_to(tmp_path / "outside")
  with checkpoint.Checkpoints(run) as checkpoints:
    with pytest.raises(ValueError, match="refused"):
      checkpoints.read_json(8)


def test_no_pickle_is_ever_read():
  pattern = re.compile(
      r"\b(c?pickle|joblib|shelve|marshal|dill)\.loads?\b|torch\.load"
      r"|allow_pickle=True|import (pickle|joblib|dill|shelve)\b"
  )
  found = [
      f"{path.relative_to(ROOT)}: {line.strip()}"
      for path in sorted((ROOT / "mmjax").rglob("*.py"))
      for line in path.read_text().splitlines()
      if pattern.search(line) and "weights_only=True" not in line
  ]
  assert not found


# --- full disks, closed places ------------------------------------------------


def test_a_full_disk_ends_a_run_that_goes_on_later(
    tmp_path, whole, monkeypatch
):
  seal = integrity.write_digests

  def fail(folder):
    if folder.name.startswith("8."):
      raise OSError(errno.ENOSPC, "No space left on device")
    seal(folder)

  with monkeypatch.context() as patch:
    patch.setattr(integrity, "write_digests", fail)
    with pytest.raises(checkpoint.CheckpointError, match="No space left") as e:
      loop.train(make_config(), tmp_path)
  assert f"{tmp_path}/checkpoints/8: cannot write" in str(e.value)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [4]
  loop.train(make_config(), tmp_path)
  assert_same(parameters(tmp_path, 12), parameters(whole, 12))


def full():
  return open("/dev/full", "wb")


def test_writers_tell_of_a_full_disk_and_do_not_hang(tmp_path):
  files = metrics.Files(tmp_path, 0)
  files._file = open("/dev/full", "w")
  with pytest.raises(OSError, match="No space left.*metrics.jsonl"):
    files.write(1, {"loss": 1.0}, {})
  board = metrics.TensorBoard(tmp_path, 0)
  board._events._py_recordio_writer._writer = full()
  with pytest.raises(OSError, match="No space left"):
    board.write(1, {"loss": 1.0}, {})


def test_a_place_that_cannot_be_written_is_refused_at_once():
  place = pathlib.Path("/proc/sys/kernel")  # Closed even to root.
  if not place.is_dir():
    pytest.skip("needs Linux")
  with pytest.raises(ValueError, match="cannot write there"):
    checkpoint.check_workdir(place, toy_run.get_config())


# --- data that breaks ---------------------------------------------------------


class Failing(toy_run.Blobs):
  """Blobs; once it has given so many examples, reading fails."""

  limit = None

  def __getitem__(self, index):
    if self.limit is not None and self.given >= self.limit:
      raise OSError(f"example {index}: the disk went away")
    return super().__getitem__(index)


@pytest.mark.parametrize(
    "threads", [pytest.param(0, marks=pytest.mark.slow), 2]
)
def test_a_reader_that_fails_ends_the_run_which_goes_on_later(
    tmp_path, whole, monkeypatch, threads
):
  source = dict(type="tests.train.test_surviving:Failing", bad=False)
  config = make_config(
      streams=(dict(source=source, weight=1.0),), loader_threads=threads
  )
  with monkeypatch.context() as patch:
    patch.setattr(Failing, "limit", 10 * 16)
    with pytest.raises(OSError, match="the disk went away"):
      loop.train(config, tmp_path)
  loop.train(config, tmp_path)
  assert_same(parameters(tmp_path, 12), parameters(whole, 12))


# --- spikes -------------------------------------------------------------------


def policy(**changes):
  values = dict(spike=6.0, window=10, back=3, skip=2, most=2)
  return spikes.Policy(**(values | changes))


def test_a_monitor_knows_a_jump_from_noise():
  rng = np.random.default_rng(0)
  losses = 5 * np.exp(-np.arange(200) / 50) + rng.normal(0, 0.1, 200)
  monitor = spikes.Monitor(policy())
  for step, loss in enumerate(losses, 1):
    monitor.look(step, step, loss)
  monitor.look(201, 201, float("nan"))
  copied = spikes.Monitor(policy(), json.loads(json.dumps(monitor.facts())))
  for one in (monitor, copied):
    with pytest.raises(spikes.Spike, match="step 202: the loss jumped") as e:
      one.look(202, 205, losses[-1] + 2)
    assert (e.value.step, e.value.batches) == (202, 205)
  spikes.Monitor(policy(spike=0.0)).look(1, 1, 1e9)


def test_a_monitor_waits_for_its_window_and_ignores_rounding():
  monitor = spikes.Monitor(policy())
  for step in range(1, 11):
    monitor.look(step, step, 0.1 * step)
  still = spikes.Monitor(policy())
  for step in range(1, 100):
    still.look(step, step, 0.3 + 1e-12 * (step % 2))


def test_the_moments_of_a_monitor_are_those_of_the_window():
  losses = np.random.default_rng(1).normal(3, 1, 30)
  monitor = spikes.Monitor(policy(spike=100.0))
  for step, loss in enumerate(losses, 1):
    monitor.look(step, step, loss)
  weight = 0.9 ** np.arange(30)[::-1]
  weight /= weight.sum()
  mean = weight @ losses
  limit = mean + 100 * np.sqrt(weight @ losses**2 - mean**2)
  monitor.look(31, 31, limit * (1 - 1e-9))
  monitor = spikes.Monitor(policy(spike=100.0), {"seen": 30} | {
      "mean": mean * (1 - 0.9**30),
      "square": weight @ losses**2 * (1 - 0.9**30),
  })
  with pytest.raises(spikes.Spike):
    monitor.look(31, 31, limit * (1 + 1e-9))


def test_a_policy_refuses_what_cannot_be():
  with pytest.raises(ValueError, match="config.rewind: expected numbers >= 0"):
    policy(back=-1)


@objective("image", "label")
def jumpy(system, variables, batch, context):
  """Cross-entropy, and a large loss where an example is marked."""
  found, mutables = toy_run.classify(system, variables, batch, context)
  mark = (batch["image"].max(axis=(1, 2, 3)) > 50).astype(np.float32)
  kernel = variables["params"]["head"]["kernel"]
  jump = mean_term(mark * (1 + (kernel**2).sum()))
  return found | {"jump": jump}, mutables


class Marked(toy_run.Blobs):
  """Blobs of which one is marked."""

  def __init__(self, size=640, marked=(333,)):
    super().__init__(size)
    self.marked = marked

  def __getitem__(self, index):
    example = super().__getitem__(index)
    if index in self.marked:
      example["image"] = np.full_like(example["image"], 100.0)
    return example


def jumpy_config(**changes):
  here = "tests.train.test_surviving"
  values = dict(
      objective=dict(type=f"{here}:jumpy"),
      weights=dict(cross_entropy=1.0, jump=100.0),
      streams=(dict(source=dict(type=f"{here}:Marked"), weight=1.0),),
      rewind=dict(spike=6.0, window=5, back=3, skip=2, most=2),
      steps=32,
      log_every=1,
      checkpoint_every=8,
      keep_checkpoints=20,
  )
  return make_config(**(values | changes))


@pytest.fixture(scope="module")
def rewound(tmp_path_factory):
  folder = tmp_path_factory.mktemp("rewound")
  loop.train(jumpy_config(), folder)
  return folder


def rewinds(folder):
  return [line for line in lines(folder) if "rewound_from" in line]


def test_a_run_goes_back_before_a_spike_and_leaves_out_its_batches(
    tmp_path, rewound
):
  (line,) = rewinds(rewound)
  step, spike = line["step"] - 1, line["rewound_from"]
  assert spike - 3 - 8 < step <= spike - 3 and step % 8 == 0
  assert line["batches_skipped"] == spike - step + 2
  steps = [line["step"] for line in lines(rewound)]
  assert steps == sorted(steps)
  assert max(line.get("loss", 0) for line in lines(rewound)[step:]) < 5
  # By hand: the checkpoint before, with the data moved on.
  plain = jumpy_config(rewind=dict(spike=0.0, window=5, back=3, skip=2, most=2))
  loop.train(jumpy_config(steps=step), tmp_path / "before")
  plan = test_loop.make(plain)
  with checkpoint.Checkpoints(tmp_path / "before") as checkpoints:
    state = checkpoints.restore(plan.state, step)
  with checkpoint.Checkpoints(tmp_path / "hand") as checkpoints:
    checkpoints.save(step, state, {"next_index": spike + 2}, {})
  with jax.set_mesh(plan.mesh):
    loop.train(plain, tmp_path / "hand")
  assert_same(parameters(tmp_path / "hand", 32), parameters(rewound, 32))


@pytest.mark.slow
def test_a_run_that_is_killed_behind_a_rewind_repeats_it(
    tmp_path, rewound, monkeypatch
):
  class Killed(Exception):
    pass

  save, go_back = checkpoint.Checkpoints.save, loop.Run.rewind

  def kill(self, step, *rest):
    raise Killed

  def rewind_then_kill(self, spike):
    found = go_back(self, spike)
    patch.setattr(checkpoint.Checkpoints, "save", kill)
    return found

  with monkeypatch.context() as patch:
    patch.setattr(loop.Run, "rewind", rewind_then_kill)
    with pytest.raises(Killed):
      loop.train(jumpy_config(), tmp_path)
  assert checkpoint.Checkpoints.save is save
  loop.train(jumpy_config(), tmp_path)
  assert_same(parameters(tmp_path, 32), parameters(rewound, 32))
  assert rewinds(tmp_path) == rewinds(rewound)


def test_too_many_spikes_stop_the_run(tmp_path):
  marked = tuple(range(0, 640, 7))
  source = dict(type="tests.train.test_surviving:Marked", marked=marked)
  config = jumpy_config(
      streams=(dict(source=source, weight=1.0),),
      rewind=dict(spike=0.5, window=2, back=0, skip=0, most=2),
  )
  with pytest.raises(loop.UnstableError, match="after 2 rewinds"):
    loop.train(config, tmp_path)
