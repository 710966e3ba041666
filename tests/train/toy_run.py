"""A run that compiles in a second: blobs of colour, a linear classifier.

As a config file: `--config tests/train/toy_run.py`.
"""

import os
import pathlib
import time

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mmjax import config as config_lib
from mmjax.nn import linear
from mmjax.objectives import classification
from mmjax.objectives.term import objective

CLASSES = 4

# An environment variable that names a file: until it exists, a source gives
# only so many examples, so that a test can stop a run in its middle.
GATE, OPEN = "TOY_RUN_GATE", 128


class Net(nn.Module):
  width: int = 16

  @nn.compact
  def __call__(self, image):
    x = image.reshape(image.shape[0], -1)
    x = linear.Linear(self.width, linear.EMBED_TO_JOINT, name="body")(x)
    return linear.Linear(CLASSES, linear.EMBED_TO_VOCAB, name="head")(
        jnp.tanh(x)
    )


@objective("image", "label")
def classify(system, variables, batch, context):
  logits = system.apply(variables, batch["image"])
  return classification.terms(logits, batch["label"]), {}


class Blobs:
  """Noise around one colour per class; `bad` examples are not finite."""

  def __init__(self, size=64, keys=("image", "label"), bad=False):
    self.size, self.keys, self.bad = size, keys, bad
    self.given = 0

  def __len__(self):
    return self.size

  def __getitem__(self, index):
    self.given += 1
    gate = os.environ.get(GATE)
    while gate and self.given > OPEN and not pathlib.Path(gate).exists():
      time.sleep(0.02)
    rng = np.random.default_rng(index)
    label = index % CLASSES
    image = rng.normal(label / CLASSES, 0.1, (4, 4, 3)).astype(np.float32)
    example = {
        "image": image * (np.nan if self.bad else 1),
        "label": np.int32(label),
    }
    return {key: example[key] for key in self.keys}


class Norm:
  """An evaluator: the norm of the head, and a grey picture."""

  def __init__(self, grey=128):
    self.grey = grey

  def __call__(self, system, variables):
    kernel = variables["params"]["head"]["kernel"]
    picture = np.full((2, 3, 3), self.grey, np.uint8)
    return {"norm": float(jnp.linalg.norm(kernel))}, {"grey": picture}


def get_config(arg=None):
  del arg
  config = config_lib.base()
  here = "tests.train.toy_run"
  config.system = dict(type=f"{here}:Net")
  config.objective = dict(type=f"{here}:classify")
  config.weights = dict(cross_entropy=1.0)
  config.optim = ((".*", dict(type="mmjax.train.optim:adamw", lr=1e-2)),)
  config.shadow = (("head/.*", 0.5),)
  config.batch_size, config.steps = 16, 12
  source = dict(type=f"{here}:Blobs", bad=False)
  config.streams = (dict(source=source, weight=1.0),)
  config.evals = dict(head=dict(type=f"{here}:Norm"))
  config.log_every, config.checkpoint_every = 4, 4
  return config.lock()
