"""Gates and documents turned into plain factors, chunk by chunk, so that `walk` needs to know of neither.

With b the running sum of log_alpha within a chunk of 64 tokens:

    q~ = scale q exp(b)     k~ = k exp(b_63 - b)     decay = exp(b_63)
    P_ij = scale sum_k q_ik k_jk exp(b_ik - b_jk) for i >= j, else 0

q~ is 0 in rows that the state from before the chunk does not reach, k~ in rows that do not reach the state after it,
and P between documents. Every 64 key channels take the tier that their own gates allow (anchors.py): P is a sum over
channels, so the tiers mix. One warpgroup works through the channels of a few chunks, while TMA brings the next.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .anchors import CHUNK, FIRST, FLOOR, PREFIX, SECOND, beyond_limit, constant_rows
from .warpgroup import BF16, COLUMN, F32, ROW, TILE, WGMMA, Products, along_columns, along_rows, iota, load, pin, shared

STAGES = 3
CHUNKS = 4  # of one head, worked through by one block of threads


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def prepare(q, k, log_alpha, *, scale, documents=None, interpret=None):
    """q~, k~, P and decay.

    Args:
      q [B, T, H, K], k and log_alpha [B, T, G, K]: bf16, T and K multiples of 64.
      scale: multiplies q.
      documents: `Documents`, or None.

    Returns:
      q~ [B, T, H, K], k~ [B, T, G, K], P [B, H, T / 64, 64, 64]: bf16; decay [B, G, T / 64, K] float32.
    """
    B, T, H, K = q.shape
    G, chunks, slices = k.shape[2], T // CHUNK, K // 64
    group, blocks = H // G, -(-chunks // CHUNKS)
    packed, interpreted = documents is not None, interpret is not None
    masks = (documents.together, documents.reached, documents.reaching) if packed else ()

    def kernel(*refs):
        refs = list(refs)
        q_g, k_g, g_g, constants_g = refs[:4]
        del refs[:4]
        together_g, reached_g, reaching_g = (refs.pop(0), refs.pop(0), refs.pop(0)) if packed else (None,) * 3
        q_out_g, k_out_g, P_g, decay_g = refs[:4]
        q_s, k_s, g_s, q_hat, k_hat, P_s, constants_s, *refs = refs[4:]
        worst_s, before_s, after_s, zero_s, arrived, ready, *rest = refs
        product = Products(rest.pop(0) if interpreted else None)

        index = lax.axis_index("block")
        block, index = index % blocks, index // blocks
        h, b = index % H, index // H
        g, first_of_group = h // group, h % group == 0
        first = block * CHUNKS
        steps = jnp.minimum(CHUNKS, chunks - first) * slices
        place = lambda step: (first + lax.div(step, slices), lax.rem(step, slices))

        def fetch(step):
            slot = lax.rem(step, STAGES)
            chunk, c = place(step)
            tokens, channels = pl.ds(chunk * CHUNK, CHUNK), pl.ds(c * 64, 64)
            plgpu.copy_gmem_to_smem(g_g.at[b, tokens, g, channels], g_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(q_g.at[b, tokens, h, channels], q_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(k_g.at[b, tokens, g, channels], k_s.at[slot], arrived.at[slot])

        zero_s[0] = jnp.int32(0)
        plgpu.copy_gmem_to_smem(constants_g.at[pl.ds(0, PREFIX)], constants_s, ready)
        for step in range(STAGES - 1):
            pl.when(step < steps)(functools.partial(fetch, step))
        plgpu.barrier_wait(ready)

        def body(step, P):
            slot = lax.rem(step, STAGES)
            chunk, c = place(step)
            tokens, channels = pl.ds(chunk * CHUNK, CHUNK), pl.ds(c * 64, 64)
            # A zero that the compiler cannot see through: masks that use it are not made before the loop, once and for
            # all, to fill the registers.
            row, column = lambda: iota(0) + zero_s[0], lambda: iota(1) + zero_s[0]
            P = P * (c > 0).astype(F32)
            plgpu.barrier_wait(arrived.at[slot])
            q_c, k_c, g_c = q_s.at[slot], k_s.at[slot], g_s.at[slot]
            raw_q, raw_k = lambda: load(q_c).astype(F32) * scale, lambda: load(k_c).astype(F32)

            if packed:

                def rows(ref):
                    factor = load(ref.at[b, tokens], ROW, optimized=False)
                    return lambda x: x * plgpu.layout_cast(along_rows(factor, TILE), WGMMA)

                reached, reaching = rows(reached_g), rows(reaching_g)
            else:
                reached = reaching = lambda x: x

            def half_total(start):
                """exp of the gates summed over a half of the chunk, per channel. [64]."""
                return jnp.exp(jnp.max(product(g_c.T, constants_s.at[pl.ds(start, 8)].T, (64, 8)), axis=1))

            D = product(constants_s.at[pl.ds(0, 64)], g_c, TILE)
            worst_s[...] = beyond_limit(D)
            plgpu.commit_smem()
            within = (worst_s[0] == 0.0) & (worst_s[63] == 0.0)

            def tier_1(P):
                before, after = half_total(FIRST), half_total(SECOND)
                before_s[...], after_s[...] = before, after
                of_q, of_k = raw_q() * jnp.exp(D), raw_k() * jnp.exp(-D)
                q_hat[...], k_hat[...] = of_q.astype(BF16), of_k.astype(BF16)
                plgpu.commit_smem()
                q_c[...] = reached(of_q * along_columns(load(before_s, COLUMN), TILE)).astype(BF16)
                k_c[...] = reaching(of_k * along_columns(load(after_s, COLUMN), TILE)).astype(BF16)
                P = product(q_hat, k_hat.T, TILE, onto=P)
                return P, before * after

            def tiers_2_and_3(P):
                g_c[...] = jnp.maximum(load(g_c), jnp.asarray(FLOOR, BF16))
                plgpu.commit_smem()
                P = add_slice(P, product, raw_q, raw_k, g_c, q_hat, k_hat, worst_s, row, column)
                ones = lambda mask: jnp.where(mask, 1.0, 0.0).astype(BF16)
                q_c[...] = reached(raw_q() * jnp.exp(product(ones(column() <= row()), g_c, TILE))).astype(BF16)
                k_c[...] = reaching(raw_k() * jnp.exp(product(ones(column() > row()), g_c, TILE))).astype(BF16)
                return P, half_total(FIRST) * half_total(SECOND)

            P, decay = lax.cond(within, tier_1, tiers_2_and_3, P)

            @pl.when(c == slices - 1)
            def _():
                masked = jnp.where(column() <= row(), P, 0.0)
                if packed:
                    masked = masked * load(together_g.at[b, chunk], optimized=False).astype(F32)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                P_s[...] = masked.astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(P_s, P_g.at[b, h, chunk])

            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_c, q_out_g.at[b, tokens, h, channels])

            @pl.when(first_of_group)
            def _():
                plgpu.copy_smem_to_gmem(k_c, k_out_g.at[b, tokens, g, channels])
                decay_g.at[b, g, chunk, channels][...] = decay

            @pl.when(step + STAGES - 1 < steps)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                fetch(step + STAGES - 1)

            return P

        lax.fori_loop(0, steps, body, plgpu.layout_cast(jnp.zeros(TILE, F32), WGMMA))
        plgpu.wait_smem_to_gmem(0)

    tile = lambda stages: shared((stages, CHUNK, 64))
    scratch = [tile(STAGES), tile(STAGES), tile(STAGES), shared(TILE), shared(TILE), shared(TILE), shared((PREFIX, 64))]
    scratch += [plgpu.SMEM((64,), F32)] * 3 + [plgpu.SMEM((1,), jnp.int32)]
    scratch += [plgpu.Barrier(num_arrivals=3, num_barriers=STAGES), plgpu.Barrier()]
    scratch += [shared(TILE)] if interpreted else []
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((B, T, H, K), BF16),
            jax.ShapeDtypeStruct((B, T, G, K), BF16),
            jax.ShapeDtypeStruct((B, H, chunks, CHUNK, CHUNK), BF16),
            jax.ShapeDtypeStruct((B, G, chunks, K), F32),
        ],
        scratch_types=scratch,
        grid=(B * H * blocks,),
        grid_names=("block",),
        kernel_name="gla_prepare",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": interpret} if interpreted else {}),
    )(
        q,
        k,
        log_alpha,
        constant_rows(),
        *masks,
    )


def add_slice(P, product, raw_q, raw_k, g_c, q_hat, k_hat, worst_s, row, column):
    """P, and that of channels whose gates exceed tier 1: levels of halving blocks, then bounded blocks (tier 2) or
    single rows (tier 3). `q_hat` and `k_hat` are used as working space."""
    anchored = lambda half: product(anchor_matrix(half, row(), column()), g_c, TILE)
    worst_s[...] = beyond_limit(anchored(8))
    plgpu.commit_smem()
    bounded = jnp.bool_(True)
    for start in range(0, 64, 16):
        bounded &= (worst_s[start] == 0.0) & (worst_s[start + 15] == 0.0)
    levels = jnp.where(bounded, 2, 6)

    def level(i, P):
        half = 32 >> i
        weight = jnp.exp(-jnp.abs(anchored(half)))
        q_hat[...] = (jnp.where((row() & half) != 0, raw_q(), raw_k()) * weight).astype(BF16)
        plgpu.commit_smem()
        return pin(P + jnp.where(level_pairs(half, row(), column()), product(q_hat, q_hat.T, TILE), 0.0))

    P = lax.fori_loop(0, levels, level, P)
    D = anchored(8) * bounded.astype(F32)  # 0 in tier 3, where only the diagonal is left
    q_hat[...], k_hat[...] = (raw_q() * jnp.exp(D)).astype(BF16), (raw_k() * jnp.exp(-D)).astype(BF16)
    plgpu.commit_smem()
    same = (row() ^ column()) < jnp.where(bounded, 16, 1)
    return P + jnp.where(same & (column() <= row()), product(q_hat, k_hat.T, TILE), 0.0)


def anchor_matrix(half, i, t):
    """D: (D @ gates)[i] = b_i - b_m, m the middle row of i's block of 2 * half rows."""
    m = (i & ~(2 * half - 1)) + half
    one = lambda mask: jnp.where(mask, 1.0, 0.0)
    return (one((t > m) & (t <= i)) - one((t > i) & (t <= m))).astype(BF16)


def level_pairs(half, i, j):
    """Pairs of rows with i in the right half and j in the left half of one block of 2 * half."""
    return ((i ^ j) >= half) & ((i ^ j) < 2 * half) & (i > j)
