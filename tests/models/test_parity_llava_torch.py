"""LLaVA's exports load in transformers, where it is installed, and agree."""

from pathlib import Path

import numpy as np
import pytest

from mmjax import pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["llava_plain", "llava_full", "llava_qwen2"])
def test_export(name, tmp_path):
  system, variables, _ = pretrained.from_pretrained(GOLDEN / name)
  pretrained.save_pretrained(tmp_path, system, variables)
  model, report = (
      transformers.LlavaForConditionalGeneration.from_pretrained(
          tmp_path, output_loading_info=True
      )
  )
  # The norm behind the tower's blocks, which nobody reads.
  missing = [k for k in report["missing_keys"] if "post_layernorm" not in k]
  assert not missing and not report["unexpected_keys"]
  with np.load(GOLDEN / name / "golden.npz") as arrays:
    tokens = torch.tensor(arrays["in.tokens"]).long()
    image = torch.tensor(arrays["in.image"]).permute(0, 3, 1, 2)
    expected = arrays["out.logits"]
  with torch.no_grad():
    found = model.eval()(input_ids=tokens, pixel_values=image).logits.numpy()
  assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
