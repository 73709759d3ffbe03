"""Where text comes from: local files, the Python standard library, or the Hugging Face Hub."""

import dataclasses
import glob
import hashlib
import importlib.util
import io
import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from glax.errors import UserError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".py")
ROW_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
STDLIB_MAX_BYTES = 16 * 2**20
# Tests, bundled packages and generated tables: much of the standard library's bulk and little of its prose.
STDLIB_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings", "pydoc_data"}


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. ``name`` tells documents of a source apart and is the same on every machine."""

    name: str
    text: str


@runtime_checkable
class Source(Protocol):
    """Documents in a fixed order. ``fingerprint`` is cheap to compute and changes when the documents may have."""

    name: str
    fingerprint: str

    def documents(self) -> Iterator[Document]: ...


def find_source(spec: str | None, text_field: str = "text") -> Source:
    """The source that ``spec`` names: None (standard library), ``hub:...``, a file, a folder, or a glob.

    Files come in the order of their paths relative to the folder they share. A folder is read with its sub-folders,
    hidden ones left out; of its files, those whose suffix says text, JSONL or Parquet. Raises UserError where nothing
    is found.
    """
    if spec is None:
        return _standard_library()
    if spec.startswith("hub:"):
        return HubSource(spec, text_field)
    path = Path(spec).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if _readable(file) and not _hidden(file.relative_to(path))]
        if not files:
            wanted = ", ".join((*TEXT_SUFFIXES, *ROW_SUFFIXES, ".parquet"))
            raise UserError(f"the data folder {spec} holds no files to read: wanted {wanted} (or .gz, .zst of them)")
        return FileSource(spec, path, files, text_field)
    if path.exists():
        return FileSource(spec, path.parent, [path], text_field)
    if glob.has_magic(spec):
        files = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
        if not files:
            raise UserError(f"no file matches the data path {spec}")
        return FileSource(spec, _shared_folder(files), files, text_field)
    raise UserError(f"the data path {spec} does not exist: give a file, a folder, a glob, or hub:OWNER/NAME")


class FileSource:
    """Local files, in the order of their paths relative to ``root``; each file's format is told by its suffix."""

    def __init__(self, name: str, root: Path, files: Sequence[Path], text_field: str, skip_undecodable: bool = False):
        self.name = name
        self._text_field = text_field
        self._skip_undecodable = skip_undecodable
        self._files = sorted((file.relative_to(root).as_posix(), file) for file in files)
        stats = [(file, file.stat()) for _, file in self._files]
        described = "\n".join(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats)
        self.fingerprint = hashlib.sha256(f"{text_field}\n{described}".encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        for name, file in self._files:
            suffix = _suffix(file)
            if suffix in ROW_SUFFIXES:
                yield from _read_jsonl(name, file, self._text_field)
            elif suffix == ".parquet":
                yield from _read_parquet(name, file, self._text_field)
            else:
                try:
                    yield Document(name, _decode(_read(file), file))
                except UserError:
                    if not self._skip_undecodable:
                        raise


class HubSource:
    """A Hub dataset, streamed. ``hub:OWNER/NAME[#CONFIG][@REVISION][:SPLIT]``; SPLIT is train unless given.

    Its fingerprint is its name alone, so that prepared data is used again without a network: name a REVISION to
    follow a dataset that changes.
    """

    def __init__(self, spec: str, text_field: str):
        match = re.fullmatch(r"hub:([^#@:]+)(?:#([^@:]+))?(?:@([^:]+))?(?::(\w+))?", spec)
        if match is None:
            raise UserError(f"cannot read the Hub name {spec}: write hub:OWNER/NAME[#CONFIG][@REVISION][:SPLIT]")
        self.name = spec
        self._dataset, self._config, self._revision, split = match.groups()
        self._split = split or "train"
        self._text_field = text_field
        self.fingerprint = hashlib.sha256(f"{text_field}\n{spec}".encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        if importlib.util.find_spec("datasets") is None:
            raise UserError(f'reading {self.name} needs Hub datasets: run pip install "glax[hub]"')
        import datasets

        try:
            rows = datasets.load_dataset(
                self._dataset, self._config, split=self._split, revision=self._revision, streaming=True
            )
            for number, row in enumerate(rows, 1):
                yield _row_document(row, self._text_field, f"{self._split}:{number}", f"{self.name} row {number}")
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"cannot read the Hub dataset {self.name}: {_first_line(error)}") from error


def _standard_library() -> FileSource:
    """The .py files of the running Python's standard library, less ``STDLIB_SKIP``, up to ``STDLIB_MAX_BYTES``."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files, total = [], 0
    for file in sorted(root.rglob("*.py")):
        folders = file.relative_to(root).parts[:-1]
        # _sysconfigdata*.py describes the machine that built this Python.
        if STDLIB_SKIP.intersection(folders) or file.name.startswith("_sysconfigdata") or not file.is_file():
            continue
        total += file.stat().st_size
        if total > STDLIB_MAX_BYTES:
            break
        files.append(file)
    if not files:
        raise UserError("this Python has no sources of its standard library to train on: give a data path to train on")
    return FileSource("the Python standard library", root, files, "text", skip_undecodable=True)


def _suffix(file: Path) -> str:
    """The suffix that tells the format: of ``a.jsonl.gz``, ``.jsonl``."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _readable(file: Path) -> bool:
    return _suffix(file) in (*TEXT_SUFFIXES, *ROW_SUFFIXES, ".parquet") and file.is_file()


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _shared_folder(files: Sequence[Path]) -> Path:
    parents = [file.parent.parts for file in files]
    shared = [parts[0] for parts in zip(*parents, strict=False) if len(set(parts)) == 1]
    return Path(*shared)


def _open(file: Path) -> io.BufferedReader:
    compression = COMPRESSIONS.get(file.suffix.lower())
    if compression is None:
        return file.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(file), compression=compression), 2**20)


def _read(file: Path) -> bytes:
    try:
        with _open(file) as stream:
            return stream.read()
    except OSError as error:
        raise UserError(f"cannot read {file}: {_first_line(error)}") from error


def _decode(data: bytes, file: Path, offset: int = 0) -> str:
    """``data`` as text, less a byte order mark; ``offset`` is where it starts in ``file``."""
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text at byte {offset + error.start}: convert or remove it") from error


def _read_jsonl(name: str, file: Path, text_field: str) -> Iterator[Document]:
    offset = 0
    try:
        with _open(file) as stream:
            for number, line in enumerate(stream, 1):
                text = _decode(line, file, offset)
                offset += len(line)
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except ValueError as error:
                    raise UserError(f"{file}:{number} is not JSON: {error}") from error
                yield _row_document(row, text_field, f"{name}:{number}", f"{file}:{number}")
    except OSError as error:
        raise UserError(f"cannot read {file}: {_first_line(error)}") from error


def _read_parquet(name: str, file: Path, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if text_field not in columns:
                raise UserError(f'{file} has no column "{text_field}" (it has {", ".join(columns)}): set text_field')
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for row in batch.to_pylist():
                    number += 1
                    yield _row_document(row, text_field, f"{name}:{number}", f"{file} row {number}")
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable Parquet file: {_first_line(error)}") from error


def _row_document(row: object, text_field: str, name: str, place: str) -> Document:
    if not isinstance(row, dict) or text_field not in row:
        found = f"it has {', '.join(map(str, row))}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        raise UserError(f'{place} has no field "{text_field}" ({found}): set text_field')
    text = row[text_field]
    if text is None:
        return Document(name, "")
    if not isinstance(text, str):
        raise UserError(f'{place}: field "{text_field}" is a {type(text).__name__}, not text')
    # JSON may spell half of a surrogate pair, which no UTF-8 text can hold.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f'{place}: field "{text_field}" is not valid Unicode at character {error.start}') from error
    return Document(name, text)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
