"""Text to token ids and back: bytes, the Mistral vocabulary, or any SentencePiece model."""

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from glax.errors import UserError


@runtime_checkable
class Tokenizer(Protocol):
    """Reversible map between text and token ids in ``[0, vocab_size)``.

    ``encode`` adds no special tokens. ``eos_id`` ends every document and starts it too: the first token of a document
    is predicted from ``eos_id``. ``fingerprint`` changes whenever the ids of some text would.
    """

    name: str
    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> np.ndarray: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


class ByteTokenizer:
    """Ids 0..255 are the bytes of the UTF-8 text; 256 separates documents."""

    name = "bytes"
    fingerprint = "bytes-1"
    vocab_size = 257
    bos_id = 256
    eos_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode(errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model file. Raises UserError where the file is absent, unreadable, or has no end token."""

    def __init__(self, path: str | Path, name: str | None = None):
        import sentencepiece

        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} is not a SentencePiece model: give the path of a .model file") from error
        self.name = name or str(path)
        self.fingerprint = "sentencepiece-" + hashlib.sha256(model).hexdigest()[:16]
        self.vocab_size = self._model.vocab_size()
        self.eos_id = self._model.eos_id()
        if self.eos_id < 0:
            raise UserError(f"the tokenizer {path} has no end-of-sequence token, which separates documents")
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else self.eos_id
        self._dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.encode(text), self._dtype)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids = self._model.encode(list(texts), num_threads=min(len(texts), os.cpu_count() or 1))
        return [np.asarray(one, self._dtype) for one in ids]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([i for i in np.asarray(ids).tolist() if 0 <= i < self.vocab_size])


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer ``"bytes"``, ``"mistral"`` (32000 pieces), or the SentencePiece model at the path ``name``.

    Raises UserError for an unknown name, an absent extra, or a file that is no SentencePiece model.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "mistral":
        return SentencePieceTokenizer(_mistral_model(), name)
    path = Path(name).expanduser()
    if path.is_file():
        return SentencePieceTokenizer(path)
    raise UserError(f'unknown tokenizer "{name}": give "bytes", "mistral", or the path of a SentencePiece .model file')


def _mistral_model() -> Path:
    """The SentencePiece file inside the installed mistral-common, found without importing its many dependencies."""
    spec = importlib.util.find_spec("mistral_common")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        path = Path(folder) / "data" / "tokenizer.model.v1"
        if path.is_file():
            return path
    raise UserError('the Mistral tokenizer is not installed: run pip install "glax[mistral]"')


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError when ``tokenizer`` has more tokens than a model with ``vocab_size`` rows can embed."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens but the model's vocabulary is "
            f"{vocab_size}: set the model's vocab_size to at least {tokenizer.vocab_size}"
        )
