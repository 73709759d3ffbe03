"""One token as one Triton kernel, through Pallas: a program holds some columns of a head's state."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

COLUMNS = 16
WARPS = 4


def unsupported(projected, state, *, widths, platform) -> str | None:
    if platform != "gpu":
        return f"it needs a GPU, this is {platform}"
    if widths.key & (widths.key - 1) or widths.key > 1024:
        return f"K is {widths.key}, it needs a power of two up to 1024"
    if widths.value % COLUMNS:
        return f"V is {widths.value}, it needs a multiple of {COLUMNS}"
    return None


@functools.partial(jax.jit, static_argnames=("widths", "temperature", "clamp_min", "interpret"))
def gla_decode(projected, gate_up, gate_bias, state, *, widths, temperature, clamp_min, interpret=False):
    """As in `kernels.gla_decode`."""
    batch = state.shape[0]
    kernel = functools.partial(_kernel, widths=widths, temperature=temperature, clamp_min=clamp_min)
    return pl.pallas_call(
        kernel,
        grid=(batch, widths.heads, widths.value // COLUMNS),
        out_shape=(
            jax.ShapeDtypeStruct((batch, widths.heads * widths.value), projected.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ),
        input_output_aliases={3: 1},
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="gla_decode",
    )(projected, gate_up, gate_bias, state)


def _kernel(projected_ref, up_ref, bias_ref, state_ref, o_ref, new_ref, *, widths, temperature, clamp_min):
    row, head, block = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    group = head // (widths.heads // widths.groups)
    q_start, k_start, v_start, low_start, _ = widths.offsets

    def read(start, length):
        return projected_ref[row, pl.ds(start, length)].astype(jnp.float32)

    q = read(q_start + head * widths.key, widths.key)
    k = read(k_start + group * widths.key, widths.key)
    v = read(v_start + group * widths.value + block * COLUMNS, COLUMNS)
    keys = pl.ds(group * widths.key, widths.key)
    logits = bias_ref[keys].astype(jnp.float32)
    for index in range(widths.rank):
        logits += projected_ref[row, low_start + index].astype(jnp.float32) * up_ref[index, keys].astype(jnp.float32)
    log_alpha = (jnp.minimum(logits, 0.0) - jnp.log(1 + jnp.exp(-jnp.abs(logits)))) / temperature
    if clamp_min is not None:
        log_alpha = jnp.maximum(log_alpha, clamp_min)
    alpha = jnp.exp(log_alpha.astype(projected_ref.dtype).astype(jnp.float32))

    columns = pl.ds(block * COLUMNS, COLUMNS)
    state = alpha[:, None] * state_ref[row, head, :, columns] + k[:, None] * v[None]
    new_ref[row, head, :, columns] = state
    o = widths.key**-0.5 * jnp.sum(q[:, None] * state, 0)
    o_ref[row, pl.ds(head * widths.value + block * COLUMNS, COLUMNS)] = o.astype(o_ref.dtype)
