import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from glax.errors import UserError
from glax.training import OptimizerConfig, TrainConfig, recipe
from glax.training.optimizer import adamw, check_optimizer, is_matrix, learning_rate
from glax.training.sharding import make_mesh, use_mesh
from glax.training.state import plan_state


def test_the_papers_recipe():
    """Section 5.1: 340M, 15B tokens in batches of 0.5M with 0.5B of warm-up; 1.3B, 100B, 2M and 1B."""
    for preset, tokens, batch, warmup in (("gla-340m", 15e9, 0.5e6, 0.5e9), ("gla-1.3b", 100e9, 2e6, 1e9)):
        config = recipe(preset)
        size = config.data.batch_size * config.data.sequence_length
        assert config.data.sequence_length == 2048
        assert size == pytest.approx(batch, rel=0.05)
        assert config.steps * size == pytest.approx(tokens, rel=1e-4)
        assert config.optimizer.warmup_steps * size == pytest.approx(warmup, rel=2e-3)
        assert config.optimizer == OptimizerConfig(warmup_steps=config.optimizer.warmup_steps)
        assert config.data.tokenizer == "mistral" and config.model.vocab_size == 32000
    config = OptimizerConfig()
    assert (config.initial_learning_rate, config.learning_rate, config.final_learning_rate) == (3e-5, 3e-4, 3e-5)
    assert (config.beta1, config.beta2, config.weight_decay, config.clip_norm) == (0.9, 0.95, 0.01, 1.0)


@pytest.mark.parametrize(
    "name, value", [("learning_rate", -1.0), ("learning_rate", math.nan), ("clip_norm", 0.0), ("beta2", 1.0)]
)
def test_numbers_that_learn_nothing(name, value):
    with pytest.raises(UserError, match=f"^optimizer.{name} is "):
        check_optimizer(OptimizerConfig(**{name: value}))


def test_schedule():
    config, steps = OptimizerConfig(warmup_steps=100), 1100
    rates = np.array(jax.vmap(lambda step: learning_rate(step, config, steps))(jnp.arange(steps)))
    np.testing.assert_allclose(rates[[0, 100, steps - 1]], [3e-5, 3e-4, 3e-5], rtol=1e-5)
    np.testing.assert_allclose(np.diff(rates[:101]), 2.7e-6, rtol=1e-3)
    expected = 3e-5 + 2.7e-4 * (1 + math.cos(math.pi * 250 / 999)) / 2
    np.testing.assert_allclose(rates[350], expected, rtol=1e-5)
    assert (np.diff(rates[100:]) < 0).all()


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (0, 1), (10, 10), (1000, 10), (9, 10)])
def test_schedule_of_odd_lengths_stays_in_bounds(warmup: int, steps: int):
    config = OptimizerConfig(warmup_steps=warmup)
    rates = np.array([learning_rate(step, config, steps) for step in range(steps)])
    assert np.isfinite(rates).all() and (rates >= 2.99e-5).all() and (rates <= 3.01e-4).all()


def test_weight_decay_is_on_matrices_only(tiny_config):
    """Told by name: all but norms and biases are matrices."""
    mesh = make_mesh(tiny_config().mesh, jax.devices()[:1])
    with use_mesh(mesh):
        plan = plan_state(tiny_config(), mesh)
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="."): matrix
        for path, matrix in jax.tree_util.tree_leaves_with_path(is_matrix(plan.axes))
    }
    assert any(decayed.values())
    for name, matrix in decayed.items():
        assert matrix == (not any(word in name for word in ("norm", "bias", "scale"))), name


def test_stacked_vectors_are_not_matrices():
    axes = {"norm": P("layers", "embed"), "matrix": P("layers", "embed", "mlp"), "bias": P("heads"), "scalar": P()}
    assert is_matrix(axes) == {"norm": False, "matrix": True, "bias": False, "scalar": False}
    assert not is_matrix({"rates of decay": P("layers", "mlp", "state")})["rates of decay"]


def test_adamw_against_its_formula():
    """Two steps in float64 numpy, with gradients above and below the clipping norm."""
    config = TrainConfig(model=None).optimizer
    params = {"matrix": jnp.array([[1.0, -2.0]]), "vector": jnp.array([3.0])}
    optimizer = adamw(config, {"matrix": P("embed", "mlp"), "vector": P("embed")})
    state = optimizer.init(params)
    m, v = np.zeros(3), np.zeros(3)
    for step, gradient in enumerate([np.array([3.0, 4.0, 12.0]), np.array([0.1, -0.2, 0.3])], start=1):
        tree = {"matrix": jnp.array([gradient[:2]], jnp.float32), "vector": jnp.array(gradient[2:], jnp.float32)}
        updates, state = optimizer.update(tree, state, params)
        gradient = gradient / max(1.0, np.linalg.norm(gradient))
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        adam = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        expected = adam + 0.01 * np.array([1.0, -2.0, 0.0])
        got = np.concatenate([np.ravel(updates["matrix"]), updates["vector"]])
        np.testing.assert_allclose(got, expected, rtol=1e-5)
