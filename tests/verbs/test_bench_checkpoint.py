"""The verb bench on saving: what its row says."""

import json

import jax
import pytest

from mmjax.__main__ import main
from tests.verbs.test_bench import CONFIG, ROOT


@pytest.fixture
def cache():
  before = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update("jax_compilation_cache_dir", before)


def test_a_row_says_how_long_a_save_holds_a_run_up(tmp_path, capsys, cache):
  (tmp_path / "vit.py").write_text(CONFIG.format(root=ROOT, system="vit"))
  code = main([
      "bench", "checkpoint", f"--configs={tmp_path}", "--sizes=vit:tiny:8",
      f"--folder={tmp_path}", "--rounds=2", f"--json={tmp_path}/rows.json",
      "--compilation_cache=",
  ])
  assert code == 0
  (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
  assert [len(times) for times in row["rounds"].values()] == [2] * 4
  # Parameters and a moving average of the same size, at least.
  assert row["bytes"] >= 2 * 4 * row["parameters"]
  assert 0 < row["blocked"] < row["whole"]
  assert row["share"] == pytest.approx(row["blocked"] / row["step"])
  assert f"{row['parameters']:,}" in capsys.readouterr().out
  assert not list(tmp_path.glob("tmp*"))
