"""Directories, archives, and everything that is refused."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest

from mmjax.weights import safetensors_file, source


def save(path, **arrays: np.ndarray) -> None:
  safetensors_file.write(path, arrays)


def save_index(directory, weight_map: object) -> None:
  (directory / source.INDEX).write_text(json.dumps({"weight_map": weight_map}))


A, B = np.arange(3.0), np.arange(4.0).reshape(2, 2)


def test_directory_with_one_file(tmp_path):
  save(tmp_path / source.WEIGHTS, a=A)
  np.testing.assert_array_equal(source.open_source(tmp_path).read("a"), A)


def test_directory_with_shards(tmp_path):
  save(tmp_path / "x.safetensors", a=A)
  save(tmp_path / "y.safetensors", b=B)
  save_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
  opened = source.open_source(tmp_path)
  assert {n: s.shape for n, s in opened.tensors.items()} == {
      "a": (3,), "b": (2, 2),
  }
  np.testing.assert_array_equal(opened.read("a"), A)
  np.testing.assert_array_equal(opened.read("b"), B)


def test_shards_may_be_links_into_a_cache(tmp_path):
  cache, directory = tmp_path / "blobs", tmp_path / "snapshot"
  cache.mkdir()
  directory.mkdir()
  save(cache / "0123", a=A)
  (directory / "x.safetensors").symlink_to("../blobs/0123")
  save_index(directory, {"a": "x.safetensors"})
  np.testing.assert_array_equal(source.open_source(directory).read("a"), A)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "sub/x", "..", ".", ""]
)
def test_index_must_stay_in_its_directory(tmp_path, shard):
  directory = tmp_path / "model"
  (directory / "sub").mkdir(parents=True)
  save(tmp_path / "x.safetensors", a=A)
  save(directory / "sub" / "x", a=A)
  save_index(directory, {"a": shard})
  with pytest.raises(ValueError, match="must be files beside the index") as e:
    source.open_source(directory)
  assert str(directory / source.INDEX) in str(e.value)


@pytest.mark.parametrize("index", [
    "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}',
    '{"weight_map": {"a": ["x"]}}',
])
def test_damaged_index(tmp_path, index):
  (tmp_path / source.INDEX).write_text(index)
  with pytest.raises(ValueError, match="expected a JSON object with a") as e:
    source.open_source(tmp_path)
  assert str(tmp_path / source.INDEX) in str(e.value)


def test_missing_shards_are_all_named(tmp_path):
  save(tmp_path / "x", a=A)
  save_index(tmp_path, {"a": "x", "b": "y", "c": "z", "d": "z"})
  with pytest.raises(FileNotFoundError, match="not there: y, z$") as e:
    source.open_source(tmp_path)
  assert str(tmp_path) in str(e.value)


def test_tensors_absent_from_their_shard_are_all_named(tmp_path):
  save(tmp_path / "x", a=A)
  save_index(tmp_path, {"a": "x", "b": "x", "c": "x"})
  with pytest.raises(ValueError, match="do not hold: b in x, c in x$"):
    source.open_source(tmp_path)


def test_tensor_in_two_shards(tmp_path):
  save(tmp_path / "x", a=A)
  save(tmp_path / "y", a=A, b=B)
  save_index(tmp_path, {"a": "x", "b": "y"})
  with pytest.raises(ValueError, match="more than one shard holds a$"):
    source.open_source(tmp_path)


def test_unindexed_tensors_are_seen(tmp_path):
  save(tmp_path / "x", a=A, b=B)
  save_index(tmp_path, {"a": "x"})
  assert set(source.open_source(tmp_path).tensors) == {"a", "b"}


def test_nothing_there(tmp_path):
  with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
    source.open_source(tmp_path)
  with pytest.raises(FileNotFoundError, match="absent"):
    source.open_source(tmp_path / "absent")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.pkl"])
@pytest.mark.parametrize("within", ["directory", "file"])
def test_pickles_are_refused_with_a_way_out(tmp_path, name, within):
  (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
  with pytest.raises(ValueError, match="weights_only=True") as e:
    source.open_source({"directory": tmp_path, "file": tmp_path / name}[within])
  assert f'torch.load("{tmp_path / name}"' in str(e.value)
  assert f'save_file(state, "{tmp_path / source.WEIGHTS}")' in str(e.value)


def test_the_way_out_works(tmp_path):
  torch = pytest.importorskip("torch")
  pytest.importorskip("safetensors.torch")
  shared = torch.arange(6.0).reshape(2, 3)
  path = tmp_path / "pytorch_model.bin"
  torch.save({"a": shared, "tied": shared, "strided": shared.T}, path)
  with pytest.raises(ValueError) as error:
    source.open_source(tmp_path)
  recipe = str(error.value).split("installed:\n\n")[1].split("\n\nFor")[0]
  exec("\n".join(line[2:] for line in recipe.splitlines()), {})
  opened = source.open_source(tmp_path)
  assert set(opened.tensors) == {"a", "tied", "strided"}
  np.testing.assert_array_equal(opened.read("strided"), shared.numpy().T)


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
def test_npz(tmp_path, savez):
  fortran = np.asfortranarray(B)
  savez(tmp_path / "m.npz", **{"head/bias": A, "head/kernel": fortran})
  opened = source.open_source(tmp_path / "m.npz")
  assert {n: (s.shape, s.dtype) for n, s in opened.tensors.items()} == {
      "head/bias": ((3,), A.dtype), "head/kernel": ((2, 2), B.dtype),
  }
  np.testing.assert_array_equal(opened.read("head/kernel"), B)


def test_npz_with_a_pickle(tmp_path):
  np.savez(tmp_path / "m.npz", good=A, bad=np.array([{}], object))
  with pytest.raises(ValueError, match="m.npz: bad hold Python objects"):
    source.open_source(tmp_path / "m.npz")


def test_truncated_npz(tmp_path):
  np.savez(tmp_path / "m.npz", a=A)
  data = (tmp_path / "m.npz").read_bytes()
  (tmp_path / "m.npz").write_bytes(data[:-30])
  with pytest.raises(ValueError, match="m.npz: unreadable archive"):
    source.open_source(tmp_path / "m.npz")


def test_damaged_npz_member(tmp_path):
  np.savez(tmp_path / "m.npz", a=np.zeros(100_000))
  data = bytearray((tmp_path / "m.npz").read_bytes())
  data[-10_000] ^= 1
  (tmp_path / "m.npz").write_bytes(data)
  with pytest.raises(ValueError, match="m.npz: 'a' is damaged"):
    source.open_source(tmp_path / "m.npz").read("a")


def npy(shape, data=b"", descr="<f8"):
  file = io.BytesIO()
  header = {"shape": shape, "fortran_order": False, "descr": descr}
  np.lib.format.write_array_header_1_0(file, header)
  return file.getvalue() + data


@pytest.mark.parametrize("member", [
    npy((2**40,)),
    npy((2**62, 2**62)),
    npy((4,), bytes(8)),
    npy((1,), bytes(64)),
    npy((-1,), bytes(8)),
    npy((2,), bytes(16), "<f4"),
])
def test_npz_headers_must_tell_the_size_that_is_there(tmp_path, member):
  with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
    archive.writestr("a.npy", member)
  with pytest.raises(ValueError, match="m.npz: unreadable archive: 'a' has "):
    source.open_source(tmp_path / "m.npz")


@pytest.mark.parametrize("second", ["a.npy", "notes.txt", "a"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_npz_members_are_arrays_of_their_own(tmp_path, second):
  with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
    archive.writestr("a.npy", npy((1,), bytes(8)))
    archive.writestr(second, npy((1,), bytes(8)))
  with pytest.raises(ValueError, match="no array, or is there twice"):
    source.open_source(tmp_path / "m.npz")
