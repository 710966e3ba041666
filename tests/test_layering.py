"""Imports go down only: the floors of the house, read off the source."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent / "mmjax"

# Floor of each module or package; a module imports its own floor's package or
# lower floors. `data` stands apart: it knows `config` only.
FLOORS = {
    "config": 0, "kernels": 0, "perf": 0,
    "sharding": 1,
    "nn": 2,
    "objectives": 3, "weights": 3, "sampling": 3,
    "models": 4,
    "pretrained": 5,
    "evals": 6, "train": 6,
    "verbs": 7,
    "__main__": 8,
}  # fmt: skip
DATA_READERS = {"data", "evals", "train", "verbs"}


def modules():
  for path in sorted(ROOT.rglob("*.py")):
    relative = path.relative_to(ROOT.parent).with_suffix("")
    is_package = path.name == "__init__.py"
    parts = relative.parts[:-1] if is_package else relative.parts
    yield ".".join(parts), path


def imports(path):
  """Absolute names imported anywhere in a file, also inside functions."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      for alias in node.names:
        yield f"{node.module}.{alias.name}"


def internal(name, known):
  """The longest known module that an imported name lies in."""
  while name and name not in known:
    name = name.rpartition(".")[0]
  return name


def graph():
  known = dict(modules())
  return {
      name: {
          target
          for imported in imports(path)
          if (target := internal(imported, known))
      } - {name}
      for name, path in known.items()
  }


def room(name):
  return name.split(".")[1] if "." in name else ""


def test_imports_go_down_only():
  faults = []
  for name, targets in graph().items():
    here = room(name)
    for target in targets:
      there = room(target)
      if not here or there in ("", here):
        continue
      if there == "data":
        fine = here in DATA_READERS
      elif here == "data":
        fine = there == "config"
      else:
        fine = FLOORS[there] < FLOORS[here]
      if not fine:
        faults.append(f"{name} imports {target}")
  assert not faults


def test_there_are_no_cycles():
  edges, done, path = graph(), set(), []

  def visit(name):
    assert name not in path, " -> ".join([*path[path.index(name):], name])
    if name in done:
      return
    path.append(name)
    for target in edges[name]:
      visit(target)
    path.pop()
    done.add(name)

  for name in edges:
    visit(name)
  assert done == set(edges)


def test_the_module_system_stays_behind_one_seam():
  users = {
      room(name)
      for name, path in modules()
      for imported in imports(path)
      if imported.startswith("flax.linen")
  }
  assert users <= {"nn", "models"}


def test_nothing_needs_torch():
  users = {
      name
      for name, path in modules()
      for imported in imports(path)
      if imported.split(".")[0] in ("torch", "transformers", "tensorflow")
  }
  # The other side of the benches, which runs in a process of its own.
  assert all(name.startswith("mmjax.verbs._bench_torch") for name in users)


def test_every_floor_is_known():
  rooms = {room(name) for name, _ in modules()} - {"", "data"}
  assert rooms <= set(FLOORS)
