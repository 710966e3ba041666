"""ViT: an image is worth 16x16 words (Dosovitskiy et al. 2021).

The classifier of the paper, and `Encoder`, the patch tower that CLIP and other
systems build on.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import config
from mmjax.nn import linear, norm, position, transformer
from mmjax.nn import mask as masks
from mmjax.nn.partitioning import Initializer, declared, param
from mmjax.objectives import classification
from mmjax.objectives.term import Context, Term, objective
from mmjax.weights import layout
from mmjax.weights.layout import Rule, Table
from mmjax.weights.transforms import CONV2D, leading

# Table 1 of the paper; Ti and S from "How to train your ViT" (Steiner et al.
# 2021, table 1). The number behind the name is the side of a patch.
_WIDTHS = {
    "ti": dict(width=192, depth=12, heads=3, mlp=768),
    "s": dict(width=384, depth=12, heads=6, mlp=1536),
    "b": dict(width=768, depth=12, heads=12, mlp=3072),
    "l": dict(width=1024, depth=24, heads=16, mlp=4096),
    "h": dict(width=1280, depth=32, heads=16, mlp=5120),
}
SIZES: dict[str, dict[str, Any]] = {
    # For TinyWorld, not in the paper.
    "tiny": dict(
        width=96, depth=4, heads=3, mlp=384, patch=8, image=(32, 32), classes=10
    ),
} | {
    f"{name}{patch}": dict(
        **_WIDTHS[name], patch=patch, image=(224, 224), classes=1000
    )
    for name, patch in (
        ("ti", 16), ("s", 32), ("s", 16), ("b", 32), ("b", 16), ("b", 8),
        ("l", 32), ("l", 16), ("h", 14),
    )
}


class Encoder(nn.Module):
  """Patches, class token, positions, blocks: an image as a row of tokens.

  Attributes:
    image: (height, width) in pixels that the position table is made for;
      another size resamples the table.
    patch: side of a patch, pixels.
    width: D.
    depth: number of blocks.
    heads: attention heads.
    mlp: hidden width of the MLPs.
    activation: of the MLPs, a name in `nn.linear.ACTIVATIONS`.
    epsilon: of every layer norm.
    inits: initializers of the blocks.
    patch_init: initializer of the patch kernel.
    patch_bias_init: None for a projection without bias (CLIP).
    cls_init: initializer of the class token.
    position_init: initializer of the position table.
    stem_norm: a norm applied before the blocks (CLIP), or None.
    resample: how the position table is resampled, see `nn.position`.
    dropout: rate, active where the caller gives a `dropout` rng.
    remat: name in `nn.transformer.REMAT`.
    dtype: of the computation.
  """

  image: Sequence[int]
  patch: int
  width: int
  depth: int
  heads: int
  mlp: int
  activation: str
  epsilon: float
  inits: transformer.BlockInit
  patch_init: Initializer
  patch_bias_init: Initializer | None
  cls_init: Initializer
  position_init: Initializer
  stem_norm: Callable[..., nn.Module] | None = None
  resample: str = "bicubic"
  dropout: float = 0.0
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """Maps f32[B, H, W, C] in [-1, 1] to tokens [B, 1 + N, D], class first."""
    x = linear.PatchEmbed(
        self.patch,
        self.width,
        self.patch_init,
        self.patch_bias_init,
        self.dtype,
        name="patch",
    )(image)
    batch, rows, columns, _ = x.shape
    cls = param(
        self,
        "cls",
        declared(self.cls_init, "embed"),
        (self.width,),
        jnp.float32,
    )
    cls = jnp.broadcast_to(cls.astype(self.dtype), (batch, 1, self.width))
    x = jnp.concatenate([cls, x.reshape(batch, -1, self.width)], axis=1)
    grid = tuple(side // self.patch for side in self.image)
    table = position.GridPositions(
        grid, 1, self.position_init, self.resample, name="position"
    )(self.width, (rows, columns))
    x = transformer.dropout(self, x + table.astype(self.dtype), self.dropout)
    if self.stem_norm is not None:
      x = self.stem_norm(name="stem_norm")(x)
    blocks = transformer.stacked(transformer.Block, self.depth, self.remat)
    x, _ = blocks(
        self.heads,
        self.mlp,
        self.activation,
        self.epsilon,
        self.inits,
        self.dropout,
        self.dtype,
        name="blocks",
    )(x, masks.full(x.shape[1]))
    return x


class ViTOutput(NamedTuple):
  """What ViT returns.

  Attributes:
    tokens: [B, 1 + N, D], normed tokens, class token first.
    pooled: [B, D] or [B, pre_logits], what the head reads.
    logits: f32[B, K], or None for a model without a head.
  """

  tokens: jax.Array
  pooled: jax.Array
  logits: jax.Array | None


class ViT(nn.Module):
  """The classifier of the paper; `Encoder` describes the shared attributes.

  Attributes:
    classes: K, or 0 for a model without a head.
    pool: "token" reads the class token, "gap" the mean of the patches.
    pre_logits: width of a tanh layer before the head (the paper's
      pre-training head; Hugging Face's pooler), or 0 for none.
    pre_logits_activation: its activation.
    qkv_bias: whether queries, keys and values have biases.
  """

  image: Sequence[int]
  patch: int
  width: int
  depth: int
  heads: int
  mlp: int
  classes: int
  channels: int = 3
  pool: str = "token"
  pre_logits: int = 0
  pre_logits_activation: str = "tanh"
  activation: str = "gelu_new"
  epsilon: float = 1e-6
  qkv_bias: bool = True
  resample: str = "zoom"
  dropout: float = 0.0
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, image: jax.Array) -> ViTOutput:
    """Classifies f32[B, H, W, C] in [-1, 1]."""
    chex.assert_shape(image, (None, None, None, self.channels))
    inits = transformer.BlockInit(
        qkv_bias=linear.ZEROS if self.qkv_bias else None
    )
    tokens = Encoder(
        image=self.image,
        patch=self.patch,
        width=self.width,
        depth=self.depth,
        heads=self.heads,
        mlp=self.mlp,
        activation=self.activation,
        epsilon=self.epsilon,
        inits=inits,
        patch_init=nn.initializers.lecun_normal(),
        patch_bias_init=linear.ZEROS,
        cls_init=linear.ZEROS,
        position_init=linear.normal(0.02),
        resample=self.resample,
        dropout=self.dropout,
        remat=self.remat,
        dtype=self.dtype,
        name="encoder",
    )(image)
    tokens = norm.LayerNorm(self.epsilon, self.dtype, name="norm")(tokens)
    pooled = config.pick(POOLS, self.pool, "pool")(tokens)
    if self.pre_logits:
      pooled = linear.Linear(
          self.pre_logits,
          linear.EMBED_TO_JOINT,
          dtype=self.dtype,
          name="pre_logits",
      )(pooled)
      pooled = linear.ACTIVATIONS[self.pre_logits_activation](pooled)
    if not self.classes:
      return ViTOutput(tokens, pooled, None)
    logits = linear.Linear(
        self.classes, linear.EMBED_TO_VOCAB, linear.ZEROS, name="head"
    )(pooled)
    return ViTOutput(tokens, pooled, logits)


POOLS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "token": lambda tokens: tokens[:, 0],
    "gap": lambda tokens: tokens[:, 1:].mean(axis=1),
}


@objective("image", "label")
def classify(
    system: ViT,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
    smoothing: float = 0.0,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """Softmax cross-entropy: terms `cross_entropy` and `accuracy`."""
  output = system.apply(
      variables, batch["image"], rngs={"dropout": context.rng}
  )
  return (
      classification.terms(output.logits, batch["label"], smoothing=smoothing),
      {},
  )


# Where a config.json is silent, transformers takes these (`ViTConfig`).
_DEFAULTS: dict[str, Any] = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    hidden_act="gelu",
    hidden_dropout_prob=0.0,
    layer_norm_eps=1e-12,
    image_size=224,
    patch_size=16,
    num_channels=3,
    qkv_bias=True,
    pooler_output_size=None,
    pooler_act="tanh",
    num_labels=2,
)


def _from_hf(hf: Mapping[str, Any], names: Collection[str]) -> ViT:
  """The system of a config.json; `names` tell whether ViTModel has a pooler."""
  hf = _DEFAULTS | dict(hf)
  for key in ("hidden_act", "pooler_act"):
    config.pick(linear.ACTIVATIONS, hf[key], key)
  patch = layout.pair(hf["patch_size"])
  if patch[0] != patch[1]:
    raise ValueError(f"patch_size is {patch}; patches must be square here")
  classes = 0
  if hf["architectures"] == ["ViTForImageClassification"]:
    classes = len(hf.get("id2label") or range(hf["num_labels"]))
  pre_logits = 0
  if "pooler.dense.weight" in names:
    pre_logits = hf["pooler_output_size"] or hf["hidden_size"]
  return ViT(
      image=layout.pair(hf["image_size"]),
      patch=patch[0],
      width=hf["hidden_size"],
      depth=hf["num_hidden_layers"],
      heads=hf["num_attention_heads"],
      mlp=hf["intermediate_size"],
      classes=classes,
      channels=hf["num_channels"],
      pre_logits=pre_logits,
      pre_logits_activation=hf["pooler_act"],
      activation=hf["hidden_act"],
      epsilon=hf["layer_norm_eps"],
      qkv_bias=hf["qkv_bias"],
      resample="bicubic",
      dropout=hf["hidden_dropout_prob"],
  )


def _to_hf(system: ViT) -> dict[str, Any]:
  """The config.json of a system."""
  if system.pool != "token" or (system.classes and system.pre_logits):
    raise ValueError(
        "transformers' ViT reads the class token and has no layer before its "
        f"head; this one has pool={system.pool!r}, classes={system.classes}, "
        f"pre_logits={system.pre_logits}"
    )
  height, width = system.image
  labels = [f"LABEL_{i}" for i in range(system.classes)]
  head = dict(
      id2label={str(i): label for i, label in enumerate(labels)},
      label2id={label: i for i, label in enumerate(labels)},
  )
  return dict(
      architectures=["ViTForImageClassification" if labels else "ViTModel"],
      model_type="vit",
      hidden_size=system.width,
      num_hidden_layers=system.depth,
      num_attention_heads=system.heads,
      intermediate_size=system.mlp,
      hidden_act=system.activation,
      hidden_dropout_prob=system.dropout,
      layer_norm_eps=system.epsilon,
      image_size=height if height == width else [height, width],
      patch_size=system.patch,
      num_channels=system.channels,
      qkv_bias=system.qkv_bias,
      pooler_output_size=system.pre_logits or system.width,
      pooler_act=system.pre_logits_activation,
      **(head if labels else {}),
  )


def _table(system: ViT) -> Table:
  """The names of transformers."""
  model = "vit." if system.classes else ""
  embeddings, patch = f"{model}embeddings", "patch_embeddings.projection"
  positions = "encoder/position/table"
  return [
      Rule(f"{embeddings}.cls_token", "encoder/cls", leading(2)),
      Rule(f"{embeddings}.position_embeddings", positions, leading(1)),
      Rule(f"{embeddings}.{patch}.weight", "encoder/patch/kernel", CONV2D),
      Rule(f"{embeddings}.{patch}.bias", "encoder/patch/bias"),
      *layout.block(
          f"{model}encoder.layer.{{i}}",
          "encoder/blocks[i]",
          norms=("layernorm_before", "layernorm_after"),
          attention=(
              "attention.attention.query",
              "attention.attention.key",
              "attention.attention.value",
              "attention.output.dense",
          ),
          mlp=("intermediate.dense", "output.dense"),
      ),
      *layout.affine(f"{model}layernorm", "norm"),
      *layout.dense("pooler.dense", "pre_logits"),
      *layout.dense("classifier", "head"),
  ]


LAYOUT = layout.Layout(
    architectures=("ViTForImageClassification", "ViTModel"),
    system=_from_hf,
    config=_to_hf,
    table=_table,
    inputs=lambda system: {
        "image": jax.ShapeDtypeStruct(
            (1, *system.image, system.channels), jnp.float32
        )
    },
)


def official_table(system: ViT) -> Table:
  """The names of the official `.npz` checkpoints, whose arrays are ours.

  The released files number the parts of a block in sequence, later code each
  kind by itself; both are read, the former is written.
  """
  del system  # The names are the same for every size.
  theirs, block = "Transformer/encoderblock_{i}", "encoder/blocks[i]"
  affine, projection = ("scale", "bias"), ("kernel", "bias")
  modules = [
      ("Transformer/encoder_norm", "norm", affine),
      ("embedding", "encoder/patch", projection),
      ("pre_logits", "pre_logits", projection),
      ("head", "head", projection),
      (f"{theirs}/LayerNorm_0", f"{block}/attention_norm", affine),
  ]
  for attention, norm_, mlp in ((1, 2, 3), (0, 1, 0)):
    attention = f"{theirs}/MultiHeadDotProductAttention_{attention}"
    mlp = f"{theirs}/MlpBlock_{mlp}"
    modules += [
        (f"{attention}/{name}", f"{block}/attention/{name}", projection)
        for name in ("query", "key", "value", "out")
    ] + [
        (f"{theirs}/LayerNorm_{norm_}", f"{block}/mlp_norm", affine),
        (f"{mlp}/Dense_0", f"{block}/mlp/up", projection),
        (f"{mlp}/Dense_1", f"{block}/mlp/down", projection),
    ]
  return [
      Rule("cls", "encoder/cls", leading(2)),
      Rule(
          "Transformer/posembed_input/pos_embedding",
          "encoder/position/table",
          leading(1),
      ),
  ] + [
      Rule(f"{source}/{leaf}", f"{target}/{leaf}")
      for source, target, leaves in modules
      for leaf in leaves
  ]
