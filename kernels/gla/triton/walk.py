"""Across chunks: the walk that makes their states, and the rows that read them. Both serve forward and backward.

    S' = decay S + x^T y           states: x, y = k_out, v from first to last; q_in, do from last to first give dS
    o  = x S + W y                 rows:   x, W, y = q_in, P, v give o; k_out, P^T, do, on dS, give dv

All that is gated has been gated by `prepare`: nothing here knows of gates or documents.
"""

import triton
import triton.language as tl


@triton.jit
def states(
    x_ptr,
    y_ptr,
    decay_ptr,
    boundary_ptr,
    T,
    states_ptr,
    last_ptr,
    H: tl.constexpr,
    X_RATIO: tl.constexpr,
    Y_RATIO: tl.constexpr,
    DECAY_RATIO: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    HAS_BOUNDARY: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state before each chunk (after it, in reverse), and the one after the last, for a block of KEYS x VALUES.

    Reads x [B, T, H / X_RATIO, K], y [B, T, H / Y_RATIO, V], decay [B, T / 64, H / DECAY_RATIO, K] and, where it
    starts from something, boundary [B, H, K, V] float32. Writes states [B, H, T / 64, K, V], last [B, H, K, V] float32.
    """
    operand = states_ptr.dtype.element_ty
    chunks = T // 64
    block, row = tl.program_id(0) % ((K // KEYS) * (V // VALUES)), tl.program_id(0) // ((K // KEYS) * (V // VALUES))
    b, h = (row // H).to(tl.int64), row % H
    keys = (block % (K // KEYS)) * KEYS + tl.arange(0, KEYS)
    values = (block // (K // KEYS)) * VALUES + tl.arange(0, VALUES)
    i = tl.arange(0, 64)[:, None]
    entries = keys[:, None] * V + values[None, :]
    state = tl.zeros([KEYS, VALUES], tl.float32)
    if HAS_BOUNDARY:
        state += tl.load(boundary_ptr + (b * H + h) * K * V + entries)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        tl.store(states_ptr + ((b * H + h) * chunks + chunk) * K * V + entries, state.to(operand))
        t = b * T + chunk * 64 + i
        x = tl.load(x_ptr + (t * (H // X_RATIO) + h // X_RATIO) * K + keys[None, :])
        y = tl.load(y_ptr + (t * (H // Y_RATIO) + h // Y_RATIO) * V + values[None, :])
        decay = tl.load(decay_ptr + ((b * chunks + chunk) * (H // DECAY_RATIO) + h // DECAY_RATIO) * K + keys)
        state = tl.dot(tl.trans(x), y.to(operand), state * decay[:, None], input_precision=PRECISION)
    tl.store(last_ptr + (b * H + h) * K * V + entries, state)


@triton.jit
def rows(
    x_ptr,
    states_ptr,
    p_ptr,
    y_ptr,
    T,
    o_ptr,
    H: tl.constexpr,
    X_RATIO: tl.constexpr,
    Y_RATIO: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x S + P y (P^T y where TRANSPOSED) of one chunk of one query head, for a block of VALUES.

    Reads x [B, T, H / X_RATIO, K], states [B, H, T / 64, K, V], p [B, T, H, 64], y [B, T, H / Y_RATIO, V].
    Writes o [B, T, H, V].
    """
    operand = states_ptr.dtype.element_ty
    chunks = T // 64
    block, row = tl.program_id(0) % (V // VALUES), tl.program_id(0) // (V // VALUES)
    chunk, row = row % chunks, row // chunks
    b, h = (row // H).to(tl.int64), row % H
    i, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    t = b * T + chunk * 64 + i
    keys = tl.arange(0, KEYS)
    values = block * VALUES + tl.arange(0, VALUES)[None, :]
    p = tl.load(p_ptr + (t * H + h) * 64 + j)
    y = tl.load(y_ptr + (t * (H // Y_RATIO) + h // Y_RATIO) * V + values).to(operand)
    o = tl.dot(tl.trans(p) if TRANSPOSED else p, y, input_precision=PRECISION)
    of_x = x_ptr + (t * (H // X_RATIO) + h // X_RATIO) * K + keys[None, :]
    of_s = states_ptr + (((b * H + h) * chunks + chunk) * K + keys[:, None]) * V + values
    for start in range(0, K, KEYS):
        o = tl.dot(tl.load(of_x + start), tl.load(of_s + start * V), o, input_precision=PRECISION)
    tl.store(o_ptr + (t * H + h) * V + values, o.to(o_ptr.dtype.element_ty))
