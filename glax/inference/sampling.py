"""Choosing the next token from its logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from glax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Raises UserError for values that draw none."""

    temperature: float = 1.0
    """Logits are divided by it. 0: always the most likely token."""

    top_k: int | None = None
    """Only the k most likely tokens (and those as likely as the last of them)."""

    top_p: float | None = None
    """Only the most likely tokens that together have this probability (Holtzman et al. 2020, arXiv 1904.09751)."""

    def __post_init__(self):
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}: it must be 0 (the most likely token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must be above 0 and at most 1")


def sample(logits: Float[Array, "B vocab"], key: PRNGKeyArray, sampling: Sampling) -> Int[Array, "B"]:
    """A token for each row. ``top_p`` applies to what ``top_k`` leaves, both after the temperature."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered = jnp.flip(jnp.sort(logits, -1), -1)
        probabilities = jax.nn.softmax(ordered, -1)
        above = jnp.cumsum(probabilities, -1) - probabilities
        least = jnp.min(jnp.where(above < sampling.top_p, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)
