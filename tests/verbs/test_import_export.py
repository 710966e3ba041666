"""A public checkpoint becomes a run, and a run a public checkpoint."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax.__main__ import main
from mmjax.models import vit
from mmjax.nn import partitioning
from mmjax.train.state import flat

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = [
    "--config",
    f"{ROOT / 'configs' / 'vit.py'}:size=tiny",
    "--config.system.pool=token",
    "--config.shadow=()",
    "--config.eval_shadow=False",
    "--compilation_cache=",
]


def donor(folder, **changes):
  system = vit.ViT(**vit.SIZES["tiny"]).clone(**changes)
  init = lambda: system.init(jax.random.key(7), jnp.zeros((1, 32, 32, 3)))
  variables = partitioning.unbox(jax.jit(init)())
  mmjax.save_pretrained(folder, system, variables)
  return variables


def test_there_and_back(tmp_path, capsys):
  source, run, out = (tmp_path / n for n in ("source", "run", "out"))
  variables = donor(source)
  where = ["--workdir", str(run)]
  assert main(["import", *CONFIG, "--source", str(source), *where]) == 0
  assert main(["export", *where, "--out", str(out)]) == 0
  back = mmjax.from_pretrained(out).variables
  for path, leaf in flat(back["params"]).items():
    np.testing.assert_array_equal(leaf, flat(variables["params"])[path])
  # A run that has begun is left alone.
  assert main(["import", *CONFIG, "--source", str(source), *where]) == 1
  assert "stands at step 0" in capsys.readouterr().err


@pytest.mark.slow
def test_training_goes_on_from_the_imported_parameters(tmp_path):
  source, run = tmp_path / "source", tmp_path / "run"
  variables = donor(source)
  few = ["--config.steps=1", "--config.lr=0.0", "--config.batch_size=8"]
  command = [*CONFIG, *few, "--workdir", str(run)]
  assert main(["import", *command, "--source", str(source)]) == 0
  assert main(["train", *command]) == 0
  out = tmp_path / "out"
  assert main(["export", "--workdir", str(run), "--out", str(out)]) == 0
  back = flat(mmjax.from_pretrained(out).variables["params"])
  for path, leaf in flat(variables["params"]).items():
    np.testing.assert_allclose(back[path], leaf, atol=1e-6)


def test_another_network_is_refused(tmp_path, capsys):
  donor(tmp_path / "source", activation="relu", mlp=100)
  code = main([
      "import", *CONFIG, "--source", str(tmp_path / "source"),
      "--workdir", str(tmp_path / "run"),
  ])
  error = capsys.readouterr().err
  assert code == 1 and "config.system.activation: 'relu' there" in error
  assert "config.system.mlp: 100 there, 384 here" in error


@pytest.mark.parametrize(
    "files", ["clip.py", pytest.param("*.py", marks=pytest.mark.slow)]
)
def test_systems_counts_what_the_configs_describe(files, tmp_path, capsys):
  for path in (ROOT / "configs").glob(files):
    shutil.copy(path, tmp_path)
  assert main(["systems", "--configs", str(tmp_path)]) == 0
  lines = capsys.readouterr().out.splitlines()
  row = next(line.split() for line in lines if line.startswith("clip  ") and
             " l14 " in line)
  assert row[1:] == ["l14", "427,616,513", "contrastive"]
  assert main(["systems", "--configs", "absent"]) == 1


@pytest.mark.parametrize("verb", ["import", "export", "systems"])
def test_help(verb, capsys):
  assert main([verb, "--help"]) == 0
  assert f"mmjax {verb}" in capsys.readouterr().out
