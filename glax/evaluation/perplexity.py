"""Perplexity of documents of any length, each read once with the state carried on."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from glax.errors import UserError
from glax.models import Decoder, LanguageModel

# Logits exist for this many tokens of a row at a time.
BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Of some documents. Every token but the start token is predicted once, from all before it.

    Attributes:
        log_likelihood: of all documents, in nats.
        tokens, words, bytes: in them; words as between white space, bytes of UTF-8.
        by_position: for each bucket [first, last) of positions in a document, its tokens and their log likelihood.
    """

    log_likelihood: float
    tokens: int
    words: int
    bytes: int
    by_position: dict[tuple[int, int], tuple[int, float]]

    def as_json(self) -> dict[str, Any]:
        """Perplexity by token, word and byte, bits per byte, and perplexity by token of each bucket."""
        nats = -self.log_likelihood
        return {
            "token_perplexity": _exp(nats / self.tokens),
            "word_perplexity": _exp(nats / self.words),
            "byte_perplexity": _exp(nats / self.bytes),
            "bits_per_byte": nats / self.bytes / math.log(2),
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
            "by_position": [
                {"first": first, "last": last, "tokens": tokens, "token_perplexity": _exp(-log_likelihood / tokens)}
                for (first, last), (tokens, log_likelihood) in sorted(self.by_position.items())
            ],
        }


def perplexity(
    model: LanguageModel | Decoder,
    tokenizer,
    documents: Iterable[str],
    *,
    segment: int = 2048,
    batch_size: int = 1,
    bucket: int = 2048,
) -> Perplexity:
    """Perplexity of ``documents``, each on its own, from the tokenizer's end token, which starts documents.

    Args:
      model: the model.
      tokenizer: see ``glax.data.Tokenizer``.
      documents: texts.
      segment: tokens that are read at once; the state is carried from one segment to the next.
      batch_size: documents that are read at once.
      bucket: positions of a bucket of ``by_position``.

    Raises:
      UserError: no document has any text, or a size is not positive.
    """
    documents = [document for document in documents if document]
    for name, value in (("segment", segment), ("batch_size", batch_size), ("bucket", bucket)):
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
    encoded = [np.asarray(tokenizer.encode(document), np.int32) for document in documents]
    if sum(map(len, encoded)) == 0:  # SentencePiece may make nothing of white space
        raise UserError("there is no text to evaluate: give documents that are not empty")
    by_position: dict[tuple[int, int], tuple[int, float]] = {}
    total = []
    options = {"start_token": tokenizer.eos_id, "segment": segment, "batch_size": batch_size}
    for scores in log_likelihoods(model, encoded, **options):
        total.append(math.fsum(scores.tolist()))
        for first in range(0, len(scores), bucket):
            part = scores[first : first + bucket]
            tokens, sum_before = by_position.get((first, first + bucket), (0, 0.0))
            by_position[first, first + bucket] = (tokens + len(part), sum_before + math.fsum(part.tolist()))
    return Perplexity(
        math.fsum(total),
        sum(map(len, encoded)),
        sum(len(re.split(r"\s+", document)) for document in documents),
        sum(len(document.encode()) for document in documents),
        by_position,
    )


def log_likelihoods(
    model: LanguageModel | Decoder,
    documents: Sequence[Sequence[int]],
    *,
    start_token: int,
    segment: int = 2048,
    batch_size: int = 1,
) -> Iterator[Float[np.ndarray, "T"]]:
    """Log likelihood, in nats, of each token of each document given all tokens before it, in the documents' order."""
    order = sorted(range(len(documents)), key=lambda index: -len(documents[index]))
    scores: dict[int, np.ndarray] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        rows = [documents[index] for index in batch] + [[]] * (batch_size - len(batch))
        for index, row in zip(batch, _score(model, rows, start_token, segment), strict=False):
            scores[index] = row
    for index in range(len(documents)):
        yield scores[index]


def _score(model, rows, start_token, segment) -> list[np.ndarray]:
    longest = max(1, *(len(row) for row in rows))
    segment = min(segment, _power_of_two(longest))
    width = -(-longest // segment) * segment
    targets = np.zeros((len(rows), width), np.int32)
    for padded, row in zip(targets, rows, strict=True):
        padded[: len(row)] = row
    inputs = np.concatenate([np.full((len(rows), 1), start_token, np.int32), targets[:, :-1]], 1)
    lengths = np.array([len(row) for row in rows], np.int32)
    state = _fresh(model, len(rows), _power_of_two(width))
    parts = []
    for first in range(0, width, segment):
        here = slice(first, first + segment)
        remaining = np.clip(lengths - first, 0, segment)
        part, state = _segment(model, inputs[:, here], targets[:, here], remaining, state)
        parts.append(part)
    joined = np.concatenate([np.asarray(part) for part in parts], 1)
    return [scores[:length] for scores, length in zip(joined, lengths, strict=True)]


@functools.partial(jax.jit, static_argnames=("batch", "max_length"))
def _fresh(model, batch, max_length):
    return model.init_state(batch, max_length)


@functools.partial(jax.jit, donate_argnames="state")
def _segment(model, inputs, targets, lengths, state) -> tuple[Float[Array, "B T"], list[Any]]:
    hidden, state = model.read(inputs, state, lengths=lengths)
    language_model = model.model if isinstance(model, Decoder) else model
    return scored(language_model, hidden, targets)[0], state


def scored(
    model: LanguageModel, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log likelihood of each target, and whether it is the most likely token (1 or 0); logits by blocks of tokens."""
    batch, length, width = hidden.shape
    block = min(BLOCK, length)
    padding = -length % block
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, -1, block, width)
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(batch, -1, block)
    matrix = model.unembedding()

    def of_block(inputs):
        hidden, targets = inputs
        logits = jnp.dot(hidden, matrix, preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        greedy = jnp.argmax(logits, -1) == targets
        return chosen - jax.nn.logsumexp(logits, -1), greedy.astype(jnp.float32)

    outputs = jax.lax.map(of_block, (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0)))
    return tuple(jnp.moveaxis(output, 0, 1).reshape(batch, -1)[:, :length] for output in outputs)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))
