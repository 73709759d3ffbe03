"""Long sequences of few heads: cut into pieces that are walked side by side.

A first, lighter walk (no q, no o) gives the state that each piece builds from zero, and the decay through it: with
S_out = decay * S_in + S_own, every walk of the second pass adds up the state that enters its piece before it starts.
The backward is the mirror image. (Gla-math, "Sequence parallelism": here the devices are the multiprocessors of one
card.)

The state of a chunk, S' = exp(b_63) S + (k exp(b_63 - b))^T v, has no exponent that can be positive: no tiers here.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ...once import once
from .anchors import CHUNK, FLOOR
from .warpgroup import BF16, F32, ROW, TILE, WGMMA, Products, along_rows, launch, load, shared, split, store, where

STAGES = 3


@dataclasses.dataclass(frozen=True)
class Cut:
    """How sequences are cut: into pieces of equal length, but for one that may be shorter: the first in the forward,
    the last in the backward. That is the one that a lighter walk goes over before: where there are a few walks less
    than the card can hold, it fills what they leave of the card."""

    pieces: int = 1
    shorter: int = 0  # by so many chunks, at least STAGES of which are left

    def longest(self, chunks: int) -> int:
        """Chunks of the longest piece of a sequence."""
        return (chunks + self.shorter) // self.pieces

    def shortest(self, chunks: int) -> int:
        return self.longest(chunks) - self.shorter

    def span(self, piece, chunks: int, *, shorter_last: bool):
        """First chunk, and number of chunks, of a piece."""
        longest = self.longest(chunks)
        if not self.shorter:
            return piece * longest, longest
        if shorter_last:
            return piece * longest, longest - jnp.where(piece == self.pieces - 1, self.shorter, 0)
        return jnp.maximum(piece * longest - self.shorter, 0), longest - jnp.where(piece == 0, self.shorter, 0)


WHOLE = Cut()


class Pieces(NamedTuple):
    """What each piece but the last (backward: but the first) does to what enters it: decay * it + own."""

    own: Float[Array, "B heads N-1 K V"]
    decay: Float[Array, "B heads N-1 K"]


def decay_sums(*, reverse: bool) -> np.ndarray:
    """Rows that sum the gates from each token to the end of its chunk, or from its start, and 8 that sum all: [72, 64]
    bf16."""
    i, t = np.arange(64)[:, None], np.arange(64)[None]
    return np.concatenate([t <= i if reverse else t > i, np.ones((8, 64), bool)]).astype(BF16)


@once
def own_states(k, v, log_alpha, sums, *, cut: Cut, documents=None, interpret=None) -> Pieces:
    """The state that each piece but the last builds from zero.

    k, log_alpha: [B, T, G, K] bf16, T a multiple of 64, K a multiple of 64. v: [B, T, G, V] bf16.
    sums: decay_sums(reverse=False).
    documents: [B, T] int32 or None. A document that ends in a piece leaves nothing, and lets nothing through.
    """
    return _walk(k, v, log_alpha, sums, 1.0, cut, documents, False, interpret)


@once
def own_gradients(q, do, log_alpha, sums, *, scale, cut: Cut, documents=None, interpret=None) -> Pieces:
    """The gradient that each piece but the first gives the state that enters it, where none leaves it.

    q: [B, T, H, K] bf16. do: [B, T, H, V] bf16. log_alpha: [B, T, G, K] bf16. sums:
    decay_sums(reverse=True).
    """
    return _walk(q, do, log_alpha, sums, scale, cut, documents, True, interpret)


def carry_in(initial, own, decay, width, count, which):
    """The state that enters a piece: `initial` (None for zero) and what `count` pieces, `which(0)` first, make of it.

    own and decay are functions of a piece; own is None where the sequence is whole.
    """
    S = plgpu.layout_cast(jnp.zeros((64, width), F32), WGMMA) if initial is None else initial
    if own is None:
        return S

    def through(i, S):
        return S * along_rows(decay(which(i)), (64, width)) + own(which(i))

    return lax.fori_loop(0, count, through, S)


def _walk(x, y, log_alpha, sums, scale, cut, documents, reverse, interpret):
    """sum over rows of (x * what decays until the piece's end, or from its start)^T y."""
    (B, T, H, K), V, G = x.shape, y.shape[-1], log_alpha.shape[2]
    VB = min(V, 128)
    key_blocks, value_blocks = K // 64, V // VB
    pieces, chunks = cut.pieces, T // CHUNK
    packed, interpreted = documents is not None, interpret is not None

    def kernel(*refs):
        x_g, y_g, g_g, sums_g, *refs = refs
        documents_g = refs.pop(0) if packed else None
        own_g, decay_g, x_s, y_s, g_s, sums_s, arrived, sums_arrived, *rest = refs
        documents_s = rest.pop(0) if packed else None
        spare = rest.pop(0).at[0] if interpreted else None

        (vb, kb, n, h), b = split(lax.axis_index("block"), value_blocks, key_blocks, pieces - 1, H)
        g = lax.div(h, H // G)
        first, steps = cut.span(n + reverse, chunks, shorter_last=reverse)
        keys, values = pl.ds(kb * 64, 64), pl.ds(vb * VB, VB)
        product = Products(spare)

        def rows_of(i):
            return pl.ds((first + (steps - 1 - i if reverse else i)) * CHUNK, CHUNK)

        def fetch(i):
            slot, rows = lax.rem(i, STAGES), rows_of(i)
            plgpu.copy_gmem_to_smem(g_g.at[b, rows, g, keys], g_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(x_g.at[b, rows, h, keys], x_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(y_g.at[b, rows, h, values], y_s.at[slot], arrived.at[slot])
            if packed:
                plgpu.copy_gmem_to_smem(documents_g.at[b, rows], documents_s.at[slot], arrived.at[slot])

        plgpu.copy_gmem_to_smem(sums_g, sums_s, sums_arrived)
        for i in range(min(STAGES, cut.shortest(chunks))):
            fetch(i)
        plgpu.barrier_wait(sums_arrived)

        def chunk(i, carry):
            S, decay, document = carry
            slot = lax.rem(i, STAGES)
            plgpu.barrier_wait(arrived.at[slot])
            x_c, y_c, g_c = x_s.at[slot], y_s.at[slot], g_s.at[slot]
            store(g_c, jnp.maximum(load(g_c), jnp.asarray(FLOOR, BF16)))
            plgpu.commit_smem()
            D = product(sums_s.at[pl.ds(0, 64)], g_c, TILE)
            gated = load(x_c).astype(F32) * (jnp.exp(D) * scale)
            store(x_c, gated.astype(BF16))
            whole = jnp.exp(jnp.max(product(g_c.T, sums_s.at[pl.ds(64, 8)].T, (64, 8)), axis=1))
            if packed:
                ends = documents_s[slot, 0], documents_s[slot, 63]
                near, far = ends[::-1] if reverse else ends  # the side that the state comes from, and goes to
                whole = whole * ((near == document) & (near == far)).astype(F32)
                document = far

                @pl.when(near != far)
                def _():
                    rows = where(load(documents_s.at[slot], ROW) == far, 1.0, 0.0)
                    rows = plgpu.layout_cast(along_rows(plgpu.layout_cast(rows, ROW), TILE), WGMMA)
                    store(x_c, (load(x_c).astype(F32) * rows).astype(BF16))

            plgpu.commit_smem()
            S = product(x_c.T, y_c, (64, VB), onto=S * along_rows(whole, (64, VB)))
            plgpu.commit_smem()

            @pl.when(i + STAGES < steps)
            def _():
                fetch(i + STAGES)

            return S, decay * whole, document

        outside = lambda row: documents_g[b, jnp.clip(row, 0, T - 1)] if packed else jnp.int32(0)
        before, after = outside(first * CHUNK - 1), outside((first + steps) * CHUNK)
        S = plgpu.layout_cast(jnp.zeros((64, VB), F32), WGMMA)
        decay = plgpu.layout_cast(jnp.ones((64,), F32), ROW)
        S, decay, document = lax.fori_loop(0, steps, chunk, (S, decay, after if reverse else before))
        if packed and reverse:  # a document that starts with the piece owes the tokens before nothing
            joined = (document == before).astype(F32)
            S, decay = S * joined, decay * joined
        own_g.at[b, h, n, keys, values][...] = S

        @pl.when(vb == 0)
        def _():
            decay_g.at[b, h, n, keys][...] = decay

    scratch = [
        shared((STAGES, CHUNK, 64)),
        shared((STAGES, CHUNK, VB)),
        shared((STAGES, CHUNK, 64)),
        shared((72, 64)),
        plgpu.Barrier(num_arrivals=3 + packed, num_barriers=STAGES),
        plgpu.Barrier(),
    ]
    scratch += [plgpu.SMEM((STAGES, CHUNK), jnp.int32)] if packed else []
    scratch += [shared((1, 64, 64))] if interpreted else []
    return Pieces(
        *launch(
            kernel,
            name="gla_own_gradients" if reverse else "gla_own_states",
            blocks=B * H * (pieces - 1) * key_blocks * value_blocks,
            out_type=[
                jax.ShapeDtypeStruct((B, H, pieces - 1, K, V), F32),
                jax.ShapeDtypeStruct((B, H, pieces - 1, K), F32),
            ],
            scratch_types=scratch,
            warpgroups=1,
            interpret=interpret,
        )(x, y, log_alpha, sums, *([documents] if packed else []))
    )
