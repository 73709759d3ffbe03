"""Operators on four shards of a sequence have the values and gradients of one device, and send what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from collectives import collectives
from kernels import gated_linear_attention, retention, selective_scan, short_convolution
from kernels.sequence_parallel import (
    linear_attention_over,
    selective_scan_over,
    short_convolution_over,
    softmax_attention_over,
)

B, T, H, G, K, V = 2, 48, 4, 2, 4, 6
TOKENS = PartitionSpec("data", "sequence")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def documents():
    """Ids that change within shards (of 12) and at their edges, come back, run through whole shards, and once per
    token."""
    rows = np.ones((B, T), np.int32)
    rows[0, 5:24], rows[0, 24:31], rows[0, 36:40] = 2, 3, 2
    rows[1, 11:14] = [2, 3, 2]
    return jnp.asarray(rows)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def values_and_gradients(f, *inputs):
    def loss(*inputs):
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(f(*inputs)))

    arguments = tuple(range(len(inputs)))
    return jax.jit(lambda *x: (f(*x), jax.grad(loss, arguments)(*x)))(*inputs)


def assert_equal(sharded, plain):
    got, want = jax.tree.leaves(sharded), jax.tree.leaves(plain)
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1, np.max(np.abs(y))))


def gates(kind):
    """Some closed for good (-inf)."""
    shape = {"channel": (B, T, G, K), "head": (B, T, H), "fixed": (H,)}[kind]
    closed = jax.random.uniform(jax.random.key(9), shape) < (0.05 if kind != "fixed" else 0)
    return jnp.where(closed, -jnp.inf, jax.nn.log_sigmoid(normal(3, *shape)) / 4)


def by_recurrence(q, k, v, log_decay, **options):
    operator = gated_linear_attention if log_decay.ndim == 4 else retention
    return operator(q, k, v, log_decay, implementation="reference", **options)


@pytest.mark.parametrize("kind, extras", [("channel", True), ("channel", False), ("head", True), ("fixed", False)])
def test_linear_attention(mesh, documents, kind, extras):
    groups = G if kind == "channel" else H
    inputs = [normal(0, B, T, H, K), normal(1, B, T, groups, K), normal(2, B, T, groups, V), gates(kind)]
    specs = [TOKENS, TOKENS, TOKENS, PartitionSpec() if kind == "fixed" else TOKENS]
    if extras:
        inputs, specs = [*inputs, normal(4, B, H, K, V)], [*specs, PartitionSpec("data")]

    def options(initial_state):
        return {"initial_state": initial_state, "return_final_state": extras}

    def plain(q, k, v, log_decay, initial_state=None):
        return by_recurrence(q, k, v, log_decay, segment_ids=documents if extras else None, **options(initial_state))

    def sharded(*inputs):
        def shard(documents, q, k, v, log_decay, initial_state=None):
            documents = documents if extras else None
            operands = (by_recurrence, q, k, v, log_decay)
            return linear_attention_over("sequence", *operands, segment_ids=documents, **options(initial_state))

        outputs = (TOKENS, PartitionSpec("data")) if extras else TOKENS
        return jax.shard_map(shard, mesh=mesh, in_specs=(TOKENS, *specs), out_specs=outputs)(documents, *inputs)

    assert_equal(values_and_gradients(sharded, *inputs), values_and_gradients(plain, *inputs))


def test_later_shards_change_nothing_before_them(mesh):
    """The gradient of an output with respect to later tokens is exactly zero, across the edges of shards too."""
    q, k, v, log_alpha = normal(0, B, T, H, K), normal(1, B, T, G, K), normal(2, B, T, G, V), gates("channel")

    def output(k, v, log_alpha):
        shard = functools.partial(linear_attention_over, "sequence", by_recurrence)
        return jax.shard_map(shard, mesh=mesh, in_specs=(TOKENS,) * 4, out_specs=TOKENS)(q, k, v, log_alpha)

    last = 23  # of the second shard
    gradients = jax.jit(jax.grad(lambda *x: jnp.sum(output(*x)[:, last]), (0, 1, 2)))(k, v, log_alpha)
    for gradient in gradients:
        assert np.all(np.asarray(gradient[:, last + 1 :]) == 0)
        assert np.all(np.any(np.asarray(gradient[:, :12]) != 0, (1, 2, 3)))


def test_selective_scan(mesh, documents):
    E, N = 4, 3
    inputs = [normal(0, B, T, E), jax.nn.softplus(normal(1, B, T, E) - 2), -jnp.exp(normal(2, E, N))]
    inputs += [normal(3, B, T, N), normal(4, B, T, N), normal(5, E), normal(6, B, E, N)]
    whole, rows = PartitionSpec(), PartitionSpec("data")
    specs = [TOKENS, TOKENS, whole, TOKENS, TOKENS, whole, rows]
    options = {"return_final_state": True, "implementation": "reference"}

    def plain(*inputs):
        *inputs, initial_state = inputs
        return selective_scan(*inputs, initial_state=initial_state, segment_ids=documents, **options)

    def sharded(*inputs):
        def shard(documents, *inputs):
            *inputs, initial_state = inputs
            states = {"initial_state": initial_state, "segment_ids": documents}
            return selective_scan_over("sequence", *inputs, **states, **options)

        return jax.shard_map(shard, mesh=mesh, in_specs=(TOKENS, *specs), out_specs=(TOKENS, rows))(documents, *inputs)

    assert_equal(values_and_gradients(sharded, *inputs), values_and_gradients(plain, *inputs))


@pytest.mark.parametrize("packed", [True, False])
def test_short_convolution(mesh, documents, packed):
    inputs = normal(0, B, T, 3), normal(1, 3, 4)

    def plain(x, weight):
        return short_convolution(x, weight, segment_ids=documents if packed else None)

    def sharded(x, weight):
        def shard(x, weight, documents):
            return short_convolution_over("sequence", x, weight, segment_ids=documents if packed else None)

        specs = (TOKENS, PartitionSpec(), TOKENS)
        return jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=TOKENS)(x, weight, documents)

    assert_equal(values_and_gradients(sharded, *inputs), values_and_gradients(plain, *inputs))


def test_a_shard_shorter_than_the_convolution_is_refused(mesh):
    x, weight = normal(0, B, 8, 3), normal(1, 3, 4)
    shard = functools.partial(short_convolution_over, "sequence")
    with pytest.raises(ValueError, match="got 2 tokens in a shard, wanted at least the 3"):
        jax.shard_map(shard, mesh=mesh, in_specs=(TOKENS, PartitionSpec()), out_specs=TOKENS)(x, weight)


@pytest.mark.parametrize("packed, window", [(True, None), (False, 5)])
def test_softmax_attention(mesh, documents, packed, window):
    inputs = normal(0, B, T, H, K), normal(1, B, T, G, K), normal(2, B, T, G, K)
    numbers = jnp.cumsum(jnp.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0))), 1)

    def plain(q, k, v):
        mask = (numbers[:, :, None] == numbers[:, None])[:, None] if packed else None
        window_size = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, local_window_size=window_size)

    def sharded(q, k, v):
        def shard(q, k, v, numbers):
            segments = numbers if packed else None
            return softmax_attention_over("sequence", q, k, v, segments=segments, window=window, block=16)

        return jax.shard_map(shard, mesh=mesh, in_specs=(TOKENS,) * 4, out_specs=TOKENS)(q, k, v, numbers)

    assert_equal(values_and_gradients(sharded, *inputs), values_and_gradients(plain, *inputs))


def test_bytes_do_not_depend_on_the_length():
    """A forward and backward pass receives at most 2 (B H K V + B H K) 4 (N - 1) bytes, at T = 1K and at 16K."""
    H = K = 8
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
    tokens = PartitionSpec(None, "sequence")

    def received(length):
        def array(*shape, dtype=jnp.float32):
            return jax.ShapeDtypeStruct((1, length, *shape), dtype, sharding=jax.NamedSharding(mesh, tokens))

        def loss(documents, *inputs):
            def shard(documents, *inputs):
                return linear_attention_over("sequence", by_recurrence, *inputs, segment_ids=documents)

            sharded = jax.shard_map(shard, mesh=mesh, in_specs=(tokens,) * 5, out_specs=tokens)
            return sharded(documents, *inputs) ** 2

        def gradients(documents, *inputs):
            return jax.vjp(functools.partial(loss, documents), *inputs)[1](jnp.ones((1, length, H, V)))

        inputs = [array(H, K), array(H, K), array(H, V), array(H, K)]
        compiled = jax.jit(gradients).lower(array(dtype=jnp.int32), *inputs).compile()
        return sum(collective.bytes for collective in collectives(compiled.as_text()))

    short, long = received(1024), received(16384)
    assert short == long
    assert 2 * (H * K * V) * 4 * 7 <= short <= 2 * (H * K * V + H * K) * 4 * 7
