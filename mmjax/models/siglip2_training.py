"""SigLIP 2's recipe: captions, a teacher, hidden patches (section 2).

Tschannen et al. 2025. Towers as SigLIP's learn from the sigmoid loss and from a
decoder that writes captions out of the patches (section 2.2, after LocCa); in
the last fifth of training also from a slow copy of themselves: a pooled local
crop is to say what the teacher says of the whole image (after SILC), and a
hidden patch what the teacher says of the same one (section 2.3, after TIPS).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import sharding
from mmjax.models import siglip
from mmjax.models.siglip import Features, Pairs
from mmjax.nn import linear, norm, position, transformer, views
from mmjax.nn import mask as masks
from mmjax.nn.partitioning import declared, param
from mmjax.objectives import classification, distillation, sigmoid
from mmjax.objectives.term import Context, Term, objective


def _size(
    vision: Mapping[str, int],
    text: Mapping[str, int],
    image: int,
    patch: int,
    vocab: int,
    length: int,
    projector: Mapping[str, int],
) -> dict[str, Any]:
  """Towers; a decoder of half the text tower's depth (section 2.2); heads."""
  projector = dict(
      type="mmjax.models.siglip2_training:Projector", **projector
  )
  return siglip.size(vision, text, image, patch, vocab, length) | dict(
      decoder=dict(
          type="mmjax.models.siglip2_training:Decoder",
          vocab=vocab,
          length=length,
          **dict(text, depth=text["depth"] // 2),
      ),
      image_projector=projector,
      patch_projector=dict(projector),
  )


_PROJECTOR = dict(hidden=2048, bottleneck=256, prototypes=65_536)
_G = dict(width=1536, depth=40, heads=16, mlp=6144)
_SO400M = siglip.SHAPES["so400m"]
SIZES: dict[str, dict[str, Any]] = {
    # For TinyWorld, not in the paper.
    "tiny": _size(
        dict(width=96, depth=4, heads=3, mlp=384),
        dict(width=64, depth=2, heads=2, mlp=256),
        image=32,
        patch=8,
        vocab=1024,
        length=16,
        projector=dict(hidden=256, bottleneck=64, prototypes=256),
    ),
} | {
    name: _size(vision, text, image, patch, 256_000, 64, _PROJECTOR)
    for name, vision, text, image, patch in (
        ("b32", siglip.SHAPES["b"], siglip.SHAPES["b"], 256, 32),
        ("b16", siglip.SHAPES["b"], siglip.SHAPES["b"], 224, 16),
        ("l16", siglip.SHAPES["l"], siglip.SHAPES["l"], 256, 16),
        ("so400m14", _SO400M, _SO400M, 224, 14),
        ("g16", _G, _SO400M, 256, 16),
    )
}


class Decoder(nn.Module):
  """Writes captions out of patches, word by word or all words at once.

  Attributes:
    vocab: number of token ids V.
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
  def __call__(
      self, tokens: jax.Array, parallel: jax.Array, patches: jax.Array
  ) -> jax.Array:
    """Features from which each token is to be predicted.

    Args:
      tokens: i32[B, L]; a token is predicted from those before it.
      parallel: bool[B], rows that are predicted all at once, from nothing but
        the image (CapPa, Tschannen et al. 2023, section 3).
      patches: [B, N, C], tokens of the image tower.

    Returns:
      [B, L, D], normed.
    """
    init = linear.normal(self.width**-0.5)

    def vector(name: str) -> jax.Array:
      found = param(
          self,
          name,
          declared(init, "embed"),
          (self.width,),
          jnp.float32,
      )
      return found.astype(self.dtype)

    batch, length = tokens.shape
    x = linear.Embed(self.vocab, self.width, init, self.dtype, name="embed")(
        tokens[:, :-1]
    )
    x = sharding.constrain(x, "batch", "length", None)
    start = jnp.broadcast_to(vector("start"), (batch, 1, self.width))
    x = jnp.concatenate([start, x], axis=1)
    x = jnp.where(parallel[:, None, None], vector("unknown"), x)
    table = position.SequencePositions(self.length, init, name="position")(
        self.width, length
    )
    order = jnp.where(parallel[:, None], 0, jnp.arange(length))
    blocks = transformer.stacked(transformer.CrossBlock, self.depth, self.remat)
    x, _ = blocks(
        heads=self.heads,
        mlp=self.mlp,
        activation=self.activation,
        epsilon=self.epsilon,
        dtype=self.dtype,
        name="blocks",
    )(
        x + table.astype(self.dtype),
        masks.blocks(order, back=masks.LAST),
        patches,
        masks.full(length, patches.shape[1]),
    )
    return norm.LayerNorm(self.epsilon, self.dtype, name="norm")(x)


class Projector(nn.Module):
  """Features to cosines with prototypes (DINO, Caron et al. 2021, section 3.1).

  Attributes:
    hidden: width of the two hidden layers.
    bottleneck: width of the space that holds the prototypes.
    prototypes: how many, K.
    dtype: of the computation.
  """

  hidden: int
  bottleneck: int
  prototypes: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D] to f32[..., K]."""
    layers = (
        ("first", self.hidden, linear.EMBED_TO_MLP),
        ("second", self.hidden, linear.MLP_TO_EMBED),
        ("third", self.bottleneck, linear.EMBED_TO_JOINT),
    )
    for i, (name, features, axes) in enumerate(layers):
      if i:
        x = linear.ACTIVATIONS["gelu"](x)
      x = linear.Linear(
          features, axes, linear.normal(0.02), dtype=self.dtype, name=name
      )(x)
    table = param(
        self,
        "prototypes",
        declared(linear.normal(0.02), "vocab", "joint"),
        (self.prototypes, self.bottleneck),
        jnp.float32,
    )
    return jnp.matmul(
        norm.normalize(x).astype(self.dtype),
        norm.normalize(table).astype(self.dtype).T,
        preferred_element_type=jnp.float32,
    )


class SigLIP2(nn.Module):
  """SigLIP's towers with what trains them and is then left behind.

  Collection `centres` holds `image` and `patch`, f32[K]: the running means of
  the teacher's logits.

  Attributes:
    vision: a `siglip.ImageTower`.
    text: a `siglip.TextTower` whose `embed` is the width of the images.
    decoder: a `Decoder`.
    image_projector: a `Projector` of whole images.
    patch_projector: a `Projector` of patches.
  """

  vision: nn.Module
  text: nn.Module
  decoder: nn.Module
  image_projector: nn.Module
  patch_projector: nn.Module

  def setup(self) -> None:
    """Declares what belongs to no part."""
    self.logit_scale, self.logit_bias = siglip.logit_parameters(self)
    self.hidden_token = param(
        self,
        "hidden_token",
        declared(linear.normal(0.02), "embed"),
        (self.vision.width,),
        jnp.float32,
    )
    self.vocabulary = linear.Linear(
        self.decoder.vocab,
        linear.EMBED_TO_VOCAB,
        nn.initializers.lecun_normal(),
        dtype=self.decoder.dtype,
    )
    for name, part in (
        ("image", self.image_projector), ("patch", self.patch_projector)
    ):
      self.variable("centres", name, jnp.zeros, (part.prototypes,))

  def encode_image(self, image: jax.Array) -> Features:
    """Features of f32[B, H, W, 3] in [-1, 1]."""
    return self.vision(image)

  def encode_text(self, tokens: jax.Array) -> Features:
    """Features of i32[B, L]."""
    return self.text(tokens)

  def encode_partly(self, image: jax.Array, hidden: jax.Array) -> Features:
    """Features of images of which the patches in bool[B, N] are hidden."""
    return self.vision(image, hidden, self.hidden_token)

  def decode(
      self, tokens: jax.Array, parallel: jax.Array, patches: jax.Array
  ) -> jax.Array:
    """See `Decoder`."""
    return self.decoder(tokens, parallel, patches)

  def words(self, features: jax.Array) -> jax.Array:
    """Logits [..., V] of what `decode` returns."""
    return self.vocabulary(features)

  def project_image(self, embed: jax.Array) -> jax.Array:
    """[..., D] to f32[..., K]."""
    return self.image_projector(embed)

  def project_patches(self, tokens: jax.Array) -> jax.Array:
    """[..., D] to f32[..., K]."""
    return self.patch_projector(tokens)

  def __call__(self, image: jax.Array, tokens: jax.Array) -> Pairs:
    """Embeds a batch of pairs: f32[B, H, W, 3] and i32[B, L]."""
    seen, text = self.encode_image(image), self.encode_text(tokens)
    # Every parameter is touched; what is not used is not computed.
    self.words(self.decode(tokens, jnp.zeros(len(tokens), bool), seen.tokens))
    self.project_image(seen.embed), self.project_patches(seen.tokens)
    return Pairs(
        norm.normalize(seen.embed),
        norm.normalize(text.embed),
        jnp.exp(self.logit_scale),
        self.logit_bias,
    )


def deployed(
    system: SigLIP2, variables: Mapping[str, Any]
) -> tuple[siglip.SigLIP, dict[str, Any]]:
  """The towers alone, which `save_pretrained` writes, and their variables."""
  kept = ("vision", "text", "logit_scale", "logit_bias")
  params = {name: variables["params"][name] for name in kept}
  return siglip.SigLIP(system.vision, system.text), {"params": params}


@objective("image", "tokens", couples_batch=True)
def train(
    system: SigLIP2,
    variables: Any,
    batch: dict[str, jax.Array],
    context: Context,
    *,
    begin: int,
    side: int,
    pad: int = 0,
    views_per_image: int = 8,
    area: Sequence[float] = (0.05, 0.4),
    hide: float = 0.5,
    parallel: float = 0.5,
    chunks: int = 1,
    caption_chunks: int = 1,
) -> tuple[dict[str, Term], dict[str, Any]]:
  """All losses of section 2; the stage's weights add them up.

  Args:
    system: the system.
    variables: its variables.
    batch: `image` and `tokens`.
    context: `shadow` is the teacher.
    begin: step from which on there is a teacher; before it `local` and
      `hidden` are zero and cost nothing.
    side: of the local crops, pixels.
    pad: id behind the end of a caption, which is not predicted.
    views_per_image: local crops an image.
    area: range of the areas of the crops, as parts of the image.
    hide: share of the patches that the student does not see.
    parallel: share of the captions that are predicted all at once.
    chunks: as in `siglip.contrast`.
    caption_chunks: in how many parts the logits of a caption are made, a
      divisor of L; with a large vocabulary they need more memory than all the
      rest.

  Returns:
    Terms `sigmoid` (nats an image), `caption` (nats a token), `local` and
    `hidden` (nats an image), and the moved centres.
  """
  rows = {key: batch[key] for key in ("image", "tokens")}
  count, height, width, _ = rows["image"].shape
  patches = (height // system.vision.patch) * (width // system.vision.patch)
  boxes = (count, views_per_image), tuple(area)
  rows |= _draw(context.rng, count, patches, parallel, boxes)
  begun = context.step >= begin

  def part(rows: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
    seen = system.apply(variables, rows["image"], method="encode_image")
    text = system.apply(variables, rows["tokens"], method="encode_text")
    caption = _caption_loss(
        system, variables, rows, seen.tokens, pad, caption_chunks
    )
    learn = lambda rows: _distil(
        system, variables, context.shadow, rows, side, hide
    )
    zeros = lambda rows: jax.tree.map(jnp.zeros_like, jax.eval_shape(
        learn, rows
    ))  # fmt: skip
    sums = jax.lax.cond(begun, learn, zeros, rows)
    pair = norm.normalize(seen.embed), norm.normalize(text.embed)
    return pair, sums | {"caption": caption}

  (image, text), sums = sharding.by_chunks(part, rows, chunks)
  said = (rows["tokens"] != pad).sum().astype(jnp.float32)
  images = jnp.float32(count)
  terms = sigmoid.pairs(image, text, *siglip.logits_of(variables)) | {
      "caption": Term(sums["caption"], said),
      "local": Term(sums["local"], images),
      "hidden": Term(sums["hidden"], images),
  }
  centres = {
      name: jnp.where(
          begun,
          distillation.moved_centre(old, sums["teacher"][name] / images),
          old,
      )
      for name, old in variables["centres"].items()
  }
  return terms, {"centres": centres}


def _draw(
    rng: jax.Array,
    count: int,
    patches: int,
    parallel: float,
    boxes: tuple[tuple[int, int], tuple[float, float]],
) -> dict[str, jax.Array]:
  """What is random for each image; `boxes` as for `views.random_boxes`."""
  keys = jax.random.split(rng, 3)
  return {
      "parallel": jax.random.bernoulli(keys[0], parallel, (count,)),
      "order": jax.random.uniform(keys[1], (count, patches)).argsort(axis=1),
      "box": views.random_boxes(keys[2], *boxes),
  }


def _caption_loss(
    system: SigLIP2,
    variables: Any,
    rows: dict[str, jax.Array],
    patches: jax.Array,
    pad: int,
    chunks: int,
) -> jax.Array:
  """The cross-entropy of the captions, summed over their tokens, f32[]."""
  tokens = rows["tokens"]
  features = system.apply(
      variables, tokens, rows["parallel"], patches, method="decode"
  )

  def lose(part: tuple[jax.Array, jax.Array]) -> jax.Array:
    features, tokens = part
    logits = system.apply(variables, features, method="words")
    loss = classification.softmax_cross_entropy(logits, tokens)
    return jnp.where(tokens == pad, 0.0, loss).sum()

  split = lambda x: jnp.stack(jnp.split(x, chunks, axis=1))
  parts = split(features), split(tokens)
  return jax.lax.map(jax.checkpoint(lose), parts).sum()


def _distil(
    system: SigLIP2,
    variables: Any,
    teacher: Any,
    rows: dict[str, jax.Array],
    side: int,
    hide: float,
) -> dict[str, Any]:
  """What student and teacher disagree on, summed over images.

  Args:
    system: the system.
    variables: the student's.
    teacher: the teacher's parameters.
    rows: `image` f32[b, H, W, 3]; `order` i32[b, N], the patches in the order
      in which they are hidden; `box` f32[b, V, 4], local crops.
    side: of the crops, pixels.
    hide: share of the patches that are hidden.

  Returns:
    `local` and `hidden`, f32[]; `teacher`, the sums of the teacher's logits for
    images and (means over) patches, f32[K] each.
  """
  image, order, box = rows["image"], rows["order"], rows["box"]
  centres = variables["centres"]
  chosen = order[:, : max(1, round(hide * order.shape[1]))]
  hidden = jnp.zeros(order.shape, bool)
  hidden = jax.vmap(lambda row, index: row.at[index].set(True))(hidden, chosen)

  def run(params: Any, x: Any, method: str, *more: Any) -> Any:
    found = {"params": params, "centres": centres}
    return system.apply(found, x, *more, method=method)

  pick = lambda tokens: jnp.take_along_axis(tokens, chosen[..., None], axis=1)
  student, whole = variables["params"], run(teacher, image, "encode_image")
  goal = run(teacher, whole.embed, "project_image")
  patch_goal = run(teacher, pick(whole.tokens), "project_patches")
  crops = views.crop(image, box, side)
  local = run(
      student, crops.reshape(-1, *crops.shape[2:]), "encode_image"
  ).embed.reshape(*box.shape[:2], -1)
  partly = run(student, image, "encode_partly", hidden).tokens
  losses = {
      "local": distillation.cross_entropy(
          run(student, local, "project_image"), goal[:, None], centres["image"]
      ),
      "hidden": distillation.cross_entropy(
          run(student, pick(partly), "project_patches"),
          patch_goal,
          centres["patch"],
      ),
  }
  return {k: loss.mean(axis=1).sum() for k, loss in losses.items()} | {
      "teacher": {
          "image": goal.sum(axis=0),
          "patch": patch_goal.mean(axis=1).sum(axis=0),
      }
  }
