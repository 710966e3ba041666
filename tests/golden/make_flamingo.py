"""Writes checkpoints of OpenFlamingo with what it makes of pictures and text.

Run with torch, transformers and open_flamingo (5.23 and 2.0.1 wrote the files
that are kept):

  python tests/golden/make_flamingo.py

Every directory `flamingo_*` beside this file holds a config.json in the words
of `mmjax.models.flamingo_layout`, `model.safetensors` with the names of
OpenFlamingo, and `golden.npz`: `in.images` (channels last), `in.tokens`,
`in.media` (the picture that a token sees), `out.resampled`, `out.logits`, and
`out.greedy`, the likeliest tokens behind the first `in.count` of each row up to
`END`, each from the whole text anew: its own `generate` does not run with
transformers 5. All parameters are drawn anew; of a tensor that OpenFlamingo
names twice, a file holds both names (`both`), the newer or the older ones.
"""

import json
from pathlib import Path
import shutil
import sys
import types
from typing import Any

import make_llm
import numpy as np
from safetensors.torch import save_file
import torch
import transformers

# OpenFlamingo imports the towers that it is not asked for here.
sys.modules.setdefault("open_clip", types.ModuleType("open_clip"))

from open_flamingo.src import flamingo, flamingo_lm, helpers, utils  # noqa: E402

HERE = Path(__file__).parent
VOCAB = 40
END, IMAGE = VOCAB - 2, VOCAB - 1
NEW = 6

VISION: dict[str, Any] = dict(
    image_size=8, patch_size=4, hidden_size=12, intermediate_size=24,
    num_hidden_layers=2, num_attention_heads=2, hidden_act="quick_gelu",
    layer_norm_eps=1e-5, num_channels=3,
)
RESAMPLER: dict[str, Any] = dict(
    num_latents=3, depth=2, heads=2, dim_head=5, ff_inner=48, activation="gelu",
    epsilon=1e-5, max_num_frames=None, max_num_media=None,
)
GATES: dict[str, Any] = dict(
    heads=3, dim_head=4, ff_inner=64, activation="gelu", epsilon=1e-5
)
TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, intermediate_size=24,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    pad_token_id=0,
)
CASES: dict[str, dict[str, Any]] = {
    "flamingo_both": dict(
        text=dict(TEXT, model_type="llama"), every=2, names="both", pictures=2
    ),
    # A gated block before every block, times and places that are learned.
    "flamingo_newer": dict(
        text=dict(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, ffn_dim=24,
            num_attention_heads=2, max_position_embeddings=64,
            word_embed_proj_dim=16, model_type="opt", pad_token_id=0,
        ),
        every=1, names="newer", pictures=3,
        resampler=dict(num_latents=4, max_num_frames=2, max_num_media=3),
    ),
    "flamingo_older": dict(
        text=dict(TEXT, model_type="llama", num_hidden_layers=7), every=3,
        names="older", pictures=2, gates=dict(heads=2, dim_head=8),
    ),
}  # fmt: skip


class Layer(torch.nn.Module):
  """A block of CLIP's tower under its official names."""

  def __init__(self, width: int, heads: int, hidden: int) -> None:
    super().__init__()
    self.ln_1 = torch.nn.LayerNorm(width)
    self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
    self.ln_2 = torch.nn.LayerNorm(width)
    self.mlp = torch.nn.ModuleDict(
        dict(
            c_fc=torch.nn.Linear(width, hidden),
            c_proj=torch.nn.Linear(hidden, width),
        )
    )

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = self.ln_1(x)
    x = x + self.attn(y, y, y, need_weights=False)[0]
    y = self.mlp["c_fc"](self.ln_2(x))
    return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


class Tower(torch.nn.Module):
  """CLIP's tower, which gives the patches of its last block."""

  def __init__(self) -> None:
    super().__init__()
    width, patch = VISION["hidden_size"], VISION["patch_size"]
    count = (VISION["image_size"] // patch) ** 2
    self.class_embedding = torch.nn.Parameter(torch.zeros(width))
    self.positional_embedding = torch.nn.Parameter(
        torch.zeros(count + 1, width)
    )
    self.conv1 = torch.nn.Conv2d(3, width, patch, patch, bias=False)
    self.ln_pre = torch.nn.LayerNorm(width)
    layers = [
        Layer(width, VISION["num_attention_heads"], VISION["intermediate_size"])
        for _ in range(VISION["num_hidden_layers"])
    ]
    self.transformer = torch.nn.ModuleDict(
        dict(resblocks=torch.nn.ModuleList(layers))
    )
    self.ln_post = torch.nn.LayerNorm(width)
    self.proj = torch.nn.Parameter(torch.zeros(width, width))

  def forward(self, x: torch.Tensor) -> tuple[None, torch.Tensor]:
    x = self.conv1(x).flatten(2).transpose(1, 2)
    first = self.class_embedding.expand(len(x), 1, -1)
    x = self.ln_pre(torch.cat([first, x], 1) + self.positional_embedding)
    for layer in self.transformer["resblocks"]:
      x = layer(x)
    return None, x[:, 1:]


def build(
    text: dict[str, Any],
    every: int,
    resampler: dict[str, Any],
    gates: dict[str, Any],
) -> flamingo.Flamingo:
  """A model of OpenFlamingo with small parts."""
  opt = text["model_type"] == "opt"
  kind = "OPT" if opt else "Llama"
  decoder = getattr(transformers, f"{kind}ForCausalLM")(
      getattr(transformers, f"{kind}Config")(**text)
  )
  utils.extend_instance(decoder, flamingo_lm.FlamingoLMMixin)
  decoder.set_decoder_layers_attr_name(
      "model.decoder.layers" if opt else "model.layers"
  )
  width = VISION["hidden_size"]
  tower = types.SimpleNamespace(visual=Tower())
  model = flamingo.Flamingo(
      tower, decoder, END, IMAGE, vis_dim=width,
      cross_attn_every_n_layers=every,
  )  # fmt: skip
  model.perceiver = helpers.PerceiverResampler(
      dim=width,
      ff_mult=resampler["ff_inner"] // width,
      **{
          key: resampler[key]
          for key in (
              "num_latents", "depth", "heads", "dim_head", "max_num_frames",
              "max_num_media",
          )
      },
  )  # fmt: skip
  hidden = text["hidden_size"]
  decoder.gated_cross_attn_layers = torch.nn.ModuleList(
      helpers.GatedCrossAttentionBlock(
          dim=hidden,
          dim_visual=width,
          dim_head=gates["dim_head"],
          heads=gates["heads"],
          ff_mult=gates["ff_inner"] // hidden,
      )
      if layer is not None
      else None
      for layer in decoder.gated_cross_attn_layers
  )
  decoder.init_flamingo_layers(False)
  return model.eval()


def kept(name: str, names: str) -> bool:
  """Whether a tensor is in a file that has the newer or the older names."""
  old = name.startswith(
      ("lang_encoder.gated_cross_attn_layers", "lang_encoder.old_decoder")
  )
  new = ".gated_cross_attn_layer." in name or ".decoder_layer." in name
  return names == "both" or not (new if names == "older" else old)


@torch.no_grad()
def make(
    name: str,
    text: dict[str, Any],
    every: int,
    names: str,
    pictures: int,
    resampler: dict[str, Any] | None = None,
    gates: dict[str, Any] | None = None,
) -> None:
  resampler = RESAMPLER | (resampler or {})
  gates = GATES | (gates or {})
  model = build(text, every, resampler, gates)
  make_llm.redraw(model, name)
  generator = make_llm.generator(name + " inputs")
  length = 5 * pictures
  tokens = torch.randint(1, END, (2, length), generator=generator)
  # One row begins with words, of which none sees a picture.
  for row, begin in enumerate((0, 2)):
    tokens[row, begin::5] = IMAGE
  media = (tokens == IMAGE).cumsum(1) - 1
  size = VISION["image_size"]
  images = torch.randn(
      2, pictures, 1, 3, size, size, generator=generator
  )
  count = torch.tensor([length, length - 2])
  resampled = []
  model.perceiver.register_forward_hook(
      lambda module, inputs, output: resampled.append(output)
  )
  logits = model(images, tokens, attention_mask=torch.ones_like(tokens)).logits
  greedy = np.full((2, NEW), -1, np.int32)
  for row in range(2):
    text_so_far = tokens[row : row + 1, : count[row]]
    for place in range(NEW):
      out = model(
          images[row : row + 1],
          text_so_far,
          attention_mask=torch.ones_like(text_so_far),
      )
      chosen = out.logits[:, -1:].argmax(-1)
      greedy[row, place] = chosen.item()
      if chosen.item() == END:
        break
      text_so_far = torch.cat([text_so_far, chosen], 1)
  directory = HERE / name
  shutil.rmtree(directory, ignore_errors=True)
  directory.mkdir()
  save_file(
      {
          key: value.clone()
          for key, value in model.state_dict().items()
          if kept(key, names)
      },
      directory / "model.safetensors",
      {"format": "pt"},
  )
  described = dict(
      architectures=["Flamingo"], model_type="flamingo", vision_config=VISION,
      text_config=text, perceiver_config=resampler, cross_attn_config=gates,
      cross_attn_every_n_layers=every,
  )  # fmt: skip
  (directory / "config.json").write_text(json.dumps(described, indent=2) + "\n")
  np.savez_compressed(
      directory / "golden.npz",
      **{
          "in.images": images[:, :, 0].permute(0, 1, 3, 4, 2).numpy(),
          "in.tokens": tokens.int().numpy(),
          "in.media": media.int().numpy(),
          "in.count": count.int().numpy(),
          "out.resampled": resampled[0].numpy(),
          "out.logits": logits.numpy(),
          "out.greedy": greedy,
      },
  )


if __name__ == "__main__":
  for key, value in CASES.items():
    make(key, **value)
