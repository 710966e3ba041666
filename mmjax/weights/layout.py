"""Which of their tensors fills which of our leaves? The vocabulary of tables.

A table is a sequence of `Rule` and `Ignore`. It may name leaves that a system
lacks (a head, a bias): such rules wait for a system that has them. Several
rules for one leaf are spellings of the same thing: whichever a checkpoint uses
is read, the first is written.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import re
from typing import Any

from mmjax.weights import transforms
from mmjax.weights.transforms import Transform

_FIELD = re.compile(r"\{([\w+]+)\}")
_STEPS = re.compile(r"(\d*)(\w*)")
_AXIS = re.compile(r"\[(\w+)\]")


@dataclasses.dataclass(frozen=True)
class Rule:
  """One kind of tensor and the leaf that it fills.

  `Rule("encoder.layer.{i}.norm.weight", "blocks[i]/norm/scale")` reads: for
  every i, that tensor is slice i of the stacked leaf `blocks/norm/scale`.
  Templates rather than regexes, since one template serves both directions.

  Attributes:
    source: name of their tensor; `{i}` stands for a number, `{2i+1}` for one
      that is counted in steps.
    target: path of our leaf, `[i]` marking a stacked axis (these axes lead, in
      the order of the path); or a tuple of paths, whose arrays in their form
      are concatenated along axis 0 (a fused query-key-value projection).
    transform: between one part of their tensor and one slice of our leaf; a
      tuple if the parts differ, one for each.
    spare: whether this is a second name that a checkpoint may keep beside the
      first for the same tensor: it is read only where the first is not there.
  """

  source: str
  target: str | tuple[str, ...]
  transform: Transform | tuple[Transform, ...] = transforms.IDENTITY
  spare: bool = False

  def __post_init__(self) -> None:
    axes = {tuple(_AXIS.findall(target)) for target in self._targets}
    fields = [
        axis
        for field in _FIELD.findall(self.source)
        for _, axis in _terms(field)
        if axis
    ]
    if len(axes) != 1 or sorted(*axes) != sorted(fields):
      raise ValueError(
          f"rule {self.source!r} -> {self.target!r}: the numbers of the source "
          f"are {fields}, the stacked axes of its targets {sorted(axes)}; they "
          f"must be the same"
      )

  @property
  def _targets(self) -> tuple[str, ...]:
    return (self.target,) if isinstance(self.target, str) else self.target

  @property
  def paths(self) -> tuple[str, ...]:
    """The paths of our leaves, without the marks of stacked axes."""
    return tuple(_AXIS.sub("", target) for target in self._targets)

  @property
  def transforms(self) -> tuple[Transform, ...]:
    """One transform for each of the paths."""
    if isinstance(self.transform, tuple):
      return self.transform
    return (self.transform,) * len(self._targets)

  @property
  def axes(self) -> tuple[str, ...]:
    """The names of the stacked axes, outermost first."""
    return tuple(_AXIS.findall(self._targets[0]))

  def name(self, index: Sequence[int]) -> str:
    """The name of the tensor that holds slice `index` of the stacked axes."""
    place = {"": 1, **dict(zip(self.axes, index))}
    number = lambda field: sum(
        int(factor or 1) * place[axis] for factor, axis in _terms(field)
    )
    return _FIELD.sub(lambda found: str(number(found[1])), self.source)

  def matches(self, name: str) -> bool:
    """Whether `name` is a name of `source` with some numbers in it."""
    literals = _FIELD.split(self.source)[::2]
    return bool(re.fullmatch(r"\d+".join(map(re.escape, literals)), name))


def _terms(field: str) -> list[tuple[str, str]]:
  """(factor, axis) of each term: ("2", "i") and ("1", "") of "2i+1"."""
  return [_STEPS.fullmatch(term).groups() for term in field.split("+")]


@dataclasses.dataclass(frozen=True)
class Ignore:
  """Tensors to leave alone: a regex on the whole name."""

  source: str


Table = Sequence[Rule | Ignore]


def dense(source: str, target: str, inputs: int = 1) -> tuple[Rule, Rule]:
  """torch's `Linear` at `source` <-> our kernel and bias at `target`.

  Args:
    source: name of the layer, a template.
    target: path of the layer.
    inputs: leading axes of the kernel that are input (`transforms.linear`).
  """
  return (
      Rule(f"{source}.weight", f"{target}/kernel", transforms.linear(inputs)),
      Rule(f"{source}.bias", f"{target}/bias", transforms.FLAT),
  )


def affine(source: str, target: str) -> tuple[Rule, Rule]:
  """torch's `LayerNorm` at `source` <-> our scale and bias at `target`."""
  return (
      Rule(f"{source}.weight", f"{target}/scale"),
      Rule(f"{source}.bias", f"{target}/bias"),
  )


def block(
    source: str,
    target: str,
    *,
    norms: tuple[str, str],
    attention: tuple[str, str, str, str],
    mlp: tuple[str, str],
) -> tuple[Rule, ...]:
  """torch's layers of a pre-norm block <-> our `nn.transformer.Block`.

  Args:
    source: what their names begin with.
    target: path of the block.
    norms: their norms before attention and before the MLP.
    attention: their query, key, value and output projections.
    mlp: their first and second projection.
  """
  query, key, value, out = attention
  return (
      *affine(f"{source}.{norms[0]}", f"{target}/attention_norm"),
      *dense(f"{source}.{query}", f"{target}/attention/query"),
      *dense(f"{source}.{key}", f"{target}/attention/key"),
      *dense(f"{source}.{value}", f"{target}/attention/value"),
      *dense(f"{source}.{out}", f"{target}/attention/out", inputs=2),
      *affine(f"{source}.{norms[1]}", f"{target}/mlp_norm"),
      *dense(f"{source}.{mlp[0]}", f"{target}/mlp/up"),
      *dense(f"{source}.{mlp[1]}", f"{target}/mlp/down"),
  )


def tower_block(source: str, target: str) -> tuple[Rule, ...]:
  """The blocks of transformers' CLIP and SigLIP; ends in a dot, and a slash."""
  return block(
      f"{source}encoder.layers.{{i}}",
      f"{target}blocks[i]",
      norms=("layer_norm1", "layer_norm2"),
      attention=tuple(
          f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")
      ),
      mlp=("mlp.fc1", "mlp.fc2"),
  )


# What the towers of transformers' CLIP and SigLIP call their attributes.
_TOWER = dict(
    width="hidden_size",
    depth="num_hidden_layers",
    heads="num_attention_heads",
    mlp="intermediate_size",
    activation="hidden_act",
    epsilon="layer_norm_eps",
)


def tower_attributes(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The attributes of a tower, from its part of a config.json."""
  return {ours: hf[theirs] for ours, theirs in _TOWER.items()}


def tower_config(tower: Any) -> dict[str, Any]:
  """The inverse of `tower_attributes`."""
  return {theirs: getattr(tower, ours) for ours, theirs in _TOWER.items()}


def square_patch(hf: Mapping[str, Any]) -> int:
  """The side of the patches of a `vision_config`.

  Raises:
    ValueError: for oblong patches, or images that are not of three channels.
  """
  patch = pair(hf["patch_size"])
  if patch[0] != patch[1] or hf["num_channels"] != 3:
    raise ValueError(
        f"vision_config: patch_size is {patch} and num_channels "
        f"{hf['num_channels']}; expected square patches of 3 channels"
    )
  return patch[0]


def pair(size: int | Sequence[int]) -> tuple[int, int]:
  """(height, width) of a size that a config.json may give as one number."""
  height, width = (size, size) if isinstance(size, int) else size
  return height, width


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a system meets the directories of Hugging Face's transformers.

  A paper's file holds one as `LAYOUT`; `mmjax.from_pretrained` finds it there
  by the `architectures` of a directory's config.json.

  Attributes:
    architectures: the names that this layout reads.
    system: (config.json, names of the tensors) -> the module. The names are
      for what a config leaves unsaid, such as an optional pooler.
    config: the module -> the config.json that describes it, defaults included;
      raises ValueError for a module that transformers has no words for.
    table: the module -> its rules.
    inputs: the module -> abstract keyword arguments of its `__call__`.
  """

  architectures: tuple[str, ...]
  system: Callable[[Mapping[str, Any], Collection[str]], Any]
  config: Callable[[Any], dict[str, Any]]
  table: Callable[[Any], Table]
  inputs: Callable[[Any], dict[str, Any]]


def below(table: Table, target: str) -> list[Rule | Ignore]:
  """The rules of a table for a system that is a part of another.

  Args:
    table: of the part alone.
    target: where the part stands, ending in a slash.
  """

  def moved(rule: Rule | Ignore) -> Rule | Ignore:
    if isinstance(rule, Ignore):
      return rule
    single = isinstance(rule.target, str)
    inner = target + rule.target if single else tuple(
        target + path for path in rule.target
    )
    return dataclasses.replace(rule, target=inner)

  return [moved(rule) for rule in table]
