"""Paths, patterns and fields."""

import builtins

import pytest

from mmjax.data.sources import records
from mmjax.data.sources.records import BadRecord


@pytest.mark.parametrize(
    "pattern,names",
    [
        ("a.tar", ["a.tar"]),
        ("a-{008..011}.tar", [f"a-{i:03}.tar" for i in range(8, 12)]),
        ("a-{9..11}", ["a-9", "a-10", "a-11"]),
        ("{x,yy}/{0..1}", ["x/0", "x/1", "yy/0", "yy/1"]),
        ("{,b}c", ["c", "bc"]),
        ("{a}", ["{a}"]),
    ],
)
def test_braces(pattern, names):
  assert records.braces(pattern) == names


@pytest.mark.parametrize("pattern", ["{5..3}", "{0..1000000000}"])
def test_bad_ranges(pattern):
  with pytest.raises(ValueError, match="must count upwards, a million"):
    records.braces(pattern)


def test_files(tmp_path):
  for name in ("a-0.tar", "a-1.tar", "b.tar", "[c].tar"):
    (tmp_path / name).touch()
  find = lambda *names: [
      path.removeprefix(f"{tmp_path}/")
      for path in records.files([f"{tmp_path}/{n}" for n in names], "Test")
  ]
  assert find("a-*.tar") == find("a-{0..1}.tar") == ["a-0.tar", "a-1.tar"]
  assert find("b.tar", "[c].tar") == ["b.tar", "[c].tar"]
  with pytest.raises(FileNotFoundError) as error:
    find("a-{0..3}.tar", "z*.tar")
  message = str(error.value)
  assert "a-2.tar, did you mean 'a-" in message and "z*.tar" in message
  assert "a-0.tar\n" not in message
  with pytest.raises(FileNotFoundError, match="nor a directory"):
    find("no/where.tar")
  with pytest.raises(ValueError, match="b.tar is named twice"):
    find("*.tar", "b.tar")
  with pytest.raises(ValueError, match="no path given"):
    records.files([], "Test")


def test_directory(tmp_path):
  (tmp_path / "train").mkdir()
  (tmp_path / "file").touch()
  assert records.directory(f"{tmp_path}/train", "Test") == f"{tmp_path}/train"
  with pytest.raises(FileNotFoundError, match="nothing, did you mean 'train'"):
    records.directory(f"{tmp_path}/trian", "Test")
  with pytest.raises(FileNotFoundError, match="found a file"):
    records.directory(f"{tmp_path}/file", "Test")


RECORD = {
    "jpg": b"picture",
    "json": b'{"a": {"b": "deep"}, "n": 3}',
    "image": {"bytes": b"inner", "path": None},
    "seg.png": b"mask",
    "broken": "{",
    "number": 7,
}


@pytest.mark.parametrize(
    "field,value",
    [
        ("jpg", b"picture"),
        ("png;jpg", b"picture"),
        ("json.a.b", "deep"),
        ("json.n", 3),
        ("image.bytes", b"inner"),
        ("seg.png", b"mask"),
    ],
)
def test_find(field, value):
  assert records.find(RECORD, field) == value
  records.check_field(field, tuple(RECORD), "fields.x")


@pytest.mark.parametrize(
    "field,message",
    [
        ("txt", "no field 'txt', only jpg, json"),
        ("json.z", "'json.z': no entry 'z'"),
        ("json.n.x", "no entry 'x'"),
        ("broken.x", "'broken.x': not JSON"),
        ("number.x", "no entry 'x'"),
        ("jpg.x", "not JSON"),
    ],
)
def test_what_cannot_be_found(field, message):
  with pytest.raises(BadRecord, match=message):
    records.find(RECORD, field)


def test_a_field_that_no_record_has_is_named():
  with pytest.raises(ValueError, match="no field 'jpgg'; did you mean 'jpg'"):
    records.check_field("jpgg", tuple(RECORD), "fields.image")


def test_a_missing_package_is_named_with_its_command(monkeypatch):
  whole = builtins.__import__
  monkeypatch.setattr(
      records.importlib, "import_module",
      lambda name: whole("no_such_package_of_ours"),
  )
  # Something that the package itself lacks is no wish of ours.
  with pytest.raises(ModuleNotFoundError):
    records.optional("av", "reading videos")
  monkeypatch.setattr(
      records.importlib, "import_module", lambda name: whole("av_missing")
  )
  with pytest.raises(ValueError, match='"mmjax.data."') as error:
    records.optional("av_missing", "reading videos")
  assert "reading videos needs the package 'av_missing'" in str(error.value)
