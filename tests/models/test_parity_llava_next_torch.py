"""Exports of LLaVA-NeXT load in transformers, where it is installed."""

from pathlib import Path

import numpy as np
import pytest

from mmjax import pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
    "name", ["llava_next_llama", "llava_next_mistral", "llava_next_qwen2"]
)
def test_export(name, tmp_path):
  system, variables, _ = pretrained.from_pretrained(GOLDEN / name)
  pretrained.save_pretrained(tmp_path, system, variables)
  load = transformers.LlavaNextForConditionalGeneration.from_pretrained
  model, report = load(tmp_path, output_loading_info=True)
  # The norm behind the tower's blocks, which nobody reads.
  missing = [k for k in report["missing_keys"] if "post_layernorm" not in k]
  assert not missing and not report["unexpected_keys"]
  with np.load(GOLDEN / name / "golden.npz") as arrays:
    arrays = dict(arrays)
  for number in range(sum(key.startswith("in.tokens") for key in arrays)):
    height, width, _ = arrays[f"in.picture.{number}"].shape
    tiles = torch.tensor(arrays[f"in.tiles.{number}"]).permute(0, 3, 1, 2)
    with torch.no_grad():
      found = model.eval()(
          input_ids=torch.tensor(arrays[f"in.tokens.{number}"])[None].long(),
          pixel_values=tiles[None],
          image_sizes=torch.tensor([[height, width]]),
      ).logits[0]
    expected = arrays[f"out.logits.{number}"]
    error = np.abs(found.numpy() - expected).max()
    assert error < 1e-4 * np.abs(expected).max()
