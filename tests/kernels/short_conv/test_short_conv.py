"""The short convolution against sums written out in NumPy, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import short_convolution

jitted = jax.jit(short_convolution, static_argnames="return_final_state")


def draw(seed: int, *shape: int) -> jnp.ndarray:
    return jax.random.normal(jax.random.key(seed), shape)


def expected(x, weight, bias, state, segments):
    """y and final state in float64, from the definition."""
    x, weight, bias, state = (np.asarray(array, np.float64) for array in (x, weight, bias, state))
    batch, length, channels = x.shape
    width = weight.shape[1]
    y, last = np.zeros_like(x), np.zeros((batch, width - 1, channels))
    for b in range(batch):
        before = list(state[b])
        for t in range(length):
            if t > 0 and segments[b, t] != segments[b, t - 1]:
                before = [np.zeros(channels)] * (width - 1)
            before.append(x[b, t])
            y[b, t] = bias + sum(weight[:, i] * before[len(before) - width + i] for i in range(width))
        if width > 1:
            last[b] = before[1 - width :]
    return y, last


@given(
    length=st.sampled_from([1, 2, 7]),
    width=st.sampled_from([1, 2, 4]),
    segments=st.lists(st.integers(1, 2), min_size=14, max_size=14),
    seed=st.integers(0, 9),
)
def test_equals_the_definition(length: int, width: int, segments: list[int], seed: int):
    numbers = np.random.default_rng(seed)
    x, weight, bias, state = (
        jnp.asarray(numbers.normal(size=shape), jnp.float32)
        for shape in ((2, length, 3), (3, width), 3, (2, width - 1, 3))
    )
    segment_ids = jnp.array(segments, jnp.int32).reshape(2, 7)[:, :length]
    y, last = jitted(x, weight, bias=bias, initial_state=state, segment_ids=segment_ids, return_final_state=True)
    want_y, want_last = expected(x, weight, bias, state, np.asarray(segment_ids))
    np.testing.assert_allclose(y, want_y, atol=1e-5)
    np.testing.assert_allclose(last, want_last, atol=1e-6)


def test_token_by_token_and_padded_rows_reach_the_same_state():
    x, weight = draw(0, 2, 6, 3), draw(1, 3, 4)
    whole, last = short_convolution(x, weight, return_final_state=True)
    state, outputs = jnp.zeros((2, 3, 3)), []
    for t in range(6):
        y, state = short_convolution(x[:, t : t + 1], weight, initial_state=state, return_final_state=True)
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole, atol=1e-6)
    np.testing.assert_array_equal(state, last)

    padded = jnp.concatenate([x, draw(2, 2, 3, 3)], 1)
    _, state = short_convolution(padded, weight, lengths=jnp.array([6, 2]), return_final_state=True)
    np.testing.assert_array_equal(state[0], last[0])
    np.testing.assert_array_equal(state[1], jnp.concatenate([jnp.zeros((1, 3)), x[1, :2]]))


def test_gradients_are_exact():
    """Against the derivative written out: of y_t with respect to x_s it is weight[:, W-1-(t-s)], within a segment."""
    length, width = 6, 3
    x, weight, state, out = draw(0, 1, length, 2), draw(1, 2, width), draw(2, 1, width - 1, 2), draw(3, 1, length, 2)
    segment_ids = jnp.array([[1, 1, 1, 1, 5, 5]])

    def value(x, weight, state):
        return jnp.sum(out * short_convolution(x, weight, initial_state=state, segment_ids=segment_ids))

    dx, dweight, dstate = jax.grad(value, (0, 1, 2))(x, weight, state)
    tokens = np.concatenate([state, x], 1)[0]
    segments = np.array([1, 1, 1, 1, 1, 1, 5, 5])
    dtokens, want_dweight = np.zeros_like(tokens), np.zeros((2, width))
    for t in range(length):
        for lag in range(width):
            s = t + width - 1 - lag
            if segments[s] == segments[t + width - 1]:
                dtokens[s] += out[0, t] * weight[:, width - 1 - lag]
                want_dweight[:, width - 1 - lag] += out[0, t] * tokens[s]
    np.testing.assert_allclose(dx[0], dtokens[width - 1 :], atol=1e-5)
    np.testing.assert_allclose(dstate[0], dtokens[: width - 1], atol=1e-5)
    np.testing.assert_allclose(dweight, want_dweight, atol=1e-5)

    influence = jax.jacobian(lambda x: short_convolution(x, weight, segment_ids=segment_ids))(x)[0, :, :, 0]
    t, s = np.indices((length, length))
    nothing = (s > t) | (np.asarray(segment_ids[0])[s] != np.asarray(segment_ids[0])[t])
    assert np.all(np.moveaxis(np.asarray(influence), 2, 1)[nothing] == 0)


def test_bfloat16_sums_are_float32():
    x, weight = draw(0, 2, 40, 8).astype(jnp.bfloat16), draw(1, 8, 4)
    y = short_convolution(x, weight)
    assert y.dtype == jnp.bfloat16
    exact = short_convolution(x.astype(jnp.float32), weight)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jnp.zeros((2, 3))}, r"x: got shape \(2, 3\), wanted \[B, T, C\]"),
        ({"weight": jnp.zeros((4, 2))}, r"weight: got shape \(4, 2\), wanted \[C=3, W\]"),
        ({"bias": jnp.zeros(2)}, r"bias: got shape \(2,\), wanted \[C=3\]"),
        ({"initial_state": jnp.zeros((2, 4, 3))}, r"initial_state: got shape \(2, 4, 3\), wanted \[B=2, W-1=3, C=3\]"),
        ({"segment_ids": jnp.zeros((2, 4), jnp.int32)}, r"segment_ids: got shape \(2, 4\), wanted \[B=2, T=5\]"),
        ({"lengths": jnp.zeros(3, jnp.int32)}, r"lengths: got shape \(3,\), wanted \[B=2\]"),
    ],
)
def test_wrong_shapes(change: dict, message: str):
    arguments = {"x": jnp.zeros((2, 5, 3)), "weight": jnp.zeros((3, 4))} | change
    with pytest.raises(ValueError, match=message):
        short_convolution(arguments.pop("x"), arguments.pop("weight"), **arguments)
