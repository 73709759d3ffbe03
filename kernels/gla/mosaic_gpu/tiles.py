"""Tile choices by shape: no tuning at run time. The figures behind them are in README.md."""

from .anchors import CHUNK
from .backward import BackwardTiles
from .forward import ForwardTiles
from .wide import WideTiles

MULTIPROCESSORS = 132  # of an H100 or H200


def padded_widths(key_width: int, value_width: int) -> tuple[int, int]:
    """The widths that the kernels run at: K 64, 128 or 256, V 64 or a multiple of 128, which wide heads need."""
    K = next(width for width in (64, 128, 256) if width >= key_width)
    block = 64 if value_width <= 64 and K < 256 else 128
    return K, -(-value_width // block) * block


def is_wide(key_width: int, value_width: int) -> bool:
    """Whether a state takes several blocks of threads, each of which would have to do the gating again."""
    return key_width == 256 or (key_width == 128 and value_width > 128)


def wide_tiles(q_shape, v_shape) -> WideTiles:
    """As many pieces as the card has multiprocessors for: a block of 128 rows of a state takes one."""
    (B, T, H, _), V = q_shape, v_shape[-1]
    return WideTiles(pieces=_pieces(B * H * (V // 128), T, MULTIPROCESSORS))


def forward_tiles(q_shape, v_shape) -> ForwardTiles:
    """Blocks of 128 values, and as many chunks in flight as shared memory holds."""
    (B, T, H, K), V = q_shape, v_shape[-1]
    block = min(V, 128)
    pieces = _pieces(B * H * (V // block), T)
    return ForwardTiles(block, warpgroups=min(K // 64, 2), stages=1 if K == 256 else 2, segments=pieces)


def backward_tiles(q_shape, v_shape) -> BackwardTiles:
    """Blocks of 128 x 128 channels: as much of a state and its gradient as one block of threads holds."""
    (B, T, H, K), V = q_shape, v_shape[-1]
    key_block, value_block = min(K, 128), min(V, 128)
    return BackwardTiles(key_block, value_block, segments=_pieces(B * H * (K // key_block) * (V // value_block), T))


def _pieces(walks: int, length: int, room: int = 2 * MULTIPROCESSORS) -> int:
    """Into how many pieces to cut sequences that give too few walks to fill the card; each costs its tokens twice."""
    pieces, chunks = 1, length // CHUNK
    while walks * pieces * 2 <= room and chunks % (pieces * 2) == 0 and chunks // (pieces * 2) >= 8:
        pieces *= 2
    return pieces if walks * 2 <= MULTIPROCESSORS else 1
