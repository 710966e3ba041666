"""mmjax sample (--workdir DIR | --source DIR) [--image FILE ...] --prompt TEXT
mmjax sample (--workdir DIR | --source DIR) [--image FILE ...] --chat

Writes an answer to the terminal, token by token. The system is that of a run
(--workdir), or of a directory as transformers saves one, tokenizer included
(--source). It may be any that follows the protocol of mmjax.evals.answers:
LLaVA, BLIP-2, Flamingo, FROMAGe, the language models and T5.

Each --image is shown before the prompt, or where the prompt says <image>. With
--chat, lines from the terminal are answered in turn; --prompt is the first. In
a chat:
  /image FILE   shows a picture with the next line
  /reset        begins anew, without the pictures
  /quit         ends, as the end of the input does

Answers are greedy; --temperature above 0 draws them, and --top_k, --top_p and
--seed say how. Pictures of a run are squeezed to its size, with pixels in
[-1, 1]; those of a directory follow its preprocessor_config.json, or CLIP.
"""

from collections.abc import Sequence
import itertools
import sys
from typing import Any

from absl import flags

from mmjax import verbs

_IMAGE = "<image>"


def main(argv: Sequence[str]) -> int:
  """Runs the verb; see `mmjax.verbs` for the exit codes."""
  return verbs.run(__doc__, argv, _define, _sample)


def _define(values: flags.FlagValues, argv: Sequence[str]) -> None:
  del argv
  text = lambda name, default, words: flags.DEFINE_string(
      name, default, words, flag_values=values
  )
  number = lambda name, default, words, **bounds: flags.DEFINE_integer(
      name, default, words, flag_values=values, **bounds
  )
  text("workdir", None, "directory of a run")
  number("step", None, "step of the run's checkpoint; the newest by default")
  text("source", None, "directory as transformers saves one")
  flags.DEFINE_multi_string(
      "image", [], "picture to show; may be given again", flag_values=values
  )
  text("prompt", None, "what is said first")
  flags.DEFINE_boolean(
      "chat", False, "go on with lines from the terminal", flag_values=values
  )
  text("system", None, "what the system is told before all else")
  text("template", None, "how prompts are written, as vicuna or chatml")
  text("tokenizer", None, "tokenizer.json, .model or a directory with one")
  number("length", None, "tokens that a prompt may have", lower_bound=1)
  number("max_new", 128, "tokens that an answer may have", lower_bound=1)
  flags.DEFINE_float(
      "temperature", 0.0, "0 for the likeliest token", flag_values=values
  )
  number("top_k", None, "tokens to draw from")
  flags.DEFINE_float(
      "top_p", 1.0, "probability to draw from", flag_values=values
  )
  number("seed", 0, "of the draws")
  number(
      "max_pixels", 64_000_000, "of a picture file", lower_bound=1
  )
  verbs.define_runtime(values)


def _sample(values: flags.FlagValues) -> int:
  _check(values)
  verbs.start_runtime(values)
  from mmjax.data.sources.limits import Limits  # Behind the set-up of JAX.
  from mmjax.sampling.autoregressive import Sampling
  from mmjax.sampling.decoding import Decoding
  from mmjax.verbs import _talker

  sampling = Sampling(values.temperature, values.top_k, values.top_p)
  decoding = Decoding(values.max_new)
  words = _talker.Words(values.template, values.tokenizer, values.length)
  bounds = Limits(pixels=values.max_pixels)
  if values.workdir is not None:
    talker = _talker.from_run(values.workdir, values.step, words, bounds)
  else:
    talker = _talker.from_directory(values.source, words, bounds)
  chat = Chat(talker, decoding, sampling, values.seed, values.system)
  for path in values.image:
    chat.show(path)
  if values.prompt is not None:
    chat.ask(values.prompt)
  if values.chat:
    _converse(chat)
  return verbs.DONE


def _check(values: flags.FlagValues) -> None:
  """Refuses flags that do not go together, before anything is read."""
  faults = []
  if (values.workdir is None) == (values.source is None):
    faults.append("give either --workdir or --source")
  if values.step is not None and values.workdir is None:
    faults.append("--step is of a run: it needs --workdir")
  if values.prompt is None and not values.chat:
    faults.append("give a --prompt, or --chat")
  if not values.temperature and (values.top_k or values.top_p < 1):
    faults.append("--top_k and --top_p need a --temperature above 0")
  if faults:
    raise ValueError("; ".join(faults))


class Chat:
  """A conversation that grows, with its pictures."""

  def __init__(
      self,
      talker: Any,
      decoding: Any,
      sampling: Any,
      seed: int,
      system: str | None,
  ) -> None:
    """Begins with nothing said.

    Args:
      talker: a `_talker.Talker`.
      decoding: where an answer stops.
      sampling: how it is drawn.
      seed: of the draws.
      system: the text of a first turn of the system's.
    """
    self._talker = talker
    self._decoding, self._sampling = decoding, sampling
    self._seed = seed
    self._system = system
    self._answers = itertools.count()
    self.reset()

  def reset(self) -> None:
    """Forgets what was said and shown."""
    self._turns = [] if self._system is None else [("system", self._system)]
    self._pictures: list[Any] = []
    self._new: list[Any] = []

  def show(self, path: str) -> None:
    """Reads a picture, which stands before the next question."""
    self._new.append(self._talker.look(path))

  def ask(self, text: str) -> str:
    """Writes the answer to the terminal as it comes, and returns it.

    What cannot be asked leaves the conversation as it was.
    """
    import jax

    # A picture that the text has no place for stands before it.
    missing = len(self._new) - text.count(_IMAGE)
    asked = ("user", f"{_IMAGE}\n" * missing + text)
    key = jax.random.fold_in(
        jax.random.key(self._seed), next(self._answers)
    )
    written = ""
    for piece in self._talker.say(
        [*self._turns, asked],
        [*self._pictures, *self._new],
        self._decoding,
        self._sampling,
        key,
    ):
      print(piece, end="", flush=True)
      written += piece
    print()
    self._turns += [asked, ("assistant", written)]
    self._pictures += self._new
    self._new = []
    return written


def _converse(chat: Chat) -> None:
  """Answers lines until there are no more."""
  # A prompt sign is for people alone.
  sign = "> " if sys.stdin.isatty() else ""
  while True:
    try:
      line = input(sign).strip()
    except (EOFError, KeyboardInterrupt):
      return
    command, _, rest = line.partition(" ")
    try:
      if command == "/quit":
        return
      if command == "/reset":
        chat.reset()
      elif command == "/image":
        chat.show(rest.strip())
      elif command.startswith("/"):
        print("commands: /image FILE, /reset, /quit")
      elif line:
        chat.ask(line)
    except (ValueError, OSError) as error:
      print(f"error: {error}", file=sys.stderr)
