"""Runs trained together are the runs trained alone, and a copy on disk continues as if nothing had happened."""

import fcntl

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import many_runs
from glax.models import LanguageModel, ModelConfig
from many_runs import ManyRuns, Training, text_windows, turn

CONFIG = ModelConfig(
    vocab_size=17, hidden_size=16, num_layers=1, mixer="attention", num_heads=2, mlp_size=0, compute_dtype="float32"
)
TEXT = jnp.asarray(np.random.default_rng(0).integers(0, 17, 400), jnp.int32)
TRAINING = Training(steps=6, warmup_steps=2, final_fraction=0.1, weight_decay=0.2)
RATES, SEEDS = (1e-3, 1e-2), (0, 5)


def loss(model: LanguageModel, rows: jax.Array) -> jax.Array:
    logits = model(rows[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]))


def many(programs=()) -> ManyRuns:
    """Runs that are new but for the programs that others have compiled."""
    sample = text_windows(12, 4)
    runs = ManyRuns(CONFIG, sample, loss, TRAINING, data=TEXT, learning_rates=RATES, seeds=SEEDS)
    runs._programs = dict(programs)
    return runs


@pytest.fixture(scope="module")
def together() -> tuple[ManyRuns, np.ndarray]:
    runs = many()
    return runs, np.concatenate(list(runs.train(3)))


def test_each_run_is_its_own(together):
    """The last of the four, step by step with optax alone."""
    runs, losses = together
    assert runs.runs == ((1e-3, 0), (1e-3, 5), (1e-2, 0), (1e-2, 5)) and losses.shape == (6, 4)
    assert len(set(losses[-1])) == 4
    np.testing.assert_array_equal(losses[0, :2], losses[0, 2:])  # one seed: the same start and the same batch

    key, schedule = jax.random.key(5), [0.0, 5e-3, 1e-2]
    schedule += [1e-3 + 9e-3 * 0.5 * (1 + np.cos(np.pi * done / 3)) for done in (1, 2, 3)]
    graph, params = nnx.split(LanguageModel(CONFIG, rngs=nnx.Rngs(key)), nnx.Param)
    decays = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    moments = None
    gradient = jax.jit(jax.value_and_grad(lambda p, rows: loss(nnx.merge(graph, p), rows)))
    for step, rate in enumerate(schedule):
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.2, mask=decays)
        )
        moments = optimizer.init(params) if moments is None else moments
        rows = text_windows(12, 4)(jax.random.fold_in(key, step), TEXT)
        value, gradients = gradient(params, rows)
        np.testing.assert_allclose(losses[step, 3], value, rtol=2e-5)
        updates, moments = optimizer.update(gradients, moments, params)
        params = optax.apply_updates(params, updates)


def test_evaluation_is_the_mean_over_batches(together):
    runs, _ = together
    batches = TEXT[:78].reshape(2, 3, 13)
    of_one = jax.jit(lambda params, rows: loss(runs.build(params), rows))
    expected = []
    for run in range(4):
        params = jax.tree.map(lambda leaf, run=run: leaf[run], runs.params)
        expected.append(np.mean([of_one(params, rows) for rows in batches]))
    np.testing.assert_allclose(runs.evaluate(loss, batches), expected, rtol=1e-5)


def test_a_copy_continues(together, tmp_path, monkeypatch):
    monkeypatch.setattr(many_runs, "SECONDS_BETWEEN_COPIES", -1.0)
    copy = tmp_path / "copy.npz"
    first = many(together[0]._programs).train(3, copy)
    losses = [next(first)]
    next(first)  # the copy is written when the next steps are asked for, and these are lost with the process
    again = many(together[0]._programs)
    with np.load(copy) as kept:
        assert kept["step"] == 3
    losses += list(again.train(3, copy))
    np.testing.assert_array_equal(np.concatenate(losses), together[1])
    np.testing.assert_array_equal(again.losses, together[1])


def test_a_copy_of_the_last_step_has_all_losses(together, tmp_path, monkeypatch):
    monkeypatch.setattr(many_runs, "SECONDS_BETWEEN_COPIES", -1.0)
    list(many(together[0]._programs).train(3, tmp_path / "copy.npz"))
    again = many(together[0]._programs)
    assert not list(again.train(3, tmp_path / "copy.npz"))
    np.testing.assert_array_equal(again.losses, together[1])


def test_stages_with_other_data_and_programs_compiled_before(together):
    """Steps up to a stage's end on its data, then on the next one's; nothing is compiled twice."""
    runs, shorter = many(programs=together[0]._programs), TEXT[::-1][:200]
    runs.compile(3, TEXT, shorter)
    programs = dict(runs._programs)
    assert [len(piece) for piece in runs.train(3, until=3)] == [3]
    runs.data = shorter
    losses = np.concatenate(list(runs.train(3)))
    assert runs.step == 6 and runs._programs == programs and len(programs) == 2
    assert np.all(losses != together[1][3:])


def test_fewer_steps_have_the_whole_schedule(together):
    """Of six steps only three: the rates are those of steps 0, 2.5 and 5, and measuring has changed nothing."""
    runs = together[0]
    fewer = many(programs=runs._programs)
    assert fewer.seconds_for(3) > 0
    fewer.steps = 3
    losses = np.concatenate(list(fewer.train(3)))
    assert losses.shape == (3, 4) and fewer.step == 3
    np.testing.assert_array_equal(losses[:2], together[1][:2])  # the first step has the rate 0 either way
    assert np.all(losses[2] != together[1][2])


def test_turns_are_taken_one_after_the_other(tmp_path):
    lock = tmp_path / "locks" / "turn"
    with turn(lock), lock.open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with turn(None):
        pass


def test_windows_are_of_the_text_and_reach_its_end():
    text = jnp.arange(20)
    rows = np.asarray(text_windows(7, 2000)(jax.random.key(0), text))
    np.testing.assert_array_equal(np.diff(rows, axis=1), 1)
    assert set(rows[:, 0]) == set(range(13)) and rows.max() == 19
