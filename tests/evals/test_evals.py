"""Evaluators against answers known beforehand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import sharding
from mmjax.evals import classification, figures, retrieval, run, zero_shot
from mmjax.models.clip import CLIPOutput, ImageFeatures, TextFeatures


class Labels:
  """Pictures whose first pixel is their label; 11 examples of 3 classes."""

  def __len__(self):
    return 11

  def __getitem__(self, i):
    image = np.zeros((2, 2, 3), np.float32)
    image[0, 0] = i % 3
    tokens = np.full(4, i % 3, np.int32)
    return {"image": image, "label": np.int32(i % 3), "tokens": tokens}

  def caption(self, i):
    return f"class {i % 3}"


class Pairs(Labels):
  """Three pairs whose captions differ."""

  def __len__(self):
    return 3


class Oracle(nn.Module):
  """Embeds pictures and tokens by their label, class 2 as class 1."""

  swap: bool = False

  def _embed(self, label, swap=False):
    label = jnp.where(swap & (label == 2), 1, label.astype(jnp.int32))
    return 5.0 * jax.nn.one_hot(label, 4)

  def encode_image(self, image):
    embed = self._embed(image[:, 0, 0, 0], self.swap)
    return ImageFeatures(embed, embed, embed)

  def encode_text(self, tokens):
    embed = self._embed(tokens[:, 0])
    return TextFeatures(embed, embed, embed)

  def __call__(self, image, tokens):
    embed = self.encode_image(image).embed
    return CLIPOutput(embed, self.encode_text(tokens).embed, jnp.float32(1))


class Words:
  """Encodes "is <n>" as n."""

  def encode(self, texts):
    return np.array([[int(t.split()[-1])] * 4 for t in texts], np.int32)


@pytest.mark.parametrize("mesh", [None, dict(data=8), dict(data=2, tensor=4)])
def test_every_example_counts_once_whatever_the_batch(mesh):
  mesh = sharding.make_mesh(mesh or {}, jax.devices()[: 8 if mesh else 1])
  with jax.set_mesh(mesh):
    for batch_size in (3, 4, 64):
      found = run.map_source(
          lambda _, batch: {"twice": 2 * batch["image"][:, 0, 0, 0]},
          {},
          Labels(),
          batch_size,
      )
      assert found["twice"].tolist() == [2 * (i % 3) for i in range(11)]
      assert found["label"].tolist() == [i % 3 for i in range(11)]
      assert "valid" not in found


def test_accuracy():
  class Guess(nn.Module):

    def __call__(self, image):
      from mmjax.models.vit import ViTOutput

      label = image[:, 0, 0, 0].astype(jnp.int32)
      logits = jax.nn.one_hot(jnp.minimum(label, 1), 3)
      return ViTOutput(image, image, logits)

  metrics, _ = classification.Accuracy(Labels(), 4)(Guess(), {})
  assert metrics["top1"] == pytest.approx(8 / 11)


def make_zero_shot():
  return zero_shot.ZeroShot(
      Labels(), Words(), ["0", "1", "2"], ["is {}", "a b is {}"], batch_size=4
  )


def test_zero_shot_reads_classes_from_prompts():
  metrics, pictures = make_zero_shot()(Oracle(), {})
  assert metrics == {"top1": 1.0}
  metrics, pictures = make_zero_shot()(Oracle(swap=True), {})
  assert metrics["top1"] == pytest.approx(8 / 11)
  assert pictures["confusion"].dtype == np.uint8


def test_the_classifier_is_the_scaled_mean_of_unit_prompts():
  rows = make_zero_shot().classifier(Oracle(), {})
  np.testing.assert_allclose(rows, np.eye(4)[:3], atol=1e-6)


def test_recall_counts_ties_against_the_row():
  scores = np.array([[3, 1, 2], [5, 5, 0], [0, 1, 0.5]], np.float32)
  assert retrieval.recall_at(scores, 1) == pytest.approx(1 / 3)
  assert retrieval.recall_at(scores, 2) == pytest.approx(1.0)
  assert retrieval.recall_at(np.zeros((4, 4)), 1) == 0.0
  assert retrieval.recall_at(scores, 1, np.array([0, 0, 1])) == pytest.approx(
      2 / 3
  )


def test_retrieval_and_its_figure():
  metrics, pictures = retrieval.Retrieval(Pairs(), ks=(1, 2))(Oracle(), {})
  assert metrics == dict(i2t_r1=1.0, t2i_r1=1.0, i2t_r2=1.0, t2i_r2=1.0)
  assert pictures["captions"].ndim == 3
  metrics, _ = retrieval.Retrieval(Pairs(), ks=(1,))(Oracle(swap=True), {})
  assert metrics["i2t_r1"] == pytest.approx(2 / 3)


def test_pictures():
  image = np.array([[[-1.0, 0.0, 1.0]]])
  assert figures.to_uint8(image).tolist() == [[[0, 128, 255]]]
  sheet = figures.captioned_grid([np.zeros((4, 4, 3))] * 5, ["x"] * 5, [1] * 5)
  assert sheet.shape == (2 * 192, 4 * 160, 3)
