"""Batches for training (endless, shuffled, exactly resumable) and for validation (finite, every token once)."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Iterator
from pathlib import Path

import grain
import jax
import numpy as np

from glax.data.config import DataConfig
from glax.data.packing import PackedRows, ProcessRows, read_row, whole_document_rows
from glax.data.preparation import PreparedData
from glax.data.shards import TokenStore
from glax.errors import UserError

Batch = dict[str, np.ndarray]


def train_batches(
    data: PreparedData,
    config: DataConfig,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
) -> "TrainBatches":
    """Endless training batches of this process.

    A batch is ``tokens``, ``targets``, ``segment_ids`` int32 and ``weights`` float32, each ``[batch_size /
    process_count, sequence_length]``. ``targets`` are the tokens that follow ``tokens``; the first input of a document
    is the end token, so each of its tokens is predicted, and its end token too. ``segment_ids`` start at 1 in a row and
    change where a document starts. Rows are full; weights are 1 except for the tokens that the last row of an epoch
    shares with another (see PackedRows).

    Rows come in a global shuffle, another one in each epoch. The batch of a step is a function of the data,
    ``sequence_length``, ``batch_size``, ``seed`` and the step alone; processes (jax's, unless given) take equal parts
    of it. Raises UserError where the data is shorter than one row or processes do not divide the batch.
    """
    store, length = data.train, config.sequence_length
    process_index, process_count = _processes(config, process_index, process_count)
    if store.num_tokens < length:
        raise UserError(
            f"the training data has {store.num_tokens} tokens, fewer than one sequence of {length}: shorten "
            "sequence_length or give more data"
        )
    described = f"{store.fingerprint} {length} {config.batch_size} {config.seed}"
    return TrainBatches(
        packed_dataset(store, config, process_index, process_count).__iter__(),
        fingerprint=hashlib.sha256(described.encode()).hexdigest()[:32],
        windows_per_epoch=-(-store.num_tokens // length),
    )


def packed_dataset(
    store: TokenStore, config: DataConfig, process_index: int, process_count: int
) -> grain.IterDataset[Batch]:
    """The grain pipeline behind train_batches: pack, shuffle, repeat, take this process's rows, batch, prefetch."""
    rows = PackedRows(store, config.sequence_length, config.seed).seed(config.seed).shuffle().repeat()
    rows = ProcessRows(rows, config.batch_size, process_index, process_count)
    return rows.batch(config.batch_size // process_count, drop_remainder=True).to_iter_dataset(
        grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch if config.threads else 0)
    )


class TrainBatches(grain.DatasetIterator):
    """Iterator over training batches, read ahead by threads.

    Its state is the number of batches delivered, with a fingerprint of what they were drawn from; restoring the state
    of other data or other settings raises UserError. As a checkpointable of orbax it saves one small file per process,
    and loads whichever process's file it finds, since all hold the same state: process counts may differ.

    Attributes:
        windows_per_epoch: rows in one pass over the data.
    """

    def __init__(self, batches: grain.DatasetIterator, fingerprint: str, windows_per_epoch: int):
        super().__init__(batches)
        self.windows_per_epoch = windows_per_epoch
        self._fingerprint = fingerprint

    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, int | str]:
        return {"next_index": self._parent.get_state()["next_index"], "fingerprint": self._fingerprint}

    def set_state(self, state: dict[str, int | str]) -> None:
        if state.get("fingerprint") != self._fingerprint:
            raise UserError(
                "the checkpoint was made with other training data, tokenizer, sequence_length, batch_size or seed: "
                "restore those, or start a new run"
            )
        self._parent.set_state({"next_index": state["next_index"]})

    async def load(self, directory: Path) -> Awaitable[None]:
        # At once rather than in the awaitable that is returned, whose errors orbax takes for a missing handler.
        files = sorted(directory.glob("process_*-of-*.json"))
        if not files:
            raise FileNotFoundError(f"{directory} holds no state of a data iterator")
        self.set_state(json.loads(files[0].read_text()))
        return asyncio.sleep(0)


def validation_batches(
    data: PreparedData,
    config: DataConfig,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
) -> "ValidationBatches":
    """One pass over the validation documents, the same each time; batches like train_batches'.

    A document that fits in a row is read whole. A longer one is cut at multiples of ``sequence_length`` and each part
    starts from a fresh state, so the first tokens of a part are predicted with less context than the text offers.
    """
    process_index, process_count = _processes(config, process_index, process_count)
    return ValidationBatches(data, config, process_index, process_count)


class ValidationBatches:
    """A validation pass, as often as it is iterated. Free places in rows and in the last batch have weight 0.

    ``validation_tokens`` limits it to documents spread over the data, the last one to its head (where the tokenizer
    changes text, so that a head's bytes cannot be counted, the last one is left out, or read whole if it is the first).
    Bits per byte is the sum of weighted negative log likelihoods in nats, over all processes, divided by
    ``ln 2 * num_bytes``; it charges the model for each document's end token too.

    Attributes:
        num_tokens: targets with weight 1, over all processes.
        num_bytes: UTF-8 bytes of the text they cover.
        num_documents: documents they cover.
    """

    def __init__(self, data: PreparedData, config: DataConfig, process_index: int, process_count: int):
        self._documents, lengths, self.num_bytes = _chosen(data, config.validation_tokens)
        self.num_documents = len(self._documents)
        self.num_tokens = int(lengths.sum())
        self._store = data.validation
        self._rows = whole_document_rows(lengths, config.sequence_length)
        self._sequence_length = config.sequence_length
        self._batch_size = config.batch_size
        self._part = config.batch_size // process_count
        self._process_index = process_index

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for batch in range(len(self)):
            first = batch * self._batch_size + self._process_index * self._part
            rows = [self._row(index) for index in range(first, first + self._part)]
            yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, index: int) -> Batch:
        pieces = self._rows[index] if index < len(self._rows) else []
        documents, offsets, lengths = np.array(pieces, np.int64).reshape(-1, 3).T
        starts = self._store.starts[self._documents[documents]] + offsets
        return read_row(self._store, starts, lengths, self._sequence_length)


def _chosen(data: PreparedData, max_tokens: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Validation documents to read, how many tokens of each, and the bytes of text which those cover."""
    store = data.validation
    documents = np.arange(store.num_documents)
    if max_tokens is None or store.num_tokens <= max_tokens:
        return documents, store.lengths, store.num_bytes
    # Multiples of the golden ratio, modulo 1, fall evenly over the store however many are taken.
    spread = np.argsort(documents * 0.6180339887498949 % 1.0, kind="stable")
    ends = np.cumsum(store.lengths[spread])
    whole = int(np.searchsorted(ends, max_tokens, "right"))
    num_bytes = int(store.document_bytes[spread[:whole]].sum())
    room = max_tokens - (int(ends[whole - 1]) if whole else 0)
    head, head_bytes = _head(data, int(spread[whole]), room)
    if head == 0 and whole == 0:
        head, head_bytes = int(store.lengths[spread[0]]), int(store.document_bytes[spread[0]])
    if head > 0:
        num_bytes += head_bytes
        whole += 1
    lengths = store.lengths[spread[:whole]]
    if head > 0:
        lengths[-1] = head
    by_place = np.argsort(spread[:whole])
    return spread[by_place], lengths[by_place], num_bytes


def _head(data: PreparedData, document: int, max_tokens: int) -> tuple[int, int]:
    """Tokens and bytes of the longest head of a document, within ``max_tokens``, whose bytes are certain; else 0, 0."""
    ids = data.validation.document(document)
    text = data.tokenizer.decode(ids)
    if len(text.encode()) != data.validation.document_bytes[document]:
        return 0, 0  # the tokenizer changes text, so the tokens do not tell which bytes they stand for
    for tokens in range(min(max_tokens, len(ids)), max(0, max_tokens - 8), -1):
        head = data.tokenizer.decode(ids[:tokens])
        if text.startswith(head) and not head.endswith("\ufffd"):  # else it ends inside a character
            return tokens, len(head.encode())
    return 0, 0


def _processes(config: DataConfig, process_index: int | None, process_count: int | None) -> tuple[int, int]:
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if config.batch_size % process_count:
        raise UserError(f"batch_size {config.batch_size} is not a multiple of the {process_count} processes")
    return process_index, process_count
