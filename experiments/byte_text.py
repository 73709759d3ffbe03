"""Text as one long array of bytes, for experiments that draw windows from it, and the loss of such windows."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from glax.data import DataConfig, TokenStore, prepare
from glax.errors import UserError
from glax.models import LanguageModel

VOCABULARY = 264  # 256 bytes and the end of a document, rounded up


@dataclasses.dataclass(frozen=True)
class ByteText:
    """Documents one after the other, each with an end token before it and after it."""

    name: str
    train: Int[np.ndarray, "N"]
    held_out: Int[np.ndarray, "M"]

    def described(self) -> dict[str, object]:
        return {"text": self.name, "train_bytes": len(self.train), "held_out_bytes": len(self.held_out)}

    def held_out_windows(self, length: int, rows: int, most: int) -> Int[Array, "batches rows length+1"]:
        """Windows of the held-out text, one after the other, in whole batches; ``most`` of these at most."""
        batches = min(most, (len(self.held_out) - 1) // (length * rows))
        if batches < 1:
            raise UserError(
                f"the held-out text has {len(self.held_out)} bytes and a batch needs {length * rows + 1}: give more "
                "text, or shorter or fewer rows"
            )
        starts = length * np.arange(batches * rows)
        return jnp.asarray(self.held_out[starts[:, None] + np.arange(length + 1)].reshape(batches, rows, -1))


def load_text(data: str | None, held_out: float = 0.05) -> ByteText:
    """What ``data`` names, as ``glax.data`` reads it: files, folders, globs; None is Python's standard library."""
    prepared = prepare(DataConfig(train=data, validation_fraction=held_out), quiet=True)
    name = "the Python standard library" if data is None else Path(data).name
    return ByteText(name, _all(prepared.train), _all(prepared.validation))


def _all(store: TokenStore) -> Int[np.ndarray, "N"]:
    return store.read(np.arange(store.starts[0] - 1, store.starts[-1] + store.lengths[-1]))


def token_losses(
    model: LanguageModel, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Negative log likelihood of each target in nats."""
    logits = jnp.dot(hidden, model.unembedding(), preferred_element_type=jnp.float32)
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]


def window_loss(model: LanguageModel, windows: Int[Array, "B T+1"]) -> Float[Array, ""]:
    """Mean loss of windows read from an empty state."""
    return jnp.mean(token_losses(model, model.hidden(windows[:, :-1]), windows[:, 1:]))
