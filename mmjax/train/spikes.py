"""When does a loss jump, and where does the run go on then?

Chowdhery et al. (2022, PaLM, section 5.1) restart about 100 steps before a
spike and leave out the batches around it: with other data it does not return.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, SupportsFloat


@dataclasses.dataclass(frozen=True)
class Policy:
  """The key `rewind` of a config.

  Attributes:
    spike: a loss so many standard deviations above its moving mean is a spike;
      0 looks for none.
    window: steps that the moving mean and deviation remember, about; none is
      called a spike before so many.
    back: go back to a checkpoint at least so many steps before the spike, or
      to the first state.
    skip: leave out so many batches behind that of the spike, beside those
      that were read between the checkpoint and the spike.
    most: rewinds of a run, at most; the next spike stops it.
  """

  spike: float
  window: int
  back: int
  skip: int
  most: int

  def __post_init__(self) -> None:
    if min(self.spike, self.back, self.skip, self.most) < 0 or self.window < 1:
      raise ValueError(
          f"config.rewind: expected numbers >= 0 and window >= 1, got {self}"
      )


class Spike(Exception):
  """The loss of a step jumped.

  Attributes:
    step: which.
    batches: global batches taken up to it.
  """

  def __init__(self, step: int, batches: int, text: str) -> None:
    super().__init__(text)
    self.step, self.batches = step, batches


class Monitor:
  """Follows a loss; every process sees the same and so decides the same.

  The moments decay exponentially, with the weights of what has been seen
  normalised to 1 (Kingma and Ba 2015, section 3).
  """

  def __init__(
      self, policy: Policy, facts: Mapping[str, Any] | None = None
  ) -> None:
    """`facts`: what `facts` gave when a checkpoint was saved."""
    self.policy = policy
    self._facts = dict(seen=0, mean=0.0, square=0.0) | dict(facts or {})

  def facts(self) -> dict[str, Any]:
    """What another monitor needs to go on, as JSON."""
    return dict(self._facts)

  def look(self, step: int, batches: int, loss: SupportsFloat) -> None:
    """Takes the loss of a step; one that is not finite tells nothing.

    Args:
      step: which.
      batches: global batches taken up to it.
      loss: f32[], left on the device if nobody looks for spikes.

    Raises:
      Spike: if it jumped.
    """
    if not self.policy.spike or not math.isfinite(loss := float(loss)):
      return
    seen, decay = self._facts["seen"], 1 - 1 / self.policy.window
    if seen >= self.policy.window:
      weight = 1 - decay**seen
      mean = self._facts["mean"] / weight
      variance = self._facts["square"] / weight - mean**2
      # Of a loss that stands still, rounding is no jump.
      deviation = max(math.sqrt(max(variance, 0.0)), 1e-3 * abs(mean))
      limit = mean + self.policy.spike * deviation
      if loss > limit:
        raise Spike(
            step,
            batches,
            f"step {step:,}: the loss jumped to {loss:.4g}, above {limit:.4g}",
        )
    self._facts["seen"] = seen + 1
    for name, value in (("mean", loss), ("square", loss**2)):
      old = self._facts[name]
      self._facts[name] = decay * old + (1 - decay) * value
