"""Within a chunk of 64 tokens: sums of gates, weights of pairs, and the kernel that gates a chunk's rows.

With b the running sum of log_alpha, the weight of key j in output i is exp(b_i - b_j), a sum of the gates between
them. It is split at an anchor m: exp(b_i - b_m) goes to the query row, exp(b_m - b_j) to the key row, and the products
run on tensor cores. Each exponent is a sum of gates, a matrix of 0, 1 and -1 times the gates in bfloat16 limbs: no
large sums are ever subtracted from each other.

A *level* cuts the chunk into blocks of `size` rows and takes the pairs (right half, left half) of each, anchored at the
first row of the right half: both exponents are <= 0, for any gate. A *bounded* block takes all its pairs at once around
the same anchor: exponents of either sign, right while they stay within the limit.

    levels 0   blocks of 64 bounded           the chunk decays by less than the limit on either side of its middle row
    levels 2   sizes 64, 32, blocks of 16     every block of 16 rows does, around its own middle
    levels 6   sizes 64, ..., 2, single rows  anything, hard resets included

A reset (-inf), and so the first token of a document, is a gate of FLOOR: exp of it is 0 in float32, and everything that
crosses it is multiplied by that 0. The kernels know nothing else of documents.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

FLOOR = tl.constexpr(-128.0)  # nats: exp is 0 in float32 already at -104, and 0 * FLOOR is not NaN


INTO = tl.constexpr(7 * 64 * 64)  # where in `tables` the sums through, after, from and before a row are
OUT_OF = tl.constexpr(8 * 64 * 64)
FROM = tl.constexpr(9 * 64 * 64)
BEFORE = tl.constexpr(10 * 64 * 64)


def tables() -> jax.Array:
    """[11, 64, 64] of 0 and 1, to add up rows: 7 for `between`, then rows t <= i, t > i, t >= i and t < i."""
    i, t = jnp.arange(64)[:, None], jnp.arange(64)[None]
    anchors = [(i & -size) + (size >> 1) for size in (64, 32, 16, 8, 4, 2, 1)]
    rows = [(t > jnp.minimum(i, m)) & (t <= jnp.maximum(i, m)) for m in anchors]
    return jnp.stack([*rows, t <= i, t > i, t >= i, t < i]).astype(jnp.bfloat16)


@triton.jit
def summed(matrix, x, LIMBS: tl.constexpr):
    """matrix @ x in float32: [64, 64] of 0, 1, -1, times [64, n] taken as LIMBS bfloat16 numbers each."""
    matrix = matrix.to(tl.bfloat16)
    x = x.to(tl.float32)
    limb = x.to(tl.bfloat16)
    total = tl.dot(matrix, limb)
    for _ in tl.static_range(LIMBS - 1):
        x -= limb.to(tl.float32)
        limb = x.to(tl.bfloat16)
        total = tl.dot(matrix, limb, total)
    return total


@triton.jit
def middle_of(i, size):
    """The anchor of row i: the first row of the right half of its block."""
    return (i & -size) + (size >> 1)


@triton.jit
def between(tables_ptr, i, t, level):
    """Times the gates, each row's sum between it and its anchor m: b_i - b_m right of it, b_m - b_i left of it.

    Blocks of 64 >> level rows. (Tables, because masks made here outlive their use: the compiler hoists them, and fills
    the registers.)
    """
    return tl.load(tables_ptr + level * 64 * 64 + i * 64 + t)


@triton.jit
def same_block(i, j, size):
    return (i & -size) == (j & -size)


@triton.jit
def levels_of(tables_ptr, i, t, gates, LIMIT: tl.constexpr, LIMBS: tl.constexpr):
    """How many levels these gates need before their blocks are bounded; all of them where LIMIT is 0."""
    levels = 6
    if LIMIT > 0:
        if tl.min(tl.min(summed(between(tables_ptr, i, t, 0), gates, LIMBS), 1), 0) >= -LIMIT:
            levels = 0
        elif tl.min(tl.min(summed(between(tables_ptr, i, t, 2), gates, LIMBS), 1), 0) >= -LIMIT:
            levels = 2
    return levels


@triton.jit
def prepare(
    q_ptr,
    k_ptr,
    g_ptr,
    tables_ptr,
    T,
    q_in_ptr,
    k_out_ptr,
    decay_ptr,
    p_ptr,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    KEYS: tl.constexpr,
    LIMIT: tl.constexpr,
    LIMBS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk of one query head: its rows gated, and the weights of its pairs.

    Reads q [B, T, H, K], k and g [B, T, G, K]. Writes
      q_in [B, T, H, K]: scale * q decayed from the start of the chunk;
      k_out [B, T, G, K]: k decayed to its end;
      decay [B, T / 64, G, K] float32: exp of the chunk's gates summed;
      p [B, T, H, 64]: weights of the chunk's keys in each query row, 0 above the diagonal.
    """
    operand = p_ptr.dtype.element_ty
    chunks = T // 64
    chunk, row = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    b, h = row // H, row % H
    g = h // (H // G)
    first = (b.to(tl.int64) * T) + chunk * 64
    i, t, columns = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :], tl.arange(0, KEYS)[None, :]
    p = tl.zeros([64, 64], tl.float32)
    for start in range(0, K, KEYS):
        of_q = ((first + i) * H + h) * K + start + columns
        of_k = ((first + i) * G + g) * K + start + columns
        gates = tl.maximum(tl.load(g_ptr + of_k).to(tl.float32), FLOOR)
        q = tl.load(q_ptr + of_q).to(tl.float32) * SCALE
        k = tl.load(k_ptr + of_k).to(tl.float32)
        into = tl.exp(summed(tl.load(tables_ptr + INTO + i * 64 + t), gates, LIMBS))
        tl.store(q_in_ptr + of_q, (q * into).to(operand))
        if h % (H // G) == 0:
            out_of = tl.exp(summed(tl.load(tables_ptr + OUT_OF + i * 64 + t), gates, LIMBS))
            tl.store(k_out_ptr + of_k, (k * out_of).to(operand))
            total = tl.exp(tl.sum(gates, 0))
            tl.store(decay_ptr + ((b * chunks + chunk) * G + g) * K + start + tl.arange(0, KEYS), total)

        levels = levels_of(tables_ptr, i, t, gates, LIMIT, LIMBS)
        for level in range(levels):
            size = 64 >> level
            e = tl.exp(summed(between(tables_ptr, i, t, level), gates, LIMBS))
            x = (tl.where(i >= middle_of(i, size), q, k) * e).to(operand)
            pairs = same_block(i, t, size) & (i >= middle_of(i, size)) & (t < middle_of(t, size))
            p += tl.where(pairs, tl.dot(x, tl.trans(x), input_precision=PRECISION), 0.0)
        size = 64 >> levels
        exponents = summed(between(tables_ptr, i, t, levels), gates, LIMBS)
        exponents = tl.where(i >= middle_of(i, size), exponents, -exponents)
        q_mid = (q * tl.exp(exponents)).to(operand)
        k_mid = (k * tl.exp(-exponents)).to(operand)
        pairs = same_block(i, t, size) & (i >= t)
        p += tl.where(pairs, tl.dot(q_mid, tl.trans(k_mid), input_precision=PRECISION), 0.0)
    tl.store(p_ptr + ((first + i) * H + h) * 64 + t, p.to(operand))
