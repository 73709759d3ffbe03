"""Text that continues text: stop strings, streams, and batches of prompts of any lengths."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from glax.errors import UserError
from glax.inference.generation import Decoding, Model, State, advance, check_prompts, check_seed, start
from glax.inference.sampling import Sampling
from glax.models import check_room

# Tokens of one call of the compiled loop: between two calls the host looks for stop strings and shows what there is.
PIECE = 16


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model made of a prompt.

    Attributes:
        text: without the prompt, and without the stop string.
        tokens: that were generated, up to the one that stopped it.
        reason: "stop string", "end" (the end token), or "length".
    """

    text: str
    tokens: tuple[int, ...]
    reason: Literal["stop string", "end", "length"]


class TextStream:
    """Tokens in, text out, as far as it is certain: not the bytes of half a character, nor what may begin a stop.

    ``before``: tokens that stand before, one will do. SentencePiece begins a text without the space that a word has.
    """

    def __init__(
        self,
        tokenizer,
        stop: Sequence[str] = (),
        end_token: int | None = None,
        limit: int | None = None,
        before: Sequence[int] = (),
    ):
        if any(not string for string in stop):
            raise UserError("a stop string is empty: give at least one character")
        self._before, self._skipped = list(before), len(tokenizer.decode(before)) if len(before) else 0
        self._tokenizer, self._stop, self._end, self._limit = tokenizer, tuple(stop), end_token, limit
        self.tokens: list[int] = []
        self.text = ""
        self.reason: str | None = None
        self._given = 0

    def add(self, tokens: Sequence[int]) -> str:
        """Take the next tokens; return the text that is certain now and was not before."""
        for token in tokens:
            if self.reason is not None:
                break
            if self._end is not None and token == self._end:
                self.reason = "end"
                break
            self.tokens.append(int(token))
            if self._stop:
                self._look_for_stop()
            if self.reason is None and self._limit is not None and len(self.tokens) >= self._limit:
                self.reason = "length"
        if self.reason != "stop string":
            self.text = self._decoded()
        certain = self.text if self.reason is not None else self.text[: self._certain()]
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        return new

    def _decoded(self) -> str:
        return self._tokenizer.decode([*self._before, *self.tokens])[self._skipped :]

    def _look_for_stop(self):
        text = self._decoded()
        places = [text.find(string) for string in self._stop if string in text]
        if places:
            self.text, self.reason = text[: min(places)], "stop string"

    def _certain(self) -> int:
        text = self.text
        end = len(text.rstrip("�"))
        for string in self._stop:
            for length in range(min(len(string) - 1, end), 0, -1):
                if text[:end].endswith(string[:length]):
                    end -= length
                    break
        return max(end, self._given)

    def completion(self) -> Completion:
        return Completion(self.text, tuple(self.tokens), self.reason or "length")


def stream(
    model: Model,
    tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    stop: Sequence[str] = (),
    seed: int = 0,
    start_token: int | None = None,
    end_token: int | None = None,
    prefix: State | None = None,
) -> Iterator[tuple[list[str], list[TextStream], Decoding]]:
    """The continuations of ``prompts`` as they come: after each piece the new text of each row.

    Args:
      model: a model, or ``glax.models.decoder`` of it.
      tokenizer: see ``glax.data.Tokenizer``.
      prompts: of any lengths, in one batch.
      max_new_tokens: for each.
      sampling: how tokens are drawn.
      stop: strings that end a row where they appear; they are no part of its text.
      seed: of the draws.
      start_token: put before each prompt, as in training; None: nothing.
      end_token: a token that ends a row.
      prefix: state after what stands before the prompts, see ``read_prefix``.

    Yields:
      new text of each row, all streams so far, and the decoding, whose state can be saved.

    Raises:
      UserError: prompts or settings that cannot be used.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    check_seed(seed)
    texts = [[int(token) for token in tokenizer.encode(prompt)] for prompt in prompts]
    encoded = [[*([] if start_token is None else [start_token]), *text] for text in texts]
    if not encoded or min(map(len, encoded)) < 1:
        raise UserError("a prompt has no tokens: give at least one character")
    tokens, lengths = padded(encoded)
    check_prompts(model, tokens, lengths)
    if prefix is not None:
        check_room(model, prefix, int(lengths.max()) + max_new_tokens)
    streams = [TextStream(tokenizer, stop, end_token, max_new_tokens, text[-1:]) for text in texts]
    pieces = -(-max_new_tokens // PIECE)
    decoding = start(model, tokens, lengths, max_new_tokens=pieces * PIECE, seed=seed, prefix=prefix)
    for _ in range(pieces):
        new, decoding = advance(model, decoding, count=PIECE, sampling=sampling, stop_token=end_token)
        texts = [stream.add(row) for stream, row in zip(streams, np.asarray(new), strict=True)]
        yield texts, streams, decoding
        if all(stream.reason is not None for stream in streams):
            return


def complete(model: Model, tokenizer, prompts: Sequence[str], **options) -> list[Completion]:
    """The continuations of ``prompts``; options as in ``stream``."""
    *_, (_, streams, _) = stream(model, tokenizer, prompts, **options)
    return [row.completion() for row in streams]


def padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] and lengths [B]; T is a power of two, so that few shapes are compiled."""
    lengths = np.array([len(row) for row in rows], np.int32)
    width = 16
    while width < lengths.max():
        width *= 2
    tokens = np.zeros((len(rows), width), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens, lengths
