"""One token of a GLA layer against the operator's own step; the Triton kernel in Pallas's interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import gated_linear_attention_step, gla_decode
from kernels.gla_decode import pallas_triton, plain
from kernels.gla_decode.api import Widths

WIDTHS = Widths(heads=4, groups=2, key=16, value=32, rank=5)


def drawn(dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    projected = jax.random.normal(keys[0], (3, WIDTHS.offsets[-1] + 7)).astype(dtype)
    up, bias = jax.random.normal(keys[1], (5, 32)).astype(dtype), jax.random.normal(keys[2], (32,))
    return projected, up, bias, jax.random.normal(keys[3], (3, 4, 16, 32))


@pytest.mark.parametrize("clamp_min", [None, -0.05])
@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 2e-6), (jnp.bfloat16, 5e-3)])
@pytest.mark.parametrize("implementation", ["xla", "pallas_triton"])
def test_against_the_operators_step(implementation: str, dtype, bound: float, clamp_min: float | None):
    projected, up, bias, state = drawn(dtype)
    q, k, v, low, _ = jnp.split(projected, WIDTHS.offsets[1:], 1)
    logits = jnp.dot(low.astype(jnp.float32), up.astype(jnp.float32), precision="highest") + bias
    log_alpha = jnp.maximum(jax.nn.log_sigmoid(logits) / 16, -jnp.inf if clamp_min is None else clamp_min)
    heads = lambda x, count: x.reshape(3, count, -1)  # noqa: E731
    want = gated_linear_attention_step(heads(q, 4), heads(k, 2), heads(v, 2), heads(log_alpha.astype(dtype), 2), state)
    run = plain.gla_decode
    if implementation == "pallas_triton":
        run = functools.partial(pallas_triton.gla_decode, interpret=True)
    got = run(projected, up, bias, state, widths=WIDTHS, temperature=16.0, clamp_min=clamp_min)
    assert got[0].dtype == dtype
    np.testing.assert_allclose(
        got[0].astype(jnp.float32), want[0].reshape(3, -1).astype(jnp.float32), atol=bound * 4, rtol=bound
    )
    np.testing.assert_allclose(got[1], want[1], atol=bound, rtol=bound)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"projected": jnp.zeros((3, 9))}, "projected: got shape"),
        ({"gate_up": jnp.zeros((5, 48)), "gate_bias": jnp.zeros(48)}, "gate_up: got 48 columns"),
        ({"gate_bias": jnp.zeros(7)}, "gate_bias: got shape"),
        ({"state": jnp.zeros((3, 4, 16, 32), jnp.bfloat16)}, "state: got dtype"),
    ],
)
def test_wrong_arguments(change: dict, message: str):
    projected, gate_up, gate_bias, state = drawn(jnp.float32)
    arguments = {"projected": projected, "gate_up": gate_up, "gate_bias": gate_bias, "state": state} | change
    with pytest.raises(ValueError, match=message):
        gla_decode(**arguments, temperature=16.0)


def test_a_named_implementation_raises():
    with pytest.raises(NotImplementedError, match="it needs a GPU"):
        gla_decode(*drawn(jnp.float32), temperature=16.0, implementation="pallas_triton")
