"""The dispatch of `mmjax <verb>`."""

import ast
import importlib.util
import pathlib
import subprocess
import sys

from mmjax import __main__ as command

ROOT = pathlib.Path(__file__).parents[2]


def test_help_lists_every_verb_and_imports_no_jax():
  program = (
      "import sys; from mmjax.__main__ import main; code = main(['--help']); "
      "assert 'jax' not in sys.modules and 'flax' not in sys.modules; "
      "sys.exit(code)"
  )
  done = subprocess.run(
      [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  for verb in command.VERBS:
    assert f"\n  {verb} " in done.stdout


def test_every_verb_has_a_module_with_main():
  for module, _ in command.VERBS.values():
    spec = importlib.util.find_spec(f"mmjax.verbs.{module}")
    assert spec is not None, module
    tree = ast.parse(pathlib.Path(spec.origin).read_text())
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    assert "main" in names, module


def test_unknown_verb_names_the_nearest(capsys):
  assert command.main(["trian"]) == 1
  assert "did you mean 'train'" in capsys.readouterr().err


def test_no_verb_prints_the_usage(capsys):
  assert command.main([]) == 1
  assert "usage: mmjax" in capsys.readouterr().out
