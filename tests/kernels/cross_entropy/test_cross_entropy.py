"""The blocked cross entropy against float64, on one device and on eight, and what it holds in memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import softmax_cross_entropy


def make(tokens, width, vocabulary, dtype, seed=0, size=1.0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(size * rng.normal(size=(tokens, width)), dtype)
    unembedding = jnp.asarray(size * rng.normal(size=(width, vocabulary)), dtype)
    targets = jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32)
    weights = jnp.asarray(rng.random(tokens) * (rng.random(tokens) < 0.8), jnp.float32)
    return hidden, unembedding, targets, weights


def oracle(hidden, unembedding, targets, weights):
    """Losses and the gradients of their weighted sum, in numpy and float64, with all logits."""
    h, w, weights = (np.asarray(x, np.float64) for x in (hidden, unembedding, weights))
    rows, targets = np.arange(len(h)), np.asarray(targets)
    logits = h @ w
    logits -= logits.max(1, keepdims=True)
    p = np.exp(logits)
    loss = np.log(p.sum(1)) - logits[rows, targets]
    p /= p.sum(1, keepdims=True)
    p[rows, targets] -= 1
    p *= weights[:, None]
    return loss, p @ w.T, h.T @ p


@functools.partial(jax.jit, static_argnames="block")
def losses_and_gradients(hidden, unembedding, targets, weights, block):
    call = lambda h, w: softmax_cross_entropy(h, w, targets, block=block)  # noqa: E731
    loss, vjp = jax.vjp(call, hidden, unembedding)
    return loss, *vjp(weights)


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def check(got, want, dtype):
    for x, y, limit in zip(got, want, (5e-6, 2e-5, 2e-5) if dtype == "float32" else (1e-5, 4e-3, 4e-3), strict=True):
        assert rms(x - y) <= limit * rms(y)


@settings(max_examples=20)
@given(
    shape=st.sampled_from([(1, 4, 3, 2048), (37, 8, 50, 8), (64, 16, 257, 64), (64, 16, 257, 1)]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
    size=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_losses_and_gradients(shape, dtype, seed, size):
    *shape, block = shape
    inputs = make(*shape, dtype, seed, size)
    check(losses_and_gradients(*inputs, block=block), oracle(*inputs), dtype)


def test_dtypes_and_vmap():
    hidden, unembedding, targets, weights = make(37, 8, 50, "bfloat16")
    loss, d_hidden, d_unembedding = losses_and_gradients(hidden, unembedding, targets, weights, block=8)
    assert (loss.dtype, d_hidden.dtype, d_unembedding.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    twice = [jnp.stack([x, x[::-1]]) for x in (hidden, targets)]
    mapped = jax.vmap(lambda h, t: softmax_cross_entropy(h, unembedding, t, block=8))(*twice)
    np.testing.assert_allclose(mapped, jnp.stack([loss, loss[::-1]]), rtol=1e-6)


def test_holds_one_block_of_logits():
    tokens, vocabulary, block = 4096, 8192, 64
    hidden, unembedding = jax.ShapeDtypeStruct((tokens, 8), "float32"), jax.ShapeDtypeStruct((8, vocabulary), "float32")
    rows = [jax.ShapeDtypeStruct((tokens,), dtype) for dtype in ("int32", "float32")]
    memory = losses_and_gradients.lower(hidden, unembedding, *rows, block=block).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * block * vocabulary * 4 < tokens * vocabulary * 4 / 4


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices: JAX_PLATFORMS=cpu with eight virtual ones")
@pytest.mark.parametrize("tokens, vocabulary", [(128, 48), (128, 45), (126, 48)])
def test_on_eight_devices(tokens, vocabulary):
    """Tokens over data and fsdp, vocabulary over tensor, and what does not divide over nothing. Gradients are summed
    once, after the loop over blocks: inside it only the gradient of the block's hidden rows is."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    inputs = make(tokens, 16, vocabulary, "float32")
    rows = P(("data", "fsdp")) if tokens % 4 == 0 else P("data")
    columns = P("fsdp", "tensor") if vocabulary % 2 == 0 else P("fsdp")
    arrays = [
        jax.device_put(x, NamedSharding(mesh, p)) for x, p in zip(inputs, (rows, columns, rows, rows), strict=True)
    ]
    compiled = losses_and_gradients.lower(*arrays, block=32).compile()
    check(compiled(*arrays), oracle(*inputs), "float32")
    text = compiled.as_text()
    assert not re.search(rf"all-gather\S* = f32\[{tokens},", text)
    loops = re.findall(r"^%?\S*region\S* .*?^}", text, re.MULTILINE | re.DOTALL)
    sums = [shape for loop in loops for shape in re.findall(r"f32\[([\d,]+)\]\S* all-reduce\(", loop)]
    assert all(shape.endswith(",16") for shape in sums), "width 16 last: gradients of hidden rows alone"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": jnp.zeros((4, 2, 8))}, "hidden: got float32 of shape (4, 2, 8), wanted floats of shape [N, D]"),
        ({"unembedding": jnp.zeros((9, 3))}, "unembedding: got shape (9, 3), wanted [D=8, vocab]"),
        ({"targets": jnp.zeros(4)}, "targets: got float32 of shape (4,), wanted integers of shape [N=4]"),
        ({"block": 0}, "block: got 0, wanted at least 1"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "hidden": jnp.zeros((4, 8)),
        "unembedding": jnp.zeros((8, 3)),
        "targets": jnp.zeros(4, int),
        "block": 2,
    }
    with pytest.raises(ValueError) as error:
        softmax_cross_entropy(**arguments | change)
    assert str(error.value) == message
