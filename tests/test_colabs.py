"""Every notebook runs from top to bottom, on a CPU, and carries no output."""

import os
import pathlib

import jax
import nbclient
import nbformat
import pytest

import mmjax
from mmjax import verbs
from mmjax.data import tokenizers
from mmjax.nn import partitioning
from mmjax.train import stage as stages

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))

# What the tests set: small models, few steps, no network.
SETTINGS = {
    "compile_for_a_pod": dict(
        CONFIG="configs/clip.py:size=tiny", TOPOLOGIES="v5e:2x2"
    ),
}


@pytest.fixture
def settings(request, tmp_path):
  name = request.param
  found = dict(
      MMJAX_ROOT=str(ROOT), RUNS=str(tmp_path), STEPS="2", JAX_PLATFORMS="cpu"
  )
  if name == "import_zero_shot":
    found["CHECKPOINT"] = str(checkpoint(tmp_path / "clip"))
  return name, found | SETTINGS.get(name, {})


def checkpoint(directory):
  """A directory as transformers saves one, of a CLIP that knows nothing."""
  config = verbs.load_config(f"{ROOT}/configs/clip.py:size=tiny")
  system = stages.from_config(config).system
  inputs = system.init(
      jax.random.key(0),
      jax.numpy.zeros((1, *system.vision.image, 3)),
      jax.numpy.zeros((1, system.text.length), "int32"),
  )
  mmjax.save_pretrained(directory, system, partitioning.unbox(inputs))
  tokenizer = tokenizers.ClipTokenizer.tinyworld(length=system.text.length)
  tokenizer.save_pretrained(directory)
  return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [path.stem for path in NOTEBOOKS], indirect=True
)
def test_runs(settings, monkeypatch, tmp_path):
  name, values = settings
  for key, value in values.items():
    monkeypatch.setenv(key, value)
  # A notebook has one device, as its users have.
  monkeypatch.setenv("XLA_FLAGS", "")
  notebook = nbformat.read(ROOT / "colabs" / f"{name}.ipynb", 4)
  nbclient.NotebookClient(
      notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
  ).execute()
  shown = [
      output
      for cell in notebook.cells
      for output in cell.get("outputs", ())
      if "image/png" in output.get("data", {})
  ]
  assert shown
  keep = os.environ.get("MMJAX_KEEP_NOTEBOOKS")
  if keep:
    nbformat.write(notebook, pathlib.Path(keep) / f"{name}.ipynb")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_carries_no_output(path):
  notebook = nbformat.read(path, 4)
  nbformat.validate(notebook)
  for cell in notebook.cells:
    assert not cell.get("outputs")
    assert cell.get("execution_count") is None
