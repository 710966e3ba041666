"""The verb data: look, count, convert."""

import json
import os

import numpy as np
from PIL import Image
import pytest

from mmjax.__main__ import main
from mmjax.data import sources
from tests.data.sources import files


@pytest.fixture
def folder(tmp_path):
  pytest.importorskip("soundfile")
  rows = [files.record(i) for i in range(5)]
  rows[1]["png"] = rows[1]["png"][:20]
  (tmp_path / "in").mkdir()
  files.make("webdataset", tmp_path / "in", rows)
  return tmp_path


def run(*argv):
  return main(["data", *argv])


def test_show(folder, capsys):
  figure = folder / "sheet.png"
  source = f"--source={folder}/in"
  assert run("show", source, "--count=2", f"--figure={figure}") == 0
  text = capsys.readouterr().out
  assert "5 records (WebDataset) with png, wav, txt, json, __key__" in text
  assert f"{folder}/in/part-0.tar:0000\n" in text
  assert "  png      PNG 12 x 10, RGB, " in text
  assert "  wav      WAV 0.02 s, 8000 Hz, 1 ch, 364 bytes" in text
  assert "  txt      'number 0'" in text
  assert "broken" in text  # The picture of the second.
  assert "number 2" not in text
  sheet = np.asarray(Image.open(figure))
  assert sheet.ndim == 3 and (sheet[20, 40] == files.shade(0)).all()


def test_show_does_not_print_what_moves_the_cursor(tmp_path, capsys):
  (tmp_path / "a.txt").write_text("x\x1b[2Jy\rz" * 100)
  assert run("show", f"--source={tmp_path}") == 0
  text = capsys.readouterr().out
  assert "\x1b" not in text and "\\x1b[2J" in text and "..." in text


def test_stats(folder, capsys):
  path = folder / "out.json"
  assert run("stats", f"--source={folder}/in", f"--json={path}") == 0
  text = capsys.readouterr().out
  assert "5 records, 1 faults" in text
  lines = {line.split()[0]: line for line in text.splitlines() if line}
  assert "100.0%  PNG " in lines["png"] and "12, 12, 12 wide" in lines["png"]
  assert "0.02, 0.02, 0.02 s; 0.00 h in all" in lines["wav"]
  assert f"{folder}/in/part-0.tar:0001: png: PNG: " in text
  found = json.loads(path.read_text())
  assert found["fields"]["txt"]["count"] == found["records"] == 5
  assert run("stats", f"--source={folder}/in", "--limit=2") == 0
  assert "5 records, 2 of them read, 0 faults" in capsys.readouterr().out


def test_convert(folder, capsys):
  out = f"{folder}/out"
  convert = ("convert", f"--source={folder}/in", f"--out={out}")
  assert run(*convert, "--format=parquet", "--shard_size=2") == 0
  assert f"5 records in {out} (parquet)" in capsys.readouterr().out
  assert sorted(os.listdir(out)) == [f"{i:05}.parquet" for i in range(3)]
  assert sources.open_records(out)[4]["txt"] == b"number 4"
  assert run(*convert) == 1
  assert f"--out: {out} exists" in capsys.readouterr().err


def test_what_cannot_be_read_is_left_out_and_listed(folder, capsys):
  path = folder / "in" / "0003.txt"
  path.symlink_to("nowhere")
  for other in ("part-0.tar", "part-1.tar"):
    (folder / "in" / other).unlink()
  (folder / "in" / "0004.txt").write_text("x")
  out = f"{folder}/out"
  argv = ("convert", f"--source={folder}/in", f"--out={out}")
  assert run(*argv, "--format=folder") == 0
  listed = f"{out}.left-out.txt"
  assert f"1 could not be read and were left out: see {listed}" in (
      capsys.readouterr().out
  )
  assert "0003: 0003.txt: no regular file" in open(listed).read()
  assert len(sources.open_records(out)) == 1


@pytest.mark.parametrize(
    "argv,message",
    [
        ([], "say what to do: mmjax data show|stats|convert"),
        (["sho"], "did you mean 'show'"),
        (["show"], "--source: say where"),
        (["show", "--source=/no/where"], "there is nothing at /no/where"),
        (["show", "--source=/tmp", "--split=train"], "splits"),
        (["convert", "--source=x"], "--out: say which directory"),
        (["stats", "--limit=0"], "limit"),
        (["stats", "--sorce=x"], "did you mean 'source'"),
    ],
)
def test_what_is_refused(argv, message, capsys, tmp_path, monkeypatch):
  (tmp_path / "a.txt").touch()
  argv = [word.replace("/tmp", str(tmp_path)) for word in argv]
  assert run(*argv) == 1
  assert message in capsys.readouterr().err
