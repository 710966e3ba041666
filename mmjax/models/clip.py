"""CLIP: contrastive language-image pre-training (Radford et al. 2021)."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import config, sharding
from mmjax.models import vit
from mmjax.nn import linear, norm, position, transformer
from mmjax.nn import mask as masks
from mmjax.nn.partitioning import declared
from mmjax.objectives import contrastive
from mmjax.objectives.term import Context, Term, objective
from mmjax.weights import layout
from mmjax.weights.layout import Rule, Table
from mmjax.weights.transforms import CONV2D, FLAT, LINEAR


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


# The official code leaves the image tower's blocks at PyTorch's defaults; its
# Xavier kernel holds queries, keys and values, hence the scale.
_IMAGE_INIT = transformer.BlockInit(
    qkv=nn.initializers.variance_scaling(0.5, "fan_avg", "uniform"),
    out=linear.FAN_IN_UNIFORM,
    up=linear.FAN_IN_UNIFORM,
    down=linear.FAN_IN_UNIFORM,
    mlp_bias=linear.ZEROS,
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
    def layer_norm(name: str) -> norm.LayerNorm:
      return norm.LayerNorm(self.epsilon, self.dtype, name=name)

    std = self.width**-0.5
    tokens = vit.Encoder(
        image=self.image,
        patch=self.patch,
        width=self.width,
        depth=self.depth,
        heads=self.heads,
        mlp=self.mlp,
        activation=self.activation,
        epsilon=self.epsilon,
        inits=_IMAGE_INIT,
        patch_init=linear.FAN_IN_UNIFORM,
        patch_bias_init=None,
        cls_init=linear.normal(std),
        position_init=linear.normal(std),
        stem_norm=layer_norm,
        remat=self.remat,
        dtype=self.dtype,
        name="encoder",
    )(image)
    pooled = layer_norm("norm")(tokens[:, 0])
    embed = linear.Linear(
        self.embed,
        linear.EMBED_TO_JOINT,
        linear.normal(std),
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
    self.logit_scale = self.param(
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
        normalize(self.encode_image(image).embed),
        normalize(self.encode_text(tokens).embed),
        jnp.exp(self.logit_scale),
    )


def normalize(x: jax.Array) -> jax.Array:
  """Scales the rows of [..., E] to unit length, in float32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(
      jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-12)
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

  With `chunks` the towers run on a part of the rows at a time, forward and,
  anew, backward, so that only embeddings are kept of the others: the gradient
  stays exact and memory is that of one chunk (Gao et al. 2021, GradCache).

  Returns:
    The terms of `objectives.contrastive.info_nce`, and no mutables.
  """
  del context  # CLIP has no dropout.

  def embed(rows: dict[str, jax.Array]) -> CLIPOutput:
    return system.apply(variables, rows["image"], rows["tokens"])

  rows = {key: batch[key] for key in ("image", "tokens")}
  if chunks > 1:
    output = jax.lax.map(
        jax.checkpoint(embed), sharding.split_rows(rows, chunks)
    )
    image, text = sharding.merge_rows((output.image, output.text))
    output = CLIPOutput(image, text, output.scale[0])
  else:
    output = embed(rows)
  return (
      contrastive.info_nce(output.image, output.text, output.scale),
      {},
  )


# Where a config.json is silent, transformers takes these (`CLIPTextConfig`,
# `CLIPVisionConfig`, `CLIPConfig`).
_TOWER: dict[str, Any] = dict(
    num_hidden_layers=12, hidden_act="quick_gelu", layer_norm_eps=1e-5
)
_TEXT = _TOWER | dict(
    vocab_size=49408,
    hidden_size=512,
    intermediate_size=2048,
    num_attention_heads=8,
    max_position_embeddings=77,
    eos_token_id=49407,
)
_VISION = _TOWER | dict(
    hidden_size=768,
    intermediate_size=3072,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=32,
)
_PROJECTION = 512
# transformers reads this end-of-text id, which early configs give by mistake,
# as "the highest id".
_HIGHEST = 2


def _tower(
    hf: Mapping[str, Any], kind: str, defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """One tower's config and the attributes that both towers have."""
  tower = {**defaults, **(hf.get(f"{kind}_config") or {})}
  # The first configs held a second, decisive copy.
  if hf.get(f"{kind}_config_dict") is not None:
    tower |= {**defaults, **hf[f"{kind}_config_dict"]}
  config.pick(linear.ACTIVATIONS, tower["hidden_act"], f"{kind} hidden_act")
  return tower, dict(
      embed=hf.get("projection_dim", _PROJECTION),
      width=tower["hidden_size"],
      depth=tower["num_hidden_layers"],
      heads=tower["num_attention_heads"],
      mlp=tower["intermediate_size"],
      activation=tower["hidden_act"],
      epsilon=tower["layer_norm_eps"],
  )


def _from_hf(hf: Mapping[str, Any], names: Collection[str]) -> CLIP:
  """The system of a config.json."""
  del names  # The config says everything.
  text, text_shared = _tower(hf, "text", _TEXT)
  vision, vision_shared = _tower(hf, "vision", _VISION)
  image, patch = (layout.pair(vision[f"{k}_size"]) for k in ("image", "patch"))
  if patch[0] != patch[1] or vision["num_channels"] != 3:
    raise ValueError(
        f"vision_config: patch_size is {patch} and num_channels "
        f"{vision['num_channels']}; expected square patches of 3 channels"
    )
  eos = text["eos_token_id"]
  return CLIP(
      vision=ImageTower(image=image, patch=patch[0], **vision_shared),
      text=TextTower(
          vocab=text["vocab_size"],
          length=text["max_position_embeddings"],
          eot=None if eos == _HIGHEST else eos,
          **text_shared,
      ),
  )


def _to_hf(system: CLIP) -> dict[str, Any]:
  """The config.json of a system."""
  vision, text = system.vision, system.text
  if vision.image[0] != vision.image[1]:
    raise ValueError(
        f"transformers' CLIP takes square images, not {tuple(vision.image)}"
    )

  def shared(tower: ImageTower | TextTower) -> dict[str, Any]:
    return dict(
        projection_dim=tower.embed,
        hidden_size=tower.width,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.heads,
        intermediate_size=tower.mlp,
        hidden_act=tower.activation,
        layer_norm_eps=tower.epsilon,
    )

  return dict(
      architectures=["CLIPModel"],
      model_type="clip",
      projection_dim=vision.embed,
      vision_config=dict(
          model_type="clip_vision_model",
          image_size=vision.image[0],
          patch_size=vision.patch,
          num_channels=3,
          **shared(vision),
      ),
      text_config=dict(
          model_type="clip_text_model",
          vocab_size=text.vocab,
          max_position_embeddings=text.length,
          eos_token_id=_HIGHEST if text.eot is None else text.eot,
          bos_token_id=None,  # Known to the tokenizer, not to the system.
          pad_token_id=None,
          **shared(text),
      ),
  )


def _table(system: CLIP) -> Table:
  """The names of transformers, its `pre_layrnorm` included."""
  del system  # The names are the same for every size.
  rules = [
      *_embeddings(
          cls="vision_model.embeddings.class_embedding",
          patch="vision_model.embeddings.patch_embedding.weight",
          grid="vision_model.embeddings.position_embedding.weight",
          token="text_model.embeddings.token_embedding.weight",
          sequence="text_model.embeddings.position_embedding.weight",
      ),
      *layout.affine("vision_model.pre_layrnorm", "vision/encoder/stem_norm"),
      *layout.affine("vision_model.post_layernorm", "vision/norm"),
      *layout.affine("text_model.final_layer_norm", "text/norm"),
      Rule("visual_projection.weight", "vision/projection/kernel", LINEAR),
      Rule("text_projection.weight", "text/projection/kernel", LINEAR),
      layout.Ignore(r"(text|vision)_model\.embeddings\.position_ids"),
  ]
  for tower, blocks in (("vision", "vision/encoder"), ("text", "text")):
    rules += layout.block(
        f"{tower}_model.encoder.layers.{{i}}",
        f"{blocks}/blocks[i]",
        norms=("layer_norm1", "layer_norm2"),
        attention=tuple(
            f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")
        ),
        mlp=("mlp.fc1", "mlp.fc2"),
    )
  return rules


def official_table(system: CLIP) -> Table:
  """The names of the official code, whose last projections are as ours."""
  del system  # The names are the same for every size.
  rules = [
      *_embeddings(
          cls="visual.class_embedding",
          patch="visual.conv1.weight",
          grid="visual.positional_embedding",
          token="token_embedding.weight",
          sequence="positional_embedding",
      ),
      *layout.affine("visual.ln_pre", "vision/encoder/stem_norm"),
      *layout.affine("visual.ln_post", "vision/norm"),
      *layout.affine("ln_final", "text/norm"),
      Rule("visual.proj", "vision/projection/kernel"),
      Rule("text_projection", "text/projection/kernel"),
      # Numbers that the official archives keep beside the weights.
      layout.Ignore("input_resolution|context_length|vocab_size"),
  ]
  for tower, blocks in (("visual.", "vision/encoder"), ("", "text")):
    layer = f"{tower}transformer.resblocks.{{i}}"
    block = f"{blocks}/blocks[i]"
    qkv = [f"{block}/attention/{name}" for name in ("query", "key", "value")]
    kernels = tuple(f"{part}/kernel" for part in qkv)
    biases = tuple(f"{part}/bias" for part in qkv)
    rules += [
        *layout.affine(f"{layer}.ln_1", f"{block}/attention_norm"),
        Rule(f"{layer}.attn.in_proj_weight", kernels, LINEAR),
        Rule(f"{layer}.attn.in_proj_bias", biases, FLAT),
        *layout.dense(f"{layer}.attn.out_proj", f"{block}/attention/out", 2),
        *layout.affine(f"{layer}.ln_2", f"{block}/mlp_norm"),
        *layout.dense(f"{layer}.mlp.c_fc", f"{block}/mlp/up"),
        *layout.dense(f"{layer}.mlp.c_proj", f"{block}/mlp/down"),
    ]
  return rules


def _embeddings(
    *, cls: str, patch: str, grid: str, token: str, sequence: str
) -> list[Rule]:
  """What both tables have by names without system."""
  return [
      Rule(cls, "vision/encoder/cls"),
      Rule(patch, "vision/encoder/patch/kernel", CONV2D),
      Rule(grid, "vision/encoder/position/table"),
      Rule(token, "text/embed/embedding"),
      Rule(sequence, "text/position/table"),
      Rule("logit_scale", "logit_scale"),
  ]


LAYOUT = layout.Layout(
    architectures=("CLIPModel",),
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
