"""FROMAGe: goldens of the official code, [RET]'s row, training, dialogues."""

import functools
from pathlib import Path

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config, pretrained, sharding
from mmjax.data import pack, subwords
from mmjax.models import fromage, fromage_layout
from mmjax.models.fromage_dialogue import Dialogue, Prompt, Said, Style
from mmjax.objectives.term import Context
from mmjax.sampling.autoregressive import Sampling
from mmjax.sampling.decoding import Decoding
from mmjax.sampling.retrieval import Index
from mmjax.train import imports, optim
from mmjax.train.stage import Stage
from mmjax.train.state import make_init
from mmjax.train.step import train_step
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


def document(ids, slots):
  """A text, behind a picture of so many vectors if there are any."""
  seen, length = min(slots, 1), slots + len(ids)
  return pack.Document(
      np.array([0] * slots + ids, np.int32),
      np.array([0.0] * max(slots, 1) + [1.0] * (len(ids) - 1 + seen)),
      np.array([*range(slots)] + [-1] * len(ids)),
      np.full(length, seen - 1),
      (slots,) * seen,
  )


def rows_of(arrays, slots, joined):
  """What `ground` reads of two pairs: their captions, then their texts."""
  rows = []
  for first in (0, 2):
    texts = [
        arrays["in.tokens"][i, : arrays["in.count"][i]].tolist()
        for i in (first, first + 1)
    ]
    captions = [document(ids[:-1], slots) for ids in texts]
    if joined:
      captions = [pack.joined(captions)]
    documents = captions + [document(ids, 0) for ids in texts]
    ends = np.cumsum([len(d.tokens) for d in documents]) - 1
    rows.append(pack.row(documents, 48) | dict(anchors=ends[-2:]))
  batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
  return batch | {"images": arrays["in.image"].reshape(2, 2, 8, 8, 3)}


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


@pytest.mark.parametrize("name", CASES)
def test_writing_is_that_of_the_official_code(name):
  system, variables, arrays = golden(name)
  written = arrays["write.tokens"][0]
  tokens = np.concatenate(
      [np.zeros(system.slots, int), arrays["in.tokens"][0, :3], written]
  )
  source = np.full(len(tokens), -1)
  source[: system.slots] = np.arange(system.slots)
  begin = system.slots + 3
  image = arrays["in.image"][:1]
  output = jax.jit(system.apply)(
      variables, image[None], tokens[None], source[None]
  )
  logits = np.array(output.logits[0, begin - 1 : -1])
  logits[:2, 39] = -1e4
  logits[2:, 39] *= np.float32(1.3)
  close(logits[:, :39], arrays["write.logits"][0, :, :39])
  close(logits[2:, 39], arrays["write.logits"][0, 2:, 39])
  close(output.text[:, :-1], arrays["write.embedding"])


def test_words_come_before_the_first_picture():
  system, variables, arrays = golden("fromage_one")
  written = arrays["write.tokens"][0]
  count = int((written == 39).argmax())
  tokens = np.concatenate([[0], arrays["in.tokens"][0, :3]])
  prompt = Prompt(tokens, np.array([0, -1, -1, -1]), arrays["in.image"][:1])
  dialogue = Dialogue(system, variables, arrays["in.image"])
  style = Style(Decoding(12), ret_scale=1.3, min_words=2)
  # The nearest to what is looked for where [RET] stands.
  query = arrays["write.embedding"][0, len(tokens) + count]
  nearest = int((arrays["text.seen"] @ query).argmax())
  assert dialogue.answer(prompt, style) == [
      Said(written[:count].tolist(), nearest)
  ]


def test_pictures_are_shown_once_and_read():
  system, variables, arrays = golden("fromage_four")
  bank = arrays["in.image"]
  # Without a cache: the whole row anew for every token.
  length = 48
  run = jax.jit(system.apply)
  tokens, source = [0] * 4 + arrays["in.tokens"][0, :3].tolist(), [*range(4)]
  source += [-1] * 3
  prompt = Prompt(np.array(tokens), np.array(source), bank[:1])
  images = np.zeros((1, 4, 8, 8, 3), np.float32)
  images[0, 0] = bank[0]
  seen = arrays["text.seen"]
  expected, words, shown = [], [], []
  for _ in range(9):
    pad = length - len(tokens)
    ids = np.array([tokens + [0] * pad])
    rows = np.array([source + [-1] * pad])
    output = run(variables, images, ids, rows)
    logits = np.array(output.logits[0, len(tokens) - 1])
    logits[39] *= 1.3
    chosen = int(logits.argmax())
    tokens.append(chosen)
    source.append(-1)
    if chosen != 39:
      words.append(chosen)
      continue
    ids[0, len(tokens) - 1] = 39
    query = np.array(run(variables, images, ids, rows).text[0, len(tokens) - 1])
    order = (-(seen @ query)).argsort()
    shown.append(int(next(i for i in order if i not in shown)))
    expected.append(Said(words, shown[-1]))
    words = []
    if len(shown) == 3:
      break
    slot = len(shown)
    images[0, slot] = bank[shown[-1]]
    tokens += [0] * 4
    source += range(4 * slot, 4 * slot + 4)
  dialogue = Dialogue(system, variables, bank)
  style = Style(Decoding(9), ret_scale=1.3, max_pictures=3)
  said = dialogue.answer(prompt, style)
  assert said == expected + ([Said(words, None)] if words else [])
  assert len({part.picture for part in said}) == len(said) > 1
  # Nucleus sampling, and no picture at all.
  drawn = dialogue.answer(
      prompt,
      Style(Decoding(6), Sampling(top_p=0.9), max_pictures=0),
      jax.random.key(0),
  )
  assert [part.picture for part in drawn] == [None]
  assert len(drawn[0].tokens) == 6 and 39 not in drawn[0].tokens


def test_bad_dialogues_are_refused():
  system, variables, arrays = golden("fromage_one")
  with pytest.raises(ValueError, match="3 vectors, a bank of 4"):
    Dialogue(
        system, variables, arrays["in.image"], Index(np.ones((3, 10)))
    )
  with pytest.raises(ValueError, match="max_pictures=-1"):
    Style(Decoding(3), max_pictures=-1)
  dialogue = Dialogue(
      system, variables, arrays["in.image"], Index(np.ones((4, 10)))
  )
  prompt = Prompt(np.array([2]), np.array([-1]), np.zeros(0))
  with pytest.raises(ValueError, match="max_pictures=5: the bank has 4"):
    dialogue.answer(prompt, Style(Decoding(3), max_pictures=5))


def test_the_row_of_ret_is_the_only_one_that_is_trained():
  system, variables, arrays = golden("fromage_one")
  batch = rows_of(arrays, system.slots, joined=True)

  def loss(params):
    terms, _ = fromage.ground(system, {"params": params}, batch, CONTEXT)
    return sum(
        terms[key].total / terms[key].weight
        for key in ("caption", "text", "contrastive")
    )

  grads = jax.jit(jax.grad(loss))(variables["params"])
  # Of [RET], the table's own row is neither read nor scored.
  table = np.abs(grads["llm"]["embed"]["embedding"]).sum(axis=1)
  assert table[39] == 0 and (table[:39] > 0).all()
  for path in ("ret_row", "logit_scale", "words", "image_joint", "text_joint"):
    assert all(np.abs(leaf).sum() > 0 for leaf in jax.tree.leaves(grads[path]))


def test_published_sizes():
  # The trained parameters that the paper counts: 5.5 million.
  opt = 32 * (4 * 4096 * 4097 + 2 * 4096 * 16_384 + 16_384 + 5 * 4096)
  opt += 50_267 * 4096 + 2050 * 4096 + 2 * 4096
  clip = 303_179_776
  for name, slots in (("opt6.7b", 1), ("opt6.7b_vis4", 4)):
    trained = 1025 * 4096 * slots + 1025 * 256 + 4097 * 256 + 4096 + 1
    shapes, _ = pretrained.abstract_params(fromage.LAYOUT, build(name))
    assert sum(x.size for x in shapes.values()) == opt + clip + trained
    if slots == 1:
      assert trained == 5_513_729


def test_official_checkpoints_fill_what_is_trained(tmp_path):
  system, variables, _ = golden("fromage_post")
  flat = traverse_util.flatten_dict(variables["params"], sep="/")
  trained = {
      path: leaf
      for path, leaf in flat.items()
      if not path.startswith(("vision/", "llm/"))
  }
  table = fromage_layout.trained_table(system)
  tensors = dict(engine.dump(table, trained))
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = {
      path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
      for path, leaf in flat.items()
  }
  # As the file of the first release has them, and without their wrapper.
  for name in ("model.safetensors", "bare.safetensors"):
    safetensors_file.write(tmp_path / name, tensors, {})
    found = fromage.from_official(system, abstract, path=tmp_path / name)
    assert found.keys() == trained.keys()
    for path, leaf in found.items():
      np.testing.assert_array_equal(leaf, trained[path])
    tensors = {key.removeprefix("model."): x for key, x in tensors.items()}
  with pytest.raises(ValueError, match="ret_input_embeddings"):
    tensors.pop("ret_input_embeddings.weight")
    safetensors_file.write(tmp_path / "less.safetensors", tensors, {})
    fromage.from_official(
        system, abstract, path=tmp_path / "less.safetensors"
    )


def test_configs_that_are_refused():
  hf = pretrained.from_pretrained(GOLDEN / "fromage_one").config
  with pytest.raises(ValueError, match=r"text_emb_layers is \[0, -1\]"):
    fromage.LAYOUT.system(hf | dict(text_emb_layers=[0, -1]), [])
  with pytest.raises(ValueError, match="ret=40: expected an id"):
    system = fromage.LAYOUT.system(hf | dict(retrieval_token_idx=40), [])
    pretrained.abstract_params(fromage.LAYOUT, system)


def test_training_leaves_both_models_as_they_are():
  system, variables, arrays = golden("fromage_one")
  batch = rows_of(arrays, system.slots, joined=False)
  stage = Stage(
      system=system,
      objective=fromage.ground,
      weights=dict(caption=1.0, text=1.0, contrastive=1.0),
      optim=[
          ("(vision|llm)/.*", None),
          (
              ".*",
              optim.adamw(
                  1e-2, clip=1.0, like_rows=dict(ret_row="llm/embed/embedding")
              ),
          ),
      ],
      batch_size=2,
      steps=4,
  )
  mesh = sharding.make_mesh({}, jax.devices()[:1])
  imported = traverse_util.flatten_dict(variables["params"], sep="/")
  init, _ = make_init(stage, batch, mesh, imported)
  state = init(jnp.int32(0), imported)
  assert not any(path.startswith(("vision/", "llm/")) for path in state.live)
  run = jax.jit(functools.partial(train_step, stage))
  losses = []
  for _ in range(4):
    state, metrics = run(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0]
  for path, leaf in state.frozen.items():
    np.testing.assert_array_equal(leaf, imported[path])
  for path, leaf in state.live.items():
    assert (np.asarray(leaf) != np.asarray(imported[path])).any(), path
  rows = np.linalg.norm(imported["llm/embed/embedding"], axis=1)
  assert np.linalg.norm(state.live["ret_row"]) == pytest.approx(
      rows.mean(), rel=1e-5
  )


def test_opt_may_have_rows_behind_those_of_ret():
  size = dict(fromage.SIZES["opt6.7b"]["llm"])
  size |= dict(
      vocab=38, width=20, depth=2, heads=4, mlp=36, length=14,
      position=dict(type="mmjax.nn.position:LearnedPositions", length=14),
  )  # fmt: skip
  node = dict(
      fromage.SIZES["tiny"], type="mmjax.models.fromage:FROMAGe", llm=size
  )
  system = config.build(node, "system")
  mesh = sharding.make_mesh({}, jax.devices()[:1])
  shapes, _ = pretrained.abstract_params(fromage.LAYOUT, system)
  whole = sharding.replicated(mesh)
  abstract = {
      path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)
      for path, leaf in shapes.items()
  }
  table = "llm/embed/embedding"
  found = imports.from_part(
      system, abstract, path=str(GOLDEN / "llm_opt"), target="llm/",
      deeper=table, longer=table,
  )  # fmt: skip
  expected = pretrained.from_pretrained(GOLDEN / "llm_opt").variables
  expected = traverse_util.flatten_dict(expected["params"], sep="/")
  assert found.keys() == {f"llm/{path}" for path in expected}
  for path, leaf in expected.items():
    cut = leaf[:38] if f"llm/{path}" == table else leaf
    np.testing.assert_array_equal(found[f"llm/{path}"], cut)


def test_tinyworld_has_the_token():
  assert subwords.load().special("[RET]") == fromage.SIZES["tiny"]["ret"]
