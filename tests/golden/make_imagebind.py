"""Writes ImageBind checkpoints that the official code makes, with outputs.

Run with torch, iopath, einops, ftfy, regex and a checkout of
github.com/facebookresearch/ImageBind (commit 53680b0 wrote the files kept):

  PYTHONPATH=CHECKOUT python tests/golden/make_imagebind.py

Every directory `imagebind_*` beside this file holds the state dict, a
config.json of the constructor's arguments, and `golden.npz` with inputs
(`in.*`, channels last) and outputs: `out.*`, and `trunk.*`, the tokens behind
the blocks. The code fixes the sizes of its inputs; here they are put in from
outside. All parameters are drawn anew.
"""

import functools
import hashlib
import importlib
import importlib.util
import json
from pathlib import Path
import shutil
import sys
import types
from typing import Any
from unittest import mock

import numpy as np
from safetensors.torch import save_file
import torch

# The package imports its loaders of films and sound, which are not needed.
_package = types.ModuleType("imagebind")
_package.__path__ = list(
    importlib.util.find_spec("imagebind").submodule_search_locations
)
sys.modules["imagebind"] = _package
# Nothing of timm runs here: no path is dropped, and all parameters are redrawn.
sys.modules["timm"] = types.ModuleType("timm")
sys.modules["timm.layers"] = types.ModuleType("timm.layers")
sys.modules["timm.layers"].DropPath = torch.nn.Dropout
sys.modules["timm.layers"].trunc_normal_ = torch.nn.init.trunc_normal_
reference = importlib.import_module("imagebind.models.imagebind_model")

HERE = Path(__file__).parent
# What the official code calls its inputs.
THEIRS = dict(
    image="vision", tokens="text", mel="audio", depth="depth",
    thermal="thermal", imu="imu",
)  # fmt: skip
_IMU_PIECE = 8

# (width, blocks, heads) of each tower, and what they look at.
CASES: dict[str, dict[str, Any]] = {
    "imagebind_square": dict(
        towers=dict(
            vision=(16, 2, 4), text=(12, 2, 2), audio=(12, 2, 3),
            depth=(8, 1, 2), thermal=(8, 1, 2), imu=(8, 2, 2),
        ),
        image=8, vocab=20, length=7, imu=48, out=10,
        kernel_size=(2, 4, 4), audio_kernel_size=6, audio_stride=4,
        audio_num_mel_bins=14, audio_target_len=19, depth_kernel_size=4,
        thermal_kernel_size=4, clips=2,
    ),
    # Patches of the spectrogram side by side; one head; one clip.
    "imagebind_plain": dict(
        towers=dict(
            vision=(8, 1, 1), text=(16, 1, 4), audio=(16, 3, 4),
            depth=(12, 2, 3), thermal=(16, 2, 2), imu=(12, 1, 3),
        ),
        image=12, vocab=30, length=9, imu=16, out=6,
        kernel_size=(2, 6, 6), audio_kernel_size=4, audio_stride=4,
        audio_num_mel_bins=8, audio_target_len=16, depth_kernel_size=4,
        thermal_kernel_size=6, clips=1,
    ),
    # Windows of the spectrogram that overlap by half; three clips.
    "imagebind_deep": dict(
        towers=dict(
            vision=(12, 4, 3), text=(8, 3, 2), audio=(8, 4, 2),
            depth=(8, 3, 4), thermal=(12, 3, 3), imu=(16, 3, 4),
        ),
        image=16, vocab=25, length=5, imu=64, out=14,
        kernel_size=(2, 8, 8), audio_kernel_size=8, audio_stride=4,
        audio_num_mel_bins=16, audio_target_len=28, depth_kernel_size=8,
        thermal_kernel_size=4, clips=3,
    ),
}  # fmt: skip


def generator(name: str) -> torch.Generator:
  seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
  return torch.Generator().manual_seed(seed)


def build(case: dict[str, Any], arguments: dict[str, Any]) -> Any:
  """The model, with inputs of the sizes of `case` instead of 224 pixels."""
  sides = lambda old: [case["image"] if n == 224 else n for n in old]
  sized = {"img_size": sides}

  def put_in(part: Any, **changes: Any) -> Any:
    def make(**given: Any) -> Any:
      return part(**{
          key: changes[key](value) if key in changes else value
          for key, value in given.items()
      })

    return make

  parts = {
      "RGBDTPreprocessor": sized,
      "ThermalPreprocessor": sized,
      "IMUPreprocessor": {"img_size": lambda old: [old[0], case["imu"]]},
      "TextPreprocessor": {
          "vocab_size": lambda old: case["vocab"],
          "context_length": lambda old: case["length"],
      },
  }
  patches = [
      mock.patch.object(
          reference, name, put_in(getattr(reference, name), **changes)
      )
      for name, changes in parts.items()
  ]
  for patch in patches:
    patch.start()
  model = reference.ImageBindModel(**arguments)
  for patch in patches:
    patch.stop()
  return model.eval()


@torch.no_grad()
def make(name: str, case: dict[str, Any]) -> None:
  arguments = {
      key: value for key, value in case.items() if key.count("_")
  } | dict(out_embed_dim=case["out"])
  for tower, (width, blocks, heads) in case["towers"].items():
    arguments |= {
        f"{tower}_embed_dim": width,
        f"{tower}_num_blocks": blocks,
        f"{tower}_num_heads": heads,
    }
  model = build(case, arguments)
  for path, value in model.state_dict().items():
    if path.endswith("mask"):
      continue
    draw = torch.randn(value.shape, generator=generator(name + path))
    if path.endswith("log_logit_scale"):
      draw = value + 0.2 * draw
    elif value.ndim > 1:
      draw *= 1.2 / value[0].numel() ** 0.5
    else:
      draw = (1.0 if path.endswith("weight") else 0.0) + 0.3 * draw
    value.copy_(draw)
  shapes = dict(
      vision=(2, 3, case["image"], case["image"]),
      audio=(2, case["clips"], 1, case["audio_num_mel_bins"],
             case["audio_target_len"]),
      depth=(2, 1, case["image"], case["image"]),
      thermal=(2, 1, case["image"], case["image"]),
      imu=(2, 6, case["imu"]),
  )  # fmt: skip
  inputs = {
      key: torch.randn(shape, generator=generator(name + "in" + key))
      for key, shape in shapes.items()
  }
  text = torch.randint(
      0, case["vocab"] - 1, (2, case["length"]), generator=generator(name)
  )
  # The end of the text is the highest id.
  text[0, -1] = text[1, -3] = case["vocab"] - 1
  inputs["text"] = text
  film = torch.randn(
      2, 2, 3, 2, case["image"], case["image"], generator=generator("film")
  )
  trunks: dict[str, np.ndarray] = {}

  def keep(key: str, module: Any, given: Any, out: torch.Tensor) -> None:
    trunks.setdefault(key, out.numpy())

  for key, trunk in model.modality_trunks.items():
    trunk.register_forward_hook(functools.partial(keep, key))
  found = model(inputs)
  filmed = model({"vision": film})["vision"]
  channels = dict(
      image=inputs["vision"].permute(0, 2, 3, 1),
      video=film.permute(0, 1, 3, 4, 5, 2),
      tokens=text.int(),
      mel=inputs["audio"][:, :, 0].transpose(2, 3),
      depth=inputs["depth"][:, 0],
      thermal=inputs["thermal"][:, 0],
      imu=inputs["imu"].transpose(1, 2),
  )
  directory = HERE / name
  shutil.rmtree(directory, ignore_errors=True)
  directory.mkdir()
  save_file(
      {k: v.contiguous() for k, v in model.state_dict().items()},
      directory / "model.safetensors",
      {"format": "pt"},
  )
  config = dict(
      architectures=["ImageBindModel"],
      image_size=case["image"],
      vocab_size=case["vocab"],
      context_length=case["length"],
      imu_samples=case["imu"],
      imu_kernel_size=_IMU_PIECE,
      **arguments,
  )
  text_of = json.dumps(config, indent=2, sort_keys=True)
  (directory / "config.json").write_text(text_of + "\n")
  arrays = {f"in.{key}": value.numpy() for key, value in channels.items()}
  for ours, theirs in THEIRS.items():
    arrays[f"out.{ours}"] = found[theirs].numpy()
    arrays[f"trunk.{ours}"] = trunks[theirs]
  arrays["out.video"] = filmed.numpy()
  np.savez_compressed(directory / "golden.npz", **arrays)


if __name__ == "__main__":
  for key, value in CASES.items():
    make(key, value)
