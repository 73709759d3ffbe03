"""Sums over the channels of a block, of two kinds of terms per token: what threads with a channel each cannot do alone.

Threads write the terms of two tokens, a row of 64 per channel, to shared memory in bf16. The transpose of that times a
[CHANNELS, 8] matrix of ones in one column, zeros elsewhere, adds their sums in float32 to that column of an accumulator
[64, 8], which no other tokens touch: 16 tokens to an accumulator. Two limbs keep 16 bits of a term.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .warpgroup import BF16, CHANNELS, F32, STATES

TOKENS = 2  # whose terms are added at a time
KINDS = 2
ROWS = TOKENS * KINDS * STATES  # of a `wgmma`: 64
COLUMNS = 8  # the fewest that a `wgmma` has
REPEATED = 64  # channels that the matrix of ones is made for

STORED = plgpu.Layout.TCGEN05_TMEM_NATIVE(8)  # as STATE, 8 numbers at a time
TRANSFORMS = plgpu.TilingTransform((8, STATES)), plgpu.SwizzleTransform(2 * STATES)


def shared(limbs: int, interpreted: bool):
    """Shared memory: terms, the matrices, and what the interpreter has for the accumulator."""
    terms = plgpu.SMEM((limbs, CHANNELS, ROWS), BF16, transforms=TRANSFORMS)
    ones = plgpu.SMEM((COLUMNS, COLUMNS, REPEATED), BF16, transforms=TRANSFORMS)
    return [terms, ones] + ([plgpu.SMEM((COLUMNS, ROWS), F32)] if interpreted else [])


def matrices() -> jax.Array:
    """Transposed, [which column, COLUMNS, REPEATED]."""
    return jnp.broadcast_to(jnp.eye(COLUMNS, dtype=BF16)[..., None], (COLUMNS, COLUMNS, REPEATED))


class ChannelSums:
    """Sums of COLUMNS pairs of tokens: `ready`, `put` the terms of each token, `add` them, and at last `totals`."""

    def __init__(self, accumulator, terms, ones, interpreted=None):
        self.accumulator, self.terms, self.ones, self.interpreted = accumulator, terms, ones, interpreted

    def ready(self):
        """Wait until the terms of the last pair are read."""
        if self.interpreted is None:
            plgpu.wgmma_wait(0)
            plgpu.commit_smem()

    def put(self, token: int, *terms: jax.Array):
        """The terms [CHANNELS, STATES] of each kind of one of the pair."""
        for kind, x in enumerate(terms):
            columns = pl.ds((token * KINDS + kind) * STATES, STATES)
            for limb in range(self.terms.shape[0]):
                rounded = x.astype(BF16)
                self.terms.at[limb, :, columns][...] = plgpu.layout_cast(rounded, STORED)
                x = x - rounded.astype(F32)

    def add(self, pair):
        """Sum what was put, to the column of this pair."""
        plgpu.commit_smem()
        if self.interpreted is not None:
            self.interpreted[pair] = jnp.sum(self.terms[...].astype(F32), axis=(0, 1))
            return
        for limb in range(self.terms.shape[0]):
            for channel in range(0, CHANNELS, REPEATED):
                some = self.terms.at[limb, pl.ds(channel, REPEATED)]
                plgpu.wgmma(self.accumulator, some.T, self.ones.at[pair].T)

    def totals(self) -> jax.Array:
        """[ROWS, COLUMNS]"""
        return self.accumulator[...] if self.interpreted is None else self.interpreted[...].T


def with_accumulator(run):
    """run(accumulator), which starts at zero."""
    return pl.run_scoped(run, plgpu.ACC((ROWS, COLUMNS), F32))


def of_tokens(totals: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What kernels leave, [..., tiles, ROWS, COLUMNS], as the sums of each kind of each token, [..., T, STATES]."""
    *lead, tiles, _, _ = totals.shape
    x = totals.reshape(*lead, tiles, TOKENS, KINDS, STATES, COLUMNS)
    x = jnp.moveaxis(x, -1, -4).reshape(*lead, tiles * COLUMNS * TOKENS, KINDS, STATES)
    return x[..., 0, :], x[..., 1, :]
