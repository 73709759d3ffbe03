"""Prepared tokens on disk: a folder of flat binary shards with document boundaries, read by memory mapping.

``tokens.json`` describes the folder. Shard ``00000.tokens`` is little-endian uint16 (uint32 for vocabularies above
65536): one end token, then each document's tokens and the end token. So whatever stands before a document's first token
is an end token, and the inputs of a model are the targets' positions less one. ``00000.documents`` is int64
``[documents, 2]``: tokens (end token included) and UTF-8 bytes of text. No document is spread over two shards.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int, Integer

from glax.errors import UserError

VERSION = 1
SHARD_TOKENS = 2**27
# Up to this size, prepared data is read when opened, to find flipped bits; above, only sizes and boundaries are.
VERIFY_BYTES = 2**26


@dataclasses.dataclass
class _Shard:
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    tokens_crc: int = 0
    documents_crc: int = 0


class ShardWriter:
    """Writes a new folder of shards, document by document, in memory that does not grow with the data.

    ``close`` writes the description; a folder without one is not readable.
    """

    def __init__(self, path: Path, vocab_size: int, eos_id: int, shard_tokens: int = SHARD_TOKENS):
        path.mkdir(parents=True)
        self._path = path
        self._vocab_size = vocab_size
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._eos = np.array([eos_id], self._dtype)
        self._shard_tokens = shard_tokens
        self._shards: list[_Shard] = []
        self._tokens: BinaryIO | None = None
        self._documents: BinaryIO | None = None

    def write(self, ids: Integer[np.ndarray, " n"], num_bytes: int) -> None:
        """Append a document of token ids (without the end token) whose text has ``num_bytes`` UTF-8 bytes."""
        length = len(ids) + 1
        if self._tokens is None or self._shards[-1].tokens + length > self._shard_tokens:
            self._finish_shard()
            self._start_shard()
        shard = self._shards[-1]
        shard.tokens_crc = self._append(self._tokens, np.append(ids, self._eos).astype(self._dtype), shard.tokens_crc)
        shard.documents_crc = self._append(self._documents, np.array([length, num_bytes], "<i8"), shard.documents_crc)
        shard.tokens += length
        shard.documents += 1
        shard.bytes += num_bytes

    def close(self) -> None:
        self._finish_shard()
        description = {
            "version": VERSION,
            "dtype": self._dtype.str,
            "vocab_size": self._vocab_size,
            "eos_id": int(self._eos[0]),
            "shards": [dataclasses.asdict(shard) for shard in self._shards],
        }
        with (self._path / "tokens.json").open("w") as file:
            json.dump(description, file, indent=1)
            _sync(file)

    def _start_shard(self) -> None:
        stem = self._path / f"{len(self._shards):05d}"
        self._tokens = stem.with_suffix(".tokens").open("wb")
        self._documents = stem.with_suffix(".documents").open("wb")
        self._shards.append(_Shard())
        self._shards[-1].tokens_crc = self._append(self._tokens, self._eos, 0)

    def _finish_shard(self) -> None:
        for file in (self._tokens, self._documents):
            if file is not None:
                _sync(file)
                file.close()
        self._tokens = self._documents = None

    @staticmethod
    def _append(file: BinaryIO, array: np.ndarray, crc: int) -> int:
        data = array.tobytes()
        file.write(data)
        return zlib.crc32(data, crc)


class TokenStore:
    """A prepared folder, memory-mapped. Positions count every token of every shard, leading end tokens included.

    Attributes:
        num_tokens: targets, i.e. all tokens of all documents with their end tokens.
        num_documents, num_bytes: documents, and UTF-8 bytes of their text.
        starts, lengths: ``[documents]`` int64, position of each document's first token, and its tokens (end included).
        document_bytes: ``[documents]`` int64.
        fingerprint: changes with the content, and with nothing else.

    Raises UserError when a file is missing, of the wrong size, or fails its checksum (see ``VERIFY_BYTES``).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            description = json.loads((self.path / "tokens.json").read_text())
            if description["version"] != VERSION:
                raise self._damaged(f"it has format {description['version']}, this glax reads {VERSION}")
            self._dtype = np.dtype(description["dtype"])
            self.vocab_size: int = description["vocab_size"]
            self.eos_id: int = description["eos_id"]
            shards = [_Shard(**shard) for shard in description["shards"]]
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"tokens.json cannot be read ({error})") from error
        self.num_tokens = sum(shard.tokens for shard in shards)
        self.num_documents = sum(shard.documents for shard in shards)
        self.num_bytes = sum(shard.bytes for shard in shards)
        self.fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]
        verify = sum(shard.tokens for shard in shards) * self._dtype.itemsize <= VERIFY_BYTES
        self._mapped = [self._map_tokens(number, shard, verify) for number, shard in enumerate(shards)]
        self._bases = np.cumsum([0] + [len(tokens) for tokens in self._mapped])[:-1]
        documents = [self._read_documents(number, shard) for number, shard in enumerate(shards)]
        table = np.concatenate([np.zeros((0, 2), np.int64), *documents])
        self.lengths, self.document_bytes = np.ascontiguousarray(table.T)
        # Each shard's leading end token moves its documents one place on.
        shard = np.repeat(np.arange(len(shards)), [len(part) for part in documents])
        self.starts = np.cumsum(self.lengths) - self.lengths + shard + 1

    def read(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Token ids (int32) at ``positions``."""
        if len(self._mapped) == 1:
            return self._mapped[0][positions].astype(np.int32)
        shards = np.searchsorted(self._bases, positions, "right") - 1
        out = np.empty(len(positions), np.int32)
        for shard in np.unique(shards):
            inside = shards == shard
            out[inside] = self._mapped[shard][positions[inside] - self._bases[shard]]
        return out

    def document(self, index: int) -> Int[np.ndarray, " n"]:
        """Token ids of one document, without its end token."""
        return self.read(self.starts[index] + np.arange(self.lengths[index] - 1))

    def verify(self) -> None:
        """Read everything and raise UserError where a checksum fails."""
        shards = json.loads((self.path / "tokens.json").read_text())["shards"]
        for number, shard in enumerate(shards):
            self._map_tokens(number, _Shard(**shard), verify=True)

    def _map_tokens(self, number: int, shard: _Shard, verify: bool) -> np.ndarray:
        name = f"{number:05d}.tokens"
        wanted = (shard.tokens + 1) * self._dtype.itemsize
        self._check_size(name, wanted)
        tokens = np.memmap(self.path / name, self._dtype, "r").view(np.ndarray)
        if verify and zlib.crc32(tokens) != shard.tokens_crc:
            raise self._damaged(f"{name} fails its checksum")
        return tokens

    def _read_documents(self, number: int, shard: _Shard) -> np.ndarray:
        name = f"{number:05d}.documents"
        self._check_size(name, shard.documents * 16)
        data = (self.path / name).read_bytes()
        if zlib.crc32(data) != shard.documents_crc:
            raise self._damaged(f"{name} fails its checksum")
        return np.frombuffer(data, "<i8").reshape(-1, 2)

    def _check_size(self, name: str, wanted: int) -> None:
        try:
            size = os.stat(self.path / name).st_size
        except OSError as error:
            raise self._damaged(f"{name} is missing") from error
        if size != wanted:
            raise self._damaged(f"{name} has {size} bytes where {wanted} were written")

    def _damaged(self, why: str) -> UserError:
        return UserError(f"the prepared data in {self.path} is damaged: {why}; remove that folder and run again")


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
