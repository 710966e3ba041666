"""SigLIP: a sigmoid for every pair of image and text (Zhai et al. 2023)."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import config, sharding
from mmjax.nn import linear, norm, pool, position, transformer
from mmjax.nn import mask as masks
from mmjax.nn.partitioning import declared, param
from mmjax.objectives import sigmoid
from mmjax.objectives.term import Context, Term, objective
from mmjax.weights import layout
from mmjax.weights.layout import Rule, Table
from mmjax.weights.transforms import CONV2D, FLAT, LINEAR, leading

# Both towers have the same shape; So400m is the shape-optimised ViT of Alabdul-
# mohsin et al. 2023.
SHAPES: dict[str, dict[str, int]] = {
    "b": dict(width=768, depth=12, heads=12, mlp=3072),
    "l": dict(width=1024, depth=24, heads=16, mlp=4096),
    "so400m": dict(width=1152, depth=27, heads=16, mlp=4304),
}


def size(
    vision: Mapping[str, int],
    text: Mapping[str, int],
    image: int,
    patch: int,
    vocab: int,
    length: int,
) -> dict[str, Any]:
  """The configs of the towers; texts are embedded in the width of images."""
  return dict(
      vision=dict(
          type="mmjax.models.siglip:ImageTower",
          image=(image, image),
          patch=patch,
          **vision,
      ),
      text=dict(
          type="mmjax.models.siglip:TextTower",
          embed=vision["width"],
          vocab=vocab,
          length=length,
          **text,
      ),
  )


SIZES: dict[str, dict[str, Any]] = {
    # For TinyWorld, not in the paper.
    "tiny": size(
        dict(width=96, depth=4, heads=3, mlp=384),
        dict(width=64, depth=2, heads=2, mlp=256),
        image=32,
        patch=8,
        vocab=1024,
        length=16,
    ),
} | {
    name: size(SHAPES[shape], SHAPES[shape], image, patch, 32_000, length)
    for name, shape, image, patch, length in (
        ("b16", "b", 224, 16, 64),
        ("b16_256", "b", 256, 16, 64),
        ("l16", "l", 256, 16, 64),
        ("so400m14", "so400m", 224, 14, 16),
        ("so400m14_384", "so400m", 384, 14, 64),
    )
}


class Features(NamedTuple):
  """What a tower returns.

  Attributes:
    tokens: [B, N, D] or [B, L, D], normed tokens.
    embed: [B, E], the whole image or text, not normalised.
  """

  tokens: jax.Array
  embed: jax.Array


class Pairs(NamedTuple):
  """What SigLIP returns for a batch of pairs.

  Attributes:
    image: f32[B, E], unit rows.
    text: f32[B, E], unit rows.
    scale: f32[], the inverse temperature.
    bias: f32[], added to every logit.
  """

  image: jax.Array
  text: jax.Array
  scale: jax.Array
  bias: jax.Array


class Encoder(nn.Module):
  """Patches, positions and blocks; the attributes are `ImageTower`'s."""

  image: Sequence[int]
  patch: int
  width: int
  depth: int
  heads: int
  mlp: int
  activation: str
  epsilon: float
  resample: str
  remat: str
  dtype: Any

  @nn.compact
  def __call__(
      self,
      image: jax.Array,
      hidden: jax.Array | None,
      token: jax.Array | None,
  ) -> jax.Array:
    """Maps f32[B, H, W, 3] to [B, N, D]; see `ImageTower`."""
    chex.assert_shape(image, (None, None, None, 3))
    # 384 pixels hold 27 patches of 14; the last 6 are not seen.
    rows, columns = (side // self.patch for side in image.shape[1:3])
    image = image[:, : rows * self.patch, : columns * self.patch]
    x = linear.PatchEmbed(
        self.patch,
        self.width,
        nn.initializers.lecun_normal(),
        dtype=self.dtype,
        name="patch",
    )(image)
    x = x.reshape(len(x), -1, self.width)
    if hidden is not None:
      x = jnp.where(hidden[..., None], token.astype(self.dtype), x)
    table = position.GridPositions(
        tuple(side // self.patch for side in self.image),
        0,
        linear.normal(self.width**-0.5),
        self.resample,
        name="position",
    )(self.width, (rows, columns))
    return blocks(self)(
        x + table.astype(self.dtype), masks.full(rows * columns)
    )[0]


def attributes(module: nn.Module, part: type[nn.Module]) -> dict[str, Any]:
  """The attributes of a module that a part of it has too."""
  names = set(part.__dataclass_fields__) - {"parent", "name"}
  return {name: getattr(module, name) for name in names}


def blocks(module: Any) -> Any:
  """The stack of a module that has the attributes of one."""
  stack = transformer.stacked(transformer.Block, module.depth, module.remat)
  return stack(
      heads=module.heads,
      mlp=module.mlp,
      activation=module.activation,
      epsilon=module.epsilon,
      dtype=module.dtype,
      name="blocks",
  )


def attention_pool(module: Any) -> pool.AttentionPool:
  """The pooling head of a tower, shaped like one of its blocks."""
  return pool.AttentionPool(
      module.heads,
      module.mlp,
      module.activation,
      module.epsilon,
      dtype=module.dtype,
      name="pool",
  )


class ImageTower(nn.Module):
  """A ViT without class token, read by a pooling head that attends.

  Attributes:
    image: (height, width) in pixels that the position table is made for;
      another size resamples the table.
    patch: side of a patch, pixels; a rest at the right and bottom is cut off.
    width: D, which is also the width E of the joint space.
    depth: number of blocks.
    heads: attention heads.
    mlp: hidden width of the MLPs.
    activation: of the MLPs, a name in `nn.linear.ACTIVATIONS`.
    epsilon: of every layer norm.
    resample: how the position table is resampled, see `nn.position`.
    remat: name in `nn.transformer.REMAT`.
    dtype: of the computation.
  """

  image: Sequence[int]
  patch: int
  width: int
  depth: int
  heads: int
  mlp: int
  activation: str = "gelu_pytorch_tanh"
  epsilon: float = 1e-6
  resample: str = "bicubic"
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
      self,
      image: jax.Array,
      hidden: jax.Array | None = None,
      token: jax.Array | None = None,
  ) -> Features:
    """Embeds images.

    Args:
      image: f32[B, H, W, 3] in [-1, 1].
      hidden: bool[B, N], patches that are not seen, for masked prediction.
      token: f32[D], what stands in their place.
    """
    x = Encoder(**attributes(self, Encoder), name="encoder")(
        image, hidden, token
    )
    x = norm.LayerNorm(self.epsilon, self.dtype, name="norm")(x)
    return Features(x, attention_pool(self)(x, masks.full(1, x.shape[1])))


class TextTower(nn.Module):
  """A bidirectional transformer read at its last position.

  Texts are padded to the full length, and padding is seen like any token: a
  text that is padded otherwise gets another embedding.

  Attributes:
    embed: width E of the joint space.
    vocab: number of token ids.
    length: number of positions L.
    width: D.
    depth: number of blocks.
    heads: attention heads.
    mlp: hidden width of the MLPs.
    activation: of the MLPs.
    epsilon: of every layer norm.
    remat: name in `nn.transformer.REMAT`.
    dtype: of the computation.
  """

  embed: int
  vocab: int
  length: int
  width: int
  depth: int
  heads: int
  mlp: int
  activation: str = "gelu_pytorch_tanh"
  epsilon: float = 1e-6
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> Features:
    """Embeds i32[B, L]."""
    x = embed_tokens(self, tokens)
    x, _ = blocks(self)(x, masks.full(x.shape[1]))
    x = norm.LayerNorm(self.epsilon, self.dtype, name="norm")(x)
    embed = linear.Linear(
        self.embed,
        linear.EMBED_TO_JOINT,
        nn.initializers.lecun_normal(),
        dtype=self.dtype,
        name="head",
    )(x[:, -1])
    return Features(x, embed)


def embed_tokens(module: Any, tokens: jax.Array) -> jax.Array:
  """i32[B, L] to [B, L, D], for a module with the attributes of `TextTower`."""
  chex.assert_rank(tokens, 2)
  init = linear.normal(module.width**-0.5)
  x = linear.Embed(
      module.vocab, module.width, init, module.dtype, name="embed"
  )(tokens)
  table = position.SequencePositions(module.length, init, name="position")(
      module.width, tokens.shape[1]
  )
  return x + table.astype(module.dtype)


def logit_parameters(module: nn.Module) -> tuple[jax.Array, jax.Array]:
  """Declares the temperature and the bias (section 3.2 of the paper).

  At the start nearly all pairs are negatives; the bias says so, that the first
  steps need not learn it.
  """
  constant = lambda value: declared(nn.initializers.constant(value))
  return (
      param(module, "logit_scale", constant(np.log(10.0)), (), jnp.float32),
      param(module, "logit_bias", constant(-10.0), (), jnp.float32),
  )


class SigLIP(nn.Module):
  """Two towers, a temperature and a bias (algorithm 1 of the paper).

  Attributes:
    vision: an `ImageTower`.
    text: a `TextTower` whose `embed` is the width of the images.
  """

  vision: nn.Module
  text: nn.Module

  def setup(self) -> None:
    """Declares the temperature and the bias."""
    self.logit_scale, self.logit_bias = logit_parameters(self)

  def encode_image(self, image: jax.Array) -> Features:
    """Features of f32[B, H, W, 3] in [-1, 1]."""
    return self.vision(image)

  def encode_text(self, tokens: jax.Array) -> Features:
    """Features of i32[B, L]."""
    return self.text(tokens)

  def __call__(self, image: jax.Array, tokens: jax.Array) -> Pairs:
    """Embeds a batch of pairs: f32[B, H, W, 3] and i32[B, L]."""
    return Pairs(
        norm.normalize(self.encode_image(image).embed),
        norm.normalize(self.encode_text(tokens).embed),
        jnp.exp(self.logit_scale),
        self.logit_bias,
    )


@objective("image", "tokens", couples_batch=True)
def contrast(
    system: SigLIP,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
    chunks: int = 1,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """The sigmoid loss over all pairs of the global batch.

  With `chunks` the towers run on a part of the rows at a time, see
  `sharding.by_chunks`.

  Returns:
    The terms of `objectives.sigmoid.pairs`, and no mutables.
  """
  del context  # SigLIP has no dropout.
  rows = {key: batch[key] for key in ("image", "tokens")}
  return contrast_rows(system, variables, rows, chunks), {}


def contrast_rows(
    system: Any, variables: Any, rows: dict[str, jax.Array], chunks: int
) -> dict[str, Term]:
  """The loss of a system that makes `Pairs` of rows, [B, ...] by name."""
  (image, text), _ = sharding.by_chunks(
      lambda rows: (system.apply(variables, **rows)[:2], ()), rows, chunks
  )
  return sigmoid.pairs(image, text, *logits_of(variables))


def logits_of(variables: Any) -> tuple[jax.Array, jax.Array]:
  """The inverse temperature and the bias among the variables of a system."""
  params = variables["params"]
  return jnp.exp(params["logit_scale"]), params["logit_bias"]


# Where a config.json is silent, transformers takes these (`SiglipTextConfig`,
# `SiglipVisionConfig`).
_TOWER: dict[str, Any] = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
_TEXT = dict(vocab_size=32_000, max_position_embeddings=64)
_VISION = dict(num_channels=3, patch_size=16)


def _tower(
    hf: Mapping[str, Any], kind: str, defaults: Mapping[str, Any]
) -> dict[str, Any]:
  """The config of one tower, defaults included."""
  tower = {**_TOWER, **defaults, **(hf.get(f"{kind}_config") or {})}
  config.pick(linear.ACTIVATIONS, tower["hidden_act"], f"{kind} hidden_act")
  return tower


def text_from_hf(hf: Mapping[str, Any]) -> TextTower:
  """The text tower of a config.json."""
  text = _tower(hf, "text", _TEXT)
  return TextTower(
      embed=text.get("projection_size") or text["hidden_size"],
      vocab=text["vocab_size"],
      length=text["max_position_embeddings"],
      **layout.tower_attributes(text),
  )


def text_to_hf(text: TextTower) -> dict[str, Any]:
  """The inverse of `text_from_hf`."""
  return dict(
      vocab_size=text.vocab,
      max_position_embeddings=text.length,
      projection_size=text.embed,
      **layout.tower_config(text),
  )


def vision_from_hf(
    hf: Mapping[str, Any], **defaults: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The image tower's config, and the attributes of every image tower.

  Raises:
    ValueError: for oblong patches, or images that are not of three channels.
  """
  vision = _tower(hf, "vision", _VISION | defaults)
  shared = layout.tower_attributes(vision)
  return vision, dict(patch=layout.square_patch(vision), **shared)


def vision_to_hf(vision: Any) -> dict[str, Any]:
  """The inverse of `vision_from_hf`."""
  return dict(
      patch_size=vision.patch, num_channels=3, **layout.tower_config(vision)
  )


def _from_hf(hf: Mapping[str, Any], names: Collection[str]) -> SigLIP:
  """The system of a config.json."""
  del names  # The config says everything.
  vision, shared = vision_from_hf(hf, image_size=224)
  image = layout.pair(vision["image_size"])
  return SigLIP(ImageTower(image=image, **shared), text_from_hf(hf))


def _to_hf(system: SigLIP) -> dict[str, Any]:
  """The config.json of a system."""
  vision, text = system.vision, system.text
  if vision.image[0] != vision.image[1] or text.embed != vision.width:
    raise ValueError(
        "transformers' SigLIP takes square images and embeds texts in the "
        f"width of images; this one has image={tuple(vision.image)}, "
        f"embed={text.embed}, width={vision.width}"
    )
  return dict(
      architectures=["SiglipModel"],
      model_type="siglip",
      vision_config=dict(
          model_type="siglip_vision_model",
          image_size=vision.image[0],
          **vision_to_hf(vision),
      ),
      text_config=dict(model_type="siglip_text_model", **text_to_hf(text)),
  )


def shared_table() -> list[Rule | layout.Ignore]:
  """The names that SigLIP and SigLIP 2 share: all but those of a patch."""
  head, ours = "vision_model.head", "vision/pool"
  qkv = [f"{ours}/attention/{name}" for name in ("query", "key", "value")]
  fused = "attention.in_proj"
  rules = [
      Rule(
          "vision_model.embeddings.position_embedding.weight",
          "vision/encoder/position/table",
      ),
      *layout.affine("vision_model.post_layernorm", "vision/norm"),
      Rule(f"{head}.probe", f"{ours}/probe", leading(2)),
      Rule(f"{head}.{fused}_weight", tuple(f"{q}/kernel" for q in qkv), LINEAR),
      Rule(f"{head}.{fused}_bias", tuple(f"{q}/bias" for q in qkv), FLAT),
      *layout.dense(f"{head}.attention.out_proj", f"{ours}/attention/out", 2),
      *layout.affine(f"{head}.layernorm", f"{ours}/norm"),
      *layout.dense(f"{head}.mlp.fc1", f"{ours}/mlp/up"),
      *layout.dense(f"{head}.mlp.fc2", f"{ours}/mlp/down"),
      Rule("text_model.embeddings.token_embedding.weight",
           "text/embed/embedding"),
      Rule("text_model.embeddings.position_embedding.weight",
           "text/position/table"),
      *layout.affine("text_model.final_layer_norm", "text/norm"),
      *layout.dense("text_model.head", "text/head"),
      Rule("logit_scale", "logit_scale", leading(1)),
      Rule("logit_bias", "logit_bias", leading(1)),
      layout.Ignore(r"(text|vision)_model\.embeddings\.position_ids"),
  ]  # fmt: skip
  for tower, stack in (("vision", "vision/encoder"), ("text", "text")):
    rules += layout.tower_block(f"{tower}_model.", f"{stack}/")
  return rules


def _table(system: SigLIP) -> Table:
  """The names of transformers."""
  del system  # The names are the same for every size.
  patch = "vision_model.embeddings.patch_embedding"
  return [
      Rule(f"{patch}.weight", "vision/encoder/patch/kernel", CONV2D),
      Rule(f"{patch}.bias", "vision/encoder/patch/bias"),
      *shared_table(),
  ]


LAYOUT = layout.Layout(
    architectures=("SiglipModel",),
    system=_from_hf,
    config=_to_hf,
    table=_table,
    inputs=lambda system: {
        "image": jax.ShapeDtypeStruct(
            (1, *system.vision.image, 3), jnp.float32
        ),
        "tokens": jax.ShapeDtypeStruct((1, system.text.length), jnp.int32),
    },
)
