"""Draws TinyWorld, or learns its vocabularies anew.

`python -m mmjax.data.tinyworld COMMAND FILE`, where COMMAND is

  picture OUT.png        draws the tasks with labels and captions;
  conversations OUT.png  draws those that are asked and told;
  senses OUT.png         draws what is heard and felt;
  vocabulary [OUT.txt]   writes the merges that `ClipTokenizer.tinyworld` reads;
  language [OUT.json]    writes the byte-level BPE that `subwords.load` reads.

The last two write by default where it is read.
"""

import argparse
import pathlib

from mmjax.data import subwords, tokenizers
from mmjax.data.tinyworld import sheet, text, vocabulary

# More ids than TinyWorld's words need; training stops when all are whole.
_VOCABULARY_SIZE = 2048


def main() -> None:
  """Runs the command that the arguments name."""
  parser = argparse.ArgumentParser(
      "mmjax.data.tinyworld",
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  for command in ("picture", "conversations", "senses"):
    commands.add_parser(command).add_argument("path", type=pathlib.Path)
  for command, default in (
      ("vocabulary", tokenizers.tinyworld_merges()),
      ("language", subwords.tinyworld_file()),
  ):
    learned = commands.add_parser(command)
    learned.add_argument(
        "path", type=pathlib.Path, nargs="?", default=default
    )
  arguments = parser.parse_args()
  if arguments.command == "picture":
    sheet.contact_sheet(arguments.path)
  elif arguments.command == "conversations":
    sheet.conversation_sheet(arguments.path)
  elif arguments.command == "senses":
    sheet.senses_sheet(arguments.path)
  elif arguments.command == "language":
    vocabulary.train().save(arguments.path)
  else:
    trained = tokenizers.ClipTokenizer.train(text.corpus(), _VOCABULARY_SIZE)
    tokenizers.write_merges(arguments.path, trained.merges)
  print(arguments.path)


if __name__ == "__main__":
  main()
