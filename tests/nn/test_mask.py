"""Every mask against who sees whom in the words of the papers, pair by pair."""

import functools
import importlib.util
import pathlib

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from mmjax.kernels import intervals
from mmjax.nn import mask as masks

DOCS = pathlib.Path(__file__).parents[2] / "docs"
LAST = masks.LAST


def seen(sees, batch, queries, keys):
  """bool[B, Q, K] of a definition `sees(row of the batch, query, key)`."""
  return np.array([
      [[bool(sees(b, q, k)) for k in range(keys)] for q in range(queries)]
      for b in range(batch)
  ])


# Each case gives a mask and bool[B, Q, K], who sees whom by definition. The
# cases are called once; see CASES.


def full(queries, keys):
  # "Each position attends to all positions" (Vaswani et al. 2017, 3.2.3).
  mask = masks.full(queries, keys)
  return mask, seen(lambda b, q, k: True, 1, queries, keys)


def causal(length):
  # Leftward positions and itself (Vaswani et al. 2017, 3.2.3).
  return masks.causal(length), seen(lambda b, q, k: k <= q, 1, length, length)


def window(length, size):
  # Mimi, Moshi (Défossez et al. 2024): causal, with a context of `size` steps;
  # the current one counts.
  def sees(b, q, k):
    return k in range(q - size + 1, q + 1)

  return masks.window(length, size), seen(sees, 1, length, length)


def prefix(length, lengths):
  # PaliGemma (Beyer et al. 2024, figure 2): image and prompt see each other
  # fully; the suffix sees them and, of itself, what came before.
  def sees(b, q, k):
    in_prefix = k < lengths[b]
    return in_prefix if q < lengths[b] else in_prefix or k <= q

  mask = masks.prefix(length, np.array(lengths))
  return mask, seen(sees, len(lengths), length, length)


def scales(sides):
  # VAR (Tian et al. 2024, section 3.2): the token map r_k sees r_1 .. r_k.
  scale = [s for s, side in enumerate(sides) for _ in range(side * side)]
  mask = masks.scales([side * side for side in sides])
  n = len(scale)
  return mask, seen(lambda b, q, k: scale[k] <= scale[q], 1, n, n)


def contrastive(queries, text):
  # Q-Former, image-text contrast (Li et al. 2023, 3.1): queries and text are
  # not allowed to see each other.
  modality = ["query"] * queries + ["text"] * text
  mask = masks.blocks(np.repeat([0, 1], [queries, text]))
  n = queries + text
  return mask, seen(lambda b, q, k: modality[q] == modality[k], 1, n, n)


def captioning(queries, texts):
  # Q-Former, image-grounded generation (Li et al. 2023, 3.1): queries see each
  # other but not the text; a text token sees all queries and its previous text
  # tokens. The texts of a batch have lengths of their own.
  n = queries + max(texts)

  def sees(b, q, k):
    if k < queries:
      return True
    return queries <= q and k <= q and k - queries < texts[b]

  valid = np.arange(n) < queries + np.array(texts)[:, None]
  mask = masks.padded(masks.prefix(n, queries), valid)
  return mask, seen(sees, len(texts), n, n)


def matching(queries, texts):
  # Q-Former, image-text matching (Li et al. 2023, 3.1): all queries and texts
  # see each other; padding is no text.
  n = queries + max(texts)
  valid = np.arange(n) < queries + np.array(texts)[:, None]
  mask = masks.padded(masks.full(n), valid)
  return mask, seen(lambda b, q, k: k < queries + texts[b], len(texts), n, n)


def dalle_rows(text, height, width):
  # DALL-E (Ramesh et al. 2021, figure 11a): text is causal, an image token sees
  # all text and the previous width + 1 tokens in raster order, itself the first
  # of them; the last one is in the same column of the previous row.
  def sees(b, q, k):
    if q < text:
      return k <= q
    if k < text:
      return True
    r, c = divmod(q - text, width)
    row, column = divmod(k - text, width)
    same_row = row == r and column <= c
    return same_row or (row == r - 1 and column >= c)

  n = text + height * width
  return masks.grid_rows(text, height, width), seen(sees, 1, n, n)


def dalle_columns(text, height, width):
  # DALL-E (Ramesh et al. 2021, figure 11): an image token sees all text and its
  # own column down to itself; rows and columns are transposed in memory.
  def sees(b, q, k):
    if q < text:
      return k <= q
    if k < text:
      return True
    c, r = divmod(q - text, height)
    column, row = divmod(k - text, height)
    return column == c and row <= r

  n = text + height * width
  return masks.grid_columns(text, height, width), seen(sees, 1, n, n)


def flamingo(length, count, latents, tags, upcoming=False):
  # Flamingo (Alayrac et al. 2022, 2.3): a text token sees the tokens of the
  # image that appeared just before it, and nothing if there is none. In
  # training the image may also be the next one (appendix A.3.2).
  def image(b, q):
    places = sorted(tags[b])
    if upcoming:
      after = [i for i, place in enumerate(places) if place > q]
      return after[0] if after else None
    before = [i for i, place in enumerate(places) if place <= q]
    return before[-1] if before else None

  tag = np.array([[i in row for i in range(length)] for row in tags])
  index = np.cumsum(tag, axis=1) - 1
  if upcoming:
    following = index + 1
    index = np.where(following < tag.sum(axis=1)[:, None], following, count)
  mask = masks.media(index, count, latents)
  sees = lambda b, q, k: image(b, q) == k // latents
  return mask, seen(sees, len(tags), length, count * latents)


def navit(rows, length):
  # NaViT (Dehghani et al. 2023, 2.1): patches of different images that share a
  # sequence do not attend to each other; the rest of it is padding.
  image = [
      [i for i, n in enumerate(row) for _ in range(n)] for row in rows
  ]
  image = [row + [-1] * (length - len(row)) for row in image]
  mask = masks.packed(masks.full(length), np.array(image))
  mask = masks.padded(mask, np.array(image) >= 0)
  sees = lambda b, q, k: image[b][q] == image[b][k] >= 0
  return mask, seen(sees, len(rows), length, length)


def windows(frames, height, width, side, by_window):
  # Qwen2.5-VL (Bai et al. 2025, 2.1.1): attention within windows of side x side
  # cells of a frame; those at the border are smaller, not padded. The order of
  # the cells does not matter; sorted by window, tiles are skipped.
  cells = [
      (t, r, c)
      for t in range(frames) for r in range(height) for c in range(width)
  ]
  of = {cell: (cell[0], cell[1] // side, cell[2] // side) for cell in cells}
  number = {name: i for i, name in enumerate(sorted(set(of.values())))}
  if by_window:
    cells.sort(key=of.get)
  mask = masks.blocks(np.array([number[of[cell]] for cell in cells]))
  n = len(cells)
  return mask, seen(lambda b, q, k: of[cells[q]] == of[cells[k]], 1, n, n)


def chunks(length, size, back, ahead):
  # Qwen2.5-Omni (Xu et al. 2025, 2.4): blocks of 2 s that are attended within
  # (back = ahead = 0); in the DiT, the block, two before it and one after it.
  def sees(b, q, k):
    start = q // size * size
    return start - back * size <= k < start + (ahead + 1) * size

  mask = masks.chunks(length, size, back=back, ahead=ahead)
  return mask, seen(sees, 1, length, length)


def padding(length, starts, stops):
  # LLaVA, Qwen-VL: causal over the real tokens of a row, whichever side of
  # them is padded.
  def sees(b, q, k):
    return starts[b] <= k < stops[b] and k <= q

  position = np.arange(length)
  starts, stops = np.array(starts), np.array(stops)
  valid = (starts[:, None] <= position) & (position < stops[:, None])
  mask = masks.padded(masks.causal(length), valid)
  return mask, seen(sees, len(starts), length, length)


def audio_lengths(queries, keys, lengths):
  # Qwen-Audio: a mask hides the padding behind each clip from the attention of
  # the encoder, and from cross-attention.
  valid = np.arange(keys) < np.array(lengths)[:, None]
  mask = masks.padded(masks.full(queries, keys), valid)
  sees = lambda b, q, k: k < lengths[b]
  return mask, seen(sees, len(lengths), queries, keys)


def molmo(image, lengths, length):
  # Molmo (Deitke et al. 2024): annotations of one image share a sequence; each
  # is causal, sees the image, and does not see the other annotations.
  member = [0] * image
  for i, n in enumerate(lengths, 1):
    member += [i] * n
  member += [-1] * (length - len(member))

  def sees(b, q, k):
    if member[k] < 0:
      return False
    return k <= q and member[k] in (0, member[q])

  member = np.array(member)
  mask = masks.branches(masks.causal(length), member)
  mask = masks.padded(mask, member >= 0)
  visible = seen(sees, 1, length, length)
  return mask, visible


def bagel(rows, length):
  # BAGEL (Deng et al. 2025, section 2): packed documents of pieces. Text is
  # causal, an image is bidirectional inside; a piece sees earlier pieces of its
  # document, but a noised image is seen by nobody after it.
  numbers, noised, segments, names = [], [], [], []
  for documents in rows:
    names.append([])
    for d, pieces in enumerate(documents):
      for p, (kind, n) in enumerate(pieces):
        names[-1] += [(d, p, kind)] * n
    rest = length - len(names[-1])
    names[-1] += [(-1, 0, "padding")] * rest
    number = {name: i for i, name in enumerate(dict.fromkeys(names[-1]), 1)}
    numbers.append([
        0 if name[2] in ("text", "padding") else number[name]
        for name in names[-1]
    ])
    noised.append([name[2] == "noised" for name in names[-1]])
    segments.append([name[0] for name in names[-1]])

  def sees(b, q, k):
    document, piece, kind = names[b][k]
    if kind == "padding" or names[b][q][0] != document:
      return False
    if names[b][q][1] == piece:
      return k <= q if kind == "text" else True
    return piece < names[b][q][1] and kind != "noised"

  group, segment = np.array(numbers), np.array(segments)
  mask = masks.groups(group)
  mask = masks.branches(mask, np.where(noised, group, 0))
  mask = masks.padded(masks.packed(mask, segment), segment >= 0)
  return mask, seen(sees, len(rows), length, length)


def cache(starts, queries, keys):
  # The new tokens are the last rows of causal attention over the sequence.
  mask = masks.cached(np.array(starts), queries, keys)
  sees = lambda b, q, k: k <= starts[b] + q
  return mask, seen(sees, len(starts), queries, keys)


def ring(starts, queries, keys, window):
  # Streaming Mimi, Moshi: as `window`, with a cache written around and around.
  slots = []
  for start in starts:
    slots.append([None] * keys)
    for position in range(start + queries):
      slots[-1][position % keys] = position

  def sees(b, q, k):
    position = slots[b][k]
    return position is not None and 0 <= starts[b] + q - position < window

  mask = masks.cached(np.array(starts), queries, keys, window)
  return mask, seen(sees, len(starts), queries, keys)


BAGEL_ROWS = [
    [
        [("text", 5), ("noised", 9), ("clean", 9), ("vit", 4), ("text", 6)],
        [("text", 3), ("noised", 4), ("noised", 5)],
    ],
    [
        [("vit", 6), ("text", 1), ("noised", 1), ("clean", 1), ("text", 20)],
        [("text", 1)],
        [("noised", 16), ("clean", 16), ("text", 2)],
    ],
]

# The definition, its arguments, and how many tiles may be visited for each that
# holds a visible pair: none in vain, but where a row skips an image that is in
# nobody's sight and that lies between two that are.
CASES = [
    (full, (5, 7), 1),
    (full, (33, 33), 1),
    (causal, (1,), 1),
    (causal, (37,), 1),
    (window, (40, 1), 1),
    (window, (61, 11), 1),
    (window, (9, 9), 1),
    (window, (20, 50), 1),
    (prefix, (41, [0, 7, 20, 41]), 1),
    (scales, ([1, 2, 3, 4, 5],), 1),
    (scales, ([1, 3, 7],), 1),
    (contrastive, (9, 23), 1),
    (captioning, (9, [20, 1, 13]), 1),
    (matching, (9, [20, 1, 13]), 1),
    (dalle_rows, (6, 4, 4), 1),
    (dalle_rows, (20, 5, 9), 1),
    (dalle_columns, (6, 4, 4), 1),
    (dalle_columns, (20, 9, 5), 1),
    (dalle_columns, (0, 3, 2), 1),
    (flamingo, (30, 3, 8, [{2, 9, 20}, {0, 29}, set()]), 1),
    (flamingo, (30, 3, 8, [{2, 9, 20}, {0, 29}, set()], True), 1.2),
    (navit, ([[9, 14, 2], [30], [1, 1, 1, 25]], 32), 1),
    (windows, (2, 6, 7, 4, True), 1),
    (windows, (2, 6, 7, 4, False), 1),
    (chunks, (47, 10, 0, 0), 1),
    (chunks, (47, 6, 2, 1), 1),
    (chunks, (16, 24, 1, 0), 1),
    (padding, (33, [0, 0, 13], [33, 9, 33]), 1),
    (audio_lengths, (12, 50, [50, 17, 1]), 1),
    (molmo, (11, [5, 1, 13, 8], 43), 1),
    (bagel, (BAGEL_ROWS, 70), 1),
    (cache, ([0, 9, 40], 3, 48), 1),
    (cache, ([0, 9, 47], 1, 48), 1),
    (ring, ([0, 3, 29, 400], 1, 16, 16), 1),
    (ring, ([0, 3, 29, 400], 5, 24, 12), 1),
]


def name_of(case):
  define, arguments, _ = case
  rest = [str(x) for x in arguments if isinstance(x, (int, bool))]
  return "-".join([define.__name__, *rest])


@functools.cache
def built(index):
  define, arguments, ratio = CASES[index]
  mask, visible = define(*arguments)
  return mask, visible, ratio


def each_case(test):
  ids = [name_of(case) for case in CASES]
  return pytest.mark.parametrize("index", range(len(CASES)), ids=ids)(test)


@each_case
def test_mask_is_what_the_paper_says(index):
  mask, visible, _ = built(index)
  assert mask.shape == visible.shape[1:]
  for x in (mask.block, mask.first, mask.last):
    assert x.dtype == jnp.int32
    assert x.shape[0] in (1, visible.shape[0])
  dense = np.broadcast_to(mask.dense(), visible.shape)
  np.testing.assert_array_equal(dense, visible)


@each_case
def test_pattern_claims_only_what_holds(index):
  mask, visible, _ = built(index)
  square = visible.shape[1] == visible.shape[2]
  if mask.pattern == "full":
    assert visible.all()
  elif mask.pattern == "causal":
    assert square
    np.testing.assert_array_equal(visible, np.tril(np.ones(visible.shape)) > 0)
  else:
    assert mask.pattern == "interval"


@functools.partial(jax.jit, static_argnums=(1, 2))
def states_of(mask, shape, tile):
  return intervals.tile_states(intervals.pad(mask, *shape), *tile)


@each_case
@pytest.mark.parametrize("tile", [(8, 8), (16, 8), (4, 32)], ids=str)
def test_tiles_are_skipped_soundly_and_tightly(index, tile):
  mask, visible, ratio = built(index)
  rows, columns = tile
  queries, keys = (
      n + -n % size for n, size in zip(visible.shape[1:], tile)
  )
  # Rows behind the end repeat the last one; nobody sees columns behind it.
  added = queries - visible.shape[1], keys - visible.shape[2]
  visible = np.pad(visible, ((0, 0), (0, added[0]), (0, 0)), mode="edge")
  visible = np.pad(visible, ((0, 0), (0, 0), (0, added[1])))
  tiles = visible.reshape(
      -1, queries // rows, rows, keys // columns, columns
  ).swapaxes(2, 3)
  states = states_of(mask, (queries, keys), tile)
  states = np.broadcast_to(states, tiles.shape[:3])
  needed = tiles.any(axis=(3, 4))
  assert not needed[states == intervals.HIDDEN].any()
  assert tiles[states == intervals.WHOLE].all()
  assert (states != intervals.HIDDEN).sum() <= ratio * needed.sum()


# Packing: any pattern inside a document, written for the document alone.
INSIDE = {
    "full": (lambda q, k: True, lambda p: masks.full(len(p[0]))),
    "causal": (lambda q, k: k <= q, lambda p: masks.causal(len(p[0]))),
    "window": (
        lambda q, k: q - 3 < k <= q, lambda p: masks.window(len(p[0]), 3)
    ),
    # Blocks that begin anew in each document, and see the block after them.
    "chunks": (
        lambda q, k: q // 4 - 2 <= k // 4 <= q // 4 + 1,
        lambda p: masks.blocks(p // 4, back=2, ahead=1),
    ),
    # The last key of a document is seen by no block there is.
    "earlier": (
        lambda q, k: k < q, lambda p: masks.blocks(p, p + 1, back=LAST)
    ),
    # Blocks far from 0 and from each other.
    "sparse": (
        lambda q, k: k <= q,
        lambda p: masks.blocks(p * 10**6 + 10**7, back=LAST),
    ),
}
LENGTH = 24


@settings(max_examples=40, deadline=None)
@given(
    pattern=st.sampled_from(sorted(INSIDE)),
    rows=st.lists(
        st.lists(st.integers(1, LENGTH), min_size=1, max_size=8),
        min_size=2, max_size=2,
    ),
    pad_first=st.booleans(),
)
def test_packed_documents_are_separate_and_keep_their_pattern(
    pattern, rows, pad_first
):
  inside, build = INSIDE[pattern]
  document = np.full((2, LENGTH), -1)  # -1: padding.
  position = np.zeros((2, LENGTH), int)
  for b, lengths in enumerate(rows):
    start = 0
    for d, n in enumerate(lengths):
      stop = min(start + n, LENGTH)
      document[b, start:stop] = d
      position[b, start:stop] = np.arange(stop - start)
      start = stop
  # In one of two rows the documents have the numbers 0 and 1 in turn.
  segment = np.where(document < 0, -1, document % [[LENGTH], [2]])

  # Padding stands behind the documents and inside them.
  valid = (document >= 0) & (np.arange(LENGTH) % 5 != 2)

  def sees(b, q, k):
    same = valid[b, k] and document[b, q] == document[b, k]
    return same and inside(position[b, q], position[b, k])

  mask = build(position)
  if pad_first:
    mask = masks.packed(masks.padded(mask, valid), segment)
  else:
    mask = masks.padded(masks.packed(mask, segment), valid)
  np.testing.assert_array_equal(mask.dense(), seen(sees, 2, LENGTH, LENGTH))
  states = intervals.tile_states(mask, 4, 8)
  tiles = np.asarray(mask.dense()).reshape(2, 6, 4, 3, 8).swapaxes(2, 3)
  assert not tiles[states == intervals.HIDDEN].any()
  assert tiles[states == intervals.WHOLE].all()


def test_modifiers_commute():
  group = np.repeat([0, 1, 2, 0, 3, 0], [2, 4, 4, 2, 5, 7])
  segment = np.repeat([1, 2, 3], [12, 9, 3])
  valid = np.arange(24) % 7 > 0
  changes = [
      lambda m: masks.branches(m, np.where(group == 1, group, 0)),
      lambda m: masks.packed(m, segment),
      lambda m: masks.padded(m, valid),
  ]
  forth = back = masks.groups(group)
  for change in changes:
    forth = change(forth)
  for change in reversed(changes):
    back = change(back)
  np.testing.assert_array_equal(forth.dense(), back.dense())
  assert 0 < np.asarray(forth.dense()).sum() < np.asarray(
      masks.groups(group).dense()
  ).sum()


def test_branches_only_take_away():
  # A window inside a branch stays a window.
  branch = [0] * 6 + [1] * 8 + [2] * 6
  mask = masks.branches(masks.window(20, 4), np.array(branch))
  sees = lambda b, q, k: q - 4 < k <= q and branch[k] in (0, branch[q])
  np.testing.assert_array_equal(mask.dense(), seen(sees, 1, 20, 20))


TRACED = {
    "prefix": (lambda n: masks.prefix(12, n), [3, 0]),
    "cached": (lambda n: masks.cached(n, 2, 12), [5, 0]),
    "ring": (lambda n: masks.cached(n, 2, 12, window=4), [50, 1]),
    "groups": (masks.groups, [[0, 1, 1, 2, 0, 0], [5, 5, 0, 5, 5, 1]]),
    "media": (lambda x: masks.media(x, 2, 3), [[-1, 0, 1], [0, 0, -1]]),
    "branches": (
        lambda x: masks.branches(masks.causal(4), x),
        [[0, 1, 1, 2], [1, 0, 2, 2]],
    ),
    "packed": (
        lambda x: masks.packed(masks.causal(4), x),
        [[0, 1, 1, 2], [7, 7, 7, 7]],
    ),
    "padded": (
        lambda x: masks.padded(masks.full(2, 4), x > 0),
        [[0, 1, 1, 2], [0, 0, 0, 7]],
    ),
    "back": (
        lambda x: masks.blocks(np.arange(4), back=x),
        [[0, LAST, 1, 2], [0, 0, 0, 7]],
    ),
}


@pytest.mark.parametrize("name", TRACED)
def test_a_new_batch_needs_no_new_compilation(name):
  build, example = TRACED[name]
  example = np.array(example, np.int32)
  compiled = jax.jit(build)
  for x in (example, example[::-1]):
    np.testing.assert_array_equal(
        compiled(x).dense(), build(np.ascontiguousarray(x)).dense()
    )
  assert compiled._cache_size() == 1


def test_reach_stops_at_the_ends_of_int32():
  block = np.array([-(2**31), -3, 0, 3, 2**31 - 1])
  mask = masks.blocks(block, back=2**31 - 2, ahead=2**31 - 1)
  expected = [
      [-(2**31 - 1) <= q - k <= 2**31 - 2 for k in block.tolist()]
      for q in block.tolist()
  ]
  np.testing.assert_array_equal(mask.dense()[0], expected)
  endless = masks.blocks(block, back=LAST)
  np.testing.assert_array_equal(endless.dense()[0], np.tril(np.ones((5, 5))))


def test_a_window_as_long_as_the_sequence_is_causal():
  assert masks.window(7, 7).pattern == "causal"
  assert masks.window(7, 6).pattern == "interval"


CAUSAL = functools.partial(masks.causal, 4)
BAD = {
    "full: no queries": (lambda: masks.full(0), "queries is 0"),
    "full: negative keys": (lambda: masks.full(3, -1), "keys is -1"),
    "causal: negative": (lambda: masks.causal(-2), "length is -2"),
    "window: empty": (lambda: masks.window(4, 0), "size is 0"),
    "chunks: empty": (lambda: masks.chunks(4, 0), "size is 0"),
    "chunks: back": (lambda: masks.chunks(4, 2, back=-1), "back is -1"),
    "blocks: ahead": (
        lambda: masks.blocks(np.arange(3), ahead=np.array([0, -2, 0])),
        "ahead is -2",
    ),
    "blocks: floats": (lambda: masks.blocks(np.ones(3)), "float64"),
    "blocks: scalar": (lambda: masks.blocks(3), "expected .L. or .B, L."),
    "blocks: not int32": (
        lambda: masks.blocks(np.array([0, 2**31])), "expected int32"
    ),
    "blocks: length of back": (
        lambda: masks.blocks(np.arange(3), back=np.arange(4)),
        "back has 4 tokens, expected 3",
    ),
    "blocks: batches": (
        lambda: masks.blocks(np.zeros((2, 3), int), np.zeros((3, 3), int)),
        "batch sizes differ",
    ),
    "prefix: longer": (lambda: masks.prefix(4, 5), "expected 0 .. 4"),
    "prefix: negative": (lambda: masks.prefix(4, np.array([1, -1])), "-1"),
    "prefix: rank": (lambda: masks.prefix(4, np.array([[1]])), "or .B."),
    "groups: rank": (lambda: masks.groups(np.zeros((1, 1, 2), int)), "group"),
    "scales: none": (lambda: masks.scales([]), "lengths is empty"),
    "scales: empty": (lambda: masks.scales([1, 0, 4]), "lengths is"),
    "rows: text": (lambda: masks.grid_rows(-1, 2, 2), "text is -1"),
    "columns: width": (lambda: masks.grid_columns(3, 2, 0), "width is 0"),
    "media: length": (lambda: masks.media([0, 1], 2, 0), "length is 0"),
    "cached: overflow": (lambda: masks.cached(6, 3, 8), "expected 0 .. 5"),
    "cached: too many": (lambda: masks.cached(0, 9, 8), "do not fit"),
    "cached: negative": (lambda: masks.cached(-1, 1, 8), "start is -1"),
    "cached: ring": (lambda: masks.cached(0, 4, 8, 6), "a ring of 8 slots"),
    "cached: window": (lambda: masks.cached(0, 1, 8, 0), "window is 0"),
    "branches: cross": (
        lambda: masks.branches(masks.full(3, 4), np.zeros(4, int)), "one seq"
    ),
    "branches: length": (
        lambda: masks.branches(CAUSAL(), np.zeros(3, int)), "3 tokens"
    ),
    "packed: length": (
        lambda: masks.packed(CAUSAL(), np.zeros((2, 5), int)), "5 tokens"
    ),
    "packed: batches": (
        lambda: masks.packed(
            masks.groups(np.zeros((2, 4), int)), np.zeros((3, 4), int)
        ),
        "batch sizes differ",
    ),
    "padded: lengths": (
        lambda: masks.padded(CAUSAL(), np.array([1, 2, 3, 4])), "arange"
    ),
    "padded: length": (
        lambda: masks.padded(CAUSAL(), np.ones((2, 3), bool)), "3 tokens"
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
  build, message = BAD[name]
  with pytest.raises(ValueError, match=message):
    build()


def draw_masks():
  spec = importlib.util.spec_from_file_location(
      "draw_masks", DOCS / "draw_masks.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_pictures_show_what_the_constructors_give():
  script = draw_masks()
  shown = script.masks_of((DOCS / "masks.md").read_text())
  files = {f"masks/{x.name}" for x in (DOCS / "masks").iterdir()}
  assert files == set(shown)
  for path, mask in shown.items():
    picture = np.asarray(Image.open(DOCS / path))
    # The middle of each cell is black exactly where the query sees the key.
    middle = script.CELL // 2
    np.testing.assert_array_equal(
        picture[middle :: script.CELL, middle :: script.CELL] == 0,
        mask.dense()[0],
        err_msg=f"{path}: run docs/draw_masks.py",
    )
    np.testing.assert_array_equal(picture, script.draw(mask), err_msg=path)


def test_every_constructor_is_in_the_docs():
  text = (DOCS / "masks.md").read_text()
  public = [
      name
      for name, value in vars(masks).items()
      if getattr(value, "__module__", "") == masks.__name__
      and callable(value) and not name.startswith("_")
  ]
  assert len(public) >= 14
  missing = [name for name in public if f"masks.{name}(" not in text]
  assert not missing


def test_reordered_tokens_see_what_they_saw():
  order = np.random.default_rng(0).permutation(20)
  for mask in (masks.causal(20), masks.window(20, 4), masks.full(20)):
    found = masks.reordered(mask, order)
    expected = np.asarray(mask.dense())[:, order][:, :, order]
    np.testing.assert_array_equal(found.dense(), expected)
    assert found.pattern == ("full" if mask.pattern == "full" else "interval")
  with pytest.raises(ValueError, match="reordered has 19 tokens"):
    masks.reordered(masks.causal(20), order[:19])
