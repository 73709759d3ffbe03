"""The products as one Triton kernel, through Pallas: each program reads a few whole rows of W, once."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

MAX_BATCH = 8  # beyond it the matrix units are faster, and XLA's products use them
ROWS = 4
WARPS = 4
LONGEST = 2048  # elements of a row that a program holds at a time


def unsupported(x, weight, *, norm_weight, gate, residual, swiglu, platform) -> str | None:
    outputs = weight.shape[0] // 2 if swiglu else weight.shape[0]
    head = x.shape[1] if norm_weight is None else norm_weight.shape[0]
    if platform != "gpu":
        return f"it needs a GPU, this is {platform}"
    if x.shape[0] > MAX_BATCH:
        return f"x has {x.shape[0]} rows, it takes at most {MAX_BATCH}"
    if outputs % ROWS:
        return f"weight makes {outputs} outputs, it needs a multiple of {ROWS}"
    if len(_pieces(head)) > 8:
        return f"x is normalised over {head} elements, it needs a sum of at most 8 powers of two"
    return None


@functools.partial(jax.jit, static_argnames=("swiglu", "eps", "dtype", "interpret"))
def matvec(x, weight, *, norm_weight, gate, residual, swiglu, eps, dtype, interpret=False):
    """As in `kernels.matvec`."""
    batch, width = x.shape
    outputs = weight.shape[0] // 2 if swiglu else weight.shape[0]
    head = width if norm_weight is None else norm_weight.shape[0]
    kernel = functools.partial(
        _kernel,
        head=head,
        gate_offset=None if gate is None else gate.shape[1] - width,
        has_norm=norm_weight is not None,
        has_residual=residual is not None,
        swiglu=swiglu,
        eps=eps,
    )
    operands = [array for array in (x, weight, norm_weight, gate, residual) if array is not None]
    return pl.pallas_call(
        kernel,
        grid=(outputs // ROWS,),
        out_shape=jax.ShapeDtypeStruct((batch, outputs), dtype),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="matvec",
    )(*operands)


def _pieces(size):
    """(start, length) of powers of two, long ones first, that make up ``size``: Triton's arrays have such sizes."""
    pieces, start, length = [], 0, LONGEST
    while start < size:
        while length > size - start:
            length //= 2
        pieces.append((start, length))
        start += length
    return pieces


def _kernel(x_ref, weight_ref, *refs, head, gate_offset, has_norm, has_residual, swiglu, eps):
    refs = list(refs)
    norm_ref = refs.pop(0) if has_norm else None
    gate_ref = None if gate_offset is None else refs.pop(0)
    residual_ref = refs.pop(0) if has_residual else None
    (y_ref,) = refs
    batch, width = x_ref.shape
    outputs = y_ref.shape[1]
    dtype = x_ref.dtype
    first = pl.program_id(0) * ROWS
    parts = 2 if swiglu else 1

    # The weights are asked for piece by piece and used for all rows of x while they are in registers.
    sums = [[jnp.zeros((ROWS,), jnp.float32) for _ in range(parts)] for _ in range(batch)]
    scales = {}
    for start in range(0, width, head):
        for offset, length in _pieces(head):
            here = pl.ds(start + offset, length)
            weights = [
                weight_ref[pl.ds(first + part * outputs, ROWS), here].astype(jnp.float32) for part in range(parts)
            ]
            for row in range(batch):
                x = x_ref[row, here].astype(jnp.float32)
                if has_norm:
                    if offset == 0:
                        scales[row] = _inverse_rms(x_ref, row, start, head, eps)
                    x = x * scales[row] * norm_ref[pl.ds(offset, length)].astype(jnp.float32)
                if gate_ref is not None:
                    x = x * _silu(gate_ref[row, pl.ds(gate_offset + start + offset, length)].astype(jnp.float32))
                x = x.astype(dtype).astype(jnp.float32)
                for part in range(parts):
                    sums[row][part] += jnp.sum(weights[part] * x[None], 1)
    mine = pl.ds(first, ROWS)
    for row in range(batch):
        y = sums[row][0]
        if swiglu:
            gate, up = (part.astype(dtype).astype(jnp.float32) for part in sums[row])
            y = _silu(gate).astype(dtype).astype(jnp.float32) * up
        if has_residual:
            y = residual_ref[row, mine].astype(jnp.float32) + y.astype(dtype).astype(jnp.float32)
        y_ref[row, mine] = y.astype(y_ref.dtype)


def _inverse_rms(x_ref, row, start, head, eps):
    squares = 0.0
    for offset, length in _pieces(head):
        x = x_ref[row, pl.ds(start + offset, length)].astype(jnp.float32)
        squares += jnp.sum(x * x)
    return jax.lax.rsqrt(squares / head + eps)


def _silu(x):
    return x / (1 + jnp.exp(-x))
