"""AdamW as the paper has it: clipping, decay on matrices only, and a cosine learning rate with linear warm-up."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from glax.errors import UserError
from glax.training.config import OptimizerConfig


def learning_rate(step: Int[Array, ""], config: OptimizerConfig, steps: int) -> Float[Array, ""]:
    """Learning rate of step ``step`` (from 0) of a run of ``steps``: initial -> peak linearly, then a cosine to final.

    Step 0 has the initial rate, step ``warmup_steps`` the peak, step ``steps - 1`` the final one.
    """
    step = jnp.asarray(step, jnp.float32)
    warm = step / max(config.warmup_steps, 1)
    rising = config.initial_learning_rate + warm * (config.learning_rate - config.initial_learning_rate)
    done = jnp.clip((step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1), 0.0, 1.0)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    falling = config.final_learning_rate + cosine * (config.learning_rate - config.final_learning_rate)
    return jnp.where(step < config.warmup_steps, rising, falling)


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises UserError for numbers with which nothing could be learned. (The config itself may hold traced ones.)"""
    for name in ("learning_rate", "initial_learning_rate", "final_learning_rate", "warmup_steps", "weight_decay"):
        if not getattr(config, name) >= 0:
            raise UserError(f"optimizer.{name} is {getattr(config, name)}: it must not be negative")
    for name in ("epsilon", "clip_norm"):
        if not getattr(config, name) > 0:
            raise UserError(f"optimizer.{name} is {getattr(config, name)}: it must be positive")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"optimizer.{name} is {getattr(config, name)}: it must be from 0 to below 1")


def adamw(config: OptimizerConfig, axes: PyTree[PartitionSpec]) -> optax.GradientTransformation:
    """Clip, Adam and decoupled weight decay, *before* the learning rate: the step multiplies by ``-learning_rate``.

    The learning rate is left out so that it is a function of the training step alone, also after skipped steps.
    ``axes`` are the logical axis names of each parameter, as from ``parameter_axes``.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix(axes)),
    )


def is_matrix(axes: PyTree[PartitionSpec]) -> PyTree[bool]:
    """Which parameters are matrices.

    The axis that stacks scanned layers does not count: stacked norms are vectors. Nor does the state axis of Mamba's
    decay rates, which are no map from one vector to another either.
    """
    return jax.tree.map(lambda names: sum(name not in ("layers", "state") for name in names) >= 2, axes)
