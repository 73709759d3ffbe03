"""Trains many small models of one config at once: every learning rate with every seed, as an axis of one program.

Batches are made on the device by a function of the seed and the step, so runs of one seed see the same data whatever
the model and the learning rate.
"""

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from glax.models import LanguageModel, ModelConfig
from glax.training import OptimizerConfig
from glax.training.optimizer import adamw, learning_rate

Batch = PyTree[Array]
Sample = Callable[[Array, PyTree], Batch]
Loss = Callable[[LanguageModel, Batch], Float[Array, ""]]

# A program that trains for longer keeps a copy of itself on disk this often, and continues from it.
SECONDS_BETWEEN_COPIES = 120.0


@dataclasses.dataclass(frozen=True)
class Training:
    """AdamW with linear warm-up and a cosine schedule; the learning rates are the sweep's."""

    steps: int
    """Steps of every run."""

    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""

    final_fraction: float = 0.0
    """The last step's learning rate, as a share of the peak."""

    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only."""

    beta2: float = 0.95
    """Decay of the mean of the squared gradients."""


class ManyRuns:
    """Models ``model(config)``, trained on ``loss`` of batches ``sample(key, data)``.

    Attributes:
        runs: (learning rate, seed) of each.
        data: what batches are drawn from; it may be replaced between steps.
        step: steps done.
        steps: steps to do; lowered before training, the schedule is that of the training, faster.
        params: parameters, with a leading axis of runs.
        losses: of each step done, those before a copy was continued from included, [step, runs].
    """

    def __init__(
        self,
        config: ModelConfig,
        sample: Sample,
        loss: Loss,
        training: Training,
        *,
        data: PyTree,
        learning_rates: tuple[float, ...],
        seeds: tuple[int, ...],
        model: Callable[..., LanguageModel] = LanguageModel,
    ):
        self._model = model
        self.config, self.training, self.data = config, training, data
        self.runs = tuple(itertools.product(learning_rates, seeds))
        self.step, self.steps = 0, training.steps
        graph, abstract = jax.eval_shape(lambda: nnx.split(model(config, rngs=nnx.Rngs(0)), nnx.Param))
        axes = nnx.to_pure_dict(
            jax.tree.map(
                lambda parameter: jax.sharding.PartitionSpec(*parameter.get_metadata("out_sharding")),
                abstract,
                is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
            )
        )
        self._graph = graph
        self._optimizer = adamw(OptimizerConfig(weight_decay=training.weight_decay, beta2=training.beta2), axes)
        self._sample, self._loss = sample, loss
        self._rates = jnp.array([rate for rate, _ in self.runs], jnp.float32)
        self._keys = jax.vmap(jax.random.key)(jnp.array([seed for _, seed in self.runs]))
        self.params, self._moments = jax.jit(jax.vmap(self._initial))(self._keys)
        self.losses = np.zeros((0, len(self.runs)), np.float32)
        self._programs = {}

    def build(self, params: PyTree) -> LanguageModel:
        """The model with these parameters."""
        return nnx.merge(self._graph, nnx.State(params))

    def compile(self, count: int, *data: PyTree) -> None:
        """Compiles the program of ``count`` steps on each of ``data`` (None given: on the runs' own), side by side."""
        wanted = {self._program_key(count, of): of for of in data or (self.data,)}
        missing = {key: of for key, of in wanted.items() if key not in self._programs}
        advance = jax.jit(self._scan, static_argnames="count", donate_argnums=(0, 1))
        lowered = [
            advance.lower(self.params, self._moments, of, jnp.int32(0), jnp.float32(1), count=count)
            for of in missing.values()
        ]
        with ThreadPoolExecutor() as threads:
            self._programs.update(zip(missing, threads.map(lambda program: program.compile(), lowered), strict=True))

    def seconds_for(self, count: int) -> float:
        """What ``count`` steps take, measured; nothing changes."""
        program = self._programs[self._program_key(count, self.data)]
        arguments = jax.tree.map(jnp.copy, (self.params, self._moments))
        jax.block_until_ready(arguments)
        started = time.monotonic()
        jax.block_until_ready(program(*arguments, self.data, jnp.int32(0), jnp.float32(1)))
        return time.monotonic() - started

    def train(
        self, steps_per_call: int, copy: Path | None = None, until: int | None = None
    ) -> Iterator[Float[np.ndarray, "steps runs"]]:
        """Losses, ``steps_per_call`` steps at a time, up to step ``until`` (None: the last).

        With ``copy``, a file, continues where an earlier try was.
        """
        if copy is not None and copy.exists() and self.step == 0:
            self._restore(copy)
        until, copied = min(self.steps if until is None else until, self.steps), time.monotonic()
        while self.step < until:
            count = min(steps_per_call, until - self.step)
            self.compile(count)
            program = self._programs[self._program_key(count, self.data)]
            pace = (self.training.steps - 1) / max(self.steps - 1, 1)
            self.params, self._moments, losses = program(
                self.params, self._moments, self.data, jnp.int32(self.step), jnp.float32(pace)
            )
            self.step += count
            self.losses = np.concatenate([self.losses, losses])
            yield np.asarray(losses)
            if copy is not None and time.monotonic() - copied > SECONDS_BETWEEN_COPIES:
                self._save(copy)
                copied = time.monotonic()

    def evaluate(self, metrics: Callable[[LanguageModel, Batch], PyTree], batches: Batch) -> PyTree[np.ndarray]:
        """``metrics(model, batch)`` of each run, averaged over ``batches``, whose leaves have a leading axis for it."""
        return jax.tree.map(np.asarray, _averaged(self, metrics, self.params, batches))

    @staticmethod
    def _program_key(count, data):
        return count, tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(data))

    def _initial(self, key):
        model = self._model(self.config, rngs=nnx.Rngs(key))
        params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
        return params, self._optimizer.init(params)

    def _scan(self, params, moments, data, first, pace, *, count):
        def step(carry, index):
            advanced = jax.vmap(self._one, in_axes=(0, 0, 0, 0, None, None, None))
            *carry, losses = advanced(*carry, self._keys, self._rates, index, pace, data)
            return tuple(carry), losses

        (params, moments), losses = jax.lax.scan(step, (params, moments), first + jnp.arange(count))
        return params, moments, losses

    def _one(self, params, moments, key, peak, index, pace, data):
        """One step of one run."""
        batch = self._sample(jax.random.fold_in(key, index), data)
        loss, gradients = jax.value_and_grad(lambda p: self._loss(self.build(p), batch))(params)
        schedule = OptimizerConfig(
            learning_rate=peak,
            initial_learning_rate=0.0,
            final_learning_rate=peak * self.training.final_fraction,
            warmup_steps=self.training.warmup_steps,
        )
        rate = learning_rate(index * pace, schedule, self.training.steps)
        updates, moments = self._optimizer.update(gradients, moments, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), moments, loss

    def _save(self, copy: Path) -> None:
        leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves((self.params, self._moments)))}
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{copy.name}.partial.npz")
        np.savez(partial, step=self.step, losses=self.losses, **leaves)
        os.replace(partial, copy)

    def _restore(self, copy: Path) -> None:
        with np.load(copy) as kept:
            self.step, self.losses = int(kept["step"]), kept["losses"]
            leaves, tree = jax.tree.flatten((self.params, self._moments))
            self.params, self._moments = tree.unflatten([jnp.asarray(kept[str(i)]) for i in range(len(leaves))])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _averaged(runs: ManyRuns, metrics: Callable, params: PyTree, batches: Batch) -> PyTree:
    def of_run(params):
        means = jax.lax.map(lambda batch: metrics(runs.build(params), batch), batches)
        return jax.tree.map(lambda x: jnp.mean(x, 0), means)

    return jax.vmap(of_run)(params)


@contextlib.contextmanager
def turn(lock: Path | None) -> Iterator[None]:
    """Waits until no other process is inside with the same lock file: one GPU, several processes that compile at once
    and train one after the other. None: no waiting."""
    if lock is None:
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file, or the end of the process, gives the lock back


def text_windows(length: int, rows: int) -> Sample:
    """A sample function: ``rows`` windows of ``length`` + 1 tokens from anywhere in a text, the data."""

    def sample(key: Array, text: Int[Array, "N"]) -> Int[Array, "rows length+1"]:
        starts = jax.random.randint(key, (rows, 1), 0, text.shape[0] - length)
        return text[starts + jnp.arange(length + 1)]

    return sample
