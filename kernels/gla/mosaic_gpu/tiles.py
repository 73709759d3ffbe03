"""Tile choices by shape: no tuning at run time. The figures behind them are in README.md."""

from .backward import BackwardTiles
from .forward import ForwardTiles


def padded_widths(key_width: int, value_width: int) -> tuple[int, int]:
    """The widths that the kernels run at: K 64, 128 or 256, V a multiple of 64, of 128 above that."""
    K = next(width for width in (64, 128, 256) if width >= key_width)
    block = 64 if value_width <= 64 else 128
    return K, -(-value_width // block) * block


def forward_tiles(q_shape, v_shape) -> ForwardTiles:
    """Blocks of 128 values where the state's registers allow it, and as many chunks in flight as shared memory does."""
    K, V = q_shape[-1], v_shape[-1]
    if K == 256:
        return ForwardTiles(value_block=64, warpgroups=2, stages=1)
    return ForwardTiles(value_block=min(V, 128), warpgroups=K // 64, stages=2)


def backward_tiles(q_shape, v_shape) -> BackwardTiles:
    """Blocks of 128 x 128 channels: as much of a state and its gradient as one block of threads holds."""
    return BackwardTiles(key_block=min(q_shape[-1], 128), value_block=min(v_shape[-1], 128))
