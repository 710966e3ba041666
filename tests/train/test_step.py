"""The one step against independent arithmetic, on every kind of training."""

import inspect
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax import sharding
from mmjax.objectives.term import Context, Term, objective
from mmjax.train import optim
from mmjax.train import step as step_lib
from mmjax.train.state import nest
from tests.train import toys


def host(tree):
  return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize("kind", toys.KINDS)
def test_every_kind_trains_with_one_compilation(kind):
  stage = toys.stage(kind)
  run, state = toys.start(stage, toys.batch(kind))
  losses = []
  for i in range(60):
    state, metrics = run(state, toys.batch(kind, seed=i % 2))
    losses.append(float(metrics["loss"]))
  assert run.jitted._cache_size() == 1
  assert int(state.step) == 60 and int(state.skipped) == 0
  assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_the_step_is_short_and_has_no_if():
  source = inspect.getsource(step_lib.train_step)
  body = source.split('"""')[2]
  lines = [line for line in body.splitlines() if line.strip()]
  assert len(lines) <= 40
  assert " if " not in body and "while" not in body
  names = ("image", "audio", "token", "contrast", "diffusion", "codec")
  assert not any(name in body for name in names)


def test_frozen_leaves_keep_their_bits_and_have_no_optimizer_state():
  stage = toys.stage("autoregressive")
  run, state = toys.start(stage, toys.batch("autoregressive"))
  before = host(state.frozen)
  assert before and set(state.live) == {"head/kernel", "head/bias"}
  for i in range(3):
    state, _ = run(state, toys.batch("autoregressive", seed=i))
  jax.tree.map(np.testing.assert_array_equal, before, host(state.frozen))
  moments = [x.shape for x in jax.tree.leaves(state.opt) if x.ndim]
  live = [x.shape for x in jax.tree.leaves(state.live)]
  assert sorted(moments) == sorted(live * 2)


def test_frozen_parameters_may_be_stored_in_bfloat16():
  stage = toys.stage("autoregressive", frozen_dtype=jnp.bfloat16)
  run, state = toys.start(stage, toys.batch("autoregressive"))
  state, metrics = run(state, toys.batch("autoregressive"))
  assert {x.dtype for x in state.frozen.values()} == {jnp.dtype("bfloat16")}
  assert {x.dtype for x in state.live.values()} == {jnp.dtype("float32")}
  assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("kind", ["autoregressive", "codec"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(kind):
  """Exact although the microbatches hold different numbers of tokens."""
  batch = toys.batch(kind, seed=5)
  changes = {"optim": [(".*", optim.sgd(1.0, momentum=0.0))]}
  if kind == "codec":  # The codebooks move between microbatches: fix them.
    changes["system"] = toys.Codec(learning=())
  states = []
  for accumulate in (1, 4):
    stage = toys.stage(kind, accumulate=accumulate, **changes)
    run, state = toys.start(stage, batch)
    state, metrics = run(state, batch)
    states.append((host(state.live), float(metrics["loss"])))
  (whole, loss), (parts, loss_parts) = states
  assert loss == pytest.approx(loss_parts, rel=1e-6)
  for path in whole:
    np.testing.assert_allclose(whole[path], parts[path], atol=2e-6)


def test_the_weighing_pass_costs_nothing():
  """XLA drops it: the compiled step has as many products as a plain one."""
  stage = toys.stage("contrastive")
  batch = toys.batch("contrastive")
  run, state = toys.start(stage, batch)
  ours = run.jitted.lower(state, batch).compile().as_text()

  def plain(live, opt, batch):
    def loss(live):
      context = Context(jnp.int32(0), jax.random.key(0), None)
      terms, _ = stage.objective(
          stage.system, {"params": nest(live)}, batch, context
      )
      return terms["contrastive"].total / terms["contrastive"].weight

    grads = jax.grad(loss)(live)
    return stage.optimizer(live).update(grads, opt, live)

  theirs = jax.jit(plain).lower(state.live, state.opt, batch).compile()
  count = lambda text: text.count(" dot(") + text.count("__onednn$matmul")
  assert count(theirs.as_text()) > 0
  assert count(ours) == count(theirs.as_text())


def test_gan_gradients_equal_two_separate_backward_passes():
  stage = toys.stage("codec", optim=[(".*", optim.sgd(1.0, momentum=0.0))])
  batch = toys.batch("codec")
  run, state = toys.start(stage, batch)
  books = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
  state.mutables["codebook"]["quantizer"]["rows"] = jnp.asarray(books)
  after, _ = run(state, batch)
  taken = {
      path: np.asarray(state.live[path] - after.live[path])
      for path in state.live
  }
  params = nest(dict(state.live))
  system, real = stage.system, jnp.asarray(batch["audio"])

  def apply(params, *args, method):
    return system.apply(
        {"params": params} | state.mutables, *args, method=method
    )

  def generator(params):
    fake, _ = apply(params, real, method="reconstruct")
    fooled = apply(params, fake, method="judge")
    z = real @ params["encoder"]["kernel"] + params["encoder"]["bias"]
    rest, commitment = z, []
    for book in books:
      distances = jnp.square(rest[:, None] - book).sum(-1)
      commitment.append(distances.min(axis=1))
      rest = rest - book[distances.argmin(axis=1)]
    return (
        jnp.square(fake - real).mean()
        + 0.1 * jnp.mean(jnp.stack(commitment))
        - 0.5 * fooled.mean()
    )

  def discriminator(params):
    fake = apply(params, real, method="reconstruct")[0]
    on_real = apply(params, real, method="judge")
    on_fake = apply(params, fake, method="judge")
    return (jax.nn.relu(1 - on_real) + jax.nn.relu(1 + on_fake)).mean()

  g, d = jax.grad(generator)(params), jax.grad(discriminator)(params)
  for path, step in taken.items():
    player, name = path.split("/")
    grads = d if player == "discriminator" else g
    np.testing.assert_allclose(step, grads[player][name], atol=1e-6)


def test_two_rules_are_two_optimizers_and_codebooks_are_mutables():
  run, state = toys.start(toys.stage("codec"), toys.batch("codec"))
  assert set(state.opt) == {"0", "1"}
  books = lambda: np.asarray(state.mutables["codebook"]["quantizer"]["rows"])
  before = books()
  state, _ = run(state, toys.batch("codec"))
  assert not np.array_equal(before, books())


def test_shadow_is_a_moving_average_or_a_fixed_reference():
  run, state = toys.start(toys.stage("flow"), toys.batch("flow"))
  slow = host(state.live)
  for i in range(3):
    state, _ = run(state, toys.batch("flow", seed=i))
    slow = {
        path: 0.9 * slow[path] + 0.1 * np.asarray(state.live[path])
        for path in slow
    }
  for path, value in state.shadow.items():
    np.testing.assert_allclose(value, slow[path], rtol=1e-5, atol=1e-7)

  run, state = toys.start(toys.stage("preference"), toys.batch("preference"))
  first = host(state.live)
  state, metrics = run(state, toys.batch("preference"))
  # Before the first step policy and reference agree: the loss is log 2.
  assert float(metrics["preference"]) == pytest.approx(np.log(2), abs=1e-6)
  state, metrics = run(state, toys.batch("preference"))
  assert float(metrics["preference"]) < np.log(2)
  jax.tree.map(np.testing.assert_array_equal, first, host(state.shadow))


def test_a_step_that_is_not_finite_changes_nothing_but_its_counters():
  run, state = toys.start(toys.stage("codec"), toys.batch("codec"))
  state, _ = run(state, toys.batch("codec"))
  before = host(state)
  bad = toys.batch("codec")
  bad["audio"][0, 0] = np.nan
  state, metrics = run(state, bad)
  state, _ = run(state, bad)
  assert not np.isfinite(metrics["loss"])
  for name in ("live", "opt", "mutables", "shadow"):
    jax.tree.map(
        np.testing.assert_array_equal,
        getattr(before, name),
        host(getattr(state, name)),
    )
  assert int(state.step) == 3
  assert int(state.skipped) == 2 and int(state.skipped_in_a_row) == 2
  state, _ = run(state, toys.batch("codec"))
  assert int(state.skipped) == 2 and int(state.skipped_in_a_row) == 0


def test_terms_without_a_weight_are_reported_only():
  @objective("image", "audio")
  def two(system, variables, batch, context):
    terms, _ = toys.contrast(system, variables, batch, context)
    return terms | {"other": Term(jnp.float32(6.0), jnp.float32(2.0))}, {}

  stage = toys.stage("contrastive", objective=two)
  run, state = toys.start(stage, toys.batch("contrastive"))
  _, metrics = run(state, toys.batch("contrastive"))
  assert float(metrics["other"]) == 3.0
  assert float(metrics["loss"]) == float(metrics["contrastive"])


def test_an_unknown_weight_names_the_terms():
  stage = toys.stage("flow", weights={"flaw": 1.0})
  run, state = toys.start(stage, toys.batch("flow"))
  with pytest.raises(ValueError, match=r"no term \['flaw'\].*\['flow'\]"):
    run(state, toys.batch("flow"))


def test_a_projector_only_stage_needs_less_memory_than_masked_updates():
  """Frozen as split against the usual masking of updates, compiled."""
  system = toys.Decoder()
  batch = toys.batch("autoregressive", rows=64)
  split = toys.stage("autoregressive", batch_size=64)
  run, state = toys.start(split, batch)
  ours = run.jitted.lower(state, batch).compile().memory_analysis()

  params = dict(state.frozen) | dict(state.live)
  masked = optax.chain(
      optax.scale_by_adam(),
      optax.masked(
          optax.set_to_zero(), {path: path in state.frozen for path in params}
      ),
  )

  def step(params, opt, batch):
    def loss(params):
      context = Context(jnp.int32(0), jax.random.key(0), None)
      terms, _ = toys.next_token(
          system, {"params": nest(params)}, batch, context
      )
      return terms["next_token"].total / terms["next_token"].weight

    updates, opt = masked.update(jax.grad(loss)(params), opt, params)
    return optax.apply_updates(params, updates), opt

  theirs = (
      jax.jit(step).lower(params, masked.init(params), batch).compile()
  ).memory_analysis()
  assert ours.temp_size_in_bytes < 0.5 * theirs.temp_size_in_bytes
  assert ours.argument_size_in_bytes < theirs.argument_size_in_bytes


@pytest.mark.parametrize("kind", toys.KINDS)
@pytest.mark.parametrize(
    "shape",
    [
        dict(fsdp=2, tensor=4),
        pytest.param(dict(data=8), marks=pytest.mark.slow),
        pytest.param(dict(data=2, fsdp=4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_eight_devices_give_the_losses_of_one(kind, shape):
  stage = toys.stage(kind)
  losses = []
  for mesh in (None, sharding.make_mesh(shape)):
    run, state = toys.start(stage, toys.batch(kind), mesh)
    found = []
    for i in range(3):
      state, metrics = run(state, toys.batch(kind, seed=i))
      found.append(float(metrics["loss"]))
    losses.append(found)
  np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)


def test_errors_name_what_is_wrong():
  with pytest.raises(ValueError, match="accumulate=2: contrast compares"):
    toys.stage("contrastive", accumulate=2)
  with pytest.raises(ValueError, match="batch_size=8 is not divisible"):
    toys.stage("flow", accumulate=3)
  with pytest.raises(ValueError, match="lacks \\['audio'\\]"):
    toys.stage("contrastive").check_stream(["image", "label"], "stream 0")
  with pytest.raises(ValueError, match="8 rows, not divisible by the 3 parts"):
    toys.stage("flow").check_mesh(3)
  with pytest.raises(ValueError, match="every parameter is frozen"):
    toys.start(toys.stage("flow", optim=[(".*", None)]), toys.batch("flow"))
  with pytest.raises(ValueError) as error:
    rules = [("inn/.*", None), ("out/.*", optim.sgd(1.0))]
    toys.start(toys.stage("flow", optim=rules), toys.batch("flow"))
  text = str(error.value)
  assert "rule 'inn/.*' wins no parameter" in text
  assert "parameter 'in/kernel' has no rule" in text
  assert textwrap.dedent("out/kernel") in text
