"""Every test sees eight CPU devices; most use only the first."""

import os
import shutil
import tempfile

import pytest

# On another platform only what asks for it is run: `kernels/test_on_gpu.py`.
os.environ["JAX_PLATFORMS"] = os.environ.get("MMJAX_TEST_PLATFORM", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
  os.environ["XLA_FLAGS"] = (
      os.environ.get("XLA_FLAGS", "")
      + " --xla_force_host_platform_device_count=8"
      # The tests compile much and compute little.
      + " --xla_backend_optimization_level=0"
      + " --xla_cpu_use_fusion_emitters=false"
      # With it XLA:CPU may start collectives on its fake devices in different
      # orders, and wait for ever.
      + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
  )
# A collective holds a thread of XLA's pool on every fake device until all have
# come to it. As many threads as cores are too few: those that wait keep out
# those that are waited for.
os.environ["NPROC"] = "64"

# What one test has compiled, a resumed run and another process need not.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_OWN_CACHE = _CACHE not in os.environ
if _OWN_CACHE:
  os.environ[_CACHE] = tempfile.mkdtemp(prefix="mmjax-programs-")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


def pytest_unconfigure():
  """The workers of a run share the cache of the process that started them."""
  if _OWN_CACHE:
    shutil.rmtree(os.environ[_CACHE], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
  """Compiled programs of one file of tests are of no use to the next."""
  yield
  import jax  # Behind the settings above.

  jax.clear_caches()
