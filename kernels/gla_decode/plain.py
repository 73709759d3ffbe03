"""One token in jax.numpy."""

import jax
import jax.numpy as jnp


def unsupported(projected, state, *, widths, platform) -> str | None:
    """None: it runs everywhere."""


def gla_decode(projected, gate_up, gate_bias, state, *, widths, temperature, clamp_min):
    """As in `kernels.gla_decode`."""
    batch, heads, groups = state.shape[0], widths.heads, widths.groups
    q, k, v, low = (projected[:, start:end] for start, end in zip(widths.offsets[:-1], widths.offsets[1:], strict=True))
    logits = jnp.dot(low, gate_up, preferred_element_type=jnp.float32) + gate_bias.astype(jnp.float32)
    log_alpha = jax.nn.log_sigmoid(logits) / temperature
    if clamp_min is not None:
        log_alpha = jnp.maximum(log_alpha, clamp_min)
    alpha = jnp.exp(log_alpha.astype(projected.dtype).astype(jnp.float32))

    def per_head(x):
        return jnp.repeat(x.astype(jnp.float32).reshape(batch, groups, -1), heads // groups, 1)

    q = q.astype(jnp.float32).reshape(batch, heads, -1)
    state = per_head(alpha)[..., None] * state + per_head(k)[..., None] * per_head(v)[:, :, None]
    o = widths.key**-0.5 * jnp.sum(q[..., None] * state, 2)
    return o.reshape(batch, -1).astype(projected.dtype), state
