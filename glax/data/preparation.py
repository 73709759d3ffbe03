"""The prepare step: text to memory-mapped token shards, once, kept in a cache and found again by fingerprint."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from glax.data.config import DataConfig
from glax.data.shards import VERSION, ShardWriter, TokenStore
from glax.data.sources import Document, Source, find_source
from glax.data.tokenizers import Tokenizer, load_tokenizer
from glax.errors import UserError

# A source with fewer documents is split inside each document; below SURVEYED, by rank among all documents.
SPLIT_BY_DOCUMENT = 20
SURVEYED = 200
ENCODE_DOCUMENTS = 256
ENCODE_CHARACTERS = 2**22


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Tokens to train and to validate on, and the tokenizer that made them."""

    train: TokenStore
    validation: TokenStore
    tokenizer: Tokenizer


def prepare(config: DataConfig, *, quiet: bool = False) -> PreparedData:
    """Tokenize the text that ``config`` names, or open what an earlier call prepared from the same text.

    Prepared data is used again while the files' paths, sizes and modification times, the tokenizer and the split are
    the same. It appears under its final name in one step, so a killed call leaves nothing half-readable, and of several
    processes that prepare the same data one works while the others wait.

    Without validation data, ``validation_fraction`` of train is kept for it. With 200 documents or more, a hash of a
    document's name (a file's relative path, a row's number) decides; with 20 to 199, the documents with the smallest
    hashes are taken; with fewer, the last part of each document.

    Progress goes to stderr unless ``quiet``. Raises UserError for input that cannot be read or holds no text.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    cache = cache_folder(config.cache) / "data"
    source = find_source(config.train, config.text_field)
    if config.validation is None:
        stores = _prepared(source, tokenizer, cache, config.validation_fraction, quiet)
        if stores["validation"].num_documents == 0:
            raise UserError(
                f"no validation text is left after the split of {source.name}: raise validation_fraction or give "
                "validation data"
            )
        if stores["train"].num_documents == 0:
            raise UserError(f"no training text is left after the split of {source.name}: lower validation_fraction")
        return PreparedData(stores["train"], stores["validation"], tokenizer)
    held_out = find_source(config.validation, config.text_field)
    train = _prepared(source, tokenizer, cache, None, quiet)["all"]
    return PreparedData(train, _prepared(held_out, tokenizer, cache, None, quiet)["all"], tokenizer)


def cache_folder(given: str | None = None) -> Path:
    """``given``, or $GLAX_CACHE, or ``glax`` in $XDG_CACHE_HOME, or ``~/.cache/glax``."""
    if given is None:
        given = os.environ.get("GLAX_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glax"


def _prepared(
    source: Source, tokenizer: Tokenizer, cache: Path, fraction: float | None, quiet: bool
) -> Mapping[str, TokenStore]:
    """The stores of ``source``: "train" and "validation", or "all" where ``fraction`` is None."""
    description = {
        "version": VERSION,
        "source": source.name,
        "source_fingerprint": source.fingerprint,
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "validation_fraction": fraction,
    }
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    label = re.sub(r"\W+", "-", Path(source.name).name).strip("-")[:40]
    folder = cache / f"{label}-{key}"
    parts = ("all",) if fraction is None else ("train", "validation")
    if not folder.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(cache / f".{folder.name}.lock", source.name, quiet) as alone:
                if not folder.exists():
                    if alone:
                        for left_over in cache.glob(f".{folder.name}.partial-*"):
                            shutil.rmtree(left_over, ignore_errors=True)
                    _write_folder(folder, source, tokenizer, parts, fraction, description, quiet)
        except OSError as error:
            raise UserError(
                f"cannot write prepared data to {cache} ({error.strerror or error}): make room there or choose another "
                "cache folder (cache, or $GLAX_CACHE)"
            ) from error
    return {part: TokenStore(folder / part) for part in parts}


def _write_folder(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    parts: tuple[str, ...],
    fraction: float | None,
    description: dict,
    quiet: bool,
) -> None:
    """Write under a temporary name, then rename: ``folder`` is whole or absent at any moment."""
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        (partial / "source.json").write_text(json.dumps(description, indent=1))
        writers = {part: ShardWriter(partial / part, tokenizer.vocab_size, tokenizer.eos_id) for part in parts}
        with _Progress(source.name, quiet) as progress:
            for batch in _encode_batches(_assigned(source, fraction)):
                encoded = tokenizer.encode_batch([text for _, text in batch])
                for (part, text), ids in zip(batch, encoded, strict=True):
                    num_bytes = len(text.encode())
                    writers[part].write(ids, num_bytes)
                    progress.add(num_bytes, len(ids) + 1)
            if progress.documents == 0:
                raise UserError(f"{source.name} holds no text: give other data")
            for writer in writers.values():
                writer.close()
        partial.chmod(0o755)
        try:
            os.rename(partial, folder)
        except OSError:
            # Without locks (some network file systems) another process may have been faster: its result is as good.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _assigned(source: Source, fraction: float | None) -> Iterator[tuple[str, str]]:
    """Every text of ``source`` with the part it belongs to; empty texts are left out."""
    documents = (document for document in source.documents() if document.text)
    if fraction is None:
        yield from (("all", document.text) for document in documents)
        return
    surveyed = (document for document in source.documents() if document.text)
    ranks = sorted(_rank(document) for document in itertools.islice(surveyed, SURVEYED))
    if len(ranks) < SPLIT_BY_DOCUMENT:
        for document in documents:
            cut = len(document.text) - int(len(document.text) * fraction)
            yield "train", document.text[:cut]
            if cut < len(document.text):
                yield "validation", document.text[cut:]
        return
    last = fraction if len(ranks) == SURVEYED else ranks[max(1, round(len(ranks) * fraction)) - 1]
    for document in documents:
        yield ("validation" if _rank(document) <= last else "train"), document.text


def _rank(document: Document) -> float:
    """A fixed place in [0, 1) for the document's name."""
    digest = hashlib.blake2b(document.name.encode(errors="surrogateescape"), digest_size=7).digest()
    return int.from_bytes(digest) / 2**56


def _encode_batches(texts: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, characters = [], 0
    for part, text in texts:
        batch.append((part, text))
        characters += len(text)
        if len(batch) == ENCODE_DOCUMENTS or characters >= ENCODE_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _one_at_a_time(path: Path, name: str, quiet: bool) -> Iterator[bool]:
    """Hold the lock file ``path``; gives False where the file system has no locks."""
    with path.open("w") as file:
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            locked = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            if locked:
                if not quiet:
                    print(f"waiting for another process that prepares {name}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield locked


class _Progress:
    """A line on stderr: rewritten in place on a terminal, printed once at the end elsewhere."""

    def __init__(self, name: str, quiet: bool):
        self.documents = 0
        self._name = name
        self._quiet = quiet
        self._bytes = self._tokens = 0
        self._start = self._shown = time.monotonic()

    def add(self, num_bytes: int, tokens: int) -> None:
        self.documents += 1
        self._bytes += num_bytes
        self._tokens += tokens
        if not self._quiet and sys.stderr.isatty() and time.monotonic() - self._shown > 0.2:
            self._shown = time.monotonic()
            print(f"\r{self._line('preparing')}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._quiet:
            return
        start, end = ("\r", "\x1b[K") if sys.stderr.isatty() else ("", "")
        if error is None:
            print(f"{start}{self._line('prepared')}{end}", file=sys.stderr, flush=True)
        else:
            print(f"{start}{end}", end="", file=sys.stderr, flush=True)

    def _line(self, verb: str) -> str:
        speed = self._bytes / 1e6 / max(time.monotonic() - self._start, 1e-3)
        return (
            f"{verb} {self._name}: {self.documents} documents, {self._bytes / 1e6:.1f} MB, "
            f"{self._tokens / 1e6:.2f} M tokens, {speed:.1f} MB/s"
        )
