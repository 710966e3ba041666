"""The vocabulary of tables."""

import jax
import numpy as np
import pytest

from mmjax.nn import mask, transformer
from mmjax.weights import engine, layout, transforms


def test_rule_names_and_paths():
  rule = layout.Rule("h.{i}.mlp.{j}.w", "blocks[i]/experts[j]/kernel")
  assert rule.paths == ("blocks/experts/kernel",)
  assert rule.axes == ("i", "j")
  assert rule.name((3, 12)) == "h.3.mlp.12.w"


def test_axes_follow_the_path_not_the_name():
  rule = layout.Rule("e.{j}.of.{i}", "blocks[i]/experts[j]")
  assert rule.name((3, 12)) == "e.12.of.3"


def test_rule_matches_its_own_names_only():
  rule = layout.Rule("h.{i}.w", "blocks[i]/kernel")
  assert rule.matches("h.0.w") and rule.matches("h.123.w")
  for name in ("h.x.w", "h..w", "h.0.w2", "a.h.0.w", "hx0xw"):
    assert not rule.matches(name), name


def test_numbers_may_be_counted_in_steps():
  rule = layout.Rule("h.{2i+1}.w", "pairs[i]/second/kernel")
  assert rule.axes == ("i",)
  assert [rule.name((i,)) for i in range(3)] == ["h.1.w", "h.3.w", "h.5.w"]
  assert rule.matches("h.7.w") and not rule.matches("h.i.w")
  assert layout.Rule("h.{4i+j}.w", "a[i]/b[j]").name((2, 3)) == "h.11.w"


def test_parts_may_have_transforms_of_their_own():
  rule = layout.Rule(
      "qkv.bias",
      ("query/bias", "value/bias"),
      (transforms.ZEROS_BEHIND, transforms.FLAT),
  )
  leaves = {p: np.arange(1.0, 7).reshape(2, 3) * s for p, s in zip(
      rule.paths, (1, 10))}
  ((name, tensor),) = engine.dump([rule], leaves)
  assert name == "qkv.bias"
  np.testing.assert_array_equal(
      tensor.reshape(3, 6), np.arange(1, 7) * [[1], [0], [10]]
  )


@pytest.mark.parametrize("source, target", [
    ("h.{2i+j}.w", "blocks[i]/kernel"),
    ("h.{i}.w", "blocks/kernel"),
    ("h.0.w", "blocks[i]/kernel"),
    ("h.{i}.w", "blocks[j]/kernel"),
    ("h.{i}.w", "blocks[i]/experts[i]/kernel"),
    ("h.{i}.w", ("a[i]/kernel", "b/kernel")),
])
def test_rule_whose_numbers_do_not_fit(source, target):
  with pytest.raises(ValueError, match="they must be the same"):
    layout.Rule(source, target)


def test_dense_and_affine():
  weight, bias = layout.dense("fc.{i}", "blocks[i]/up", inputs=2)
  assert weight.source == "fc.{i}.weight"
  assert weight.target == "blocks[i]/up/kernel"
  assert weight.transform.to_theirs(np.zeros((2, 3, 4))).shape == (4, 6)
  assert (bias.source, bias.target) == ("fc.{i}.bias", "blocks[i]/up/bias")
  assert bias.transform is transforms.FLAT
  scale, bias = layout.affine("ln", "norm")
  assert (scale.source, scale.target) == ("ln.weight", "norm/scale")
  assert (bias.source, bias.target) == ("ln.bias", "norm/bias")


def test_block_names_every_leaf_of_our_block_once():
  block = transformer.Block(heads=2, mlp=12, activation="relu", epsilon=1e-6)
  boxed = jax.eval_shape(
      block.init, jax.random.key(0), np.zeros((1, 3, 8)), mask.full(3)
  )
  leaves = {
      "b/" + "/".join(str(key.key) for key in keys[1:-1]): leaf
      for keys, leaf in jax.tree_util.tree_leaves_with_path(boxed)
  }
  rules = layout.block(
      "t",
      "b",
      norms=("n1", "n2"),
      attention=("a.q", "a.k", "a.v", "a.o"),
      mlp=("m.1", "m.2"),
  )
  found = {n: s.shape for n, s in engine.describe(rules, leaves).items()}
  assert found == {
      "t.n1.weight": (8,), "t.n1.bias": (8,),
      "t.n2.weight": (8,), "t.n2.bias": (8,),
      "t.a.q.weight": (8, 8), "t.a.q.bias": (8,),
      "t.a.k.weight": (8, 8), "t.a.k.bias": (8,),
      "t.a.v.weight": (8, 8), "t.a.v.bias": (8,),
      "t.a.o.weight": (8, 8), "t.a.o.bias": (8,),
      "t.m.1.weight": (12, 8), "t.m.1.bias": (12,),
      "t.m.2.weight": (8, 12), "t.m.2.bias": (8,),
  }


def test_pair():
  assert layout.pair(3) == (3, 3)
  assert layout.pair([3, 4]) == (3, 4)
  with pytest.raises(ValueError):
    layout.pair([3, 4, 5])
