"""Each layer against its equation, in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glax.layers import FEATURE_MAPS, GatedLinearAttention, RMSNorm, SoftmaxAttention, SwiGLU, embed

D, H = 16, 4


def inputs(length: int, batch: int = 2) -> jnp.ndarray:
    return jax.random.normal(jax.random.key(0), (batch, length, D))


def float64(array) -> np.ndarray:
    return np.asarray(array, np.float64)


def matrix(linear) -> np.ndarray:
    return float64(linear.kernel[...])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def test_rms_norm():
    norm = RMSNorm(D, eps=0.1, dtype=jnp.float32)
    norm.weight[...] = jnp.arange(D, dtype=jnp.float32)
    x = float64(inputs(3))
    expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 0.1) * np.arange(D)
    np.testing.assert_allclose(norm(inputs(3)), expected, rtol=1e-5)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    x = inputs(3).astype(jnp.bfloat16)
    exact = RMSNorm(D, eps=1e-6, dtype=jnp.float32)(x)
    rounded = RMSNorm(D, eps=1e-6, dtype=jnp.bfloat16)(x)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("shape", [(2, 256), (3, 100), (1, 7), (5,)])
def test_embeddings_are_rows_and_their_gradient_is_a_float32_sum(shape):
    """In bfloat16 a row that most tokens read, whose gradient is a sum of hundreds, would stop to grow."""
    vocabulary = 9
    table = jax.random.normal(jax.random.key(1), (vocabulary, D))
    tokens = jnp.maximum(jax.random.randint(jax.random.key(2), shape, -20, vocabulary), 0)
    weights = jax.random.uniform(jax.random.key(3), (*shape, D), jnp.bfloat16)
    rows, vjp = jax.vjp(lambda table: embed(table, tokens, jnp.bfloat16), table)
    np.testing.assert_array_equal(rows, table.astype(jnp.bfloat16)[tokens])
    expected = np.zeros((vocabulary, D))
    np.add.at(expected, np.asarray(tokens), float64(weights))
    (gradient,) = vjp(weights)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_swiglu():
    mlp = SwiGLU(D, 24, std=0.3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = float64(inputs(3))
    expected = (silu(x @ matrix(mlp.gate_proj)) * (x @ matrix(mlp.up_proj))) @ matrix(mlp.down_proj)
    np.testing.assert_allclose(mlp(inputs(3)), expected, atol=1e-5)


def expected_gla(layer: GatedLinearAttention, x, tau=16.0, clamp=-np.inf, feature_map=None, eps=1e-6) -> np.ndarray:
    """The layer, term by term, with the operator as its recurrence."""
    x = float64(x)
    q, k, v = x @ matrix(layer.q_proj), x @ matrix(layer.k_proj), x @ matrix(layer.v_proj)
    if layer.q_conv is not None:
        q, k, v = (silu(convolved(y, conv)) for y, conv in ((q, layer.q_conv), (k, layer.k_conv), (v, layer.v_conv)))
    gates = x @ matrix(layer.gk_down) @ matrix(layer.gk_up) + float64(layer.gk_up.bias[...])
    log_alpha = np.maximum(np.log(sigmoid(gates)) / tau, clamp)
    if feature_map is not None:
        q, k = feature_map(q), feature_map(k)
    batch, length, _ = x.shape
    groups = layer.num_kv_heads
    q = q.reshape(batch, length, H, -1)
    k, v, log_alpha = (np.repeat(y.reshape(batch, length, groups, -1), H // groups, axis=2) for y in (k, v, log_alpha))
    state, outputs = np.zeros((batch, H, q.shape[-1], v.shape[-1])), []
    for t in range(length):
        state = np.exp(log_alpha[:, t])[..., None] * state + k[:, t][..., None] * v[:, t][..., None, :]
        outputs.append(q.shape[-1] ** -0.5 * np.einsum("bhk,bhkv->bhv", q[:, t], state))
    o = np.stack(outputs, 1)
    o = o / np.sqrt(np.mean(o**2, -1, keepdims=True) + eps) * float64(layer.o_norm.weight[...])
    o = o.reshape(batch, length, -1)
    if layer.g_proj is not None:
        o = o * silu(x @ matrix(layer.g_proj))
    return o @ matrix(layer.o_proj)


def convolved(x: np.ndarray, conv) -> np.ndarray:
    weight = float64(conv.weight[...])
    padded = np.concatenate([np.zeros((len(x), weight.shape[1] - 1, x.shape[-1])), x], 1)
    return sum(padded[:, i : i + x.shape[1]] * weight[:, i] for i in range(weight.shape[1]))


@pytest.mark.parametrize(
    "options, oracle",
    [
        ({}, {}),
        ({"num_kv_heads": 2}, {}),
        ({"num_kv_heads": 1, "short_conv_width": 3}, {}),
        ({"expand_k": 1.0, "expand_v": 2.0, "gate_rank": 3}, {}),
        ({"gate_temperature": 2.0, "clamp_min": -0.3}, {"tau": 2.0, "clamp": -0.3}),
        ({"feature_map": "relu"}, {"feature_map": lambda x: np.maximum(x, 0)}),
        ({"output_gate": False, "norm_eps": 0.1}, {"eps": 0.1}),
    ],
)
def test_gated_linear_attention(options: dict, oracle: dict):
    layer = GatedLinearAttention(
        D, H, std=0.4, dtype=jnp.float32, implementation="reference", rngs=nnx.Rngs(0), **options
    )
    layer.gk_up.bias[...] = jnp.linspace(-2, 2, layer.gk_up.bias.shape[0])
    layer.o_norm.weight[...] = jnp.linspace(0.5, 1.5, layer.value_width)
    y, state = jax.jit(layer)(inputs(9))
    assert state is None
    np.testing.assert_allclose(y, expected_gla(layer, inputs(9), **oracle), atol=2e-5)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_maps(name: str):
    x = np.linspace(-3, 3, 7)
    fast_gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    expected = {
        "relu": np.maximum(x, 0),
        "sigmoid": sigmoid(x),
        "silu": silu(x),
        "swish": silu(x),
        "sqrelu": np.maximum(x, 0) ** 2,
        "gelu": fast_gelu,
    }
    np.testing.assert_allclose(FEATURE_MAPS[name](jnp.asarray(x, jnp.float32)), expected[name], atol=1e-6)


def test_in_bfloat16_gates_are_rounded_once_and_states_never(monkeypatch: pytest.MonkeyPatch):
    from glax.layers import gated_linear_attention as module

    seen = {}

    def operator(q, k, v, log_alpha, **options):
        seen.update(q=q.dtype, k=k.dtype, v=v.dtype, log_alpha=log_alpha, state=options["initial_state"].dtype)
        return v, options["initial_state"]

    monkeypatch.setattr(module, "gated_linear_attention", operator)
    layer = GatedLinearAttention(D, H, short_conv_width=2, rngs=nnx.Rngs(0))
    y, _ = layer(inputs(5), state=layer.init_state(2))
    half = jnp.bfloat16
    log_alpha = jax.nn.log_sigmoid(layer.gk_up(layer.gk_down(inputs(5)), jnp.float32)) / 16
    assert log_alpha.dtype == jnp.float32
    np.testing.assert_array_equal(seen.pop("log_alpha"), log_alpha.astype(half).reshape(2, 5, H, -1))
    assert seen == {"q": half, "k": half, "v": half, "state": jnp.float32}
    assert y.dtype == half
    assert {leaf.dtype for leaf in jax.tree.leaves(layer)} == {jnp.dtype(jnp.float32)}


def expected_attention(layer: SoftmaxAttention, x, segments=None) -> np.ndarray:
    """Softmax attention with loops over rows, heads and queries; rotations as complex numbers."""
    x = float64(x)
    batch, length, _ = x.shape
    width = layer.head_width
    q, k, v = ((x @ matrix(p)).reshape(batch, length, -1, width) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    angles = np.arange(length)[:, None] * layer.rope_base ** (-np.arange(width // 2) / (width // 2))

    def rotated(y):
        turned = (y[..., : width // 2] + 1j * y[..., width // 2 :]) * np.exp(1j * angles)[:, None]
        return np.concatenate([turned.real, turned.imag], -1)

    q, k = rotated(q), rotated(k)
    o = np.zeros((batch, length, H, width))
    for b, t, h in np.ndindex(batch, length, H):
        first = 0 if layer.window is None else max(0, t - layer.window + 1)
        if segments is not None:
            first = max(first, max(s for s in range(t + 1) if s == 0 or segments[b][s] != segments[b][s - 1]))
        g = h // (H // layer.num_kv_heads)
        scores = k[b, first : t + 1, g] @ q[b, t, h] / np.sqrt(width)
        weights = np.exp(scores - scores.max())
        o[b, t, h] = weights / weights.sum() @ v[b, first : t + 1, g]
    return o.reshape(batch, length, -1) @ matrix(layer.o_proj)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "window": 3, "rope_base": 100.0}])
@pytest.mark.parametrize("segmented", [False, True])
def test_softmax_attention(options: dict, segmented: bool):
    """An id that comes back names a new segment."""
    layer = SoftmaxAttention(D, H, std=0.4, dtype=jnp.float32, rngs=nnx.Rngs(0), **options)
    segments = [[1, 1, 1, 2, 2, 2, 2, 1, 1], [3, 3, 3, 3, 3, 3, 3, 3, 4]] if segmented else None
    y, _ = jax.jit(layer)(inputs(9), segment_ids=None if segments is None else jnp.array(segments))
    np.testing.assert_allclose(y, expected_attention(layer, inputs(9), segments), atol=2e-5)
