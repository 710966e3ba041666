"""Flamingo: goldens of OpenFlamingo, who sees which picture, memory, groups."""

import functools
from pathlib import Path

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config, pretrained
from mmjax.models import flamingo
from mmjax.nn import mask as masks
from mmjax.nn import partitioning
from mmjax.objectives.term import Context
from mmjax.sampling import autoregressive, beam
from mmjax.sampling.decoding import Decoding
from mmjax.weights import safetensors_file
from mmjax.weights.source import open_source

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("flamingo_both", "flamingo_newer", "flamingo_older")
END = 38


def close(found, expected, tolerance=1e-5):
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape
  assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@functools.cache
def golden(name):
  system, variables, _ = pretrained.from_pretrained(GOLDEN / name)
  with np.load(GOLDEN / name / "golden.npz") as arrays:
    arrays = dict(arrays)
  inputs = [arrays[f"in.{key}"] for key in ("images", "tokens", "media")]
  return system, variables, inputs, arrays


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_open_flamingo(name):
  system, variables, inputs, arrays = golden(name)
  encode = lambda v, x: system.apply(v, x, method="encode")
  close(jax.jit(encode)(variables, inputs[0]), arrays["out.resampled"])
  logits, state = jax.jit(system.apply)(variables, *inputs)
  close(logits, arrays["out.logits"])
  assert state is None


@pytest.mark.parametrize("name", CASES)
def test_export_is_read_back(name, tmp_path):
  system, variables, _, _ = golden(name)
  pretrained.save_pretrained(tmp_path / "out", system, variables)
  again, restored, written = pretrained.from_pretrained(tmp_path / "out")
  assert flamingo.LAYOUT.config(again).items() <= written.items()
  jax.tree.map(np.testing.assert_array_equal, restored, variables)


def steps(system, variables, images, media):
  def prefill(variables, images, media, tokens, valid, state):
    logits, state = system.apply(
        variables, images, tokens, media, state=state, count=valid
    )
    return logits, state

  def step(variables, tokens, valid, state):
    return system.apply(variables, tokens, state, valid, method="reply")

  return (
      jax.tree_util.Partial(step, variables),
      jax.tree_util.Partial(prefill, variables, images, media),
  )


@pytest.mark.parametrize("name", CASES)
def test_greedy_is_that_of_open_flamingo(name):
  system, variables, (images, tokens, media), arrays = golden(name)
  step, prefill = steps(system, variables, images, media)
  new = arrays["out.greedy"].shape[1]
  found, _ = autoregressive.generate(
      step,
      system.init_state(2, tokens.shape[1] + new),
      tokens,
      arrays["in.count"],
      Decoding(max_new=new, eos=(END,), pad=-1),
      prefill=prefill,
  )
  np.testing.assert_array_equal(found.tokens, arrays["out.greedy"])


def test_a_beam_of_one_is_greedy():
  system, variables, (images, tokens, media), arrays = golden(CASES[0])
  step, prefill = steps(system, variables, images, media)
  new = arrays["out.greedy"].shape[1]
  found = beam.beam_search(
      step,
      flamingo.reordered,
      system.init_state(2, tokens.shape[1] + new),
      tokens,
      arrays["in.count"],
      Decoding(max_new=new, eos=(END,), pad=-1),
      beam.Beam(1),
      prefill=prefill,
  )
  np.testing.assert_array_equal(found.tokens[:, 0], arrays["out.greedy"])


@functools.cache
def drawn(depth=5, every=2, first=0, gate=0.0, **changes):
  """A small system, its first parameters and others, and inputs."""
  size = dict(flamingo.SIZES["tiny"], type="mmjax.models.flamingo:Flamingo")
  size["vision"] = dict(size["vision"], image=(16, 16), depth=1)
  size["llm"] = dict(size["llm"], depth=depth, vocab=50)
  size |= dict(every=every, first=first, gate=gate, **changes)
  system = config.build(size, "system")
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, 3, 16, 16, 3)).astype(np.float32)
  tokens = rng.integers(1, 50, (2, 12)).astype(np.int32)
  media = np.repeat([[-1, 0, 1, 2], [0, 0, 2, 2]], 3, axis=1).astype(np.int32)
  variables = partitioning.unbox(
      jax.jit(system.init)(jax.random.key(0), images, tokens, media)
  )
  noise = lambda x: np.float32(x + 0.2 * rng.normal(size=x.shape))
  moved = jax.tree.map(noise, variables)
  return system, variables, moved, images, tokens, media


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_new_gates_leave_the_decoder_as_it_is(gate):
  system, fresh, _, images, tokens, media = drawn(gate=gate)
  assert float(fresh["params"]["gates"]["attention_gate"][0]) == gate
  logits, _ = jax.jit(system.apply)(fresh, images, tokens, media)
  llm = {"params": fresh["params"]["llm"]}
  alone, _ = jax.jit(system.llm.apply)(llm, tokens)
  np.testing.assert_allclose(logits, alone, atol=1e-5)


def layer(stack, number):
  return jax.tree.map(lambda x: x[number], stack)


@pytest.mark.parametrize(
    "depth,every,first",
    [
        (7, 3, 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((5, 2, 0), (5, 2, 1), (3, 1, 0), (2, 4, 1))
        ),
    ],
)
def test_groups_are_layers_one_after_the_other(depth, every, first):
  """Against each layer applied by itself, in the order of the paper."""
  system, _, variables, images, tokens, media = drawn(depth, every, first)
  hidden = jax.jit(functools.partial(system.apply, method="hidden_states"))
  found, _ = hidden(variables, images, tokens, media)
  gated = list(range(first, depth, every))
  assert system.gated == len(gated)

  @jax.jit
  def expected(variables, images, tokens, media):
    params = variables["params"]
    bound = system.bind(variables)
    pictures = bound.encode(images).reshape(2, -1, 96)
    seeing = masks.media(media, 3, system.resampler.latents)
    x, mask, rotation = bound.llm.enter(tokens)
    gate = flamingo.GatedCrossBlock(**bound._parts, parent=None)
    for number in range(depth):
      if number in gated:
        mine = layer(params["gates"], gated.index(number))
        x, _ = gate.apply({"params": mine}, x, seeing, pictures)
      mine = layer(params["llm"]["blocks"], number)
      (x, _), _ = bound.llm.block.apply(
          {"params": mine}, (x, None), number, mask, rotation
      )
    return bound.llm.norm(x)

  np.testing.assert_allclose(
      found, expected(variables, images, tokens, media), atol=2e-4
  )


def test_each_token_sees_its_picture_and_no_other():
  system, _, variables, images, tokens, media = drawn(depth=1, every=1)
  run = jax.jit(system.apply)
  whole, _ = run(variables, images, tokens, media)
  for number in range(3):
    other = images.copy()
    other[:, number] = 1.0
    changed, _ = run(variables, other, tokens, media)
    moved = np.abs(changed - whole).max(axis=-1) > 1e-4
    # One block: what it reads moves on to later tokens only with the next one.
    np.testing.assert_array_equal(moved | (media != number), np.ones((2, 12)))
    before = np.cumsum(media == number, axis=1) == 0
    assert not moved[before].any()


def test_a_dialogue_goes_on_from_its_state():
  system, _, variables, images, tokens, media = drawn()
  whole, _ = jax.jit(system.apply)(variables, images, tokens, media)
  count = np.array([9, 10], np.int32)
  state = system.init_state(2, 16)
  prompt, state = jax.jit(system.apply)(
      variables, images, tokens, media, state=state, count=count
  )
  np.testing.assert_allclose(prompt[:, :9], whole[:, :9], atol=2e-4)
  np.testing.assert_array_equal(state.media, media[np.arange(2), count - 1])
  reply = jax.jit(lambda *args: system.apply(variables, *args, method="reply"))
  # The text goes on behind the picture that its row saw last.
  media = media.copy()
  media[0, 9:] = media[0, 8]
  whole, _ = jax.jit(system.apply)(variables, images, tokens, media)
  for step in range(2):
    at = count + step
    logits, state = reply(tokens[np.arange(2), at][:, None], state)
    np.testing.assert_allclose(
        logits[:, 0], whole[np.arange(2), at], atol=2e-4
    )


def test_videos_are_read_frame_by_frame():
  system, _, variables, images, _, _ = drawn()
  encode = jax.jit(lambda x: system.apply(variables, x, method="encode"))
  video = np.stack([images, images[:, ::-1]], axis=2)
  found = encode(video)
  assert found.shape == (2, 3, 4, 96)
  # Times are learned: the order of frames matters.
  assert np.abs(encode(video[:, :, ::-1]) - found).max() > 1e-3
  np.testing.assert_allclose(
      encode(images), encode(images[:, :, None]), atol=1e-5
  )


def test_losses_of_data_sets_apart():
  system, _, variables, images, tokens, media = drawn()
  rng = np.random.default_rng(1)
  batch = dict(
      images=images,
      tokens=tokens,
      media=media,
      weight=rng.random((2, 12)).astype(np.float32),
      segment=np.repeat([[1, 1, 2, 2], [1, 1, 1, 0]], 3, 1).astype(np.int32),
      position=np.tile(np.r_[:6, :6], (2, 1)).astype(np.int32),
      kind=np.array([1, 0], np.int32),
  )
  context = Context(jnp.int32(0), jax.random.key(0), None)
  sets = "web", "pairs", "film"
  terms, mutables = jax.jit(
      functools.partial(flamingo.next_token, system, sets=sets)
  )(variables, batch, context)
  assert mutables == {} and float(terms["next_token_film"].weight) == 0
  # The first row as two documents, each by itself.
  total, weight = 0.0, 0.0
  for part in (slice(0, 6), slice(6, 12)):
    logits, _ = jax.jit(system.apply)(
        variables, images[:1], tokens[:1, part], media[:1, part]
    )
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits[:, :-1]), tokens[:1, part][:, 1:, None], -1
    )[..., 0]
    counts = batch["weight"][:1, part][:, 1:]
    total, weight = total - (chosen * counts).sum(), weight + counts.sum()
  assert float(terms["next_token_pairs"].weight) == pytest.approx(weight)
  assert float(terms["next_token_pairs"].total) == pytest.approx(
      float(total), rel=1e-4
  )


def test_gradients_reach_the_new_parts_alone_when_gates_open():
  system, fresh, variables, images, tokens, media = drawn()

  def loss(params):
    logits, _ = system.apply({"params": params}, images, tokens, media)
    return jnp.square(logits).mean()

  gradient = jax.jit(jax.grad(loss))
  grads = gradient(fresh["params"])
  # A shut gate learns to open before what is behind it learns.
  assert float(jnp.abs(grads["gates"]["attention_gate"]).min()) > 0
  assert float(jnp.abs(grads["resampler"]["latents"]).max()) == 0
  grads = gradient(variables["params"])
  assert float(jnp.abs(grads["resampler"]["latents"]).max()) > 0


def test_what_stands_behind_an_open_gate_learns_at_once():
  system, fresh, _, images, tokens, media = drawn(gate=1.0)

  def loss(params):
    logits, _ = system.apply({"params": params}, images, tokens, media)
    return jnp.square(logits).mean()

  grads = jax.jit(jax.grad(loss))(fresh["params"])["gates"]
  assert float(jnp.abs(grads["attention"]["out"]["kernel"]).max()) > 0
  assert float(jnp.abs(grads["mlp"]["down"]["kernel"]).max()) > 0
  assert float(jnp.abs(grads["attention_gate"]).max()) == 0


def test_published_sizes():
  def count(name, prefix):
    size = dict(flamingo.SIZES[name], type="mmjax.models.flamingo:Flamingo")
    system = config.build(size, "system")
    shapes, _ = pretrained.abstract_params(flamingo.LAYOUT, system)
    assert len(shapes) > 40
    return sum(x.size for p, x in shapes.items() if p.startswith(prefix))

  # Query and output, key and value, MLP, two norms, two gates.
  gate = lambda width, inner, seen: (
      2 * width * inner + 2 * seen * inner + 8 * width**2 + 4 * width + 2
  )
  assert count("3b", "gates/") == 24 * gate(2048, 2048, 1536)
  assert count("9b", "gates/") == 10 * gate(4096, 4096, 1536)
  assert count("80b", "gates/") == 12 * gate(8192, 8192, 1536)
  assert count("open_9b", "gates/") == 8 * gate(4096, 512, 1024)
  layer = 12 * 1536**2 + 6 * 1536
  assert count("3b", "resampler/") == 6 * layer + (64 + 8 + 2) * 1536
  # NFNet-F6 has 435M.
  assert count("3b", "vision/") == pytest.approx(435e6, rel=0.03)


def test_places_that_are_refused():
  with pytest.raises(ValueError, match="first=2: expected 0 to 1"):
    drawn(first=2)
  with pytest.raises(ValueError, match="select"):
    drawn(select="cls")
  system, _, variables, images, tokens, _ = drawn()
  with pytest.raises(AssertionError):
    system.apply(variables, images, tokens, tokens[:, :-1])


@pytest.mark.parametrize("words", [True, False])
def test_released_files_hold_what_was_trained(words, tmp_path):
  """Resampler and gated blocks, and the table of tokens or not."""
  system, variables, _, _ = golden("flamingo_newer")
  source = open_source(GOLDEN / "flamingo_newer")
  parts = ("perceiver", "gated_cross_attn", "embed_tokens")[: 2 + words]
  kept = {
      name: source.read(name)
      for name in source.tensors
      if any(part in name for part in parts)
  }
  safetensors_file.write(tmp_path / "trained.safetensors", kept)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  flat = traverse_util.flatten_dict(variables["params"], sep="/")
  abstract = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
      for name, x in flat.items()
  }
  found = flamingo.from_official(
      system, abstract, path=tmp_path / "trained.safetensors"
  )
  assert {name.split("/")[0] for name in found} == (
      {"resampler", "gates", "llm"} if words else {"resampler", "gates"}
  )
  for name, array in found.items():
    np.testing.assert_array_equal(array, flat[name])
