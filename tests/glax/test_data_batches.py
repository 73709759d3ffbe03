"""Batches: nothing lost or repeated, documents apart, the same order after any restart on any process count."""

import collections
import dataclasses
import itertools
import json
import tempfile
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from glax.data import DataConfig, PreparedData, TokenStore, load_tokenizer, train_batches, validation_batches
from glax.data.batches import packed_dataset
from glax.data.packing import PackedRows
from glax.data.shards import ShardWriter
from glax.data.tokenizers import ByteTokenizer
from glax.errors import UserError

EOS = 256
lengths = st.lists(st.integers(0, 30), min_size=1, max_size=25)
sequence_lengths = st.sampled_from([1, 2, 7, 16])


def make_store(folder, lengths, shard_tokens=64):
    """Documents of mixed tokens, over several shards; num_bytes is 3 per token."""
    tokens = np.arange(sum(lengths)) ** 2 * 37 // 11 % 256
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    writer = ShardWriter(Path(folder) / "store", 257, EOS, shard_tokens)
    for document in documents:
        writer.write(document, 3 * len(document))
    writer.close()
    return TokenStore(Path(folder) / "store"), [tuple(document.tolist()) for document in documents]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    lengths = np.random.default_rng(1).integers(1, 200, 60).tolist()
    store, _ = make_store(tmp_path_factory.mktemp("data"), lengths, 2000)
    return PreparedData(store, store, load_tokenizer("bytes"))


CONFIG = DataConfig(sequence_length=32, batch_size=8, seed=3)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(got, wanted):
    np.testing.assert_equal(got, wanted)


def split_documents(targets):
    documents, start = [], 0
    for end in np.flatnonzero(targets == EOS) + 1:
        documents.append(tuple(targets[start : end - 1].tolist()))
        start = end
    assert start == len(targets), "the last document has no end token"
    return documents


@settings(deadline=None, max_examples=80)
@given(lengths, sequence_lengths, st.integers(0, 2**31), st.integers(0, 3))
def test_rows_of_an_epoch_hold_every_document_once(lengths, length, seed, epoch):
    with tempfile.TemporaryDirectory() as folder:
        store, documents = make_store(folder, lengths)
        assert store.num_tokens == sum(lengths) + len(lengths)
        if store.num_tokens < length:
            return
        rows = PackedRows(store, length, seed)
        epoch_rows = [rows[epoch * len(rows) + i] for i in range(len(rows))]
        counted = np.concatenate([row["targets"][row["weights"] > 0] for row in epoch_rows])
        assert collections.Counter(split_documents(counted)) == collections.Counter(documents)
        for row, after in itertools.pairwise([*epoch_rows, None]):
            assert set(np.unique(row["weights"])) <= {0.0, 1.0}
            # The input is the target before, at a document's start too, where that target is the end token.
            assert_same(row["tokens"][1:], row["targets"][:-1])
            assert row["segment_ids"][0] == 1
            assert_same(np.diff(row["segment_ids"]), (row["targets"][:-1] == EOS).astype(np.int32))
            if after is not None and after["weights"].all():
                assert after["tokens"][0] == row["targets"][-1]


@settings(deadline=None, max_examples=80)
@given(lengths, sequence_lengths, st.sampled_from([1, 2, 6]), st.sampled_from([1, 2]))
def test_validation_reads_every_target_once(lengths, length, batch_size, processes):
    with tempfile.TemporaryDirectory() as folder:
        store, documents = make_store(folder, lengths)
        if batch_size % processes:
            return
        config = DataConfig(sequence_length=length, batch_size=batch_size)
        data = PreparedData(store, store, load_tokenizer("bytes"))
        passes = [
            validation_batches(data, config, process_index=index, process_count=processes) for index in range(processes)
        ]
        assert len({len(one) for one in passes}) == 1
        batches = [batch for one in passes for batch in one]
        assert len(batches) == processes * len(passes[0])
        assert all(batch["tokens"].shape == (batch_size // processes, length) for batch in batches)
        assert passes[0].num_bytes == 3 * sum(lengths)
        assert passes[0].num_tokens == sum(batch["weights"].sum() for batch in batches) == store.num_tokens
        wanted = collections.Counter()
        for document in documents:
            targets = (*document, EOS)
            inputs = (EOS, *document)
            wanted.update(
                (inputs[start : start + length], targets[start : start + length])
                for start in range(0, len(targets), length)
            )
        got = collections.Counter()
        for batch in batches:
            for inputs, targets, segments, weights in zip(
                batch["tokens"], batch["targets"], batch["segment_ids"], batch["weights"], strict=True
            ):
                assert segments.min() >= 1 and (np.diff(segments) >= 0).all()
                for segment in np.unique(segments):
                    inside = segments == segment
                    assert len(np.unique(weights[inside])) == 1
                    if weights[inside][0]:
                        got[tuple(inputs[inside].tolist()), tuple(targets[inside].tolist())] += 1
        assert got == wanted


TEXTS = ["größer " * 9 + str(i) for i in range(30)] + ["\N{SNOWMAN}" * 50, "x"]


@pytest.mark.parametrize("limit", [1, 2, 3, 50, 51, 52, 53, 1000, 1001, 1002, 1003, 10**6])
def test_validation_limit_counts_the_bytes_it_reads(tmp_path, limit):
    tokenizer = load_tokenizer("bytes")
    writer = ShardWriter(tmp_path / "store", 257, EOS)
    for text in TEXTS:
        writer.write(tokenizer.encode(text), len(text.encode()))
    writer.close()
    store = TokenStore(tmp_path / "store")
    data = PreparedData(store, store, tokenizer)
    config = DataConfig(sequence_length=256, batch_size=4, validation_tokens=limit)
    some = validation_batches(data, config, process_index=0, process_count=1)
    assert_same(list(some), list(some))
    read = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in some])
    assert min(limit - 3, store.num_tokens) <= some.num_tokens == len(read) <= limit
    assert some.num_bytes == np.sum(read != EOS)
    assert "\ufffd" not in tokenizer.decode(read), "a document was cut inside a character"


class Lossy(ByteTokenizer):
    """Its text is not the one that was encoded, so its tokens do not tell how many bytes they stand for."""

    def decode(self, ids):
        return "?"


def test_validation_limit_keeps_to_whole_documents_of_a_lossy_tokenizer(data):
    data = dataclasses.replace(data, tokenizer=Lossy())

    def start(limit):
        config = dataclasses.replace(CONFIG, validation_tokens=limit)
        return validation_batches(data, config, process_index=0, process_count=1)

    some = start(1000)
    assert 700 < some.num_tokens <= 1000
    assert some.num_bytes == 3 * (some.num_tokens - some.num_documents)
    assert sum(batch["weights"].sum() for batch in some) == some.num_tokens
    assert start(1).num_documents == 1


def test_an_epoch_is_a_shuffle_of_its_rows_and_another_in_each_epoch(data):
    iterator = train_batches(data, dataclasses.replace(CONFIG, batch_size=1), process_index=0, process_count=1)
    count = iterator.windows_per_epoch
    rows = PackedRows(data.train, CONFIG.sequence_length, CONFIG.seed)
    epochs = []
    for epoch in range(3):
        got = [batch["targets"][0].tobytes() for batch in take(iterator, count)]
        wanted = [rows[epoch * count + i]["targets"].tobytes() for i in range(count)]
        assert sorted(got) == sorted(wanted)
        assert got != wanted
        epochs.append(got)
    assert len(set(map(tuple, epochs))) == 3
    # Documents are cut elsewhere too, not only shown in another order.
    assert set(epochs[0]) != set(epochs[1])


def test_seeds_differ(data):
    first = [
        next(train_batches(data, dataclasses.replace(CONFIG, seed=seed), process_index=0, process_count=1))["tokens"]
        for seed in range(4)
    ]
    assert len({tokens.tobytes() for tokens in first}) == 4


def test_order_is_fixed_for_good(tmp_path):
    """A changed order would break the resumption of every run made before."""
    store, _ = make_store(tmp_path, [5, 0, 9, 12, 3, 7])
    order, _ = PackedRows(store, 8, seed=1)._order(2)
    assert order.tolist() == [5, 3, 1, 0, 4, 2]
    config = DataConfig(sequence_length=8, batch_size=4, seed=1)
    iterator = train_batches(
        PreparedData(store, store, load_tokenizer("bytes")), config, process_index=0, process_count=1
    )
    first = [batch["targets"][:, 0].tolist() for batch in take(iterator, 3)]
    assert first == [[92, 164, 30, 12], [147, 84, 56, 84], [92, 147, 145, 12]]


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_the_global_batch(data, processes):
    whole = take(train_batches(data, CONFIG, process_index=0, process_count=1), 30)
    parts = [
        take(train_batches(data, CONFIG, process_index=index, process_count=processes), 30)
        for index in range(processes)
    ]
    for step, batch in enumerate(whole):
        for name, wanted in batch.items():
            assert_same(np.concatenate([part[step][name] for part in parts]), wanted)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=4), st.sampled_from([0, 1, 3]))
def test_resumes_anywhere_with_the_same_batches(data, stops, threads):
    config = dataclasses.replace(CONFIG, threads=threads, prefetch=4)
    wanted = take(train_batches(data, CONFIG, process_index=0, process_count=1), 64)
    iterator = train_batches(data, config, process_index=0, process_count=1)
    for stop in stops:
        state = {"next_index": stop, "fingerprint": iterator.get_state()["fingerprint"]}
        iterator.set_state(json.loads(json.dumps(state)))
        assert iterator.get_state() == state
        assert_same(take(iterator, 4), wanted[stop : stop + 4])
        state = json.loads(json.dumps(iterator.get_state()))
        other = train_batches(data, config, process_index=0, process_count=1)
        other.set_state(state)
        assert_same(take(other, 2), take(iterator, 2))


def test_grain_checks_the_pipeline(data):
    limited = grain.experimental.LimitIterDataset(packed_dataset(data.train, CONFIG, 1, 2), 9)
    grain.experimental.assert_equal_output_after_checkpoint(limited)


def test_orbax_saves_and_loads_the_iterator(data, tmp_path):
    def start(index, count):
        return train_batches(data, CONFIG, process_index=index, process_count=count)

    iterator = start(0, 1)
    take(iterator, 11)
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save_checkpointables(11, {"state": {"x": np.arange(3)}, "data": iterator})
        wanted = take(iterator, 5)
        restored = start(0, 1)
        checkpointer.load_checkpointables(11, {"data": restored})
        assert_same(take(restored, 5), wanted)
        other = train_batches(data, dataclasses.replace(CONFIG, seed=9), process_index=0, process_count=1)
        with pytest.raises(UserError, match="other training data"):
            checkpointer.load_checkpointables(11, {"data": other})
    (file,) = (tmp_path / "run").glob("**/process_*.json")
    file.rename(file.with_name("process_3-of-4.json"))
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        halves = [start(index, 2) for index in range(2)]
        for half in halves:
            checkpointer.load_checkpointables(11, {"data": half})
    for whole, low, high in zip(wanted, *halves, strict=False):
        assert_same(np.concatenate([low["tokens"], high["tokens"]]), whole["tokens"])


@pytest.mark.parametrize("change", [{"seed": 4}, {"sequence_length": 16}, {"batch_size": 16}])
def test_state_of_other_settings_is_refused(data, change):
    state = train_batches(data, CONFIG, process_index=0, process_count=1).get_state()
    other = train_batches(data, dataclasses.replace(CONFIG, **change), process_index=0, process_count=1)
    with pytest.raises(UserError, match="other training data"):
        other.set_state(state)


def test_state_of_other_data_is_refused(data, tmp_path):
    state = train_batches(data, CONFIG, process_index=0, process_count=1).get_state()
    store, _ = make_store(tmp_path, [100, 100])
    other = train_batches(dataclasses.replace(data, train=store), CONFIG, process_index=0, process_count=1)
    with pytest.raises(UserError, match="other training data"):
        other.set_state(state)


def test_bad_shapes_are_one_line_errors(data):
    def start(processes=1, **changes):
        return train_batches(data, dataclasses.replace(CONFIG, **changes), process_index=0, process_count=processes)

    with pytest.raises(UserError, match=r"has \d+ tokens, fewer than one sequence of 100000"):
        start(sequence_length=100_000)
    with pytest.raises(UserError, match="batch_size 8 is not a multiple of the 3 processes"):
        start(processes=3)
    for name, value in {
        "batch_size": 0,
        "sequence_length": 0,
        "validation_tokens": 0,
        "threads": -1,
        "seed": -1,
    }.items():
        with pytest.raises(UserError, match=f"^{name} is {value}: "):
            start(**{name: value})
    assert next(start(sequence_length=data.train.num_tokens))["tokens"].shape == (8, data.train.num_tokens)
