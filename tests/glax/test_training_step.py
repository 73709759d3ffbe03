import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glax.models import LanguageModel
from glax.training.sharding import make_mesh, place_batch, use_mesh
from glax.training.state import plan_state
from glax.training.step import loss_and_gradients, make_loss, make_train_step


@pytest.fixture(scope="module")
def config(tiny_config):
    config = tiny_config()
    data = dataclasses.replace(config.data, sequence_length=48, batch_size=4)
    model = dataclasses.replace(config.model, num_layers=1, implementation="reference")  # compiles fastest
    return dataclasses.replace(config, data=data, model=model)


@pytest.fixture(scope="module")
def mesh(config):
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with use_mesh(mesh):
        yield mesh


@pytest.fixture(scope="module")
def plan(config, mesh):
    return plan_state(config, mesh)


@pytest.fixture(scope="module")
def batch():
    """Rows with very different numbers of counted targets."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 257, (4, 49), np.int32)
    weights = (draw.random((4, 48)) < np.array([[1.0], [0.5], [0.1], [0.0]])).astype(np.float32)
    segments = np.cumsum(draw.random((4, 48)) < 0.1, axis=1, dtype=np.int32) + 1
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments, "weights": weights}


def test_loss_is_the_mean_over_counted_targets(config, mesh, plan, batch):
    """Against log-softmax of all logits."""
    params = plan.initialize().params
    logits = jax.jit(lambda p, b: plan.build(p)(b["tokens"], segment_ids=b["segment_ids"]))(params, batch)
    logits = np.asarray(logits, np.float64)
    normalized = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(normalized, batch["targets"][..., None], -1)[..., 0]
    expected = -(picked * batch["weights"]).sum() / batch["weights"].sum()
    placed = place_batch(batch, mesh)
    loss, _ = jax.jit(lambda p, b: loss_and_gradients(plan, p, b, 1))(params, placed)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(make_loss(plan, 2)(params, placed)) == pytest.approx(expected * batch["weights"].sum(), rel=1e-5)


def test_accumulated_gradients_are_the_big_batchs(mesh, plan, batch):
    params, placed = plan.initialize().params, place_batch(batch, mesh)
    whole = jax.jit(lambda p, b: loss_and_gradients(plan, p, b, 1))(params, placed)
    parts = jax.jit(lambda p, b: loss_and_gradients(plan, p, b, 4))(params, placed)
    for got, want in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6 * float(jnp.abs(want).max()) + 1e-9, rtol=1e-4)


def test_a_non_finite_step_changes_nothing_and_is_counted(config, mesh, plan, batch):
    step = make_train_step(plan, config, 1)
    good = place_batch(batch, mesh)
    bad = place_batch(batch | {"weights": batch["weights"] * np.float32("nan")}, mesh)
    state, _ = step(plan.initialize(), good)
    before = jax.device_get(state)
    state, metrics = step(state, bad)
    assert not np.isfinite(metrics["loss"])
    state, metrics = step(state, bad)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_row"]), int(state.step)) == (2, 2, 3)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))
    state, metrics = step(state, good)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (2, 0)
    moved = [
        (np.asarray(a) != b).any()
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(before.params), strict=True)
    ]
    assert all(moved)


def test_the_model_of_a_seed_does_not_depend_on_the_plan(config, plan):
    """The parameters are those of LanguageModel with the same seed, made without mesh or jit, to rounding."""
    model = LanguageModel(config.model, rngs=nnx.Rngs(config.seed))
    expected = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plan.initialize().params, expected)
