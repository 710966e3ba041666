"""Reading and writing single files."""

import json

import ml_dtypes
import numpy as np
import pytest

from mmjax.weights import safetensors_file


def raw(header: object, data: bytes = b"") -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, dtype: str = "F32", shape=(2,)) -> dict:
  return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def tensors() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  values = rng.normal(size=(3, 4, 2))
  kinds = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64]
  made = {np.dtype(kind).name: values.astype(kind) for kind in kinds}
  return made | {
      "odd_bytes": np.arange(3, dtype=np.uint8),
      "unaligned": values[0].astype(np.float32),
      "scalar": np.float32(2.5).reshape(()),
      "bool": values > 0,
      "transposed": values.astype(np.float32).T,
      "empty": np.zeros((0, 3), np.float32),
  }


def test_round_trip(tmp_path):
  path = tmp_path / "a.safetensors"
  safetensors_file.write(path, tensors(), {"format": "pt"})
  file = safetensors_file.SafetensorsFile(path)
  assert set(file.tensors) == set(tensors())
  for name, expected in tensors().items():
    spec, found = file.tensors[name], file.read(name)
    assert (spec.shape, spec.dtype) == (expected.shape, expected.dtype), name
    assert found.dtype == expected.dtype, name
    np.testing.assert_array_equal(found, expected, err_msg=name)
  length = int.from_bytes(path.read_bytes()[:8], "little")
  header = json.loads(path.read_bytes()[8 : 8 + length])
  assert header["__metadata__"] == {"format": "pt"}


def test_write_refuses_an_unknown_dtype(tmp_path):
  with pytest.raises(ValueError, match="no dtype for a: complex128"):
    safetensors_file.write(tmp_path / "a", {"a": np.zeros(2, np.complex128)})


@pytest.mark.parametrize("data", [
    b"",
    (2**40).to_bytes(8, "little") + b"{}",
    raw(b"{}")[:-1],
    raw(b"{"),
    raw(b"\xff\xfe"),
    raw({"a": 1}),
    raw({"a": entry(0, 8, shape=(-2,))}, bytes(8)),
    raw({"a": entry(0, 7)}, bytes(7)),
    raw({"a": entry(0, 8)}, bytes(7)),
    raw({"a": entry(0, 8)}, bytes(9)),
    raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    raw({"a": entry(4, 12)}, bytes(12)),
    raw({"a": entry(8, 0)}, bytes(8)),
    raw({"a": entry(0, 8, "F64")}, bytes(8)),
    raw({"a": entry(0, 8, "X9")}, bytes(8)),
    raw({"a": entry(0, 0, shape=(2**62, 8))}),
    raw({"__metadata__": {"format": 3}}),
    raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    (200_000_000).to_bytes(8, "little") + b"{}" + bytes(100),
])
def test_damaged_files_are_named(tmp_path, data):
  path = tmp_path / "broken.safetensors"
  path.write_bytes(data)
  with pytest.raises(ValueError, match="truncated, or no safetensors") as error:
    safetensors_file.SafetensorsFile(path)
  assert str(path) in str(error.value)


@pytest.mark.parametrize("shape", [(0, 2**62), (0, 2**40, 2**40), (0,) * 100])
def test_shapes_that_cannot_be_are_refused(tmp_path, shape):
  path = tmp_path / "a.safetensors"
  path.write_bytes(raw({"a": entry(0, 0, shape=shape)}))
  with pytest.raises(ValueError, match="a shape that no array can") as e:
    safetensors_file.SafetensorsFile(path)
  assert str(path) in str(e.value)


def test_a_missing_file_is_not_found(tmp_path):
  with pytest.raises(FileNotFoundError, match="absent"):
    safetensors_file.SafetensorsFile(tmp_path / "absent.safetensors")
