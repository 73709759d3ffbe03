"""The layers that GLA is compared with, each against its recurrence in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glax.layers import GatedLinearAttention, Mamba, MultiScaleRetention

D, H, T = 16, 4, 9
X = jax.random.normal(jax.random.key(0), (2, T, D))
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 1, 1], [3, 3, 3, 3, 3, 3, 3, 3, 4]])


def float64(array) -> np.ndarray:
    return np.asarray(array, np.float64)


def matrix(linear) -> np.ndarray:
    return float64(linear.kernel[...])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def retained(q, k, v, log_gamma, segments) -> np.ndarray:
    """S_t = gamma_t S_{t-1} + k_t^T v_t, o_t = K^-0.5 q_t S_t, with S at zero where a segment starts."""
    batch, length, heads, width = q.shape
    o = np.zeros(v.shape)
    for b, h in np.ndindex(batch, heads):
        state = np.zeros((width, v.shape[-1]))
        for t in range(length):
            if t and segments is not None and segments[b, t] != segments[b, t - 1]:
                state[:] = 0
            state = np.exp(log_gamma[b, t, h]) * state + np.outer(k[b, t, h], v[b, t, h])
            o[b, t, h] = width**-0.5 * q[b, t, h] @ state
    return o


def gated_output(layer, o: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The norm per head, the swish gate and the last projection, of retention and GLA alike."""
    o = o / np.sqrt(np.mean(o**2, -1, keepdims=True) + 1e-6) * float64(layer.o_norm.weight[...])
    return (o.reshape(*x.shape[:2], -1) * silu(x @ matrix(layer.g_proj))) @ matrix(layer.o_proj)


def rotated(y: np.ndarray) -> np.ndarray:
    half = y.shape[-1] // 2
    angles = np.arange(y.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
    turned = (y[..., :half] + 1j * y[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], -1)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "segments"])
def test_retention(segments):
    layer = MultiScaleRetention(D, H, std=0.4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert (layer.key_width, layer.value_width) == (D // H, 2 * D // H)
    layer.o_norm.weight[...] = jnp.linspace(0.5, 1.5, layer.value_width)
    x = float64(X)
    q, k, v = ((x @ matrix(p)).reshape(2, T, H, -1) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    gamma = np.array([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256])
    o = retained(rotated(q), rotated(k), v, np.broadcast_to(np.log(gamma), (2, T, H)), segments)
    y, state = jax.jit(layer)(X, segment_ids=None if segments is None else jnp.asarray(segments, jnp.int32))
    assert state is None
    np.testing.assert_allclose(y, gated_output(layer, o, x), atol=2e-5)


@pytest.mark.parametrize("gate", ["scalar", "fixed", "none"])
def test_gates_of_the_ablation(gate: str):
    """The GLA layer with one decay per head: its own number, RetNet's, and none. Nothing is rotated."""
    layer = GatedLinearAttention(D, H, gate=gate, gate_temperature=2.0, std=0.4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = float64(X)
    if gate == "scalar":
        layer.gk_proj.bias[...] = jnp.linspace(-2, 2, H)
        log_gamma = np.log(sigmoid(x @ matrix(layer.gk_proj) + np.linspace(-2, 2, H))) / 2
    else:
        log_gamma = np.log([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256]) if gate == "fixed" else np.zeros(H)
        log_gamma = np.broadcast_to(log_gamma, (2, T, H))
    q, k, v = ((x @ matrix(p)).reshape(2, T, H, -1) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    o = retained(q, k, v, log_gamma, SEGMENTS)
    y, _ = jax.jit(layer)(X, segment_ids=jnp.asarray(SEGMENTS, jnp.int32))
    np.testing.assert_allclose(y, gated_output(layer, o, x), atol=2e-5)


def expected_mamba(layer: Mamba, x: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Token by token and channel by channel; a segment starts with an empty convolution and state."""
    u, z = x @ matrix(layer.in_proj), x @ matrix(layer.z_proj)
    taps, bias, rank, n = float64(layer.conv.weight[...]), float64(layer.conv.bias[...]), layer.dt_rank, 16
    a, y = -np.exp(float64(layer.a_log[...])), np.zeros(u.shape)
    for b in range(len(x)):
        for t in range(x.shape[1]):
            starts = [s for s in range(t + 1) if s == 0 or segments[b, s] != segments[b, s - 1]]
            if t in starts:
                h = np.zeros(a.shape)
            seen = u[b, max(starts[-1], t - taps.shape[1] + 1) : t + 1]
            c = silu(np.sum(seen * taps[:, taps.shape[1] - len(seen) :].T, 0) + bias)
            selected = c @ matrix(layer.x_proj)
            raw = selected[:rank] @ matrix(layer.dt_proj) + float64(layer.dt_proj.bias[...])
            dt = np.log1p(np.exp(raw))
            h = np.exp(dt[:, None] * a) * h + np.outer(dt * c, selected[rank : rank + n])
            y[b, t] = h @ selected[rank + n :] + float64(layer.d[...]) * c
    return (y * silu(z)) @ matrix(layer.out_proj)


def test_mamba():
    layer = Mamba(D, std=0.4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.conv.bias[...] = jnp.linspace(-0.5, 0.5, layer.inner_size)
    layer.d[...] = jnp.linspace(0, 2, layer.inner_size)
    y, _ = jax.jit(layer)(X, segment_ids=jnp.asarray(SEGMENTS, jnp.int32))
    np.testing.assert_allclose(y, expected_mamba(layer, float64(X), SEGMENTS), atol=2e-5)


def test_mamba_starts_as_its_authors_have_it():
    layer = Mamba(64, rngs=nnx.Rngs(0))
    assert (layer.inner_size, layer.dt_rank) == (128, 4)
    np.testing.assert_allclose(jnp.exp(layer.a_log[...]), np.tile(np.arange(1, 17), (128, 1)), rtol=1e-5)
    dt = np.log1p(np.exp(float64(layer.dt_proj.bias[...])))
    assert 1e-3 <= dt.min() < 2e-3 and 5e-2 < dt.max() <= 1e-1
    assert np.abs(layer.dt_proj.kernel[...]).max() <= 4**-0.5
    assert np.all(layer.d[...] == 1) and np.all(layer.conv.bias[...] == 0)
