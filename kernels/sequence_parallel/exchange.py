"""What shards of a sequence tell each other: the states between them, and the few tokens before each.

Shard i of N holds tokens i T/N to (i + 1) T/N - 1. A linear recurrence S' = d S + u takes it from the state S_i that
enters it to d_i S_i + U_i, with d_i its decays' product and U_i what it builds from zero; such pairs compose as
(d_1, U_1) then (d_2, U_2) = (d_1 d_2, d_2 U_1 + U_2), so one exchange of them gives each shard the state that enters
it (LASP-2, Sun et al. 2025, arXiv 2502.07563). The bytes do not depend on T.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ..dispatch import vary_alike

# The name under which a jax.checkpoint policy can keep what was exchanged, so that it is exchanged once.
SAVED_NAME = "sequence_exchange"


def entering_state(decay: Float[Array, "*#S"], own: Float[Array, "*S"], axis_name: str) -> Float[Array, "*S"]:
    """The state that enters this shard: sum over j < i of (product of d_l, j < l < i) U_j; zero in the first shard.

    Args:
      decay: d_i, any shape of own's rank that broadcasts against it.
      own: U_i, float32. Of any shape: the recurrence is elementwise in the state.
      axis_name: of the mesh; its N shards are in the order of the sequence.

    Sends decay and own once, and the gradient of the result once: bytes received are (N-1) x (2 |own| + |decay|) x 4.
    """
    return _entering_state(*vary_alike(decay, own), axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _entering_state(decay, own, axis_name):
    return _forward(decay, own, axis_name)[0]


def _forward(decay, own, axis_name):
    index = jax.lax.axis_index(axis_name)
    decays, states = jax.lax.all_gather((decay, own), axis_name)

    def then(state, shard):
        j, decay, own = shard
        return jnp.where(j < index, decay * state + own, state), None

    # Zero, and varying over the mesh as the result does, which scan wants of its carry.
    zero = jnp.where(index < 0, own, 0.0)
    entering, _ = jax.lax.scan(then, zero, (jnp.arange(len(states)), decays, states))
    entering, decays = checkpoint_name((entering, decays), SAVED_NAME)
    return entering, (decays, entering)


def _backward(axis_name, residuals, d_entering):
    """The mirror image: gradients of the states that leave, from those of the states that enter later shards."""
    decays, entering = residuals
    index = jax.lax.axis_index(axis_name)
    gradients = jax.lax.all_gather(d_entering, axis_name)

    def then(d_state, shard):
        j, decay, own = shard
        return jnp.where(j > index, decay * d_state + own, d_state), None

    zero = jnp.where(index < 0, d_entering, 0.0)
    shards = (jnp.arange(len(gradients)), decays, gradients)
    d_leaving, _ = jax.lax.scan(then, zero, shards, reverse=True)
    d_decay = entering * d_leaving
    shared = tuple(axis for axis, size in enumerate(decays.shape[1:]) if size != d_decay.shape[axis])
    return jnp.sum(d_decay, shared, keepdims=True), d_leaving


_entering_state.defvjp(_forward, _backward)


def tokens_before(x: Array, count: int, axis_name: str) -> Array:
    """The `count` tokens before this shard's first, [B, count, ...], from x [B, T/N, ...]; zeros before the sequence.

    Raises ValueError where a shard is shorter than `count`: only the shard before is asked.
    """
    if count > x.shape[1]:
        raise ValueError(f"x: got {x.shape[1]} tokens in a shard, wanted at least the {count} that the next one needs")
    shards = jax.lax.axis_size(axis_name)
    pairs = [(i, i + 1) for i in range(shards - 1)]
    return jax.lax.ppermute(x[:, x.shape[1] - count :], axis_name, pairs)


def first_tokens_continue(segment_ids: Int[Array, "B T"], axis_name: str) -> Bool[Array, "B"]:
    """Whether the first token of this shard is of the same segment as the token before; True in the first shard."""
    before = tokens_before(segment_ids, 1, axis_name)[:, 0]
    return (jax.lax.axis_index(axis_name) == 0) | (before == segment_ids[:, 0])
