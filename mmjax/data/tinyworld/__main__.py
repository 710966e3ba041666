"""Draws TinyWorld, or learns its vocabulary anew.

`python -m mmjax.data.tinyworld picture OUT.png` draws examples of every task;
`python -m mmjax.data.tinyworld vocabulary [OUT.txt]` writes the merges that
`ClipTokenizer.tinyworld` reads (by default where it reads them).
"""

import argparse
import pathlib

from mmjax.data import tokenizers
from mmjax.data.tinyworld import sheet, text

# More ids than TinyWorld's words need; training stops when all are whole.
_VOCABULARY_SIZE = 2048


def main() -> None:
  """Runs the command that the arguments name."""
  parser = argparse.ArgumentParser("mmjax.data.tinyworld", description=__doc__)
  commands = parser.add_subparsers(dest="command", required=True)
  picture = commands.add_parser("picture")
  picture.add_argument("path", type=pathlib.Path)
  vocabulary = commands.add_parser("vocabulary")
  vocabulary.add_argument(
      "path",
      type=pathlib.Path,
      nargs="?",
      default=tokenizers.tinyworld_merges(),
  )
  arguments = parser.parse_args()
  if arguments.command == "picture":
    sheet.contact_sheet(arguments.path)
  else:
    trained = tokenizers.ClipTokenizer.train(text.corpus(), _VOCABULARY_SIZE)
    tokenizers.write_merges(arguments.path, trained.merges)
  print(arguments.path)


if __name__ == "__main__":
  main()
