"""Tars of every sort: plain, foreign, hostile, broken."""

import io
import os
import tarfile

import pytest

from mmjax.data.sources import BadRecord, Limits, WebDataset
from tests.data.sources.files import write_tar

PAIRS = [
    ("a/one.jpg", b"1"),
    ("a/one.seg.PNG", b"2"),
    ("b/one.jpg", b"3"),
    ("b/two.txt", b"4"),
]


def member(name, kind, link=""):
  info = tarfile.TarInfo(name)
  info.type, info.linkname = kind, link
  return info


def test_members_of_one_name_are_a_record(tmp_path):
  records = WebDataset(write_tar(tmp_path / "a.tar", PAIRS))
  assert [records[i] for i in range(len(records))] == [
      {"__key__": "a/one", "jpg": b"1", "seg.png": b"2"},
      {"__key__": "b/one", "jpg": b"3"},
      {"__key__": "b/two", "txt": b"4"},
  ]
  assert records.fields == ("jpg", "seg.png", "txt", "__key__")
  assert records.name(2) == f"{tmp_path}/a.tar:b/two"


@pytest.mark.parametrize(
    "form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_formats_of_tars(form, tmp_path):
  name = "deep/" * 30 + "ünï" * 20
  if form == tarfile.USTAR_FORMAT:
    name = "deep/" * 10 + "name"
  data = os.urandom(3000)
  with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
    info = tarfile.TarInfo(f"{name}.bin")
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
  records = WebDataset(str(tmp_path / "a.tar"))
  assert records[0] == {"__key__": name, "bin": data}


def test_hostile_members_are_only_names(tmp_path):
  """Nothing is written, and nothing outside of the tar is read."""
  secret = tmp_path / "secret.txt"
  secret.write_text("secret")
  path = write_tar(
      tmp_path / "a.tar",
      [
          member("link.txt", tarfile.SYMTYPE, str(secret)),
          member("hard.txt", tarfile.LNKTYPE, "../secret.txt"),
          member("pipe.txt", tarfile.FIFOTYPE),
          member("device.txt", tarfile.CHRTYPE),
          member("folder.txt", tarfile.DIRTYPE),
          ("../../outside.txt", b"1"),
          ("/absolute.txt", b"2"),
          (".hidden", b"3"),
          ("no_ending", b"4"),
      ],
  )
  before = sorted(os.listdir(tmp_path))
  records = WebDataset(path)
  found = [records[i] for i in range(len(records))]
  assert [record["txt"] for record in found] == [b"1", b"2"]
  assert records.passed_over == {"links": 2, "others": 2}
  assert sorted(os.listdir(tmp_path)) == before


def test_broken_tars_are_named_together(tmp_path):
  whole = write_tar(tmp_path / "0.tar", [(f"{i}.x", bytes(2000)) for i in "ab"])
  data = open(whole, "rb").read()
  head = bytearray(data)
  head[512 + 2048 : 512 + 2060] = b"\xff" * 12  # The head of the second.
  for name, content in (
      ("1.tar", data[:1500]),
      ("2.tar", bytes(head)),
      ("3.tar", b"\x1f\x8b" + data),
      ("4.tar", b"no tar at all" * 100),
  ):
    (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError) as error:
    WebDataset(f"{tmp_path}/{{0..4}}.tar")
  lines = str(error.value).splitlines()
  assert len(lines) == 6 and "0.tar" not in str(error.value)
  assert "1.tar: a.x ends at byte 2,512, the file at 1,500" in lines[1]
  assert "2.tar: broken at byte 2,560" in lines[2]
  assert "3.tar: compressed" in lines[3]
  assert "4.tar: " in lines[4]


def test_what_else_is_refused(tmp_path):
  path = write_tar(tmp_path / "a.tar", [("a.x", b"1"), ("a.x", b"2")])
  with pytest.raises(ValueError, match="a.x is there twice"):
    WebDataset(path)
  path = write_tar(tmp_path / "b.tar", [])
  with pytest.raises(ValueError, match="no files in"):
    WebDataset(path)
  records = WebDataset(
      write_tar(tmp_path / "c.tar", [("a.x", bytes(99))]), limits=Limits(size=9)
  )
  with pytest.raises(BadRecord, match="size: 99 is more than the 9 allowed"):
    records[0]


def test_a_tar_that_shrinks_later(tmp_path):
  path = write_tar(tmp_path / "a.tar", PAIRS)
  records = WebDataset(path)
  os.truncate(path, 512)
  with pytest.raises(BadRecord, match="0 of 1 bytes are there"):
    records[0]


def test_an_index_is_kept_and_renewed(tmp_path, monkeypatch):
  path, index = write_tar(tmp_path / "a.tar", PAIRS), str(tmp_path / "i.npz")
  first = WebDataset(path, index)
  with monkeypatch.context() as patch:
    patch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("scanned"))
    again = WebDataset(path, index)
  assert [again[i] for i in range(3)] == [first[i] for i in range(3)]
  assert again.fields == first.fields
  write_tar(path, PAIRS[:2])
  assert len(WebDataset(path, index)) == 1
  (tmp_path / "i.npz").write_bytes(b"something else")
  with pytest.raises(ValueError, match="i.npz is no index"):
    WebDataset(path, index)
