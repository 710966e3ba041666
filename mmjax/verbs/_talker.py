"""What does it take to talk with a system? Its words, its pictures, its steps.

A `Talker` joins a system that follows the protocol of `mmjax.evals.answers`
with the formatter that writes its prompts and the transform of its pictures. It
comes from a run, whose config says all of that, or from a directory of Hugging
Face's form.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import inspect
import json
import pathlib
from typing import Any

import jax
import numpy as np
from PIL import Image

from mmjax import config as config_lib
from mmjax import pretrained
from mmjax.data import subwords, templates, transforms
from mmjax.data.sources import limits, media
from mmjax.data.templates import Conversation, Formatter
from mmjax.evals import answers
from mmjax.sampling import autoregressive, processors
from mmjax.sampling.autoregressive import Sampling
from mmjax.sampling.decoding import Decoding
from mmjax.train import checkpoint, loop

# The template of a public checkpoint, where the user names none.
_TEMPLATES = {
    "LlavaForConditionalGeneration": "vicuna",
    "Qwen2ForCausalLM": "chatml",
    "T5ForConditionalGeneration": "t5",
}
# Prompts are padded to a multiple: few lengths are few programs to compile.
_STRIDE = 64
# Tokens that are decoded before they are shown.
_EVERY = 4
_WRITTEN = "mmjax.data.conversations:Written"


@dataclasses.dataclass(frozen=True)
class Words:
  """How prompts are written; None takes what the run or directory says.

  Attributes:
    template: a name in `templates.TEMPLATES`.
    tokenizer: a path for `subwords.load`.
    length: tokens that a prompt may have.
  """

  template: str | None = None
  tokenizer: str | None = None
  length: int | None = None


@dataclasses.dataclass(frozen=True)
class Talker:
  """A system that can be shown pictures and asked.

  Attributes:
    system: see `answers.Writer`.
    variables: of the system.
    formatter: writes the prompts.
    side: of its pictures in pixels; None for a system without.
    transform: (picture, side) -> f32[side, side, 3].
    key: of its pictures in a batch, "image" or "images".
    limits: of picture files.
    mesh: where the variables are; None for one device.
  """

  system: Any
  variables: Any
  formatter: Formatter
  side: int | None
  transform: Callable[[Image.Image, int], np.ndarray]
  key: str
  limits: limits.Limits
  mesh: Any = None

  def look(self, path: str) -> np.ndarray:
    """Reads a picture, f32[side, side, 3].

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is no picture or beyond the limits, or the system reads
        no pictures.
    """
    if self.side is None:
      raise ValueError(
          f"{type(self.system).__name__} reads no pictures; leave {path} out"
      )
    data = pathlib.Path(path).expanduser().read_bytes()
    try:
      return media.picture(data, self.transform, self.side, self.limits)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error

  def say(
      self,
      conversation: Conversation,
      pictures: Sequence[np.ndarray],
      decoding: Decoding,
      sampling: Sampling,
      key: jax.Array,
  ) -> Iterator[str]:
    """The next answer, in pieces as they are written.

    Args:
      conversation: turns, the last of which is the user's; a
        `templates.IMAGE` stands where each picture is shown.
      pictures: of `look`, in order.
      decoding: where to stop, without the ends of the template.
      sampling: how to draw.
      key: a PRNG key.

    Raises:
      ValueError: more or fewer pictures than are named, or a prompt that is too
        long.
    """
    known = processors.Known(self.formatter.tokenizer.vocabulary_size)
    decoding = dataclasses.replace(
        decoding,
        stop=(*decoding.stop, *self.formatter.ends()),
        processors=(*decoding.processors, known),
    )
    batch = self._batch(conversation, pictures)
    shown, ids = "", []
    place = contextlib.nullcontext()
    if self.mesh is not None:
      place = jax.set_mesh(self.mesh)
    with place, self._one_picture(len(pictures)):
      steps = answers.writer(
          self.system, self.variables, batch, decoding.max_new
      )
      for piece in autoregressive.stream(
          **steps._asdict(),
          decoding=decoding,
          sampling=sampling,
          every=min(_EVERY, decoding.max_new),
          key=key,
      ):
        ids += piece.tokens[0, : piece.lengths[0]].tolist()
        # Half a character waits for its other bytes.
        text = self.formatter.read(ids).rstrip("\ufffd")
        yield text[len(shown) :]
        shown = text

  @contextlib.contextmanager
  def _one_picture(self, count: int) -> Iterator[None]:
    """Says in words that a system which reads `image` found `images`."""
    try:
      yield
    except KeyError as error:
      if error.args != ("image",):
        raise
      raise ValueError(
          f"{type(self.system).__name__} reads one picture, and {count} were "
          "shown"
      ) from error

  def _batch(
      self, conversation: Conversation, pictures: Sequence[np.ndarray]
  ) -> dict[str, np.ndarray]:
    """A batch of one prompt."""
    row = self.formatter.prompt(conversation, len(pictures))
    count = np.count_nonzero(row["segment"])
    length = min(-(-count // _STRIDE) * _STRIDE, self.formatter.length)
    batch = {key: value[None, :length] for key, value in row.items()}
    if self.side is not None:
      # Shown to nobody: the programs of a system have pictures.
      blank = np.zeros((self.side, self.side, 3), np.float32)
      stack = np.stack(pictures or [blank])[None]
      if self.key == "image" and len(pictures) <= 1:
        batch["image"] = stack[:, 0]
      else:
        batch["images"] = stack
    return batch


def from_run(
    workdir: str, step: int | None, words: Words, bounds: limits.Limits
) -> Talker:
  """Of a run, with the words and pictures that its config trains with.

  Raises:
    FileNotFoundError: if there is no run.
    ValueError: for a system that does not write, a config without
      conversations, or a tokenizer that is not the checkpoint's.
  """
  folder = checkpoint.run_directory(workdir)
  config = checkpoint.stored_config(folder)
  written = list(_nodes({k: config[k] for k in ("evals", "streams")}))
  if not written:
    raise ValueError(
        f"{folder}: its config has no conversations ({_WRITTEN}) that would "
        "say how prompts are written"
    )
  node = dict(written[0]["formatter"])
  if words.template is not None:
    node["template"] = words.template
  if words.tokenizer is not None:
    node["tokenizer"] = dict(
        type="mmjax.data.subwords:load", path=words.tokenizer
    )
  if words.length is not None:
    node["length"] = words.length
  formatter = config_lib.build(node, "formatter")
  plan, _, variables = loop.restore_run(
      config, folder, step, config["eval_shadow"]
  )
  system = plan.stage.system
  _check(system, formatter.tokenizer, str(folder))
  return Talker(
      system, variables, formatter, _side(system), transforms.vit_image,
      written[0].get("key", "images"), bounds, plan.mesh,
  )  # fmt: skip


def from_directory(
    source: str, words: Words, bounds: limits.Limits
) -> Talker:
  """Of a directory as transformers saves one, tokenizer included.

  Raises:
    FileNotFoundError: if the directory or its tokenizer is not there.
    ValueError: for an architecture that is unknown or does not write, one whose
      template must be named, or a tokenizer that is not the checkpoint's.
  """
  system, variables, config = pretrained.from_pretrained(source)
  (architecture,) = config["architectures"]
  name = words.template or _TEMPLATES.get(architecture)
  if name is None:
    raise ValueError(
        f"{source}: how are prompts for {architecture} written? Name one of "
        f"{', '.join(templates.TEMPLATES)} with --template"
    )
  template = templates.load(name)
  where = words.tokenizer or source
  tokenizer = subwords.load(where)
  _check(system, tokenizer, source)
  lacking = [t for t in template.picture if t not in tokenizer.specials]
  if lacking:
    # Only where pictures stand, and what stands there is not read.
    tokenizer = subwords.load(where, extra=lacking)
  side = _side(system)
  return Talker(
      system,
      variables,
      Formatter(
          tokenizer,
          template if side else dataclasses.replace(template, picture=()),
          words.length or getattr(_writer(system), "length", 2048),
          image_tokens=_image_tokens(system, variables, side),
      ),
      side,
      _transform(pathlib.Path(source) / "preprocessor_config.json"),
      "image" if "image" in inspect.signature(system).parameters else "images",
      bounds,
  )


def _nodes(node: Any) -> Iterator[Mapping[str, Any]]:
  """The parts of a config that say how conversations are written."""
  if isinstance(node, Mapping):
    if node.get("type") == _WRITTEN:
      yield node
    node = node.values()
  if not isinstance(node, str) and hasattr(node, "__iter__"):
    for part in node:
      yield from _nodes(part)


def _writer(system: Any) -> Any:
  """The language model of a system, or the system that is one."""
  return getattr(system, "llm", system)


def _check(system: Any, tokenizer: subwords.Tokenizer, where: str) -> None:
  lacking = [
      name
      for name in ("init_state", "prefill", "reply")
      if not hasattr(system, name)
  ]
  if lacking:
    raise ValueError(
        f"{where}: {type(system).__name__} writes no text: it has no "
        f"{', '.join(lacking)} (see mmjax.evals.answers)"
    )
  subwords.check_vocabulary(tokenizer, _writer(system).vocab, where)


def _side(system: Any) -> int | None:
  """Of the pictures that a system reads."""
  vision = getattr(system, "vision", None)
  return None if vision is None else int(vision.image[0])


def _image_tokens(system: Any, variables: Any, side: int | None) -> int:
  """Rows of features that stand for a picture."""
  if side is None or not hasattr(system, "encode"):
    return 1
  image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
  encode = functools.partial(system.apply, method="encode")
  return jax.eval_shape(encode, variables, image).shape[1]


def _transform(
    path: pathlib.Path,
) -> Callable[[Image.Image, int], np.ndarray]:
  """What a preprocessor_config.json says; CLIP's where there is none."""
  if not path.is_file():
    return transforms.clip_image
  try:
    words = json.loads(path.read_bytes())
    normalise = transforms.Normalisation(
        *(
            tuple(map(float, words.get(key, usual)))
            for key, usual in (
                ("image_mean", transforms.CLIP.mean),
                ("image_std", transforms.CLIP.std),
            )
        )
    )
    crops = words.get("do_center_crop", "crop_size" in words)
  except (ValueError, TypeError, AttributeError) as error:
    raise ValueError(
        f"{path}: expected image_mean and image_std of three numbers: {error}"
    ) from error

  def transform(picture: Image.Image, side: int) -> np.ndarray:
    if crops:
      return normalise(transforms.resize_crop(picture, side))
    squeezed = picture.convert("RGB").resize(
        (side, side), Image.Resampling.BICUBIC
    )
    return normalise(np.asarray(squeezed))

  return transform

