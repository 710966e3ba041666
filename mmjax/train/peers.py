"""Who stops a job whose other processes are gone?

A process that waits in a collective for one that died learns of it minutes
later, from the library below, in a message that names nobody. So every process
holds a connection to the first one, which the operating system closes when a
process ends, however it ends. The first process tells all others who is gone.
"""

from collections.abc import Callable
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

# Exit code of a process whose peer is gone; the same command continues.
LOST = 5

# A host without power closes nothing: it is gone when it does not answer for
# SILENCE seconds, asked every few.
SILENCE, _ASK = 30, 5

# Seconds after which the first process looks whether its own run is over.
_TICK = 0.1

# Seconds that the first process, which ends, gives the others to end too.
_FAREWELL = 1.0

_TOKEN = 16
_BYE = "bye"


class Watch:
  """Ends this process when another one of the job has ended.

  A context manager for the body of a run; it does nothing for one process. It
  is left by all processes together. The process whose body raises what no other
  one can know of ends at once: an orderly shutdown would wait for the others.
  """

  def __init__(
      self,
      agreed: tuple[type[BaseException], ...] = (),
      leave: Callable[[int], Any] = os._exit,
  ) -> None:
    """Makes a watch.

    Args:
      agreed: what all processes raise together.
      leave: ends this process with an exit code, from any thread.
    """
    self._agreed, self._leave = agreed, leave
    self._count, self._index = jax.process_count(), jax.process_index()
    self._lock = threading.Lock()
    self._leaving = False
    self._server: socket.socket | None = None
    self._links: dict[int, socket.socket] = {}
    self._thread = threading.Thread()

  def __enter__(self) -> "Watch":
    if self._count == 1:
      return self
    if self._index == 0:
      self._server = socket.create_server(("", 0), backlog=self._count)
    address, token = _agree_on_place(self._server)
    if self._index == 0:
      self._start(self._listen, token)
    else:
      try:
        link = socket.create_connection(address, timeout=SILENCE)
        link.settimeout(None)
        link.sendall(token + self._index.to_bytes(4, "big"))
        _send(link, socket.gethostname())
      except OSError as error:
        print(
            f"process {self._index}: no connection to process 0 at "
            f"{address[0]}:{address[1]} ({error}); if a process ends, the "
            "others will notice late",
            file=sys.stderr,
        )
        return self
      self._links[0] = _keep_alive(link)
      self._start(self._follow, link)
    return self

  def __exit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      trace: Any,
  ) -> None:
    if self._count == 1:
      return
    if error is not None and not isinstance(error, self._agreed):
      self._fail(error)
    self._leaving = True
    if self._index != 0:
      self._tell(_BYE)
    if self._links or self._index == 0:
      self._thread.join()
    if self._index == 0:
      self._tell(_BYE)
      self._server.close()
    for link in self._links.values():
      link.close()

  def _fail(self, error: BaseException) -> None:
    """Ends this process for a reason of its own, which the others hear."""
    with self._lock:  # Held by the other thread where it ends this process.
      if isinstance(error, (ValueError, OSError)):
        print(f"error: {error}", file=sys.stderr)
      else:
        traceback.print_exception(error)
      text = f"{type(error).__name__}: {error}".splitlines()[0]
      self._tell(f"process {self._index} ({socket.gethostname()}): {text}")
      self._quit(1)

  def _start(self, body: Callable[..., None], *arguments: Any) -> None:
    self._thread = threading.Thread(target=body, args=arguments, daemon=True)
    self._thread.start()

  def _tell(self, text: str) -> None:
    for link in list(self._links.values()):
      try:
        _send(link, text)
      except OSError:
        pass  # That one is gone itself.

  def _quit(self, code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # The others must read the reason before they see this process end: without
    # it the library below aborts them. But no longer than that: it may abort
    # this one too, where a lost process comes back before its time.
    if self._index == 0:
      self._wait_for_others(_FAREWELL)
    self._leave(code)

  def _wait_for_others(self, seconds: float) -> None:
    """Returns when the others have hung up, or after that many seconds."""
    deadline = time.monotonic() + seconds
    for link in list(self._links.values()):
      try:
        link.settimeout(max(deadline - time.monotonic(), 1e-3))
        while link.recv(1024):
          pass
      except OSError:
        pass  # Out of time, or gone.

  def _lost(self, text: str) -> None:
    """Says why this job ends, passes it on, and ends this process."""
    with self._lock:
      print(
          f"process {self._index} stops: {text}. Its own output says more; the "
          "same command on all hosts continues from the last checkpoint",
          file=sys.stderr,
          flush=True,
      )
      if self._index == 0:
        self._tell(text)
      self._quit(LOST)

  def _follow(self, link: socket.socket) -> None:
    """Waits for word from the first process."""
    text = _receive(link)
    if text != _BYE:
      self._lost(text or "process 0, which the others depend on, has ended")

  def _listen(self, token: bytes) -> None:
    """Takes in the others, and waits for word from them until all have left."""
    names: dict[int, str] = {}
    there: set[int] = set()
    patience = SILENCE  # With those that cannot connect, when the run is over.
    with selectors.DefaultSelector() as selector:
      selector.register(self._server, selectors.EVENT_READ, None)
      while (
          there
          or not self._leaving
          or (len(names) < self._count - 1 and patience > 0)
      ):
        patience -= _TICK * self._leaving
        for key, _ in selector.select(_TICK):
          if key.data is None:
            found = _welcome(self._server, token)
            if found is not None:
              index, names[index], link = found
              self._links[index] = link
              there.add(index)
              selector.register(link, selectors.EVENT_READ, index)
            continue
          text = _receive(key.fileobj)
          selector.unregister(key.fileobj)
          there.discard(key.data)
          if text != _BYE:
            who = f"process {key.data} ({names[key.data]}) has ended"
            self._lost(text or who)


def _agree_on_place(
    server: socket.socket | None,
) -> tuple[tuple[str, int], bytes]:
  """((address, port), token) of the first process's server, on all."""
  packet = np.zeros(4 + 2 + _TOKEN, np.uint8)
  if server is not None:
    port = server.getsockname()[1].to_bytes(2, "big")
    text = socket.inet_aton(_own_address()) + port
    packet[:] = list(text + secrets.token_bytes(_TOKEN))
  data = bytes(np.asarray(multihost_utils.broadcast_one_to_all(packet)))
  port = int.from_bytes(data[4:6], "big")
  return (socket.inet_ntoa(data[:4]), port), data[6:]


def _own_address() -> str:
  """The address of this host on its network."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
      probe.connect(("192.0.2.1", 9))  # Sends nothing: it picks a route.
      return probe.getsockname()[0]
    except OSError:
      return "127.0.0.1"


def _welcome(
    server: socket.socket, token: bytes
) -> tuple[int, str, socket.socket] | None:
  """(index, host, connection) of who knocks; None for a stranger."""
  try:
    link, _ = server.accept()
  except OSError:  # Closed: the run is over.
    return None
  try:
    link.settimeout(_ASK)
    if secrets.compare_digest(_read(link, _TOKEN), token):
      index, host = int.from_bytes(_read(link, 4), "big"), _receive(link)
      link.settimeout(None)
      return index, host, _keep_alive(link)
  except OSError:
    pass
  link.close()
  return None


def _keep_alive(link: socket.socket) -> socket.socket:
  link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in (
      ("TCP_KEEPIDLE", _ASK),
      ("TCP_KEEPINTVL", _ASK),
      ("TCP_KEEPCNT", SILENCE // _ASK - 1),
  ):
    if hasattr(socket, name):  # Not on every system.
      link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
  return link


def _send(link: socket.socket, text: str) -> None:
  data = text.encode()[:60_000]
  link.sendall(len(data).to_bytes(2, "big") + data)


def _receive(link: socket.socket) -> str:
  """What the other side says; nothing if it is gone."""
  try:
    size = int.from_bytes(_read(link, 2), "big")
    return _read(link, size).decode()
  except OSError:
    return ""


def _read(link: socket.socket, size: int) -> bytes:
  data = b""
  while len(data) < size:
    part = link.recv(size - len(data))
    if not part:
      raise ConnectionResetError("the other side is gone")
    data += part
  return data
