"""The engine on a toy tree that belongs to no model."""

from pathlib import Path
import re
import tracemalloc

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import ml_dtypes
import numpy as np
import pytest

from mmjax.weights import engine, transforms
from mmjax.weights.layout import Ignore, Rule, affine, dense

DEPTH, WIDTH, HEADS = 8, 16, 4


class Memory:
  """A source that counts how often each tensor is read."""

  def __init__(self, arrays: dict[str, np.ndarray]):
    self.path = Path("memory")
    self.arrays = arrays
    self.tensors = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype)
        for name, array in arrays.items()
    }
    self.reads: list[str] = []

  def read(self, name: str) -> np.ndarray:
    self.reads.append(name)
    return self.arrays[name]


TABLE = (
    Rule("embed.weight", "embed/embedding"),
    Rule(
        "h.{i}.in.weight",
        tuple(f"blocks[i]/{n}/kernel" for n in ("query", "key", "value")),
        transforms.LINEAR,
    ),
    Rule(
        "h.{i}.in.bias",
        tuple(f"blocks[i]/{n}/bias" for n in ("query", "key", "value")),
        transforms.FLAT,
    ),
    *dense("h.{i}.out", "blocks[i]/out", inputs=2),
    *affine("ln_f", "norm"),
    *affine("final_norm", "norm"),  # An older spelling.
    Rule("steps", "steps"),
    *dense("head", "head"),  # This system has none.
    Ignore(r".*\.position_ids"),
)


def leaves() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  heads = HEADS, WIDTH // HEADS
  shapes = {
      "embed/embedding": (24, WIDTH),
      "blocks/out/kernel": (DEPTH, *heads, WIDTH),
      "blocks/out/bias": (DEPTH, WIDTH),
      "norm/scale": (WIDTH,),
      "norm/bias": (WIDTH,),
  }
  for name in ("query", "key", "value"):
    shapes[f"blocks/{name}/kernel"] = (DEPTH, WIDTH, *heads)
    shapes[f"blocks/{name}/bias"] = (DEPTH, *heads)
  made = {p: rng.normal(size=s).astype(np.float32) for p, s in shapes.items()}
  return made | {"steps": np.int32(7).reshape(())}


def theirs() -> dict[str, np.ndarray]:
  """Their tensors for `leaves()`, written out without the engine."""
  ours = leaves()
  made = {
      "embed.weight": ours["embed/embedding"],
      "ln_f.weight": ours["norm/scale"],
      "ln_f.bias": ours["norm/bias"],
      "steps": ours["steps"],
      "h.0.position_ids": np.arange(3),
  }
  for i in range(DEPTH):
    qkv = [
        ours[f"blocks/{n}/kernel"][i].reshape(WIDTH, WIDTH).T
        for n in ("query", "key", "value")
    ]
    biases = [
        ours[f"blocks/{n}/bias"][i].ravel() for n in ("query", "key", "value")
    ]
    made |= {
        f"h.{i}.in.weight": np.concatenate(qkv),
        f"h.{i}.in.bias": np.concatenate(biases),
        f"h.{i}.out.weight": (
            ours["blocks/out/kernel"][i].reshape(WIDTH, WIDTH).T
        ),
        f"h.{i}.out.bias": ours["blocks/out/bias"][i],
    }
  return made


def check_equal(found, expected) -> None:
  assert list(found) == list(expected)
  for path, array in expected.items():
    assert found[path].dtype == array.dtype, path
    np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_load():
  found = engine.load(Memory(theirs()), TABLE, leaves())
  assert all(isinstance(array, jax.Array) for array in found.values())
  check_equal(found, leaves())


def test_dump_is_the_inverse():
  params = jax.tree.map(jnp.asarray, leaves())
  expected = theirs()
  del expected["h.0.position_ids"]
  found = dict(engine.dump(TABLE, params))
  check_equal(dict(sorted(found.items())), dict(sorted(expected.items())))
  specs = engine.describe(TABLE, params)
  assert [(n, s.shape, s.dtype) for n, s in specs.items()] == [
      (n, a.shape, a.dtype) for n, a in found.items()
  ]


def test_parts_of_a_fused_tensor_may_differ_in_size():
  table = [Rule("qkv", ("q", "kv"), transforms.LINEAR)]
  ours = {
      "q": np.arange(12.0, dtype=np.float32).reshape(2, 3, 2),
      "kv": np.arange(4.0, dtype=np.float32).reshape(2, 2),
  }
  (name, tensor), = engine.dump(table, ours)
  assert (name, tensor.shape) == ("qkv", (8, 2))
  check_equal(engine.load(Memory({"qkv": tensor}), table, ours), ours)


def test_two_stacked_axes():
  table = [Rule("h.{i}.e.{j}", "blocks[i]/experts[j]", transforms.LINEAR)]
  ours = np.arange(24, dtype=np.float32).reshape(2, 3, 4, 1)
  found = dict(engine.dump(table, {"blocks/experts": ours}))
  assert list(found) == [f"h.{i}.e.{j}" for i in range(2) for j in range(3)]
  np.testing.assert_array_equal(found["h.1.e.2"], ours[1, 2].T)
  loaded = engine.load(Memory(found), table, {"blocks/experts": ours})
  np.testing.assert_array_equal(loaded["blocks/experts"], ours)


def test_any_spelling_is_read_and_the_first_is_written():
  arrays = theirs()
  for kind in ("weight", "bias"):
    arrays[f"final_norm.{kind}"] = arrays.pop(f"ln_f.{kind}")
  found = engine.load(Memory(arrays), TABLE, leaves())
  check_equal(found, leaves())
  assert not any(name.startswith("final_norm") for name, _ in engine.dump(
      TABLE, found
  ))


@pytest.mark.parametrize("spec", [
    PartitionSpec("x"),
    PartitionSpec(None, "x"),
    PartitionSpec(None, None, "y"),
    PartitionSpec("y", "x"),
    PartitionSpec(),
])
def test_blocks_are_placed_and_no_block_is_read_twice(spec):
  count = jax.device_count()
  mesh = jax.make_mesh((count // 2 or 1, min(count, 2)), ("x", "y"))
  path = "blocks/query/kernel"
  shardings = dict.fromkeys(leaves(), NamedSharding(mesh, PartitionSpec()))
  shardings[path] = NamedSharding(mesh, spec)
  source = Memory(theirs())
  found = engine.load(source, TABLE, leaves(), shardings=shardings)
  check_equal(found, leaves())
  for name, array in found.items():
    assert array.sharding == shardings[name]
  blocks = {
      tuple((s.start, s.stop) for s in index)
      for index in shardings[path].devices_indices_map(
          leaves()[path].shape
      ).values()
  }
  stacks = {block[0] for block in blocks}
  # Every tensor once for each block with its layer; the other two parts of
  # the fused tensor, and two biases, are replicated.
  expected = len(blocks) // len(stacks) + 2
  assert source.reads.count("h.0.in.weight") == expected
  assert source.reads.count("h.0.in.bias") == 3


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_floats_are_read_into_the_dtype_of_the_leaf(dtype):
  arrays = {
      n: a.astype(dtype) if a.dtype == np.float32 else a
      for n, a in theirs().items()
  }
  found = engine.load(Memory(arrays), TABLE, leaves())
  expected = {
      p: a.astype(dtype).astype(a.dtype) for p, a in leaves().items()
  }
  check_equal(found, expected)


def test_dtype_is_for_floats_alone():
  for name in ("bfloat16", jnp.bfloat16):
    found = engine.load(Memory(theirs()), TABLE, leaves(), dtype=name)
    dtypes = {path: array.dtype for path, array in found.items()}
    assert dtypes.pop("steps") == np.int32
    assert set(dtypes.values()) == {jnp.dtype(jnp.bfloat16)}
  written = dict(engine.dump(TABLE, leaves(), dtype=np.float16))
  assert written["steps"].dtype == np.int32
  assert written["ln_f.bias"].dtype == np.float16


def test_values_that_do_not_fit_are_refused():
  big = {"a": np.array([1.0, 1e6, np.inf], np.float32)}
  table = [Rule("a", "x")]
  with pytest.raises(ValueError, match="a: 1 of 3 values of float32 do"):
    engine.load(Memory(big), table, {"x": big["a"]}, dtype=np.float16)
  with pytest.raises(ValueError, match="a: 1 of 3 values"):
    dict(engine.dump(table, {"x": big["a"]}, dtype=np.float16))
  long = {"a": np.array([1, 2**40])}
  with pytest.raises(ValueError, match="a: 1 of 2 values of int64 do not fit"):
    engine.load(Memory(long), table, {"x": np.zeros(2, np.int32)})
  # What was infinite before may stay so.
  rest = {"a": np.array([1.0, np.inf, np.nan], np.float32)}
  found = engine.load(Memory(rest), table, {"x": rest["a"]}, dtype=np.float16)
  np.testing.assert_array_equal(found["x"], rest["a"])


def test_all_faults_come_at_once_and_before_anything_is_read():
  arrays = theirs()
  del arrays["h.3.out.bias"], arrays["ln_f.weight"]
  arrays["embed.weight"] = arrays["embed.weight"][:, :-1]
  arrays["h.2.in.weight"] = arrays["h.2.in.weight"].T
  arrays["ln_f.bias"] = arrays["ln_f.bias"].astype(np.int64)
  arrays["final_norm.bias"] = leaves()["norm/bias"]
  arrays["steps"] = np.float32(1).reshape(())
  arrays["stray"] = np.zeros((), bool)
  arrays["head.bias"] = np.zeros(3, np.float32)
  arrays["h.8.out.bias"] = np.zeros(WIDTH, np.float32)
  arrays["h.01.out.bias"] = np.zeros(WIDTH, np.float32)
  source = Memory(arrays)
  with pytest.raises(ValueError) as error:
    engine.load(source, TABLE, leaves())
  head, *lines = str(error.value).splitlines()
  assert head == "memory: the tensors do not fit the system:"
  assert [line.strip() for line in lines] == [
      "filled twice: norm/bias by ln_f.bias and final_norm.bias",
      "misshaped: embed.weight is float32[24, 15], not float32[24, 16], for "
      "embed/embedding",
      "misshaped: h.2.in.weight is float32[16, 48], not float32[48, 16], for "
      "blocks/query/kernel[2], blocks/key/kernel[2], blocks/value/kernel[2]",
      "missing: h.3.out.bias float32[16], for blocks/out/bias[3]",
      "missing: ln_f.weight or final_norm.weight float32[16], for norm/scale",
      "unexpected: h.01.out.bias float32[16], for blocks/out/bias, here "
      "float32[8, 16]",
      "unexpected: h.8.out.bias float32[16], for blocks/out/bias, here "
      "float32[8, 16]",
      "unexpected: head.bias float32[3], for head/bias, which the system lacks",
      "unexpected: stray bool[]",
      "wrong kind: ln_f.bias is int64[16], not float, for norm/bias",
      "wrong kind: steps is float32[], not int, for steps",
  ]
  assert not source.reads


def test_a_leaf_without_a_rule():
  ours = leaves() | {"extra/kernel": np.zeros((2, 3), np.float32)}
  line = re.escape("no rule: extra/kernel float32[2, 3]")
  with pytest.raises(ValueError, match=line):
    engine.load(Memory(theirs()), TABLE, ours)
  with pytest.raises(ValueError, match=line):
    engine.describe(TABLE, ours)
  with pytest.raises(ValueError, match=line):
    list(engine.dump(TABLE, ours))


def test_a_table_that_does_not_fit_its_leaves():
  ours = leaves()
  del ours["blocks/key/bias"]
  with pytest.raises(ValueError, match="of its leaves there are only"):
    engine.describe(TABLE, ours)
  table = [Rule("h.{i}.q", ("q[i]", "k[i]"))]
  with pytest.raises(ValueError, match="needs 1 equal leading axes"):
    engine.describe(table, {"q": np.zeros((2, 3)), "k": np.zeros((4, 3))})
  # The second rule would write only a part of what the first one takes.
  table = [Rule("q", "q"), Rule("qk", ("q", "k"))]
  with pytest.raises(ValueError, match=re.escape("no rule: k float64[3]")):
    engine.describe(table, {"q": np.zeros(3), "k": np.zeros(3)})


def test_host_memory_stays_near_one_leaf():
  size = 2**18  # One MiB of float32 a leaf.
  table = [Rule(f"t{i}", f"x{i}") for i in range(32)]
  ours = {f"x{i}": np.broadcast_to(np.float32(1), (size,)) for i in range(32)}
  tracemalloc.start()
  total = sum(tensor.nbytes for _, tensor in engine.dump(
      table, ours, dtype=jnp.bfloat16
  ))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert total == 16 * 2**20
  assert peak < 4 * 2**20


def test_a_second_name_is_read_only_where_the_first_is_missing():
  table = (Rule("new.{i}", "a[i]"), Rule("old.{i}", "a[i]", spare=True))
  leaf = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
  both = {f"{n}.{i}": leaf["a"][i] + (n == "old") for n in ("new", "old")
          for i in range(2)}  # fmt: skip
  check_equal(engine.load(Memory(both), table, leaf), leaf)
  older = {f"old.{i}": leaf["a"][i] for i in range(2)}
  check_equal(engine.load(Memory(older), table, leaf), leaf)
  assert list(engine.describe(table, leaf)) == ["new.0", "new.1"]
