"""From config nodes to objects, and the errors on the way."""

import ml_collections
import pytest

from mmjax import config


def greet(word: str, times: int = 1) -> str:
  return " ".join([word] * times)


class Inner:

  def __init__(self, size: int):
    self.size = size


class Outer:

  def __init__(self, inner: Inner, scale: float = 1.0):
    self.inner, self.scale = inner, scale


HERE = "tests.test_config"


def test_nodes_are_built_inside_out():
  node = ml_collections.ConfigDict(
      dict(type=f"{HERE}:Outer", inner=dict(type=f"{HERE}:Inner", size=3))
  )
  outer = config.build(node, "config.system")
  assert outer.inner.size == 3 and outer.scale == 1.0


def test_references_are_resolved_inside_tuples():
  node = ml_collections.ConfigDict(dict(steps=5))
  row = {"type": f"{HERE}:greet", "word": "a", "times": node.get_ref("steps")}
  node.steps = 2
  assert config.build((row,)[0], "row") == "a a"


def test_bound_functions_keep_their_name():
  bound = config.bind({"type": f"{HERE}:greet", "times": 2}, "config.objective")
  assert bound("x") == "x x" and bound.__name__ == "greet"


@pytest.mark.parametrize(
    "node,message",
    [
        ({"type": f"{HERE}:greet", "wurd": 1}, "config.x.wurd: unknown key; "
         "did you mean 'word'"),
        ({"type": f"{HERE}:gret"}, "no 'gret'; did you mean 'greet'"),
        ({"type": "mmjax.nope:x"}, "No module named 'mmjax.nope'"),
        ({"type": "mmjax"}, "expected 'package.module:Name'"),
        ({"word": "x"}, "config.x: needs type="),
    ],
)
def test_wrong_nodes_say_what_is_wrong(node, message):
  with pytest.raises(ValueError) as error:
    config.build(node, "config.x")
  assert message in str(error.value)


def test_arguments_are_cast_and_checked():
  arg = config.parse_arg("size=b32,deep=true,n=3", size="", deep=False, n=1)
  assert (arg.size, arg.deep, arg.n) == ("b32", True, 3)
  with pytest.raises(ValueError, match="did you mean 'size'"):
    config.parse_arg("sise=b32", size="tiny")
  with pytest.raises(ValueError, match="did you mean 'b32'"):
    config.pick({"b32": 0, "l14": 1}, "b23", "size")
