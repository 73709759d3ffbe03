"""The products in jax.numpy, for any batch and device."""

import jax
import jax.numpy as jnp


def unsupported(x, weight, *, norm_weight, gate, residual, swiglu, platform) -> str | None:
    """None: it runs everywhere."""


def matvec(x, weight, *, norm_weight, gate, residual, swiglu, eps, dtype):
    """As in `kernels.matvec`."""
    rounded = x.dtype
    x = x.astype(jnp.float32)
    if norm_weight is not None:
        heads = x.reshape(x.shape[0], -1, norm_weight.shape[0])
        mean_square = jnp.mean(jnp.square(heads), -1, keepdims=True)
        x = (heads * jax.lax.rsqrt(mean_square + eps) * norm_weight).reshape(x.shape)
    if gate is not None:
        x = x * jax.nn.silu(gate[:, -x.shape[1] :].astype(jnp.float32))
    y = jnp.einsum("bd,nd->bn", x.astype(rounded), weight, preferred_element_type=jnp.float32)
    if swiglu:
        y = y.astype(rounded)
        y = jax.nn.silu(y[:, : y.shape[1] // 2]) * y[:, y.shape[1] // 2 :]
    if residual is not None:
        y = residual + y.astype(rounded)
    return y.astype(dtype)
