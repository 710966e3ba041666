"""The compile verb, from its command line to its exit code."""

import importlib.util
import json
import pathlib

import pytest

from mmjax.models import clip, llm
from mmjax.perf import topology
from mmjax.verbs import compile as verb

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"
)


def _run(config, *more):
  return verb.main([f"--config={CONFIGS / config}", *more])


@pytest.mark.slow
@needs_libtpu
def test_train_step(tmp_path, capsys):
  out = tmp_path / "report.json"
  flags = "--topology=v5e:2x2", "--config.mesh.fsdp=2", f"--json={out}"
  assert _run("vit.py", "--config.batch_size=128", *flags) == 0
  report = json.loads(out.read_text())
  assert report["devices"] == 4
  assert report["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1, "context": 1}
  kinds = report["kinds"]
  # Adam keeps two numbers per parameter, beside its counters.
  optimizer = kinds["optimizer"] / kinds["parameters, trained"]
  assert optimizer == pytest.approx(2, rel=1e-3)
  assert kinds["parameters, frozen"] == 0
  assert kinds["shadow"] == kinds["parameters, trained"]
  rows = 128 // 4
  assert kinds["batch"] == rows * (32 * 32 * 3 * 4 + 4)
  assert report["memory"]["arguments"] >= sum(kinds.values())
  assert report["memory"]["total"] < report["hbm"]
  axes = {tuple(c["axes"]) for c in report["collectives"]}
  assert {("fsdp",), ("data",)} <= axes
  assert 0 < report["estimate"]["best"] < report["estimate"]["worst"]
  assert report["notes"] == []
  printed = capsys.readouterr().out
  assert "ViT, train step of 128 examples on v5e:2x2: 4 devices" in printed
  assert "fits (compiled in" in printed


def _tower(spec, length):
  """FLOPs of the blocks of one tower, by hand: products and attention."""
  width, mlp = spec["width"], spec["mlp"]
  products = 2 * length * (4 * width**2 + 2 * width * mlp)
  return spec["depth"] * (products + 4 * length**2 * width)


@pytest.mark.slow
@needs_libtpu
def test_inference_step_on_two_slices(tmp_path):
  out = tmp_path / "report.json"
  flags = "--topology=v5e:1x1*2", "--what=inference", f"--json={out}"
  assert _run("clip.py", "--config.batch_size=64", *flags) == 0
  report = json.loads(out.read_text())
  assert report["mesh"]["data"] == 2
  assert set(report["kinds"]) == {"parameters", "mutables", "batch"}
  vision, text = clip.SIZES["tiny"]["vision"], clip.SIZES["tiny"]["text"]
  side, patch = vision["image"][0], vision["patch"]
  patches = (side // patch) ** 2
  stem = 2 * patches * 3 * patch**2 * vision["width"]
  ends = 2 * vision["embed"] * (vision["width"] + text["width"])
  pair = stem + ends + _tower(vision, 1 + patches)
  pair += _tower(text, text["length"])
  assert report["flops"]["total"] == 64 * pair


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit(capsys):
  flags = "--topology=v5e:1x1", "--what=inference"
  code = _run("clip.py", *flags, "--config.batch_size=4194304")
  assert code == verb.DOES_NOT_FIT
  printed = capsys.readouterr().out
  assert "does not fit: RESOURCE_EXHAUSTED" in printed
  # What is known without the compiler is still there.
  assert "parameters" in printed
  assert "all devices" in printed


@pytest.mark.slow
@needs_libtpu
def test_mesh_of_another_size(capsys):
  flags = "--topology=v5e:2x2", "--config.mesh.fsdp=3"
  assert _run("clip.py", *flags) == 1
  assert "needs a product of 4 devices" in capsys.readouterr().err


def test_unknown_topology(capsys):
  assert _run("clip.py", "--topology=v5e:5x5") == 1
  error = capsys.readouterr().err
  assert error.startswith("error: topology 'v5e:5x5'")
  assert "known: 1x1, 2x2" in error


def test_missing_libtpu(capsys, monkeypatch):
  monkeypatch.setattr(topology, "find_spec", lambda name: None)
  assert _run("clip.py", "--topology=v5e:2x2") == 1
  assert 'pip install "libtpu' in capsys.readouterr().err


def test_quantities_read_well():
  assert verb._memory(1536) == "1.50 KiB"
  assert verb._memory(3 * 2**41) == "6,144.00 GiB"
  assert verb._work(2.5e15) == "2.50 PFLOP"
  assert verb._duration(0.0456) == "45.60 ms"
  assert verb._duration(123) == "123.00 s"
  assert verb._sent(0) == "0.00 B"




@pytest.mark.slow
@needs_libtpu
def test_decode_step_reads_parameters_and_cache(tmp_path, capsys):
  out = tmp_path / "report.json"
  flags = (
      "--topology=v5e:2x2", "--what=decode", "--slots=2048", f"--json={out}",
      "--config.batch_size=8", "--config.mesh.data=4",
  )
  assert _run("llava.py:size=tiny,stage=finetune", *flags) == 0
  report = json.loads(out.read_text())
  decoder = llm.SIZES["tiny"]
  head = decoder["width"] // decoder["heads"]
  numbers = decoder["depth"] * decoder["groups"] * head
  row = 2 * 2048 * numbers * 4  # Keys and values in float32.
  lengths = 8 * 4  # Of all rows, on every device.
  assert report["kinds"]["cache"] == 8 // 4 * row + lengths
  memory = report["memory"]
  assert memory["temporaries"] < report["kinds"]["cache"]
  # All is read once; what is small is counted on top.
  floor = sum(report["kinds"].values())
  assert report["traffic"] < 3 * floor
  assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config,flags,message",
    [
        ("vit.py", ["--what=decode"], "ViT does not write"),
        ("vit.py", ["--slots=9"], "--slots belongs to --what=decode"),
    ],
)
@needs_libtpu
def test_decode_flags_that_do_not_fit(config, flags, message, capsys):
  assert _run(config, "--topology=v5e:1x1", *flags) == 1
  assert message in capsys.readouterr().err
