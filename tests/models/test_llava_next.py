"""LLaVA-NeXT: goldens of transformers, tiles and lines, whatever the shape."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from mmjax import pretrained
from mmjax.data import anyres
from mmjax.models import llava_next
from mmjax.objectives.term import Context

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("llava_next_llama", "llava_next_mistral", "llava_next_qwen2")


def close(found, expected, tolerance=1e-5):
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape
  assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def grids(system):
  tower = system.base.vision
  return anyres.Grids(tower.image[0], tower.patch, system.pinpoints)


@functools.cache
def golden(name):
  """The system, and all its pictures as one padded batch."""
  system, variables, _ = pretrained.from_pretrained(GOLDEN / name)
  cut = grids(system)
  with np.load(GOLDEN / name / "golden.npz") as arrays:
    arrays = dict(arrays)
  cases = []
  for number in range(sum(key.startswith("in.tokens") for key in arrays)):
    case = {key.rsplit(".", 1)[0]: value for key, value in arrays.items()
            if key.endswith(f".{number}")}  # fmt: skip
    height, width, _ = case["in.picture"].shape
    case["rows"] = cut.rows(height, width, newline=cut.most * cut.features)
    cases.append(case)
  length = max(len(case["in.tokens"]) for case in cases)
  side = cut.side
  batch = dict(
      images=np.zeros((len(cases), cut.most, side, side, 3), np.float32),
      tokens=np.zeros((len(cases), length), np.int32),
      source=np.full((len(cases), length), -1, np.int32),
  )
  for row, case in enumerate(cases):
    tokens, tiles, rows = case["in.tokens"], case["in.tiles"], case["rows"]
    batch["images"][row, : len(tiles)] = tiles
    batch["tokens"][row, : len(tokens)] = tokens
    batch["source"][row, 3 : 3 + len(rows)] = rows
  return system, variables, batch, cases


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_transformers(name):
  system, variables, batch, cases = golden(name)
  encode = jax.jit(lambda *a: system.apply(*a, method="encode"))
  features = np.asarray(encode(variables, batch["images"]))
  logits, _ = jax.jit(system.apply)(variables, **batch)
  for row, case in enumerate(cases):
    # The last id, of the placeholder, stands exactly where a row does.
    placed = case["in.tokens"] == system.base.llm.vocab - 1
    assert placed.sum() == len(case["rows"])
    close(features[row, case["rows"]], case["out.features"])
    close(logits[row, : len(case["in.tokens"])], case["out.logits"])


@pytest.mark.parametrize("name", CASES)
def test_tiles_are_those_of_the_processor(name):
  system, _, _, cases = golden(name)
  for case in cases:
    found = grids(system).tiles(Image.fromarray(case["in.picture"]))
    close(found, case["in.tiles"], 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_export_is_read_back(name, tmp_path):
  system, variables, batch, _ = golden(name)
  pretrained.save_pretrained(tmp_path / "out", system, variables)
  again, restored, written = pretrained.from_pretrained(tmp_path / "out")
  assert written["image_grid_pinpoints"] == [list(p) for p in system.pinpoints]
  assert again.pinpoints == system.pinpoints
  jax.tree.map(np.testing.assert_array_equal, restored, variables)



def test_what_cannot_be_read_is_refused():
  hf = pretrained.from_pretrained(GOLDEN / CASES[0]).config
  read = lambda **changes: llava_next.LAYOUT.system(hf | changes, [])
  with pytest.raises(ValueError, match="whole tiles of 8"):
    read(image_grid_pinpoints=[[8, 12]])
  with pytest.raises(ValueError, match="'full'"):
    read(vision_feature_select_strategy="full")
  mistral = pretrained.from_pretrained(GOLDEN / CASES[1]).config
  text = mistral["text_config"] | dict(sliding_window=100)
  with pytest.raises(ValueError, match="sliding_window=100 of 256"):
    llava_next.LAYOUT.system(mistral | dict(text_config=text), [])


def test_only_answers_count():
  system, variables, batch, _ = golden(CASES[0])
  weight = np.zeros(batch["tokens"].shape, np.float32)
  weight[:, 1:3] = 1
  context = Context(jnp.int32(0), jax.random.key(0), None)
  answer = jax.jit(lambda *args: llava_next.answer(system, *args, context))
  terms, mutables = answer(variables, dict(batch, weight=weight))
  assert mutables == {} and terms["next_token"].weight == weight.sum()
