"""ImageBind: goldens of the official code, senses, clips, what is compared."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mmjax import config, pretrained
from mmjax.models import imagebind
from mmjax.nn import partitioning
from mmjax.objectives.term import Context
from mmjax.train.imports import _open_foreign
from mmjax.weights import engine

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("imagebind_square", "imagebind_plain", "imagebind_deep")
SENSES = ("image", "tokens", "mel", "depth", "thermal", "imu")
RNG = np.random.default_rng(0)


def close(found, expected, tolerance=1e-5):
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape
  assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_official_code(name):
  system, variables, _ = pretrained.from_pretrained(GOLDEN / name)
  with np.load(GOLDEN / name / "golden.npz") as arrays:
    arrays = dict(arrays)
  given = {key: arrays[f"in.{key}"] for key in (*SENSES, "video")}
  found, trunks = jax.jit(
      lambda variables, given: (
          system.apply(variables, **given),
          {
              key: system.apply(variables, given[key], method=f"encode_{key}")
              for key in ("image", "depth", "thermal", "imu")
          },
      )
  )(variables, given)
  for key in (*SENSES, "video"):
    ours = "text" if key == "tokens" else key
    close(getattr(found, ours), arrays[f"out.{key}"])
  for key, features in trunks.items():
    close(features.tokens, arrays[f"trunk.{key}"])


@pytest.mark.parametrize("name", CASES)
def test_export_is_what_was_read(name, tmp_path):
  system, variables, _ = pretrained.from_pretrained(GOLDEN / name)
  pretrained.save_pretrained(tmp_path / "out", system, variables)
  theirs = load_file(GOLDEN / name / "model.safetensors")
  ours = load_file(tmp_path / "out" / "model.safetensors")
  # The causal mask is a constant of their text tower.
  assert set(theirs) - set(ours) == {"modality_preprocessors.text.mask"}
  for key, value in ours.items():
    np.testing.assert_array_equal(value, theirs[key])
  again, _, _ = pretrained.from_pretrained(tmp_path / "out")
  assert imagebind.LAYOUT.config(again) == imagebind.LAYOUT.config(system)


def test_the_official_file_is_read_by_its_names(tmp_path):
  system, variables, _ = pretrained.from_pretrained(GOLDEN / CASES[0])
  path = GOLDEN / CASES[0] / "model.safetensors"
  _, donor, table, source = _open_foreign(system, path)
  shapes, _ = pretrained.abstract_params(imagebind.LAYOUT, donor)
  found = engine.load(source, table, shapes)
  np.testing.assert_array_equal(
      found["imu/stem/patch/kernel"],
      variables["params"]["imu"]["stem"]["patch"]["kernel"],
  )


def test_the_published_size():
  system = config.build(
      dict(imagebind.SIZES["huge"], type="mmjax.models.imagebind:ImageBind"),
      "system",
  )
  shapes, _ = pretrained.abstract_params(imagebind.LAYOUT, system)
  of = lambda name: sum(
      leaf.size for path, leaf in shapes.items() if path.startswith(name + "/")
  )
  block = lambda d: 12 * d * d + 13 * d
  # Blocks, final norm, projection; then class token, positions and stem.
  body = lambda d, n: n * block(d) + 2 * d + 1024 * d
  assert of("vision") == body(1280, 32) + 1280 * (1 + 257 + 1176 + 2)
  assert of("text") == body(1024, 24) + 1024 * (49408 + 77)
  # One key and one value more in every block, and a norm in the stem.
  sense = lambda d, n, tokens, patch: body(d, n) + d * (
      2 * n + 1 + tokens + patch + 2
  )
  assert of("audio") == sense(768, 12, 229, 256)
  assert of("depth") == sense(384, 12, 197, 256)
  assert of("thermal") == sense(768, 12, 197, 256)
  assert of("imu") == sense(512, 6, 251, 48)
  # The official code's defaults are the published size.
  assert imagebind.LAYOUT.system({}, []).audio == system.audio
  assert imagebind.LAYOUT.system({}, []).vision == system.vision


@pytest.fixture(scope="module")
def tiny():
  system, variables, _ = pretrained.from_pretrained(GOLDEN / CASES[0])
  with np.load(GOLDEN / CASES[0] / "golden.npz") as arrays:
    given = {key: arrays[f"in.{key}"] for key in SENSES}
  return system, variables, given


def test_a_still_picture_is_a_film_of_itself(tiny):
  system, variables, given = tiny
  film = np.repeat(given["image"][:, None], 2, axis=1)
  close(
      system.apply(variables, video=film).video,
      system.apply(variables, given["image"]).image,
  )
  with pytest.raises(ValueError, match="3 frames"):
    system.apply(variables, video=film[:, [0, 0, 1]])


def test_clips_are_averaged_and_temperatures_bounded(tiny):
  system, variables, given = tiny
  mel = given["mel"]
  parts = [system.apply(variables, mel=mel[:, i]).mel for i in range(2)]
  close(system.apply(variables, mel=mel).mel, np.mean(parts, axis=0))
  params = variables["params"]
  length = np.linalg.norm(parts[0], axis=-1)
  np.testing.assert_allclose(length, np.exp(params["audio_scale"]), rtol=1e-5)
  hot = {"params": params | {"audio_scale": jnp.float32(9.0)}}
  length = np.linalg.norm(system.apply(hot, mel=mel[:, 0]).mel, axis=-1)
  np.testing.assert_allclose(length, imagebind.MAX_SCALE, rtol=1e-5)


def test_only_pictures_are_compared_with_other_senses(tiny):
  """The loss is the sum of InfoNCE over (picture, sense), in float64."""
  system, variables, given = tiny
  given = given | {"mel": given["mel"][:, 0]}
  twice = {key: np.concatenate([x, x]) for key, x in given.items()}
  batch = {
      key: np.float32(x + RNG.normal(size=x.shape))
      for key, x in twice.items()
      if key != "tokens"
  }
  context = Context(jnp.int32(0), jax.random.key(0), None)
  # Without drop path: the towers as they are at the end.
  quiet = system.clone(
      audio=system.audio.clone(drop_path=0.0),
      imu=system.imu.clone(drop_path=0.0, dropout=0.0),
  )
  terms, mutables = jax.jit(functools.partial(imagebind.bind, quiet))(
      variables, batch, context
  )
  assert mutables == {}
  found = jax.jit(system.apply)(variables, **batch)
  for name in imagebind.BOUND:
    logits = np.float64(found.image) @ np.float64(getattr(found, name)).T
    loss = 0.0
    for scores in (logits, logits.T):
      own = np.exp(np.diag(scores)) / np.exp(scores).sum(axis=1)
      loss -= 0.5 * np.log(own).mean()
    term = terms[name]
    assert float(term.total / term.weight) == pytest.approx(loss, rel=1e-5)
  # There was no text.
  assert set(imagebind.bind.needs) == {"image", *imagebind.BOUND}


def test_paths_are_dropped_only_while_training(tiny):
  system, variables, given = tiny
  audio = system.audio.clone(drop_path=0.9)
  apply = lambda **kwargs: audio.apply(
      {"params": variables["params"]["audio"]},
      jnp.asarray(given["mel"][:, 0].swapaxes(1, 2)[..., None]),
      **kwargs,
  ).embed
  np.testing.assert_array_equal(apply(), apply())
  dropped = apply(rngs={"dropout": jax.random.key(0)})
  assert not np.allclose(dropped, apply(), atol=1e-3)


def test_first_parameters_are_the_official_ones():
  size = dict(imagebind.SIZES["tiny"], type="mmjax.models.imagebind:ImageBind")
  system = config.build(size, "system")
  inputs = {
      name: jnp.zeros(imagebind.LAYOUT.inputs(system)[name].shape, jnp.float32)
      for name in ("image", "mel")
  }
  params = partitioning.unbox(
      jax.jit(lambda key: system.init(key, **inputs))(jax.random.key(0))
  )["params"]
  for name, scale in imagebind.SCALES.items():
    assert np.exp(params[f"{name}_scale"]) == pytest.approx(scale, rel=1e-5)
  audio = params["audio"]
  assert np.std(audio["position"]["table"]) == pytest.approx(96**-0.5, rel=0.1)
  # Xavier for most; for queries, keys and values as one; PyTorch's for CLIP's.
  for tower, up in ((audio, 2 / (5 * 96)), (params["vision"], 1 / (3 * 96))):
    blocks = tower["blocks"]
    assert np.std(blocks["mlp"]["up"]["kernel"]) == pytest.approx(
        up**0.5, rel=0.1
    )
    assert np.std(blocks["attention"]["query"]["kernel"]) == pytest.approx(
        (2 / (4 * 96)) ** 0.5, rel=0.1
    )
  assert not np.any(audio["blocks"]["attention"]["query"]["bias"])


def test_configs_that_are_refused():
  with pytest.raises(ValueError, match="2 frames"):
    imagebind.LAYOUT.system({"kernel_size": [4, 14, 14]}, [])
  with pytest.raises(ValueError, match="multiple of the patch of 8"):
    imagebind.SignalStem(8, 1e-5).init(
        jax.random.key(0), jnp.zeros((1, 12, 6)), 4
    )
