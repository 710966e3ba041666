"""Settings, prompts and endings: what is refused, and when a row ends."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.sampling import decoding as lib
from mmjax.sampling.autoregressive import Sampling, generate, stream
from mmjax.sampling.beam import Beam, beam_search
from mmjax.sampling.decoding import Decoding
from tests.sampling import toys


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Decoding(max_new=0), "max_new must be at least 1, found 0"),
        (lambda: Decoding(max_new=2, stop=[[1], []]), "stop sequence is empty"),
        (lambda: Decoding(max_new=2, eos=[-1]), "ids of eos (-1,)"),
        (
            lambda: Decoding(max_new=2, repetition_penalty=0.0),
            "repetition_penalty must be above 0",
        ),
        (
            lambda: Decoding(max_new=2, guidance=float("nan")),
            "guidance must be finite",
        ),
        (lambda: Sampling(temperature=-0.1), "temperature must be 0 (greedy)"),
        (lambda: Sampling(temperature=float("nan")), "temperature must be 0"),
        (lambda: Sampling(top_k=0), "top_k must be None or at least 1"),
        (lambda: Sampling(top_p=0.0), "top_p must lie in (0, 1], found 0.0"),
        (lambda: Sampling(top_p=1.1), "top_p must lie in (0, 1], found 1.1"),
        (lambda: Sampling(min_p=-1.0), "min_p must lie in [0, 1]"),
        (lambda: Beam(width=0), "width must be at least 1, found 0"),
        (lambda: Beam(2, length_penalty=np.inf), "length_penalty must be"),
        (lambda: Beam(2, early_stopping=1), "early_stopping must be True"),
    ],
)
def test_bad_settings_are_refused(make, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    make()


def test_all_faults_come_in_one_message():
  with pytest.raises(ValueError, match="temperature.*top_k.*top_p"):
    Sampling(temperature=-1, top_k=0, top_p=2)


def never(*_):
  raise AssertionError("The model was traced in spite of bad input.")


GOOD = dict(tokens=[[1, 2], [3, 0]], valid=[2, 1])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(valid=[2, 0]), "valid must lie in [1, 2], found [0] in rows [1]"),
        (dict(valid=[3, 1]), "valid must lie in [1, 2], found [3] in rows [0]"),
        (dict(valid=[2]), "valid must be integers [2], found int64[1]"),
        (dict(tokens=[1, 2]), "prompts must be integers [B, T], found"),
        (dict(tokens=[[1.0, 2.0]]), "found float64[1, 2]"),
        (dict(tokens=np.zeros((0, 2), int), valid=np.zeros(0, int)), "no row"),
        (dict(limit=[1, 0]), "limit must lie in [1, 4], found [0] in rows [1]"),
        (dict(limit=[5, 4]), "limit must lie in [1, 4], found [5] in rows [0]"),
        (
            dict(valid=[0, 3], limit=[9, 1]),
            "found [0, 3] in rows [0, 1]; limit must lie in [1, 4], found [9]",
        ),
        (
            dict(
                tokens=[[1]], valid=[1], decoding=Decoding(4, guidance=2.0)
            ),
            "guidance needs an even number of rows, found 1",
        ),
    ],
)
def test_bad_prompts_are_refused_before_anything_compiles(change, message):
  arguments = dict(decoding=Decoding(max_new=4), state=None, **GOOD) | change
  with pytest.raises(ValueError, match=re.escape(message)):
    generate(never, **arguments)
  with pytest.raises(ValueError, match=re.escape(message)):
    stream(never, **arguments, every=1)
  with pytest.raises(ValueError, match=re.escape(message)):
    beam_search(never, never, **arguments, beam=Beam(2))


def test_a_piece_has_at_least_one_token():
  with pytest.raises(ValueError, match="every must be at least 1, found 0"):
    stream(never, None, **GOOD, decoding=Decoding(4), every=0)


@pytest.mark.parametrize(
    "key, message",
    [
        (None, "drawing needs `key`"),
        (np.zeros(2, np.uint32), "drawing needs `key`"),
        (jax.random.split(jax.random.key(0), 3), "one key or [2] keys"),
    ],
)
def test_drawing_needs_keys(key, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    generate(never, None, **GOOD, decoding=Decoding(4), sampling=Sampling(),
             key=key)  # fmt: skip


def test_logits_of_a_wrong_shape_are_refused():
  flat = lambda tokens, valid, state: (jnp.zeros((2, 7)), state)
  with pytest.raises(ValueError, match=r"\[2, 2, V\] or \[2, 1, V\].*\[2, 7\]"):
    generate(flat, (), **GOOD, decoding=Decoding(4))


def test_endings_outside_of_the_vocabulary_are_refused():
  step = lambda tokens, valid, state: (jnp.zeros((2, 1, 7)), state)
  with pytest.raises(ValueError, match="vocabulary of 7"):
    generate(step, (), **GOOD, decoding=Decoding(4, eos=[7]))


def ends_by_hand(row, index, decoding):
  so_far = row[: index + 1].tolist()
  return any(
      so_far[-len(ids) :] == list(ids)
      for ids in [(i,) for i in decoding.eos] + list(decoding.stop)
      if len(so_far) >= len(ids)
  )


def test_endings_are_matched_on_the_tail():
  decoding = Decoding(max_new=9, eos=[3], stop=[[0, 1], [1, 1, 2, 0], [2, 2]])
  tokens = np.random.default_rng(0).integers(0, 4, (64, 2, 9))
  hits = 0
  for index in range(9):
    ours = decoding.ends(jnp.asarray(tokens), index)
    by_hand = [
        [ends_by_hand(row, index, decoding) for row in rows] for rows in tokens
    ]
    np.testing.assert_array_equal(ours, by_hand)
    hits += np.sum(by_hand)
  assert 100 < hits < tokens.size


def test_seen_counts_valid_ids_of_the_vocabulary():
  prompt = lib.Prompt(
      jnp.array([[1, 5, 2], [-7, 0, 9]]), jnp.array([2, 3]), jnp.array([1, 1])
  )
  seen = lib.seen_in_prompt(prompt, 6)
  assert np.argwhere(seen).tolist() == [[0, 1], [0, 5], [1, 0]]


def test_weights_of_a_partial_are_arguments():
  table = np.random.default_rng(0).normal(size=(5, 5, 5)).astype(np.float32)
  step = jax.tree_util.Partial(toys.table_step, table)
  (leaf,) = jax.tree.leaves(lib.partial(step))
  assert leaf is table
  assert jax.tree.leaves(lib.partial(toys.table_step)) == []
