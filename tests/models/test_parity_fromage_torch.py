"""FROMAGe's exports fill the parts that the official code is made of.

The official model is transformers' OPT and CLIP with three linear maps; here
they are put together anew, where transformers is installed.
"""

from pathlib import Path

import numpy as np
import pytest

from mmjax import pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

GOLDEN = Path(__file__).parents[1] / "golden"


def part(tensors, prefix):
  return {
      name.removeprefix(prefix): value
      for name, value in tensors.items()
      if name.startswith(prefix)
  }


@pytest.mark.parametrize("kind", ["one", "four", "post"])
def test_export(kind, tmp_path):
  name = f"fromage_{kind}"
  system, variables, _ = pretrained.from_pretrained(GOLDEN / name)
  pretrained.save_pretrained(tmp_path / "out", system, variables)
  config = pretrained.from_pretrained(tmp_path / "out").config
  tensors = safetensors.load_file(tmp_path / "out" / "model.safetensors")
  opt = transformers.OPTForCausalLM(
      transformers.OPTConfig(**config["text_config"])
  ).eval()
  missing, extra = opt.load_state_dict(part(tensors, "model.lm."), strict=False)
  assert missing == ["lm_head.weight"] and not extra  # Tied.
  clip = transformers.CLIPVisionModel(
      transformers.CLIPVisionConfig(**config["vision_config"])
  ).eval()
  clip.load_state_dict(part(tensors, "model.visual_model.vision_model."))
  with np.load(GOLDEN / name / "golden.npz") as arrays:
    image = torch.tensor(arrays["in.image"]).permute(0, 3, 1, 2)
    tokens = torch.tensor(arrays["in.tokens"]).long()
    count, expected = arrays["in.count"], arrays["caption.logits"]
  table = opt.get_input_embeddings().weight
  with torch.no_grad():
    # As the official loader does with the row that was trained.
    table[config["retrieval_token_idx"]] = tensors[
        "ret_input_embeddings.weight"
    ][0]
    words = torch.nn.functional.linear(
        clip(image).pooler_output,
        tensors["model.visual_embeddings.weight"],
        tensors["model.visual_embeddings.bias"],
    ).reshape(len(image), config["n_visual_tokens"], -1)
    x = torch.cat([words, table[tokens]], dim=1)
    found = opt(inputs_embeds=x).logits.numpy()
  for row, length in enumerate(count + config["n_visual_tokens"]):
    ours, theirs = found[row, :length], expected[row, :length]
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
