"""The products as one Triton kernel, through Pallas: each program reads a few whole rows of W, once."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

MAX_BATCH = 8  # beyond it the matrix units are faster, and XLA's products use them
WARPS = 4
LONGEST = 2048  # elements of a row that are one array
# On an H200 these, of those tried (experiments/results/decode_speed), gave GLA 1.3B the most tokens per second.
ROWS = 2  # of W that a program asks for at a time
GROUPS = 4  # of them that it makes, one after the other


def unsupported(x, weight, *, norm_weight, gate, residual, swiglu, platform) -> str | None:
    head = x.shape[1] if norm_weight is None else norm_weight.shape[0]
    if platform != "gpu":
        return f"it needs a GPU, this is {platform}"
    if x.shape[0] > MAX_BATCH:
        return f"x has {x.shape[0]} rows, it takes at most {MAX_BATCH}"
    if len(_pieces(head)) > 16:
        return f"x is normalised over {head} elements, it needs a sum of at most 16 powers of two"
    return None


@functools.partial(jax.jit, static_argnames=("swiglu", "eps", "dtype", "interpret"))
def matvec(x, weight, *, norm_weight, gate, residual, swiglu, eps, dtype, interpret=False):
    """As in `kernels.matvec`."""
    batch, width = x.shape
    outputs = weight.shape[0] // 2 if swiglu else weight.shape[0]
    rows, groups = _rows_and_groups(batch, outputs)
    kernel = functools.partial(
        _kernel,
        rows=rows,
        groups=groups,
        head=width if norm_weight is None else norm_weight.shape[0],
        gate_offset=None if gate is None else gate.shape[1] - width,
        has_norm=norm_weight is not None,
        has_residual=residual is not None,
        swiglu=swiglu,
        eps=eps,
        interpret=interpret,
    )
    operands = [array for array in (x, weight, norm_weight, gate, residual) if array is not None]
    return pl.pallas_call(
        kernel,
        grid=(outputs // (rows * groups),),
        out_shape=jax.ShapeDtypeStruct((batch, outputs), dtype),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="matvec",
    )(*operands)


def _rows_and_groups(batch, outputs):
    """Outputs that a program makes at a time, and how many times."""
    rows = math.gcd(outputs, ROWS)
    return rows, math.gcd(outputs // rows, GROUPS if batch == 1 else 1)  # of a batch, x would be made for each group


def _pieces(size):
    """(start, length) of powers of two, long ones first, that make up ``size``: Triton's arrays have such sizes."""
    pieces, start, length = [], 0, LONGEST
    if size // (size & -size) <= 16:  # equal ones, which can be added up before they are summed
        length = min(length, size & -size)
    while start < size:
        while length > size - start:
            length //= 2
        pieces.append((start, length))
        start += length
    return pieces


def _kernel(x_ref, weight_ref, *refs, rows, groups, head, gate_offset, has_norm, has_residual, swiglu, eps, interpret):
    refs = list(refs)
    norm_ref = refs.pop(0) if has_norm else None
    gate_ref = None if gate_offset is None else refs.pop(0)
    residual_ref = refs.pop(0) if has_residual else None
    (y_ref,) = refs
    batch, width = x_ref.shape
    outputs = y_ref.shape[1]
    dtype = x_ref.dtype
    pieces = [(start, offset, length) for start in range(0, width, head) for offset, length in _pieces(head)]

    def outputs_of(group):
        return (pl.program_id(0) * groups + group) * rows

    def weights_of(group):
        """By part, by piece."""
        firsts = [outputs_of(group) + part * outputs for part in range(2 if swiglu else 1)]
        return [[weight_ref[pl.ds(first, rows), pl.ds(s + o, n)] for s, o, n in pieces] for first in firsts]

    def x_of(row):
        """By piece, after the norm and the gate."""
        xs = []
        for start, offset, length in pieces:
            x = x_ref[row, pl.ds(start + offset, length)].astype(jnp.float32)
            if has_norm:
                if offset == 0:
                    scale = _inverse_rms(x_ref, row, start, head, eps)
                x = x * scale * norm_ref[pl.ds(offset, length)].astype(jnp.float32)
            if gate_ref is not None:
                x = x * _silu(gate_ref[row, pl.ds(gate_offset + start + offset, length)].astype(jnp.float32))
            xs.append(x.astype(dtype).astype(jnp.float32))
        return xs

    def asked_for(weights):
        """All of them before anything that follows: the compiler would put loads off to where they are used."""
        if not interpret:
            plt.debug_barrier()
        return weights

    # The next group's weights are asked for before this one's are summed, so that some are always on their way.
    following = asked_for(weights_of(0))
    first_x = x_of(0)
    for group in range(groups):
        weights = following
        if group + 1 < groups:
            following = asked_for(weights_of(group + 1))
        mine = pl.ds(outputs_of(group), rows)
        for row in range(batch):
            xs = first_x if row == 0 else x_of(row)
            sums = [
                _sum([w.astype(jnp.float32) * x[None] for w, x in zip(part, xs, strict=True)], axis=1)
                for part in weights
            ]
            y = sums[0]
            if swiglu:
                gate, up = (part.astype(dtype).astype(jnp.float32) for part in sums)
                y = _silu(gate).astype(dtype).astype(jnp.float32) * up
            if has_residual:
                y = residual_ref[row, mine].astype(jnp.float32) + y.astype(dtype).astype(jnp.float32)
            y_ref[row, mine] = y.astype(y_ref.dtype)


def _sum(arrays, axis):
    """Of all of them, along this axis, their last; a sum over threads takes longer than one within them."""
    by_length = {}
    for array in arrays:
        length = array.shape[-1]
        by_length[length] = by_length[length] + array if length in by_length else array
    return sum(jnp.sum(array, axis) for array in by_length.values())


def _inverse_rms(x_ref, row, start, head, eps):
    xs = [x_ref[row, pl.ds(start + offset, length)].astype(jnp.float32) for offset, length in _pieces(head)]
    return jax.lax.rsqrt(_sum([x * x for x in xs], axis=0) / head + eps)


def _silu(x):
    return x / (1 + jnp.exp(-x))
