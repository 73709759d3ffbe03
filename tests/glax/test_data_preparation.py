"""The prepare step: exact text back, honest splits, reuse by fingerprint, and nothing half-written whatever happens."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

import glax.data.__main__ as command
from glax.data import DataConfig, TokenStore, load_tokenizer, preparation, prepare
from glax.data.shards import ShardWriter
from glax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def texts(count, offset=0):
    return [f"Document {i}: " + "größer " * (i % 7 + 1) for i in range(offset, offset + count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def contents(store):
    tokenizer = load_tokenizer("bytes")
    return [tokenizer.decode(store.document(i)) for i in range(store.num_documents)]


@pytest.fixture
def config(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [*texts(30), "", texts(1)[0]])
    validation = write_jsonl(tmp_path / "validation.jsonl", texts(3, 100))
    return DataConfig(train=train, validation=validation, cache=str(tmp_path / "cache"))


def prepared_folders(config):
    return sorted(path.name for path in (Path(config.cache) / "data").iterdir() if not path.name.endswith(".lock"))


def test_text_comes_back(config, capsys):
    data = prepare(config)
    assert contents(data.train) == [*texts(30), texts(1)[0]]
    assert contents(data.validation) == texts(3, 100)
    assert data.train.num_bytes == sum(len(text.encode()) for text in contents(data.train))
    assert data.train.num_tokens == data.train.num_bytes + data.train.num_documents
    assert data.tokenizer.vocab_size == data.train.vocab_size
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 2 and "31 documents" in said.err


def test_prepared_data_is_used_again_until_the_text_changes(config, monkeypatch, capsys):
    first = prepare(config, quiet=True)
    monkeypatch.setattr(preparation, "_write_folder", None)
    again = prepare(config)
    assert (again.train.path, again.train.fingerprint) == (first.train.path, first.train.fingerprint)
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    with open(config.train, "a") as file:
        file.write('{"text": "one more"}\n')
    changed = prepare(config, quiet=True)
    assert contents(changed.train)[-1] == "one more"
    assert changed.train.fingerprint != first.train.fingerprint
    assert changed.validation.path == first.validation.path
    # A touched file is read again, yet its content is known to be the same: a run goes on.
    os.utime(config.validation, ns=(1, 1))
    touched = prepare(config, quiet=True)
    assert touched.validation.path != first.validation.path
    assert touched.validation.fingerprint == first.validation.fingerprint


def test_cache_folder(monkeypatch):
    for name in ("GLAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert preparation.cache_folder() == Path.home() / ".cache" / "glax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert preparation.cache_folder() == Path("/xdg/glax")
    monkeypatch.setenv("GLAX_CACHE", "/elsewhere")
    assert preparation.cache_folder() == Path("/elsewhere")
    assert preparation.cache_folder("/given") == Path("/given")


@pytest.mark.parametrize("count", [20, 150, 1000])
def test_split_by_document_is_a_partition_that_does_not_depend_on_place(tmp_path, count):
    parts = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for i, text in enumerate(texts(count)):
            (tmp_path / place / f"{i:04d}.txt").write_text(text)
        data = prepare(DataConfig(train=str(tmp_path / place), cache=str(tmp_path / "cache")), quiet=True)
        parts.append((contents(data.train), contents(data.validation)))
    assert parts[0] == parts[1]
    train, validation = parts[0]
    assert sorted(train + validation) == sorted(texts(count))
    if count < 200:
        assert len(validation) == max(1, round(0.05 * count))
    else:
        assert 0.03 * count < len(validation) < 0.07 * count


@pytest.mark.parametrize("count", [1, 5, 19])
def test_few_documents_are_split_by_position(tmp_path, count):
    train = write_jsonl(tmp_path / "books.jsonl", [text * 20 for text in texts(count)])
    data = prepare(DataConfig(train=train, cache=str(tmp_path / "cache")), quiet=True)
    assert data.train.num_documents == data.validation.num_documents == count
    both = [head + tail for head, tail in zip(contents(data.train), contents(data.validation), strict=True)]
    assert both == [text * 20 for text in texts(count)]
    assert 0.04 < data.validation.num_bytes / (data.train.num_bytes + data.validation.num_bytes) < 0.06


def test_split_that_leaves_nothing(tmp_path):
    tiny = write_jsonl(tmp_path / "tiny.jsonl", ["abc"])
    with pytest.raises(UserError, match="no validation text is left after the split"):
        prepare(DataConfig(train=tiny, cache=str(tmp_path / "cache")), quiet=True)
    with pytest.raises(UserError, match="between 0 and 1"):
        prepare(DataConfig(train=tiny, validation_fraction=1.0), quiet=True)


def test_text_that_is_empty(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n\n')
    for name in ("empty.txt", "empty.jsonl"):
        with pytest.raises(UserError, match="holds no text"):
            prepare(DataConfig(train=str(tmp_path / name), cache=str(tmp_path / "cache")), quiet=True)
    assert prepared_folders(DataConfig(cache=str(tmp_path / "cache"))) == []


def test_bad_input_leaves_nothing_behind(config):
    with open(config.train, "ab") as file:
        file.write(b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        prepare(config, quiet=True)
    assert prepared_folders(config) == []


def test_cache_that_cannot_be_written(config, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write prepared data to"):
        prepare(DataConfig(train=config.train, cache=str(tmp_path / "file")), quiet=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(UserError, match="No space left on device"):
        prepare(config, quiet=True)
    assert prepared_folders(config) == []


# Prepares argv[1] into argv[2]; with a third argument it stops for good after ten documents, and says so.
PREPARE = textwrap.dedent("""
    import sys, time
    from glax.data import DataConfig, prepare, shards
    write = shards.ShardWriter.write
    def slow(self, ids, num_bytes):
        write(self, ids, num_bytes)
        if self._shards[-1].documents == 10:
            self._tokens.flush()
            print("half way", flush=True)
            time.sleep(600)
    if len(sys.argv) > 3:
        shards.ShardWriter.write = slow
    data = prepare(DataConfig(train=sys.argv[1], validation=sys.argv[1], cache=sys.argv[2]))
    print(data.train.num_documents, flush=True)
""")


def test_killed_half_way_while_another_waits(config):
    arguments = [sys.executable, "-c", PREPARE, config.train, config.cache]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, "cwd": ROOT}
    with subprocess.Popen([*arguments, "stop"], **pipes) as killed:
        try:
            assert killed.stdout.readline() == "half way\n"
            (left_over,) = (name for name in prepared_folders(config) if "partial" in name)
            assert (Path(config.cache) / "data" / left_over / "all" / "00000.tokens").stat().st_size > 0
            with subprocess.Popen(arguments, **pipes) as waiting:
                try:
                    assert "waiting for another process" in waiting.stderr.readline()
                    with pytest.raises(subprocess.TimeoutExpired):
                        waiting.wait(1)
                    assert left_over in prepared_folders(config)
                    killed.send_signal(signal.SIGKILL)
                    out, err = waiting.communicate(timeout=60)
                finally:
                    waiting.kill()
        finally:
            killed.kill()
    assert (out, waiting.returncode) == ("31\n", 0), err
    assert not any("partial" in name for name in prepared_folders(config))
    assert contents(prepare(config, quiet=True).train) == [*texts(30), texts(1)[0]]


def test_two_at_once_where_there_are_no_locks(config, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    both = threading.Barrier(2)
    close = ShardWriter.close

    def close_together(writer):
        close(writer)
        both.wait(30)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(ShardWriter, "close", close_together)
    found = []
    workers = [threading.Thread(target=lambda: found.append(prepare(config, quiet=True))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [data.train.num_documents for data in found] == [31, 31]
    assert not any("partial" in name for name in prepared_folders(config))


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["00000.tokens", "00001.tokens", "00000.documents", "tokens.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_damage_is_seen(tmp_path, name, damage):
    writer = ShardWriter(tmp_path / "store", 257, 256, shard_tokens=500)
    for i in range(20):
        writer.write(np.arange(i, i + 40), 40)
    writer.close()
    assert TokenStore(tmp_path / "store").num_documents == 20
    damage(tmp_path / "store" / name)
    if name == "tokens.json" and damage is flip:
        (tmp_path / "store" / name).write_text('{"version": 99}')
    with pytest.raises(UserError, match=r"is damaged: .*remove that folder") as error:
        TokenStore(tmp_path / "store")
    assert "\n" not in str(error.value)


def test_large_stores_are_verified_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr("glax.data.shards.VERIFY_BYTES", 100)
    writer = ShardWriter(tmp_path / "store", 70_000, 69_999)
    writer.write(np.arange(69_000), 1)
    writer.close()
    store = TokenStore(tmp_path / "store")
    store.verify()
    assert store.document(0).tolist() == list(range(69_000))
    flip(tmp_path / "store" / "00000.tokens")
    with pytest.raises(UserError, match="fails its checksum"):
        TokenStore(tmp_path / "store").verify()


def test_command_prepares_and_reports(config, capsys):
    arguments = ["--train", config.train, "--validation", config.validation, "--cache", config.cache]
    assert command.main(arguments) == 0
    assert "train: 31 documents" in capsys.readouterr().out
    assert command.main(["--train", config.train + "x"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
