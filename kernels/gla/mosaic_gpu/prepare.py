"""Gates and documents turned into plain factors, chunk by chunk, so that `walk` needs to know of neither.

With b the running sum of log_alpha within a chunk of 64 tokens:

    q~ = scale q exp(b)     k~ = k exp(b_63 - b)     decay = exp(b_63)
    P_ij = scale sum_k q_ik k_jk exp(b_ik - b_jk) for i >= j, else 0

q~ is 0 in rows that the state from before the chunk does not reach, k~ in rows that do not reach the state after it,
and P between documents. Blocks are halved (halving.py) as the gates of every 64 key channels ask: P is a sum over
channels. One warpgroup works through the channels of a few chunks, while TMA brings the next.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...once import once
from .anchors import CHUNK, FLOOR, right_half
from .documents import REACHING, SIZE, goes_through, of_rows, reached, together
from .halving import (
    PREFIX,
    SUFFIX,
    around_middle,
    by_halves,
    matrix,
    pairs_across,
    pairs_within,
    table,
    up_to,
)  # fmt: skip
from .warpgroup import BF16, F32, TILE, WGMMA, Products, launch, load, settle, shared, split, store, where

STAGES = 2


@once
def prepare(q, k, log_alpha, *, scale, documents=None, chunks_per_block=4, interpret=None):
    """q~, k~, P and decay.

    Args:
      q [B, T, H, K], k and log_alpha [B, T, G, K]: bf16, T and K multiples of 64.
      scale: multiplies q.
      documents: `documents.factors`, or None.
      chunks_per_block: of one head, worked through by one block of threads.

    Returns:
      q~ [B, T, H, K], k~ [B, T, G, K], P [B, H, T / 64, 64, 64]: bf16; decay [B, G, T / 64, K] float32.
    """
    B, T, H, K = q.shape
    G, chunks, slices = k.shape[2], T // CHUNK, K // 64
    group, blocks = H // G, -(-chunks // chunks_per_block)
    packed, interpreted = documents is not None, interpret is not None

    def kernel(*refs):
        refs = list(refs)
        q_g, k_g, g_g, table_g, ones_g = refs[:5]
        del refs[:5]
        factors_g = refs.pop(0) if packed else None
        q_out_g, k_out_g, P_g, decay_g, q_s, k_s, g_s, tile_s, table_s, ones_s, worst_s, arrived, ready, *rest = refs
        factors_s = rest.pop(0) if packed else None
        product = Products(rest.pop(0) if interpreted else None)

        (block, h), b = split(lax.axis_index("block"), blocks, H)
        g, first_of_group = lax.div(h, group), lax.rem(h, group) == 0
        first = block * chunks_per_block
        steps = jnp.minimum(chunks_per_block, chunks - first) * slices
        place = lambda step: (first + lax.div(step, slices), lax.rem(step, slices))

        def fetch(step):
            slot = lax.rem(step, STAGES)
            chunk, c = place(step)
            tokens, channels = pl.ds(chunk * CHUNK, CHUNK), pl.ds(c * 64, 64)
            plgpu.copy_gmem_to_smem(g_g.at[b, tokens, g, channels], g_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(q_g.at[b, tokens, h, channels], q_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(k_g.at[b, tokens, g, channels], k_s.at[slot], arrived.at[slot])
            if packed:
                plgpu.copy_gmem_to_smem(factors_g.at[b, chunk], factors_s.at[slot], arrived.at[slot])

        plgpu.copy_gmem_to_smem(table_g, table_s, ready)
        plgpu.copy_gmem_to_smem(ones_g, ones_s, ready)
        fetch(0)
        plgpu.barrier_wait(ready)

        def body(step, P):
            slot = lax.rem(step, STAGES)
            chunk, c = place(step)
            tokens, channels = pl.ds(chunk * CHUNK, CHUNK), pl.ds(c * 64, 64)
            P = P * (c > 0).astype(F32)
            plgpu.barrier_wait(arrived.at[slot])
            q_c, k_c, g_c = q_s.at[slot], k_s.at[slot], g_s.at[slot]
            raw_q, raw_k = lambda: load(q_c).astype(F32), lambda: load(k_c).astype(F32)
            own_factors = factors_s.at[slot] if packed else None
            store(g_c, jnp.maximum(load(g_c), jnp.asarray(FLOOR, BF16)))
            plgpu.commit_smem()

            @pl.when(step + 1 < steps)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                fetch(step + 1)

            def bounded(n, exponents, P):
                e = around_middle(n, exponents)
                store(tile_s, (raw_k() * jnp.exp(-e)).astype(BF16))
                plgpu.commit_smem()
                pairs = product((raw_q() * jnp.exp(e)).astype(BF16), tile_s.T, TILE, onto=P)
                return (where(pairs_within(table_s, n), pairs, P),)

            def level(n, exponents, P):
                store(tile_s, (where(right_half(n), raw_q(), raw_k()) * jnp.exp(exponents)).astype(BF16))
                plgpu.commit_smem()
                return (where(pairs_across(table_s, n), product(tile_s, tile_s.T, TILE, onto=P), P),)

            (P,) = by_halves(product, g_c, table_s, worst_s, bounded, level, (P,), down_to=-1)
            weight = jnp.exp(product(matrix(table_s, PREFIX), g_c, TILE))
            store(q_c, (raw_q() * scale * (weight * reached(own_factors) if packed else weight)).astype(BF16))
            weight = jnp.exp(product(matrix(table_s, SUFFIX), g_c, TILE))
            store(k_c, (raw_k() * (weight * of_rows(own_factors, REACHING) if packed else weight)).astype(BF16))
            decay = jnp.exp(jnp.max(product(g_c.T, ones_s.T, (64, 8)), axis=1))

            @pl.when(c == slices - 1)
            def _():
                # In the room of the gates. What lies above the diagonal is of no use.
                settle()
                below = where(up_to(table_s), P * scale, 0.0)
                store(g_c, (below * together(own_factors) if packed else below).astype(BF16))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(g_c, P_g.at[b, h, chunk])

            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_c, q_out_g.at[b, tokens, h, channels])

            @pl.when(first_of_group)
            def _():
                plgpu.copy_smem_to_gmem(k_c, k_out_g.at[b, tokens, g, channels])
                decay_g.at[b, g, chunk, channels][...] = decay * (goes_through(factors_s, slot) if packed else 1.0)

            return P

        lax.fori_loop(0, steps, body, plgpu.layout_cast(jnp.zeros(TILE, F32), WGMMA))
        plgpu.wait_smem_to_gmem(0)

    tile = lambda stages: shared((stages, CHUNK, 64))
    scratch = [tile(STAGES), tile(STAGES), tile(STAGES), shared(TILE), shared(TILE, jnp.int16)]
    scratch += [shared((8, 64)), plgpu.SMEM((64,), F32)]
    scratch += [plgpu.Barrier(num_arrivals=3 + packed, num_barriers=STAGES), plgpu.Barrier(num_arrivals=2)]
    scratch += [plgpu.SMEM((STAGES, SIZE), F32)] if packed else []
    scratch += [shared(TILE)] if interpreted else []
    return launch(
        kernel,
        name="gla_prepare",
        blocks=B * H * blocks,
        out_type=[
            jax.ShapeDtypeStruct((B, T, H, K), BF16),
            jax.ShapeDtypeStruct((B, T, G, K), BF16),
            jax.ShapeDtypeStruct((B, H, chunks, CHUNK, CHUNK), BF16),
            jax.ShapeDtypeStruct((B, G, chunks, K), F32),
        ],
        scratch_types=scratch,
        interpret=interpret,
    )(q, k, log_alpha, jnp.asarray(table()), jnp.asarray(np.ones((8, 64), BF16)), *([documents] if packed else []))
