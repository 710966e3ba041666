"""SigLIP and NaFlex against PyTorch and transformers, both directions.

Skipped where these are not installed; the stored goldens in `test_siglip` need
neither.
"""

import jax
import numpy as np
import pytest

from mmjax import pretrained
from mmjax.nn import position

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.models import test_parity_torch as shared  # noqa: E402


def random_text(rng: np.random.Generator, width: int) -> dict:
  tower = shared.random_tower(rng)
  same = tower["hidden_size"] == width
  return tower | dict(
      vocab_size=int(rng.integers(20, 90)),
      max_position_embeddings=int(rng.integers(6, 20)),
      projection_size=None if same else width,
  )


def random_fixed(rng: np.random.Generator):
  vision = shared.random_tower(rng)
  patch = int(rng.integers(2, 9))
  vision |= dict(
      patch_size=patch,
      image_size=patch * int(rng.integers(1, 6)) + int(rng.integers(patch)),
  )
  text = random_text(rng, vision["hidden_size"])
  return transformers.SiglipModel(
      transformers.SiglipConfig(vision_config=vision, text_config=text)
  )


def random_flex(rng: np.random.Generator):
  vision = shared.random_tower(rng) | dict(
      patch_size=int(rng.integers(1, 6)),
      num_patches=int(rng.integers(1, 8)) ** 2,
  )
  text = random_text(rng, vision["hidden_size"])
  return transformers.Siglip2Model(
      transformers.Siglip2Config(vision_config=vision, text_config=text)
  )


def inputs_of(model, rng: np.random.Generator) -> dict[str, np.ndarray]:
  vision, text = model.config.vision_config, model.config.text_config
  shape = 3, text.max_position_embeddings
  made = {"tokens": rng.integers(0, text.vocab_size, shape).astype(np.int32)}
  if isinstance(model, transformers.SiglipModel):
    side = vision.image_size
    image = rng.uniform(-1, 1, (3, side, side, 3))
    return made | {"image": image.astype(np.float32)}
  # On a CPU PyTorch 2.13 repeats the first row of a table that it resizes to a
  # single column.
  grid = rng.integers((1, 2), 8, (3, 2)).astype(np.int32)
  slots = int(grid.prod(axis=1).max() + rng.integers(4))
  shape = 3, slots, 3 * vision.patch_size**2
  return made | {
      "patches": rng.uniform(-1, 1, shape).astype(np.float32), "grid": grid
  }


@torch.no_grad()
def their_outputs(model, inputs) -> dict[str, np.ndarray]:
  made = {key: torch.from_numpy(value) for key, value in inputs.items()}
  if "image" in made:
    pictures = dict(pixel_values=made["image"].permute(0, 3, 1, 2))
  else:
    slots = torch.arange(made["patches"].shape[1])
    pictures = dict(
        pixel_values=made["patches"],
        pixel_attention_mask=(
            slots < made["grid"].prod(dim=1, keepdim=True)
        ).long(),
        spatial_shapes=made["grid"].long(),
    )
  output = model(input_ids=made["tokens"].long(), **pictures)
  found = {
      "image": output.image_embeds,
      "text": output.text_embeds,
      "logits": output.logits_per_image,
      "tokens": output.text_model_output.last_hidden_state,
      "patches": output.vision_model_output.last_hidden_state,
  }
  return {key: value.numpy() for key, value in found.items()}


def our_outputs(system, variables, inputs) -> dict[str, jax.Array]:
  def run(variables, inputs):
    pictures = {key: x for key, x in inputs.items() if key != "tokens"}
    image = system.apply(variables, **pictures, method="encode_image")
    text = system.apply(variables, inputs["tokens"], method="encode_text")
    pairs = system.apply(variables, **inputs)
    return {
        "image": pairs.image,
        "text": pairs.text,
        "logits": pairs.scale * pairs.image @ pairs.text.T + pairs.bias,
        "tokens": text.tokens,
        "patches": image.tokens,
    }

  with jax.default_matmul_precision("highest"):
    return jax.jit(run)(variables, inputs)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [random_fixed, random_flex])
def test_import_and_export(make, seed, tmp_path):
  rng = np.random.default_rng(seed)
  model = shared.randomize(make(rng), rng)
  model.save_pretrained(
      tmp_path / "theirs", max_shard_size=shared.pick(rng, "20KB", "1GB")
  )
  inputs = inputs_of(model, rng)
  system, variables, _ = pretrained.from_pretrained(tmp_path / "theirs")
  shared.check_outputs(
      our_outputs(system, variables, inputs), their_outputs(model, inputs)
  )
  fresh = jax.tree.map(
      lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), variables
  )
  pretrained.save_pretrained(tmp_path / "ours", system, fresh)
  again, report = type(model).from_pretrained(
      tmp_path / "ours", output_loading_info=True
  )
  assert not any(report.values()), report
  assert again.config.architectures == [type(model).__name__]
  shared.check_outputs(
      our_outputs(system, fresh, inputs), their_outputs(again.eval(), inputs)
  )


@pytest.mark.parametrize("make", [random_fixed, random_flex])
def test_the_made_config_means_the_same_to_transformers(make, tmp_path):
  make(np.random.default_rng(7)).save_pretrained(tmp_path / "theirs")
  system, variables, _ = pretrained.from_pretrained(tmp_path / "theirs")
  pretrained.save_pretrained(tmp_path / "ours", system, variables)
  ours, theirs = (
      transformers.AutoConfig.from_pretrained(tmp_path / folder).to_dict()
      for folder in ("ours", "theirs")
  )
  for found in (ours, theirs):
    found.pop("_name_or_path", None)
  assert ours == theirs


@pytest.mark.parametrize("old", [1, 3, 16])
@pytest.mark.parametrize("new", [(5, 16), (1, 4), (3, 2), (16, 16)])
def test_positions_are_resized_as_pytorch_does(old, new):
  table = np.random.default_rng(0).normal(size=(old, old)).astype(np.float32)
  theirs = torch.nn.functional.interpolate(
      torch.from_numpy(table)[None, None], new, mode="bilinear", antialias=True
  )
  rows, columns = (
      position.triangle_weights(np.arange(n), np.full(n, n), old) for n in new
  )
  np.testing.assert_allclose(
      rows @ table @ columns.T, theirs[0, 0], atol=1e-5
  )
