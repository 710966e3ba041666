"""A run on a user's own files, some of them broken."""

import json
import re

from mmjax.__main__ import main
from tests.data.sources import files

CONFIG = """
from tests.train import toy_run

def get_config(arg=None):
  config = toy_run.get_config()
  config.unlock()
  kinds = "mmjax.data.sources:"
  source = dict(
      type=kinds + "Examples",
      max_bad=0.1,
      records=dict(type=kinds + "WebDataset", path="{path}"),
      fields=dict(
          image=dict(type=kinds + "Picture", field="png", size=4),
          label=dict(type=kinds + "Label", field="cls"),
      ),
  )
  config.streams = (dict(source=source, weight=1.0),)
  config.steps, config.log_every, config.checkpoint_every = 8, 4, 0
  return config.lock()
"""


def train(folder, bad, count=40):
  """Runs the verb; returns its exit code."""
  rows = []
  for i in range(count):
    data = files.picture(i, size=(4, 4))
    rows.append((f"{i:03}.png", data[:45] if i in bad else data))
    rows.append((f"{i:03}.cls", str(i % 4).encode()))
  path = files.write_tar(folder / "data.tar", rows)
  (folder / "config.py").write_text(CONFIG.format(path=path))
  return main([
      "train", f"--config={folder}/config.py", f"--workdir={folder}/run",
  ])


def test_bad_records_are_listed_and_counted(tmp_path):
  assert train(tmp_path, bad=(0, 7)) == 0
  listed = (tmp_path / "run/quarantine.jsonl").read_text().splitlines()
  entries = [json.loads(line) for line in listed]
  assert sorted(entry["index"] for entry in entries) == [0, 7]
  assert entries[0]["record"] == f"{tmp_path}/data.tar:000"
  metrics = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
  found = [json.loads(line).get("quarantined") for line in metrics]
  assert [count for count in found if count is not None][-1] == 2


def test_too_many_bad_records_end_a_run(tmp_path, capsys):
  assert train(tmp_path, bad=range(3, 15)) == 1
  error = capsys.readouterr().err
  # Threads that read ahead may add more before the run hears of the fifth.
  found = re.search(r"(\d+) bad records of 40, more than max_bad=0.1", error)
  assert 5 <= int(found[1]) <= 12
  assert "data.tar:0" in error and "quarantine.jsonl" in error
