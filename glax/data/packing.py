"""Rows of a fixed length over documents: which document's tokens stand where.

A row is a run of pieces (a document, or a part of one). Its targets are the pieces' tokens, its inputs the same
positions less one (see shards.py), and every piece is a segment of its own, so no state passes between documents.
"""

import functools
import threading

import grain
import numpy as np
from jaxtyping import Float, Int

from glax.data.shards import TokenStore

Row = dict[str, Int[np.ndarray, " T"] | Float[np.ndarray, " T"]]


def read_row(
    store: TokenStore, starts: Int[np.ndarray, " n"], lengths: Int[np.ndarray, " n"], sequence_length: int
) -> Row:
    """The row that holds the pieces at positions ``starts[i] : starts[i] + lengths[i]``, in order.

    Returns ``tokens``, ``targets``, ``segment_ids`` (1, 2, ... per piece) int32 and ``weights`` float32, each
    ``[sequence_length]``. What the pieces leave free is a segment of end tokens with weight 0.
    """
    used = int(lengths.sum())
    row_starts = np.cumsum(lengths) - lengths
    positions = np.repeat(starts - row_starts, lengths) + np.arange(used)
    end = np.full(sequence_length - used, store.eos_id, np.int32)
    segments = np.arange(1, len(lengths) + 2, dtype=np.int32)
    return {
        "tokens": np.concatenate([store.read(positions - 1), end]),
        "targets": np.concatenate([store.read(positions), end]),
        "segment_ids": np.repeat(segments, np.append(lengths, len(end))),
        "weights": (np.arange(sequence_length) < used).astype(np.float32),
    }


class PackedRows(grain.MapDataset):
    """Rows cut from all documents laid end to end, anew in each epoch: random access, no padding, no packing state.

    Row ``epoch * len(self) + i`` is tokens ``i * T : (i + 1) * T`` of the epoch's documents in an order drawn from
    ``(seed, epoch)``. The last row of an epoch is its last ``T`` tokens, with weight 0 on those that the row before
    holds too: every token of every document has weight 1 exactly once in an epoch. A document cut by the end of a row
    goes on in another row with its previous token as first input and a fresh state.

    Needs at least ``T`` tokens. Holds about 16 bytes per document and epoch in memory, for at most two epochs.
    """

    def __init__(self, store: TokenStore, sequence_length: int, seed: int):
        super().__init__()
        self._store = store
        self._sequence_length = sequence_length
        self._seed = seed
        self._lock = threading.Lock()
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def __len__(self) -> int:
        return -(-self._store.num_tokens // self._sequence_length)

    def __getitem__(self, index: int | slice) -> Row:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, row = divmod(index, len(self))
        with self._lock:  # so that threads that meet a new epoch together draw its order once
            order, ends = self._order(epoch)
        begin = row * self._sequence_length
        first = min(begin, self._store.num_tokens - self._sequence_length)
        last = first + self._sequence_length
        low = np.searchsorted(ends, first, "right")
        high = np.searchsorted(ends, last, "left") + 1
        documents = order[low:high]
        starts, lengths = self._store.starts[documents], self._store.lengths[documents]
        skipped = first - (ends[low] - lengths[0])
        starts[0] += skipped
        lengths[0] -= skipped
        lengths[-1] -= ends[high - 1] - last
        out = read_row(self._store, starts, lengths, self._sequence_length)
        out["weights"][: begin - first] = 0
        return out

    def _draw_order(self, epoch: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The epoch's documents in order, and where each ends in the epoch's tokens."""
        order = np.argsort(_hash(np.arange(self._store.num_documents), self._seed, epoch), kind="stable")
        return order, np.cumsum(self._store.lengths[order])


class ProcessRows(grain.MapDataset):
    """One process's rows: of every ``batch_size`` rows of the parent, its one of ``process_count`` equal parts.

    So a global batch, the processes' parts in order, does not depend on how many processes there are.
    """

    def __init__(self, parent: grain.MapDataset, batch_size: int, process_index: int, process_count: int):
        super().__init__(parent)
        self._batch_size = batch_size
        self._part = batch_size // process_count
        self._process_index = process_index

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * self._part

    def __getitem__(self, index: int | slice) -> Row:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._part)
        return self._parent[batch * self._batch_size + self._process_index * self._part + row]


def whole_document_rows(lengths: Int[np.ndarray, " n"], sequence_length: int) -> list[list[tuple[int, int, int]]]:
    """Places documents in rows without cutting any that fits in one.

    Returns rows of pieces ``(document, offset, length)``: documents longer than ``sequence_length`` are cut at its
    multiples, and each row takes the longest piece left, then the shortest ones while they fit. The same lengths give
    the same rows.
    """
    pieces = [
        (document, offset, min(sequence_length, length - offset))
        for document, length in enumerate(lengths.tolist())
        for offset in range(0, length, sequence_length)
    ]
    pieces.sort(key=lambda piece: -piece[2])
    rows, low, high = [], 0, len(pieces)
    while low < high:
        row, free = [pieces[low]], sequence_length - pieces[low][2]
        low += 1
        while low < high and pieces[high - 1][2] <= free:
            high -= 1
            row.append(pieces[high])
            free -= pieces[high][2]
        rows.append(row)
    return rows


def _hash(index: Int[np.ndarray, " n"], seed: int, epoch: int) -> np.ndarray:
    """Independent-looking uint64 per index (splitmix64 finaliser, twice): the same in every version of numpy."""
    mask = 2**64 - 1
    key = (seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) & mask
    z = index.astype(np.uint64) ^ np.uint64(key)
    for _ in range(2):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) + np.uint64(0x9E3779B97F4A7C15)
    return z
