"""The watch between processes, here between threads of one."""

import contextlib
import socket
import threading
import time

import jax
import pytest

from mmjax.train import peers


class Job:
  """Watches of several processes, and the codes that they leave with."""

  def __init__(self, monkeypatch, count):
    self.codes = {}
    self._place = None
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(peers, "_agree_on_place", self._agree)
    self.watches = []
    for index in range(count):
      monkeypatch.setattr(jax, "process_index", lambda index=index: index)
      leave = lambda code, index=index: self.codes.setdefault(index, code)
      self.watches.append(peers.Watch((KeyError,), leave))

  def _agree(self, server):
    if server is not None:
      self._place = ("127.0.0.1", server.getsockname()[1]), b"t" * 16
    return self._place

  def enter(self):
    for watch in self.watches:
      watch.__enter__()

  def leave(self, index, error=None):
    self.watches[index].__exit__(type(error), error, None)

  def wait_for(self, *indices):
    deadline = time.time() + 10
    while not self.codes.keys() >= {*indices} and time.time() < deadline:
      time.sleep(0.01)
    return self.codes


@pytest.fixture
def job(monkeypatch):
  found = Job(monkeypatch, 3)
  found.enter()
  while len(found.watches[0]._links) < 2:
    time.sleep(0.01)
  yield found
  with contextlib.suppress(OSError):
    found.watches[0]._server.close()


def leave_all(job, error=None):
  threads = [
      threading.Thread(target=job.leave, args=(index, error))
      for index in range(3)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("error", [None, KeyError("agreed")])
def test_processes_that_leave_together_leave_in_peace(job, error):
  leave_all(job, error)
  assert not job.codes


def test_one_waits_for_the_others_to_leave(job):
  first = threading.Thread(target=job.leave, args=(0,))
  first.start()
  first.join(0.3)
  assert first.is_alive()
  for index in (1, 2):
    threading.Thread(target=job.leave, args=(index,)).start()
  first.join(10)
  assert not first.is_alive() and not job.codes


def test_a_connection_that_breaks_ends_all(job, capsys):
  job.watches[1]._links[0].shutdown(socket.SHUT_RDWR)
  assert job.wait_for(0, 2)[0] == job.codes[2] == peers.LOST
  errors = capsys.readouterr().err
  name = f"process 1 ({socket.gethostname()}) has ended"
  assert f"process 0 stops: {name}" in errors
  assert f"process 2 stops: {name}" in errors


def test_the_first_ends_when_the_others_have(job, monkeypatch):
  monkeypatch.setattr(peers, "_FAREWELL", 60)
  job.watches[1]._links[0].shutdown(socket.SHUT_RDWR)
  assert 2 in job.wait_for(2)  # It knows, but its process lives on.
  time.sleep(0.2)
  assert 0 not in job.codes
  job.watches[2]._links[0].shutdown(socket.SHUT_RDWR)
  assert job.wait_for(0)[0] == peers.LOST


def test_what_one_process_raises_is_told_to_all(job, capsys):
  job.leave(2, OSError("the disk is gone"))
  assert job.wait_for(0, 1, 2) == {0: peers.LOST, 1: peers.LOST, 2: 1}
  errors = capsys.readouterr().err
  assert "error: the disk is gone" in errors
  for index in (0, 1):
    assert f"process {index} stops: process 2 (" in errors
  assert "OSError: the disk is gone. Its own output" in errors


def test_strangers_are_sent_away(job):
  place, _ = job._place
  with socket.create_connection(place) as link:
    link.sendall(b"x" * 16)
    assert link.recv(1) == b""
  assert set(job.watches[0]._links) == {1, 2} and not job.codes


def test_a_single_process_watches_nobody():
  with peers.Watch() as watch:
    assert watch._server is None
  with pytest.raises(OSError), peers.Watch():
    raise OSError
