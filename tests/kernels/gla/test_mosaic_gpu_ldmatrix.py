"""Where `ldmatrix` and `stmatrix` find the registers of a tile: against the layouts' definitions, with no GPU."""

import operator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from kernels.gla import mosaic_gpu
from kernels.gla.mosaic_gpu import ldmatrix, warpgroup

THREADS = 128


def places(monkeypatch, thread, columns, strides) -> dict:
    """{register: the address that a thread gives for the four that it is of}, in bytes from the start of the tile."""
    numbers = {"constant": lambda _, x: x, "andi": operator.and_, "ori": operator.or_, "xori": operator.xor}
    numbers |= {"addi": operator.add, "muli": operator.mul, "shli": operator.lshift, "shrui": operator.rshift}
    kind = SimpleNamespace(shape=(8, columns // 64, 8, 64), get_strides_and_offset=lambda: ((*strides, 64, 1), 0))
    types = SimpleNamespace(MemRefType=lambda x: x, IntegerType=SimpleNamespace(get_signless=lambda bits: bits))
    pointers = SimpleNamespace(memref_ptr=lambda _: 0, getelementptr=lambda start, offsets, _: start + sum(offsets))
    monkeypatch.setattr(ldmatrix, "arith", SimpleNamespace(**numbers))
    monkeypatch.setattr(ldmatrix, "ir", types)
    monkeypatch.setattr(ldmatrix, "utils", pointers)
    monkeypatch.setattr(ldmatrix, "nvvm", SimpleNamespace(read_ptx_sreg_tid_x=lambda: thread))
    found = {}
    for four, address in ldmatrix._of_four_registers(SimpleNamespace(type=kind)):
        found |= {register: (i, address) for i, register in enumerate(four)}
    return found


@pytest.mark.parametrize(
    ("columns", "strides"), [(64, (512, 512)), (64, (1024, 512)), (128, (1024, 512))], ids=["tile", "half", "two tiles"]
)
def test_every_register_is_where_its_numbers_are(monkeypatch, columns, strides):
    """`strides`: elements from one 8 x 64 block of the tile to the next, down and across."""
    of_thread = [places(monkeypatch, thread, columns, strides) for thread in range(THREADS)]
    assert len(of_thread[0]) == 2 * columns // 8
    for thread, registers in enumerate(of_thread):
        warp, lane = divmod(thread, 32)
        for register, (i, _) in registers.items():
            _, column_block, _, _, lower, *_ = register
            # The layout of wgmma's accumulators: a pair of neighbours in a row, four threads to a row of 8 columns.
            row, column = 16 * warp + 8 * lower + lane // 4, 8 * column_block + 2 * (lane % 4)
            # ldmatrix: row r of the i-th 8 x 8 matrix is where thread 8 i + r says; each thread gets 4 bytes of a row.
            at = of_thread[32 * warp + 8 * i + lane // 4][register][1] + 4 * (lane % 4)
            # Shared memory: parts of 16 bytes of a row of 128, permuted by the row's number (128-byte swizzle).
            block = 2 * (row // 8 * strides[0] + column // 64 * strides[1])
            part = (column % 64 // 8) ^ (row % 8)
            assert at == block + 128 * (row % 8) + 16 * part + 2 * (column % 8)


@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 256)], ids=["fused", "wide"])
def test_no_access_is_lowered_twice(monkeypatch, K, V):
    """Pallas lowers the first branch of a cond twice, so none has an access first (`warpgroup.choose`)."""
    jax.clear_caches()  # of kernels traced before
    accesses = []

    def noted(access):
        def call(*args):
            accesses.append(access)
            return access(*args)

        return call

    by_hand = [noted(ldmatrix.load_tile), noted(ldmatrix.store_tile)]
    for name, call in zip(("load_tile", "store_tile"), by_hand, strict=True):
        monkeypatch.setattr(warpgroup, name, call)

    def both(do, *inputs):
        o, vjp = jax.vjp(lambda *inputs: mosaic_gpu.gated_linear_attention(*inputs, scale=1.0), *inputs)
        return o, *vjp(do)

    seen = []  # a kernel that is called twice is lowered once

    def written(jaxpr) -> int:
        count = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "lowered_once":
                if eqn.params["kernels"] in seen:
                    continue
                seen.append(eqn.params["kernels"])
            count += eqn.params.get("mgpu_fn") in by_hand
            count += sum(map(written, jaxprs_in_params(eqn.params)))
        return count

    q, v = (jax.ShapeDtypeStruct((1, 192, 1, width), jnp.bfloat16) for width in (K, V))
    traced = jax.jit(both).trace(v, q, q, v, q)
    traced.lower(lowering_platforms=("cuda",))
    jax.clear_caches()
    assert len(accesses) == written(traced.jaxpr.jaxpr) > 40
