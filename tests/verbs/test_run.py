"""The verbs train, evaluate and config from their command lines."""

import json
import pathlib

import jax
import pytest
import yaml

from mmjax import verbs
from mmjax.__main__ import main
from mmjax.train import loop, stopper

CONFIG = ["--config", "tests/train/toy_run.py"]


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
  monkeypatch.chdir(pathlib.Path(__file__).parents[2])
  before = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update("jax_compilation_cache_dir", before)


def run(capsys, *argv):
  code = main(list(argv))
  captured = capsys.readouterr()
  return code, captured.out, captured.err


def test_train_evaluate_and_what_they_write(tmp_path, capsys):
  code, out, err = run(
      capsys, "train", *CONFIG, "--config.steps=4", "--workdir",
      str(tmp_path / "run"), "--compilation_cache", str(tmp_path / "cache"),
  )
  assert code == 0, err
  assert "step 4/4  loss" in out and "examples_per_second" in out
  stored = json.loads((tmp_path / "run" / "config.json").read_text())
  assert stored["steps"] == 4
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  # Without --config, the evaluators of the run itself.
  code, out, err = run(
      capsys, "evaluate", "--workdir", str(tmp_path / "run"),
      "--compilation_cache=",
  )
  assert code == 0, err
  found = json.loads((tmp_path / "run" / "eval.json").read_text())
  assert found == {
      "step": 4, "head/norm": pytest.approx(results["head_norm"])
  }
  assert "head/norm" in out
  code, out, err = run(
      capsys, "evaluate", *CONFIG, "--workdir", str(tmp_path / "run"),
      "--step=3", "--compilation_cache=",
  )
  assert code == 1 and "step 3, found steps [4]" in err
  # Another config in the same directory.
  code, out, err = run(
      capsys, "train", *CONFIG, "--config.seed=9", "--config.steps=4",
      "--workdir", str(tmp_path / "run"), "--compilation_cache=",
  )
  assert code == 1 and "seed: 0 there, 9 here" in err


def test_config_shows_and_checks(capsys):
  code, out, err = run(
      capsys, "config", *CONFIG, "--config.batch_size=64", "--devices=32"
  )
  assert code == 0, err
  text, _, facts = out.partition("\n\n")
  assert yaml.safe_load(text)["batch_size"] == 64
  assert "trained  852 parameters" in facts
  assert "mesh     data 32 x fsdp 1" in facts
  assert "image float32[64, 4, 4, 3]" in facts
  assert facts.rstrip().endswith("ok")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["config", *CONFIG, "--config.stpes=3"], "did you mean 'steps'"),
        (
            ["config", *CONFIG, "--config.streams[0].source.bda=1"],
            "did you mean 'streams[0].source.bad'",
        ),
        (["config", *CONFIG, "--config.steps=many"], "steps"),
        (["config", *CONFIG, "--devcies=8"], "did you mean 'devices'"),
        (["config", *CONFIG, "--devices=3"], "not divisible by the 3 parts"),
        (["config", *CONFIG, "extra"], r"unexpected arguments ['extra']"),
        (["config", "--config", "configs/absent.py"], "absent.py"),
        (["config", "--config=configs/vit.py:size=b17"], "did you mean 'b16'"),
        (["config"], "--config"),
        (["train", *CONFIG], "--workdir"),
        (["train", *CONFIG, "--workdir=x", "--profile=3"], "FIRST:LAST"),
        (
            ["train", *CONFIG, "--workdir=x", "--num_processes=2"],
            "belong together",
        ),
        (["evaluate", "--workdir=/nonexistent"], "no run directory"),
    ],
)
def test_wrong_input_is_one_message(capsys, argv, message):
  code, _, err = run(capsys, *argv)
  assert code == verbs.WRONG
  assert err.startswith("error: ") and message in err
  assert "Traceback" not in err
  assert not pathlib.Path("x").exists()


def test_overrides_reach_into_lists(capsys):
  code, out, err = run(
      capsys, "config", *CONFIG, "--config.optim[0][1].lr=0.5",
      "--config.streams[0].source.bad=True",
  )
  assert code == 0, err
  found = yaml.safe_load(out.partition("\n\n")[0])
  assert found["optim"][0][1]["lr"] == 0.5
  assert found["streams"][0]["source"]["bad"] is True


def test_debug_raises(capsys):
  with pytest.raises(ValueError, match="unknown flag"):
    main(["config", *CONFIG, "--devcies=8", "--debug"])


@pytest.mark.parametrize("verb", ["train", "evaluate", "config"])
def test_help_of_a_verb(capsys, verb):
  code, out, _ = run(capsys, verb, "--help")
  assert code == 0
  assert f"mmjax {verb}" in out and "--config" in out


@pytest.mark.parametrize(
    "error, code",
    [
        (loop.NotFiniteError("many"), 3),
        (stopper.InterruptedRun(15, 7), 143),
        (stopper.InterruptedRun(2, 7), 130),
        (ValueError("wrong"), 1),
    ],
)
def test_exit_codes(tmp_path, capsys, monkeypatch, error, code):
  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(loop, "train", fail)
  argv = ["train", *CONFIG, "--workdir", str(tmp_path), "--compilation_cache="]
  assert run(capsys, *argv)[0] == code


def test_where_compiled_programs_are_kept():
  find = verbs.default_cache
  assert find({"JAX_COMPILATION_CACHE_DIR": "/a"}) == "/a"
  assert find({"XDG_CACHE_HOME": "/b"}) == "/b/mmjax/compiled"
  assert find({}).endswith("/.cache/mmjax/compiled")
