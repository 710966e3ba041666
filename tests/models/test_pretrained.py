"""Directories in and out, and the outputs that transformers stored in them."""

import functools
import json
from pathlib import Path
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import pretrained, sharding
from mmjax.models import clip, vit
from mmjax.nn import linear
from mmjax.weights import engine, safetensors_file, source

GOLDEN = Path(__file__).parents[1] / "golden"
VIT = ("vit_classifier", "vit_pooler", "vit_grey")
CLIP = ("clip_quick", "clip_gelu", "clip_legacy")


def tensors(directory) -> dict[str, np.ndarray]:
  opened = source.open_source(directory)
  return {name: opened.read(name) for name in opened.tensors}


def check_tensors(found, expected) -> None:
  assert set(found) == set(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


def nest(params: dict) -> dict:
  tree: dict = {}
  for path, leaf in params.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def golden(name: str) -> tuple[dict, dict]:
  """Inputs and outputs that the reference implementation stored."""
  arrays = np.load(GOLDEN / name / "golden.npz")
  return tuple(
      {key[len(kind) :]: arrays[key] for key in arrays if key.startswith(kind)}
      for kind in ("in.", "out.")
  )


def check_outputs(found, expected) -> None:
  assert set(found) == set(expected)
  for key, array in expected.items():
    assert found[key].shape == array.shape, key
    worst = np.abs(found[key] - array).max() / np.abs(array).max()
    assert worst < 1e-4, (key, worst)


def vit_outputs(system, variables, inputs) -> dict:
  output = system.apply(variables, inputs["image"])._asdict()
  return {key: value for key, value in output.items() if value is not None}


def clip_outputs(system, variables, inputs) -> dict:
  image = system.apply(variables, inputs["image"], method="encode_image")
  text = system.apply(variables, inputs["tokens"], method="encode_text")
  pair = system.apply(variables, **inputs)
  terms, _ = clip.contrast(system, variables, inputs, None)
  return {
      "image_tokens": image.tokens,
      "image_pooled": image.pooled,
      "image_projected": image.embed,
      "text_tokens": text.tokens,
      "text_pooled": text.pooled,
      "text_projected": text.embed,
      "image_embed": pair.image,
      "text_embed": pair.text,
      "logits_per_image": pair.scale * pair.image @ pair.text.T,
      "loss": terms["contrastive"].total / terms["contrastive"].weight,
  }


@pytest.mark.parametrize("name", VIT + CLIP)
def test_outputs_are_those_of_the_reference(name):
  system, variables, config = pretrained.from_pretrained(GOLDEN / name)
  assert config == json.loads((GOLDEN / name / "config.json").read_text())
  inputs, expected = golden(name)
  run = jax.jit(
      functools.partial(vit_outputs if name in VIT else clip_outputs, system)
  )
  with jax.default_matmul_precision("highest"):
    check_outputs(run(variables, inputs), expected)


@pytest.mark.parametrize("name", VIT + CLIP)
def test_round_trip_keeps_every_bit(name, tmp_path):
  system, variables, config = pretrained.from_pretrained(GOLDEN / name)
  pretrained.save_pretrained(
      tmp_path / "out", system, variables, config=config, dtype=config["dtype"]
  )
  check_tensors(tensors(tmp_path / "out"), tensors(GOLDEN / name))
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written == config


@pytest.mark.parametrize("name", VIT + CLIP)
def test_the_config_that_is_made_describes_the_system(name, tmp_path):
  system, variables, config = pretrained.from_pretrained(GOLDEN / name)
  pretrained.save_pretrained(tmp_path / "out", system, variables)
  again = pretrained.from_pretrained(tmp_path / "out")
  assert again.system == system
  assert again.config["dtype"] == "float32"
  jax.tree.map(np.testing.assert_array_equal, again.variables, variables)
  for key in ("architectures", "model_type", "image_size", "projection_dim"):
    assert again.config.get(key) == config.get(key)


def test_shards_and_their_index(tmp_path):
  system, variables, _ = pretrained.from_pretrained(GOLDEN / "clip_quick")
  pretrained.save_pretrained(
      tmp_path / "out", system, variables, max_shard_bytes=40_000
  )
  index = json.loads((tmp_path / "out" / source.INDEX).read_text())
  shards = sorted(set(index["weight_map"].values()))
  assert len(shards) > 2
  assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
  sizes = []
  for shard in shards:
    file = safetensors_file.SafetensorsFile(tmp_path / "out" / shard)
    sizes.append(sum(file.read(name).nbytes for name in file.tensors))
    assert {index["weight_map"][name] for name in file.tensors} == {shard}
  assert max(sizes) <= 40_000
  assert index["metadata"]["total_size"] == sum(sizes)
  check_tensors(
      tensors(tmp_path / "out"), tensors(GOLDEN / "clip_quick")
  )


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(tmp_path):
  system, variables, _ = pretrained.from_pretrained(GOLDEN / "vit_grey")
  pretrained.save_pretrained(
      tmp_path / "out", system, variables, max_shard_bytes=1
  )
  index = json.loads((tmp_path / "out" / source.INDEX).read_text())
  shards = index["weight_map"].values()
  assert len(set(shards)) == len(shards) == 21


def test_dtype_of_import_and_export(tmp_path):
  directory = GOLDEN / "vit_classifier"
  half = pretrained.from_pretrained(directory, dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(half.variables)} == {
      jnp.dtype(jnp.bfloat16)
  }
  pretrained.save_pretrained(tmp_path / "out", half.system, half.variables)
  assert pretrained.from_pretrained(tmp_path / "out").config["dtype"] == (
      "bfloat16"
  )
  expected = {
      name: array.astype(jnp.bfloat16)
      for name, array in tensors(directory).items()
  }
  check_tensors(tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("name", ["vit_classifier", "clip_gelu"])
def test_parameters_go_into_their_shards(name):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  whole = pretrained.from_pretrained(GOLDEN / name)
  split = pretrained.from_pretrained(GOLDEN / name, mesh=mesh)
  jax.tree.map(
      np.testing.assert_array_equal, split.variables, whole.variables
  )
  leaves = jax.tree.leaves(split.variables)
  assert all(leaf.sharding.mesh == mesh for leaf in leaves)
  kernel = jax.tree.leaves(
      {k: v for k, v in split.variables["params"].items() if k != "head"}
  )
  assert min(
      leaf.addressable_shards[0].data.size / leaf.size for leaf in kernel
  ) == 1 / 4


def edit(tmp_path, name: str, **changes) -> Path:
  """A copy of a golden directory with some keys of its config changed."""
  shutil.copytree(GOLDEN / name, tmp_path / "copy")
  path = tmp_path / "copy" / "config.json"
  config = json.loads(path.read_text()) | changes
  path.write_text(json.dumps(config))
  return tmp_path / "copy"


def test_a_config_of_another_size_is_told_tensor_by_tensor(tmp_path):
  directory = edit(
      tmp_path, "vit_classifier", num_hidden_layers=3, intermediate_size=48
  )
  with pytest.raises(ValueError) as error:
    pretrained.from_pretrained(directory)
  message = str(error.value)
  for line in (
      "missing: vit.encoder.layer.2.attention.attention.key.bias float32[32], "
      "for encoder/blocks/attention/key/bias[2]",
      "misshaped: vit.encoder.layer.1.output.dense.weight is float32[32, 64], "
      "not float32[32, 48], for encoder/blocks/mlp/down/kernel[1]",
  ):
    assert line in message
  assert message.count("missing: vit.encoder.layer.2.") == 16


def test_a_config_without_its_head_names_the_extra_tensors(tmp_path):
  directory = edit(tmp_path, "vit_pooler", architectures=["ViTModel"])
  path = directory / source.WEIGHTS
  arrays = tensors(GOLDEN / "vit_pooler") | {
      "classifier.bias": np.zeros(3, np.float32)
  }
  safetensors_file.write(path, arrays)
  with pytest.raises(ValueError, match="head/bias, which the system lacks"):
    pretrained.from_pretrained(directory)


def test_vit_without_its_pooler(tmp_path):
  directory = edit(tmp_path, "vit_pooler")
  arrays = {
      name: array
      for name, array in tensors(GOLDEN / "vit_pooler").items()
      if not name.startswith("pooler.")
  }
  safetensors_file.write(directory / source.WEIGHTS, arrays)
  system, variables, _ = pretrained.from_pretrained(directory)
  assert system.pre_logits == 0
  inputs, expected = golden("vit_pooler")
  with jax.default_matmul_precision("highest"):
    output = jax.jit(system.apply)(variables, inputs["image"])
  np.testing.assert_allclose(output.tokens, expected["tokens"], atol=1e-4)
  np.testing.assert_array_equal(output.pooled, output.tokens[:, 0])


def test_buffers_of_early_clip_files_are_left_alone(tmp_path):
  directory = edit(tmp_path, "clip_quick")
  arrays = tensors(GOLDEN / "clip_quick") | {
      f"{tower}_model.embeddings.position_ids": np.arange(17)[None]
      for tower in ("text", "vision")
  }
  (directory / source.WEIGHTS).unlink()
  safetensors_file.write(directory / source.WEIGHTS, arrays)
  found = pretrained.from_pretrained(directory).variables
  expected = pretrained.from_pretrained(GOLDEN / "clip_quick").variables
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("changes, message", [
    (dict(architectures=["BertModel"]), "BertModel.*'ViTForImageClassificati"),
    (dict(architectures=None), "architectures is None; expected a list of on"),
    (dict(architectures="ViTModel"), "architectures is ViTModel; expected a"),
    (dict(architectures=[["ViTModel"]]), "expected a list of one of"),
    (dict(hidden_act="gelu_10"), "hidden_act 'gelu_10' is not one of"),
    (dict(patch_size=[8, 4]), r"patch_size is \(8, 4\); patches must be squa"),
    (dict(num_attention_heads=5), "width 32 is not divisible by 5 heads"),
    (dict(hidden_size="wide"), "config.json"),
])
def test_configs_that_are_refused(tmp_path, changes, message):
  directory = edit(tmp_path, "vit_classifier", **changes)
  with pytest.raises(ValueError, match=message) as error:
    pretrained.from_pretrained(directory)
  assert str(directory / "config.json") in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("{", "not JSON"), ("[]", "expected a JSON object"), ("", "not JSON"),
])
def test_damaged_config(tmp_path, text, message):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=message):
    pretrained.from_pretrained(tmp_path)


def test_missing_files(tmp_path):
  with pytest.raises(FileNotFoundError, match="expected a local directory"):
    pretrained.from_pretrained("google/vit-base-patch16-224")
  shutil.copy(GOLDEN / "vit_grey" / "config.json", tmp_path)
  with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
    pretrained.from_pretrained(tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(ValueError, match="is a pickle"):
    pretrained.from_pretrained(tmp_path)


def test_truncated_weights(tmp_path):
  directory = edit(tmp_path, "vit_grey")
  data = (directory / source.WEIGHTS).read_bytes()
  (directory / source.WEIGHTS).write_bytes(data[:-1])
  with pytest.raises(ValueError, match="truncated"):
    pretrained.from_pretrained(directory)


def test_defaults_of_a_silent_config():
  names = []
  base = vit.LAYOUT.system({"architectures": ["ViTModel"]}, names)
  assert base == vit.ViT(
      **vit.SIZES["b16"] | dict(classes=0),
      activation="gelu", epsilon=1e-12, resample="bicubic",
  )
  assert clip.LAYOUT.system({"architectures": ["CLIPModel"]}, names) == (
      clip.CLIP(
          vision=clip.ImageTower(**untyped(clip.SIZES["b32"]["vision"])),
          text=clip.TextTower(**untyped(clip.SIZES["b32"]["text"]), eot=49407),
      )
  )


def untyped(node: dict) -> dict:
  return {key: value for key, value in node.items() if key != "type"}


def test_the_second_copy_of_the_first_clip_configs_decides():
  system = clip.LAYOUT.system(
      {
          "text_config": {"hidden_size": 512, "eos_token_id": 2},
          "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
          "vision_config": {"hidden_size": 1024, "patch_size": 14},
          "vision_config_dict": None,
      },
      [],
  )
  assert (system.text.width, system.text.heads) == (768, 12)
  assert system.text.eot == 49407  # The second copy is silent on it.
  assert (system.vision.width, system.vision.patch) == (1024, 14)


@pytest.mark.parametrize("name", ["l14", "l14_336", "b16", "tiny"])
def test_clip_sizes_have_a_config(name):
  size = clip.SIZES[name]
  system = clip.CLIP(
      vision=clip.ImageTower(**untyped(size["vision"])),
      text=clip.TextTower(**untyped(size["text"])),
  )
  assert clip.LAYOUT.system(clip.LAYOUT.config(system), []) == system


def small_vit(**changes) -> vit.ViT:
  return vit.ViT(
      image=(8, 8), patch=4, width=8, depth=2, heads=2, mlp=12,
      **dict(classes=3) | changes,
  )


def draw(system: vit.ViT) -> dict:
  """Random variables, without the compilation that `init` takes."""
  rng = np.random.default_rng(0)
  shapes, _ = pretrained.abstract_params(vit.LAYOUT, system)
  leaves = {
      path: rng.normal(size=spec.shape).astype(spec.dtype)
      for path, spec in shapes.items()
  }
  return {"params": nest(leaves)}


@pytest.mark.parametrize("changes", [
    dict(pool="gap"), dict(pre_logits=8),
])
def test_systems_that_transformers_cannot_express(tmp_path, changes):
  system = small_vit(**changes)
  with pytest.raises(ValueError, match="transformers' ViT reads the class"):
    pretrained.save_pretrained(tmp_path / "out", system, draw(system))
  assert not list(tmp_path.iterdir())


def test_a_system_without_a_layout(tmp_path):
  with pytest.raises(ValueError, match="Embed of mmjax.nn.linear has no form"):
    pretrained.save_pretrained(tmp_path, linear.Embed(3, 4), {"params": {}})


def test_variables_of_another_system(tmp_path):
  variables = draw(small_vit())
  with pytest.raises(ValueError) as error:
    pretrained.save_pretrained(
        tmp_path / "out", small_vit(classes=4, pre_logits=0), variables
    )
  assert "head/bias: expected (4,), got (3,)" in str(error.value)
  with pytest.raises(ValueError, match="expected 'params' alone"):
    pretrained.save_pretrained(
        tmp_path / "out", small_vit(), variables | {"codebook": {}}
    )


def test_a_config_that_contradicts_the_system(tmp_path):
  system = small_vit()
  config = vit.LAYOUT.config(system) | {"hidden_act": "relu", "patch_size": 2}
  with pytest.raises(ValueError) as error:
    pretrained.save_pretrained(
        tmp_path / "out", system, draw(system), config=config
    )
  assert "hidden_act: expected gelu_new, got relu" in str(error.value)
  assert "patch_size: expected 4, got 2" in str(error.value)
  assert not list(tmp_path.iterdir())


class Tokenizer:
  """Writes one file, or fails while writing it."""

  def __init__(self, fails: bool):
    self.fails = fails

  def save_pretrained(self, directory: str) -> None:
    Path(directory, "vocab.json").write_text("{}")
    if self.fails:
      raise OSError("disk full")


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
  system = small_vit()
  variables = draw(system)
  with pytest.raises(OSError, match="disk full"):
    pretrained.save_pretrained(
        tmp_path / "a" / "out", system, variables, tokenizer=Tokenizer(True)
    )
  assert not list((tmp_path / "a").iterdir())
  pretrained.save_pretrained(
      tmp_path / "a" / "out", system, variables, tokenizer=Tokenizer(False)
  )
  assert {p.name for p in (tmp_path / "a").iterdir()} == {"out"}
  assert {p.name for p in (tmp_path / "a" / "out").iterdir()} == {
      "config.json", "model.safetensors", "vocab.json",
  }


def test_nothing_is_overwritten(tmp_path):
  system = small_vit()
  variables = draw(system)
  (tmp_path / "empty").mkdir()
  pretrained.save_pretrained(tmp_path / "empty", system, variables)
  before = tensors(tmp_path / "empty")
  (tmp_path / "file").write_text("mine")
  for name in ("empty", "file"):
    with pytest.raises(FileExistsError, match="give a new directory"):
      pretrained.save_pretrained(
          tmp_path / name, system, jax.tree.map(np.zeros_like, variables)
      )
  check_tensors(tensors(tmp_path / "empty"), before)
  assert (tmp_path / "file").read_text() == "mine"
  assert {p.name for p in tmp_path.iterdir()} == {"empty", "file"}


def test_a_value_that_does_not_fit_leaves_nothing_behind(tmp_path):
  system = small_vit()
  variables = draw(system)
  variables["params"]["head"]["bias"] = np.float32([0, 1e9, 0])
  with pytest.raises(ValueError, match="classifier.bias: 1 of 3 values"):
    pretrained.save_pretrained(
        tmp_path / "out", system, variables, dtype=jnp.float16
    )
  assert not list(tmp_path.iterdir())


def official_vit(numbers: tuple[int, int, int]) -> dict[str, np.ndarray]:
  """Google's names for `small_vit(pre_logits=8)`, written out by hand."""
  rng = np.random.default_rng(0)
  attention, norm, mlp = numbers
  dense = {
      "embedding": (4, 4, 3, 8),
      "pre_logits": (8, 8),
      "head": (8, 3),
  }
  norms = ["Transformer/encoder_norm"]
  for i in range(2):
    block = f"Transformer/encoderblock_{i}"
    heads = f"{block}/MultiHeadDotProductAttention_{attention}"
    dense |= {f"{heads}/{n}": (8, 2, 4) for n in ("query", "key", "value")}
    dense |= {
        f"{heads}/out": (2, 4, 8),
        f"{block}/MlpBlock_{mlp}/Dense_0": (8, 12),
        f"{block}/MlpBlock_{mlp}/Dense_1": (12, 8),
    }
    norms += [f"{block}/LayerNorm_0", f"{block}/LayerNorm_{norm}"]
  shapes = {
      "cls": (1, 1, 8), "Transformer/posembed_input/pos_embedding": (1, 5, 8),
  }
  for name, shape in dense.items():
    bias = shape[1:] if name.endswith(("query", "key", "value")) else shape[-1:]
    shapes |= {f"{name}/kernel": shape, f"{name}/bias": bias}
  for name in norms:
    shapes |= {f"{name}/scale": (8,), f"{name}/bias": (8,)}
  return {
      n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()
  }


@pytest.mark.parametrize("numbers", [(1, 2, 3), (0, 1, 0)])
def test_official_vit_archives(tmp_path, numbers):
  arrays = official_vit(numbers)
  np.savez(tmp_path / "vit.npz", **arrays)
  system = small_vit(pre_logits=8)
  expected, _ = pretrained.abstract_params(vit.LAYOUT, system)
  table = vit.official_table(system)
  params = engine.load(
      source.NpzSource(tmp_path / "vit.npz"), table, expected
  )
  block = "Transformer/encoderblock_1"
  for path, name in {
      "encoder/blocks/attention/key/kernel": (
          f"{block}/MultiHeadDotProductAttention_{numbers[0]}/key/kernel"
      ),
      "encoder/blocks/mlp_norm/scale": f"{block}/LayerNorm_{numbers[1]}/scale",
      "encoder/blocks/mlp/up/bias": (
          f"{block}/MlpBlock_{numbers[2]}/Dense_0/bias"
      ),
  }.items():
    np.testing.assert_array_equal(params[path][1], arrays[name])
  np.testing.assert_array_equal(params["encoder/cls"], arrays["cls"][0, 0])
  # The released numbering is the one that is written.
  released = official_vit((1, 2, 3))
  check_tensors(dict(engine.dump(table, params)), released)


def official_clip(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Renames transformers' tensors to OpenAI's, independently of the tables."""
  rename = [
      (r"vision_model\.encoder\.layers", "visual.transformer.resblocks"),
      (r"text_model\.encoder\.layers", "transformer.resblocks"),
      (r"vision_model\.embeddings\.patch_embedding", "visual.conv1"),
      (r"vision_model\.embeddings\.position_embedding\.weight",
       "visual.positional_embedding"),
      (r"text_model\.embeddings\.position_embedding\.weight",
       "positional_embedding"),
      (r"vision_model\.embeddings\.", "visual."),
      (r"text_model\.embeddings\.", ""),
      (r"vision_model\.pre_layrnorm", "visual.ln_pre"),
      (r"vision_model\.post_layernorm", "visual.ln_post"),
      (r"text_model\.final_layer_norm", "ln_final"),
      (r"layer_norm(\d)", r"ln_\1"),
      (r"mlp\.fc1", "mlp.c_fc"),
      (r"mlp\.fc2", "mlp.c_proj"),
      (r"self_attn\.q_proj\.", "attn.in_proj_"),
      (r"self_attn\.out_proj", "attn.out_proj"),
      (r"visual_projection\.weight", "visual.proj"),
      (r"text_projection\.weight", "text_projection"),
  ]
  made = {"input_resolution": np.array(32)}
  for name, array in theirs.items():
    if re.search(r"\.[kv]_proj", name):
      continue
    if ".q_proj" in name:
      parts = [theirs[name.replace("q_proj", f"{k}_proj")] for k in "qkv"]
      array = np.concatenate(parts)
    if name in ("visual_projection.weight", "text_projection.weight"):
      array = array.T
    for pattern, new in rename:
      name = re.sub(pattern, new, name)
    made[name] = array
  return made


def test_official_clip_names(tmp_path):
  arrays = official_clip(tensors(GOLDEN / "clip_quick"))
  path = tmp_path / "ViT-B-32.safetensors"
  safetensors_file.write(path, arrays)
  system, variables, _ = pretrained.from_pretrained(GOLDEN / "clip_quick")
  expected, _ = pretrained.abstract_params(clip.LAYOUT, system)
  table = clip.official_table(system)
  params = engine.load(source.open_source(path), table, expected)
  jax.tree.map(
      np.testing.assert_array_equal, nest(params), variables["params"]
  )
  del arrays["input_resolution"]
  check_tensors(dict(engine.dump(table, params)), arrays)


def test_architectures_belong_to_one_layout_each():
  assert not set(vit.LAYOUT.architectures) & set(clip.LAYOUT.architectures)
