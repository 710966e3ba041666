"""Schedules, optimizers and rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.train import optim, rules


def test_schedules_start_peak_and_end_where_they_say():
  for make in (optim.cosine, optim.linear):
    schedule = make(peak=2.0, steps=100, warmup=10, end=0.5)
    assert float(schedule(0)) == 0.0
    assert float(schedule(5)) == pytest.approx(1.0)
    assert float(schedule(10)) == pytest.approx(2.0)
    assert float(schedule(55)) == pytest.approx(1.25, rel=1e-5)
    assert float(schedule(100)) == pytest.approx(0.5, rel=1e-5)


def test_a_run_shorter_than_its_warm_up_ends_within_it():
  schedule = optim.cosine(peak=2.0, steps=10, warmup=100)
  assert float(schedule(10)) == pytest.approx(0.2)


def test_adamw_is_the_algorithm_of_the_paper():
  rng = np.random.default_rng(0)
  params = {"a/kernel": rng.normal(size=3), "a/bias": rng.normal(size=3)}
  rule = optim.adamw(0.1, 0.8, 0.9, 1e-3, weight_decay=0.5)
  ours = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
  state = rule.init(ours)
  m = v = {k: 0.0 for k in params}
  for t in range(1, 4):
    grads = {k: rng.normal(size=3) for k in params}
    updates, state = rule.update(
        {k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}, state, ours
    )
    ours = jax.tree.map(jnp.add, ours, updates)
    m = {k: 0.8 * m[k] + 0.2 * grads[k] for k in params}
    v = {k: 0.9 * v[k] + 0.1 * grads[k] ** 2 for k in params}
    for k in params:
      step = m[k] / (1 - 0.8**t) / (np.sqrt(v[k] / (1 - 0.9**t)) + 1e-3)
      decay = 0.5 * params[k] if k == "a/kernel" else 0.0
      params[k] = params[k] - 0.1 * (step + decay)
  for k in params:
    np.testing.assert_allclose(ours[k], params[k], atol=1e-5)


def test_clipping_is_over_the_whole_rule():
  rule = optim.sgd(1.0, momentum=0.0, clip=1.0)
  grads = {"a": jnp.float32(3.0), "b": jnp.float32(4.0)}
  updates, _ = rule.update(grads, rule.init(grads), grads)
  assert float(updates["a"]) == pytest.approx(-0.6)
  assert float(updates["b"]) == pytest.approx(-0.8)


def test_a_vector_stays_as_long_as_the_rows_of_a_frozen_table():
  rng = np.random.default_rng(0)
  frozen = {"table": jnp.asarray(rng.normal(size=(5, 3)), jnp.bfloat16)}
  rule = optim.adamw(0.1, clip=1.0, like_rows={"row": "table"})
  both = optim.partition(
      ["row", "map", "table"], [("table", None), (".*", rule)]
  )
  params = {"row": jnp.ones(3), "map": jnp.ones(2)}
  grads = {"row": jnp.asarray([1.0, -2.0, 0.5]), "map": jnp.ones(2)}
  state = both.init(params)
  updates, _ = both.update(grads, state, params, frozen=frozen)
  free = optim.adamw(0.1, clip=1.0)
  expected, _ = free.update(grads, free.init(params), params)
  np.testing.assert_array_equal(updates["map"], expected["map"])
  row = np.asarray(params["row"] + expected["row"])
  rows = np.asarray(frozen["table"], np.float32)
  length = np.linalg.norm(rows, axis=1).mean() / np.linalg.norm(row)
  np.testing.assert_allclose(
      params["row"] + updates["row"], length * row, rtol=1e-5
  )


def test_rules_match_whole_paths_and_the_first_wins():
  paths = ["a/kernel", "a/bias", "b/kernel"]
  owner = rules.assign(paths, ["a/kernel", "a/.*", ".*"], "optim")
  assert owner == {"a/kernel": 0, "a/bias": 1, "b/kernel": 2}
  with pytest.raises(ValueError, match=r"rule 'kernel' wins no parameter"):
    rules.assign(paths, ["kernel", ".*"], "optim")
  with pytest.raises(ValueError, match=r"rule 'b/.*' wins no parameter"):
    rules.assign(paths, [".*", "b/.*"], "optim")
  assert rules.assign(paths, ["b/.*"], "shadow", partial=True) == {
      "b/kernel": 0
  }


def test_each_rule_moves_only_its_own_parameters():
  transformation = optim.partition(
      ["a", "b", "c"],
      [
          ("a", optim.sgd(1.0, momentum=0.0)),
          ("b", None),
          (".*", optim.sgd(10.0, momentum=0.0)),
      ],
  )
  live = {"a": jnp.float32(1.0), "c": jnp.float32(1.0)}
  updates, state = transformation.update(
      live, transformation.init(live), live
  )
  assert {k: float(v) for k, v in updates.items()} == {"a": -1.0, "c": -10.0}
  assert set(state) == {"0", "2"}
