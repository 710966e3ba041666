"""What does the official code call ImageBind and its parts?

It has no config file: the arguments of its `ImageBindModel` stand in one here,
with those sizes that are fixed there (`image_size`, `context_length` ...).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.weights import layout
from mmjax.weights.layout import Ignore, Rule, Table
from mmjax.weights.transforms import CONV2D, FLAT, LINEAR, Transform, leading

# Where a config is silent: `imagebind_huge` of the official code.
DEFAULTS: dict[str, Any] = dict(
    image_size=224,
    vocab_size=49408,
    context_length=77,
    imu_samples=2000,
    out_embed_dim=1024,
    kernel_size=[2, 14, 14],
    audio_kernel_size=16,
    audio_stride=10,
    audio_num_mel_bins=128,
    audio_target_len=204,
    depth_kernel_size=16,
    thermal_kernel_size=16,
    imu_kernel_size=8,
    vision_embed_dim=1280, vision_num_blocks=32, vision_num_heads=16,
    text_embed_dim=1024, text_num_blocks=24, text_num_heads=16,
    audio_embed_dim=768, audio_num_blocks=12, audio_num_heads=12,
    audio_drop_path=0.1,
    depth_embed_dim=384, depth_num_blocks=12, depth_num_heads=8,
    depth_drop_path=0.0,
    thermal_embed_dim=768, thermal_num_blocks=12, thermal_num_heads=12,
    thermal_drop_path=0.0,
    imu_embed_dim=512, imu_num_blocks=6, imu_num_heads=8, imu_drop_path=0.7,
)  # fmt: skip

_HERE = "mmjax.models.imagebind"
_STEM_EPSILON, _EPSILON = 1e-5, 1e-6
_IMU_DROPOUT = 0.5
_IMU_CHANNELS = 6
_TOWERS = ("vision", "text", "audio", "depth", "thermal", "imu")


def attributes(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The node of a config that builds the system of a config.json.

  Raises:
    ValueError: for a film of other than two frames, or oblong patches.
  """
  hf = DEFAULTS | dict(hf)
  frames, patch, other = hf["kernel_size"]
  if frames != 2 or patch != other:
    raise ValueError(
        f"kernel_size is {hf['kernel_size']}; expected 2 frames and a square"
    )
  side = hf["image_size"]
  grid = lambda patch: (side // patch, side // patch)
  windows = lambda size: (
      (size - hf["audio_kernel_size"]) // hf["audio_stride"] + 1
  )
  normed = dict(epsilon=_STEM_EPSILON)
  stem = lambda patch, **rest: dict(
      type=f"{_HERE}:PatchStem", patch=patch, **rest
  )

  def tower(name: str, **rest: Any) -> dict[str, Any]:
    return dict(
        embed=hf["out_embed_dim"],
        width=hf[f"{name}_embed_dim"],
        depth=hf[f"{name}_num_blocks"],
        heads=hf[f"{name}_num_heads"],
        **rest,
    )

  def sense(name: str, **rest: Any) -> dict[str, Any]:
    rate = hf.get(f"{name}_drop_path", 0.0)
    return tower(name, type=f"{_HERE}:Tower", drop_path=rate, **rest)

  pixels = {
      name: sense(
          name,
          stem=stem(hf[f"{name}_kernel_size"], **normed),
          grid=grid(hf[f"{name}_kernel_size"]),
          extra=True,
      )
      for name in ("depth", "thermal")
  }
  return dict(
      type=f"{_HERE}:ImageBind",
      vision=sense(
          "vision", stem=stem(patch), grid=grid(patch), stem_norm=True
      ),
      text=tower(
          "text",
          type="mmjax.models.clip:TextTower",
          vocab=hf["vocab_size"],
          length=hf["context_length"],
          mlp=4 * hf["text_embed_dim"],
          activation="gelu",
          epsilon=_EPSILON,
      ),
      audio=sense(
          "audio",
          stem=stem(
              hf["audio_kernel_size"], stride=hf["audio_stride"], **normed
          ),
          grid=(
              windows(hf["audio_num_mel_bins"]),
              windows(hf["audio_target_len"]),
          ),
          extra=True,
      ),
      imu=sense(
          "imu",
          stem=dict(
              type=f"{_HERE}:SignalStem", patch=hf["imu_kernel_size"], **normed
          ),
          grid=(hf["imu_samples"] // hf["imu_kernel_size"], 1),
          extra=True,
          dropout=_IMU_DROPOUT,
      ),
      **pixels,
  )


def config_of(system: Any) -> dict[str, Any]:
  """The config.json of an `ImageBind`; the inverse of `attributes`."""
  vision, audio, imu = system.vision, system.audio, system.imu
  patch, step = vision.stem.patch, audio.stem.stride or audio.stem.patch
  covered = lambda windows: (windows - 1) * step + audio.stem.patch
  found = dict(
      architectures=["ImageBindModel"],
      model_type="imagebind",
      image_size=vision.grid[0] * patch,
      vocab_size=system.text.vocab,
      context_length=system.text.length,
      imu_samples=imu.grid[0] * imu.stem.patch,
      out_embed_dim=vision.embed,
      kernel_size=[2, patch, patch],
      audio_kernel_size=audio.stem.patch,
      audio_stride=step,
      # What the windows cover; the rest of the published 204 is not read.
      audio_num_mel_bins=covered(audio.grid[0]),
      audio_target_len=covered(audio.grid[1]),
      depth_kernel_size=system.depth.stem.patch,
      thermal_kernel_size=system.thermal.stem.patch,
      imu_kernel_size=imu.stem.patch,
  )
  for name in _TOWERS:
    tower = getattr(system, name)
    found |= {
        f"{name}_embed_dim": tower.width,
        f"{name}_num_blocks": tower.depth,
        f"{name}_num_heads": tower.heads,
    }
    if name not in ("vision", "text"):
      found[f"{name}_drop_path"] = tower.drop_path
  return found


def inputs(system: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """One example of everything, abstract."""
  config = config_of(system)
  side = config["image_size"]
  floats = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  return dict(
      image=floats(side, side, 3),
      tokens=jax.ShapeDtypeStruct((1, system.text.length), jnp.int32),
      mel=floats(config["audio_target_len"], config["audio_num_mel_bins"]),
      depth=floats(side, side),
      thermal=floats(side, side),
      imu=floats(config["imu_samples"], _IMU_CHANNELS),
  )


def _film_to_ours(kernel: np.ndarray, shape: Any) -> np.ndarray:
  return kernel.transpose(3, 4, 2, 1, 0).reshape(shape)


def _film_to_theirs(kernel: np.ndarray) -> np.ndarray:
  rows, columns, channels, width = kernel.shape
  split = kernel.reshape(rows, columns, 2, channels // 2, width)
  return split.transpose(4, 3, 2, 0, 1)


# torch's [out, in, frames, height, width] <-> our [height, width, frames * in,
# out].
_FILM = Transform(_film_to_ours, _film_to_theirs)
# Their [out, channels * samples] <-> our [samples, channels, out].
_SIGNAL = Transform(
    lambda kernel, shape: kernel.reshape(
        shape[2], shape[1], shape[0]
    ).transpose(2, 1, 0),
    lambda kernel: kernel.transpose(2, 1, 0).reshape(kernel.shape[2], -1),
)
# Their [1, 1, D] <-> our [heads, head_dim].
_EXTRA = Transform(
    lambda vector, shape: vector.reshape(shape),
    lambda array: array.reshape(1, 1, array.size),
)


def _block(source: str, target: str) -> list[Rule]:
  """One block, with the extra key and value where it has them."""
  parts = [f"{target}/attention/{part}" for part in ("query", "key", "value")]
  return [
      *layout.affine(f"{source}.norm_1", f"{target}/attention_norm"),
      Rule(
          f"{source}.attn.in_proj_weight",
          tuple(f"{part}/kernel" for part in parts),
          LINEAR,
      ),
      Rule(
          f"{source}.attn.in_proj_bias",
          tuple(f"{part}/bias" for part in parts),
          FLAT,
      ),
      *(
          Rule(
              f"{source}.attn.bias_{letter}",
              f"{target}/attention/extra_{name}",
              _EXTRA,
          )
          for letter, name in (("k", "key"), ("v", "value"))
      ),
      *layout.dense(f"{source}.attn.out_proj", f"{target}/attention/out", 2),
      *layout.affine(f"{source}.norm_2", f"{target}/mlp_norm"),
      *layout.dense(f"{source}.mlp.fc1", f"{target}/mlp/up"),
      *layout.dense(f"{source}.mlp.fc2", f"{target}/mlp/down"),
  ]


def table(system: Any) -> Table:
  """The names of `imagebind_huge.pth`."""
  del system  # The names are the same for every size.
  stems = {
      "vision": ("rgbt_stem.proj.1", _FILM),
      "audio": ("rgbt_stem.proj", CONV2D),
      "depth": ("depth_stem.proj", CONV2D),
      "thermal": ("rgbt_stem.proj", CONV2D),
      "imu": ("imu_stem.proj", _SIGNAL),
  }
  rules: list[Rule | Ignore] = []
  for name, (stem, transform) in stems.items():
    here = f"modality_preprocessors.{name}"
    helper = "" if name == "imu" else "pos_embedding_helper."
    last = 3 if name == "imu" else 2
    rules += [
        Rule(f"{here}.{stem}.weight", f"{name}/stem/patch/kernel", transform),
        *layout.affine(
            f"{here}.{stem.removesuffix('.proj')}.norm_layer",
            f"{name}/stem/norm",
        ),
        Rule(f"{here}.cls_token", f"{name}/cls", leading(2)),
        Rule(
            f"{here}.{helper}pos_embed", f"{name}/position/table", leading(1)
        ),
        *layout.affine(f"modality_heads.{name}.0", f"{name}/norm"),
        Rule(
            f"modality_heads.{name}.{last}.weight",
            f"{name}/projection/kernel",
            LINEAR,
        ),
        *layout.affine(
            f"modality_trunks.{name}.pre_transformer_layer.0",
            f"{name}/stem_norm",
        ),
    ]
  here = "modality_preprocessors.text"
  rules += [
      Rule(f"{here}.token_embedding.weight", "text/embed/embedding"),
      Rule(f"{here}.pos_embed", "text/position/table", leading(1)),
      Ignore(r"modality_preprocessors\.text\.mask"),
      *layout.affine("modality_heads.text.proj.0", "text/norm"),
      Rule(
          "modality_heads.text.proj.1.weight", "text/projection/kernel", LINEAR
      ),
  ]
  for name in _TOWERS:
    rules += _block(
        f"modality_trunks.{name}.blocks.{{i}}", f"{name}/blocks[i]"
    )
    rules.append(
        Rule(
            f"modality_postprocessors.{name}.1.log_logit_scale", f"{name}_scale"
        )
    )
  return rules
