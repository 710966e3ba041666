"""ImageBind: one embedding space for six senses (Girdhar et al. 2023).

Every sense has a tower of its own, and all are trained against pictures alone.
What was never paired, such as speech and text, meets in the space of pictures.
"""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import config
from mmjax.models import clip, imagebind_layout
from mmjax.nn import linear, norm, position, transformer
from mmjax.nn import mask as masks
from mmjax.nn.partitioning import declared, param
from mmjax.objectives import contrastive
from mmjax.objectives.term import Context, Term, objective
from mmjax.weights import layout

# What every sense is multiplied by at first, the inverse of a temperature; only
# that of text is learned (official code; the paper's table 9).
SCALES = {
    "text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0,
}  # fmt: skip
MAX_SCALE = 100.0
# The senses that are bound to pictures; text is there before.
BOUND = ("mel", "depth", "thermal", "imu")
# Frames of a film; a still picture is shown as often.
FRAMES = 2

_EPSILON = 1e-6
_STEM_EPSILON = 1e-5


def _patches(patch: int, **rest: Any) -> dict[str, Any]:
  return dict(type="mmjax.models.imagebind:PatchStem", patch=patch, **rest)


def _tower(
    embed: int,
    shape: tuple[int, int, int],
    grid: tuple[int, int],
    stem: dict[str, Any],
    **rest: Any,
) -> dict[str, Any]:
  """A `Tower` of (width, blocks, heads)."""
  width, depth, heads = shape
  return dict(
      type="mmjax.models.imagebind:Tower",
      stem=stem, grid=grid, embed=embed, width=width, depth=depth, heads=heads,
      **rest,
  )  # fmt: skip


def _text(
    embed: int, shape: tuple[int, int, int], vocab: int, length: int
) -> dict[str, Any]:
  """CLIP's text tower as the official code has it."""
  width, depth, heads = shape
  return dict(
      type="mmjax.models.clip:TextTower",
      embed=embed, vocab=vocab, length=length, width=width, depth=depth,
      heads=heads, mlp=4 * width, activation="gelu", epsilon=_EPSILON,
  )  # fmt: skip


# Of all but pictures, whose tower is OpenCLIP's (official code).
_INIT = transformer.BlockInit(
    qkv=linear.XAVIER_OF_THREE, mlp_bias=linear.ZEROS
)

_NORMED = dict(epsilon=_STEM_EPSILON)
_SIGNAL = dict(type="mmjax.models.imagebind:SignalStem", patch=8, **_NORMED)

SIZES: dict[str, dict[str, Any]] = {
    # For TinyWorld, not in the paper.
    "tiny": dict(
        vision=_tower(64, (96, 4, 3), (4, 4), _patches(8), stem_norm=True),
        text=_text(64, (64, 2, 2), vocab=1024, length=16),
        audio=_tower(
            64, (96, 3, 3), (4, 8), _patches(16, stride=16, **_NORMED),
            extra=True, drop_path=0.1,
        ),
        depth=_tower(
            64, (64, 2, 2), (4, 4), _patches(8, **_NORMED), extra=True
        ),
        thermal=_tower(
            64, (64, 2, 2), (4, 4), _patches(8, **_NORMED), extra=True
        ),
        imu=_tower(
            64, (64, 3, 2), (16, 1), _SIGNAL, extra=True, drop_path=0.1,
            dropout=0.1,
        ),
    ),
    "huge": dict(
        vision=_tower(
            1024, (1280, 32, 16), (16, 16), _patches(14), stem_norm=True
        ),
        text=_text(1024, (1024, 24, 16), vocab=49408, length=77),
        audio=_tower(
            1024, (768, 12, 12), (12, 19), _patches(16, stride=10, **_NORMED),
            extra=True, drop_path=0.1,
        ),
        depth=_tower(
            1024, (384, 12, 8), (14, 14), _patches(16, **_NORMED), extra=True
        ),
        thermal=_tower(
            1024, (768, 12, 12), (14, 14), _patches(16, **_NORMED), extra=True
        ),
        imu=_tower(
            1024, (512, 6, 8), (250, 1), _SIGNAL, extra=True, drop_path=0.7,
            dropout=0.5,
        ),
    ),
}  # fmt: skip


class Features(NamedTuple):
  """What a tower returns.

  Attributes:
    tokens: [B, 1 + N, D], tokens of the last block, class token first.
    embed: [B, E], the projection of the first, not normalised.
  """

  tokens: jax.Array
  embed: jax.Array


class Bound(NamedTuple):
  """What ImageBind returns: f32[B, E] of every sense that was given.

  Pictures and films have unit length, the others that of their inverse
  temperature, so that products with pictures are logits.
  """

  image: jax.Array | None = None
  video: jax.Array | None = None
  text: jax.Array | None = None
  mel: jax.Array | None = None
  depth: jax.Array | None = None
  thermal: jax.Array | None = None
  imu: jax.Array | None = None


class PatchStem(nn.Module):
  """Cuts a picture, or a spectrogram, into patches.

  Attributes:
    patch: side of a patch.
    stride: from patch to patch; None for patches side by side.
    epsilon: of a norm on the projected patches; None for no norm.
    dtype: of the computation.
  """

  patch: int
  stride: int | None = None
  epsilon: float | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, width: int) -> jax.Array:
    """Maps [B, H, W, C] to [B, rows, columns, width]."""
    x = linear.PatchEmbed(
        self.patch,
        width,
        linear.FAN_IN_UNIFORM,
        None,
        self.dtype,
        self.stride,
        name="patch",
    )(x)
    if self.epsilon is None:
      return x
    return norm.LayerNorm(self.epsilon, self.dtype, name="norm")(x)


class SignalStem(nn.Module):
  """Cuts a signal of several channels into pieces.

  Attributes:
    patch: samples of a piece.
    epsilon: of the norm on the projected pieces.
    dtype: of the computation.
  """

  patch: int
  epsilon: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, width: int) -> jax.Array:
    """Maps [B, I, C] to [B, I / patch, 1, width].

    Raises:
      ValueError: if the samples are no multiple of the patch.
    """
    batch, samples, channels = x.shape
    if samples % self.patch:
      raise ValueError(
          f"a signal of {samples} samples: expected a multiple of the patch of "
          f"{self.patch}"
      )
    x = x.reshape(batch, -1, 1, self.patch, channels)
    x = linear.Linear(
        width,
        (None, None, "embed"),
        linear.FAN_IN_UNIFORM,
        None,
        self.dtype,
        name="patch",
    )(x)
    return norm.LayerNorm(self.epsilon, self.dtype, name="norm")(x)


class Tower(nn.Module):
  """A stem, a class token, positions, blocks and a projection (section 3.3).

  Attributes:
    stem: cuts the input, called as `stem(x, width) -> [B, rows, columns, D]`.
    grid: (rows, columns) of the position table, resampled for others.
    embed: width E of the joint space.
    width: D.
    depth: number of blocks.
    heads: attention heads.
    stem_norm: whether a norm stands before the blocks, which then start as
      CLIP's do (pictures).
    extra: whether all tokens see one learned key and value besides (others).
    drop_path: rate at which the last block is left out; it rises from 0.
    dropout: rate before the projection.
    rank: of low-rank updates of the blocks' kernels, see `linear.Linear`.
    remat: name in `nn.transformer.REMAT`.
    dtype: of the computation.
  """

  stem: nn.Module
  grid: Sequence[int]
  embed: int
  width: int
  depth: int
  heads: int
  stem_norm: bool = False
  extra: bool = False
  drop_path: float = 0.0
  dropout: float = 0.0
  rank: int = 0
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> Features:
    """Embeds what the stem takes."""
    x = self.stem(x, self.width).astype(self.dtype)
    batch, rows, columns, width = x.shape
    std = linear.normal(width**-0.5)
    cls = param(self, "cls", declared(std, "embed"), (width,), jnp.float32)
    cls = jnp.broadcast_to(cls.astype(self.dtype), (batch, 1, width))
    x = jnp.concatenate([cls, x.reshape(batch, -1, width)], axis=1)
    table = position.GridPositions(
        tuple(self.grid), 1, std, "bicubic", name="position"
    )(width, (rows, columns))
    x = x + table.astype(self.dtype)
    if self.stem_norm:
      x = norm.LayerNorm(_EPSILON, self.dtype, name="stem_norm")(x)
    blocks = transformer.stacked(
        transformer.Block, self.depth, self.remat, in_axes=(nn.broadcast, 0)
    )
    x, _ = blocks(
        self.heads,
        4 * width,
        "gelu",
        _EPSILON,
        dataclasses.replace(
            clip.IMAGE_INIT if self.stem_norm else _INIT,
            extra=nn.initializers.xavier_normal() if self.extra else None,
            rank=self.rank,
        ),
        dtype=self.dtype,
        name="blocks",
    )(
        x,
        masks.full(x.shape[1], x.shape[1] + self.extra),
        jnp.linspace(0.0, self.drop_path, self.depth),
    )
    y = norm.LayerNorm(_EPSILON, self.dtype, name="norm")(x[:, 0])
    y = transformer.dropout(self, y, self.dropout)
    y = linear.Linear(
        self.embed,
        linear.EMBED_TO_JOINT,
        linear.FAN_IN_UNIFORM,
        None,
        self.dtype,
        name="projection",
    )(y)
    return Features(x, y)


class ImageBind(nn.Module):
  """Towers of six senses in one space; films are seen by that of pictures.

  Attributes:
    vision: a `Tower` of f32[B, H, W, 6], two frames.
    text: a `clip.TextTower`.
    audio: a `Tower` of f32[B, mels, M, 1].
    depth: a `Tower` of f32[B, H, W, 1].
    thermal: likewise.
    imu: a `Tower` of f32[B, I, 6].
  """

  vision: nn.Module
  text: nn.Module
  audio: nn.Module
  depth: nn.Module
  thermal: nn.Module
  imu: nn.Module

  def setup(self) -> None:
    """Declares the inverse temperatures, as logarithms."""
    self.scales = {
        name: param(
            self,
            f"{name}_scale",
            declared(nn.initializers.constant(np.log(scale))),
            (),
            jnp.float32,
        )
        for name, scale in SCALES.items()
    }

  def encode_image(self, image: jax.Array) -> Features:
    """Features of f32[B, H, W, 3], a still picture."""
    return self.vision(jnp.concatenate([image] * FRAMES, axis=-1))

  def encode_video(self, video: jax.Array) -> Features:
    """Features of f32[B, F, H, W, 3].

    Raises:
      ValueError: for other than `FRAMES` frames.
    """
    if video.shape[1] != FRAMES:
      raise ValueError(
          f"a film of {video.shape[1]} frames: expected clips of {FRAMES}, "
          "several of them as [B, clips, frames, H, W, 3]"
      )
    frames = jnp.moveaxis(video, 1, -2)
    return self.vision(frames.reshape(*frames.shape[:-2], -1))

  def encode_text(self, tokens: jax.Array) -> Any:
    """`clip.TextFeatures` of i32[B, L]."""
    return self.text(tokens)

  def encode_mel(self, mel: jax.Array) -> Features:
    """Features of f32[B, M, mels]."""
    return self.audio(mel.swapaxes(1, 2)[..., None])

  def encode_depth(self, depth: jax.Array) -> Features:
    """Features of f32[B, H, W]."""
    return self.depth(depth[..., None])

  def encode_thermal(self, thermal: jax.Array) -> Features:
    """Features of f32[B, H, W]."""
    return self.thermal(thermal[..., None])

  def encode_imu(self, imu: jax.Array) -> Features:
    """Features of f32[B, I, 6]."""
    return self.imu(imu)

  def __call__(
      self,
      image: jax.Array | None = None,
      tokens: jax.Array | None = None,
      video: jax.Array | None = None,
      mel: jax.Array | None = None,
      depth: jax.Array | None = None,
      thermal: jax.Array | None = None,
      imu: jax.Array | None = None,
  ) -> Bound:
    """Embeds what is given.

    Several clips of one thing may be given as [B, clips, ...]; their embeddings
    are averaged, which makes them shorter.

    Args:
      image: f32[B, H, W, 3].
      tokens: i32[B, L].
      video: f32[B, F, H, W, 3].
      mel: f32[B, M, mels].
      depth: f32[B, H, W].
      thermal: f32[B, H, W].
      imu: f32[B, I, 6].
    """
    given = dict(
        image=(image, 4, self.encode_image, None),
        video=(video, 5, self.encode_video, None),
        text=(tokens, 2, self.encode_text, "text"),
        mel=(mel, 3, self.encode_mel, "audio"),
        depth=(depth, 3, self.encode_depth, "depth"),
        thermal=(thermal, 3, self.encode_thermal, "thermal"),
        imu=(imu, 3, self.encode_imu, "imu"),
    )
    found = {}
    for name, (x, rank, encode, scale) in given.items():
      if x is None:
        continue
      clips = x.shape[: x.ndim - rank + 1]
      flat = x.reshape(-1, *x.shape[len(clips) :])
      y = norm.normalize(encode(flat).embed)
      if scale is not None:
        y *= jnp.minimum(jnp.exp(self.scales[scale]), MAX_SCALE)
      y = y.reshape(*clips, -1)
      found[name] = y.mean(axis=tuple(range(1, len(clips))))
    return Bound(**found)


def _pairs(found: Bound, names: Collection[str]) -> dict[str, Term]:
  """InfoNCE of the picture and each of the named senses (equation 1).

  Returns:
    For each of them its loss, and how often a picture finds it.
  """
  terms = {}
  for name in names:
    # The temperature is in the embedding.
    pair = contrastive.info_nce(
        found.image, getattr(found, name), jnp.float32(1)
    )
    terms[name] = pair["contrastive"]
    terms[f"{name}_found"] = pair["left_to_right"]
  return terms


@objective("image", "tokens", couples_batch=True)
def align(
    system: ImageBind,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """Pictures and text, as in CLIP: where the space comes from."""
  del context  # Neither tower is random.
  found = system.apply(variables, batch["image"], tokens=batch["tokens"])
  return _pairs(found, ("text",)), {}


@objective("image", *BOUND, couples_batch=True)
def bind(
    system: ImageBind,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """Pictures and every other sense but text (section 3.2).

  An example may bring several companions of one picture; each is compared with
  pictures alone, never with another.
  """
  found = system.apply(
      variables,
      **{name: batch[name] for name in ("image", *BOUND)},
      rngs={"dropout": context.rng},
  )
  return _pairs(found, BOUND), {}


def _from_hf(hf: Mapping[str, Any], names: Collection[str]) -> ImageBind:
  """The system of a config.json, see `imagebind_layout`."""
  del names  # The config says everything.
  return config.build(imagebind_layout.attributes(hf), "config.json")


# The names of the official code's `imagebind_huge.pth`.
official_table = imagebind_layout.table

LAYOUT = layout.Layout(
    architectures=("ImageBindModel",),
    system=_from_hf,
    config=imagebind_layout.config_of,
    table=imagebind_layout.table,
    inputs=imagebind_layout.inputs,
)
