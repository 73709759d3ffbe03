"""The examples of multi-query associative recall, as Zoology draws them, made on the device."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Task:
    """The examples, how many there are, and how long to train on them."""

    vocabulary: int
    """Symbols: 0 is nothing, the rest of the lower half are keys, the upper half are values."""

    length: int
    """Places of a row."""

    pairs: int
    """Keys, each with a value; 4 pairs must fit in the length."""

    batch: int
    """Rows of a training step."""

    steps: int
    """Training steps, at most."""

    train_examples: int = 100_000
    test_examples: int = 3_000

    def shortened(self, times: int) -> "Task":
        """The same tokens and pairs in a step, in rows that are ``times`` shorter."""
        changes = {"length": self.length // times, "pairs": self.pairs // times, "batch": self.batch * times}
        return dataclasses.replace(self, **changes)


TASKS = {
    "small": Task(vocabulary=32, length=16, pairs=3, batch=64, steps=800, train_examples=20_000, test_examples=1_024),
    "l256": Task(vocabulary=8192, length=256, pairs=16, batch=256, steps=64 * 391),
    "l512": Task(vocabulary=8192, length=512, pairs=64, batch=128, steps=64 * 782),
}


class Examples(NamedTuple):
    """Rows with the places that ask for a key, and the values asked for. Everywhere else nothing is predicted."""

    tokens: Int[Array, "N length"]
    places: Int[Array, "N pairs"]
    answers: Int[Array, "N pairs"]


def example(key: PRNGKeyArray, task: Task) -> Examples:
    """One row: keys and values without repetition; the gaps drawn without replacement, p_i ~ 0.01 i^(0.01 - 1)."""
    half, pairs = task.vocabulary // 2, task.pairs
    for_keys, for_values, for_gaps = jax.random.split(key, 3)
    keys = 1 + distinct(for_keys, half - 1, pairs)
    values = half + distinct(for_values, half, pairs)
    spaces = (task.length - 2 * pairs) // 2
    weights = 0.01 * np.arange(1, spaces + 1) ** (0.01 - 1.0)
    gaps = jax.random.choice(for_gaps, spaces, (pairs,), replace=False, p=jnp.asarray(weights / weights.sum()))
    places = 2 * pairs + 2 * gaps
    context = jnp.stack([keys, values], 1).reshape(-1)
    tokens = jnp.zeros(task.length, jnp.int32).at[: 2 * pairs].set(context).at[places].set(keys)
    return Examples(tokens, places, values)


def distinct(key: PRNGKeyArray, population: int, count: int) -> Int[Array, "count"]:
    """``count`` of 0..population-1 without repetition, in random order (Floyd's algorithm, which sorts nothing)."""
    for_draws, for_order = jax.random.split(key)
    tops = jnp.arange(population - count, population)
    draws = jax.random.randint(for_draws, (count,), 0, tops + 1)

    def choose(chosen, index):
        number = jnp.where(jnp.any(chosen == draws[index]), tops[index], draws[index])
        return chosen.at[index].set(number), None

    chosen, _ = jax.lax.scan(choose, jnp.full(count, -1), jnp.arange(count))
    return jax.random.permutation(for_order, chosen)


def examples(seed: int, count: int, task: Task) -> Examples:
    """``count`` rows, made on the device, a few thousand at a time."""
    return _examples(jax.random.split(jax.random.key(seed), count), task)


@functools.partial(jax.jit, static_argnums=1)
def _examples(keys, task):
    return jax.lax.map(lambda key: example(key, task), keys, batch_size=2048)
