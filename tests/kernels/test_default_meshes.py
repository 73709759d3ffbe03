"""Operators on the meshes that jax makes unless told otherwise: in a shard_map that checks what varies over it, and
with explicit axes.

They begin with no state, and some weights are shared by all devices, whose gradients are added up.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import gated_linear_attention, retention, selective_scan, short_convolution, softmax_cross_entropy

pytestmark = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices: JAX_PLATFORMS=cpu with virtual ones")

ROWS, ALL = P("x"), P()
CASES = {
    "gla": (gated_linear_attention, [(2, 5, 4, 3), (2, 5, 2, 3), (2, 5, 2, 6), (2, 5, 2, 3)], [ROWS] * 4),
    "retention": (retention, [(2, 5, 3, 4), (2, 5, 3, 4), (2, 5, 3, 6), (3,)], [ROWS, ROWS, ROWS, ALL]),
    "selective_scan": (
        selective_scan,
        [(2, 5, 4), (2, 5, 4), (4, 3), (2, 5, 3), (2, 5, 3), (4,)],
        [ROWS, ROWS, ALL, ROWS, ROWS, ALL],
    ),
    "short_convolution": (short_convolution, [(2, 5, 4), (4, 3)], [ROWS, ALL]),
    "softmax_cross_entropy": (
        lambda hidden, unembedding, one_hot: softmax_cross_entropy(hidden, unembedding, jnp.argmax(one_hot, 1)),
        [(6, 4), (4, 11), (6, 11)],
        [ROWS, ALL, ROWS],
    ),
}
IMPLEMENTATIONS = [(name, None) for name in CASES] + [
    (name, "reference") for name in ("gla", "retention", "selective_scan")
]


def case(name: str, implementation: str | None) -> tuple[Callable, list[jax.Array], list[P]]:
    """The call, its arrays, and how they are sharded."""
    operator, shapes, specs = CASES[name]
    options = {} if implementation is None else {"implementation": implementation}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [-jnp.abs(jax.random.normal(key, shape)) for key, shape in zip(keys, shapes, strict=True)]
    return functools.partial(operator, **options), arrays, specs


def gradients(call: Callable, arrays: list[jax.Array]) -> tuple[jax.Array, ...]:
    every = tuple(range(len(arrays)))
    return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(call(*x))), argnums=every))(*arrays)


@functools.cache
def on_one_device(name: str, implementation: str | None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Output and gradients."""
    call, arrays, _ = case(name, implementation)
    return jax.jit(call)(*arrays), gradients(call, arrays)


@pytest.mark.parametrize("name, implementation", IMPLEMENTATIONS)
def test_gradients(name: str, implementation: str | None):
    call, arrays, specs = case(name, implementation)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.shard_map(call, mesh=mesh, in_specs=tuple(specs), out_specs=ROWS)
    _, want = on_one_device(name, implementation)
    for got, wanted in zip(gradients(sharded, arrays), want, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("name, implementation", IMPLEMENTATIONS)
def test_explicit_axes(name: str, implementation: str | None):
    """The result is sharded as the arguments are; in jit and out of it, with the mesh set and not."""
    call, arrays, specs = case(name, implementation)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    assert mesh.axis_types == (AxisType.Explicit,)
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    want, want_gradients = on_one_device(name, implementation)
    for run in (call, jax.jit(call)):
        o = run(*placed)
        assert jax.typeof(o).sharding.spec[0] == "x"
        np.testing.assert_allclose(o, want, atol=1e-5)
    with jax.set_mesh(mesh):
        for got, wanted in zip(gradients(call, placed), want_gradients, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_explicit_axes_of_states():
    """Heads over an axis, states in and out."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
    q, k, v, log_alpha = (
        -jnp.abs(jax.random.normal(key, (2, 5, 4, 3))) for key in jax.random.split(jax.random.key(0), 4)
    )
    arrays = [q, k, v, log_alpha, jax.random.normal(jax.random.key(1), (2, 4, 3, 3))]
    specs = [P("data", None, "tensor")] * 4 + [P("data", "tensor")]

    def call(*arrays):
        return gated_linear_attention(*arrays[:4], initial_state=arrays[4], return_final_state=True)

    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    with jax.set_mesh(mesh):
        o, state = jax.jit(call)(*placed)
    assert jax.typeof(o).sharding.spec == P("data", None, "tensor", None)
    assert jax.typeof(state).sharding.spec == P("data", "tensor", None, None)
    for got, want in zip((o, state), jax.jit(call)(*arrays), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
