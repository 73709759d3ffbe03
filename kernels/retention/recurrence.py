"""Retention as the recurrence it is defined by: that of gated linear attention, all key channels decaying alike."""

import jax.numpy as jnp

from ..gla import recurrence as gla


def unsupported(q, k, v, log_gamma, *, initial_state, segment_ids, return_final_state, platform) -> str | None:
    """None: a scan over tokens runs everywhere."""


def retention(q, k, v, log_gamma, **options):
    """Shapes as in `kernels.retention`, log_gamma [B, T, H]; see `kernels.gla.recurrence`."""
    return gla.gated_linear_attention(q, k, v, _of_channels(log_gamma, k), **options)


def retention_step(q_t, k_t, v_t, log_gamma_t, state, *, scale):
    """One token; computes in the state's dtype. Returns o_t in v_t's dtype, and the new state."""
    return gla.gated_linear_attention_step(q_t, k_t, v_t, _of_channels(log_gamma_t, k_t), state, scale=scale)


def _of_channels(log_gamma, k):
    return jnp.broadcast_to(log_gamma[..., None], k.shape)
