"""SigLIP 2 at native aspect ratio: images as rows of patches.

Tschannen et al. 2025. The systems of fixed resolution are SigLIP's, with a
larger vocabulary (`models.siglip`), trained by the recipe of
`models.siglip2_training`; `NaFlex`, here, takes images of any shape as rows of
patches (section 2.4.2).
"""

from collections.abc import Collection, Mapping, Sequence
import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models import siglip
from mmjax.models.siglip import Features, Pairs
from mmjax.nn import linear, norm, position
from mmjax.nn import mask as masks
from mmjax.objectives.term import Context, Term, objective
from mmjax.weights import layout
from mmjax.weights.layout import Table


class FlexEncoder(nn.Module):
  """Patches, positions and blocks; the attributes are `FlexImageTower`'s."""

  grid: Sequence[int]
  patch: int
  width: int
  depth: int
  heads: int
  mlp: int
  activation: str
  epsilon: float
  remat: str
  dtype: Any

  @nn.compact
  def __call__(
      self, patches: jax.Array, grid: jax.Array, mask: masks.Mask
  ) -> jax.Array:
    """Maps f32[B, N, P * P * 3] to [B, N, D]; see `FlexImageTower`."""
    x = linear.Linear(
        self.width,
        ("patch", "embed"),
        nn.initializers.lecun_normal(),
        dtype=self.dtype,
        name="patch",
    )(patches)
    table = position.FlexPositions(
        self.grid, linear.normal(self.width**-0.5), name="position"
    )(self.width, grid, x.shape[1])
    return siglip.blocks(self)(x + table.astype(self.dtype), mask)[0]


class FlexImageTower(nn.Module):
  """SigLIP's image tower for images of many shapes, as rows of patches.

  Attributes:
    grid: (rows, columns) of the position table, resampled for each image.
    The others are those of `siglip.ImageTower`.
  """

  grid: Sequence[int]
  patch: int
  width: int
  depth: int
  heads: int
  mlp: int
  activation: str = "gelu_pytorch_tanh"
  epsilon: float = 1e-6
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, patches: jax.Array, grid: jax.Array) -> Features:
    """Embeds images.

    Args:
      patches: f32[B, N, P * P * 3] in [-1, 1], row-major, a patch's values in
        the order (row, column, channel); those behind an image's last patch
        are not seen.
      grid: i32[B, 2], rows and columns of each image's patches, at most N in
        all.
    """
    chex.assert_shape(patches, (None, None, 3 * self.patch**2))
    chex.assert_shape(grid, (len(patches), 2))
    slots = patches.shape[1]
    filled = jnp.arange(slots) < grid.prod(axis=1)[:, None]
    x = FlexEncoder(
        **siglip.attributes(self, FlexEncoder), name="encoder"
    )(patches, grid, masks.padded(masks.full(slots), filled))
    x = norm.LayerNorm(self.epsilon, self.dtype, name="norm")(x)
    seen = masks.padded(masks.full(1, slots), filled)
    return Features(x, siglip.attention_pool(self)(x, seen))


class NaFlex(nn.Module):
  """SigLIP over rows of patches; one set of parameters for all resolutions.

  Attributes:
    vision: a `FlexImageTower`.
    text: a `siglip.TextTower` whose `embed` is the width of the images.
  """

  vision: nn.Module
  text: nn.Module

  def setup(self) -> None:
    """Declares the temperature and the bias."""
    self.logit_scale, self.logit_bias = siglip.logit_parameters(self)

  def encode_image(self, patches: jax.Array, grid: jax.Array) -> Features:
    """Features of f32[B, N, P * P * 3] and i32[B, 2]."""
    return self.vision(patches, grid)

  def encode_text(self, tokens: jax.Array) -> Features:
    """Features of i32[B, L]."""
    return self.text(tokens)

  def __call__(
      self, patches: jax.Array, grid: jax.Array, tokens: jax.Array
  ) -> Pairs:
    """Embeds pairs: f32[B, N, P * P * 3] with i32[B, 2], and i32[B, L]."""
    return Pairs(
        norm.normalize(self.encode_image(patches, grid).embed),
        norm.normalize(self.encode_text(tokens).embed),
        jnp.exp(self.logit_scale),
        self.logit_bias,
    )


@objective("patches", "grid", "tokens", couples_batch=True)
def contrast(
    system: NaFlex,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
    chunks: int = 1,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """`siglip.contrast` for images of many shapes."""
  del context  # Without dropout.
  rows = {key: batch[key] for key in ("patches", "grid", "tokens")}
  return siglip.contrast_rows(system, variables, rows, chunks), {}


def _from_hf(hf: Mapping[str, Any], names: Collection[str]) -> NaFlex:
  """The system of a config.json."""
  del names  # The config says everything.
  vision, shared = siglip.vision_from_hf(hf, num_patches=256)
  side = math.isqrt(vision["num_patches"])
  if side**2 != vision["num_patches"]:
    raise ValueError(
        f"vision_config: num_patches is {vision['num_patches']}; the table of "
        "positions is square"
    )
  tower = FlexImageTower(grid=(side, side), **shared)
  return NaFlex(tower, siglip.text_from_hf(hf))


def _to_hf(system: NaFlex) -> dict[str, Any]:
  """The config.json of a system."""
  vision, text = system.vision, system.text
  if vision.grid[0] != vision.grid[1] or text.embed != vision.width:
    raise ValueError(
        "transformers' SigLIP 2 has a square table of positions and embeds "
        f"texts in the width of images; this one has grid={tuple(vision.grid)}"
        f", embed={text.embed}, width={vision.width}"
    )
  return dict(
      architectures=["Siglip2Model"],
      model_type="siglip2",
      vision_config=dict(
          model_type="siglip2_vision_model",
          num_patches=math.prod(vision.grid),
          **siglip.vision_to_hf(vision),
      ),
      text_config=dict(
          model_type="siglip2_text_model", **siglip.text_to_hf(text)
      ),
  )


def _table(system: NaFlex) -> Table:
  """The names of transformers."""
  del system  # The names are the same for every size.
  patch = "vision_model.embeddings.patch_embedding"
  return [
      *layout.dense(patch, "vision/encoder/patch"),
      *siglip.shared_table(),
  ]


LAYOUT = layout.Layout(
    architectures=("Siglip2Model",),
    system=_from_hf,
    config=_to_hf,
    table=_table,
    inputs=lambda system: {
        "patches": jax.ShapeDtypeStruct(
            (1, math.prod(system.vision.grid), 3 * system.vision.patch**2),
            jnp.float32,
        ),
        "grid": jax.ShapeDtypeStruct((1, 2), jnp.int32),
        "tokens": jax.ShapeDtypeStruct((1, system.text.length), jnp.int32),
    },
)
