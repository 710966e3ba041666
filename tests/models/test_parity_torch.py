"""Both directions against PyTorch and transformers, where they are installed.

Imports and exports of random configs; the stored goldens in `test_pretrained`
need neither.
"""

import jax
import numpy as np
import pytest

from mmjax import pretrained
from mmjax.models import clip
from mmjax.weights import layout

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu")


def pick(rng: np.random.Generator, *options):
  return options[rng.integers(len(options))]


def random_tower(rng: np.random.Generator) -> dict:
  heads = int(rng.integers(1, 6))
  return dict(
      hidden_size=heads * int(rng.integers(3, 12)),
      num_hidden_layers=int(rng.integers(1, 4)),
      num_attention_heads=heads,
      intermediate_size=int(rng.integers(8, 70)),
      hidden_act=pick(rng, *ACTIVATIONS, "silu"),
      layer_norm_eps=pick(rng, 1e-12, 1e-6, 1e-5, 1e-3),
  )


def random_vit(rng: np.random.Generator):
  patch = int(rng.integers(2, 9))
  rows, columns = (int(n) for n in rng.integers(1, 6, size=2))
  config = transformers.ViTConfig(
      **random_tower(rng),
      image_size=pick(rng, [rows * patch, columns * patch], rows * patch),
      patch_size=patch,
      num_channels=int(rng.integers(1, 5)),
      num_labels=int(rng.integers(2, 9)),
      qkv_bias=bool(rng.integers(2)),
      pooler_output_size=int(rng.integers(4, 30)),
      pooler_act=pick(rng, "tanh", "gelu"),
  )
  architecture = pick(rng, "ViTModel", "ViTForImageClassification")
  return getattr(transformers, architecture)(config)


def random_clip(rng: np.random.Generator):
  patch, vocab = int(rng.integers(2, 9)), int(rng.integers(20, 90))
  return transformers.CLIPModel(
      transformers.CLIPConfig(
          projection_dim=int(rng.integers(5, 40)),
          vision_config=random_tower(rng) | dict(
              image_size=patch * int(rng.integers(1, 6)), patch_size=patch
          ),
          text_config=random_tower(rng) | dict(
              vocab_size=vocab,
              max_position_embeddings=int(rng.integers(6, 20)),
              eos_token_id=pick(rng, 2, vocab - 1, vocab // 2),
          ),
      )
  )


@torch.no_grad()
def randomize(model, rng: np.random.Generator):
  for name, parameter in model.named_parameters():
    noise = rng.normal(size=parameter.shape)
    if name.endswith("weight") and parameter.ndim == 1:
      value = 1 + 0.2 * noise
    elif name == "logit_scale":
      value = 1 + 0.2 * noise
    elif parameter.ndim > 1 and "embed" not in name:
      value = 1.5 * noise / np.sqrt(parameter[0].numel())
    else:
      value = 0.4 * noise
    parameter.copy_(torch.from_numpy(np.asarray(value)))
  return model.eval()


def inputs_of(model, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """The two sides differ in the names and in the place of the channels."""
  config = getattr(model.config, "vision_config", model.config)
  size = config.image_size
  height, width = (size, size) if isinstance(size, int) else size
  image = rng.uniform(-1, 1, (3, height, width, config.num_channels))
  made = {"image": image.astype(np.float32)}
  text = getattr(model.config, "text_config", None)
  if text is not None:
    length, eos = text.max_position_embeddings, text.eos_token_id
    tokens = rng.integers(3, text.vocab_size - 1, (3, length))
    end = text.vocab_size - 1 if eos == 2 else eos
    tokens[tokens == end] = 3
    for row in range(3):
      tokens[row, length - 1 - row :] = end
    made["tokens"] = tokens.astype(np.int32)
  return made


@torch.no_grad()
def their_outputs(model, inputs) -> dict[str, np.ndarray]:
  image = torch.from_numpy(inputs["image"]).permute(0, 3, 1, 2)
  if isinstance(model, transformers.CLIPModel):
    output = model(
        pixel_values=image,
        input_ids=torch.from_numpy(inputs["tokens"]).long(),
    )
    found = {
        "image": output.image_embeds,
        "text": output.text_embeds,
        "logits": output.logits_per_image,
        "tokens": output.text_model_output.last_hidden_state,
        "patches": output.vision_model_output.last_hidden_state,
    }
  elif isinstance(model, transformers.ViTModel):
    output = model(pixel_values=image)
    found = {
        "tokens": output.last_hidden_state, "pooled": output.pooler_output,
    }
  else:
    output = model(pixel_values=image, output_hidden_states=True)
    tokens = model.vit.layernorm(output.hidden_states[-1])
    found = {
        "tokens": tokens, "pooled": tokens[:, 0], "logits": output.logits,
    }
  return {key: value.numpy() for key, value in found.items()}


def our_outputs(system, variables, inputs) -> dict[str, jax.Array]:
  def run(variables, inputs):
    output = system.apply(variables, **inputs)
    if "tokens" not in inputs:
      return {k: v for k, v in output._asdict().items() if v is not None}
    image = system.apply(variables, inputs["image"], method="encode_image")
    text = system.apply(variables, inputs["tokens"], method="encode_text")
    return {
        "image": output.image,
        "text": output.text,
        "logits": output.scale * output.image @ output.text.T,
        "tokens": text.tokens,
        "patches": image.tokens,
    }

  with jax.default_matmul_precision("highest"):
    return jax.jit(run)(variables, inputs)


def check_outputs(found, expected) -> None:
  assert set(found) == set(expected)
  for key, array in expected.items():
    assert found[key].shape == array.shape, key
    worst = np.abs(found[key] - array).max() / np.abs(array).max()
    assert worst < 1e-4, (key, worst)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [random_vit, random_clip])
def test_import_and_export(make, seed, tmp_path):
  rng = np.random.default_rng(seed)
  model = randomize(make(rng), rng)
  model.save_pretrained(
      tmp_path / "theirs", max_shard_size=pick(rng, "20KB", "1GB")
  )
  inputs = inputs_of(model, rng)
  system, variables, _ = pretrained.from_pretrained(tmp_path / "theirs")
  check_outputs(
      our_outputs(system, variables, inputs), their_outputs(model, inputs)
  )
  fresh = jax.tree.map(
      lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape), variables
  )
  fresh = jax.tree.map(np.float32, fresh)
  pretrained.save_pretrained(
      tmp_path / "ours",
      system,
      fresh,
      max_shard_bytes=pick(rng, 20_000, 10**9),
  )
  again, report = type(model).from_pretrained(
      tmp_path / "ours", output_loading_info=True
  )
  assert not any(report.values()), report
  assert again.config.architectures == [type(model).__name__]
  check_outputs(
      our_outputs(system, fresh, inputs), their_outputs(again.eval(), inputs)
  )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(dtype, tmp_path):
  rng = np.random.default_rng(0)
  model = randomize(random_clip(rng), rng)
  model.save_pretrained(tmp_path / "theirs")
  system, variables, _ = pretrained.from_pretrained(tmp_path / "theirs")
  pretrained.save_pretrained(
      tmp_path / "ours", system, variables, dtype=dtype
  )
  again = type(model).from_pretrained(tmp_path / "ours", dtype="auto")
  assert again.dtype == getattr(torch, dtype)
  rounded = {
      name: value.to(again.dtype) for name, value in model.state_dict().items()
  }
  for name, value in again.state_dict().items():
    assert torch.equal(value, rounded[name]), name


def meaning(directory) -> dict:
  """What transformers understands, without what a system does not know."""
  config = transformers.AutoConfig.from_pretrained(directory).to_dict()
  config["image_size"] = layout.pair(config.get("image_size", 0))
  if config["architectures"] == ["ViTForImageClassification"]:
    del config["pooler_output_size"], config["pooler_act"]
  else:
    config.pop("id2label", None), config.pop("label2id", None)
  for tower in ("text_config", "vision_config"):
    # Which ids begin and pad a text; the joint width, which the models take
    # from above the towers.
    for key in ("bos_token_id", "pad_token_id", "projection_dim"):
      config.get(tower, {}).pop(key, None)
  return {k: v for k, v in config.items() if k != "_name_or_path"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [random_vit, random_clip])
def test_the_made_config_means_the_same_to_transformers(make, seed, tmp_path):
  make(np.random.default_rng(seed)).save_pretrained(tmp_path / "theirs")
  system, variables, _ = pretrained.from_pretrained(tmp_path / "theirs")
  pretrained.save_pretrained(tmp_path / "ours", system, variables)
  assert meaning(tmp_path / "ours") == meaning(tmp_path / "theirs")


@pytest.mark.parametrize("second", [
    dict(hidden_size=24, num_attention_heads=4, intermediate_size=30), None,
])
def test_second_copies_of_tower_configs(second):
  config = dict(
      text_config=dict(hidden_size=48, eos_token_id=2, layer_norm_eps=1e-3),
      text_config_dict=second,
      vision_config=dict(hidden_size=24, num_hidden_layers=2),
      vision_config_dict=second,
  )
  reference = transformers.CLIPConfig(**config)
  system = clip.LAYOUT.system(config, [])
  for ours, theirs in (
      (system.text, reference.text_config),
      (system.vision, reference.vision_config),
  ):
    assert ours.width == theirs.hidden_size
    assert ours.depth == theirs.num_hidden_layers
    assert ours.heads == theirs.num_attention_heads
    assert ours.mlp == theirs.intermediate_size
    assert ours.epsilon == theirs.layer_norm_eps
  assert (system.text.eot or 2) == reference.text_config.eos_token_id
