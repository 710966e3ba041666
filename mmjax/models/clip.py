"""CLIP: contrastive language-image pre-training (Radford et al. 2021)."""

from collections.abc import Collection, Mapping
import functools
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import sharding
from mmjax.models import clip_layout, vit
from mmjax.nn import linear, norm, position, transformer
from mmjax.nn import mask as masks
from mmjax.nn.partitioning import declared, param
from mmjax.objectives import contrastive
from mmjax.objectives.term import Context, Term, objective
from mmjax.weights import layout


def _size(embed: int, image: int, patch: int, vision: int, text: int) -> dict:
  """One row of table 20 of the paper: heads of 64, MLP ratio 4."""
  return dict(
      vision=dict(
          type="mmjax.models.clip:ImageTower",
          embed=embed,
          image=(image, image),
          patch=patch,
          width=vision,
          depth=24 if vision == 1024 else 12,
          heads=vision // 64,
          mlp=4 * vision,
      ),
      text=dict(
          type="mmjax.models.clip:TextTower",
          embed=embed,
          vocab=49408,
          length=77,
          width=text,
          depth=12,
          heads=text // 64,
          mlp=4 * text,
      ),
  )


SIZES: dict[str, dict[str, Any]] = {
    # For TinyWorld, not in the paper.
    "tiny": dict(
        vision=dict(
            type="mmjax.models.clip:ImageTower",
            embed=64,
            image=(32, 32),
            patch=8,
            width=96,
            depth=4,
            heads=3,
            mlp=384,
        ),
        text=dict(
            type="mmjax.models.clip:TextTower",
            embed=64,
            vocab=1024,
            length=16,
            width=64,
            depth=2,
            heads=2,
            mlp=256,
        ),
    ),
    "b32": _size(512, 224, 32, 768, 512),
    "b16": _size(512, 224, 16, 768, 512),
    "l14": _size(768, 224, 14, 1024, 768),
    "l14_336": _size(768, 336, 14, 1024, 768),
}
# Four times the picture, for scenes of several digits, and longer captions.
SIZES["tiny64"] = dict(
    vision=SIZES["tiny"]["vision"] | dict(image=(64, 64)),
    text=SIZES["tiny"]["text"] | dict(length=40),
)


class ImageFeatures(NamedTuple):
  """What the image tower returns.

  Attributes:
    tokens: [B, 1 + N, D], tokens of the last block, before the final norm.
    pooled: [B, D], the normed class token.
    embed: [B, E], its projection, not normalised.
  """

  tokens: jax.Array
  pooled: jax.Array
  embed: jax.Array


class TextFeatures(NamedTuple):
  """What the text tower returns.

  Attributes:
    tokens: [B, L, D], normed tokens.
    pooled: [B, D], the token at the end of the text.
    embed: [B, E], its projection, not normalised.
  """

  tokens: jax.Array
  pooled: jax.Array
  embed: jax.Array


class CLIPOutput(NamedTuple):
  """What CLIP returns for a batch of pairs.

  Attributes:
    image: f32[B, E], unit rows.
    text: f32[B, E], unit rows.
    scale: f32[], the inverse temperature.
  """

  image: jax.Array
  text: jax.Array
  scale: jax.Array


def _text_init(width: int, depth: int) -> transformer.BlockInit:
  """Of the text tower (official code, `initialize_parameters`)."""
  residual = (2 * depth) ** -0.5
  return transformer.BlockInit(
      qkv=linear.normal(width**-0.5),
      out=linear.normal(width**-0.5 * residual),
      up=linear.normal((2 * width) ** -0.5),
      down=linear.normal(width**-0.5 * residual),
      mlp_bias=linear.ZEROS,
  )


# The official code leaves the image tower's blocks at PyTorch's defaults.
IMAGE_INIT = transformer.BlockInit(
    qkv=linear.XAVIER_OF_THREE,
    out=linear.FAN_IN_UNIFORM,
    up=linear.FAN_IN_UNIFORM,
    down=linear.FAN_IN_UNIFORM,
    mlp_bias=linear.ZEROS,
)


def encoder(
    image: tuple[int, int],
    patch: int,
    width: int,
    depth: int,
    heads: int,
    mlp: int,
    activation: str = "quick_gelu",
    epsilon: float = 1e-5,
    remat: str = "none",
    dtype: Any = jnp.float32,
    **kwargs: Any,
) -> vit.Encoder:
  """The ViT of CLIP: no patch bias, and a norm before its blocks.

  `ImageTower` reads its class token; others, like LLaVA, its patches, often of
  fewer blocks. `kwargs` go to the module (`name`).
  """
  std = width**-0.5
  return vit.Encoder(
      image=image,
      patch=patch,
      width=width,
      depth=depth,
      heads=heads,
      mlp=mlp,
      activation=activation,
      epsilon=epsilon,
      inits=IMAGE_INIT,
      patch_init=linear.FAN_IN_UNIFORM,
      patch_bias_init=None,
      cls_init=linear.normal(std),
      position_init=linear.normal(std),
      stem_norm=functools.partial(norm.LayerNorm, epsilon, dtype),
      remat=remat,
      dtype=dtype,
      **kwargs,
  )


class ImageTower(nn.Module):
  """A ViT with a norm before its blocks and a projection (section 2.4).

  Attributes:
    embed: width E of the joint space; `vit.Encoder` describes the others.
  """

  embed: int
  image: tuple[int, int]
  patch: int
  width: int
  depth: int
  heads: int
  mlp: int
  activation: str = "quick_gelu"
  epsilon: float = 1e-5
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, image: jax.Array) -> ImageFeatures:
    """Embeds f32[B, H, W, 3]."""
    tokens = encoder(
        self.image,
        self.patch,
        self.width,
        self.depth,
        self.heads,
        self.mlp,
        self.activation,
        self.epsilon,
        self.remat,
        self.dtype,
        name="encoder",
    )(image)
    pooled = norm.LayerNorm(self.epsilon, self.dtype, name="norm")(tokens[:, 0])
    embed = linear.Linear(
        self.embed,
        linear.EMBED_TO_JOINT,
        linear.normal(self.width**-0.5),
        None,
        self.dtype,
        name="projection",
    )(pooled)
    return ImageFeatures(tokens, pooled, embed)


class TextTower(nn.Module):
  """A causal transformer read at the end-of-text token (section 2.4).

  Attributes:
    embed: width E of the joint space.
    vocab: number of token ids.
    length: number of positions L.
    width: D.
    depth: number of blocks.
    heads: attention heads.
    mlp: hidden width of the MLPs.
    eot: the end-of-text id; the text is read at its first occurrence. None
      reads at the highest id instead, as the official code does.
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
  eot: int | None = None
  activation: str = "quick_gelu"
  epsilon: float = 1e-5
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> TextFeatures:
    """Embeds i32[B, L]."""
    chex.assert_rank(tokens, 2)
    length = tokens.shape[1]
    x = linear.Embed(
        self.vocab, self.width, linear.normal(0.02), self.dtype, name="embed"
    )(tokens)
    table = position.SequencePositions(
        self.length, linear.normal(0.01), name="position"
    )(self.width, length)
    x = x + table.astype(self.dtype)
    blocks = transformer.stacked(transformer.Block, self.depth, self.remat)
    x, _ = blocks(
        heads=self.heads,
        mlp=self.mlp,
        activation=self.activation,
        epsilon=self.epsilon,
        inits=_text_init(self.width, self.depth),
        dtype=self.dtype,
        name="blocks",
    )(x, masks.causal(length))
    x = norm.LayerNorm(self.epsilon, self.dtype, name="norm")(x)
    score = tokens if self.eot is None else tokens == self.eot
    end = score.argmax(axis=1)
    pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
    embed = linear.Linear(
        self.embed,
        linear.EMBED_TO_JOINT,
        linear.normal(self.width**-0.5),
        None,
        self.dtype,
        name="projection",
    )(pooled)
    return TextFeatures(x, pooled, embed)


class CLIP(nn.Module):
  """Two towers and a temperature (figure 3 of the paper).

  Attributes:
    vision: an `ImageTower`.
    text: a `TextTower` of the same `embed`.
  """

  vision: nn.Module
  text: nn.Module

  def setup(self) -> None:
    """Declares the temperature."""
    self.logit_scale = param(
        self,
        "logit_scale",
        declared(nn.initializers.constant(np.log(1 / 0.07))),
        (),
        jnp.float32,
    )

  def encode_image(self, image: jax.Array) -> ImageFeatures:
    """Features of f32[B, H, W, 3]."""
    return self.vision(image)

  def encode_text(self, tokens: jax.Array) -> TextFeatures:
    """Features of i32[B, L]."""
    return self.text(tokens)

  def __call__(self, image: jax.Array, tokens: jax.Array) -> CLIPOutput:
    """Embeds a batch of pairs: f32[B, H, W, 3] and i32[B, L]."""
    return CLIPOutput(
        norm.normalize(self.encode_image(image).embed),
        norm.normalize(self.encode_text(tokens).embed),
        jnp.exp(self.logit_scale),
    )


# The temperature never scales logits by more than 100 (section 2.5): the
# optimizer keeps `logit_scale` below its logarithm.
MAX_LOGIT_SCALE = float(np.log(100.0))


@objective("image", "tokens", couples_batch=True)
def contrast(
    system: CLIP,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
    chunks: int = 1,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """The symmetric InfoNCE loss over the global batch.

  With `chunks` the towers run on a part of the rows at a time, see
  `sharding.by_chunks`.

  Returns:
    The terms of `objectives.contrastive.info_nce`, and no mutables.
  """
  del context  # CLIP has no dropout.

  rows = {key: batch[key] for key in ("image", "tokens")}
  (image, text), _ = sharding.by_chunks(
      lambda rows: (system.apply(variables, **rows)[:2], ()), rows, chunks
  )
  scale = jnp.exp(variables["params"]["logit_scale"])
  return contrastive.info_nce(image, text, scale), {}


def _from_hf(hf: Mapping[str, Any], names: Collection[str]) -> CLIP:
  """The system of a config.json."""
  del names  # The config says everything.
  return CLIP(
      vision=ImageTower(**clip_layout.vision_attributes(hf)),
      text=TextTower(**clip_layout.text_attributes(hf)),
  )


# The names of the official code.
official_table = clip_layout.official_table

LAYOUT = layout.Layout(
    architectures=("CLIPModel",),
    system=_from_hf,
    config=clip_layout.config_of,
    table=clip_layout.table,
    inputs=lambda system: {
        "image": jax.ShapeDtypeStruct(
            (1, *system.vision.image, 3), jnp.float32
        ),
        "tokens": jax.ShapeDtypeStruct((1, system.text.length), jnp.int32),
    },
)
