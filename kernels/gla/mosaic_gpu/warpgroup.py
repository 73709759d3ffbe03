"""Idioms of one warpgroup: tiled shared memory, matrix products, meeting points.

Everything here works on [64, n] register arrays in the layout that `wgmma` accumulates in, and on shared-memory refs
tiled so that `wgmma` and TMA both read them. `Products` also stands in for operand forms of
the hardware that the Pallas interpreter lacks.
"""

import contextvars
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from .ldmatrix import load_tile, store_tile, undefined

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # one value per row of a [64, n] array
COLUMN = WGMMA.reduce(0)  # one value per column
BF16, F32 = jnp.bfloat16, jnp.float32
TILE = (64, 64)  # rows of a chunk by key channels of a warpgroup, and tokens by tokens
SWIZZLE = 128  # bytes; a tile of shared memory is 8 rows of 64 bf16

# Layouts are said, not inferred, which halves the time of lowering. And no barrier stands around every store and before
# every fetch: four warps share a warpgroup's tiles, and `commit_smem` and `settle` stand where one needs another.
COMPILER = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
)


def shared(shape: tuple[int, ...], dtype=BF16):
    """Shared memory that `wgmma` and TMA read: 8 x 64 tiles, 128-byte swizzle."""
    return plgpu.SMEM(shape, dtype, transforms=transforms(dtype))


def transforms(dtype=BF16):
    """Tiling and swizzle of `shared`, also for the blocks that TMA writes."""
    return plgpu.TilingTransform((8, SWIZZLE // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(SWIZZLE)


_compiled = contextvars.ContextVar("compiled", default=False)  # whether a kernel of `launch` is traced, for the card


def launch(kernel: Callable, *, name: str, blocks: int, out_type, scratch_types, warpgroups=None, interpret=None):
    """plgpu.kernel over a row of blocks of threads (axis "block"), of one or several warpgroups (axis "warpgroup")."""

    def traced(*refs):
        before = _compiled.set(interpret is None)
        try:
            kernel(*refs)
        finally:
            _compiled.reset(before)

    return plgpu.kernel(
        traced,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(blocks,),
        grid_names=("block",),
        kernel_name=name,
        compiler_params=COMPILER,
        **({} if warpgroups is None else {"num_threads": warpgroups, "thread_name": "warpgroup"}),
        **({} if interpret is None else {"interpret": interpret}),
    )


def load(ref, layout=None, optimized=True) -> jax.Array:
    """Shared or device memory to registers; `optimized=False` allows device memory, which has no layout of its own."""
    if layout is None and not optimized:
        layout = WGMMA
    elif layout is None and _is_tile(ref):
        kind = plgpu.ShapeDtypeStruct(ref.shape, ref.dtype, layout=WGMMA)
        return plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms()),), return_type=kind)(load_tile)(ref)
    return plgpu.load(ref, layout=layout, optimized=optimized)


def store(ref, x: jax.Array) -> None:
    """Registers to a tile of shared memory. (What is no tile takes `ref[...] = x`.)"""
    if _is_tile(ref):
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms()), WGMMA))(store_tile)(ref, x)
    else:
        ref[...] = x


def _is_tile(ref) -> bool:
    """Whether `ldmatrix` takes it: one of `shared`, 64 rows, in a kernel of `launch` that is not interpreted."""
    of_two_bytes = jnp.dtype(ref.dtype).itemsize == 2
    return _compiled.get() and of_two_bytes and len(ref.shape) == 2 and ref.shape[0] == 64 and ref.shape[1] % 64 == 0


def iota(axis: int, shape=(64, 64)) -> jax.Array:
    """Row (0) or column (1) numbers of a register array."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA)


def along_rows(column: jax.Array, shape) -> jax.Array:
    """Per-row values [m], spread over the columns of [m, n]."""
    return lax.broadcast_in_dim(column, shape, (0,))


def along_columns(row: jax.Array, shape) -> jax.Array:
    """Per-column values [n], spread over the rows of [m, n]."""
    return lax.broadcast_in_dim(row, shape, (1,))


def split(index: jax.Array, *counts: int) -> tuple[list, jax.Array]:
    """Coordinates of a block, the fastest first, and the last, unbounded one. (`%` and `//` of signed numbers are a
    dozen operations each to Pallas, and a second of compile time together.)"""
    coordinates = []
    for count in counts:
        coordinates.append(lax.rem(index, count) if count > 1 else jnp.int32(0))
        index = lax.div(index, count) if count > 1 else index
    return coordinates, index


def where(chosen: jax.Array, x, y) -> jax.Array:
    """jnp.where, without the function call that it is to Pallas."""
    dtype = x.dtype if isinstance(x, jax.Array) else y.dtype if isinstance(y, jax.Array) else F32
    x, y = (z if jnp.shape(z) else lax.full(chosen.shape, z, dtype) for z in (x, y))
    return lax.select(chosen, x, y)


def pin(x: jax.Array) -> jax.Array:
    """x, computed here: the compiler would put arithmetic off to its last use, and keep every operand until then."""
    return lax.optimization_barrier(x)


def in_a_block(zero_s, f, x):
    """f(x) as a block of code of its own: a loop of one turn. `zero_s`: a zero in shared memory.

    ptxas, too, puts arithmetic off to its last use and keeps the operands until then, whatever `pin` says; but not
    beyond the end of a loop whose count it cannot know.
    """
    return lax.fori_loop(0, zero_s[0] + 1, lambda _, x: f(x), x)


def choose(which: jax.Array, yes: Callable, no: Callable, *results: plgpu.ShapeDtypeStruct) -> tuple[jax.Array, ...]:
    """lax.cond for branches that take long to lower: Pallas lowers the first branch twice, to find what it returns, so
    the first one here is empty and never taken (and not there any more in machine code)."""
    if not _compiled.get():
        return lax.cond(which, yes, no)

    never = plgpu.inline_mgpu(return_type=results)(Anything(results))
    return lax.switch(lax.select(which, 2, 1), [never, no, yes])


@dataclasses.dataclass(frozen=True)
class Anything:
    """Registers with no value, for a branch that is never taken."""

    results: tuple[plgpu.ShapeDtypeStruct, ...]

    def __call__(self, _):
        of = lambda x: undefined(x.shape, mgpu.utils.dtype_to_ir_type(x.dtype), x.layout.to_mgpu())
        return tuple(of(x) for x in self.results)


def result(shape, dtype=F32, layout=WGMMA) -> plgpu.ShapeDtypeStruct:
    """Of a branch of `choose`."""
    return plgpu.ShapeDtypeStruct(shape, dtype, layout=layout)


def meet(barrier) -> None:
    """All warpgroups of the block wait for each other; None where there is only one."""
    if barrier is not None:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)


def warps_wait(_) -> None:
    """`settle` of one warpgroup, under a name that its test finds in jaxprs."""
    mgpu.warpgroup_barrier()


def settle(barrier=None) -> None:
    """All threads of the warpgroup, or of the block, wait for each other: tiles that they read can be written."""
    if barrier is None:
        plgpu.inline_mgpu()(warps_wait)()
    else:
        meet(barrier)


def from_zero(products):
    """What accumulators found that started at zero, with a use of a zero after them.

    Without it LLVM takes the register of the last accumulator for the zero that it copies to all accumulators of a
    block of code; ptxas then sees no zero, and does in 32 moves each what a bit of `wgmma` says.
    """
    plgpu.inline_mgpu()(use_zero)()
    return products


def use_zero(_) -> None:
    """Nothing, in assembly, with a zero as its operand."""
    zero = mgpu.c(0, ir.IntegerType.get_signless(32))
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [zero], "", "r", has_side_effects=True)


@dataclasses.dataclass(frozen=True)
class Products:
    """Matrix products of one warpgroup.

    `wgmma` takes its left operand from registers and adds to accumulators that hold a value; the interpreter does
    neither, so there
    the operand goes through `spare` (shared memory of this warpgroup, [64, 64] bf16) and the sum is made afterwards.
    """

    spare: object = None

    def __call__(self, a, b, shape, *, onto: jax.Array | None = None) -> jax.Array:
        """a @ b (+ onto) in float32; a: register array or shared ref, b: shared ref."""
        return self.total([(a, b)], shape, onto=onto)

    def total(self, pairs, shape, *, onto: jax.Array | None = None) -> jax.Array:
        """Sum of a @ b over `pairs` (+ onto): one chain of asynchronous products, waited for once."""
        if self.spare is not None:
            return self._interpreted(pairs, shape, onto)

        def run(accumulator):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
            return accumulator[...] if onto is None else None

        if onto is None:
            return from_zero(pl.run_scoped(run, plgpu.ACC(shape, F32)))
        return pl.run_state(run)(plgpu.ACC.init(onto))

    def several(self, *chains, during=None) -> tuple:
        """`total` of each (pairs, shape), all under way at once, and last, if asked for, what `during()` finds in the
        meantime."""
        if self.spare is not None:
            found = tuple(self.total(*chain) for chain in chains)
            return (*found, during()) if during else found

        def run(*accumulators):
            for accumulator, (pairs, _) in zip(accumulators, chains, strict=True):
                for a, b in pairs:
                    plgpu.wgmma(accumulator, a, b)
            meantime = (during(),) if during else ()
            return (*(accumulator[...] for accumulator in accumulators), *meantime)

        return from_zero(pl.run_scoped(run, *(plgpu.ACC(shape, F32) for _, shape in chains)))

    def beside(self, pairs, onto: jax.Array, *chains) -> list[jax.Array]:
        """`total` of pairs onto a value, and of each (pairs, shape) beside it; all are under way at once."""
        if self.spare is not None:
            return [self.total(pairs, onto.shape, onto=onto), *self.several(*chains)]

        def run(accumulators):
            for accumulator, terms in zip(accumulators, [pairs, *(terms for terms, _ in chains)], strict=True):
                for a, b in terms:
                    plgpu.wgmma(accumulator, a, b)

        zeros = (plgpu.layout_cast(jnp.zeros(shape, F32), WGMMA) for _, shape in chains)
        return from_zero(pl.run_state(run)([plgpu.ACC.init(x) for x in (onto, *zeros)]))

    def _interpreted(self, pairs, shape, onto):
        total = onto
        for a, b in pairs:
            if isinstance(a, jax.Array):
                self.spare[...] = a
                plgpu.commit_smem()
                a = self.spare

            def run(accumulator, a=a, b=b):
                plgpu.wgmma(accumulator, a, b)
                return accumulator[...]

            product = pl.run_scoped(run, plgpu.ACC(shape, F32))
            total = product if total is None else total + product
        return total
