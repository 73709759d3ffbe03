"""Rotary positions (Su et al. 2021, arXiv 2104.09864), in the half-split order of Llama."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(x: Float[Array, "B T H K"], positions: Int[Array, "B T"], base: float) -> Float[Array, "B T H K"]:
    """Turn the pair (x_i, x_{i+K/2}) by position * base^(-2i/K), in float32; the result has x's dtype."""
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)
    return turned.astype(x.dtype)
