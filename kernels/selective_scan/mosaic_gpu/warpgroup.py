"""How one warpgroup holds 128 channels of 16 states: a channel per thread, its states side by side in registers."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

CHANNELS = 128  # of one block: one per thread
STATES = 16
VECTOR = 4  # float32 numbers of one load

STATE = plgpu.Layout.TCGEN05_TMEM_NATIVE(VECTOR)  # [CHANNELS, STATES]: thread i holds row i
CHANNEL = STATE.reduce(1)  # [CHANNELS]: a number per thread
STATE_ROW = STATE.reduce(0)  # [STATES]: the same numbers in every thread

F32, BF16 = jnp.float32, jnp.bfloat16
LOG2_E, LN_2 = math.log2(math.e), math.log(2)


def load(ref, layout) -> jax.Array:
    """Shared or device memory to registers, float32."""
    return plgpu.load(ref, layout=layout, optimized=False).astype(F32)


def of_channels(x: jax.Array) -> jax.Array:
    """A number per channel, for each of its states."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (CHANNELS, STATES), (0,)), STATE)


def of_states(x: jax.Array) -> jax.Array:
    """A number per state, for each of the channels."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (CHANNELS, STATES), (1,)), STATE)


def over_states(x: jax.Array) -> jax.Array:
    """Sums over the states of each channel: within a thread."""
    return jnp.sum(x, axis=1)
