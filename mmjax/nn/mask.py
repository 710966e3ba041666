"""Who sees whom in which system? Every visibility pattern as an interval mask.

`blocks` is the general constructor; `window`, `chunks`, `prefix`, `groups`,
`scales`, `grid_rows`, `grid_columns`, `media` and `cached` number the blocks
for it, and `full` and `causal` are what kernels know best. `branches`, `packed`
and `padded` narrow a mask that is there, `reordered` follows its tokens.
docs/masks.md shows what each one looks like and which systems use it.

Arrays may come from the host or be traced; values of device arrays are not
checked. Everything takes memory linear in the length.
"""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.kernels.intervals import LAST, LOWEST, Mask

# Integers of any shape; which shape is said where they are taken.
Integers: TypeAlias = int | np.ndarray | jax.Array


def full(queries: int, keys: int | None = None) -> Mask:
  """Every query sees every key: i32[1, queries], i32[1, keys or queries].

  Raises:
    ValueError: for a length below 1.
  """
  keys = queries if keys is None else keys
  _check_sizes(1, queries=queries, keys=keys)
  zeros = jnp.zeros((1, keys), jnp.int32)
  return Mask(jnp.zeros((1, queries), jnp.int32), zeros, zeros, "full")


def causal(length: int) -> Mask:
  """Query i sees keys 0 .. i.

  Raises:
    ValueError: for a length below 1.
  """
  _check_sizes(1, length=length)
  position = jnp.arange(length, dtype=jnp.int32)[None]
  return Mask(position, position, jnp.full_like(position, LAST), "causal")


def window(length: int, size: int) -> Mask:
  """Query i sees keys i - size + 1 .. i, itself among them.

  The context of Mimi, 250 frames, and of Moshi, 3000 steps (Défossez et al.
  2024).

  Raises:
    ValueError: for a length or a size below 1.
  """
  _check_sizes(1, length=length, size=size)
  if size >= length:
    return causal(length)
  return blocks(np.arange(length), back=size - 1)


def blocks(
    queries: Integers,
    keys: Integers | None = None,
    *,
    back: Integers = 0,
    ahead: Integers = 0,
) -> Mask:
  """A query of block b sees keys of blocks b - back .. b + ahead.

  The blocks may be windows of a picture in any order of the tokens (Qwen2.5-VL,
  Bai et al. 2025, section 2.1.1) or images that share a sequence (NaViT,
  Dehghani et al. 2023, section 2.1); tiles are skipped best where tokens of a
  block stand together.

  Args:
    queries: i32[Q] or i32[B or 1, Q], the block of each query.
    keys: i32[K] or i32[B or 1, K], the block of each key; by default `queries`.
    back: how many earlier blocks a query sees; `LAST` for all of them. An int,
      or i32[K] or i32[B or 1, K] for how long after its block each key is seen.
    ahead: how many later blocks a query sees, or for how long before its block
      each key is seen.

  Raises:
    ValueError: for arrays that are no integers or do not fit together, or a
      negative reach.
  """
  block = _rows("queries", queries)
  key = block if keys is None else _rows("keys", keys)
  back = _reach("back", back, key)
  ahead = _reach("ahead", ahead, key)
  _check_batch(queries=block, keys=key, back=back, ahead=ahead)
  # Additions that stop at the ends of int32 instead of wrapping around.
  first = jnp.maximum(key, LOWEST + ahead) - ahead
  last = jnp.minimum(key, LAST - back) + back
  return Mask(block, first, jnp.where(back == LAST, LAST, last))


def chunks(length: int, size: int, *, back: int = 0, ahead: int = 0) -> Mask:
  """Blocks of `size` consecutive tokens; see `blocks`.

  The audio encoder of Qwen2.5-Omni attends within blocks of 2 s, its DiT to
  further blocks on either side (Xu et al. 2025, section 2.4).

  Raises:
    ValueError: for a length or a size below 1, or a negative reach.
  """
  _check_sizes(1, length=length, size=size)
  return blocks(np.arange(length) // size, back=back, ahead=ahead)


def prefix(length: int, prefix: Integers) -> Mask:
  """The prefix is bidirectional, what follows is causal and sees the prefix.

  The prefix-LM of PaliGemma (Beyer et al. 2024, figure 2); also the
  image-grounded text generation of a Q-Former, whose queries are the prefix
  (BLIP-2, Li et al. 2023, section 3.1).

  Args:
    length: L.
    prefix: an int or i32[B], the number of tokens in the prefix.

  Raises:
    ValueError: for a length below 1 or a prefix that is negative or longer.
  """
  _check_sizes(1, length=length)
  prefix = _lengths("prefix", prefix, 0, length)
  position = np.arange(length, dtype=np.int32)
  return blocks(jnp.maximum(position - prefix[:, None] + 1, 0), back=LAST)


def groups(group: Integers) -> Mask:
  """Bidirectional inside a group, causal across groups.

  Text with images in it, each image one group: Transfusion (Zhou et al. 2024,
  section 3), BAGEL (Deng et al. 2025, section 2).

  Args:
    group: i32[L] or i32[B or 1, L]: 0 for a token on its own; neighbours with
      another number in common are one group.

  Raises:
    ValueError: if `group` is no such array.
  """
  group = _rows("group", group)
  new = (group[:, 1:] != group[:, :-1]) | (group[:, 1:] == 0)
  block = jnp.cumsum(new, axis=1, dtype=jnp.int32)
  return blocks(jnp.pad(block, ((0, 0), (1, 0))), back=LAST)


def scales(lengths: Sequence[int]) -> Mask:
  """A token sees all tokens of its own scale and of earlier ones.

  Next-scale prediction, VAR (Tian et al. 2024, section 3.2).

  Args:
    lengths: number of tokens of each scale, in order.

  Raises:
    ValueError: if there is no scale or an empty one.
  """
  lengths = _lengths("lengths", lengths, 1)
  return blocks(np.repeat(np.arange(len(lengths)), lengths), back=LAST)


def grid_rows(text: int, height: int, width: int) -> Mask:
  """Text is causal; an image token sees it all and the last image tokens.

  These are the token itself and the `width` before it in raster order, back to
  its own column in the row above: the row attention of DALL-E (Ramesh et al.
  2021, appendix B, figure 11).

  Args:
    text: number of text tokens.
    height: rows of the image; its tokens follow the text in raster order.
    width: columns of the image.

  Raises:
    ValueError: for a negative number of text tokens, or an empty image.
  """
  _check_sizes(0, text=text)
  _check_sizes(1, height=height, width=width)
  position = np.arange(text + height * width)
  return blocks(position, back=np.where(position < text, LAST, width))


def grid_columns(text: int, height: int, width: int) -> Mask:
  """Text is causal; an image token sees it all and its column down to itself.

  The column attention of DALL-E (Ramesh et al. 2021, appendix B, figure 11).

  Args:
    text: number of text tokens.
    height: rows of the image; its tokens follow the text COLUMN BY COLUMN, as
      in the paper, so that what is seen stands together.
    width: columns of the image.

  Raises:
    ValueError: for a negative number of text tokens, or an empty image.
  """
  _check_sizes(0, text=text)
  _check_sizes(1, height=height, width=width)
  column = np.repeat(np.arange(1, width + 1), height)
  mask = causal(text + height * width)
  return branches(mask, np.concatenate([np.zeros(text, np.int32), column]))


def media(index: Integers, count: int, length: int) -> Mask:
  """Cross-attention in which a text token sees one of several media.

  Flamingo: the last image before the token, and none before the first (Alayrac
  et al. 2022, section 2.3); a row that sees nothing yields zeros.

  Args:
    index: i32[Q] or i32[B or 1, Q], which medium a token sees, from 0; any
      other number for none. Tiles are skipped best where it never decreases.
      If `tag` marks the places of images, it is `cumsum(tag, -1) - 1`.
    count: number of media.
    length: tokens of each medium; the keys are those of medium 0, then 1, ...

  Raises:
    ValueError: if `index` is no such array, or a size is below 1.
  """
  _check_sizes(1, count=count, length=length)
  return blocks(index, np.repeat(np.arange(count), length))


def cached(
    start: Integers, queries: int, keys: int, window: int | None = None
) -> Mask:
  """Causal attention of new tokens to a cache that holds them already.

  Args:
    start: an int or i32[B], the position of the first query in its sequence:
      how many tokens came before.
    queries: number of new tokens, at positions start, start + 1, ...
    keys: slots of the cache. Position p is kept in slot p, or, with a window,
      in slot p % keys, over what was there.
    window: positions that a query sees, itself among them; None for all.

  Raises:
    ValueError: for a size below 1, or a cache that is too small.
  """
  _check_sizes(1, queries=queries, keys=keys)
  room = keys - queries if window is None else LAST - queries
  if room < 0:
    raise ValueError(f"mask: {queries} queries do not fit {keys} slots")
  start = _lengths("start", start, 0, room)[:, None]
  block = start + np.arange(queries, dtype=np.int32)
  slot = np.arange(keys, dtype=np.int32)
  if window is None:
    return blocks(block, slot, back=LAST)
  _check_sizes(1, window=window)
  if keys < window + queries - 1:
    raise ValueError(
        f"mask: a ring of {keys} slots, expected window + queries - 1 = "
        f"{window + queries - 1} or more, or the first of the new tokens would "
        "miss keys that the last has overwritten"
    )
  newest = block[:, -1:]
  held = newest - (newest - slot) % keys  # Below 0: never written.
  return padded(blocks(block, held, back=window - 1), held >= 0)


def branches(mask: Mask, branch: Integers) -> Mask:
  """Hides each branch from all that follows it.

  The noised images of BAGEL, of which later tokens see clean copies only (Deng
  et al. 2025, section 2); the annotations of one image that share a sequence
  in Molmo (Deitke et al. 2024).

  Args:
    mask: of the queries and keys of one sequence of L tokens, in which later
      tokens have no lower block than earlier ones.
    branch: i32[L] or i32[B or 1, L]: 0 for a token that all may see that see it
      in `mask`; neighbours with another number in common are one branch.

  Raises:
    ValueError: if `mask` is not square, or `branch` does not fit it.
  """
  branch = _rows("branch", branch)
  _check_square("branches", mask, branch)
  _, high = _bounds_of_runs(mask.block, _runs(branch))
  last = jnp.where(branch != 0, jnp.minimum(mask.last, high), mask.last)
  return Mask(mask.block, mask.first, last)


def packed(mask: Mask, segment: Integers) -> Mask:
  """Keeps segments that share a sequence from seeing each other.

  Args:
    mask: of the queries and keys of one sequence of L tokens. Its blocks may go
      on from segment to segment or begin anew in each.
    segment: i32[L] or i32[B or 1, L], the segment of each token; neighbours
      with the same number are one segment. To hide padding as well, compose
      with `padded`.

  Raises:
    ValueError: if `mask` is not square, or `segment` does not fit it.
  """
  segment = _rows("segment", segment)
  _check_square("packed", mask, segment)
  run = _runs(segment)
  low, high = _bounds_of_runs(mask.block, run)
  # Segments get consecutive ranges of blocks, each as wide as its own.
  width = high - low + 1
  begins = jnp.diff(run, axis=1, prepend=-1) != 0
  shift = jnp.cumsum(jnp.where(begins, width, 0), axis=1) - width - low
  return Mask(
      block=mask.block + shift,
      first=jnp.clip(mask.first, low, high + 1) + shift,
      last=jnp.clip(mask.last, low - 1, high) + shift,
  )


def padded(mask: Mask, valid: np.ndarray | jax.Array) -> Mask:
  """Hides the keys that are padding, wherever they stand.

  Args:
    mask: of K keys.
    valid: bool[K] or bool[B or 1, K], false for padding. For lengths n[B]:
      `jnp.arange(K) < n[:, None]`.

  Raises:
    ValueError: if `valid` is no such array.
  """
  if valid.dtype != bool or valid.ndim not in (1, 2):
    raise ValueError(
        f"mask: valid is {valid.dtype}{list(valid.shape)}, expected bool[K] or "
        "bool[B, K]; lengths become that by arange(K) < length[:, None]"
    )
  valid = jnp.atleast_2d(valid)
  _check_length("valid", valid, mask.shape[1])
  _check_batch(block=mask.block, first=mask.first, valid=valid)
  return Mask(
      block=mask.block,
      first=jnp.where(valid, mask.first, LAST),
      last=jnp.where(valid, mask.last, LOWEST),
  )


def reordered(mask: Mask, order: np.ndarray | jax.Array) -> Mask:
  """The mask of a sequence whose tokens were reordered, as by `ring.zigzag`.

  Args:
    mask: of the queries and keys of one sequence of L tokens.
    order: integers [L], token `order[i]` comes to place i.

  Raises:
    ValueError: if `mask` is not square, or `order` does not fit it.
  """
  _check_square("reordered", mask, _rows("order", order))
  pattern = "full" if mask.pattern == "full" else "interval"
  block, first, last = (
      x[:, order] for x in (mask.block, mask.first, mask.last)
  )
  return Mask(block, first, last, pattern)


def _runs(number: jax.Array) -> jax.Array:
  """i32[*, L]: which run of equal neighbours a token belongs to, from 0."""
  new = number[:, 1:] != number[:, :-1]
  run = jnp.cumsum(new, axis=1, dtype=jnp.int32)
  return jnp.pad(run, ((0, 0), (1, 0)))


def _bounds_of_runs(
    block: jax.Array, run: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Lowest and highest block of each token's run, both i32[B or 1, L]."""
  block, run = jnp.broadcast_arrays(block, run)
  length = block.shape[1]

  def bounds(block: jax.Array, run: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, high = (
        reduce(block, run, length, indices_are_sorted=True)[run]
        for reduce in (jax.ops.segment_min, jax.ops.segment_max)
    )
    return low, high

  return jax.vmap(bounds)(block, run)


def _rows(name: str, x: Integers) -> jax.Array:
  """Integers [L] or [B, L] as i32[1 or B, L]."""
  x = _integers(name, x)
  if x.ndim not in (1, 2) or not x.size:
    raise ValueError(f"mask: {name} is {x.shape}, expected [L] or [B, L]")
  return jnp.atleast_2d(x)


def _reach(name: str, x: Integers, key: jax.Array) -> jax.Array:
  """A reach as i32[1 or B, 1 or K]."""
  if not isinstance(x, jax.Array) and np.min(x, initial=0) < 0:
    raise ValueError(f"mask: {name} is {np.min(x)}, expected 0 or more")
  x = _integers(name, x)
  if not x.ndim:
    return x[None, None]
  x = _rows(name, x)
  _check_length(name, x, key.shape[1])
  return x


def _lengths(
    name: str, x: Integers | Sequence[int], least: int, most: int = LAST
) -> jax.Array | np.ndarray:
  """Numbers as i32[B], i32[1] for an int; on the host if they are there."""
  if not isinstance(x, jax.Array):
    x = np.asarray(x)
    if not x.size:
      raise ValueError(f"mask: {name} is empty")
    if not least <= x.min() <= x.max() <= most:
      raise ValueError(
          f"mask: {name} is {x.tolist()}, expected {least} .. {most}"
      )
  x = _integers(name, x)
  if x.ndim > 1:
    raise ValueError(f"mask: {name} is {x.shape}, expected a number or [B]")
  return x.reshape(-1)


def _integers(name: str, x: Integers | Sequence[int]) -> jax.Array | np.ndarray:
  """Integers as int32, on the host if they are there."""
  x = x if isinstance(x, jax.Array) else np.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f"mask: {name} is {x.dtype}, expected integers")
  if isinstance(x, np.ndarray) and x.size:
    if x.min() < LOWEST or x.max() > LAST:
      raise ValueError(
          f"mask: {name} spans {x.min()} .. {x.max()}, expected int32"
      )
  return x.astype(np.int32)


def _check_sizes(least: int, **sizes: int) -> None:
  faults = [f"{k} is {v}" for k, v in sizes.items() if v < least]
  if faults:
    raise ValueError(f"mask: {', '.join(faults)}, expected {least} or more")


def _check_length(name: str, x: jax.Array, length: int) -> None:
  if x.shape[1] != length:
    raise ValueError(f"mask: {name} has {x.shape[1]} tokens, expected {length}")


def _check_batch(**arrays: jax.Array) -> None:
  if len({x.shape[0] for x in arrays.values()} - {1}) > 1:
    found = ", ".join(f"{k} {x.shape}" for k, x in arrays.items())
    raise ValueError(f"mask: batch sizes differ: {found}; expected B or 1")


def _check_square(what: str, mask: Mask, x: jax.Array) -> None:
  if mask.shape[0] != mask.shape[1]:
    raise ValueError(
        f"mask: {what} takes a mask of one sequence, found {mask.shape[0]} "
        f"queries and {mask.shape[1]} keys"
    )
  _check_length(what, x, mask.shape[1])
  _check_batch(block=mask.block, first=mask.first, **{what: x})
