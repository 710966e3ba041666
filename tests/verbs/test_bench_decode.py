"""The verb `bench decode`, and the decoder's twin of `bench train`."""

import json
import pathlib

import jax
import pytest

from mmjax.__main__ import main
from mmjax.models import llm
from mmjax.verbs import _timing

ROOT = pathlib.Path(__file__).parents[2]

# The real config, made smaller.
CONFIG = f"""
from mmjax import verbs

def get_config(arg):
  config = verbs.load_config("{ROOT}/configs/llm.py:size=tiny")
  config.system.update(depth=2, width=32, heads=4, groups=2, mlp=48)
  return config
"""


@pytest.fixture
def out(tmp_path, monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  (tmp_path / "llm.py").write_text(CONFIG)
  small = dict(llm.SIZES["tiny"], vocab=60, depth=2)
  monkeypatch.setitem(llm.SIZES, "smaller", small)
  monkeypatch.setattr(_timing, "TURN_SECONDS", 0.0)
  monkeypatch.setattr(_timing, "TURN_STEPS", 1)
  yield tmp_path / "out.json"
  jax.config.update("jax_compilation_cache_dir", before)


def run(out, *argv):
  code = main([
      "bench", *argv, "--rounds=2", "--patience=0", "--compilation_cache=",
      f"--json={out}",
  ])  # fmt: skip
  return code, json.loads(out.read_text())["rows"] if code == 0 else None


def test_rows_of_ours(out, capsys, monkeypatch):
  monkeypatch.setattr(_timing, "version", lambda package: None)
  monkeypatch.setattr(_timing, "product_rate", lambda: 5e10)
  code, (row,) = run(out, "decode", "--cases=smaller:3:5:4")
  assert code == 0
  assert (row["case"], row["name"], row["slower"]) == (
      "smaller:3:5:4", "mmjax", 1.0
  )
  assert row["tokens_per_second"] == pytest.approx(12 / row["seconds"])
  *_, columns, line = capsys.readouterr().out.splitlines()
  assert columns.split() == ["case", "by", "ms", "spread", "slower", "tokens/s"]
  assert line.split()[:2] == ["smaller:3:5:4", "mmjax"]


@pytest.mark.slow
def test_generate_writes_the_same_tokens(out, capsys):
  """The check inside the verb passes."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  code, rows = run(out, "decode", "--cases=smaller:3:5:6")
  captured = capsys.readouterr()
  assert code == 0, captured.err
  names = [row["name"] for row in rows]
  assert names[:3] == ["mmjax", "dynamic", "static"]
  assert names[3:] == ["compile"] or "no compile: " in captured.out


@pytest.mark.slow
def test_the_decoders_twin_is_the_same_network(out, capsys):
  """Loss and gradient of packed rows."""
  pytest.importorskip("torch")
  code, rows = run(
      out, "train", f"--configs={out.parent}", "--sizes=llm:tiny:8"
  )
  assert code == 0, capsys.readouterr().err
  assert [row["step"] for row in rows][:2] == ["mmjax", "eager"]


@pytest.mark.parametrize(
    "cases, message",
    [
        ("tiny:1:2", "'tiny:1:2': expected SIZE:BATCH:PROMPT:NEW"),
        ("tiny:1:0:3", "expected SIZE:BATCH:PROMPT:NEW"),
        ("tinny:1:2:3", "did you mean 'tiny'"),
    ],
)
def test_what_is_refused(cases, message, capsys):
  assert main(["bench", "decode", f"--cases={cases}"]) == 1
  assert message in capsys.readouterr().err
