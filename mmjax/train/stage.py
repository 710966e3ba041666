"""What is one stage of training? A frozen description, built from a config."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmjax import config as config_lib
from mmjax.train import optim
from mmjax.train import rules as rules_lib

Weight = float | Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage: a system, its losses, and what of it is trained how.

  Attributes:
    system: a Linen module whose `__call__` takes batch keys by name and
      touches every parameter.
    objective: `(system, variables, batch, context) -> (terms, mutables)`.
    weights: term name -> weight, a number or a schedule of the step. Terms
      that it does not name are reported only.
    optim: ordered (pattern, transformation or None to freeze).
    shadow: ordered (pattern, decay): 1 is a fixed copy of the first
      parameters, below 1 an exponential moving average.
    imports: callables `(system, abstract) -> {path: array}` that fill
      parameters instead of drawing them; later ones win.
    batch_size: global batch B.
    accumulate: microbatches per step.
    steps: optimizer steps.
    frozen_dtype: storage of frozen parameters.
    seed: of initialisation, dropout and sampling.
  """

  system: Any
  objective: Callable[..., Any]
  weights: Mapping[str, Weight]
  optim: optim.Rules
  batch_size: int
  steps: int
  shadow: Sequence[tuple[str, float]] = ()
  imports: Sequence[Callable[..., Any]] = ()
  accumulate: int = 1
  frozen_dtype: Any = jnp.float32
  seed: int = 0

  def __post_init__(self) -> None:
    if self.batch_size % self.accumulate:
      raise ValueError(
          f"batch_size={self.batch_size} is not divisible by "
          f"accumulate={self.accumulate}"
      )
    coupled = getattr(self.objective, "couples_batch", False)
    if self.accumulate > 1 and coupled:
      raise ValueError(
          f"accumulate={self.accumulate}: {self.objective.__name__} compares "
          "the examples of a batch with each other, so its loss is no sum over "
          "microbatches; set accumulate=1 and save memory with remat"
      )

  @property
  def needs(self) -> tuple[str, ...]:
    """The batch keys that the objective reads."""
    return getattr(self.objective, "needs", ())

  def check_stream(self, keys: Iterable[str], where: str) -> None:
    """Refuses a stream that lacks a key which the objective needs."""
    missing = sorted(set(self.needs) - set(keys))
    if missing:
      raise ValueError(
          f"objective {self.objective.__name__} needs the batch keys "
          f"{sorted(self.needs)}; {where} gives {sorted(keys)} and lacks "
          f"{missing}"
      )

  def check_mesh(self, parts: int) -> None:
    """Refuses a batch that a mesh cannot split into `parts`."""
    rows = self.batch_size // self.accumulate
    if rows % parts:
      raise ValueError(
          f"batch_size={self.batch_size} in {self.accumulate} microbatches is "
          f"{rows} rows, not divisible by the {parts} parts (data x fsdp) of "
          "the mesh"
      )

  def live_paths(self, paths: Iterable[str]) -> list[str]:
    """The sorted paths of the parameters that are trained."""
    live = sorted(optim.live_paths(list(paths), self.optim))
    if not live:
      raise ValueError("optim: every parameter is frozen; nothing to train")
    return live

  def optimizer(self, paths: Iterable[str]) -> optax.GradientTransformation:
    """The transformation of the live ones among all `paths`."""
    return optim.partition(list(paths), self.optim)

  def shadow_decay(self, live: Iterable[str]) -> dict[str, float]:
    """path -> decay of the live parameters that have a slow copy."""
    owner = rules_lib.assign(
        live, [pattern for pattern, _ in self.shadow], "shadow", partial=True
    )
    return {path: self.shadow[index][1] for path, index in owner.items()}

  def combine(
      self, ratios: Mapping[str, jax.Array], step: jax.Array
  ) -> jax.Array:
    """The loss f32[]: the weighted sum of the terms that `weights` names.

    Raises:
      ValueError: if the objective has no term of that name.
    """
    unknown = sorted(set(self.weights) - set(ratios))
    if unknown:
      raise ValueError(
          f"weights: no term {unknown}; {self.objective.__name__} gives "
          f"{sorted(ratios)}"
      )
    return sum(
        (weight(step) if callable(weight) else weight) * ratios[name]
        for name, weight in self.weights.items()
    )


def from_config(config: Mapping[str, Any]) -> Stage:
  """Builds the stage that a config describes (its keys: ARCHITECTURE.md).

  Raises:
    ValueError: naming the config key that is wrong, before anything runs.
  """
  return Stage(
      system=config_lib.build(config["system"], "config.system"),
      objective=config_lib.bind(config["objective"], "config.objective"),
      weights={
          name: _weight(value, f"config.weights.{name}")
          for name, value in config["weights"].items()
      },
      optim=[
          (pattern, node and config_lib.build(node, f"config.optim[{i}]"))
          for i, (pattern, node) in enumerate(config["optim"])
      ],
      shadow=tuple(config["shadow"]),
      imports=[
          config_lib.bind(node, f"config.imports[{i}]")
          for i, node in enumerate(config["imports"])
      ],
      batch_size=config["batch_size"],
      accumulate=config["accumulate"],
      steps=config["steps"],
      frozen_dtype=jnp.dtype(config["frozen_dtype"]),
      seed=config["seed"],
  )


def _weight(value: Any, where: str) -> Weight:
  if isinstance(value, Mapping):
    return config_lib.build(value, where)
  return float(value)
