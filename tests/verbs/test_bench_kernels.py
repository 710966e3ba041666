"""The verb bench on attention and quantizers: what its rows say."""

import json
import pathlib

import jax
import numpy as np
import pytest

from mmjax.__main__ import main
from mmjax.nn import mask as masks
from mmjax.verbs import _bench_attention, _bench_vq, _timing


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """Short turns, and without PyTorch."""
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setattr(_timing, "TURN_SECONDS", 0.0)
  monkeypatch.setattr(_timing, "TURN_STEPS", 1)
  monkeypatch.setattr(_timing, "version", lambda package: None)
  monkeypatch.setattr(_timing, "product_rate", lambda: 5e10)
  yield
  jax.config.update("jax_compilation_cache_dir", before)


def rows_of(tmp_path, *argv):
  path = tmp_path / "out.json"
  code = main([
      "bench", *argv, "--rounds=2", "--patience=0", "--compilation_cache=",
      f"--json={path}",
  ])
  assert code == 0
  return json.loads(path.read_text())["rows"]


def test_attention(tmp_path, capsys):
  found = rows_of(tmp_path, "attention", "--cases=window:600:2:32")
  names = [(row["passes"], row["name"]) for row in found]
  assert names == [
      (passes, name)
      for passes in ("forward", "both")
      for name in ("mmjax", "dense", "jax.nn")
  ]
  pairs = int(np.asarray(masks.window(600, 37).dense()).sum())
  for row in found:
    assert row["error"] < 2e-6
    products = 2 if row["passes"] == "forward" else 7
    assert row["flop_rate"] * row["seconds"] == pytest.approx(
        products * 2 * 32 * 2 * pairs
    )
  by = {(row["passes"], row["name"]): row["bytes"] for row in found}
  assert by["both", "dense"] > 600 * 600 * 2 * 4
  out = capsys.readouterr().out
  assert "window:600:2:32" in out and "5e10" not in out


def test_attention_on_paper(tmp_path):
  cases = ["full", "causal", "window", "packed", "var", "chunks"]
  found = rows_of(
      tmp_path, "attention", "--paper",
      "--cases=" + ",".join(f"{name}:8192:8:128" for name in cases),
  )
  v5e = {
      row["case"].split(":")[0]: row
      for row in found if row["chip"] == "TPU v5 lite"
  }
  whole = v5e["full"]
  assert whole["visited"] == whole["tiles"] == 16**2
  # Half of all tiles, and half of the diagonal.
  assert v5e["causal"]["visited"] == (16**2 + 16) / 2
  assert v5e["causal"]["seconds"] / whole["seconds"] == pytest.approx(17 / 32)
  # A window of 512 keys spans two tiles of 512; 32 blocks of 256 lie within
  # the 16 tiles of the diagonal.
  assert v5e["window"]["visited"] == 31
  assert v5e["chunks"]["visited"] == 16
  for row in v5e.values():
    tiles = row["visited"] / whole["visited"]
    assert row["seconds"] / whole["seconds"] == pytest.approx(tiles)
    assert 0 < row["share"] < 1 and row["vmem"] < 16 * 2**20
    assert tiles <= row["nbytes"] / whole["nbytes"] < tiles + 0.1


def test_vq(tmp_path):
  found = rows_of(tmp_path, "vq", "--cases=700:130:16,300:40:8:3")
  assert [(row["case"], row["name"]) for row in found] == [
      ("700:130:16", "mmjax"), ("700:130:16", "matrix"),
      ("300:40:8:3", "mmjax"), ("300:40:8:3", "lookups"),
  ]
  for row, flops in zip(found, (2 * 700 * 130 * 16,) * 2):
    assert row["flop_rate"] * row["seconds"] == pytest.approx(flops)
  assert all(row["wrong"] == 0 for row in found)


def test_a_wrong_code_is_found():
  rng = np.random.default_rng(0)
  x, books = rng.normal(size=(20, 4)), rng.normal(size=(2, 7, 4))
  codes = np.zeros((20, 2), int)
  rest = x
  for level, book in enumerate(books):
    distances = np.square(rest[:, None] - book).sum(-1)
    codes[:, level] = distances.argmin(1)
    rest = rest - book[codes[:, level]]
  assert _bench_vq.wrong(x, books, codes) == 0
  codes[3, 1] = (codes[3, 1] + 1) % 7
  codes[5, 0] = (codes[5, 0] + 1) % 7
  assert _bench_vq.wrong(x, books, codes) == pytest.approx(2 / 20)


def test_patterns_are_of_the_length_that_is_asked_for():
  for make in _bench_attention.PATTERNS.values():
    assert make(masks, 1000).shape == (1000, 1000)


@pytest.mark.parametrize("argv,message", [
    (["attention", "--cases=cusal:8:1:8"], "'cusal:8:1:8': expected PATTERN"),
    (["attention", "--cases=causal:8:1"], "expected PATTERN:LENGTH:HEADS:DIM"),
    (["vq", "--cases=8:0:8"], "'8:0:8': expected ROWS:CODES:DIM"),
    (["vq", "--dtype=float32"], "unknown flag --dtype"),
])
def test_what_is_refused(argv, message, capsys):
  assert main(["bench", *argv]) == 1
  assert message in capsys.readouterr().err


def test_twins_of_attention_and_lookup_agree():
  torch = pytest.importorskip("torch")
  from mmjax.verbs import _bench_torch

  rng = np.random.default_rng(0)
  arrays = rng.normal(size=(4, 1, 20, 2, 8)).astype("f4")
  mask = masks.causal(20)
  interval = [np.asarray(x)[0] for x in (mask.block, mask.first, mask.last)]
  steps, _ = _bench_torch.attention_contestants(
      "causal", interval, arrays, "float32", 1
  )
  assert "sdpa forward" in steps and "sdpa both" in steps
  steps["sdpa both"]()
  steps, _ = _bench_torch.vq_contestants(
      arrays[0, 0, :, 0], arrays[1, 0, :, 0], 1
  )
  steps["cdist"]()
  assert torch.get_num_threads() == 1


def test_documented_flags_exist():
  text = pathlib.Path("README.md").read_text()
  assert "mmjax bench attention --cases causal:4096:4:64" in text
  values = _bench_attention.prepare(
      type("Flags", (), {"cases": ["causal:4096:4:64"]})
  )
  assert values == [("causal", 4096, 4, 64)]
