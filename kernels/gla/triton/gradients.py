"""The gradients of q, k and the gates, chunk by chunk, from the states around each chunk and their gradients.

    dq = exp(b) (do S^T) + intra          dk = exp(b_63 - b) (v dS^T) + intra          dP = tril(do v^T)

The gate at t weighs every pair (i, j) with j < t <= i. The closed form, the sum over i >= t of (q dq - k dk) along the
whole sequence, is a difference of large sums. Here pairs are added up by where they lie, so that rounding cannot grow
with the length:

    both in the chunk        sum over i >= t of (q dq - k dk), of these pairs alone, rounded alike, without the diagonal
    j before the chunk       sum over i >= t of q (do S^T)
    i after it               sum over j < t of k (v dS^T)
    j before, i after        exp(b_63) times the sum over v of S dS
"""

import triton
import triton.language as tl

from .weights import BEFORE, FLOOR, FROM, INTO, OUT_OF, between, levels_of, middle_of, same_block, summed


@triton.jit
def products(
    do_ptr,
    v_ptr,
    T,
    dp_ptr,
    H: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dP of one chunk of one query head, mirrored above its diagonal: each half serves one side of the pairs.

    Reads do [B, T, H, V], v [B, T, G, V]. Writes dp [B, T, H, 64].
    """
    operand = dp_ptr.dtype.element_ty
    chunks = T // 64
    chunk, row = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    b, h = (row // H).to(tl.int64), row % H
    i, j, values = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :], tl.arange(0, VALUES)[None, :]
    t = b * T + chunk * 64 + i
    of_do = do_ptr + (t * H + h) * V + values
    of_v = v_ptr + (t * G + h // (H // G)) * V + values
    dp = tl.zeros([64, 64], tl.float32)
    for start in range(0, V, VALUES):
        do, v = tl.load(of_do + start).to(operand), tl.load(of_v + start).to(operand)
        dp = tl.dot(do, tl.trans(v), dp, input_precision=PRECISION)
    dp = tl.where(i >= j, dp, tl.trans(dp))
    tl.store(dp_ptr + (t * H + h) * 64 + j, dp.to(operand))


@triton.jit
def gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    do_ptr,
    dp_ptr,
    states_ptr,
    d_states_ptr,
    documents_ptr,
    tables_ptr,
    T,
    dq_ptr,
    dk_ptr,
    dg_ptr,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    PACKED: tl.constexpr,
    LIMIT: tl.constexpr,
    GATE_LIMBS: tl.constexpr,
    LIMBS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, dk, dg [B, T, H, K] of one chunk of one query head, for a block of KEYS.

    Reads q [B, T, H, K], k and g [B, T, G, K], v [B, T, G, V], do [B, T, H, V], dp of `products`, the states entering
    each chunk and the gradients of those leaving it [B, H, T / 64, K, V] and, where PACKED, documents [B, T]: numbers
    that do not come back. LIMBS bfloat16 numbers stand for a float32 one where terms of both signs are added up.
    """
    operand = states_ptr.dtype.element_ty
    chunks = T // 64
    block, row = tl.program_id(0) % (K // KEYS), tl.program_id(0) // (K // KEYS)
    chunk, row = row % chunks, row // chunks
    b, h = (row // H).to(tl.int64), row % H
    g = h // (H // G)
    i, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    t = b * T + chunk * 64 + i
    keys = block * KEYS + tl.arange(0, KEYS)
    values = tl.arange(0, VALUES)

    dq = tl.zeros([64, KEYS], tl.float32)
    dk = tl.zeros([64, KEYS], tl.float32)
    crossing = tl.zeros([KEYS], tl.float32)
    of_do = do_ptr + (t * H + h) * V + values[None, :]
    of_v = v_ptr + (t * G + g) * V + values[None, :]
    of_state = (((b * H + h) * chunks + chunk) * K + keys[:, None]) * V + values[None, :]
    for start in range(0, V, VALUES):
        do = tl.load(of_do + start).to(operand)
        v = tl.load(of_v + start).to(operand)
        state = tl.load(states_ptr + of_state + start)
        d_state = tl.load(d_states_ptr + of_state + start)
        dq = tl.dot(do, tl.trans(state), dq, input_precision=PRECISION)
        dk = tl.dot(v, tl.trans(d_state), dk, input_precision=PRECISION)
        crossing += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)

    of_q = (t * H + h) * K + keys[None, :]
    of_k = (t * G + g) * K + keys[None, :]
    gates = tl.maximum(tl.load(g_ptr + of_k).to(tl.float32), FLOOR)
    q = tl.load(q_ptr + of_q).to(tl.float32) * SCALE
    k = tl.load(k_ptr + of_k).to(tl.float32)

    e = tl.exp(summed(tl.load(tables_ptr + OUT_OF + i * 64 + j), gates, GATE_LIMBS))
    later = (k * e).to(operand).to(tl.float32) * dk
    dk *= e
    dg = summed(tl.load(tables_ptr + BEFORE + i * 64 + j), later, LIMBS)
    dg += (crossing * tl.exp(tl.sum(gates, 0)))[None, :]
    e = tl.exp(summed(tl.load(tables_ptr + INTO + i * 64 + j), gates, GATE_LIMBS))
    change = (q * e).to(operand).to(tl.float32) * dq
    dq *= e

    dp = tl.load(dp_ptr + (t * H + h) * 64 + j)
    diagonal = tl.sum(tl.where(i == j, dp.to(tl.float32), 0.0), 1)[:, None]
    dq += diagonal * k
    dk += diagonal * q
    levels = levels_of(tables_ptr, i, j, gates, LIMIT, GATE_LIMBS)
    for level in range(levels):
        size = 64 >> level
        right = i >= middle_of(i, size)
        e = tl.exp(summed(between(tables_ptr, i, j, level), gates, GATE_LIMBS))
        x = (tl.where(right, q, k) * e).to(operand)
        pairs = same_block(i, j, size) & (right != (j >= middle_of(j, size)))
        y = tl.dot(tl.where(pairs, dp, 0.0), x, input_precision=PRECISION)
        dq += tl.where(right, y * e, 0.0)
        dk += tl.where(right, 0.0, y * e)
        y *= x.to(tl.float32)
        change += tl.where(right, y, -y)
    if levels < 6:
        size = 64 >> levels
        pairs = same_block(i, j, size)
        exponents = summed(between(tables_ptr, i, j, levels), gates, GATE_LIMBS)
        exponents = tl.where(i >= middle_of(i, size), exponents, -exponents)
        e = tl.exp(exponents)
        x = (k * tl.exp(-exponents)).to(operand)
        y = tl.dot(tl.where(pairs & (i > j), dp, 0.0), x, input_precision=PRECISION)
        dq += y * e
        q_mid = (q * e).to(operand)
        change += q_mid.to(tl.float32) * y
        y = tl.dot(tl.where(pairs & (i < j), dp, 0.0), q_mid, input_precision=PRECISION)
        dk += y * tl.exp(-exponents)
        change -= x.to(tl.float32) * y

    tl.store(dq_ptr + of_q, (dq * SCALE).to(dq_ptr.dtype.element_ty))
    of_k = (t * H + h) * K + keys[None, :]
    tl.store(dk_ptr + of_k, dk.to(dk_ptr.dtype.element_ty))
    after = tl.load(tables_ptr + FROM + i * 64 + j)
    if PACKED:
        own = documents_ptr + b * T + chunk * 64
        after = tl.where(tl.load(own + i) == tl.load(own + j), after, 0.0)
    dg += summed(after, change, LIMBS)
    dg = tl.where(gates > FLOOR, dg, 0.0)
    tl.store(dg_ptr + of_k, dg.to(dg_ptr.dtype.element_ty))
