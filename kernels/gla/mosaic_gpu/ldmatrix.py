"""Tiles of 16-bit numbers between shared memory and registers, by `ldmatrix` and `stmatrix`.

Pallas lowers an access for any layout: some 250 operations, most of which fold to constants, and for a store those of a
load as well, whose result nothing uses. That was half of all operations of a kernel, and so of the time until its first
call. Here is the one layout that they have, in 60 operations and much the same machine code: rows of 64 numbers,
128 bytes whose parts of 16 are permuted by the number of the row (`warpgroup.transforms`), and registers as `wgmma`
accumulates. The functions are for `inline_mgpu`, and get a reference as Mosaic has it: [8, n / 64, 8, 64] for [64, n].
"""

from collections.abc import Iterator

import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray, fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

LAYOUT = fragmented_array.WGMMA_LAYOUT


def load_tile(_, ref: ir.Value) -> FragmentedArray:
    kind, i32 = ir.MemRefType(ref.type), ir.IntegerType.get_signless(32)
    pair, single = ir.VectorType.get((2,), kind.element_type), ir.VectorType.get((1,), i32)
    registers = np.empty(LAYOUT.registers_shape((64, 64 * kind.shape[1])), object)
    for four, address in _of_four_registers(ref):
        loaded = nvvm.ldmatrix(address, num=4, **_matrices())
        for i, register in enumerate(four):
            number = llvm.extractvalue(i32, loaded, [i])
            registers[register] = vector.bitcast(pair, vector.broadcast(single, number))
    signed = isinstance(kind.element_type, ir.IntegerType) or None
    return FragmentedArray(_registers=registers, _layout=LAYOUT, _is_signed=signed)


def store_tile(_, ref: ir.Value, x: FragmentedArray) -> None:
    i32 = ir.IntegerType.get_signless(32)
    for four, address in _of_four_registers(ref):
        nvvm.stmatrix(address, [utils.bitcast(x.registers[register], i32) for register in four], **_matrices())


def undefined(shape: tuple[int, ...], kind: ir.Type, layout) -> FragmentedArray:
    """Registers that hold anything."""
    registers = np.empty(layout.registers_shape(shape), object)
    for index in np.ndindex(registers.shape):
        registers[index] = llvm.mlir_undef(ir.VectorType.get((layout.vector_length,), kind))
    return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _matrices() -> dict:
    shape = ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>")
    return {"layout": nvvm.MMALayout.row, "shape": shape, "elt_type": nvvm.LdStMatrixEltType.B16}


def _of_four_registers(ref: ir.Value) -> Iterator[tuple[list[tuple[int, ...]], ir.Value]]:
    """Indices of four registers, and where they are: in each of four 8 x 8 matrices side by side, the row that this
    thread gives the address of (thread i % 8 of each eight does, for matrix i / 8 % 4)."""
    i8, i32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32)
    kind = ir.MemRefType(ref.type)
    down, across = (2 * stride for stride in kind.get_strides_and_offset()[0][:2])  # bytes from one 8 x 64 to the next
    constant = lambda x: arith.constant(i32, x)
    bits = lambda x, start, mask: arith.andi(arith.shrui(x, constant(start)) if start else x, constant(mask))
    thread = nvvm.read_ptx_sreg_tid_x()
    row, matrix, warp = bits(thread, 0, 7), bits(thread, 3, 3), bits(thread, 5, 3)
    of_row = arith.ori(arith.shli(row, constant(7)), arith.shli(arith.xori(row, matrix), constant(4)))
    left = arith.addi(arith.muli(warp, constant(2 * down)), of_row)
    right = arith.xori(left, constant(64))  # 4 parts of 16 bytes further, permuted
    base = utils.memref_ptr(ref)
    for half, offset in enumerate((left, right)):
        of_thread = utils.getelementptr(base, [offset], i8)
        for i in range(kind.shape[1]):
            for lower in range(2):
                first = 8 * i + 4 * half
                four = [(0, column, 0, 0, lower, 0, 0, 0, 0) for column in range(first, first + 4)]
                yield four, utils.getelementptr(of_thread, [lower * down + i * across], i8)
