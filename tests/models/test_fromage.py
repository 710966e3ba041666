"""FROMAGe: goldens of the official code, [RET]'s row, training, dialogues."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config, pretrained
from mmjax.models import fromage, fromage_layout
from mmjax.objectives.term import Context
from mmjax.weights import engine, safetensors_file

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("fromage_one", "fromage_four", "fromage_post")
CONTEXT = Context(jnp.int32(0), jax.random.key(0), None)


def build(name):
  size = dict(fromage.SIZES[name], type="mmjax.models.fromage:FROMAGe")
  return config.build(size, "system")


def close(found, expected, tolerance=1e-5):
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape
  assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@functools.cache
def golden(name):
  system, variables, _ = pretrained.from_pretrained(GOLDEN / name)
  with np.load(GOLDEN / name / "golden.npz") as arrays:
    return system, variables, dict(arrays)


def captions(arrays, slots):
  """Tokens and sources of the captioning rows: K vectors, then the text."""
  rows = len(arrays["in.tokens"])
  tokens = np.pad(arrays["in.tokens"], ((0, 0), (slots, 0)))
  source = np.full(tokens.shape, -1)
  source[:, :slots] = np.arange(slots)
  return tokens, source, arrays["in.image"].reshape(rows, 1, 8, 8, 3)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_official_code(name):
  system, variables, arrays = golden(name)
  slots, tokens = system.slots, arrays["in.tokens"]
  shown, source, images = captions(arrays, slots)
  alone = np.pad(tokens, ((0, 0), (0, slots)))

  @jax.jit
  def run(variables, tokens, source):
    seen = system.apply(variables, images, method="look")
    words = system.apply(variables, tokens, source, seen, method="embeddings")
    return system.apply(variables, images, tokens, source), words

  caption, words = run(variables, shown, source)
  text, _ = run(variables, alone, np.full_like(source, -1))
  close(words[:, :slots], arrays["caption.seen"])
  for row, count in enumerate(arrays["in.count"]):
    close(
        caption.logits[row, : slots + count],
        arrays["caption.logits"][row, : slots + count],
    )
    close(text.logits[row, :count], arrays["text.logits"][row, :count])
  close(
      text.text[np.arange(4), arrays["in.count"] - 1], arrays["text.embedding"]
  )
  close(text.scale * text.image[:, 0], arrays["text.seen"])


def rows_of(arrays, slots, joined):
  """What `ground` reads of two pairs: their captions, then their texts."""
  batch = {key: [] for key in ("tokens", "source", "weight", "media")}
  batch |= {"segment": [], "position": [], "anchors": []}
  for first in (0, 2):
    row = {key: [] for key in batch}

    def add(segment, ids, source, weight, media):
      same = row["segment"].count(segment)
      row["tokens"] += ids
      row["source"] += source
      row["weight"] += weight
      row["media"] += [media] * len(ids)
      row["segment"] += [segment] * len(ids)
      row["position"] += list(range(same, same + len(ids)))

    texts = [
        arrays["in.tokens"][i, : arrays["in.count"][i]].tolist()
        for i in (first, first + 1)
    ]
    for n, ids in enumerate(texts):
      add(
          1 if joined else 1 + n,
          [0] * slots + ids[:-1],
          [*range(n * slots, (n + 1) * slots)] + [-1] * (len(ids) - 1),
          [0.0] * slots + [1.0] * (len(ids) - 1),
          n,
      )
    for n, ids in enumerate(texts):
      add(3 + n, ids, [-1] * len(ids), [0.0] + [1.0] * (len(ids) - 1), -1)
      row["anchors"].append(len(row["tokens"]) - 1)
    for key, values in row.items():
      batch[key].append(values)
  length = max(map(len, batch["tokens"]))
  pad = lambda key, values: values + [
      {"source": -1, "media": -1}.get(key, 0)
  ] * (0 if key == "anchors" else length - len(values))
  made = {
      key: np.array([pad(key, values) for values in rows])
      for key, rows in batch.items()
  }
  made["weight"] = made["weight"].astype(np.float32)
  return made | {"images": arrays["in.image"].reshape(2, 2, 8, 8, 3)}


@functools.cache
def grounding(name, chunks=1):
  system, _, _ = golden(name)
  return jax.jit(functools.partial(fromage.ground, system, chunks=chunks))


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_official_code(name, joined):
  system, variables, arrays = golden(name)
  batch = rows_of(arrays, system.slots, joined)
  terms, mutables = grounding(name)(variables, batch, CONTEXT)
  ratio = {key: float(t.total / t.weight) for key, t in terms.items()}
  kind = "joined" if joined else "caption"
  assert ratio["caption"] == pytest.approx(
      float(arrays[f"{kind}.loss"]), rel=1e-5
  )
  assert ratio["text"] == pytest.approx(float(arrays["text.loss"]), rel=1e-5)
  assert terms["caption"].weight == sum(arrays["in.count"]) - 4
  scores = arrays["text.seen"] @ arrays["text.embedding"].T
  cross = lambda x: (
      np.log(np.exp(x).sum(axis=1)) - np.diag(x)
  ).mean()
  assert ratio["contrastive"] == pytest.approx(
      (cross(scores) + cross(scores.T)) / 2, rel=1e-5
  )
  assert mutables == {}


def test_the_logits_may_be_made_in_parts():
  system, variables, arrays = golden("fromage_one")
  batch = rows_of(arrays, system.slots, joined=True)
  whole, _ = grounding("fromage_one")(variables, batch, CONTEXT)
  parts, _ = grounding("fromage_one", 3)(variables, batch, CONTEXT)
  for key in ("caption", "text", "contrastive"):
    np.testing.assert_allclose(parts[key].total, whole[key].total, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_export_is_read_back(name, tmp_path):
  system, variables, arrays = golden(name)
  pretrained.save_pretrained(tmp_path / "out", system, variables)
  again, restored, _ = pretrained.from_pretrained(tmp_path / "out")
  jax.tree.map(np.testing.assert_array_equal, restored, variables)
  assert again.slots == system.slots and again.ret == 39
  # A tensor that was trained has the name that the official loader reads.
  names = safetensors_file.SafetensorsFile(
      tmp_path / "out" / "model.safetensors"
  ).tensors
  assert names["ret_input_embeddings.weight"].shape == (1, len(
      variables["params"]["ret_row"]
  ))
  assert "model.visual_embeddings.weight" in names
