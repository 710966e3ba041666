"""Asking a system in the terminal: the right words, chats, one clear error."""

import io
import pathlib
import sys

import jax
import numpy as np
from PIL import Image
import pytest

import mmjax
from mmjax import config, verbs
from mmjax.__main__ import main
from mmjax.data import subwords, templates, transforms
from mmjax.models import llava, llm
from mmjax.nn import partitioning
from mmjax.train import loop

ROOT = pathlib.Path(__file__).parents[2]
NEW = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tiny LLaVA with random parameters, its tokenizer, and a picture."""
  folder = tmp_path_factory.mktemp("sample") / "llava"
  size = dict(llava.SIZES["tiny"], type="mmjax.models.llava:LLaVA")
  system = config.build(size, "system")
  image = np.zeros((1, 64, 64, 3), np.float32)
  tokens = np.zeros((1, 2), np.int32)
  init = jax.jit(system.init)(jax.random.key(3), image, tokens, tokens - 1)
  # Far from the first values, or every answer is the same word.
  grown = jax.tree.map(lambda x: 3 * x, partitioning.unbox(init))
  mmjax.save_pretrained(folder, system, grown)
  subwords.load().save(folder / "tokenizer.json")
  pixels = np.random.default_rng(0).integers(0, 256, (80, 64, 3), np.uint8)
  Image.fromarray(pixels).save(folder / "picture.png")
  return folder


def sample(*words):
  return main(["sample", *map(str, words), "--compilation_cache="])


def test_the_answer_is_the_likeliest_text(folder, capsys):
  picture = folder / "picture.png"
  assert not sample(
      "--source", folder, "--image", picture, "--prompt", "what is it?",
      "--max_new", NEW,
  )  # fmt: skip
  found = capsys.readouterr().out
  system, variables, _ = mmjax.from_pretrained(folder)
  formatter = templates.Formatter(
      subwords.load(), "vicuna", 256, image_tokens=64
  )
  row = formatter.prompt([("user", "<image>\nwhat is it?")], 1)
  count = np.count_nonzero(row["segment"])
  image = transforms.clip_image(Image.open(picture), 64)[None]
  run = jax.jit(system.apply)
  tokens = row["tokens"].copy()
  written = []
  for at in range(count, count + NEW):
    logits, _ = run(variables, image, tokens[None], row["source"][None])
    written.append(int(np.argmax(logits[0, at - 1, :758])))
    tokens[at] = written[-1]
  assert found == formatter.read(written) + "\n" and len(found) > 1


def test_a_chat_goes_on_after_mistakes(folder, capsys, monkeypatch):
  picture = folder / "picture.png"
  lines = [
      f"/image {folder / 'nothing.png'}", f"/image {folder / 'config.json'}",
      f"/image {picture}", "what is it?", "and <image> this?", "/picture",
      "and now?", "/reset", "", f"/image {picture}", "what is it?", "/quit",
      "not read",
  ]  # fmt: skip
  monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
  assert not sample("--source", folder, "--chat", "--max_new", NEW)
  out, err = capsys.readouterr()
  first, help_line, second, again = out.strip("\n").split("\n")
  assert help_line == "commands: /image FILE, /reset, /quit"
  assert first == again and first != second
  errors = err.strip().split("\n")
  assert len(errors) == 3 and all(e.startswith("error: ") for e in errors)
  assert "nothing.png" in errors[0] and "config.json" in errors[1]
  assert "2 <image> in the text, but 1 pictures" in errors[2]


@pytest.mark.slow
def test_a_run_is_asked_as_it_was_trained(folder, capsys, tmp_path):
  where = ["--workdir", tmp_path / "run"]
  file = f"{ROOT / 'configs' / 'llava.py'}:stage=finetune"
  loop.begin(verbs.load_config(file), where[1], lambda *unused: {})
  ask = [
      *where, "--image", folder / "picture.png", "--prompt", "<image> what?",
      "--max_new", NEW, "--temperature=1.5", "--top_k=50", "--top_p=0.9",
  ]  # fmt: skip
  capsys.readouterr()
  found = []
  for seed in (0, 0, 1):
    assert not sample(*ask, "--seed", seed)
    found.append(capsys.readouterr().out)
  assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "words,message",
    [
        (["--chat"], "either --workdir or --source"),
        (["--source=x", "--workdir=y", "--chat"], "either --workdir or"),
        (["--source=x"], "give a --prompt, or --chat"),
        (["--source=x", "--chat", "--top_p=0.5"], "need a --temperature"),
        (["--source=x", "--chat", "--step=3"], "it needs --workdir"),
        (["--source=/nothing", "--chat"], "/nothing/config.json: not there"),
        (["--workdir=/nothing", "--chat"], "/nothing"),
    ],
)
def test_flags_that_do_not_fit(words, message, capsys):
  assert sample(*words) == 1
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,message",
    [
        (["--image=picture.png", "--max_pixels=5000"], "5,120 is more than"),
        (["--template=vicunna"], "did you mean 'vicuna'"),
        (["--length=9"], "do not fit length=9|does not fit length=9"),
        (["--prompt=<image>"], "1 <image> in the text, but 0 pictures"),
        (["--tokenizer=nothing.json"], "nothing.json: no such tokenizer"),
        (["--temperature=-1"], "temperature must be 0"),
    ],
)
def test_one_clear_error(folder, words, message, capsys, monkeypatch):
  monkeypatch.chdir(folder)
  assert sample("--source=.", "--prompt=what?", *words) == 1
  (line,) = capsys.readouterr().err.strip().split("\n")
  assert any(part in line for part in message.split("|"))


def language_model(folder, vocab):
  system = config.build(
      dict(llm.SIZES["tiny"], type="mmjax.models.llm:Decoder", vocab=vocab),
      "system",
  )
  init = jax.jit(system.init)(jax.random.key(0), np.zeros((1, 2), np.int32))
  mmjax.save_pretrained(folder, system, partitioning.unbox(init))
  subwords.load().save(folder / "tokenizer.json")


def test_what_a_checkpoint_cannot_do(folder, tmp_path, capsys):
  """Pictures, words of another vocabulary, or an unknown template."""
  language_model(tmp_path / "llm", 1024)
  ask = ["--source", tmp_path / "llm", "--prompt=what?"]
  assert sample(*ask) == 1
  assert "Name one of" in capsys.readouterr().err
  picture = ["--image", folder / "picture.png"]
  assert sample(*ask, *picture, "--template=plain") == 1
  assert "Decoder reads no pictures" in capsys.readouterr().err
  language_model(tmp_path / "small", 40)
  assert sample("--source", tmp_path / "small", *ask[2:]) == 1
  error = capsys.readouterr().err
  assert "template" in error or "an embedding table of 40 rows" in error
  assert sample(
      "--source", tmp_path / "small", *ask[2:], "--template=plain"
  ) == 1
  assert "an embedding table of 40 rows" in capsys.readouterr().err
