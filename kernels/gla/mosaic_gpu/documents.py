"""What packed documents mean to a chunk, as factors of its rows: kernels multiply and know nothing else of them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .anchors import CHUNK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Documents:
    """Factors are float32, 0 or 1. C = T / 64 chunks."""

    reached: Float[Array, "B T"]  # 1 where a token belongs to the document of the token before its chunk
    reaching: Float[Array, "B T"]  # 1 where it belongs to that of its chunk's last token
    goes_on: Float[Array, "B T"]  # 1 where it belongs to that of the token before it
    through: Float[Array, "B C"]  # 1 where the token before the chunk and its last are of one document
    together: Float[Array, "B C 64 64"]  # bf16, 1 where two tokens of a chunk are of one document

    @classmethod
    def of(cls, numbers: Int[Array, "B T"] | None):
        """The factors, from numbers of documents that never come back; None where there are none."""
        if numbers is None:
            return None
        B, T = numbers.shape
        rows = numbers.reshape(B, T // CHUNK, CHUNK)
        before = jnp.concatenate([numbers[:, :1], rows[:, :-1, -1]], axis=1)
        factor = lambda mask: mask.astype(jnp.float32).reshape(B, -1)
        return cls(
            reached=factor(rows == before[..., None]),
            reaching=factor(rows == rows[..., -1:]),
            goes_on=factor(jnp.diff(numbers, axis=1, prepend=numbers[:, :1]) == 0),
            through=factor(before == rows[..., -1]),
            together=(rows[..., :, None] == rows[..., None, :]).astype(jnp.bfloat16),
        )
