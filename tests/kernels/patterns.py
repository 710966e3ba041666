"""Every visibility pattern of docs/masks.md, at any length."""

import numpy as np

from mmjax.nn import mask as masks

BATCH = 2


def _documents(rng, length):
  cuts = np.sort(rng.integers(1, length, (BATCH, 3)))
  return (np.arange(length) >= cuts[..., None]).sum(1)


def _scales(length):
  """1, 4, 9, .. tokens a scale, and the rest in the last."""
  squares = [side**2 for side in range(1, 99) if sum(
      x**2 for x in range(1, side + 1)
  ) < length]
  return [*squares, length - sum(squares)]


def _grid(length):
  """Text tokens, rows and columns of an image."""
  side = int((length * 0.8) ** 0.5)
  return length - side * side, side, side


def _q_former(text):
  """A Q-Former's queries, then text; `text` numbers the text tokens' blocks."""
  return lambda rng, length: masks.blocks(
      np.where(np.arange(length) < length // 3, 0, text(length))
  )


# Name -> (rng, length) -> mask of `length` queries.
PATTERNS = {
    "full": lambda rng, n: masks.full(n),
    "causal": lambda rng, n: masks.causal(n),
    "window": lambda rng, n: masks.window(n, n // 7),
    "chunks": lambda rng, n: masks.chunks(n, n // 12),
    "chunks around": lambda rng, n: masks.chunks(n, n // 12, back=2, ahead=1),
    "images": lambda rng, n: masks.blocks(
        np.sort(rng.integers(0, 5, (BATCH, n)))
    ),
    "contrastive": _q_former(lambda n: np.ones(n, int)),
    "grounded": lambda rng, n: masks.prefix(n, n // 3),
    "matching": lambda rng, n: masks.padded(
        masks.full(n), np.arange(n) < np.array([[n], [n // 2]])
    ),
    "prefix": lambda rng, n: masks.prefix(n, np.array([0, n // 3])),
    "groups": lambda rng, n: masks.groups(
        np.sort(rng.integers(0, 9, (BATCH, n)))
    ),
    "scales": lambda rng, n: masks.scales(_scales(n)),
    "rows": lambda rng, n: masks.grid_rows(*_grid(n)),
    "columns": lambda rng, n: masks.grid_columns(*_grid(n)),
    "media": lambda rng, n: masks.media(
        np.sort(rng.integers(-1, 4, (BATCH, n))), 4, n // 4
    ),
    "cached": lambda rng, n: masks.cached(np.array([0, 7]), n, n + 32),
    "noised": lambda rng, n: masks.branches(
        masks.groups(np.repeat([0, 1, 2, 0], [n // 5, n // 4, n // 4,
                                              n - n // 5 - 2 * (n // 4)])),
        np.repeat([0, 1, 0], [n // 5, n // 4, n - n // 5 - n // 4]),
    ),
    "packed": lambda rng, n: masks.packed(masks.causal(n), _documents(rng, n)),
    "padded": lambda rng, n: masks.padded(
        masks.causal(n), np.arange(n) >= np.array([[0], [n // 3]])
    ),
    "empty row": lambda rng, n: masks.padded(
        masks.causal(n), np.arange(n) >= np.array([[0], [n]])
    ),
}
