"""Tile choices by shape: no tuning at run time. The figures behind them are in README.md."""

from .anchors import CHUNK
from .backward import BackwardTiles
from .forward import ForwardTiles
from .pieces import WHOLE, Cut
from .wide import WideTiles

MULTIPROCESSORS = 132  # of an H100 or H200
SHORTEST = 8  # chunks of a piece of a sequence


def padded_widths(key_width: int, value_width: int) -> tuple[int, int]:
    """The widths that the kernels run at: K 64, 128 or 256, V 64 or a multiple of 128, which wide heads need."""
    K = next(width for width in (64, 128, 256) if width >= key_width)
    block = 64 if value_width <= 64 and K < 256 else 128
    return K, -(-value_width // block) * block


def is_wide(key_width: int, value_width: int) -> bool:
    """Whether a state takes several blocks of threads, each of which would have to do the gating again."""
    return key_width == 256 or (key_width == 128 and value_width > 128)


def wide_pieces(q_shape, v_shape, shards: int) -> int:
    """As many pieces as `shards` cards have multiprocessors for: a block of 128 rows of a state takes one."""
    (B, T, H, _), V = q_shape, v_shape[-1]
    walks, pieces, chunks = B * H * (V // 128), 1, T // CHUNK
    while walks * pieces * 2 <= MULTIPROCESSORS * shards and chunks % (pieces * 2) == 0 and chunks // (pieces * 2) >= 8:
        pieces *= 2
    return pieces


def wide_tiles(q_shape, pieces: int) -> WideTiles:
    """Of one card's share."""
    B, T, H, _ = q_shape
    prepared, finished = (_chunks_per_block(B * H, T // CHUNK, at_once=blocks) for blocks in (3, 2))
    return WideTiles(pieces, prepared, finished)


def _chunks_per_block(sequences: int, chunks: int, *, at_once: int) -> int:
    """For kernels that take chunks in any order: what leaves the card's last round of blocks the least empty, with a
    fifth of a chunk for a block to start; `at_once` blocks fit a multiprocessor."""
    rounds = lambda n: -(-sequences * -(-chunks // n) // (at_once * MULTIPROCESSORS))
    return min((1, 2, 3, 4, 6, 8, 12, 16), key=lambda n: rounds(n) * (n + 0.2))


def forward_tiles(q_shape, v_shape) -> ForwardTiles:
    """All keys and up to 128 values per block of threads."""
    (B, T, H, K), V = q_shape, v_shape[-1]
    block = min(V, 128)
    return ForwardTiles(block, warpgroups=K // 64, cut=_cut(B * H * (V // block), T, K, block, lighter=0.4))


def backward_tiles(q_shape, v_shape) -> BackwardTiles:
    """All keys and up to 128 values per block of threads: as much of a state and its gradient as it holds."""
    (B, T, H, K), V = q_shape, v_shape[-1]
    block = min(V, 128)
    return BackwardTiles(block, warpgroups=K // 64, cut=_cut(B * H * (V // block), T, K, block, lighter=0.14))


def _cut(walks: int, length: int, keys: int, values: int, *, lighter: float) -> Cut:
    """The cut that leaves the fewest chunks to follow each other on the card, counting the walk for states, which takes
    `lighter` of a walk's time per chunk. More pieces only where they leave 5% fewer."""
    at_once = MULTIPROCESSORS * (2 if keys == values == 64 else 1)
    chunks = length // CHUNK
    cuts = {WHOLE: -(-walks // at_once) * chunks}
    if walks < at_once:
        # Long pieces first, one for each walk; the short ones follow each other where there is room beside them.
        short = chunks // (1 + -(-walks // (at_once - walks)))
        if short >= SHORTEST:
            cuts[Cut(2, shorter=chunks - 2 * short)] = chunks - short + lighter * short
    pieces = 2
    while chunks % pieces == 0 and chunks // pieces >= SHORTEST:
        states = lighter * max(walks * chunks / at_once, chunks / pieces)
        cuts[Cut(pieces)] = -(-walks * pieces // at_once) * (chunks // pieces) + states
        pieces *= 2
    best = WHOLE
    for cut, steps in cuts.items():
        if steps < 0.95 * cuts[best]:
            best = cut
    return best
