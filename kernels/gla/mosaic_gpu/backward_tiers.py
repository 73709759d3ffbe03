"""What a chunk's pairs, and the states around it, give q, k and the gates: tier 1, and tiers 2 and 3.

Both leave q and k gated for the products with states, and in tiles of this warpgroup, as registers are scarce, dq
(g_own), dk (out_k), P^T (out_q) and k (v dS^T) (limb). They return q dq - k dk of the pairs within the chunk, and dS in
the frame of the state that entered, but for a last factor.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import gating
from .anchors import FLOOR
from .backward_chunk import Walk
from .tables import (
    DIAGONAL,
    FIRST,
    LEVELS,
    LOWER,
    LOWER_IN_16,
    PREFIX,
    SECOND,
    SUFFIX,
    UPPER,
    UPPER_IN_16,
    has,
    indicator,
    level_of,
)
from .warpgroup import BF16, F32, ROW, TILE, WGMMA, along_rows, in_a_block, load, meet, pin, settle, store, where


def tier_1(walk: Walk, step, dS, leaves, of_first, of_last, *, scale):
    """All pairs around the middle, in whose frame the states are."""
    product, VB, packed = walk.product, walk.value_block, leaves is not None
    v = walk.at(step)
    D, after, before = v.around_middle_and_totals()
    dS = pin(dS * along_rows(after * leaves if packed else after, (64, VB)))
    store(v.dS_own, dS.astype(BF16))
    gating.around_middle(v.q_own, v.k_own, D, scale)
    plgpu.commit_smem()
    meet(walk.barrier)
    first = [([(v.k, v.q.T)], TILE), ([(v.v, v.do.T)], TILE)]
    if packed:
        PT, dPT, past = product.several(*first, ([(v.do, v.S_own.T)], TILE))
        past = pin(of_first(past))
        plgpu.barrier_wait(walk.pairs_arrived)
    else:
        PT, dPT = product.several(*first)
    PT = pin(v.of_keys(PT))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    store(v.limb, v.of_keys(dPT))
    store(v.out_q, PT)
    plgpu.commit_smem()
    v = walk.at(step)
    of_q, of_k, of_states = [(v.limb.T, v.k_own)], [(v.limb, v.q_own)], [(v.v, v.dS_own.T)]
    if packed:
        for_q, for_k, later = product.beside(of_q, past, (of_k, TILE), (of_states, TILE))
        later = of_last(later)
    else:
        of_q.append((v.do, v.S_own.T))
        for_q, for_k, later = product.several((of_q, TILE), (of_k, TILE), (of_states, TILE))
    v = walk.at(step)
    change = pin(load(v.k_own).astype(F32) * -for_k)
    settle()  # all have read dP
    store(v.limb, (load(v.k_own).astype(F32) * later).astype(BF16))
    v = walk.at(step)
    D_again = v.around_middle()
    settle()  # and the gates
    store(v.out_k, ((for_k + later) * jnp.exp2(-D_again)).astype(BF16))
    v = walk.at(step)
    change = pin(change + load(v.q_own).astype(F32) * for_q)
    v = walk.at(step)
    store(v.g_own, (for_q * gating.exp2(D_again, scale)).astype(BF16))
    return change, dS, before


def tiers_2_and_3(walk: Walk, step, within, dS, leaves, of_first, of_last, parking, *, scale):
    """Level by level, each warpgroup for itself. Until the end out_k holds what its key channels make of P^T, limb dP
    (times the scale), and out_q q or k as gated; `parking(chunk)`, in device memory, dS."""
    product, barrier = walk.product, walk.barrier
    v = walk.at(step)
    parking(v)[...] = dS if leaves is None else dS * leaves
    store(v.g_own, jnp.maximum(load(v.g_own), jnp.asarray(FLOOR, BF16)))
    plgpu.commit_smem()
    zeros = plgpu.layout_cast(jnp.zeros(TILE, F32), WGMMA)

    v = walk.at(step)
    dP, dPT, PT = product.several(([(v.do, v.v.T)], TILE), ([(v.v, v.do.T)], TILE), ([(v.k_own, v.q_own.T)], TILE))
    if walk.pairs_arrived is not None:
        plgpu.barrier_wait(walk.pairs_arrived)
    diagonal = jnp.sum(where(has(v.pairs(), DIAGONAL), dP, 0.0), axis=1) * scale
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    both = where(has(v.pairs(), UPPER), dPT, where(has(v.pairs(), LOWER), dP, 0.0))
    store(v.limb, (both * scale).astype(BF16))
    store(v.out_k, (PT * scale).astype(BF16))

    def add_pairs(v, pairs, bits):
        """(In float32: a select takes pairs of bf16 apart.)"""
        store(v.out_k, pin(where(has(v.pairs(), bits), pairs * scale, load(v.out_k).astype(F32))).astype(BF16))

    def chosen_dP(v, bits):
        """dP of some pairs, for either side of them; an operand in registers."""
        return where(has(v.pairs(), bits), load(v.limb), jnp.zeros((), BF16))

    def level(i, carry):
        dq, dk, change = carry
        n = 5 - i
        v = walk.at(step)
        right = gating.right_rows(n)
        of_q, of_k = (lax.bitcast_convert_type(x & jnp.int32(0x3F800000), F32) for x in (right, ~right))  # 1.0 or 0.0
        e = jnp.exp2(v.exponents(*level_of(n)))
        store(v.out_q, gating.halves(v.q_own, v.k_own, n) * e.astype(BF16))
        plgpu.commit_smem()
        Y = product(chosen_dP(v, 1 << n), v.out_q, TILE)
        change = pin(change + Y * load(v.out_q).astype(F32) * along_rows(of_q - of_k, TILE))
        Y = Y * e
        dq = pin(dq + Y * along_rows(of_q, TILE))
        dk = pin(dk + Y * along_rows(of_k, TILE))
        v = walk.at(step)
        add_pairs(v, product(v.out_q, v.out_q.T, TILE), 1 << n)
        settle()
        return dq, dk, change

    # Of q and k as they came the diagonal is right, and no level takes it.
    dq, dk, change = lax.fori_loop(0, jnp.where(within, 2, 6), level, (zeros,) * 3)

    def bounded():
        """Blocks of 16 rows around their middles, without the diagonal."""
        v = walk.at(step)
        e = pin(gating.signed_in_16(v.exponents(*LEVELS[3])))
        gating.blocks_of_16(v.q_own, v.k_own, v.out_q, v.dS_tile, e)
        plgpu.commit_smem()
        add_pairs(v, product(v.dS_tile, v.out_q.T, TILE), UPPER_IN_16)
        v = walk.at(step)
        e = pin(gating.signed_in_16(v.exponents(*LEVELS[3])))  # anew: exp2 of both signs would wait in 64 registers
        v = walk.at(step)
        for_q = product(chosen_dP(v, LOWER_IN_16), v.dS_tile, TILE)
        changed = pin(change + for_q * load(v.out_q).astype(F32))
        dq_more = pin(dq + for_q * jnp.exp2(e))
        v = walk.at(step)
        for_k = product(chosen_dP(v, UPPER_IN_16), v.out_q, TILE)
        changed = pin(changed - for_k * load(v.dS_tile).astype(F32))
        return dq_more, pin(dk + for_k * jnp.exp2(-e)), changed

    dq, dk, change = lax.cond(within, bounded, lambda: (dq, dk, change))
    if walk.warpgroups > 1:  # P^T is the sum of all, in the place of dP
        plgpu.commit_smem()
        meet(barrier)
        v = walk.at(step)
        one = indicator(v.pairs(), DIAGONAL)
        store(v.limb, product.total([(one, x) for x in v.out_k_of], TILE).astype(BF16))
    else:
        settle()
    v = walk.at(step)
    dq = pin(dq + along_rows(diagonal, TILE) * load(v.k_own).astype(F32))
    v = walk.at(step)
    dk = pin(dk + along_rows(diagonal, TILE) * load(v.q_own).astype(F32))

    def of_state(change):
        v = walk.at(step)
        e = pin(jnp.exp2(v.exponents(*PREFIX)) * scale)
        v = walk.at(step)
        for_q = of_first(product(v.do, v.S_own.T, TILE))
        store(v.out_q, (dq + for_q * e).astype(BF16))
        v = walk.at(step)
        gated = pin((load(v.q_own).astype(F32) * e).astype(BF16))
        store(v.q_own, gated)
        return change + for_q * gated.astype(F32)

    change = in_a_block(walk.zero_s, of_state, change)
    v = walk.at(step)
    store(v.dS_own, load(parking(v), optimized=False).astype(BF16))
    plgpu.commit_smem()
    e = pin(jnp.exp2(v.exponents(*SUFFIX)))
    v = walk.at(step)
    for_k = of_last(product(v.v, v.dS_own.T, TILE))
    dk = pin((dk + for_k * e).astype(BF16))
    gated = pin((load(v.k_own).astype(F32) * e).astype(BF16))
    store(v.k_own, gated)
    later = pin((for_k * load(v.k_own).astype(F32)).astype(BF16))
    plgpu.commit_smem()
    meet(barrier)
    v = walk.at(step)
    PT = pin(v.of_keys(load(v.limb if walk.warpgroups > 1 else v.out_k)))
    store(v.out_k, dk)
    store(v.limb, later)
    whole = v.totals(FIRST) * v.totals(SECOND)
    settle()
    v = walk.at(step)
    store(v.g_own, load(v.out_q))
    store(v.out_q, PT)
    dS = load(parking(v), optimized=False) * along_rows(whole, (64, walk.value_block))
    return change, dS, plgpu.layout_cast(jnp.ones((64,), F32), ROW)
