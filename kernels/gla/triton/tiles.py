"""Tile choices by compute capability, widths and dtype: no tuning at run time. README.md has what they compile to."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tile:
    """One kernel's: key and value channels of a block, warps, and loads in flight (stages)."""

    keys: int
    values: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of every kernel."""

    prepare: Tile
    states: Tile
    rows: Tile
    products: Tile
    gradients: Tile


def padded_width(width: int) -> int:
    """The width that the kernels run at: a power of two from 16 to 64, or a multiple of 64."""
    return next((w for w in (16, 32, 64) if w >= width), -(-width // 64) * 64)


def tiles_for(capability: int, K: int, V: int, exact: bool) -> Tiles:
    """For padded widths; `exact` is with float32 operands, twice as large and three products for one."""
    small = capability in (86, 89)  # 99 KiB of shared memory a block
    keys, values = min(K, 64), min(V, 64)
    if exact:
        narrow = min(K, 32 if capability >= 90 else 16)
        return Tiles(
            prepare=Tile(narrow, 0, warps=8, stages=1),
            states=Tile(min(K, 32), values, warps=8, stages=1 if small else 2),
            rows=Tile(min(K, 32), values, warps=8, stages=1 if small else 2),
            products=Tile(0, min(V, 32), warps=8, stages=1 if small else 2),
            gradients=Tile(min(K, 16), values, warps=8, stages=1),
        )
    wide = 128 if V % 128 == 0 else values
    stages = 2 if small else 3
    return Tiles(
        prepare=Tile(keys if capability >= 90 else min(K, 32), 0, warps=4, stages=1),
        states=Tile(keys, wide, warps=4, stages=stages),
        rows=Tile(keys, wide, warps=4, stages=stages),
        products=Tile(0, values, warps=4, stages=stages),
        gradients=Tile(min(K, 32), values, warps=4, stages=stages if values < V else 1),
    )
