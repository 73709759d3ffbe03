"""The compiled training step: loss and gradients over microbatches, one update, and the non-finite guard."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from glax.models import LanguageModel
from glax.training.config import TrainConfig
from glax.training.optimizer import learning_rate
from glax.training.sharding import BATCH
from glax.training.state import Parameters, Plan, TrainState
from kernels import softmax_cross_entropy

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


def summed_loss(model: LanguageModel, batch: Batch) -> Float[Array, ""]:
    """Sum over the counted targets of a batch ``[b, T]`` of their negative log likelihood in nats."""
    hidden = model.hidden(batch["tokens"], segment_ids=batch["segment_ids"])
    # Gathered over fsdp here, once, and not in each of the cross entropy's blocks.
    unembedding = jax.lax.with_sharding_constraint(model.unembedding(), PartitionSpec(None, "tensor"))
    hidden, targets, weights = (_all_tokens(x) for x in (hidden, batch["targets"], batch["weights"]))
    with jax.named_scope("loss"):
        return jnp.sum(softmax_cross_entropy(hidden, unembedding, targets) * weights)


def _all_tokens(x: Array) -> Array:
    """``[B, T, ...]`` to ``[B T, ...]``, a device's tokens side by side: where tokens are sharded, none moves."""
    mesh = jax.sharding.get_abstract_mesh()
    rows, columns = (math.prod(mesh.shape[axis] for axis in axes) for axes in (BATCH, ("sequence",)))
    shards = x.reshape(rows, x.shape[0] // rows, columns, x.shape[1] // columns, *x.shape[2:])
    tokens = jnp.swapaxes(shards, 1, 2).reshape(-1, *x.shape[2:])
    return jax.lax.with_sharding_constraint(tokens, PartitionSpec((*BATCH, "sequence")))


def split_microbatches(batch: Batch, count: int, mesh: jax.sharding.Mesh) -> Batch:
    """``[B, T]`` to ``[count, B/count, T]``. Part i takes rows i, i + count, ...: rows stay on their device."""
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH, "sequence"))

    def split(rows: Array) -> Array:
        parts = rows.reshape(rows.shape[0] // count, count, *rows.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(parts, sharding)

    return jax.tree.map(split, batch)


def loss_and_gradients(
    plan: Plan, params: Parameters, batch: Batch, microbatches: int
) -> tuple[Float[Array, ""], PyTree[Float[Array, "..."]]]:
    """Mean loss per counted target of the whole batch, in nats, and its gradients in float32.

    Each microbatch is divided by the count of the whole batch, so the sum over microbatches is the big batch's mean
    whatever their own counts are.
    """
    shardings = plan.shardings.params
    mesh = jax.tree.leaves(shardings)[0].mesh
    count = jnp.maximum(jnp.sum(batch["weights"]), 1.0)

    def one(part: Batch) -> tuple[Float[Array, ""], PyTree]:
        loss, gradients = jax.value_and_grad(lambda p: summed_loss(plan.build(p), part) / count)(params)
        return loss, jax.lax.with_sharding_constraint(gradients, shardings)

    if microbatches == 1:
        return one(batch)

    def accumulate(total: tuple, part: Batch) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, one(part)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    zeros = jax.lax.with_sharding_constraint(zeros, shardings)
    total, _ = jax.lax.scan(accumulate, (jnp.zeros(()), zeros), split_microbatches(batch, microbatches, mesh))
    return total


def make_train_step(
    plan: Plan, config: TrainConfig, microbatches: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """``step(state, batch) -> (state, metrics)``, jitted; the old state's buffers are given up to the new one.

    A step whose loss or gradient norm is not finite leaves parameters and moments as they were and is counted.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, gradients = loss_and_gradients(plan, state.params, batch, microbatches)
        rate = learning_rate(state.step, config.optimizer, config.steps)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradients)
            updates, opt_state = plan.optimizer.update(gradients, state.opt_state, state.params)
            params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
            )
        skipped = jnp.where(finite, 0, 1)
        state = TrainState(
            params=params,
            opt_state=opt_state,
            step=state.step + 1,
            skipped=state.skipped + skipped,
            skipped_in_row=(state.skipped_in_row + 1) * skipped,
        )
        metrics = {
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "skipped": state.skipped,
            "skipped_in_row": state.skipped_in_row,
        }
        return state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(plan.shardings, None))


def make_loss(plan: Plan, microbatches: int) -> Callable[[Parameters, Batch], Float[Array, ""]]:
    """``loss(params, batch)``, jitted: ``summed_loss`` of a batch, in as many parts as the training step takes."""
    mesh = jax.tree.leaves(plan.shardings)[0].mesh

    def loss(params: Parameters, batch: Batch) -> Float[Array, ""]:
        model = plan.build(params)
        if microbatches == 1:
            return summed_loss(model, batch)
        parts = split_microbatches(batch, microbatches, mesh)
        return jnp.sum(jax.lax.map(lambda part: summed_loss(model, part), parts))

    return jax.jit(loss)
