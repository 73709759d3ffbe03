"""Sources and tokenizers: every format read whole and in order, and one clear line for every bad input."""

import gzip
import importlib.util
import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from glax.data import check_vocabulary, load_tokenizer, sources
from glax.data.sources import find_source
from glax.errors import UserError

TEXTS = ["First.\n", "zweites Stück, größer\r\n", "第三\n\n", "one more"]


def rows(texts, field="text"):
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def texts_of(spec, field="text"):
    return [document.text for document in find_source(str(spec), field).documents()]


def one_line(error):
    message = str(error.value)
    assert "\n" not in message and len(message) > 20
    return message


def write_parquet(path, texts, field="text"):
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path)


def test_reads_every_format(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rows(TEXTS) + b"\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows(TEXTS[:2])) + gzip.compress(rows(TEXTS[2:])))
    with pyarrow.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as stream:
        stream.write(rows(TEXTS))
    write_parquet(tmp_path / "d.parquet", TEXTS)
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        assert texts_of(tmp_path / name) == TEXTS, name
    (tmp_path / "e.txt").write_bytes("\ufeffwith a byte order mark\r\n".encode())
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress("größer".encode()))
    assert texts_of(tmp_path / "e.txt") == ["with a byte order mark\r\n"]
    assert texts_of(tmp_path / "f.txt.gz") == ["größer"]
    (tmp_path / "odd").write_text("a file of any name is plain text")
    assert texts_of(tmp_path / "odd") == ["a file of any name is plain text"]


def test_folders_and_globs_come_in_path_order(tmp_path):
    for name in ("b.txt", "a/2.txt", "a/10.txt", "c.jsonl", ".hidden/x.txt", "a/.x.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(rows([name]) if name.endswith("jsonl") else name.encode())
    assert texts_of(tmp_path) == ["a/10.txt", "a/2.txt", "b.txt", "c.jsonl"]
    assert texts_of(tmp_path / "a" / "*.txt") == ["a/10.txt", "a/2.txt"]
    assert texts_of(tmp_path / "**" / "*.txt") == ["a/10.txt", "a/2.txt", "b.txt"]
    names = [document.name for document in find_source(str(tmp_path)).documents()]
    assert names == ["a/10.txt", "a/2.txt", "b.txt", "c.jsonl:1"]


def test_other_text_field_and_null_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rows(["x", None, "y"], "content"))
    write_parquet(tmp_path / "b.parquet", ["x", None, "y"], "content")
    assert texts_of(tmp_path, "content") == ["x", "", "y"] * 2


def test_fingerprint_follows_the_files(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    first = find_source(str(file)).fingerprint
    assert find_source(str(file)).fingerprint == first
    file.write_text("three")
    assert find_source(str(file)).fingerprint != first
    second = find_source(str(tmp_path)).fingerprint
    (tmp_path / "b.txt").write_text("more")
    assert find_source(str(tmp_path)).fingerprint != second


def test_standard_library_is_sources_without_tests():
    source = find_source(None)
    documents = list(source.documents())
    names = [document.name for document in documents]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    size = sum(len(document.text) for document in documents)
    assert 3e6 < size <= sources.STDLIB_MAX_BYTES
    assert names == sorted(names)


def test_standard_library_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="no sources of its standard library"):
        find_source(None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "größer".encode("latin-1"), r"a\.txt is not UTF-8 text at byte 2"),
        ("a.jsonl", rows(["x"]) + b'{"text": "\xff"}\n', r"a\.jsonl is not UTF-8 text at byte 33"),
        ("a.jsonl", rows(["x"]) + b'{"body": "y", "id": 2}\n', r'a\.jsonl:2 has no field "text" \(it has body, id\)'),
        ("a.jsonl", b'["text"]\n', r'a\.jsonl:1 has no field "text" \(it is a list\)'),
        ("a.jsonl", rows(["x"]) + b'\n{"text": \n', r"a\.jsonl:3 is not JSON"),
        ("a.jsonl", b'{"text": 3}\n', r'a\.jsonl:1: field "text" is a int, not text'),
        ("a.jsonl", b'{"text": "ab\\ud800"}\n', r'a\.jsonl:1: field "text" is not valid Unicode at character 2'),
        ("a.jsonl.gz", gzip.compress(rows(TEXTS * 99))[:-30], r"cannot read .*a\.jsonl\.gz"),
        ("a.jsonl.gz", rows(TEXTS), r"cannot read .*a\.jsonl\.gz"),
        ("a.jsonl.zst", b"not zstd", r"cannot read .*a\.jsonl\.zst"),
        ("a.txt.zst", bytes(pyarrow.compress(bytes(999), "zstd"))[:-3], r"cannot read .*a\.txt\.zst"),
        ("a.parquet", b"PAR1 is not enough PAR1", r"a\.parquet is not a readable Parquet file"),
        ("a.parquet", b"", r"a\.parquet is not a readable Parquet file"),
    ],
)
def test_bad_content_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        texts_of(tmp_path)
    one_line(error)


def test_damaged_parquet_pages_are_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    write_parquet(path, ["".join(map(chr, rng.integers(32, 127, 200))) for _ in range(500)])
    content = bytearray(path.read_bytes())
    content[4:20000] = bytes(19996)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet is not a readable Parquet file") as error:
        texts_of(path)
    one_line(error)


def test_parquet_without_the_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS, "body")
    with pytest.raises(UserError, match=r'no column "text" \(it has id, body\)'):
        texts_of(tmp_path)


def test_missing_and_empty_paths(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_source(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no file matches .*\*\.txt"):
        find_source(str(tmp_path / "*.txt"))
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(UserError, match="holds no files to read"):
        find_source(str(tmp_path))


class FakeHub(types.ModuleType):
    def __init__(self, rows):
        super().__init__("datasets")
        self.__spec__ = importlib.util.spec_from_loader("datasets", None)
        self._rows = rows
        self.calls = []

    def load_dataset(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        if isinstance(self._rows, Exception):
            raise self._rows
        return iter(self._rows)


def test_hub_names(monkeypatch):
    hub = FakeHub([{"text": text} for text in TEXTS])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert texts_of("hub:DKYoon/SlimPajama-6B") == TEXTS
    assert texts_of("hub:Salesforce/wikitext#wikitext-2-raw-v1@abc123:validation") == TEXTS
    assert hub.calls == [
        (("DKYoon/SlimPajama-6B", None), {"split": "train", "revision": None, "streaming": True}),
        (
            ("Salesforce/wikitext", "wikitext-2-raw-v1"),
            {"split": "validation", "revision": "abc123", "streaming": True},
        ),
    ]
    fingerprints = {find_source(f"hub:a/b{end}").fingerprint for end in ("", ":test", "@1", "#c")}
    assert len(fingerprints) == 4
    with pytest.raises(UserError, match="write hub:OWNER/NAME"):
        find_source("hub:")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            FileNotFoundError("Dataset 'a/b' doesn't exist\non the Hub"),
            "cannot read the Hub dataset hub:a/b: Dataset 'a/b'",
        ),
        (ValueError("Bad split"), "cannot read the Hub dataset hub:a/b: Bad split"),
        ([{"body": "x"}], r'hub:a/b row 1 has no field "text" \(it has body\)'),
    ],
)
def test_hub_errors_are_one_line(monkeypatch, rows, message):
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(rows))
    with pytest.raises(UserError, match=message) as error:
        texts_of("hub:a/b")
    one_line(error)


@pytest.fixture
def no_extras(monkeypatch):
    find = importlib.util.find_spec
    absent = ("datasets", "mistral_common")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))


@pytest.mark.usefixtures("no_extras")
def test_absent_extras_are_named():
    with pytest.raises(UserError, match=r'pip install "glax\[hub\]"'):
        texts_of("hub:a/b")
    with pytest.raises(UserError, match=r'pip install "glax\[mistral\]"'):
        load_tokenizer("mistral")


@settings(deadline=None, max_examples=100)
@given(st.text())
def test_bytes_there_and_back(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids.tolist(), tokenizer.eos_id]) == text
    assert [one.tolist() for one in tokenizer.encode_batch([text, "x"])] == [ids.tolist(), [120]]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    model = io.BytesIO()
    text = (Path(sources.__file__)).read_text()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(model.getvalue())
    return path


def test_sentencepiece_by_path(sentencepiece_model):
    tokenizer = load_tokenizer(str(sentencepiece_model))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (400, 1, 2)
    for text in ("def f(x):\n    return x", "größer 第三"):
        ids = tokenizer.encode(text)
        assert ids.max() < 400 and tokenizer.decode(np.append(ids, tokenizer.eos_id)) == text
        assert tokenizer.encode_batch([text, "x", text])[2].tolist() == ids.tolist()
    other = sentencepiece_model.with_name("copy.model")
    other.write_bytes(sentencepiece_model.read_bytes())
    assert load_tokenizer(str(other)).fingerprint == tokenizer.fingerprint


@pytest.mark.skipif(
    importlib.util.find_spec("mistral_common") is None, reason="the extra glax[mistral] is not installed"
)
def test_mistral_vocabulary():
    tokenizer = load_tokenizer("mistral")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    text = "Gated linear attention:\n\n  S_t = diag(α_t) S_{t-1} + k_t^T v_t"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("hello world").tolist() == [6312, 28709, 1526]


def test_bad_tokenizers(tmp_path):
    with pytest.raises(UserError, match='unknown tokenizer "gpt7"'):
        load_tokenizer("gpt7")
    (tmp_path / "bad.model").write_bytes(b"\x00 not a model")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "bad.model"))
    check_vocabulary(load_tokenizer("bytes"), 257)
    with pytest.raises(UserError, match="has 257 tokens but the model's vocabulary is 256"):
        check_vocabulary(load_tokenizer("bytes"), 256)
