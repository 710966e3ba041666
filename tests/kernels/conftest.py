"""What tests of interpreted GPU kernels share."""

import functools
import threading

import jax
from jax._src import core as jax_core
import pytest


@pytest.fixture(scope="module")
def compile_once():
  """The interpreter compiles a kernel anew for every block of threads.

  Once is enough, and several times faster.
  """
  thread_map = pytest.importorskip(
      "jax._src.pallas.mosaic.interpret.thread_map"
  )
  compiled, lock = {}, threading.Lock()

  def run(jaxpr, consts, *args):
    with lock:
      if id(jaxpr) not in compiled:
        evaluate = jax.jit(functools.partial(jax_core.eval_jaxpr, jaxpr))
        program = evaluate.lower(consts, *args).compile()
        # The program keeps no hold on the jaxpr, whose id must stay its own.
        compiled[id(jaxpr)] = jaxpr, program
    compiled[id(jaxpr)][1](consts, *args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(thread_map, "_run_jaxpr", run)
    yield
